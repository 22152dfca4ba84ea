"""Consequences of the setting `max_length`, the number of tokens of a sequence.

They are shown in a plan: how many tokens of longer documents are lost, how much memory greater
values of `max_length` need, and the greatest value that fits.
"""

from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.plan.choose import Candidate, Cluster, candidates, default_global_batch_size
from pipeline.plan.given.data_size import DataSize, LengthLoss
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.shape import ModelShape
from pipeline.plan.plan import Plan

STEP = 1024  # tokens; `longest_length` tries multiples of it
_LONGEST = 2**24  # tokens; greater lengths are not tried
# Settings whose values suit only the number of ranks of the run.
_RANK_SETTINGS = (
    "sequence_parallel_size", "hpz_partition_size", "global_batch_size",
    "gradient_accumulation_steps",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LengthNeed:
    """A greater `max_length`, the percentage of the tokens that it keeps, and what it needs.

    `best`: the best layout for this length with its predictions; it has a refusal if the length
    does not fit. `limit_bytes`: bytes that a rank may use of its device. `num_layers`: blocks of
    the model. `note`: text after the percentage.
    """

    max_length: int
    percent: int
    best: Candidate
    limit_bytes: int
    num_layers: int
    note: str

    @property
    def text(self) -> str:
        """The need of this length, for a message."""
        head = f"max_length {self.max_length:,} keeps {self.percent} %{self.note}"
        if self.best.refusal is not None:
            return f"{head}, but {self.best.refusal}"
        need, limit = self.best.memory.device_peak_bytes / GIB, self.limit_bytes / GIB
        layout, seconds = self.best.layout, self.best.speed.seconds_per_step
        return (
            f"{head} and needs {need:.1f} of {limit:.1f} GiB a rank with "
            f"{layout.savings_text(self.num_layers)}, {seconds:.3g} s/step"
        )

    def as_json(self) -> dict[str, Any]:
        """The need as JSON values, in bytes and seconds."""
        return {
            "max_length": self.max_length,
            "percent": self.percent,
            "device_bytes": self.best.memory.device_peak_bytes,
            "seconds_per_step": self.best.speed.seconds_per_step,
            "refusal": self.best.refusal,
        }


def length_needs(
    length_loss: LengthLoss, settings: RunSettings, shape: ModelShape, cluster: Cluster
) -> list[LengthNeed]:
    """The needs of the lengths that keep 99 % and all of the tokens.

    A length that is not greater than `max_length` is left out.
    """
    needs = []
    # The percentage is 100 if both lengths are the same.
    percents = {length_loss.keeps_99: 99, length_loss.keeps_all: 100}
    unit = (
        " of the tokens in documents that are not split" if settings.over_length == "split" else ""
    )
    for length, percent in percents.items():
        if length > settings.max_length:
            is_beyond = shape.max_positions is not None and length > shape.max_positions
            positions = f" (the model has {shape.max_positions:,} positions)" if is_beyond else ""
            best = candidates(settings.model_copy(update={"max_length": length}), shape, cluster)[0]
            needs.append(
                LengthNeed(
                    max_length=length,
                    percent=percent,
                    best=best,
                    limit_bytes=cluster.device_limit,
                    num_layers=shape.num_layers,
                    note=unit + positions,
                )
            )
    return needs


@dataclass(frozen=True, kw_only=True)
class LongestLength:
    """The longest `max_length` that fits, and its best layout."""

    max_length: int
    best: Candidate


def longest_length(
    settings: RunSettings, shape: ModelShape, cluster: Cluster, step: int = STEP
) -> LongestLength | None:
    """The longest `max_length` that fits, exact to `step` tokens or to 1 %; None if none fits.

    The model's number of positions does not limit the result. If batch size and gradient
    checkpointing are `auto`, the values that need the least memory are assumed: one sequence per
    micro-batch, and checkpointing of every layer. Raises UserError if the batch keys do not suit
    the cluster.
    """
    least_memory: dict[str, Any] = {}
    if settings.batch_size == "auto" and settings.gradient_accumulation_steps == "auto":
        least_memory["batch_size"] = 1
        if settings.global_batch_size == "auto":
            least_memory["global_batch_size"] = default_global_batch_size(cluster.world_size)
    if settings.gradient_checkpointing == "auto":
        least_memory["gradient_checkpointing"] = True
    settings = settings.model_copy(update=least_memory)
    longest: LongestLength | None = None

    def fits(num_steps: int) -> bool:
        nonlocal longest
        length = num_steps * step
        best = candidates(settings.model_copy(update={"max_length": length}), shape, cluster)[0]
        if best.refusal is None:
            longest = LongestLength(max_length=length, best=best)
        return best.refusal is None

    # Double the length until it does not fit, then bisect: `low` steps fit, `high` steps do not.
    high = 1
    while high * step <= _LONGEST and fits(high):
        high *= 2
    low = high // 2
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return longest


def longest_text(settings: RunSettings, shape: ModelShape, cluster: Cluster) -> str:
    """The longest `max_length` that fits on the cluster and on one of its devices, as a line."""
    name = f"{cluster.world_size} x {cluster.hardware.name}"
    text = _longest_text_for(settings, shape, cluster, name)
    if cluster.world_size > 1 and cluster.hardware.kind == "cuda":
        for_one_rank = settings.model_copy(update=dict.fromkeys(_RANK_SETTINGS, "auto"))
        one_device = replace(cluster, nodes=1, ranks_per_node=1)
        text += f"; {_longest_text_for(for_one_rank, shape, one_device, '1 of them')}"
    if shape.max_positions is not None:
        text += f"; the model has {shape.max_positions:,} positions"
    return text


def _longest_text_for(settings: RunSettings, shape: ModelShape, cluster: Cluster, name: str) -> str:
    """The longest `max_length` that fits on a cluster with this name, as text."""
    longest = longest_length(settings, shape, cluster)
    if longest is None:
        return f"fewer than {STEP:,} tokens fit on {name}"
    savings = longest.best.layout.savings_text(shape.num_layers)
    return f"up to {longest.max_length:,} tokens on {name} ({savings})"


def length_texts(
    data: DataSize | None, settings: RunSettings, shape: ModelShape, cluster: Cluster | None
) -> list[str]:
    """Sentences about the documents that are longer than `max_length`; none if no document is.

    Without a cluster, the memory at greater lengths is left out.
    """
    if data is None or data.length_loss is None or not data.length_loss.longer:
        return []
    texts = [_loss_text(data, data.length_loss, settings)]
    if cluster is not None and (needs := length_needs(data.length_loss, settings, shape, cluster)):
        texts += [need.text for need in needs]
        texts[-1] += f" (on {cluster.world_size} x {cluster.hardware.name})"
    return texts


def length_json(plan: Plan) -> dict[str, Any] | None:
    """The tokens lost by `max_length` and the needs of greater lengths; None if it is not known."""
    data, shape = plan.data, plan.shape
    if data is None or data.length_loss is None:
        return None
    needs = length_needs(data.length_loss, plan.settings, shape, plan.cluster)
    return {
        **vars(data.length_loss),
        "is_exact": data.is_exact,
        "needs": [need.as_json() for need in needs],
        "text": length_texts(data, plan.settings, shape, plan.cluster),
    }


def _loss_text(data: DataSize, length_loss: LengthLoss, settings: RunSettings) -> str:
    """Number of longer documents, and what `over_length` does with them."""
    # prepare counts supervised tokens; an estimate counts all tokens
    about, unit = ("", "supervised token") if data.is_exact else ("about ", "token")
    head = (
        f"{about}{length_loss.longer:,} of {length_loss.documents:,} documents have more than "
        f"{settings.max_length:,} tokens (max_length)"
    )
    if settings.over_length == "split":
        return (
            f"{head}; they are split, so no {unit} is lost, but each part is trained without the "
            "text before it"
        )
    if settings.over_length == "fail":
        return f"{head}; over_length: fail ends the run at the first of them"
    verb = {"truncate": "truncated", "drop": "dropped"}[settings.over_length]
    share = 100 * length_loss.lost / length_loss.tokens
    return (
        f"{head}; they are {verb}, which loses {about}{length_loss.lost:,} of "
        f"{length_loss.tokens:,} {unit}s ({share:.3g} %)"
    )
