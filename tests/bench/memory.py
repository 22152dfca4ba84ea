"""Compare predicted and measured bytes of live tensors over a grid of CPU runs.

    python -m tests.bench.memory [WORD ...] [--explain | --markdown]

The measured value is the peak of bytes in live tensor storages, from before the model is loaded to
the end of the second step, without the workspace of kernels. Each rank is a separate process; the
result is that of the rank with the highest peak.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.bench.explained import ExplainedLiveBytes

BASE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1024,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
COMMON = {"batch_size": 2, "global_batch_size": 8, "lora_r": 16, "max_length": 256}
CKPT_OFF, CKPT_ON = {"gradient_checkpointing": False}, {"gradient_checkpointing": True}
BF16, ALL = {"bf16": True}, {"lora_target_modules": "all-linear"}
NF4 = BF16 | {"load_in_4bit": True}
# Words in the names of cases: `ckpt-on`, `ckpt-off` and `ckpt-3-of-8` are about checkpointed
# layers. Numbers such as 256 are tokens of a sequence. `saved`: embeddings and head are trained
# (setting modules_to_save); `tied`: they are one matrix, and `both`: they are two. `experts`:
# adapters of experts. `accumulation 1`: steps of one micro-batch. `split-2`: 2 ranks share each
# sequence.


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: model config, settings, changes of the planned layout, and number of ranks.

    `documents`: number of documents in each sequence, of about equal length. `is_slow_in_bf16`: of
    the CPU, for the fast path FP32_KERNELS.
    """

    settings: dict
    model: dict = field(default_factory=dict)
    layout: dict = field(default_factory=dict)
    ranks: int = 2
    documents: int = 1
    is_slow_in_bf16: bool = False


GRID = {
    f"{kind} zero{stage} ckpt-{on} {length}": Case(
        settings=settings | checkpointing | {"zero_stage": stage, "max_length": length}
    )
    for kind, settings in {"fp32": {}, "bf16": BF16, "nf4": NF4}.items()
    for stage in (1, 2, 3)
    for on, checkpointing in {"off": CKPT_OFF, "on": CKPT_ON}.items()
    for length in (64, 256)
    if not (kind == "nf4" and stage == 3 and on == "off")  # refused: rule 4bit-zero3-unchecked
}
ZERO2, ZERO3 = BF16 | CKPT_OFF | {"zero_stage": 2}, BF16 | CKPT_OFF | {"zero_stage": 3}
DORA = {"use_dora": True}
EVA = {"init_lora_weights": "eva", "max_length": 64, "batch_size": 1, "global_batch_size": 4}
SAVED = BF16 | CKPT_OFF | {
    "modules_to_save": ["embed_tokens", "lm_head"],
    "max_length": 48, "batch_size": 1, "global_batch_size": 4,
}  # fmt: skip
UNTIED_16K = {"vocab_size": 16384}  # embeddings and head that are larger than the layers
TIED_16K = UNTIED_16K | {"tie_word_embeddings": True}
HEADS, OFFLOAD = {"head_dim": 32}, {"offload_param": "cpu"}
HPZ = {"hpz_partition_size": 2}  # ZeRO++: each 2 ranks hold all parameters
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
ADAPTED_EXPERTS = {"lora_target_modules": ["auto", "experts"], "lora_r": 8}
MIXED = {  # decoder layers with and without experts
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "mlp_only_layers": [0, 1, 2], "head_dim": 32,
}  # fmt: skip
OTHERS = {
    "int8": Case(settings=ZERO2 | {"load_in_8bit": True}),
    "dropout": Case(settings=ZERO2 | {"lora_dropout": 0.1}),
    "saved tied zero1": Case(settings=SAVED | {"zero_stage": 1}, model=TIED_16K),
    "saved tied zero2": Case(settings=SAVED | {"zero_stage": 2}, model=TIED_16K),
    "saved tied zero2 fp32": Case(
        settings=SAVED | {"zero_stage": 2, "bf16": False}, model=TIED_16K
    ),
    "saved tied zero3": Case(settings=SAVED | {"zero_stage": 3}, model=TIED_16K),
    "saved both zero2": Case(settings=SAVED | {"zero_stage": 2}, model=UNTIED_16K),
    "saved both zero2 accumulation 1": Case(
        settings=SAVED | {"zero_stage": 2, "global_batch_size": 2}, model=UNTIED_16K
    ),
    "saved tied zero2 accumulation 1": Case(
        settings=SAVED | {"zero_stage": 2, "global_batch_size": 2}, model=TIED_16K
    ),
    "saved both zero3": Case(settings=SAVED | {"zero_stage": 3}, model=UNTIED_16K),
    "saved both zero3 accumulation 1": Case(
        settings=SAVED | {"zero_stage": 3, "global_batch_size": 2}, model=UNTIED_16K
    ),
    "saved both nf4 zero2": Case(settings=SAVED | NF4 | {"zero_stage": 2}, model=UNTIED_16K),
    "saved embeddings zero2": Case(
        settings=SAVED | {"zero_stage": 2, "modules_to_save": ["embed_tokens"]}, model=UNTIED_16K
    ),
    "saved both zero2 long": Case(
        settings=SAVED | {"zero_stage": 2, "max_length": 256}, model=UNTIED_16K
    ),
    "dora": Case(settings=ZERO2 | DORA),
    "dora short": Case(settings=ZERO2 | DORA | {"max_length": 64, "batch_size": 1}),
    "dora dropout": Case(settings=ZERO2 | DORA | {"lora_dropout": 0.1}),
    "dora nf4 ckpt-on": Case(settings=ZERO2 | CKPT_ON | NF4 | DORA),
    "dora nf4 dropout": Case(settings=ZERO2 | NF4 | DORA | {"lora_dropout": 0.1}),
    "eva zero2": Case(settings=ZERO2 | EVA, model=UNTIED_16K),
    "eva zero2 fp32": Case(settings=CKPT_ON | EVA | {"zero_stage": 2}, model=UNTIED_16K),
    "eva zero3": Case(settings=ZERO3 | CKPT_ON | EVA, model=UNTIED_16K),
    "eva zero3 fp32": Case(settings=CKPT_ON | EVA | {"zero_stage": 3}, model=UNTIED_16K),
    "eva zero3 tied": Case(settings=ZERO3 | CKPT_ON | EVA, model=TIED_16K),
    "eva zero3 256": Case(settings=ZERO3 | CKPT_ON | EVA | {"max_length": 256}, model=UNTIED_16K),
    "eva zero3 nf4": Case(settings=NF4 | CKPT_ON | EVA | {"zero_stage": 3}, model=UNTIED_16K),
    "attention alone": Case(settings=ZERO2 | {"lora_target_modules": ["q_proj", "v_proj"]}),
    "large vocabulary": Case(settings=ZERO2 | CKPT_ON, model=UNTIED_16K),
    "large vocabulary fp32": Case(settings=CKPT_ON | {"zero_stage": 2}, model=UNTIED_16K),
    "large vocabulary zero3": Case(settings=ZERO3 | CKPT_ON, model=UNTIED_16K),
    "large vocabulary zero3 fp32": Case(settings=CKPT_ON | {"zero_stage": 3}, model=UNTIED_16K),
    "large vocabulary gemma2 zero3": Case(
        settings=ZERO3 | CKPT_ON, model={"model_type": "gemma2", "head_dim": 32} | UNTIED_16K
    ),
    "qwen3": Case(settings=ZERO2, model={"model_type": "qwen3"} | HEADS),
    "gemma2": Case(settings=ZERO2, model={"model_type": "gemma2"} | HEADS),
    "gemma2 ckpt-on 1024": Case(
        settings=ZERO2 | {"gradient_checkpointing": True, "max_length": 1024},
        model={"model_type": "gemma2"} | HEADS,
    ),
    "gemma3": Case(settings=ZERO2, model={"model_type": "gemma3_text"} | HEADS),
    "phi": Case(settings=ZERO2 | ALL, model={"model_type": "phi"}),
    "phi3": Case(settings=ZERO2 | ALL, model={"model_type": "phi3"}),
    "gpt_neox": Case(settings=ZERO2 | ALL, model={"model_type": "gpt_neox"}),
    "mixtral": Case(settings=ZERO2 | ALL, model=EXPERTS),
    "mixtral fp32": Case(settings=CKPT_OFF | ALL | {"zero_stage": 2}, model=EXPERTS),
    "mixtral zero3": Case(settings=ZERO3 | ALL, model=EXPERTS),
    "qwen3_moe mixed": Case(settings=ZERO2 | ALL, model=MIXED),
    "qwen3_moe mixed ckpt-3-of-8": Case(
        settings=ZERO2 | ALL | CKPT_ON, model=MIXED, layout={"checkpointed_layers": 3}
    ),
    "qwen3_moe mixed zero3": Case(settings=ZERO3 | ALL, model=MIXED),
    "experts zero2": Case(settings=ZERO2 | ADAPTED_EXPERTS, model=EXPERTS),
    "experts zero2 fp32": Case(
        settings=CKPT_OFF | ADAPTED_EXPERTS | {"zero_stage": 2}, model=EXPERTS
    ),
    "experts zero2 ckpt-on": Case(settings=ZERO2 | ADAPTED_EXPERTS | CKPT_ON, model=EXPERTS),
    "experts zero3": Case(settings=ZERO3 | ADAPTED_EXPERTS, model=EXPERTS),
    "experts zero3 ckpt-on": Case(settings=ZERO3 | ADAPTED_EXPERTS | CKPT_ON, model=EXPERTS),
    "experts mixed ckpt-3-of-8": Case(
        settings=ZERO2 | ADAPTED_EXPERTS | CKPT_ON, model=MIXED, layout={"checkpointed_layers": 3}
    ),
    "zero2 ckpt-3-of-8": Case(settings=ZERO2 | CKPT_ON, layout={"checkpointed_layers": 3}),
    "zero3 ckpt-5-of-8": Case(settings=ZERO3 | CKPT_ON, layout={"checkpointed_layers": 5}),
    "hpz 2 on 4 ranks": Case(settings=ZERO3, layout=HPZ, ranks=4),
    "hpz 2 on 4 ranks nf4": Case(settings=ZERO3 | NF4 | CKPT_ON, layout=HPZ, ranks=4),
    "offload": Case(settings=ZERO3, layout=OFFLOAD),
    "offload nf4": Case(settings=ZERO3 | NF4 | CKPT_ON, layout=OFFLOAD),
    "zero2 1 rank": Case(settings=ZERO2, ranks=1),
    "zero3 1 rank": Case(settings=ZERO3, ranks=1),
    "zero2 accumulation 1": Case(settings=ZERO2 | {"batch_size": 4}),
    "zero3 accumulation 1": Case(settings=ZERO3 | CKPT_ON | {"batch_size": 4}),
}
GEMMA2 = {"model_type": "gemma2"} | HEADS
PACKED = {
    "fp32 kernels ckpt-off": Case(settings=ZERO2, is_slow_in_bf16=True),
    "fp32 kernels ckpt-on": Case(settings=ZERO2 | CKPT_ON, is_slow_in_bf16=True),
    "fp32 kernels zero3": Case(settings=ZERO3, is_slow_in_bf16=True),
    "fp32 kernels attention alone": Case(
        settings=ZERO2 | {"lora_target_modules": ["q_proj", "v_proj"]}, is_slow_in_bf16=True
    ),
    "packed fp32 kernels": Case(settings=ZERO2, documents=5, is_slow_in_bf16=True),
    "packed fp32 zero2 ckpt-off": Case(settings=CKPT_OFF | {"zero_stage": 2}, documents=5),
    "packed bf16 zero2 ckpt-off": Case(settings=ZERO2, documents=5),
    "packed bf16 zero2 ckpt-on": Case(settings=ZERO2 | CKPT_ON, documents=5),
    "packed bf16 zero3 ckpt-off": Case(settings=ZERO3, documents=5),
    "packed bf16 zero3 ckpt-on": Case(settings=ZERO3 | CKPT_ON, documents=5),
    "packed nf4 zero2 ckpt-off": Case(settings=ZERO2 | NF4, documents=5),
    "packed nf4 zero3 ckpt-on": Case(settings=ZERO3 | NF4 | CKPT_ON, documents=5),
    "packed int8": Case(settings=ZERO2 | {"load_in_8bit": True}, documents=5),
    "packed dropout": Case(settings=ZERO2 | {"lora_dropout": 0.1}, documents=5),
    "packed attention alone": Case(
        settings=ZERO2 | {"lora_target_modules": ["q_proj", "v_proj"]}, documents=5
    ),
    "packed 1024 of 20": Case(settings=ZERO2 | {"max_length": 1024}, documents=20),
    "packed qwen3": Case(settings=ZERO2, model={"model_type": "qwen3"} | HEADS, documents=5),
    "packed gemma2": Case(settings=ZERO2, model=GEMMA2, documents=5),
    "packed gemma2 ckpt-on 1024": Case(
        settings=ZERO2 | CKPT_ON | {"max_length": 1024}, model=GEMMA2, documents=3
    ),
    "packed gemma2 ckpt-off 1024": Case(
        settings=ZERO2 | {"max_length": 1024}, model=GEMMA2, documents=3
    ),
    "packed phi": Case(settings=ZERO2 | ALL, model={"model_type": "phi"}, documents=5),
    "packed phi3": Case(settings=ZERO2 | ALL, model={"model_type": "phi3"}, documents=5),
    "packed gpt_neox": Case(settings=ZERO2 | ALL, model={"model_type": "gpt_neox"}, documents=5),
    "packed mixtral": Case(settings=ZERO2 | ALL, model=EXPERTS, documents=5),
}
# Classes that families.py does not have, one for each kind of block.
MLA = {  # multi-head latent attention
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "num_key_value_heads": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {  # linear attention in three of four layers
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
}  # fmt: skip
CLASS_MODELS = {
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "glm4": HEADS,
    "gpt_oss": EXPERTS | HEADS | {"layer_types": ["sliding_attention", "full_attention"] * 4},
    "deepseek_v3": MLA,
    "qwen3_next": LINEAR | HEADS,
    "gemma3": {  # a wrapper with a vision tower
        "text_config": BASE | HEADS | {"model_type": "gemma3_text"},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "gemma4_text": HEADS | {  # two widths of heads
        "global_head_dim": 64, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 4, "block_auto_adjust_ff_dim": False},
    "gemma3n_text": HEADS | {  # embeddings for each block, here the largest parameter
        "vocab_size_per_layer_input": 16384, "hidden_size_per_layer_input": 64,
        "num_kv_shared_layers": 0, "laurel_rank": 16, "intermediate_size": [688] * 8,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
        "activation_sparsity_pattern": [0.0] * 8,
    },
}  # fmt: skip
CLASSES = {
    f"class {kind} zero{stage} ckpt-{on}": Case(
        settings=BF16 | checkpointing | {"zero_stage": stage}, model=model | {"model_type": kind}
    )
    for kind, model in CLASS_MODELS.items()
    for stage, on, checkpointing in ((2, "off", CKPT_OFF), (3, "on", CKPT_ON))
}
SPLIT2, SPLIT4 = ({"sequence_parallel_size": size} for size in (2, 4))
SPLIT = {  # groups of ranks share each sequence
    "split-2 fp32 zero2 ckpt-off": Case(settings=CKPT_OFF | {"zero_stage": 2} | SPLIT2),
    "split-2 zero2 ckpt-off": Case(settings=ZERO2 | SPLIT2),
    "split-2 zero2 ckpt-off 1024": Case(settings=ZERO2 | SPLIT2 | {"max_length": 1024}),
    "split-2 zero3 ckpt-on": Case(settings=ZERO3 | CKPT_ON | SPLIT2),
    "split-2 packed": Case(settings=ZERO2 | SPLIT2, documents=5),
    "split-2 gemma2": Case(settings=ZERO2 | SPLIT2, model=GEMMA2),
    "split-2 gpt_neox": Case(settings=ZERO2 | ALL | SPLIT2, model={"model_type": "gpt_neox"}),
    "split-2 class deepseek_v3": Case(
        settings=ZERO2 | SPLIT2, model=MLA | {"model_type": "deepseek_v3"}
    ),
    "split-4 zero2 ckpt-off": Case(settings=ZERO2 | SPLIT4, ranks=4),
    "split-4 replicated keys 1024": Case(
        settings=ZERO2 | SPLIT4 | {"max_length": 1024}, model={"num_key_value_heads": 2}, ranks=4
    ),
}
TILES, HOST_INPUTS = {"mlp_tiles": 8}, {"offload_activations": True}
LONG = {"batch_size": 1, "global_batch_size": 2, "max_length": 1024}
WIDE = {"vocab_size": 128, "intermediate_size": 1376, "num_hidden_layers": 3}
LONGER = {
    f"{kind} zero{stage} {name}": Case(
        settings=settings | LONG | savings | {"zero_stage": stage}, model=WIDE
    )
    for kind, settings in {"fp32": {}, "bf16": BF16, "nf4": NF4}.items()
    for stage in (2, 3)
    for name, savings in {
        "tiles ckpt-off": TILES | CKPT_OFF,
        "tiles ckpt-on": TILES | CKPT_ON,
        "tiles inputs-on-host": TILES | HOST_INPUTS,
        "inputs-on-host": HOST_INPUTS,
    }.items()
    if not (kind == "nf4" and stage == 3 and name == "tiles ckpt-off")
} | {
    "tiles phi": Case(settings=ZERO2 | ALL | LONG | TILES, model=WIDE | {"model_type": "phi"}),
    "tiles dropout": Case(settings=ZERO2 | LONG | TILES | {"lora_dropout": 0.1}, model=WIDE),
    "tiles packed": Case(settings=ZERO2 | LONG | TILES, model=WIDE, documents=5),
}
CASES = GRID | LONGER | OTHERS | PACKED | CLASSES | SPLIT
TABLE = (
    "| case | measured, MiB | predicted | error | worst moment, predicted |\n|---|---|---|---|---|"
)


class FullSequences:
    """A split of sequences of equal length and number of documents, with every token supervised."""

    def __init__(self, count, length, vocab_size, documents=1):
        import numpy as np

        from tests.tiny import sequences_of

        random = np.random.default_rng(0)
        self.lengths = np.full(count, length)
        self._ids = random.integers(3, vocab_size, (count, length)).astype(np.int32)
        self._bounds = [length * i // documents for i in range(documents + 1)]
        self.sequences = sequences_of(self.lengths, self.lengths - documents)

    def __len__(self):
        return len(self.lengths)

    def sequence(self, i):
        import numpy as np

        parts = zip(self._bounds, self._bounds[1:], strict=False)
        return [(self._ids[i, start:end], np.arange(end - start) > 0) for start, end in parts]


def make_folder(folder, model, device="cpu"):
    """Save a model with random weights, drawn on `device`, as a model folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {"dtype": "bfloat16"} | ({} if "text_config" in model else BASE) | model
    dtype = getattr(torch, values.pop("dtype"))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def plan_case(folder, case, hardware=None):
    """The plan of a case; the default hardware is a CPU."""
    from pipeline.plan.given.catalogue import cpu_of
    from tests.plans import with_layout
    from tests.tiny import make_plan

    if case.is_slow_in_bf16:
        hardware = replace(cpu_of(2, 2**34), is_slow_in_bf16=True)
    keys = COMMON | case.settings | {"packing": case.documents > 1}
    return with_layout(make_plan(folder, case.ranks, 64, hardware=hardware, **keys), **case.layout)


def two_steps(session, plan, base, documents=1):
    """Attach an adapter to the loaded base, build the engine, and train two steps.

    Returns the largest batch of these steps.
    """
    from pipeline.data.order.batches import build_batch
    from pipeline.model.adapter import attach_adapter
    from pipeline.model.input_directions import set_input_directions
    from pipeline.train.engine import Engine
    from tests.train_tiny import batches_of_step

    split = FullSequences(64, plan.settings.max_length, plan.shape.vocab_size, documents)
    group = session.sequence_group(plan.layout.sequence_parallel_size)
    model = attach_adapter(base, plan)
    if plan.settings.initialises_from_inputs:
        batches_of_one = (build_batch(split, [i]) for i in range(8))  # two updates of the PCA
        set_input_directions(model, plan, session, batches_of_one)
    engine = Engine(model, plan, group=group)
    for step in range(2):
        batches, supervised = batches_of_step(plan, split, step, session.placement.rank)
        engine.optimizer_step(batches, supervised, 1e-3)
    return engine.largest_batch


def measure(session, folder, case):
    """Measured and predicted peak of live bytes of this rank over two steps, with their terms."""
    from pipeline.model.base import load_base
    from pipeline.plan.cost.memory import base_bytes
    from pipeline.plan.cost.memory import memory as memory_of
    from pipeline.plan.given.layout import SequenceProfile

    plan = plan_case(folder, case)
    offloaded_bytes = 0
    if plan.layout.offload_param == "cpu":  # on a CPU, offloaded parameters count as live tensors
        all_bytes = base_bytes(plan.shape, plan.settings, plan.training_dtype)
        offloaded_bytes = all_bytes // plan.world_size
    with ExplainedLiveBytes() as live:
        base = load_base(plan, session.device)
        loading_peak = live.peak
        largest = two_steps(session, plan, base, case.documents)
    sequences = SequenceProfile(tokens=plan.settings.max_length, attended=largest.attended)
    memory = memory_of(plan.shape, plan.settings, plan.layout, plan.hardware, sequences)
    return {
        "measured": live.peak,
        "predicted": memory.tensor_bytes + offloaded_bytes,
        "loading": loading_peak,
        "predicted_loading": memory.loading_tensor_bytes + offloaded_bytes,
        "terms": memory.per_rank,
        "moment": memory.worst_moment,
        "alive": live.alive(),
    }


def run(case, folder):
    """The result of the rank with the highest peak; model folders are reused."""
    from tests.ranks import run_ranks

    values = case.model | {"dtype": "bfloat16" if "bf16" in case.settings else "float32"}
    model = folder / hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
    if not model.exists():
        make_folder(model, values)
    plan_case(model, case)  # derives the shape of a class once; the ranks find it in the cache
    ranks = run_ranks(measure, model, case, tmp_path=folder, world_size=case.ranks)
    return max(ranks, key=lambda result: result["measured"])


def error_of(result):
    """Relative error of the prediction; 0.05 if it is 5 % too high."""
    return result["predicted"] / result["measured"] - 1


def mib(size):
    return f"{size / 2**20:.2f}"


def line(name, result):
    """The result of a case in one line of text."""
    measured, predicted = mib(result["measured"]), mib(result["predicted"])
    return (
        f"{name:24} measured {measured:>7} predicted {predicted:>7} MiB"
        f" {error_of(result):+6.1%} at {result['moment']}; loading {mib(result['loading'])}, "
        f"predicted {mib(result['predicted_loading'])}"
    )


def row(name, result):
    """The result of a case as a row of TABLE."""
    cells = mib(result["measured"]), mib(result["predicted"]), f"{error_of(result):+.1%}"
    return f"| {' | '.join((name, *cells, result['moment']))} |"


def summary(errors):
    median = statistics.median(errors)
    return f"{len(errors)} cases, worst {max(errors):.1%}, median {median:.1%}"


def explanation(result):
    """Lines with the predicted terms, and the measured tensors at the peak, largest first."""
    yield from (f"    {mib(size):>8} {term}" for term, size in result["terms"].items())
    yield "  alive at the peak:"
    largest = sorted(result["alive"].items(), key=lambda item: -item[0][0] * item[1])
    for (size, source), count in largest[:40]:
        yield f"    {mib(size * count):>8} = {count:3d} x {size:9d} {source}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--explain", action="store_true", help="list the tensors at the peak")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/memory.md")
    parser.add_argument("words", nargs="*", help="run the cases whose names contain these words")
    arguments = parser.parse_args()
    chosen = [name for name in CASES if all(word in name for word in arguments.words)]
    if arguments.markdown:
        print(TABLE)
    errors = []
    with tempfile.TemporaryDirectory() as tmp:
        for name in chosen:
            result = run(CASES[name], Path(tmp))
            errors.append(abs(error_of(result)))
            print(row(name, result) if arguments.markdown else line(name, result), flush=True)
            if arguments.explain:
                print(*explanation(result), sep="\n")
    print(f"\n{summary(errors)}")


if __name__ == "__main__":
    main()
