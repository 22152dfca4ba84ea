"""Top section of a report: model, training method and key figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pipeline.report import text
from pipeline.report.folder import RunRecords, dict_or_empty, float_or_none
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
    settings, model = run.settings, dict_or_empty(run.plan.get("model"))
    choice, hardware = (
        dict_or_empty(run.plan.get("choice")),
        dict_or_empty(run.plan.get("hardware")),
    )
    phrases = []
    if settings:
        name = "QLoRA, 4-bit" if settings.get("load_in_4bit") else "LoRA"
        name = "LoRA on 8-bit" if settings.get("load_in_8bit") else name
        phrases.append(f"{name}, r = {settings.get('lora_r', '?')}")
    total, trainable = float_or_none(model.get("parameters")), float_or_none(model.get("trainable"))
    if total and trainable:
        share = text.share(trainable / total)
        phrases.append(
            f"{text.amount(trainable)} of {text.amount(total)} parameters trained ({share})"
        )
    if "zero_stage" in choice:
        phrases.append(f"ZeRO-{choice['zero_stage']}")
    if "training_dtype" in model:
        phrases.append(str(model["training_dtype"]))
    if "name" in hardware:
        ranks = hardware.get("ranks", 1)
        phrases.append(f"{ranks} x {hardware['name']}" if ranks != 1 else str(hardware["name"]))
    return phrases


def tiles(run: RunRecords) -> list[Tile]:
    """Key figures for which the run folder has the data."""
    return [*_quality(run), *_progress(run)]


def lowest_text(run: RunRecords) -> str:
    """The lowest held-out loss with its step."""
    best, step = min((value, step) for step, value in zip(*run.held_out(), strict=True))
    return f"lowest {text.loss(best)} at step {step:,.0f}"


def _quality(run: RunRecords) -> Iterator[Tile]:
    """Tiles for exact match and held-out loss, before and after training.

    The held-out loss is that of score.json or, if the run was not scored, of the evaluations.
    """
    models = dict_or_empty(run.score.get("models"))
    scores = {name: dict_or_empty(models.get(name)) for name in MODELS}
    exact_match = {name: float_or_none(scores[name].get("exact_match")) for name in MODELS}
    loss = {name: float_or_none(scores[name].get("loss")) for name in MODELS}
    evaluated = run.held_out()[1]  # losses in the order of the steps
    if exact_match["adapter"] is not None:
        rows = float_or_none(run.score.get("rows"))
        notes = []
        if exact_match["merged"] is not None:
            notes.append(f"merged {text.share(exact_match['merged'])}")
        if rows is not None:
            notes.append(f"{rows:,.0f} held-out rows")
        yield Tile(
            label="Exact match",
            value=text.share(exact_match["adapter"]),
            before="" if exact_match["base"] is None else text.share(exact_match["base"]),
            note=", ".join(notes),
        )
    if loss["adapter"] is not None:
        yield Tile(
            label="Held-out loss",
            value=text.loss(loss["adapter"]),
            before="" if loss["base"] is None else text.loss(loss["base"]),
            note="" if loss["merged"] is None else f"merged {text.loss(loss['merged'])}",
        )
    elif evaluated:
        yield Tile(
            label="Held-out loss",
            value=text.loss(evaluated[-1]),
            before=text.loss(evaluated[0]) if len(evaluated) > 1 else "",
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
    step, total = float_or_none(status.get("step")), float_or_none(status.get("total_steps"))
    if step is None and losses:
        step = steps[-1]
    if step is not None:
        value = f"{step:,.0f}" + ("" if total is None else f" of {total:,.0f}")
        yield Tile(label="Steps", value=value, note=_token_text(run))
    speed = run.measured("tokens_per_second")[1]
    if speed:
        yield Tile(label="Throughput", value=f"{median(speed):,.0f} tokens/s", note="median step")
    seconds_in_steps = sum(run.measured("step_seconds")[1])
    seconds = wall_seconds(run)
    # The status of an earlier version has only the last start, which may be shorter than all steps.
    if seconds is not None and seconds >= seconds_in_steps:
        note = f"{text.duration(seconds_in_steps)} of it in steps" if seconds_in_steps else ""
        yield Tile(label="Wall time", value=text.duration(seconds), note=note)
    elif seconds_in_steps:
        yield Tile(label="Time in steps", value=text.duration(seconds_in_steps))


def _token_text(run: RunRecords) -> str:
    """Number of trained tokens, and the share of supervised ones."""
    tokens, supervised = (sum(run.measured(key)[1]) for key in ("tokens", "supervised_tokens"))
    if not tokens:
        return ""
    count = f"{tokens:,.0f} tokens"
    return f"{count}, {text.share(supervised / tokens)} supervised" if supervised else count
