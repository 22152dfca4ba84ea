"""Experiment trackers: a run's metrics in W&B, TensorBoard, MLflow or Trackio.

In: a run folder, of which metrics.jsonl has the metrics. Out: the tracker's own records, and
RUN/tracking/NAME.json, which records the data that was sent. Training starts a process for each
tracker (process.py) and waits for it only at the end of the run. Open follow.py first.
"""
