"""Where a run runs: its ranks and devices, and how they meet, agree and end.

In: the environment that a launcher gives a process. Out: its `Placement`, the `Hardware` of the
node, and a `Session`, through which all ranks communicate. Open `placement.py` first, then
`session.py`; `watchdog.py` and `stop.py` end a run, `exits.py` the process.
"""
