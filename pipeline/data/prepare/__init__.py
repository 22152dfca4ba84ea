"""Rows of the run file -> the prepared data set and its audit, in several processes.

In: settings and data files. Out: `data/` in the run folder: splits, audit.json, rejects.jsonl.
Open `prepare.py` first; `job.py` reads the rows of a setting, `tokenised.py` is the work of its
worker processes, `keys.py` says when a split can be used again.
"""
