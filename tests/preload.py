"""The imports of the forkserver of tests/ranks.py: every rank of every test is forked from it."""

# ruff: noqa: E402, F401 - torch's threads are set before DeepSpeed is imported
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
# A collection in a rank would otherwise visit, and so copy, the objects of all these modules.
gc.freeze()
