"""Write report.html, a page about a run that loads no other files, to the run folder."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.config.settings import RunSettings, settings_by_trait
from pipeline.plan.given.class_proof import LIMIT
from pipeline.report import data_audit, text
from pipeline.report.curves import charts_of, held_out_chart, is_thinned, page_data
from pipeline.report.documents import first_documents
from pipeline.report.folder import RunRecords, mapping, number, read_run_folder
from pipeline.report.frame import render, write_page
from pipeline.report.headline import MODELS, method, model_name, tiles
from pipeline.report.reproduce import reproduction_of
from pipeline.report.timeline import timeline_of

_TOLERANCE = 0.10  # relative error of a predicted memory; the page marks larger errors
_SCORES = {
    "exact_match": "exact match", "regex_match": "regex match", "valid_json": "valid JSON",
    "loss": "held-out loss", "perplexity": "perplexity",
}  # fmt: skip
_FORMS: dict[str, Callable[[float], str]] = {
    "loss": "{:.4f}".format, "perplexity": "{:.4g}".format,
}  # fmt: skip
# Field of Proof with the reasons against a use of the model's class -> text of the page.
_USES = {
    "refusals": "not trained",
    "without_packs": "without packs",
    "without_reentrant": "without re-entrant checkpointing",
    "without_merge": "not merged",
    "without_fast_paths": "without fast paths",
}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A predicted and a measured value. `is_off`: whether the page marks the difference."""

    name: str
    predicted: str
    measured: str
    difference: str
    is_off: bool = False


def write_report(run_folder: Path, *, refresh_s: int = 0) -> Path:
    """Write report.html into a run folder. Raises UserError if it is not a run folder.

    `refresh_s`: interval at which the page reloads itself in the browser; 0 for never.
    """
    run = read_run_folder(run_folder)
    return write_page(run_folder / "report.html", _render(run, refresh_s))


def _render(run: RunRecords, refresh_s: int) -> str:
    charts, held_out, timeline = charts_of(run), held_out_chart(run), timeline_of(run)
    shown = charts if held_out is None else [held_out, *charts]
    curves = page_data(shown, timeline.marks)
    return render(
        "page.html.jinja",
        curves,
        refresh_s=refresh_s,
        run=run,
        title=model_name(run) or run.name,
        method=method(run),
        tiles=tiles(run),
        charts=charts,
        held_out=held_out,
        points=curves["points"],
        is_thinned=is_thinned(shown, curves["points"]),
        timeline=timeline,
        predictions=_predictions(run),
        scores=_scores(run),
        merge_error=_merge_error(run),
        answers=list(_answers(run)),
        choices=_choices(run),
        memory=_memory(run),
        proof=_proof(run),
        rules=_rules(run),
        length_texts=data_audit.length_texts(run.plan),
        audit=data_audit.count_table(run.audit),
        split_audits=data_audit.split_audits(run.audit),
        source_columns=data_audit.source_columns(),
        documents=first_documents(run),
        rejects=data_audit.first_rejects(run),
        settings=[(key, value, _is_default(key, value)) for key, value in run.settings.items()],
        reproduction=reproduction_of(run),
    )


def _predictions(run: RunRecords) -> list[Prediction]:
    """Memory and speed as planned and as measured, as far as both are known."""
    speed = mapping(run.plan.get("speed"))
    peak, expected = (
        max(run.measured(key)[1], default=None) for key in ("peak_bytes", "predicted_bytes")
    )
    rows = []
    if peak and expected:
        in_gib, off = text.gib(max(peak, expected)), abs(expected / peak - 1) > _TOLERANCE
        row = _prediction("peak memory", expected, peak, lambda size: f"{in_gib(size)} GiB")
        rows.append(replace(row, is_off=off))
    for name, planned, key, form in (
        ("time of a step", "seconds_per_step", "step_seconds", lambda s: f"{s:.3g} s"),
        ("throughput", "tokens_per_second", "tokens_per_second", lambda r: f"{r:,.0f} tokens/s"),
    ):
        predicted, values = number(speed.get(planned)), run.measured(key)[1]
        if predicted and values and (measured := median(values)):
            rows.append(_prediction(name, predicted, measured, form))
    return rows


def _prediction(
    name: str, predicted: float, measured: float, form: Callable[[float], str]
) -> Prediction:
    error = predicted / measured - 1
    side = "below" if error < 0 else "above"
    is_multiple = predicted >= 2 * measured
    return Prediction(
        name=name,
        predicted=form(predicted),
        measured=form(measured),
        difference=f"{predicted / measured:.2g} times as large"
        if is_multiple
        else f"{text.share(abs(error))} {side}",
    )


def _merge_error(run: RunRecords) -> str:
    """Sentence about the effect of the merge on loss and answers; empty if it was not scored."""
    scored = mapping(run.score.get("models"))
    adapter, merged = (number(mapping(scored.get(m)).get("loss")) for m in ("adapter", "merged"))
    if adapter is None or merged is None:
        return ""
    sign = "+" if merged >= adapter else ""
    relative = f" ({text.share(merged / adapter - 1)})" if adapter > 0 else ""
    answers = run.score.get("answers")
    pairs = [
        (mapping(a).get("adapter"), mapping(a).get("merged"))
        for a in (answers if isinstance(answers, list) else [])
    ]
    changed = sum(before != after for before, after in pairs)
    on_answers = f", and {changed:,} of {len(pairs):,} answers" if pairs else ""
    return (
        f"Merge error: merging changed the held-out loss by {sign}{merged - adapter:.2g}{relative}"
        f"{on_answers}."
    )


def _proof(run: RunRecords) -> Mapping[str, Any] | None:
    """Checks of the model's class with their relative errors, and the reasons against uses."""
    proof = mapping(run.plan.get("proof"))
    errors = [
        (name, value, not math.isnan(value) and value <= LIMIT)
        for name, error in mapping(proof.get("errors")).items()
        if (value := number(error)) is not None
    ]
    reasons = [
        (use, str(reason))
        for key, use in _USES.items()
        for reason in (proof[key] if isinstance(proof.get(key), list) else [])
    ]
    return {"errors": errors, "reasons": reasons, "limit": LIMIT} if errors or reasons else None


def _scores(run: RunRecords) -> Mapping[str, Any]:
    """Columns and rows of the table of scores: each value with its 95 % interval."""
    scored = {name: mapping(each) for name, each in mapping(run.score.get("models")).items()}
    columns = [key for key in _SCORES if any(key in each for each in scored.values())]
    rows = [(name, *(_score(each, key) for key in columns)) for name, each in scored.items()]
    return {"columns": [_SCORES[key] for key in columns], "rows": rows}


def _score(scores: Mapping[str, Any], key: str) -> str:
    value, interval = number(scores.get(key)), scores.get(f"{key}_interval")
    if value is None:
        return "-"
    form = _FORMS.get(key, text.share)
    bounds = [number(bound) for bound in interval] if isinstance(interval, list) else []
    known = [form(bound) for bound in bounds if bound is not None]
    return f"{form(value)} ({known[0]} to {known[1]})" if len(known) == 2 else form(value)


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
    """Key, value and reason of each choice of the plan; other keys with a reason come last.

    The proof has a table of its own.
    """
    choice = dict(mapping(run.plan.get("choice")))
    why = dict(mapping(choice.pop("why", {})))
    why.pop("proof", None)
    others = {**run.settings, **mapping(run.plan.get("model"))}
    setting_of = settings_by_trait("layout")
    rows = []
    for key, value in choice.items():
        name = setting_of.get(key, key)
        is_set = run.settings.get(name) not in (None, "auto")
        reason = why.pop(key, None) or why.pop(name, "set in the run file" if is_set else "")
        rows.append((key, value, str(reason)))
    return [*rows, *((key, others.get(key, ""), str(reason)) for key, reason in why.items())]


def _rules(run: RunRecords) -> list[dict[str, str]]:
    listed = run.plan.get("rules")
    rules = [mapping(rule) for rule in listed] if isinstance(listed, list) else []
    keys = ("level", "message", "id", "source")
    return [{key: text.cell(rule.get(key, "")) for key in keys} for rule in rules]


def _memory(run: RunRecords) -> Mapping[str, Any] | None:
    """Terms of the predicted memory, largest first, their peak, and the memory of the device.

    This peak is predicted for micro-batches of the longest sequences. `_predictions` has the peak
    predicted for the micro-batches that were trained.
    """
    memory = mapping(run.plan.get("memory"))
    terms = {k: size for k, v in mapping(memory.get("per_rank")).items() if (size := number(v))}
    peak = number(memory.get("peak_bytes")) or sum(terms.values())
    if not peak:
        return None
    device, in_gib = number(memory.get("device_bytes")), text.gib(peak)
    return {
        "terms": [
            (key, in_gib(size), 100 * size / max(terms.values()))
            for key, size in sorted(terms.items(), key=lambda item: -item[1])
        ],
        "peak": in_gib(peak),
        "device": None if device is None else in_gib(device),
        "fits": memory.get("fits"),
    }


def _is_default(key: str, value: Any) -> bool:
    field = RunSettings.model_fields.get(key)
    return field is not None and field.get_default(call_default_factory=True) == value
