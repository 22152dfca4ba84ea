"""Cost model of a layout: bytes on each device and host, seconds of an optimizer step.

In: a ModelShape, settings, a Layout and the Hardware. Out: memory and time, term by term. The code
gives the source of each formula. Open `memory.py` or `speed.py` first.
"""
