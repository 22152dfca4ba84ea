"""Times and token counts of the steps of one rank, written as JSON lines.

The scripts of this folder run in the environments of other programs. They import nothing of this
project but each other.
"""

import json
import os
import time
from pathlib import Path

from transformers import TrainerCallback


class Recorder:
    """Counts the tokens of each forward pass, and writes a line at the end of each step."""

    def __init__(self, folder):
        rank = os.environ.get("RANK", "0")
        self._file = (Path(folder) / f"steps-{rank}.jsonl").open("w", encoding="utf-8")
        self._tokens = self._supervised = self._computed = 0

    def watch(self, model):
        """Count the tokens of every forward pass of `model`."""
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, positional, inputs):
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = inputs.get("attention_mask")
        is_mask = mask is not None and mask.shape == ids.shape
        self._computed += ids.numel()
        self._tokens += int((mask != 0).sum()) if is_mask else ids.numel()
        self._supervised += int((labels != -100).sum())

    def end_step(self):
        line = {
            "time": time.time(),
            "tokens": self._tokens,
            "supervised_tokens": self._supervised,
            "computed_tokens": self._computed,
        }
        self._tokens = self._supervised = self._computed = 0
        print(json.dumps(line), file=self._file, flush=True)


class StepCallback(TrainerCallback):
    """Records the steps of a Trainer of transformers."""

    def __init__(self, folder):
        self._recorder = Recorder(folder)

    def on_train_begin(self, args, state, control, model=None, **others):
        self._recorder.watch(model)

    def on_step_end(self, args, state, control, **others):
        self._recorder.end_step()
