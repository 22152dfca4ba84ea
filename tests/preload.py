"""Imports of the forkserver of tests/ranks.py, from which every rank of every test is forked."""

# ruff: noqa: E402, F401 - the number of torch's threads is set before DeepSpeed is imported
import gc

import torch
import torch.distributed

torch.set_num_threads(1)

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

get_checkpoint_conversion_mapping("llama")  # compiles 900 patterns, once for all model types
# Garbage collection in a fork would otherwise write to, and so copy, the pages of all modules.
gc.freeze()
