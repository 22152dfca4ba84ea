"""Batched greedy generation for held-out prompts, and the share of exact matches."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.data.chat.encoder import Encoder
from pipeline.rows.formats import Conversation, Example

_BATCH_SIZE = 64  # prompts that are answered at a time


@dataclass(frozen=True)
class Question:
    """A held-out prompt and its expected answer."""

    prompt: str  # rendered with the chat template
    shown: str  # the text of the last user message, for reports
    expected: str


def question(example: Example, encoder: Encoder) -> Question:
    """The last answer of an example as the expected one, everything before it as the prompt."""
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
    """One answer per prompt, in the order of the prompts, which are batched by length.

    `ends`: tokens that end an answer, besides those of the model's generation config.
    """
    tokenizer.padding_side = "left"  # so that answers start at the same position
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({*ends, *_ends(model)}),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    model.eval()
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), _BATCH_SIZE):
        chosen = order[start : start + _BATCH_SIZE]
        inputs = tokenizer(
            [prompts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        ).to(model.device)
        ids = model.generate(**inputs, generation_config=config)
        texts = tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
    return answers


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers equal to the expected text, ignoring surrounding white space."""
    pairs = list(zip(answers, expected, strict=True))
    return sum(answer.strip() == text.strip() for answer, text in pairs) / len(pairs)


def _ends(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
