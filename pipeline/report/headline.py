"""Top section of a report: model, training method and key figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pipeline.report import text
from pipeline.report.folder import RunRecords, mapping, number
from pipeline.report.timeline import wall_seconds

MODELS = ("base", "adapter", "merged")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A key figure with its label. `before`: the value before training."""

    label: str
    value: str
    before: str = ""
    note: str = ""


def model_name(run: RunRecords) -> str:
    """The last part of the model's path or hub name; empty if unknown."""
    model = run.settings.get("model") or run.model_folder
    return Path(str(model)).name if model else ""


def method(run: RunRecords) -> list[str]:
    """Phrases about the training method: LoRA or QLoRA, parameters, ZeRO stage, dtype, hardware."""
    settings, model = run.settings, mapping(run.plan.get("model"))
    choice, hardware = mapping(run.plan.get("choice")), mapping(run.plan.get("hardware"))
    words = []
    if settings:
        kind = "QLoRA, 4-bit" if settings.get("load_in_4bit") else "LoRA"
        kind = "LoRA on 8-bit" if settings.get("load_in_8bit") else kind
        words.append(f"{kind}, r = {settings.get('lora_r', '?')}")
    total, trainable = number(model.get("parameters")), number(model.get("trainable"))
    if total and trainable:
        share = text.share(trainable / total)
        words.append(
            f"{text.amount(trainable)} of {text.amount(total)} parameters trained ({share})"
        )
    if "zero_stage" in choice:
        words.append(f"ZeRO-{choice['zero_stage']}")
    words += [str(model["training_dtype"])] if "training_dtype" in model else []
    if "name" in hardware:
        ranks = hardware.get("ranks", 1)
        words.append(f"{ranks} x {hardware['name']}" if ranks != 1 else str(hardware["name"]))
    return words


def tiles(run: RunRecords) -> list[Tile]:
    """Key figures for which the run folder has the data."""
    return [*_quality(run), *_progress(run)]


def lowest_text(run: RunRecords) -> str:
    """The lowest held-out loss with its step."""
    best, step = min((value, step) for step, value in zip(*run.held_out(), strict=True))
    return f"lowest {text.loss(best)} at step {step:,.0f}"


def _quality(run: RunRecords) -> Iterator[Tile]:
    """Tiles for exact match and held-out loss, before and after training."""
    scored = {name: mapping(mapping(run.score.get("models")).get(name)) for name in MODELS}
    match = {name: number(score.get("exact_match")) for name, score in scored.items()}
    loss = {name: number(score.get("loss")) for name, score in scored.items()}
    held_out = list(zip(*run.held_out(), strict=True))
    if match["adapter"] is not None:
        rows = number(run.score.get("rows"))
        note = [] if match["merged"] is None else [f"merged {text.share(match['merged'])}"]
        note += [] if rows is None else [f"{rows:,.0f} held-out rows"]
        before = "" if match["base"] is None else text.share(match["base"])
        yield Tile(
            label="Exact match",
            value=text.share(match["adapter"]),
            before=before,
            note=", ".join(note),
        )
    if loss["adapter"] is not None:
        yield Tile(
            label="Held-out loss",
            value=text.loss(loss["adapter"]),
            before="" if loss["base"] is None else text.loss(loss["base"]),
            note="" if loss["merged"] is None else f"merged {text.loss(loss['merged'])}",
        )
    elif held_out:
        losses = [value for _, value in held_out]
        yield Tile(
            label="Held-out loss",
            value=text.loss(losses[-1]),
            before=text.loss(losses[0]) if len(losses) > 1 else "",
            note=lowest_text(run),
        )


def _progress(run: RunRecords) -> Iterator[Tile]:
    """Tiles for training loss, steps, throughput and time."""
    (steps, losses), status = run.measured("loss"), run.status
    if losses:
        first, last = losses[0], losses[-1]
        yield Tile(
            label="Training loss",
            value=text.loss(last),
            before=text.loss(first) if len(losses) > 1 else "",
            note=f"first and last of {len(losses):,} steps" if len(losses) > 1 else "one step",
        )
    step, total = number(status.get("step")), number(status.get("total_steps"))
    if step is None and losses:
        step = steps[-1]
    if step is not None:
        value = f"{step:,.0f}" + ("" if total is None else f" of {total:,.0f}")
        yield Tile(label="Steps", value=value, note=_token_text(run))
    speed = run.measured("tokens_per_second")[1]
    if speed:
        yield Tile(label="Throughput", value=f"{median(speed):,.0f} tokens/s", note="median step")
    in_steps = sum(run.measured("step_seconds")[1])
    wall = wall_seconds(run)
    # A status of an earlier version has only the times of the last start.
    if wall is not None and wall >= in_steps:
        note = f"{text.duration(in_steps)} of it in steps" if in_steps else ""
        yield Tile(label="Wall time", value=text.duration(wall), note=note)
    elif in_steps:
        yield Tile(label="Time in steps", value=text.duration(in_steps))


def _token_text(run: RunRecords) -> str:
    tokens, supervised = (sum(run.measured(key)[1]) for key in ("tokens", "supervised_tokens"))
    if not tokens:
        return ""
    count = f"{tokens:,.0f} tokens"
    return f"{count}, {text.share(supervised / tokens)} supervised" if supervised else count
