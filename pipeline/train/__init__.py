"""A training run; every rank executes this code.

In: settings, which name the prepared data and the base model. Out: a run folder with checkpoints,
metrics, status.json and the exported adapter. Start with `run.py`, the list of a run's phases.
`start.py` decides between a new run and a resume; `loop.py` is the training loop.
"""
