"""What a layout costs: bytes on every device and host, seconds of an optimizer step.

In: a ModelShape, settings, a Layout and the Hardware. Out: memory and time, term by term, with
the source of each formula. Open `memory.py` or `speed.py` first.
"""
