"""Greedy answers to held-out prompts, in batches, and how many match exactly."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.data.chat.encoder import Encoder
from pipeline.rows.formats import Conversation, Example


@dataclass(frozen=True)
class Question:
    """What the model is shown, and what it should say."""

    prompt: str  # as rendered for the model
    shown: str  # as a person reads it
    expected: str


def question(example: Example, encoder: Encoder) -> Question:
    """The last answer of an example, and all that comes before it."""
    prompt, expected = encoder.last_answer(example)
    if not isinstance(example, Conversation):
        return Question(prompt, prompt, expected)
    asked = (m.content for m in reversed(example.messages) if m.role == "user")
    return Question(prompt, next(asked, ""), expected)


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    ends: Collection[int],
    batch_size: int = 16,
) -> list[str]:
    """One answer a prompt, in their order; prompts of like length share a batch.

    `ends`: tokens that end an answer, beside those that the model names itself.
    """
    tokenizer.padding_side = "left"  # answers begin where the prompts end
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
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
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
    """Share of answers that are the expected text, but for white space around it."""
    pairs = list(zip(answers, expected, strict=True))
    return sum(answer.strip() == said.strip() for answer, said in pairs) / len(pairs)


def _ends(model: Any) -> list[int]:
    said = model.generation_config.eos_token_id
    return said if isinstance(said, list) else [] if said is None else [said]
