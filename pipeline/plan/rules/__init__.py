"""What is known to go wrong, as a table: each rule has its reason, remedy, source and versions.

In: a PlanContext (settings, model, hardware, layout, DeepSpeed config, installed packages).
Out: the rules that apply to it, of which a `refuse` ends the start. Open `rule.py` first.
"""
