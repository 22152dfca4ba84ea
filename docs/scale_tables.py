"""The tables of docs/scale.md, from the plan's predictions of memory and speed."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from pipeline.config.settings import RunSettings
from pipeline.plan.choose import Candidate, Cluster, candidates
from pipeline.plan.cost.per_token import CostPerToken, cost_per_token
from pipeline.plan.cost.speed import Speed
from pipeline.plan.given.catalogue import gpu_named
from pipeline.plan.given.hardware import GIB, Hardware
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape, read_shape

MODELS = {name: f"Llama 3.1 {name.upper()}" for name in ("8b", "70b", "405b")}
_FOLDER = Path(__file__).parents[1] / "ds_configs/models"
GPU, PER_NODE = "h100-80gb", 8
TOKENS, SEQUENCES = 2048, 4  # of a sequence; of a GPU and step where the batch grows with them
GLOBAL_BATCHES = (64, 512)  # sequences of a step where it does not
COUNTS = (8, 64, 512)
DOCUMENTS, EPOCHS = 10_000, 3  # of a small fine-tuning
BASES = {"LoRA": False, "QLoRA": True}
SHARDINGS = {"ZeRO-2": (2, 1), "ZeRO-3": (3, 1), "ZeRO-3, hpZ": (3, PER_NODE)}
# Bytes/s each way of a GPU to other nodes, at the fraction of the figure that the catalogue uses.
NETWORKS = {"400 Gb/s a GPU": 25e9, "200": 12.5e9, "100": 6.25e9, "25": 1.5625e9}
# Terms of a step that wait for links, without what overlaps with computing.
_WAITS = ("base_gathers", "gradient_reduction", "adapter_gather")
_WORTH = 1.5  # speed-up that twice the GPUs must give


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run to predict: a model, its base, its sharding, and the number of GPUs."""

    model: str
    base: str
    sharding: str | None  # None: as the plan chooses
    gpus: int
    network: float
    global_batch: int

    def best(self) -> Candidate:
        """The fastest layout that fits, or the one with the least need."""
        stage, copy = (None, None) if self.sharding is None else SHARDINGS[self.sharding]
        settings = settings_of(self.base, self.global_batch).model_copy(
            update={} if stage is None else {"zero_stage": stage, "hpz_partition_size": copy}
        )
        cluster = Cluster(
            hardware=replace(hardware(), network=self.network),
            nodes=max(1, self.gpus // PER_NODE),
            ranks_per_node=min(PER_NODE, self.gpus),
        )
        return candidates(settings, shape_of(self.model), cluster)[0]


def settings_of(base: str, global_batch: int) -> RunSettings:
    """Settings of LoRA or QLoRA with the base on the GPUs, for all tables."""
    return RunSettings(
        model="a folder", train_data="train.jsonl", output_dir="run", lora_r=16,
        lora_dropout=0.05, lora_target_modules="all-linear", load_in_4bit=BASES[base],
        global_batch_size=global_batch, max_length=TOKENS, packing=False, offload_param="none",
    )  # fmt: skip


def hardware() -> Hardware:
    """The GPU of all tables."""
    return gpu_named(GPU)


def shape_of(model: str) -> ModelShape:
    """The model's shape; the same object each time, so that cached sums are reused."""
    if model not in _SHAPES:
        _SHAPES[model] = read_shape(str(_FOLDER / f"llama-3.1-{model}"))
    return _SHAPES[model]


_SHAPES: dict[str, ModelShape] = {}


def link_bytes(work: CostPerToken, layout: Layout) -> float:
    """Bytes that a GPU sends in a step, if each collective is a ring."""
    world, accumulation = layout.world_size, layout.accumulation_steps
    group = layout.hpz_partition_size if layout.hpz_partition_size > 1 else world
    gathers = 2 * accumulation if layout.is_sharded else 0
    reductions = accumulation if layout.is_sharded else 2 * accumulation
    adapter = work.trainable * (4 * reductions + layout.bytes_per_value)
    return gathers * work.stored_bytes * (group - 1) / group + adapter * (world - 1) / world


def link_seconds(speed: Speed) -> float:
    """Seconds of a step that wait for links."""
    return sum(speed.terms[name] for name in _WAITS)


def growing(model: str) -> str:
    """A batch that grows with the GPUs."""
    lines = [
        "| base | sharding | GPUs | micro-batches | checkpointed | GiB a GPU | GiB over links "
        "| s a step | waiting | tokens/s a GPU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    network = hardware().network
    for base in BASES:
        for sharding, (_, copy) in SHARDINGS.items():
            for gpus in COUNTS:
                if copy > 1 and gpus <= PER_NODE:
                    continue  # the second copy would be the first
                case = Case(
                    model=model, base=base, sharding=sharding, gpus=gpus, network=network,
                    global_batch=SEQUENCES * gpus,
                )  # fmt: skip
                lines.append(f"| {base} | {sharding} | {gpus} | {_price(case)} |")
    return "\n".join(lines)


def _price(case: Case) -> str:
    best, blocks = case.best(), shape_of(case.model).num_layers
    memory = f"{best.memory.device_peak_bytes / GIB:.0f}"
    if best.refusal is not None:
        return f"does not fit | | {memory} | | | |"
    layout, speed = best.layout, best.speed
    settings = settings_of(case.base, case.global_batch)
    sent = link_bytes(cost_per_token(shape_of(case.model), settings, layout.training_dtype), layout)
    return " | ".join(
        (
            f"{layout.accumulation_steps} x {layout.micro_batch_size}",
            f"{layout.checkpointed_layers} of {blocks}",
            memory,
            f"{sent / GIB:,.0f}" if sent > 10 * GIB else f"{sent / GIB:.2f}",
            f"{speed.seconds_per_step:.2f}",
            f"{link_seconds(speed) / speed.seconds_per_step:.0%}",
            f"{speed.tokens_per_second / case.gpus:,.0f}",
        )
    )


def networks() -> str:
    """Share of a step that waits for links, by network."""
    lines = [
        f"| model | base | sharding | {' | '.join(NETWORKS)} |",
        f"|---|---|---|{'---|' * len(NETWORKS)}",
    ]
    gpus = COUNTS[1]
    for model in MODELS:
        for base in BASES:
            for sharding in SHARDINGS:
                candidates = [
                    Case(
                        model=model, base=base, sharding=sharding, gpus=gpus, network=network,
                        global_batch=SEQUENCES * gpus,
                    ).best()
                    for network in NETWORKS.values()
                ]  # fmt: skip
                if candidates[0].refusal is None:
                    waits = [link_seconds(c.speed) / c.speed.seconds_per_step for c in candidates]
                    shares = " | ".join(f"{share:.0%}" for share in waits)
                    lines.append(f"| {model.upper()} | {base} | {sharding} | {shares} |")
    return "\n".join(lines)


def fixed() -> str:
    """A batch that does not grow: what twice the GPUs give, as the plan lays it out."""
    counts = [PER_NODE * 2**i for i in range(7)]
    lines = [
        f"| batch | model | base | {' | '.join(f'{n} GPUs' for n in counts)} | pays to |",
        f"|---|---|---|{'---|' * (len(counts) + 1)}",
    ]
    for batch in GLOBAL_BATCHES:
        for model in MODELS:
            for base in BASES:
                candidates = [_as_chosen(model, base, n, batch) for n in counts if n <= batch]
                seconds = {
                    best.layout.world_size: best.speed.seconds_per_step
                    for best in candidates
                    if best.refusal is None
                }
                cells = [_cell(best) for best in candidates] + [""] * (
                    len(counts) - len(candidates)
                )
                lines.append(
                    f"| {batch} | {model.upper()} | {base} | {' | '.join(cells)} "
                    f"| {gpus_worth_using(seconds)} |"
                )
    return "\n".join(lines)


def _as_chosen(model: str, base: str, gpus: int, global_batch: int) -> Candidate:
    network = hardware().network
    return Case(
        model=model, base=base, sharding=None, gpus=gpus, network=network, global_batch=global_batch
    ).best()  # fmt: skip


def _cell(candidate: Candidate) -> str:
    if candidate.refusal is not None:
        return "does not fit"
    layout, seconds = candidate.layout, candidate.speed.seconds_per_step
    hpz = ", hpZ" if layout.hpz_partition_size > 1 else ""
    return f"{seconds:,.2f} s (ZeRO-{layout.zero_stage}{hpz})"


def hours() -> str:
    """How long a small fine-tuning takes, with a batch that grows with the GPUs."""
    lines = [
        f"| model | base | {' | '.join(f'{n} GPUs' for n in COUNTS)} |",
        f"|---|---|{'---|' * len(COUNTS)}",
    ]
    for model in MODELS:
        for base in BASES:
            candidates = [_as_chosen(model, base, n, SEQUENCES * n) for n in COUNTS]
            cells = [
                "does not fit" if best.refusal is not None else f"{_minutes(best):,.1f} min"
                for best in candidates
            ]
            lines.append(f"| {model.upper()} | {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _minutes(candidate: Candidate) -> float:
    return DOCUMENTS * EPOCHS * TOKENS / candidate.speed.tokens_per_second / 60


def gpus_worth_using(seconds: dict[int, float]) -> int:
    """The number of GPUs up to which each doubling makes a step at least _WORTH times faster."""
    counts = sorted(seconds)
    for fewer, more in pairwise(counts):
        if seconds[fewer] / seconds[more] < _WORTH:
            return fewer
    return counts[-1]


def break_even() -> str:
    """Tokens of a micro-batch from which gathers of the base hide behind computing."""
    gpu = hardware()
    links = {"NVLink (one node, or hpZ)": gpu.node_link} | {
        f"{name} to other nodes" if "GPU" in name else f"{name} Gb/s": rate
        for name, rate in NETWORKS.items()
    }
    lines = [
        "| slowest link of the gather | bf16 base | 4-bit base |",
        "|---|---|---|",
    ]
    for name, rate in links.items():
        # 2 gathers of b bytes a weight against 4 + 2 FLOPs a weight and token, recomputing all
        # blocks; links and matrix products reach the same share of their rates (speed.py).
        tokens = [2 * width * gpu.flops / (6 * rate) for width in (2.0, 0.5)]
        lines.append(f"| {name} | {tokens[0]:,.0f} | {tokens[1]:,.0f} |")
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """The page with each table between its markers as the code makes it now."""
    for name, table in tables().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}{table}\n{end}{rest.split(end)[1]}"
    return page


def tables() -> dict[str, str]:
    """Name of a marker in docs/scale.md -> the table below it."""
    return {
        **{f"growing-{model}": growing(model) for model in MODELS},
        "networks": networks(),
        "fixed": fixed(),
        "hours": hours(),
        "break-even": break_even(),
    }
