"""Imports of the forkserver of tests/ranks.py, from which every rank of every test is forked."""

# ruff: noqa: E402, F401 - the number of torch's threads is set before DeepSpeed is imported
import functools
import gc
import importlib.metadata
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

gc.disable()  # takes a fifth of the CPU time of the imports
# Reading the metadata of a package takes 2 ms, and a run reads the metadata of 60 packages.
importlib.metadata.version = functools.cache(importlib.metadata.version)

import torch
import torch.distributed

torch.set_num_threads(1)
# A fork replaces torch's thread pool at the first use, and two threads that both use it first, such
# as those that load a model, would find none ("Invalid thread pool").
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

import bitsandbytes
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.engine
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import peft.tuners.lora.bnb
import peft.utils.transformers_weight_conversion
import pytest
import transformers.integrations
import transformers.models.llama.modeling_llama
from packaging.requirements import Requirement
from tqdm import tqdm
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import pipeline.cli.merge
import pipeline.cli.preflight
import pipeline.cli.report
import pipeline.cli.score
import pipeline.cli.train
import pipeline.train.assemble
import pipeline.train.finish
import pipeline.train.loop
import tests.train_tiny
from pipeline.model.adapter import attach_adapter
from pipeline.model.base import load_base
from tests.tiny import make_model, make_plan

get_checkpoint_conversion_mapping("llama")  # compiles 900 patterns, once for all model types
for line in importlib.metadata.requires("rankzero") or ():
    with suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(Requirement(line).name)
# The first plan, base and adapter of a process fill caches of the libraries.
tqdm.monitor_interval = 0  # progress bars would start a thread
with tempfile.TemporaryDirectory() as folder:
    plan = make_plan(make_model(Path(folder) / "model"), zero_stage=2)
    attach_adapter(load_base(plan, torch.device("cpu")), plan)
# A fork has no copy of other threads, and a lock that such a thread holds would stay locked in it.
assert threading.active_count() == 1, threading.enumerate()
# Garbage collection in a fork would otherwise write to, and so copy, the pages of all modules.
gc.freeze()
gc.enable()
