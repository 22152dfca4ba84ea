"""Rows of the run file -> the prepared data set and its audit, in several processes.

In: settings and data files. Out: `data/` in the run folder. Open `prepare.py` first.
"""
