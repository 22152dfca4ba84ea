"""Every measurement that needs one GPU, in one process and in less than 8 minutes.

    python -m tests.bench.gpu [--out FOLDER] [--limit SECONDS] [--tiny] [--long]

Writes FOLDER/gpu.json after each part, and FOLDER/gpu.md, a page with the results. Parts that have
not begun when the time limit is reached are skipped by name, and a part that fails is recorded with
its error. Weights are random and are created on the device in the shape of Llama 3.1 8B.
`--tiny` runs every part with a tiny shape, also on a CPU: `make test` does so. `--long` runs the
sequences of 65,536 and 131,072 tokens instead; a step of these takes up to a minute (predicted).
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest.mock import patch

import torch

from pipeline.cluster.devices import set_up_rank
from pipeline.cluster.session import Session
from pipeline.files import write_text
from pipeline.plan.given.fast_paths import JOINT_LORA, LOSS_GRADIENT, fast_paths
from tests.bench import gpu_rates
from tests.bench.gpu_page import page
from tests.bench.memory import Case, FullSequences, plan_case
from tests.bench.random_base import random_base
from tests.bench.step_profile import profile_steps, synchronise
from tests.plans import LLAMA_8B

PACKAGES = (
    "torch", "triton", "transformers", "peft", "deepspeed", "bitsandbytes", "flash-attn",
    "liger-kernel", "fla", "causal-conv1d",
)  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A short run whose speed and memory are measured: one row of the page of results.

    `checkpointed`: fraction of the layers. `documents`: number of documents in a sequence.
    `without`: a fast path that is off. `model`: changes of the shape of Llama 3.1 8B. `steps`:
    measured steps. `warm_up`: steps before them.
    """

    settings: dict = field(default_factory=dict)
    checkpointed: float = 0
    documents: int = 1
    without: str = ""
    model: dict = field(default_factory=dict)
    steps: int = 5
    warm_up: int = 2


NF4, INT8 = {"load_in_4bit": True}, {"load_in_8bit": True}
ONE_LONG = {"max_length": 32768, "batch_size": 1, "global_batch_size": 1}
CELLS = {
    "8B LoRA": Cell(),
    "8B LoRA, no fast path": Cell(settings={"fast_paths": False}),
    "8B LoRA, loss by autograd": Cell(without=LOSS_GRADIENT),
    "8B LoRA, peft's layers": Cell(without=JOINT_LORA),
    "8B packs of 8 documents": Cell(documents=8),
    "8B QLoRA": Cell(settings=NF4),
    "8B QLoRA, checkpointed": Cell(settings=NF4, checkpointed=1),
    "8B LoRA, half checkpointed": Cell(checkpointed=0.5),
    "8B LoRA, checkpointed": Cell(checkpointed=1),
    "8B LoRA, one long sequence, checkpointed": Cell(settings=ONE_LONG, checkpointed=1),
    "8B LoRA, dropout 0.05": Cell(settings={"lora_dropout": 0.05}),
    "8B LoRA again": Cell(),  # shows how much the machine's speed drifts
    "1B LoRA": Cell(model=LLAMA_1B),
    "1B LoRA, checkpointed": Cell(model=LLAMA_1B, checkpointed=1),
    "1B QLoRA": Cell(model=LLAMA_1B, settings=NF4),
    "1B 8-bit": Cell(model=LLAMA_1B, settings=INT8),
}
TILED_64K = {"max_length": 65_536, "batch_size": 1, "global_batch_size": 1, "mlp_tiles": 16}
TILED_128K = TILED_64K | {"max_length": 131_072, "mlp_tiles": 32}
ON_HOST = {"offload_activations": True}
LONG_CELLS = {
    name: Cell(settings=settings, checkpointed=1, steps=2, warm_up=1)
    for name, settings in {
        "8B LoRA, 64k, tiles": TILED_64K,
        "8B LoRA, 64k, tiles and offload": TILED_64K | ON_HOST,
        "8B LoRA, 128k, tiles and offload": TILED_128K | ON_HOST,
        "8B LoRA, 128k, tiles": TILED_128K,
    }.items()
}
SETTINGS = {
    "bf16": True, "lora_r": 16, "max_length": 4096, "batch_size": 2, "global_batch_size": 4,
    "gradient_checkpointing": False, "zero_stage": 2,
}  # fmt: skip


class Bench:
    """The session, the folder of model configs and the size of the benchmark."""

    def __init__(self, session, hardware, folder, *, is_tiny):
        self.session, self.hardware, self.folder = session, hardware, folder
        self.is_tiny, self.is_cuda = is_tiny, hardware.kind == "cuda"

    def plan(self, cell):
        """The plan of a cell."""
        model, settings = LLAMA_8B | cell.model, SETTINGS | cell.settings
        if self.is_tiny:
            model |= TINY
            settings |= {"max_length": 32 * cell.documents, "lora_r": 4}
        folder = self.folder / str(abs(hash(json.dumps(model))))
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(model))
        count = int(cell.checkpointed * model["num_hidden_layers"])
        settings["gradient_checkpointing"] = count > 0
        case = Case(settings=settings, layout={"checkpointed_layers": count}, ranks=1,
                    documents=cell.documents)  # fmt: skip
        return plan_case(folder, case, self.hardware)

    def split(self, plan, documents):
        """A split of full sequences for a plan."""
        return FullSequences(64, plan.settings.max_length, plan.shape.vocab_size, documents)

    def measure(self, cell):
        """Seconds of each step, tokens per second and peak memory, measured and predicted."""

        def chosen(*arguments):
            states = fast_paths(*arguments)
            return states | ({cell.without: "off in this cell"} if cell.without else {})

        with patch("pipeline.plan.plan.fast_paths", chosen):
            plan = self.plan(cell)
            split = self.split(plan, cell.documents)
            if self.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds, largest = self._train(plan, split, cell)
        median = statistics.median(seconds)
        tokens = plan.layout.global_batch_size * plan.settings.max_length
        return {
            "step_seconds": [round(s, 5) for s in seconds],
            "tokens_per_second": tokens / median,
            "predicted_tokens_per_second": tokens / plan.speed.seconds_per_step,
            "peak_bytes": torch.cuda.max_memory_allocated() if self.is_cuda else None,
            "predicted_bytes": plan.tensor_bytes(largest),
            "fast_paths": plan.fast_path_states | ({cell.without: "off"} if cell.without else {}),
        }

    def _train(self, plan, split, cell):
        from pipeline.model.adapter import attach_adapter
        from pipeline.train.engine import Engine
        from tests.train_tiny import batches_of_step

        engine = Engine(attach_adapter(random_base(plan, self.session.device), plan), plan)
        seconds = []
        for step in range(cell.warm_up + cell.steps):
            batches, supervised = batches_of_step(plan, split, step, 0)
            synchronise(self.is_cuda)
            start = time.perf_counter()
            engine.optimizer_step(batches, supervised, 1e-4)
            synchronise(self.is_cuda)
            seconds.append(time.perf_counter() - start)
        engine.deepspeed.destroy()
        return seconds[cell.warm_up :], engine.largest_batch

    def profile(self, cell):
        """Share of a step that each kind of operator takes."""
        plan = self.plan(cell)
        split = self.split(plan, cell.documents)
        return profile_steps(plan, random_base(plan, self.session.device), split)


def machine(hardware):
    """Versions and features; a missing package is None."""

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    is_cuda = hardware.kind == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or "CPU",
        "memory": torch.cuda.get_device_properties(0).total_memory if is_cuda else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": {name: installed(name) for name in PACKAGES},
        "varlen_attn": importlib.util.find_spec("torch.nn.attention.varlen") is not None,
    }


def parts(bench, *, is_long=False):
    """Name of each part -> the function that measures it, the most important first."""
    if is_long:
        return {name: partial(bench.measure, cell) for name, cell in LONG_CELLS.items()}
    device, is_tiny = bench.session.device, bench.is_tiny
    rates = {
        "matrix products": partial(gpu_rates.products, device, is_tiny=is_tiny),
        "memory bandwidth": partial(gpu_rates.bandwidth, device, is_tiny=is_tiny),
        "kernel launches": partial(gpu_rates.launches, device, is_tiny=is_tiny),
        "attention of packs": partial(gpu_rates.attention, device, is_tiny=is_tiny),
    }
    cells = {name: partial(bench.measure, cell) for name, cell in CELLS.items()}
    profiles = {
        f"profile of {name}": partial(bench.profile, CELLS[name])
        for name in ("8B LoRA", "8B QLoRA")
    }
    most_important = dict(list(cells.items())[:6])
    return rates | most_important | profiles | cells


def run_part(measure):
    """The result of a part, or its error; frees the memory that the part used."""
    start = time.perf_counter()
    try:
        result = measure()
    except gpu_rates.Missing as missing:
        return {"skipped": str(missing)}
    except Exception as error:  # recorded, so that the other parts still run
        last_lines = traceback.format_exc().strip().splitlines()[-3:]
        result = {"failed": f"{type(error).__name__}: {error}"[:500], "where": last_lines}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result | {"took_s": round(time.perf_counter() - start, 2)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench-gpu"))
    parser.add_argument("--limit", type=float, default=460, help="seconds")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--long", action="store_true")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    placement, hardware, _ = set_up_rank(os.environ)
    with tempfile.TemporaryDirectory() as tmp, Session(placement, hardware) as session:
        session.start()
        bench = Bench(session, hardware, Path(tmp), is_tiny=options.tiny)
        results = {"date": time.strftime("%Y-%m-%d"), "tiny": options.tiny,
                   "machine": machine(hardware), "parts": {}}  # fmt: skip
        for name, measure in parts(bench, is_long=options.long).items():
            is_late = time.perf_counter() - start > options.limit
            part = {"skipped": "the time limit was reached"} if is_late else run_part(measure)
            results["parts"][name] = part
            write_text(options.out / "gpu.json", json.dumps(results, indent=1))
            print(f"{time.perf_counter() - start:6.1f} s  {name}: {json.dumps(part)[:150]}",
                  flush=True)  # fmt: skip
    write_text(options.out / "gpu.md", page(results))
    print(f"{options.out / 'gpu.md'}")


if __name__ == "__main__":
    main()
