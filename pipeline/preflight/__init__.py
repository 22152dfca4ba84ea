"""Checks of a run on all its ranks, in seconds, before GPU-hours are spent.

In: a run file with its placement, hardware and session (`RankContext`). Out: a report, or UserError
where a check fails. A check is one object: name, probe, assessment, remedy. Open `checks.py` first,
which lists them in stages; `stages.py` runs the stages.
"""
