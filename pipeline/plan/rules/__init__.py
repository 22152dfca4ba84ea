"""Rules: a table of known problems, each with its condition, reason, remedy, source and versions.

In: a PlanContext (settings, model, hardware, layout, DeepSpeed config, installed packages).
Out: the rules that apply to it. A rule of level `refuse` ends the run before it starts. Open
`rule.py` first.
"""
