"""Inputs of a plan: sizes of the model, the adapter, the data and the hardware. No torch.

In: config.json and tokenizer files of the base, the run's settings, a description of the machine.
Out: ModelShape, AdapterCounts, DataSize, Hardware, Layout. Open `shape.py` first.
"""
