"""Predicted against measured bytes of live tensors, over a grid of CPU runs.

    python -m tests.bench.memory [--explain CASE]

Measured: the most bytes in live tensor storages from before the model is loaded to the end of the
second step, the workspace of kernels aside. Every rank is a process of its own; the largest counts.
"""

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
        loaded = live.now
        engine = Engine(attach_adapter(base, plan), plan)
        started = live.now
        for step in range(2):
            batches, supervised = work(plan, split, step, session.placement.rank)
            engine.optimizer_step(batches, supervised, 1e-3)
    peak, at, event, counts = live.at_peak()
    assert peak == live.peak
    return {"peak": peak, "loaded": loaded, "started": started, "end": live.now, "at": at,
            "events": len(live.events), "event": event, "counts": counts}  # fmt: skip


if __name__ == "__main__":
    import sys

    import yaml

    from tests.ranks import run_ranks

    with tempfile.TemporaryDirectory() as tmp:
        model, settings = yaml.safe_load(sys.argv[1]), yaml.safe_load(sys.argv[2])
        world = int(sys.argv[3])
        folder = make_folder(Path(tmp) / "model", **model)
        [found, *_] = run_ranks(measure, folder, settings, tmp_path=Path(tmp), world_size=world)
        print(
            {
                k: (f"{v / 2**20:.2f}" if k in ("peak", "loaded", "started", "end") else v)
                for k, v in found.items()
                if k != "counts"
            }
        )
        for (size, source), n in sorted(found["counts"].items(), key=lambda x: -x[0][0] * x[1])[
            :40
        ]:
            print(f"{size * n / 2**20:9.3f} MiB = {n:3d} x {size:10d} {source}")
