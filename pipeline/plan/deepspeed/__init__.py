"""The DeepSpeed config: generated from the plan, with a user's own JSON laid over it.

In: settings, ModelShape, Layout. Out: the dict that `deepspeed.initialize` gets and ds_config.json
holds. Open `config.py` first.
"""
