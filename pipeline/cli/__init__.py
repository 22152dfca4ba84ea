"""The verbs: each module has one verb's arguments and wiring; `launch/` calls its `main`.

In: a command line. Out: a call of one room's function, and an exit code.
"""
