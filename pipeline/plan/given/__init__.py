"""What a plan is made from, read without torch.

In: config.json and tokenizer files of the base, the run's settings, the machine's description.
Out: ModelShape, AdapterCounts, Hardware, Layout. Open `shape.py` first.
"""
