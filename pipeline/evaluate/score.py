"""Compare base, adapter and merged model on the held-out rows of a run (score.json)."""

import dataclasses
import gc
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel

from pipeline.adapter.products import is_merged_from
from pipeline.adapter.trained_on import adapter_sha256
from pipeline.cluster.devices import detect_hardware
from pipeline.cluster.placement import Placement
from pipeline.cluster.progress import show_progress
from pipeline.cluster.session import Session
from pipeline.config.settings import RunSettings
from pipeline.data.chat.encoder import Encoder
from pipeline.data.chat.tokenizer import load_tokenizer
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
from pipeline.rows.examples import RowError

logger = logging.getLogger(__name__)

_SEQUENCES = 8  # per forward pass of the held-out loss
# Tokens generated beyond the longest expected answer, so that a longer answer does not match it.
_EXTRA_TOKENS = 8


def score_run(run_folder: Path, settings: RunSettings, rows: int) -> dict[str, Any]:
    """Held-out loss and exact match of base, adapter and merged model on at most `rows` rows.

    Base and adapter are loaded as in training (quantised if the run was), the merged model in the
    training data type. A merged model of another adapter is not scored. The caller has called
    require_scorable.
    """
    adapter = run_folder / "adapter"
    plan = _single_process_plan(settings)
    scoring = _Scoring.of(run_folder, settings, Session(Placement(), plan.hardware), rows)
    device = scoring.session.device
    with show_progress("loading the model"):
        with_adapter: Any = PeftModel.from_pretrained(
            load_base(plan, device), adapter, autocast_adapter_dtype=False
        )
    scores: dict[str, tuple[dict[str, float], list[str]]] = {}
    logger.info("base")
    with with_adapter.disable_adapter():
        scores["base"] = scoring.measure(with_adapter)
    logger.info("adapter")
    scores["adapter"] = scoring.measure(with_adapter)
    del with_adapter
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # make room for the merged model
    if (run_folder / "merged").is_dir() and _is_scorable(run_folder):
        merged = load_plain(run_folder / "merged", dtype=DTYPES[plan.training_dtype])
        logger.info("merged model")
        scores["merged"] = scoring.measure(merged.to(device))  # type: ignore[arg-type]
    return {
        "rows": len(scoring.questions),
        "max_new_tokens": scoring.max_new_tokens,
        "adapter_sha256": adapter_sha256(adapter),
        "models": {name: numbers for name, (numbers, _) in scores.items()},
        "answers": [
            {"prompt": q.last_user_message, "expected": q.expected}
            | {name: answers[i] for name, (_, answers) in scores.items()}
            for i, q in enumerate(scoring.questions)
        ],
    }


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """The held-out data of a run, with the measurement of a model on it."""

    session: Session
    tokenizer: Any
    ends: Collection[int]
    split: Split
    questions: list[Question]
    max_new_tokens: int

    @classmethod
    def of(cls, run_folder: Path, settings: RunSettings, session: Session, rows: int) -> Self:
        """Open the held-out split and read its first `rows` questions."""
        tokenizer = load_tokenizer(settings.model_folder, settings.trust_remote_code)
        index = DataIndex.load(run_folder / "data").eval
        assert index is not None
        encoder = Encoder(tokenizer, settings)
        questions = _questions(settings, index, encoder, rows)
        answers = (tokenizer(q.expected, add_special_tokens=False).input_ids for q in questions)
        return cls(
            session=session,
            tokenizer=tokenizer,
            ends=encoder.ends,
            split=open_split(index),
            questions=questions,
            max_new_tokens=max(map(len, answers)) + _EXTRA_TOKENS,
        )

    def measure(self, model: Any) -> tuple[dict[str, float], list[str]]:
        """Scores of a model (loss, exact match, seconds), and its answers."""
        start = time.perf_counter()
        loss = _loss(model, self.split, self.session)
        answers = greedy_answers(
            model,
            self.tokenizer,
            [q.prompt for q in self.questions],
            max_new_tokens=self.max_new_tokens,
            ends=self.ends,
        )
        match = exact_match(answers, [q.expected for q in self.questions])
        seconds = time.perf_counter() - start
        return {"loss": loss, "exact_match": match, "seconds": seconds}, answers


def _is_scorable(run_folder: Path) -> bool:
    """Whether to score the merged model. Logs a warning unless it has the run's adapter."""
    is_same = is_merged_from(run_folder)
    if is_same is None:
        logger.warning(
            "%s: the adapter that was merged is unknown, because an earlier version of RankZero "
            "did not record it; the merged model is scored",
            run_folder / "merged",
        )
    elif not is_same:
        logger.warning(
            "%s: not scored, because it was merged from an adapter other than %s; merge again",
            run_folder / "merged",
            run_folder / "adapter",
        )
    return is_same is not False


def _single_process_plan(settings: RunSettings) -> Plan:
    """A plan for the same model on one device, without sharding and activation checkpointing."""
    unsharded = settings.model_copy(
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
    # Nothing is trained, so the memory that training would need is no reason to refuse the plan.
    unlimited = dataclasses.replace(detect_hardware(), device_bytes=2**50)
    shape = read_shape(str(settings.model_folder), trust_remote_code=settings.trust_remote_code)
    return make_plan(unsharded, shape, unlimited, nodes=1, ranks_per_node=1)


def _questions(
    settings: RunSettings, split: SplitIndex, encoder: Encoder, rows: int
) -> list[Question]:
    questions: list[Question] = []
    for example in eval_examples(settings, split):
        if len(questions) == rows:
            break
        try:
            questions.append(question(example, encoder))
        except RowError:
            continue  # prepare rejected and counted this row
    if not questions:
        raise UserError("eval_data: no usable row")
    return questions


def _loss(model: Any, split: Split, session: Session) -> float:
    model.eval()
    summed = SummedLoss(model)

    @torch.no_grad()
    def loss_of(batch: Batch) -> float:
        moved = batch.to(session.device)
        return float(summed(moved.input_ids, moved.labels, moved.documents))

    return held_out_loss(loss_of, split, session, _SEQUENCES)
