"""Settings of a run: parses and validates the run file, without torch.

In: a run file (YAML), `key=value` overrides, and the names of presets. Out: a frozen RunSettings,
or a UserError that names every wrong key with file and line. Open `load.py` first. The keys are
declared in `data_keys.py` and `run_keys.py`; `settings.py` checks their combinations.
"""
