"""Write report.html, a page about a run, to the run folder. The page loads no other files."""

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
from pipeline.report.folder import RunRecords, dict_or_empty, float_or_none, read_run_folder
from pipeline.report.frame import render, write_page
from pipeline.report.headline import MODELS, method, model_name, tiles
from pipeline.report.reproduce import reproduction_of
from pipeline.report.timeline import timeline_of

_TOLERANCE = 0.10  # relative error of a predicted memory; the page marks larger errors
# Keys of the scores in score.json -> headings.
_SCORES = {
    "exact_match": "exact match", "regex_match": "regex match", "valid_json": "valid JSON",
    "loss": "held-out loss", "perplexity": "perplexity",
}  # fmt: skip
_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": "{:.4f}".format, "perplexity": "{:.4g}".format,
}  # fmt: skip
# Keys of the plan's `proof` (results of the checks of the model's class), which has lists of
# reasons -> text of the page for their consequence.
_CONSEQUENCES = {
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
    speed = dict_or_empty(run.plan.get("speed"))
    peak, expected = (
        max(run.measured(key)[1], default=None) for key in ("peak_bytes", "predicted_bytes")
    )
    rows = []
    if peak and expected:
        in_gib = text.gib(max(peak, expected))
        row = _prediction("peak memory", expected, peak, lambda size: f"{in_gib(size)} GiB")
        rows.append(replace(row, is_off=abs(expected / peak - 1) > _TOLERANCE))
    for name, plan_key, metrics_key, number_format in (
        ("time of a step", "seconds_per_step", "step_seconds", "{:.3g} s"),
        ("throughput", "tokens_per_second", "tokens_per_second", "{:,.0f} tokens/s"),
    ):
        predicted, values = float_or_none(speed.get(plan_key)), run.measured(metrics_key)[1]
        if predicted and values and (measured := median(values)):
            rows.append(_prediction(name, predicted, measured, number_format.format))
    return rows


def _prediction(
    name: str, predicted: float, measured: float, as_text: Callable[[float], str]
) -> Prediction:
    """The row of a predicted and a measured value, with their difference in words."""
    error = predicted / measured - 1
    if predicted >= 2 * measured:
        difference = f"{predicted / measured:.2g} times as large"
    else:
        difference = f"{text.share(abs(error))} {'below' if error < 0 else 'above'}"
    return Prediction(
        name=name,
        predicted=as_text(predicted),
        measured=as_text(measured),
        difference=difference,
    )


def _merge_error(run: RunRecords) -> str:
    """Sentence about the effect of the merge on loss and answers.

    Empty if adapter and merged model were not both scored.
    """
    models = dict_or_empty(run.score.get("models"))
    adapter_loss = float_or_none(dict_or_empty(models.get("adapter")).get("loss"))
    merged_loss = float_or_none(dict_or_empty(models.get("merged")).get("loss"))
    if adapter_loss is None or merged_loss is None:
        return ""
    sign = "+" if merged_loss >= adapter_loss else ""
    change = f"{sign}{merged_loss - adapter_loss:.2g}"
    if adapter_loss > 0:
        change += f" ({text.share(merged_loss / adapter_loss - 1)})"
    entries = run.score.get("answers")
    answers = [dict_or_empty(entry) for entry in entries] if isinstance(entries, list) else []
    num_changed = sum(answer.get("adapter") != answer.get("merged") for answer in answers)
    if answers:
        change += f", and {num_changed:,} of {len(answers):,} answers"
    return f"Merge error: merging changed the held-out loss by {change}."


def _proof(run: RunRecords) -> Mapping[str, Any] | None:
    """Results of the checks of the model's class; None if the plan has none.

    `errors`: name of a check, its relative error, and whether it is within `limit`. `reasons`:
    pairs of a consequence and its reason.
    """
    proof = dict_or_empty(run.plan.get("proof"))
    errors = []
    for name, value in dict_or_empty(proof.get("errors")).items():
        if (error := float_or_none(value)) is not None:
            errors.append((name, error, error <= LIMIT))  # False for NaN
    reasons = [
        (consequence, str(reason))
        for key, consequence in _CONSEQUENCES.items()
        for reason in (proof[key] if isinstance(proof.get(key), list) else [])
    ]
    return {"errors": errors, "reasons": reasons, "limit": LIMIT} if errors or reasons else None


def _scores(run: RunRecords) -> Mapping[str, Any]:
    """Columns and rows of the table of scores: each value with its 95 % interval."""
    models = dict_or_empty(run.score.get("models"))
    scores = {name: dict_or_empty(values) for name, values in models.items()}
    columns = [key for key in _SCORES if any(key in values for values in scores.values())]
    rows = [
        (name, *(_score_text(values, key) for key in columns)) for name, values in scores.items()
    ]
    return {"columns": [_SCORES[key] for key in columns], "rows": rows}


def _score_text(scores: Mapping[str, Any], key: str) -> str:
    """A score of a model with its interval, if it is known."""
    value, interval = float_or_none(scores.get(key)), scores.get(f"{key}_interval")
    if value is None:
        return "-"
    as_text = _FORMATS.get(key, text.share)
    bounds = [float_or_none(bound) for bound in interval] if isinstance(interval, list) else []
    known = [as_text(bound) for bound in bounds if bound is not None]
    return f"{as_text(value)} ({known[0]} to {known[1]})" if len(known) == 2 else as_text(value)


def _answers(run: RunRecords) -> Iterator[Mapping[str, Any]]:
    """Prompt and expected answer of each scored row, and the answers of the models.

    `replies`: for each model its name, its answer, and whether the answer is the expected one.
    """
    answers = run.score.get("answers")
    for entry in answers if isinstance(answers, list) else []:
        row = dict_or_empty(entry)
        expected = text.cell(row.get("expected", ""))
        replies = []
        for name in MODELS:
            if row.get(name) is not None:
                answer = text.cell(row[name])
                replies.append((name, answer, answer.strip() == expected.strip()))
        yield {
            "prompt": text.cell(row.get("prompt", "")),
            "expected": expected,
            "replies": replies,
        }


def _choices(run: RunRecords) -> list[tuple[str, Any, str]]:
    """Key, value and reason of each choice of the plan; other keys with a reason come last."""
    choice = dict(dict_or_empty(run.plan.get("choice")))
    reasons = dict(dict_or_empty(choice.pop("why", {})))
    reasons.pop("proof", None)  # the checks of the model's class have a table of their own
    # The plan and the settings may name the same value differently: micro_batch_size, batch_size.
    setting_names = settings_by_trait("layout")
    rows = []
    for key, value in choice.items():
        setting = setting_names.get(key, key)
        is_set = run.settings.get(setting) not in (None, "auto")
        default_reason = "set in the run file" if is_set else ""
        reason = reasons.pop(key, None) or reasons.pop(setting, default_reason)
        rows.append((key, value, str(reason)))
    other_values = {**run.settings, **dict_or_empty(run.plan.get("model"))}
    for key, reason in reasons.items():
        rows.append((key, other_values.get(key, ""), str(reason)))
    return rows


def _rules(run: RunRecords) -> list[dict[str, str]]:
    """The known problems and advice (rules) that apply to the plan."""
    listed = run.plan.get("rules")
    rules = [dict_or_empty(rule) for rule in listed] if isinstance(listed, list) else []
    keys = ("level", "message", "id", "source")
    return [{key: text.cell(rule.get(key, "")) for key in keys} for rule in rules]


def _memory(run: RunRecords) -> Mapping[str, Any] | None:
    """Terms of the predicted memory, largest first, their peak, and the memory of the device.

    Each term has its name, its GiB, and the width of its bar in percent. This peak is predicted for
    micro-batches of the longest sequences. `_predictions` has the peak predicted for the
    micro-batches that were trained.
    """
    memory = dict_or_empty(run.plan.get("memory"))
    terms = {}
    for name, value in dict_or_empty(memory.get("per_rank")).items():
        if size := float_or_none(value):
            terms[name] = size
    peak = float_or_none(memory.get("peak_bytes")) or sum(terms.values())
    if not peak:
        return None
    device, in_gib = float_or_none(memory.get("device_bytes")), text.gib(peak)
    return {
        "terms": [
            (name, in_gib(size), 100 * size / max(terms.values()))
            for name, size in sorted(terms.items(), key=lambda item: -item[1])
        ],
        "peak": in_gib(peak),
        "device": None if device is None else in_gib(device),
        "fits": memory.get("fits"),
    }


def _is_default(key: str, value: Any) -> bool:
    """Whether a setting has its default value."""
    field = RunSettings.model_fields.get(key)
    return field is not None and field.get_default(call_default_factory=True) == value
