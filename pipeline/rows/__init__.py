"""Data files -> rows -> Examples, without torch and without a plan.

In: the names in `train_data` and `eval_data`. Out: Examples (conversation, prompt and completion,
or text), and a bad row with file, line and reason for each row that cannot be read. The plan's
size estimate and prepare use the same readers. Open `sources.py` first.
"""
