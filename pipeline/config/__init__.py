"""Settings of a run: parses and validates the run file, without torch.

Input: a run file (YAML), which may name presets, and `key=value` overrides. Output: a frozen
RunSettings, or a UserError that names every wrong key with file and line. Open `load.py` first. The
keys are declared in `data_keys.py`, `run_keys.py` and `adapter_keys.py`; `settings.py` checks their
combinations. The files `peer*.py` and `convert.py` are about other training programs.
"""
