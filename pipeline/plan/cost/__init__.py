"""Cost model of a layout (ZeRO stage, batch sizes, checkpointing, offload): bytes and seconds.

In: ModelShape, settings, Layout, Hardware. Out: memory of each device and host, and the time of an
optimizer step, both as sums of named terms. Comments give the source of each
formula. Open `memory.py` or `speed.py` first.
"""
