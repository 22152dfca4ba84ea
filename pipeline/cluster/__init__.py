"""Ranks and devices of a run: rendezvous, communication, and orderly exit.

Input: the environment variables of a launcher. Output: the `Placement` of this process, which has
its rank and world size; the `Hardware` of the node; and a `Session` for the communication between
ranks. Open `placement.py` first, then `session.py`. `watchdog.py` and `stop.py` end a run;
`exits.py` ends a process with its message and exit code.
"""
