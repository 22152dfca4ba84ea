"""Predicted against measured bytes of live tensors, over a grid of CPU runs.

    python -m tests.bench.memory [--explain CASE]

Measured: the most bytes in live tensor storages from before the model is loaded to the end of the
second step, the workspace of kernels aside. Every rank is a process of its own; the largest counts.
"""

import argparse
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from pipeline.train.live_bytes import LiveBytes

BASE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


class Explained(LiveBytes):
    """Remembers every change, to say what was alive at the peak."""

    def __init__(self):
        super().__init__()
        self.events = []
        self.sizes = {}
        self.names = {}

    def _count(self, size, source, key):
        super()._count(size, source, key)
        self.events.append((size, source, key))

    def at_peak(self):
        now, peak, at = 0, 0, 0
        for i, (size, *_) in enumerate(self.events):
            now += size
            if now > peak:
                peak, at = now, i
        alive = defaultdict(lambda: [0, ""])
        for size, source, key in self.events[: at + 1]:
            if size < 0 and not source:
                alive.pop(key)
            else:
                alive[key][0] += size
                alive[key][1] = alive[key][1] or source
        counts = Counter((size, source) for size, source in alive.values())
        return peak, at, self.events[at], counts


def make_folder(folder, **change):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = BASE | change
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class FullDocuments:
    """A split of documents of one length, every token supervised."""

    def __init__(self, count, length, vocab_size):
        import numpy as np

        random = np.random.default_rng(0)
        self.lengths = np.full(count, length)
        self._ids = random.integers(3, vocab_size, (count, length)).astype(np.int32)
        self.supervised_counts = np.full(count, length - 1)

    def __len__(self):
        return len(self.lengths)

    def document(self, i):
        import numpy as np

        mask = np.ones(len(self._ids[i]), bool)
        mask[0] = False
        return self._ids[i], mask


def measure(session, folder, settings):
    """Peak of live bytes of this rank over two steps, and what it was made of."""
    from pipeline.model.adapter import attach_adapter
    from pipeline.model.base import load_base
    from pipeline.train.engine import Engine
    from tests.engine.train_tiny import work
    from tests.tiny import make_plan

    plan = make_plan(folder, session.placement.world_size, 64, **settings)
    split = FullDocuments(64, plan.settings.max_length, plan.shape.vocab_size)
    with Explained() as live:
        base = load_base(plan, session.device)
        loaded = live.peak
        engine = Engine(attach_adapter(base, plan), plan)
        for step in range(2):
            batches, supervised = work(plan, split, step, session.placement.rank)
            engine.optimizer_step(batches, supervised, 1e-3)
    memory = plan.memory
    return {
        "measured": live.peak,
        "loading": loaded,
        "predicted": memory.tensor_bytes,
        "predicted_loading": memory.load_peak_bytes,
        "terms": dict(memory.per_rank),
        "moment": memory.worst_moment,
        "last": live.at_peak()[2],
        "alive": live.at_peak()[3],
    }


DEEP = {"num_hidden_layers": 8, "vocab_size": 1024}
KINDS = {"fp32": {}, "bf16": {"bf16": True}, "nf4": {"bf16": True, "load_in_4bit": True}}
COMMON = {"batch_size": 2, "global_batch_size": 8, "lora_r": 16}
# Name: model, settings, ranks.
CASES = {
    f"{kind} zero{stage} ckpt-{'on' if on else 'off'} {length}": (
        DEEP | {"dtype": "bfloat16" if settings else "float32"},
        COMMON
        | settings
        | {"zero_stage": stage, "gradient_checkpointing": on, "max_length": length},
        2,
    )
    for kind, settings in KINDS.items()
    for stage in (1, 2, 3)
    for on in (False, True)
    for length in (64, 256)
    if not (kind == "nf4" and stage == 3 and not on)  # refused: rule 4bit-zero3-reentrant
}
_OTHERS = {
    "int8": (DEEP, {"load_in_8bit": True, "gradient_checkpointing": False}),
    "dropout": (DEEP, {"lora_dropout": 0.1, "gradient_checkpointing": False}),
    "attention alone": (
        DEEP,
        {"lora_target_modules": ["q_proj", "v_proj"], "gradient_checkpointing": False},
    ),
    "large vocabulary": (DEEP | {"vocab_size": 16384}, {"gradient_checkpointing": True}),
    "qwen3": (DEEP | {"model_type": "qwen3", "head_dim": 32}, {"gradient_checkpointing": False}),
    "gemma2": (DEEP | {"model_type": "gemma2", "head_dim": 32}, {"gradient_checkpointing": False}),
    "gemma3": (
        DEEP | {"model_type": "gemma3_text", "head_dim": 32},
        {"gradient_checkpointing": False},
    ),
    "phi": (DEEP | {"model_type": "phi"}, {"gradient_checkpointing": False}),
    "phi3": (DEEP | {"model_type": "phi3"}, {"gradient_checkpointing": False}),
    "gpt_neox": (DEEP | {"model_type": "gpt_neox"}, {"gradient_checkpointing": False}),
    "mixtral": (
        DEEP | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        {"gradient_checkpointing": False},
    ),
    "mixtral zero3": (
        DEEP | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        {"gradient_checkpointing": False, "zero_stage": 3},
    ),
}
CASES |= {
    name: (
        model | {"dtype": "bfloat16"},
        COMMON
        | {"bf16": True, "zero_stage": 2, "max_length": 256}
        | ({} if "Llama" in name else {"lora_target_modules": "all-linear"})
        | settings,
        2,
    )
    for name, (model, settings) in _OTHERS.items()
}


def run(name, tmp):
    from tests.ranks import run_ranks

    model, settings, world = CASES[name]
    folder = Path(tmp) / "-".join(str(value) for value in model.values())
    if not folder.exists():
        make_folder(folder, **model)
    ranks = run_ranks(measure, folder, settings, tmp_path=Path(tmp), world_size=world)
    return max(ranks, key=lambda found: found["measured"])


def mib(size):
    return f"{size / 2**20:8.2f}"


def show(name, found, *, is_explained):
    error = found["predicted"] / found["measured"] - 1
    print(
        f"{name:32} measured {mib(found['measured'])}  predicted {mib(found['predicted'])} MiB "
        f"{error:+7.1%}  {found['moment']}; load "
        f"{mib(found['loading'])} {mib(found['predicted_loading'])}",
        flush=True,
    )
    if is_explained:
        for term, size in found["terms"].items():
            print(f"    {mib(size)} {term}")
        print("  at the peak:", found["last"])
        largest = sorted(found["alive"].items(), key=lambda item: -item[0][0] * item[1])
        for (size, source), count in largest[:40]:
            print(f"    {mib(size * count)} = {count:3d} x {size:9d} {source}")
    return abs(error)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--explain", action="store_true")
    parser.add_argument("cases", nargs="*", help="words that the name of a case must hold")
    given = parser.parse_args()
    chosen = [name for name in CASES if all(word in name for word in given.cases)]
    with tempfile.TemporaryDirectory() as tmp:
        errors = [show(name, run(name, tmp), is_explained=given.explain) for name in chosen]
    middle = sorted(errors)[len(errors) // 2]
    print(f"{len(errors)} cases, worst {max(errors):.1%}, median {middle:.1%}")


if __name__ == "__main__":
    main()
