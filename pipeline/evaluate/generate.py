"""Batched greedy generation of answers to prompts.

The batches depend only on the prompts, never on the ranks or on an interruption: in 16 bits an
answer may depend on the other prompts of its batch, because their padding changes the rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from pipeline.plan.cost.answers import batch_rows

_UNLIMITED = 2**31  # tokens; more than any model supports


def plan_batches(
    lengths: Sequence[int], max_new_tokens: int, max_positions: int | None = None
) -> list[list[int]]:
    """Indexes of prompts of similar length in batches, longest first.

    `lengths`: tokens of each prompt. `max_positions`: longest sequence in tokens that the model
    supports; None if there is no limit. All answers of a batch have the same limit in tokens.
    Therefore a prompt that leaves fewer than `max_new_tokens` positions shares its batch only with
    prompts of the same length.
    """
    batches: list[list[int]] = []
    positions = max_positions or _UNLIMITED
    answer_limits = [min(max_new_tokens, positions - length) for length in lengths]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            longest = batches[-1][0]  # prompt of the present batch
            is_full = len(batches[-1]) >= batch_rows(lengths[longest] + max_new_tokens)
            if not is_full and answer_limits[longest] == answer_limits[i]:
                batches[-1].append(i)
                continue
        batches.append([i])
    return batches


def end_token_ids(model: Any, end_ids: frozenset[int]) -> list[int]:
    """Tokens that end an answer: those of training and of the model's generation config."""
    ids = model.generation_config.eos_token_id  # a list, an id or None
    if ids is None:
        return sorted(end_ids)
    return sorted({*end_ids, *(ids if isinstance(ids, list) else [ids])})


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Generates greedy answers of at most `max_new_tokens` tokens.

    `end_ids`: tokens that end an answer, in addition to those of the model's generation config.
    `max_positions`: longest sequence in tokens that the model supports; None if there is no limit.
    """

    tokenizer: Any
    end_ids: frozenset[int]
    max_new_tokens: int
    max_positions: int | None = None

    @torch.no_grad()
    def answers(
        self,
        model: Any,
        prompts: Sequence[str],
        on_token: Callable[[], None],
        *,
        is_synced: bool = False,
        streamer: BaseStreamer | None = None,
    ) -> list[str]:
        """One answer per prompt, in one batch. `on_token` is called before each forward pass.

        The answer to a prompt that fills all positions of the model is empty. `is_synced`: the
        model is sharded, so the ranks run equally many forward passes. Then all ranks must call
        this method, and a rank without prompts passes none. `streamer`: receives each token of the
        answer as soon as it is generated; only for a single prompt.
        """
        ids = self._prompt_ids(prompts)
        limit = self.max_positions or _UNLIMITED
        answerable = [i for i, tokens in enumerate(ids) if 0 < len(tokens) < limit]
        answers = [""] * len(prompts)
        if not answerable and not is_synced:
            return answers
        # Without an answerable prompt, this rank still takes part in the forward passes, with one
        # padding token as its prompt.
        inputs = self._padded([ids[i] for i in answerable] or [[self._pad_id]], model.device)
        width = inputs["input_ids"].shape[1]
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            max_new_tokens=min(self.max_new_tokens, limit - width),
            eos_token_id=end_token_ids(model, self.end_ids),
            pad_token_id=self._pad_id,
            use_cache=True,
        )
        with _called_before_forward(model, on_token):
            generated = model.generate(
                **inputs,
                generation_config=config,
                synced_gpus=is_synced or None,
                streamer=streamer,
            )
        texts = self.tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        for i, text in zip(answerable, texts, strict=False):  # not strict: the padding token's text
            answers[i] = text
        return answers

    def batches(self, prompts: Sequence[str]) -> list[list[int]]:
        """Indexes of prompts in batches for `answers`."""
        lengths = [len(ids) for ids in self._prompt_ids(prompts)]
        return plan_batches(lengths, self.max_new_tokens, self.max_positions)

    def _prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        if not prompts:
            return []
        ids: list[list[int]] = self.tokenizer(list(prompts), add_special_tokens=False).input_ids
        return ids

    @property
    def _pad_id(self) -> int:
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    def _padded(self, ids: Sequence[Sequence[int]], device: torch.device) -> dict[str, Any]:
        """Token ids and attention mask, padded on the left, so that all answers start together."""
        width = max(map(len, ids))
        tokens = torch.full((len(ids), width), self._pad_id)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(ids):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


@contextmanager
def _called_before_forward(model: Any, function: Callable[[], None]) -> Iterator[None]:
    """In the body, call a function before each forward pass of a model."""
    # The generate method of a PeftModel calls the model inside it, not the PeftModel's forward.
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = causal.register_forward_pre_hook(lambda module, inputs: function())
    try:
        yield
    finally:
        hook.remove()
