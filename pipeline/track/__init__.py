"""Experiment trackers: a run's metrics in W&B, TensorBoard, MLflow or Trackio.

In: a run folder, whose metrics.jsonl is the only source. Out: the tracker's own records, and
RUN/tracking/NAME.json with what has been sent. Each tracker is a process of its own (follow.py),
which training starts (process.py) and never waits for before its end. Begin with follow.py.
"""
