"""Experiment trackers: a run's metrics in W&B, TensorBoard, MLflow or Trackio.

Input: the metrics in metrics.jsonl of a run folder. Output: a run in the tracker, and the file
RUN_FOLDER/tracking/NAME.json, which records the data that was sent. Training starts a process for
each tracker (process.py) and waits for it only at the end of the run. Open follow.py first.
"""
