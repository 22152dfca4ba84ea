"""Imports of the forkserver of `run_without_torch`: all commands, without torch."""

import gc
import importlib
import sys

import tests.commands  # noqa: F401 - the function that every fork calls
from pipeline.cli.rankzero import VERBS

for verb in VERBS:
    importlib.import_module(f"pipeline.cli.{verb}")
assert not {"torch", "transformers", "peft", "deepspeed", "datasets"} & sys.modules.keys()
gc.freeze()  # as in tests/preload.py
