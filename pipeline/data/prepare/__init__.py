"""Rows of the run file -> the prepared data set and its audit, in several processes.

In: settings and data files. Out: `data/` in the run folder: splits, audit.json, rejects.jsonl.
Open `prepare.py` first. `job.py` reads the rows of a setting, `tokenised.py` runs in worker
processes, and the keys of `keys.py` determine whether an existing split is reused.
"""
