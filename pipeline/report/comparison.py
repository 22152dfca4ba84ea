"""Write comparison.html, a page that compares runs, such as those of a sweep."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.errors import UserError
from pipeline.report import text
from pipeline.report.curves import Marks, charts_of_runs, is_thinned, page_data
from pipeline.report.folder import RunRecords, dict_or_empty, float_or_none, read_run_folder
from pipeline.report.frame import render, write_page

# Settings that are not compared, because they differ between any two runs.
_SETTINGS_OF_ONE_RUN = ("output_dir", "run_name")
# Settings that must be the same for held-out losses to be comparable.
_LOSS_SETTINGS = (
    "eval_data", "model", "train_on", "chat_template", "max_length", "over_length", "columns",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run in the table of results.

    `colour`: index of the run's colour in the charts. `loss`: held-out loss, by which the table is
    sorted; infinite if the run has none. `cells`: texts in the order of COLUMNS.
    """

    name: str
    colour: int
    state: str
    loss: float
    cells: list[str]


COLUMNS = (
    "held-out loss", "at step", "exact match", "training loss", "steps", "tokens/s", "peak GiB",
    "time in steps",
)  # fmt: skip


def write_comparison(run_folders: Sequence[Path]) -> Path:
    """Write comparison.html into the folder that contains all runs, and return its path.

    Raises UserError if a folder is not a run folder or is named twice.
    """
    resolved = [folder.resolve() for folder in run_folders]
    for folder, resolved_folder in zip(reversed(run_folders), reversed(resolved), strict=True):
        if resolved.count(resolved_folder) > 1:
            raise UserError(f"{folder} is named twice; name each run once")
    runs = [read_run_folder(folder) for folder in run_folders]
    parent = Path(os.path.commonpath([folder.parent for folder in resolved]))
    names = [str(folder.relative_to(parent)) for folder in resolved]
    return write_page(parent / "comparison.html", _render(names, runs))


def _render(names: Sequence[str], runs: Sequence[RunRecords]) -> str:
    charts = charts_of_runs(names, runs)
    curves = page_data(charts, Marks())
    rows = [_row(name, i, run) for i, (name, run) in enumerate(zip(names, runs, strict=True))]
    different = differing_settings(runs)
    return render(
        "comparison.html.jinja",
        curves,
        names=names,
        charts=charts,
        points=curves["points"],
        is_thinned=is_thinned(charts, curves["points"]),
        columns=COLUMNS,
        rows=sorted(rows, key=lambda row: row.loss),
        different=different,
        incomparable=[key for key in _LOSS_SETTINGS if key in different],
        problems=[
            (name, problem)
            for name, run in zip(names, runs, strict=True)
            for problem in _problems(run)
        ],
    )


def differing_settings(runs: Sequence[RunRecords]) -> dict[str, list[str]]:
    """Key -> value in each run, for settings and versions that are not the same in all runs.

    The settings that the plan chose, and the hardware, have keys `plan: NAME`. Package versions
    have keys `version: PACKAGE`.
    """
    tables = [{**_plan_values(run), **run.settings} for run in runs]
    keys = dict.fromkeys(
        key for table in tables for key in table if key not in _SETTINGS_OF_ONE_RUN
    )
    different = {}
    for key in sorted(keys):
        values = [text.cell(table[key]) if key in table else "-" for table in tables]
        if len(set(values)) > 1:
            different[key] = values
    return different


def _plan_values(run: RunRecords) -> dict[str, Any]:
    """Choices and hardware of a plan, and package versions, under keys that no setting has."""
    choice = dict(dict_or_empty(run.plan.get("choice")))
    choice.pop("why", None)  # the reasons
    hardware = dict_or_empty(run.plan.get("hardware"))
    values = {f"plan: {name}": value for name, value in {**choice, **hardware}.items()}
    return values | {f"version: {name}": value for name, value in run.versions.items()}


def _row(name: str, colour: int, run: RunRecords) -> Row:
    loss, step = published_loss(run)
    adapter = dict_or_empty(dict_or_empty(run.score.get("models")).get("adapter"))
    losses, speeds = run.measured("loss")[1], run.measured("tokens_per_second")[1]
    peak_bytes = max(run.measured("peak_bytes")[1], default=None)
    last_step = float_or_none(run.status.get("step"))
    total_steps = float_or_none(run.status.get("total_steps"))
    steps = text.or_dash(last_step, "{:,.0f}".format)
    if total_steps is not None:
        steps += f" of {total_steps:,.0f}"
    return Row(
        name=name,
        colour=colour,
        state=run.state,
        loss=math.inf if loss is None or math.isnan(loss) else loss,
        cells=[
            text.or_dash(loss, "{:.4f}".format),
            text.or_dash(step, "{:,.0f}".format),
            text.or_dash(float_or_none(adapter.get("exact_match")), text.share),
            text.or_dash(losses[-1] if losses else None, text.loss),
            steps,
            text.or_dash(median(speeds) if speeds else None, "{:,.0f}".format),
            text.or_dash(peak_bytes, lambda size: f"{size / text.GIB:.2f}"),
            text.or_dash(sum(run.measured("step_seconds")[1]) or None, text.duration),
        ],
    )


def published_loss(run: RunRecords) -> tuple[float | None, float | None]:
    """Held-out loss and step of the adapter that the run exported, or would export now.

    With `keep_best` this is the lowest loss, otherwise the last loss. If the run had no
    evaluations, the loss is that of score.json, where no step is recorded.
    """
    points = list(zip(*run.held_out(), strict=True))
    if not points:
        return float_or_none(
            dict_or_empty(dict_or_empty(run.score.get("models")).get("adapter")).get("loss")
        ), None
    finite = [point for point in points if math.isfinite(point[1])]
    if run.settings.get("keep_best") and finite:
        step, loss = min(finite, key=lambda point: point[1])
    else:
        step, loss = points[-1]
    return loss, step


def _problems(run: RunRecords) -> list[str]:
    """Problems with the files that the table of settings needs."""
    return [problem for file, problem in run.problems.items() if file in ("run.yaml", "plan.json")]
