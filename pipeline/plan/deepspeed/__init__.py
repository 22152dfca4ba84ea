"""The DeepSpeed config: generated from the plan, then merged with the user's own JSON.

In: settings, ModelShape, Layout. Out: the dict that is passed to `deepspeed.initialize` and written
to ds_config.json. Open `config.py` first.
"""
