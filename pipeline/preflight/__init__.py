"""Preflight: checks of a run on all its ranks, in seconds, before GPU-hours are spent.

Input: a run file, and on each rank a `RankContext` (devices, and connection to the other ranks).
Output: a report, and a UserError if a check fails. Open `checks.py` first: it lists the checks in
stages. `stages.py` runs the stages.
"""
