"""Rules: a table of known problems, each with its condition, reason, remedy, source and versions.

In: a PlanContext (settings, model, hardware, layout, DeepSpeed config, installed packages).
Out: the rules that apply to it; a rule of level `refuse` stops the run before its start. Open
`rule.py` first.
"""
