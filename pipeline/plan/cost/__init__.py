"""Cost model of a layout: bytes on each device and host, seconds of an optimizer step.

In: ModelShape, settings, Layout, Hardware. Out: memory and time, as named terms. Comments give the
source of each formula. Open `memory.py` or `speed.py` first.
"""
