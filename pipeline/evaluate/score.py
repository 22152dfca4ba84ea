"""Base, adapter and merged model side by side on the held-out rows -> score.json."""

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from pipeline.adapter.fit import require_same_base
from pipeline.cluster.devices import detect_hardware
from pipeline.cluster.placement import Placement
from pipeline.cluster.session import Session
from pipeline.config.settings import RunSettings
from pipeline.data.chat.encoder import Encoder, load_tokenizer
from pipeline.data.dataset.reader import DataIndex, Split, SplitIndex, open_split
from pipeline.data.order.batches import Batch
from pipeline.data.prepare.prepare import eval_examples
from pipeline.errors import UserError
from pipeline.evaluate.generate import Question, exact_match, greedy_answers, question
from pipeline.evaluate.heldout import held_out_loss
from pipeline.model.base import DTYPES, load_base, load_plain
from pipeline.model.loss import SummedLoss
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import Plan, make_plan
from pipeline.rows.formats import RowError

_BATCH_SIZE = 64  # questions that are answered at a time
_SEQUENCES = 8  # of a forward for the loss: full ones, where they are packs
_SPARE_TOKENS = 8  # beyond the longest expected answer: enough to see that one goes on


def score_run(run_folder: Path, settings: RunSettings, rows: int) -> dict[str, Any]:
    """Held-out loss and exact match of at most `rows` rows, for each model that there is.

    Base and adapter are held as in training (4-bit if it was), the merged model in 16 bits.
    Raises UserError where the run has no adapter or no held-out rows.
    """
    if not (run_folder / "adapter").is_dir():
        raise UserError(f"{run_folder} holds no adapter; train it first")
    if settings.eval_data is None:
        raise UserError(f"{run_folder}: the run has no eval_data, so there is nothing to score on")
    require_same_base(Path(settings.model), run_folder / "adapter")
    plan = _one_process(settings)
    session = Session(Placement(), plan.hardware)
    tokenizer = load_tokenizer(Path(settings.model), settings.trust_remote_code)
    eval_index = DataIndex.load(run_folder / "data").eval
    assert eval_index is not None
    encoder = Encoder(tokenizer, settings)
    questions = _questions(settings, eval_index, encoder, rows)
    split = open_split(eval_index)
    longest = max(len(tokenizer(q.expected, add_special_tokens=False).input_ids) for q in questions)
    max_new_tokens = longest + _SPARE_TOKENS

    def measure(model: Any) -> tuple[dict[str, float], list[str]]:
        start = time.perf_counter()
        loss = _loss(model, split, session)
        answers = greedy_answers(
            model,
            tokenizer,
            [q.prompt for q in questions],
            max_new_tokens=max_new_tokens,
            ends=encoder.ends,
            batch_size=_BATCH_SIZE,
        )
        matched = exact_match(answers, [q.expected for q in questions])
        seconds = time.perf_counter() - start
        return {"loss": loss, "exact_match": matched, "seconds": seconds}, answers

    found: dict[str, tuple[dict[str, float], list[str]]] = {}
    with_adapter: Any = PeftModel.from_pretrained(
        load_base(plan, session.device), run_folder / "adapter", autocast_adapter_dtype=False
    )
    with with_adapter.disable_adapter():
        found["base"] = measure(with_adapter)
    found["adapter"] = measure(with_adapter)
    del with_adapter
    gc.collect()
    if session.device.type == "cuda":
        torch.cuda.empty_cache()  # the next base takes its place
    if (run_folder / "merged").is_dir():
        merged = load_plain(run_folder / "merged", dtype=DTYPES[plan.training_dtype])
        found["merged"] = measure(merged.to(session.device))  # type: ignore[arg-type]
    return {
        "rows": len(questions),
        "max_new_tokens": max_new_tokens,
        "models": {name: numbers for name, (numbers, _) in found.items()},
        "answers": [
            {"prompt": q.shown, "expected": q.expected}
            | {name: answers[i] for name, (_, answers) in found.items()}
            for i, q in enumerate(questions)
        ],
    }


def _one_process(settings: RunSettings) -> Plan:
    """The same model on one device: nothing to shard, nothing to recompute."""
    alone = settings.model_copy(
        update={
            "zero_stage": "auto",
            "gradient_checkpointing": "auto",
            "batch_size": 1,
            "gradient_accumulation_steps": "auto",
            "global_batch_size": "auto",
            "hpz_partition_size": "auto",
            "offload_param": "auto",
            "deepspeed_json": None,
        }
    )
    # Nothing is trained, so what training would need must not refuse it.
    roomy = dataclasses.replace(detect_hardware(), device_bytes=2**50)
    return make_plan(alone, read_shape(settings.model), roomy, nodes=1, ranks_per_node=1)


def _questions(
    settings: RunSettings, split: SplitIndex, encoder: Encoder, rows: int
) -> list[Question]:
    found: list[Question] = []
    for example in eval_examples(settings, split):
        if len(found) == rows:
            break
        try:
            found.append(question(example, encoder))
        except RowError:
            continue  # rejected and counted when the data was prepared
    if not found:
        raise UserError("eval_data: no usable row")
    return found


def _loss(model: Any, split: Split, session: Session) -> float:
    model.eval()
    summed = SummedLoss(model)

    @torch.no_grad()
    def of(batch: Batch) -> float:
        moved = batch.to(session.device)
        return float(summed(moved.input_ids, moved.labels, moved.documents))

    return held_out_loss(of, split, session, _SEQUENCES)
