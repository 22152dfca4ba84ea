"""A training run. Every rank executes this code.

In: settings, which name the base and the data. Out: a run folder with checkpoints, metrics,
status.json and the published adapter. Open `run.py` first: it calls the phases of a run in order.
`start.py` decides between a new run and a resume; `loop.py` is the training loop.
"""
