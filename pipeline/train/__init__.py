"""One training run, on every rank of a launcher.

In: settings, and through them prepared data and a base. Out: a run folder with checkpoints,
metrics, status.json and the published adapter. Start with `run.py`, the list of a run's phases.
`start.py` decides what a start does with an existing folder; `loop.py` is the training loop.
"""
