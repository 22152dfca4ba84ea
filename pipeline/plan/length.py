"""Cost of the setting max_length: tokens lost at its value, and memory at greater values."""

from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.plan.choose import Candidate, Cluster, candidates, default_global_batch_size
from pipeline.plan.given.data_size import DataSize, LengthLoss
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.shape import ModelShape
from pipeline.plan.plan import Plan

_STEP = 1024  # tokens; the longest length is found to the next step or to 1 %
_LONGEST = 2**24  # tokens that are tried
# Settings whose values are for the number of ranks of a run.
_FOR_ALL_RANKS = (
    "sequence_parallel_size", "hpz_partition_size", "global_batch_size",
    "gradient_accumulation_steps",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LengthNeed:
    """A greater `max_length`, the percentage of the tokens that it keeps, and what it needs.

    `best`: the best candidate; it has a refusal if the length does not fit. `limit_bytes`: bytes
    that a rank may use of its device. `num_layers`: blocks of the model. `note`: text after the
    percentage.
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
        need, limit = self.best.memory.device_need / GIB, self.limit_bytes / GIB
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
            "device_bytes": self.best.memory.device_need,
            "seconds_per_step": self.best.speed.seconds_per_step,
            "refusal": self.best.refusal,
        }


def length_needs(
    loss: LengthLoss, settings: RunSettings, shape: ModelShape, cluster: Cluster
) -> list[LengthNeed]:
    """The lengths that keep 99 % and all of the tokens, if they are greater than `max_length`."""
    needs = []
    percents = {loss.keeps_99: 99, loss.keeps_all: 100}  # 100 if both lengths are the same
    unit = " of the tokens in undivided documents" if settings.over_length == "split" else ""
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
    """The longest `max_length` that fits, in steps of `_STEP` tokens, and its best candidate."""

    max_length: int
    best: Candidate


def longest_length(
    settings: RunSettings, shape: ModelShape, cluster: Cluster
) -> LongestLength | None:
    """The longest `max_length` that fits, whatever the model's number of positions.

    None if no length fits. What is `auto` is searched with micro-batches of one sequence and every
    layer checkpointed, because nothing else makes a longer sequence fit. Raises UserError if the
    batch keys do not suit the cluster.
    """
    smallest: dict[str, Any] = {}
    if settings.batch_size == "auto" and settings.gradient_accumulation_steps == "auto":
        smallest["batch_size"] = 1
        if settings.global_batch_size == "auto":
            smallest["global_batch_size"] = default_global_batch_size(cluster.world_size)
    if settings.gradient_checkpointing == "auto":
        smallest["gradient_checkpointing"] = True
    settings = settings.model_copy(update=smallest)

    def best_at(steps: int) -> Candidate | None:
        longer = settings.model_copy(update={"max_length": steps * _STEP})
        best = candidates(longer, shape, cluster)[0]
        return best if best.refusal is None else None

    found: LongestLength | None = None
    low, high = 0, 1  # `low` steps fit, or are 0; `high` steps do not fit once `is_bounded`
    is_bounded = False
    while high - low > max(1, low // 100) or not is_bounded:
        middle = (low + high) // 2 if is_bounded else high
        best = best_at(middle)
        if best is not None:
            found = LongestLength(max_length=middle * _STEP, best=best)
            low, high = middle, high if is_bounded else 2 * middle
            is_bounded |= high * _STEP > _LONGEST
        else:
            high, is_bounded = middle, True
    return found


def longest_text(settings: RunSettings, shape: ModelShape, cluster: Cluster) -> str:
    """The longest `max_length` that fits on the cluster and on one of its devices, as a line."""
    cases = [(settings, cluster, f"{cluster.world_size} x {cluster.hardware.name}")]
    if cluster.world_size > 1 and cluster.hardware.kind == "cuda":
        of_one = settings.model_copy(update=dict.fromkeys(_FOR_ALL_RANKS, "auto"))
        cases.append((of_one, replace(cluster, nodes=1, ranks_per_node=1), "1 of them"))
    texts = []
    for of_case, ranks, device in cases:
        found = longest_length(of_case, shape, ranks)
        if found is None:
            texts.append(f"fewer than {_STEP:,} tokens fit on {device}")
        else:
            savings = found.best.layout.savings_text(shape.num_layers)
            texts.append(f"up to {found.max_length:,} tokens on {device} ({savings})")
    text = "; ".join(texts)
    if shape.max_positions is not None:
        text += f"; the model has {shape.max_positions:,} positions"
    return text


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
    """The loss by `max_length` and the needs of greater lengths; None if it is not known."""
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


def _loss_text(data: DataSize, loss: LengthLoss, settings: RunSettings) -> str:
    """Number of longer documents, and what `over_length` does with them."""
    mark, kind = ("", "supervised tokens") if data.is_exact else ("about ", "tokens")
    head = (
        f"{mark}{loss.longer:,} of {loss.documents:,} documents have more than "
        f"{settings.max_length:,} tokens (max_length)"
    )
    if settings.over_length == "split":
        return (
            f"{head}; they are split, so no {kind[:-1]} is lost, but a part is trained without the "
            "text before it"
        )
    if settings.over_length == "fail":
        return f"{head}; over_length: fail ends the run at the first of them"
    verb = {"truncate": "truncated", "drop": "dropped"}[settings.over_length]
    share = 100 * loss.lost / loss.tokens
    return (
        f"{head}; they are {verb}, which loses {mark}{loss.lost:,} of {loss.tokens:,} {kind} "
        f"({share:.3g} %)"
    )
