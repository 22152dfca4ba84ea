"""The verbs of the command line: one module each, with its arguments and its wiring.

In: `sys.argv`. Out: one call into the rooms, and the exit code. `launch/VERB.py` and
`rankzero VERB` call a module's `main`. Start with `train.py`; `arguments.py` has what they share.
"""
