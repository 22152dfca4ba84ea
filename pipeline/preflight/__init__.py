"""Checks of a run on all its ranks, in seconds, before GPU-hours are spent.

In: a run file with its placement, hardware and session (`RankContext`). Out: a report, or UserError
if a check fails. A check is one object: name, probe, assessment, remedy. Open `checks.py` first; it
lists the checks in stages, and `stages.py` runs the stages.
"""
