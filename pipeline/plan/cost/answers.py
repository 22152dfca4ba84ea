"""Predicted time of the answers that a run generates at each evaluation (eval_generate).

A batch of answers needs one forward pass over its prompts, and one for each further token. The
passes for one token read all weights for a few rows, so memory traffic and launches dominate.
"""

from dataclasses import dataclass
from math import ceil

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.per_token import CostPerToken, cost_per_token
from pipeline.plan.cost.speed import FETCH_S, KERNEL_S, gather_seconds, reachable_rates
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape

BATCH_ROWS = 32  # answers of a batch; 27 % less CPU time for an answer than with 16 (docs/log.md)
_BATCH_TOKENS = 2**15  # of prompts and answers with padding; bounds the key-value cache
# Tokens generated beyond the longest expected answer, so that a longer answer does not match it.
EXTRA_TOKENS = 8
# The cache of keys and values is read by attention, and copied for each token (transformers 5.23
# cache_utils.py, DynamicLayer.update).
_CACHE_PASSES = 3


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers of one evaluation.

    `rows`: number of answered rows. `tokens`: predicted tokens of each answer. `passes`: forward
    passes of each rank. `seconds`: predicted time of one evaluation.
    """

    rows: int
    tokens: int
    passes: int
    seconds: float


def batch_rows(width: int) -> int:
    """Number of answers of a batch; `width`: tokens of a prompt and its answer."""
    return min(BATCH_ROWS, max(1, _BATCH_TOKENS // max(width, 1)))


def answers(
    shape: ModelShape,
    settings: RunSettings,
    layout: Layout,
    hardware: Hardware,
    lengths: tuple[float, float],
) -> Answers | None:
    """The answers of an evaluation; None without `eval_generate`.

    `lengths`: mean tokens of a prompt and of an expected answer. An answer is assumed to have
    EXTRA_TOKENS more than the mean, because a batch ends with its longest answer.
    """
    if settings.eval_generate is None:
        return None
    prompt, expected_answer = lengths
    tokens = ceil(expected_answer) + EXTRA_TOKENS
    rows = min(batch_rows(ceil(prompt) + tokens), settings.eval_generate)
    batches_per_rank = ceil(ceil(settings.eval_generate / rows) / layout.world_size)
    cost = cost_per_token(shape, settings, layout.training_dtype, is_sharded=layout.is_sharded)
    rates = reachable_rates(layout, hardware)
    fetches = cost.modules * FETCH_S if layout.is_sharded else 0.0

    def seconds(num_tokens: float, attended: float) -> float:
        """Seconds of a forward pass over `num_tokens` tokens of each row.

        `attended`: number of tokens to which each of them attends, on average.
        """
        flops, values = _forward(shape, cost, rows, num_tokens, attended)
        traffic = _traffic_bytes(values, cost, settings, layout)
        device_s = flops / rates.flops + traffic / rates.memory
        host_s = cost.kernels * KERNEL_S + fetches
        if hardware.kind == "cuda":  # asynchronous: only the excess over device time counts
            host_s = max(0.0, host_s - device_s)
        return device_s + host_s + gather_seconds(cost, layout, rates)

    pass_over_prompt_s = seconds(prompt, prompt / 2)
    pass_for_one_token_s = seconds(1, prompt + tokens / 2)
    batch_s = pass_over_prompt_s + (tokens - 1) * pass_for_one_token_s
    return Answers(
        rows=settings.eval_generate,
        tokens=tokens,
        passes=batches_per_rank * tokens,
        seconds=batches_per_rank * batch_s,
    )


def _forward(
    shape: ModelShape, cost: CostPerToken, rows: int, num_tokens: float, attended: float
) -> tuple[float, float]:
    """FLOPs of a forward pass, and number of values that it reads or writes.

    Only the last token of each row has logits. `attended`: number of tokens to which each token
    attends, on average.
    """
    tokens_of_batch = rows * num_tokens
    flops = tokens_of_batch * (cost.base_flops + cost.adapter_flops + cost.score_flops * attended)
    flops += rows * cost.head_flops + cost.norm_flops
    experts = min(1.0, tokens_of_batch * cost.expert_share) * cost.expert_values
    values = cost.linear_values + experts + shape.vocab_size * shape.hidden_size
    values += tokens_of_batch * (cost.token_values + cost.score_values * attended)
    values += cost.norm_values
    cached_per_token = sum(num_blocks * 2 * block.key_width for block, num_blocks in shape.counts())
    return flops, values + _CACHE_PASSES * rows * attended * cached_per_token


def _traffic_bytes(
    values: float, cost: CostPerToken, settings: RunSettings, layout: Layout
) -> float:
    """Bytes of these values in the training dtype, and of the dequantisation of 4-bit weights."""
    traffic = layout.bytes_per_value * values
    if settings.load_in_4bit:  # quantised weights are read, 16-bit weights are written
        traffic += cost.quantised_bytes + layout.bytes_per_value * cost.linear_values
    return traffic
