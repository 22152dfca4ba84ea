"""Ranks and devices of a run: rendezvous, communication, and orderly exit.

In: the environment variables that a launcher sets. Out: this process's `Placement`, the `Hardware`
of the node, and a `Session`, through which all ranks communicate. Open `placement.py` first, then
`session.py`; `watchdog.py` and `stop.py` end a run, `exits.py` sets the exit code.
"""
