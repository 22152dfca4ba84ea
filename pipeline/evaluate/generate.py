"""Batched greedy generation for held-out prompts, and the share of exact matches."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pipeline.cluster.progress import Work, show_progress
from pipeline.data.chat.encoder import Encoder
from pipeline.rows.examples import Conversation, Example

_BATCH_SIZE = 64  # prompts


@dataclass(frozen=True)
class Question:
    """A held-out prompt and its expected answer."""

    prompt: str  # rendered with the chat template
    last_user_message: str  # shown in reports instead of the whole prompt
    expected: str


def question(example: Example, encoder: Encoder) -> Question:
    """Split an example into a prompt and its last answer, which is the expected one."""
    prompt, expected = encoder.last_answer(example)
    if not isinstance(example, Conversation):
        return Question(prompt, prompt, expected)
    last_user = (m.content for m in reversed(example.messages) if m.role == "user")
    return Question(prompt, next(last_user, ""), expected)


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    ends: Collection[int],
) -> list[str]:
    """Generate one answer per prompt, in the order of the prompts.

    `ends`: tokens that end an answer, in addition to those of the model's generation config.
    """
    tokenizer.padding_side = "left"  # so that all answers of a batch start at the same position
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({*ends, *_eos_token_ids(model)}),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    model.eval()
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + _BATCH_SIZE] for i in range(0, len(order), _BATCH_SIZE)]
    text = f"generating {len(prompts)} answers"
    with show_progress(text, total=len(batches) * max_new_tokens) as work:
        counter = _TokenCounter(work)
        for number, chosen in enumerate(batches, 1):
            inputs = tokenizer(
                [prompts[i] for i in chosen],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            ).to(model.device)
            ids = model.generate(
                **inputs,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([counter]),
            )
            work.advance(number * max_new_tokens - work.done)
            texts = tokenizer.batch_decode(
                ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, answer in zip(chosen, texts, strict=True):
                answers[i] = answer
    return answers


class _TokenCounter(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Stops nothing; reports each generated token as progress."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        del scores, kwargs
        self._work.advance()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers equal to the expected text, ignoring surrounding white space."""
    pairs = list(zip(answers, expected, strict=True))
    return sum(answer.strip() == text.strip() for answer, text in pairs) / len(pairs)


def _eos_token_ids(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
