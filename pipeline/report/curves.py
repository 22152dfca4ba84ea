"""Curves of the report, as data for charts.js.

Long curves are thinned, but keep their minima and maxima.

A chart has series, each with its own steps. The page shows at most `MAX_POINTS` points of a series.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.report import text
from pipeline.report.folder import Points, RunRecords, dict_or_empty, float_or_none

Array = npt.NDArray[Any]
Style = Literal["line", "thin", "dots", "dashed"]
Format = Literal["plain", "scientific", "percent", "amount"]  # names of functions of charts.js

MAX_POINTS = 4000  # largest number of points of a series in a page
_PAGE_POINTS = 160_000  # limit for all series of a page together: about 2.5 MB
MIN_POINTS = 200  # points of a series, even if _PAGE_POINTS is then exceeded
_DIGITS = 6  # significant digits of a value in the page
_NUM_COLOURS = 8  # --c0 to --c7 in style.css


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart.

    `points`: steps and values. `style`: how charts.js draws the line. `colour`: index of the
    colour. There are 8, the CSS variables --c0 to --c7; higher indexes use them again, with dashed
    lines.
    """

    label: str
    points: Points
    style: Style = "line"
    colour: int = 0

    def as_json(self, max_points: int) -> dict[str, Any]:
        """The thinned series for charts.js."""
        steps, values = (np.asarray(column, dtype=float) for column in self.points)
        is_finite = np.isfinite(values)
        steps, values = thinned(steps[is_finite], values[is_finite], max_points)
        return {
            "label": self.label,
            "style": self.style,
            "colour": self.colour % _NUM_COLOURS,
            "is_dashed": self.colour >= _NUM_COLOURS,
            "x": [int(step) if step == int(step) else step for step in steps.tolist()],
            "y": [float(f"{value:.{_DIGITS}g}") for value in values.tolist()],
        }


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart.

    `name`: its key in metrics.jsonl or another name, unique on the page. `form`: format of the
    values. `is_wide`: whether the chart has the full width of the page. `is_from_zero`: whether the
    y axis begins at 0.
    """

    name: str
    title: str
    series: Sequence[Series]
    unit: str = ""
    form: Format = "plain"
    is_wide: bool = False
    is_from_zero: bool = True


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Steps that every chart marks.

    `resumed`: steps from which a start resumed. `skipped`: first and last step of each range of
    steps without an update.
    """

    resumed: Sequence[float] = ()
    skipped: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    """A measurement of each step that has a chart of its own.

    `key`: of metrics.jsonl. `scale`: factor that converts the recorded value to `unit`.
    """

    key: str
    title: str
    unit: str = ""
    form: Format = "plain"
    scale: float = 1.0


_QUANTITIES = (
    _Quantity(key="lr", title="Learning rate", form="scientific"),
    _Quantity(key="grad_norm", title="Gradient norm"),
    _Quantity(key="tokens_per_second", title="Throughput", unit="tokens/s", form="amount"),
    _Quantity(
        key="waiting_share", title="Waiting for data", unit="share of the step", form="percent"
    ),
    _Quantity(key="peak_bytes", title="Peak memory", unit="GiB per rank", scale=1 / text.GIB),
)


# Keys of the scores of generated answers -> labels.
_ANSWER_SCORES = {
    "exact_match": "exact match", "regex_match": "regex match", "valid_json": "valid JSON",
}  # fmt: skip


def charts_of(run: RunRecords) -> list[Chart]:
    """The charts of one run, the loss first. Empty if it has recorded no step."""
    charts = [_chart_of(run, quantity) for quantity in _QUANTITIES]
    return [*_loss_charts(run), *_answers_chart(run), *filter(None, charts)]


def _answers_chart(run: RunRecords) -> list[Chart]:
    """The chart of the scores of answers at evaluations (setting `eval_generate`).

    It has the scores of which there are at least two values; without such scores there is no chart.
    """
    series = []
    for colour, (key, label) in enumerate(_ANSWER_SCORES.items()):
        steps, values = run.evaluated(f"eval_{key}")
        if len(steps) > 1:
            points = (steps, values)
            series.append(Series(label=label, points=points, style="dots", colour=colour))
    if not series:
        return []
    return [Chart(name="answers", title="Held-out answers", series=series, form="percent")]


def held_out_chart(run: RunRecords) -> Chart | None:
    """The chart of the held-out loss alone; None unless there are two evaluations."""
    if len(run.held_out()[0]) < 2:
        return None
    series = [Series(label="", points=run.held_out(), style="dots", colour=1)]
    return Chart(
        name="held-out", title="Held-out loss", series=series, is_wide=True, is_from_zero=False
    )


def charts_of_runs(names: Sequence[str], runs: Sequence[RunRecords]) -> list[Chart]:
    """Charts with one series of each run: held-out loss, training loss, and the other curves."""
    charts = [
        Chart(
            name="eval_loss",
            title="Held-out loss",
            series=_series_of_runs(names, [run.held_out() for run in runs], style="dots"),
            is_wide=True,
            is_from_zero=False,
        ),
        Chart(
            name="loss",
            title="Training loss, moving mean",
            series=_series_of_runs(names, [_mean_of(run.measured("loss")) for run in runs]),
            is_wide=True,
            is_from_zero=False,
        ),
    ]
    charts += [
        Chart(
            name=quantity.key,
            title=quantity.title,
            series=_series_of_runs(names, [_scaled(run, quantity) for run in runs]),
            unit=quantity.unit,
            form=quantity.form,
        )
        for quantity in _QUANTITIES
    ]
    return [chart for chart in charts if chart.series]


def page_data(charts: Sequence[Chart], marks: Marks) -> dict[str, Any]:
    """The data of all charts of a page, which charts.js reads as JSON.

    `points`: limit of the points of a series. `x`: first and last step of all series.
    """
    all_series = [series for chart in charts for series in chart.series]
    points = max(MIN_POINTS, min(MAX_POINTS, _PAGE_POINTS // max(1, len(all_series))))
    first_steps = [series.points[0][0] for series in all_series]
    last_steps = [series.points[0][-1] for series in all_series]
    return {
        "points": points,
        "x": [min(first_steps), max(last_steps)] if all_series else [0, 1],
        "resumed": list(marks.resumed),
        "skipped": [list(step_range) for step_range in marks.skipped],
        "charts": [
            {
                "name": chart.name,
                "form": chart.form,
                "is_wide": chart.is_wide,
                "is_from_zero": chart.is_from_zero,
                "series": [series.as_json(points) for series in chart.series],
            }
            for chart in charts
        ],
    }


def is_thinned(charts: Sequence[Chart], points: int) -> bool:
    """Whether a series has more steps than the limit `points`."""
    return any(len(series.points[0]) > points for chart in charts for series in chart.series)


def thinned(steps: Array, values: Array, max_points: int = MAX_POINTS) -> tuple[Array, Array]:
    """At most `max_points` of the points: the minimum and maximum of each bin, and both ends.

    A bin is a range of consecutive points (`bin_edges`). The values must be finite.
    """
    if len(values) <= max_points:
        return steps, values
    kept = {0, len(values) - 1}
    edges = bin_edges(len(values), max_points)
    for start, end in pairwise(edges):
        bin_values = values[start:end]
        kept |= {start + int(bin_values.argmin()), start + int(bin_values.argmax())}
    indices = sorted(kept)
    return steps[indices], values[indices]


def bin_edges(num_points: int, max_points: int = MAX_POINTS) -> list[int]:
    """Offsets of the bins of `thinned`, whose numbers of points differ by at most one."""
    # `thinned` keeps two points of each bin, and the two ends of the curve.
    num_bins = max(1, (max_points - 2) // 2)
    return [num_points * i // num_bins for i in range(num_bins + 1)]


def smoothed(values: Sequence[float]) -> list[float]:
    """Moving average over a centred window of `smoothing_window` values, shorter at both ends."""
    half_width = smoothing_window(len(values)) // 2
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    index = np.arange(len(values))
    start = np.maximum(index - half_width, 0)
    end = np.minimum(index + half_width + 1, len(values))
    return [float(mean) for mean in (sums[end] - sums[start]) / (end - start)]


def smoothing_window(num_values: int) -> int:
    """Width of the moving average: an odd number of steps, about a fifteenth of the run."""
    return 2 * (num_values // 30) + 1


def _loss_charts(run: RunRecords) -> list[Chart]:
    """The chart of the training loss, its mean and the held-out loss."""
    losses, held_out = run.measured("loss"), run.held_out()
    window = smoothing_window(len(losses[0]))
    series = []
    if losses[0]:
        style: Style = "thin" if window > 1 else "line"
        series.append(Series(label="each step", points=losses, style=style))
    if window > 1:
        label = f"mean over {window:,} steps"
        series.append(Series(label=label, points=_mean_of(losses)))
    if held_out[0]:
        series.append(Series(label="held out", points=held_out, style="dots", colour=1))
    chart = Chart(name="loss", title="Loss", series=series, is_wide=True, is_from_zero=False)
    return [chart] if series else []


def _mean_of(losses: Points) -> Points:
    """The moving average of the finite losses."""
    finite = [(step, value) for step, value in zip(*losses, strict=True) if np.isfinite(value)]
    return [step for step, _ in finite], smoothed([value for _, value in finite])


def _chart_of(run: RunRecords, quantity: _Quantity) -> Chart | None:
    """The chart of a quantity; None if no step has it."""
    steps, values = _scaled(run, quantity)
    if not steps:
        return None
    label, other_points = _second_series(run, quantity, steps)
    first_label = "measured" if label == "predicted" else ""
    series = [Series(label=first_label, points=(steps, values))]
    if other_points[0]:
        series.append(Series(label=label, points=other_points, style="dashed", colour=1))
    return Chart(
        name=quantity.key,
        title=quantity.title,
        series=series,
        unit=quantity.unit,
        form=quantity.form,
    )


def _second_series(
    run: RunRecords, quantity: _Quantity, steps: Sequence[float]
) -> tuple[str, Points]:
    """Label and points of a second series: predicted values, or the learning rate of lora_B.

    Without a second series the points are empty. `steps`: of the first series.
    """
    if quantity.key == "peak_bytes":
        predicted_steps, values = run.measured("predicted_bytes")
        return "predicted", (predicted_steps, [value * quantity.scale for value in values])
    speed = float_or_none(dict_or_empty(run.plan.get("speed")).get("tokens_per_second"))
    if quantity.key == "tokens_per_second" and speed is not None:
        return "predicted", ([steps[0], steps[-1]], [speed, speed])
    if quantity.key == "lr":
        return "of lora_B", run.measured("lr_lora_b")
    return "", ([], [])


def _scaled(run: RunRecords, quantity: _Quantity) -> Points:
    """Steps and values of a quantity, in its unit."""
    steps, values = run.measured(quantity.key)
    return steps, [value * quantity.scale for value in values]


def _series_of_runs(
    names: Sequence[str], points_of_runs: Sequence[Points], style: Style = "line"
) -> list[Series]:
    """One series for each run that has points, in the colour of the run."""
    return [
        Series(label=name, points=points, style=style, colour=i)
        for i, (name, points) in enumerate(zip(names, points_of_runs, strict=True))
        if points[0]
    ]
