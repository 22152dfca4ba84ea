"""The command line: one module for each command (train, plan, prepare, ...).

In: `sys.argv`. Out: calls into the other packages, and the exit code. `launch/NAME.py` and
`rankzero NAME` call the `main` of the module NAME. Start with `train.py`; `arguments.py` has the
arguments that several commands share.
"""
