"""Ranks and devices of a run: rendezvous, communication, and orderly exit.

In: the environment variables of a launcher. Out: the `Placement` of this process, the `Hardware` of
the node, and a `Session` for the communication between ranks. Open `placement.py` first, then
`session.py`; `watchdog.py` and `stop.py` end a run, `exits.py` sets the exit code.
"""
