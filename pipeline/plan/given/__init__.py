"""Inputs of a plan: sizes of model, adapter, data and hardware, read without torch.

In: config.json and tokenizer files of the base, the run's settings, a description of the machine.
Out: ModelShape, AdapterCounts, Hardware, Layout. Open `shape.py` first.
"""
