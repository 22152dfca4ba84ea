"""Cost of the setting max_length: tokens lost at its value, and memory at greater values."""

from dataclasses import dataclass
from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.plan.choose import Candidate, Cluster, candidates
from pipeline.plan.given.data_size import DataSize, LengthLoss
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.shape import ModelShape
from pipeline.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class LengthNeed:
    """A greater `max_length`, the percentage of the tokens that it keeps, and what it needs.

    `best`: the best candidate; it has a refusal if the length does not fit. `limit_bytes`: bytes
    that a rank may use of its device. `num_layers`: blocks of the model.
    """

    max_length: int
    percent: int
    best: Candidate
    limit_bytes: int
    num_layers: int

    @property
    def text(self) -> str:
        """The need of this length, for a message."""
        head = f"max_length {self.max_length:,} keeps {self.percent} %"
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
    for length, percent in percents.items():
        if length > settings.max_length:
            best = candidates(settings.model_copy(update={"max_length": length}), shape, cluster)[0]
            needs.append(
                LengthNeed(
                    max_length=length,
                    percent=percent,
                    best=best,
                    limit_bytes=cluster.device_limit,
                    num_layers=shape.num_layers,
                )
            )
    return needs


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
