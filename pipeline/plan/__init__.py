"""The plan of a run: settings, model shape and hardware -> Plan. No torch, under a second.

In: RunSettings, the model's config.json, a description of the machine, and the size of the data.
Out: a Plan. It has the chosen layout (ZeRO stage, micro-batch size, activation checkpointing,
offload), the DeepSpeed config, predicted memory and time, and the rules that apply (known problems
of such a run). Open `plan.py` first, then `choose.py`.
"""
