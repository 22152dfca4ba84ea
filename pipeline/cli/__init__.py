"""The command line: one module for each verb (train, plan, prepare, ...).

In: `sys.argv`. Out: calls into the other packages, and the exit code. `launch/VERB.py` and
`rankzero VERB` call a module's `main`. Start with `train.py`; `arguments.py` has shared arguments.
"""
