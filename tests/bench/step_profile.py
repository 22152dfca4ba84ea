"""Where the time of a training step goes, from torch.profiler, on a CPU or a GPU.

    python -m tests.bench.step_profile [--steps N] [--set NAME=VALUE ...]

One rank trains a model with the shape of SmolLM2-135M and random weights. The result is a table of
shares of the step's wall time. On a GPU the times are those of kernels; on a CPU those of operators
on the main thread. The last row is the rest: on a CPU Python and waiting, on a GPU an idle device.
"""

import argparse
import json
import os
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import yaml
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.plans import SMOLLM2

KINDS = {
    "base products": "matrix products with frozen weights",
    "LoRA products": "matrix products with A and B",
    "attention": "scores and their backward pass",
    "head and loss": "logits, their loss and its gradient",
    "dequantisation": "4-bit and 8-bit weights to 16 bits",
    "elementwise": "norms, rope, gates, dropout, copies",
    "optimizer": "between the last backward pass and the end of the step",
    "collectives": "NCCL or gloo",
    "rest": "CPU: Python and waiting; GPU: no kernel runs",
}
_PRODUCTS = ("::mm", "::addmm", "::linear", "::bmm", "::baddbmm", "mkldnn", "grouped_mm")
_ATTENTION = ("attention", "varlen", "::_softmax")
_LOSS = ("log_softmax", "nll_loss", "logsumexp", "cross_entropy")
_PHASE = "the optimizer's step"


class Phases(AbstractContextManager):
    """Marks phases of a step in the profile: `phases(name)` ends one and begins the next."""

    def __init__(self):
        self._range = None

    def __call__(self, phase):
        self.__exit__()
        self._range = torch.profiler.record_function(f"phase: {phase}")
        self._range.__enter__()

    def __exit__(self, *error):
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def kind_of(name, shapes, is_optimizer, lora_sizes, vocab_size):
    """The kind of an operator, from its name and the shapes of its inputs.

    `lora_sizes`: sizes that only LoRA matrices have: r, and multiples of it for joined layers.
    """
    sizes = {size for shape in shapes if isinstance(shape, list) for size in shape}
    if name.startswith(("c10d", "gloo", "nccl", "record_param_comms")):
        return "collectives"
    if is_optimizer:
        return "optimizer"
    if any(word in name for word in _LOSS) or vocab_size in sizes:
        return "head and loss"
    if any(word in name for word in _ATTENTION):
        return "attention"
    if "bitsandbytes" in name or "quantize" in name:
        return "dequantisation"
    if any(word in name for word in _PRODUCTS):
        return "LoRA products" if sizes & lora_sizes else "base products"
    return "elementwise"


def shares(profiler, seconds, lora_sizes, vocab_size, *, is_cuda):
    """Share of `seconds` that each kind takes."""
    events = profiler.events()
    phases = sorted(
        (event.time_range.start, event.name)
        for event in events
        if event.name.startswith("phase: ") and event.device_type == DeviceType.CPU
    )
    starts = [start for start, _ in phases]
    times = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU or event.name.startswith("phase: "):
            continue
        spent = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        phase = phases[max(bisect_right(starts, event.time_range.start) - 1, 0)][1]
        is_optimizer = phase.endswith(_PHASE)
        kind = kind_of(event.name, event.input_shapes or [], is_optimizer, lora_sizes, vocab_size)
        times[kind] += spent / 1e6
    result = {kind: times[kind] / seconds for kind in KINDS if kind != "rest"}
    return result | {"rest": 1 - sum(result.values())}


def profile_steps(plan, base, split, steps=3):
    """Train `steps` steps under the profiler, after two others; returns the shares by kind."""
    from pipeline.model.adapter import attach_adapter
    from pipeline.train.engine import Engine
    from tests.train_tiny import batches_of_step

    is_cuda = plan.hardware.kind == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda
    with Phases() as phases:
        engine = Engine(attach_adapter(base, plan), plan, phases)
        for step in range(2):
            engine.optimizer_step(*batches_of_step(plan, split, step, 0), 1e-4)
        prepared = [batches_of_step(plan, split, step, 0) for step in range(2, 2 + steps)]
        synchronise(is_cuda)
        with profile(activities=activities, record_shapes=True) as profiler:
            start = time.perf_counter()
            for batches, supervised in prepared:
                engine.optimizer_step(batches, supervised, 1e-4)
                phases("between steps")
            synchronise(is_cuda)
            seconds = time.perf_counter() - start
    engine.deepspeed.destroy()
    r, length, batch = plan.settings.lora_r, plan.settings.max_length, plan.layout.micro_batch_size
    lora_sizes = {r, 2 * r, 3 * r} - {length, batch, batch * length}
    return shares(profiler, seconds, lora_sizes, plan.shape.vocab_size, is_cuda=is_cuda)


def synchronise(is_cuda):
    if is_cuda:
        torch.cuda.synchronize()


def table(result):
    lines = ["| kind | share of the step | what |", "|---|---|---|"]
    lines += [f"| {kind} | {result[kind]:.1%} | {what} |" for kind, what in KINDS.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    from pipeline.cluster.devices import set_up_rank
    from pipeline.cluster.session import Session
    from tests.bench.memory import Case, FullSequences, plan_case
    from tests.bench.random_base import random_base

    changes = {k: yaml.safe_load(v) for k, _, v in (s.partition("=") for s in arguments.set)}
    settings = {
        "bf16": True, "lora_r": 16, "max_length": 512, "batch_size": 2, "global_batch_size": 4,
        "gradient_checkpointing": False, "zero_stage": 2,
    }  # fmt: skip
    placement, hardware, _ = set_up_rank(os.environ)
    with tempfile.TemporaryDirectory() as tmp, Session(placement, hardware) as session:
        session.start()
        folder = Path(tmp)
        (folder / "config.json").write_text(json.dumps(SMOLLM2))
        plan = plan_case(folder, Case(settings=settings | changes, ranks=1), hardware)
        split = FullSequences(64, plan.settings.max_length, plan.shape.vocab_size)
        result = profile_steps(plan, random_base(plan, session.device), split, arguments.steps)
    print(table(result))


if __name__ == "__main__":
    main()
