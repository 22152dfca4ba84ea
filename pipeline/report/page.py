"""Write report.html, a self-contained page about a run, to the run folder.

Jinja2 escapes every value except the SVG plots of plots.py.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline import __version__
from pipeline.config.settings import RunSettings, settings_by
from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.report import data_audit, text
from pipeline.report.folder import RunRecords, mapping, number, read_run_folder
from pipeline.report.headline import MODELS, method, model_name, tiles
from pipeline.report.plots import NARROW, line_curve, loss_curve, smoothing_window

_TOLERANCE = 0.10  # relative error of the predicted memory; the page marks larger errors


@dataclass(frozen=True, kw_only=True)
class Curve:
    """An SVG plot and its caption; `narrow` is the variant for small screens, if any."""

    title: str
    svg: str
    narrow: str = ""
    note: str = ""


def write_report(run_folder: Path) -> Path:
    """Write report.html into a run folder. Raises UserError if it is not a run folder."""
    run = read_run_folder(run_folder)
    path = run_folder / "report.html"
    try:
        write_text(path, _render(run))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
    return path


def _render(run: RunRecords) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": text.cell, "moment": text.moment, "pretty": text.pretty}
    environment.tests["link"] = _is_link
    return environment.get_template("page.html.jinja").render(
        run=run,
        title=model_name(run) or run.name,
        method=method(run),
        tiles=tiles(run),
        curves=_curves(run),
        scores=_scores(run),
        answers=list(_answers(run)),
        choices=_choices(run),
        memory=_memory(run),
        rules=_rules(run),
        audit=data_audit.count_table(run.audit),
        split_audits=data_audit.split_audits(run.audit),
        source_columns=data_audit.source_columns(),
        rejects=data_audit.first_rejects(run),
        settings=[(key, value, _is_default(key, value)) for key, value in run.settings.items()],
        version=__version__,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


def _is_link(value: object) -> bool:
    return re.fullmatch(r"https?://\S+", str(value)) is not None


def _curves(run: RunRecords) -> list[Curve]:
    curves = []
    losses, held_out = run.measured("loss"), run.held_out()
    if losses or held_out:
        window = smoothing_window(len(losses))
        training, evals = _columns(losses), _columns(held_out)
        curves.append(
            Curve(
                title="Loss",
                svg=loss_curve("loss", training, evals),
                narrow=loss_curve("loss-narrow", training, evals, size=NARROW),
                note=f"mean over {window} steps" if window > 1 else "",
            )
        )
    for key, title, unit, tick in (
        ("lr", "Learning rate", "", text.scientific),
        ("tokens_per_second", "Throughput", "tokens/s", text.amount),
        ("grad_norm", "Gradient norm", "", "{:g}".format),
        ("peak_bytes", "Peak memory", "GiB per rank", "{:g}".format),
    ):
        if points := run.measured(key):
            steps, values = _columns(points)
            if key == "peak_bytes":
                values = [value / text.GIB for value in values]
            svg = line_curve(key, (steps, values), title, tick=tick)
            curves.append(Curve(title=title, svg=svg, note=unit))
    return curves


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _scores(run: RunRecords) -> list[tuple[str, str, str, str]]:
    """Name, exact match, held-out loss and time of each scored model."""
    scored = mapping(run.score.get("models"))
    rows = []
    for name in [name for name in MODELS if name in scored]:
        numbers = [number(mapping(scored[name]).get(k)) for k in ("exact_match", "loss", "seconds")]
        formats = (text.share, "{:.4f}".format, text.duration)
        match, loss, seconds = (
            "-" if value is None else form(value)
            for form, value in zip(formats, numbers, strict=True)
        )
        rows.append((name, match, loss, seconds))
    return rows


def _answers(run: RunRecords) -> Iterator[Mapping[str, Any]]:
    answers = run.score.get("answers")
    for answer in answers if isinstance(answers, list) else []:
        row = mapping(answer)
        given = [(name, text.cell(row[name])) for name in MODELS if row.get(name) is not None]
        expected = text.cell(row.get("expected", ""))
        yield {
            "prompt": text.cell(row.get("prompt", "")),
            "expected": expected,
            "given": [(name, reply, reply.strip() == expected.strip()) for name, reply in given],
        }


def _choices(run: RunRecords) -> list[tuple[str, Any, str]]:
    """Key, value and reason of each choice of the plan; reasons for other keys come last."""
    choice = dict(mapping(run.plan.get("choice")))
    why = dict(mapping(choice.pop("why", {})))
    setting_of = settings_by("layout")
    rows = []
    for key, value in choice.items():
        name = setting_of.get(key, key)
        is_set = run.settings.get(name) not in (None, "auto")
        reason = why.pop(key, None) or why.pop(name, "set in the run file" if is_set else "")
        rows.append((key, value, str(reason)))
    return [*rows, *((key, "", str(reason)) for key, reason in why.items())]


def _rules(run: RunRecords) -> list[dict[str, str]]:
    listed = run.plan.get("rules")
    rules = [mapping(rule) for rule in listed] if isinstance(listed, list) else []
    keys = ("level", "message", "id", "source")
    return [{key: text.cell(rule.get(key, "")) for key in keys} for rule in rules]


def _memory(run: RunRecords) -> Mapping[str, Any] | None:
    """Terms of the predicted memory, largest first, with the predicted and the measured peak.

    The error compares the measured peak of live tensors with the prediction for the largest
    micro-batch that was trained. It does not use the plan's peak, which is for the largest possible
    micro-batch.
    """
    memory = mapping(run.plan.get("memory"))
    terms = {k: size for k, v in mapping(memory.get("per_rank")).items() if (size := number(v))}
    peak = number(memory.get("peak_bytes")) or sum(terms.values())
    if not peak:
        return None
    measured = max((value for _, value in run.measured("peak_bytes")), default=None)
    expected = max((value for _, value in run.measured("predicted_bytes")), default=None)
    device = number(memory.get("device_bytes"))
    error = None if not measured or not expected else expected / measured - 1
    in_gib = text.gib(max(peak, measured or 0))
    return {
        "terms": [
            (key, in_gib(size), 100 * size / max(terms.values()))
            for key, size in sorted(terms.items(), key=lambda item: -item[1])
        ],
        "peak": in_gib(peak),
        "expected": in_gib(expected) if expected else None,
        "measured": in_gib(measured) if measured else None,
        "error": None
        if error is None
        else f"{text.share(abs(error))} {'below' if error < 0 else 'above'}",
        "is_off": error is not None and abs(error) > _TOLERANCE,
        "device": None if device is None else in_gib(device),
        "share": None if not device else text.share(peak / device),
        "fits": memory.get("fits"),
    }


def _is_default(key: str, value: Any) -> bool:
    field = RunSettings.model_fields.get(key)
    return field is not None and field.get_default(call_default_factory=True) == value
