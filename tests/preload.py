"""What the forkserver of tests/ranks.py imports once: every rank of every test starts with it."""

import torch
import torch.distributed

torch.set_num_threads(1)

import bitsandbytes  # noqa: E402, F401
import deepspeed.runtime.engine  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402
import deepspeed.runtime.zero.stage3  # noqa: E402
import deepspeed.runtime.zero.stage_1_and_2  # noqa: E402, F401
import peft  # noqa: E402, F401
import transformers.integrations  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401
