"""Rules about sequence parallelism: sequences that a group of ranks shares."""

from pipeline.plan.given.sequence_parallel import reason_against_split, sizes_by_heads
from pipeline.plan.rules.rule import PlanInput, Rule


def _splits_sequences(run: PlanInput) -> bool:
    """Whether the run file sets a sequence_parallel_size above 1."""
    return run.settings.sequence_parallel_size not in ("auto", 1)


def _undivided_heads(run: PlanInput) -> str:
    """Text with the possible sizes, if the size of the run file does not divide the heads."""
    sizes = sizes_by_heads(run.shape)
    if not _splits_sequences(run) or run.settings.sequence_parallel_size in sizes:
        return ""
    return f"{', '.join(map(str, sizes))} divide the {sizes[-1]} heads"


def _mixing_blocks(run: PlanInput) -> str:
    """Why blocks of the model cannot be split over ranks, if the run splits sequences."""
    return reason_against_split(run.shape, run.proof) if _splits_sequences(run) else ""


def _attention_dropouts(run: PlanInput) -> str:
    """Entries of config.json for dropout in attention, if sequences are split."""
    dropouts = (entry for entry in run.shape.dropouts if entry.startswith("att"))
    return ", ".join(dropouts) if _splits_sequences(run) else ""


SEQUENCE_PARALLEL_RULES: tuple[Rule[PlanInput], ...] = (
    Rule(
        id="split-heads",
        level="refuse",
        applies=_undivided_heads,
        reason="sequence_parallel_size does not divide the model's attention heads",
        remedy="set one of these sizes",
        source="pipeline/model/ulysses.py",
    ),
    Rule(
        id="split-blocks",
        level="refuse",
        applies=_mixing_blocks,
        reason="sequence_parallel_size: only attention can be split over ranks; other modules that "
        "read several tokens, such as linear attention, state spaces and convolutions, would see "
        "one rank's part of a sequence",
        remedy="set sequence_parallel_size: 1, or use a model in which all blocks have attention",
        source="pipeline/model/attention.py, require_separate_documents",
    ),
    Rule(
        id="split-attention-dropout",
        level="refuse",
        applies=_attention_dropouts,
        reason="sequence_parallel_size: the masks of dropout in attention would depend on it, and "
        "config.json sets this dropout",
        remedy="set this dropout to 0 in a copy of the model folder, or sequence_parallel_size: 1",
        source="pipeline/model/attention.py",
    ),
    Rule(
        id="split-flash-attention",
        level="refuse",
        applies=lambda run: _splits_sequences(run) and run.settings.use_flash_attention is True,
        reason="sequence_parallel_size with use_flash_attention: true: only attention with the "
        "kernels of PyTorch can be split over ranks, not FlashAttention-2",
        remedy="set use_flash_attention: auto",
        source="pipeline/model/attention.py, document_arguments",
    ),
)
