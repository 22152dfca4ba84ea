"""Batch arithmetic: global batch = micro-batch x accumulation x ranks, once and for all."""

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError

_DEFAULT_GLOBAL_BATCH = 16
_LARGEST_MICRO_BATCH = 64


def micro_batches(settings: RunSettings, world_size: int) -> list[tuple[int, int]]:
    """Every (micro-batch, accumulation) that the settings allow, the largest micro-batch first.

    Raises UserError where the keys contradict each other or the number of ranks.
    """
    each = _sequences_per_rank(settings, world_size)
    if settings.batch_size != "auto":
        return [(settings.batch_size, each // settings.batch_size)]
    if settings.gradient_accumulation_steps != "auto":
        accumulation = settings.gradient_accumulation_steps
        return [(each // accumulation, accumulation)]
    largest = min(each, _LARGEST_MICRO_BATCH)
    return [(micro, each // micro) for micro in range(largest, 0, -1) if each % micro == 0]


def _sequences_per_rank(settings: RunSettings, world_size: int) -> int:
    """Sequences that a rank does in one step."""
    total = settings.global_batch_size
    micro, accumulation = settings.batch_size, settings.gradient_accumulation_steps
    if total == "auto":
        if micro == "auto" and accumulation == "auto":
            return max(1, _DEFAULT_GLOBAL_BATCH // world_size)
        return (1 if micro == "auto" else micro) * (1 if accumulation == "auto" else accumulation)
    per_pass = world_size * (1 if micro == "auto" else micro)
    per_pass *= 1 if accumulation == "auto" else accumulation
    is_complete = micro != "auto" and accumulation != "auto"
    if total % per_pass or (is_complete and total != per_pass):
        parts = [f"{world_size} ranks"]
        parts += [] if micro == "auto" else [f"batch_size {micro}"]
        parts += [] if accumulation == "auto" else [f"gradient_accumulation_steps {accumulation}"]
        low = max(total // per_pass, 1) * per_pass
        near = str(per_pass) if is_complete else f"{low} or {low + per_pass}"
        raise UserError(
            f"global_batch_size: {total} is not {' x '.join(parts)}"
            f"{'' if is_complete else ' x a whole number'}; {near} would work"
        )
    return total // world_size
