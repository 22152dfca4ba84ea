"""Model configs, hardware and data sizes for plans in tests: no weights, no devices.

The models are dicts of config.json.
"""

from dataclasses import replace

from pipeline.plan.deepspeed.config import deepspeed_config
from pipeline.plan.given.block import Block
from pipeline.plan.given.catalogue import cpu_of, gpu_like, gpu_named
from pipeline.plan.given.data_size import DataSize
from pipeline.plan.given.hardware import GIB, Hardware

LLAMA_8B = {
    "model_type": "llama", "dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64,
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "dtype": "bfloat16", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
CPU = cpu_of(num_cores=2, memory_bytes=24 * GIB)
H100S = replace(gpu_named("h100-80gb"), devices_per_node=8, host_bytes=1024 * GIB)


def gpu(gib: float = 80, count: int = 8, capability=(9, 0)) -> Hardware:
    """A node with `count` GPUs of `gib` GiB each."""
    return replace(
        gpu_like(gib), devices_per_node=count, host_bytes=1024 * GIB, compute_capability=capability
    )


def sized(documents: int, mean: int = 200, longest: int | None = None) -> DataSize:
    """The size of a prepared training set; `mean` and `longest` are lengths in tokens."""
    return DataSize(documents=documents, tokens=documents * mean, longest=longest, is_exact=True)


def with_layout(plan, **changes):
    """The plan with a changed Layout (ZeRO stage, offload, ...) and the DeepSpeed config for it."""
    layout, is_cuda = replace(plan.layout, **changes), plan.hardware.kind == "cuda"
    config = deepspeed_config(plan.shape, plan.settings, layout, is_cuda=is_cuda)
    return replace(plan, layout=layout, deepspeed=config)


def with_blocks(shape, **changes):
    """The model shape with changed fields; a field of Block is changed in every block."""
    changed_block_fields = Block.__dataclass_fields__.keys() & changes.keys()
    block_changes = {key: changes.pop(key) for key in changed_block_fields}
    blocks = tuple(replace(block, **block_changes) for block in shape.blocks)
    return replace(shape, blocks=blocks, **changes)
