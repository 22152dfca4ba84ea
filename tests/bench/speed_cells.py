"""The runs that `make bench` compares: cells of settings, and the tools that train them."""

from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

PEERS = ROOT / "tests/bench/peers"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Settings of the base case; a cell changes some of them. `sorted`: peers group rows by length;
# RankZero always does. `gradient_checkpointing: auto` exists only in RankZero. `first_measured`:
# the first step whose time counts.
BASE = {
    "zero_stage": 2, "gradient_checkpointing": True, "packing": False, "load_in_4bit": False,
    "sorted": False, "batch_size": 2, "accumulation_steps": 2, "max_length": 512, "max_steps": 8,
    "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lr": 2e-4, "targets": TARGETS,
    "first_measured": 3,
}  # fmt: skip
# A short form for development: half the rows in a step, fewer steps, and a third of the layers.
QUICK = {"accumulation_steps": 1, "max_steps": 4, "first_measured": 2}
QUICK_LAYERS = 10


@dataclass(frozen=True)
class Tool:
    """A program that trains. `environment`: its own virtual environment, or None for ours."""

    name: str
    script: Path | None
    environment: str | None = None


RANKZERO = Tool("RankZero", None)
BARE = Tool("bare loop", PEERS / "bare_loop.py")
HF = Tool("HF Trainer", PEERS / "hf_trainer.py")
TRL = Tool("TRL", PEERS / "trl_sft.py", "trl")
LLAMA_FACTORY = Tool("LLaMA-Factory", PEERS / "llama_factory.py", "llamafactory")
_WITH_ZERO = (RANKZERO, HF, LLAMA_FACTORY, TRL)
_ALL = (RANKZERO, HF, BARE, LLAMA_FACTORY, TRL)


@dataclass(frozen=True)
class Cell:
    """One change of the base case, and the tools that have it."""

    name: str
    changes: dict[str, object]
    tools: tuple[Tool, ...]

    def settings(self, *, is_quick: bool) -> dict[str, object]:
        return BASE | (QUICK if is_quick else {}) | self.changes


BASE_CELL = Cell("base case", {}, _ALL)
SORTED = Cell("rows sorted by length", {"sorted": True}, _WITH_ZERO)
OFF = {"gradient_checkpointing": False}
CELLS = [
    BASE_CELL,
    SORTED,
    Cell("no checkpointing", OFF, _ALL),
    Cell("no checkpointing, rows sorted by length", OFF | {"sorted": True}, _WITH_ZERO),
    Cell("checkpointing chosen by the plan", {"gradient_checkpointing": "auto"}, (RANKZERO,)),
    Cell("packs of 512 tokens", {"packing": True, "batch_size": 1}, (RANKZERO, LLAMA_FACTORY, TRL)),
    Cell("ZeRO-3", {"zero_stage": 3}, _WITH_ZERO),
    Cell("4-bit base", {"load_in_4bit": True}, _ALL),
]
QUICK_CELLS = [BASE_CELL, Cell(SORTED.name, SORTED.changes, (HF,))]
