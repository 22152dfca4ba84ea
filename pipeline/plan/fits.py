"""Table of the published models that fit on a machine: `rankzero plan --fits`.

For each model it has the longest sequence that fits and the predicted speed, with LoRA on a 16-bit
base and with QLoRA on a 4-bit base.
"""

import textwrap
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.commands import DOCS
from pipeline.config.settings import RunSettings
from pipeline.plan.choose import Candidate, Cluster, candidates
from pipeline.plan.given.published import PublishedModel
from pipeline.plan.given.shape import ModelShape
from pipeline.plan.rules.model import INPUT_RULES
from pipeline.plan.rules.rule import PlanInput, applicable_rules, installed_versions

# Shortest and longest sequence in tokens that is tried; the others are the powers of two between.
_SHORTEST, _LONGEST = 256, 131_072
_WIDTH = 100  # characters of a line of the notes below the table


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Prediction for a model that fits.

    `length`: the longest sequence that fits. `tokens_per_second`: rate for sequences of
    `max_length` tokens, or of `length` tokens if `length` is smaller.
    """

    length: int
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class FitRow:
    """A model's row of the table.

    `lora` and `qlora`: None if the model does not fit. `rules`: ids of the rules that refuse it.
    """

    name: str
    parameters: int
    lora: Fit | None
    qlora: Fit | None
    rules: tuple[str, ...]


def fit_rows(
    models: Iterable[PublishedModel], settings: RunSettings, cluster: Cluster
) -> list[FitRow]:
    """A row for each model, smallest first.

    A model whose class cannot be trained (`PublishedModel.refusal`) has no shape, and so no row. A
    model that only a rule refuses has a row with the id of the rule.
    """
    rows = [_fit_row(model.shape(), settings, cluster) for model in models if not model.refusal]
    return sorted(rows, key=lambda row: (row.parameters, row.name))


def _fit_row(shape: ModelShape, settings: RunSettings, cluster: Cluster) -> FitRow:
    """The row of one model."""
    # Offload is not tried, because with it nearly every model fits, and the host memory of another
    # machine is not known.
    offload = "cpu" if settings.offload_param == "cpu" else "none"
    settings = settings.model_copy(
        update={"model": shape.folder, "load_in_8bit": False, "offload_param": offload}
    )
    in_16_bits = settings.model_copy(update={"load_in_4bit": False})
    in_4_bits = settings.model_copy(update={"load_in_4bit": True})
    plan_input = PlanInput(
        settings=settings, shape=shape, hardware=cluster.hardware, packages=installed_versions()
    )
    rules = [rule for rule in applicable_rules(INPUT_RULES, plan_input) if rule.level == "refuse"]
    return FitRow(
        name=shape.folder,  # of a published model, this is its name on the hub
        parameters=shape.parameters,
        lora=_longest_fit(in_16_bits, shape, cluster),
        qlora=_longest_fit(in_4_bits, shape, cluster),
        rules=tuple(rule.id for rule in rules),
    )


def _longest_fit(settings: RunSettings, shape: ModelShape, cluster: Cluster) -> Fit | None:
    """The longest sequence that fits, by bisection; None if none fits."""
    lengths = [_SHORTEST]
    while lengths[-1] * 2 <= min(shape.max_positions or _LONGEST, _LONGEST):
        lengths.append(lengths[-1] * 2)

    def is_too_long(length: int) -> bool:
        return _best_candidate(settings, shape, cluster, length) is None

    num_fitting = bisect_left(lengths, True, key=is_too_long)
    if num_fitting == 0:
        return None
    length = lengths[num_fitting - 1]
    best = _best_candidate(settings, shape, cluster, min(length, settings.max_length))
    assert best is not None, "a shorter sequence needs less memory"
    return Fit(length=length, tokens_per_second=best.speed.tokens_per_second)


def _best_candidate(
    settings: RunSettings, shape: ModelShape, cluster: Cluster, length: int
) -> Candidate | None:
    """The best candidate for sequences of this length; None if none fits."""
    ranked = candidates(settings.model_copy(update={"max_length": length}), shape, cluster)
    return ranked[0] if ranked[0].refusal is None else None


def fits_text(rows: Sequence[FitRow], settings: RunSettings, cluster: Cluster) -> str:
    """The table as text for a terminal, followed by notes on columns and refused models."""
    # Each rule that refuses a model has a letter, which the table shows after the model's name.
    rules = list(dict.fromkeys(rule for row in rows for rule in row.rules))
    letters = {rule: "abcdefgh"[index] for index, rule in enumerate(rules)}
    nodes = f"{cluster.nodes} nodes of " if cluster.nodes > 1 else ""
    lines = [
        f"{nodes}{cluster.ranks_per_node} x {cluster.hardware.name}, lora_r {settings.lora_r}",
        f"{'':58}{'LoRA, 16 bits':>19}  {'QLoRA, 4 bits':>19}",
        f"{'model':<49}{'billions':>9}" + f"{'length':>8}{'tokens/s':>11}  " * 2,
    ]
    for row in rows:
        letters_of_model = "".join(letters[rule] for rule in row.rules)
        cells = f"{_cells(row.lora)}  {_cells(row.qlora)}"
        lines.append(f"{row.name:<46}{letters_of_model:<3}{row.parameters / 1e9:>9.2f}{cells}")
    notes = [
        "length: the longest sequence that fits, in tokens. Powers of two are tried, up to "
        f"{_LONGEST:,} and to the model's number of positions; -: none fits. tokens/s: predicted, "
        f"of all ranks together, for sequences of {settings.max_length:,} tokens (max_length), or "
        "of `length` tokens if that is less. Nothing is offloaded unless offload_param=cpu is "
        "given.",
        *(f"{letters[rule]}: training is refused [rule {rule}, {DOCS}/rules.md]" for rule in rules),
    ]
    lines = [line.rstrip() for line in lines]
    return "\n".join([*lines, "", *(textwrap.fill(note, _WIDTH) for note in notes)])


def _cells(fit: Fit | None) -> str:
    """The two cells of a table row for LoRA or for QLoRA: longest sequence, and tokens/s."""
    if fit is None:
        return f"{'-':>8}{'-':>11}"
    return f"{fit.length:>8,}{fit.tokens_per_second:>11,.0f}"
