"""Settings of a run: parses and validates the run file. No torch, no other room of the project.

In: a run file (YAML), `key=value` overrides, and the names of presets. Out: a frozen RunSettings,
or a UserError that names every wrong key with file and line. Start with `load.py`; the keys are in
`data_keys.py` and `run_keys.py`, what they mean together is in `settings.py`.
"""
