"""Curves of the report: points thinned without losing a minimum or maximum, as data for charts.js.

A chart has series, each with its own steps. The page shows at most `MAX_POINTS` points of a series.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.report import text
from pipeline.report.folder import Points, RunRecords, mapping, number

Array = npt.NDArray[Any]
Style = Literal["line", "thin", "dots", "dashed"]

MAX_POINTS = 4000  # largest number of points of a series in a page
MIN_POINTS = 200  # points of a series if the page has so many that _PAGE_POINTS would allow fewer
_PAGE_POINTS = 160_000  # largest number of points of all series of a page: about 2.5 MB
_DIGITS = 6  # significant digits of a value in the page
_NUM_COLOURS = 8  # --c0 to --c7 in style.css


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart.

    `points`: steps and values. `style`: how charts.js draws the line. `colour`: index of a CSS
    variable.
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

    `form`: format of its values in charts.js. `is_from_zero`: whether the y axis begins at 0.
    """

    name: str
    title: str
    series: Sequence[Series]
    unit: str = ""
    form: Literal["plain", "scientific", "percent", "amount"] = "plain"
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
    """A measurement of each step that has a chart of its own; `scale`: factor to the unit."""

    key: str
    title: str
    unit: str = ""
    form: Literal["plain", "scientific", "percent", "amount"] = "plain"
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


_ANSWER_SCORES = {
    "exact_match": "exact match", "regex_match": "regex match", "valid_json": "valid JSON",
}  # fmt: skip


def charts_of(run: RunRecords) -> list[Chart]:
    """The charts of one run, the loss first. Empty if it has recorded no step."""
    quantities = filter(None, (_chart_of(run, item) for item in _QUANTITIES))
    return [*_loss_charts(run), *_answers_chart(run), *quantities]


def _answers_chart(run: RunRecords) -> list[Chart]:
    """The chart of the scores of answers at evaluations (`eval_generate`), if there are two."""
    points = {title: run.evaluated(f"eval_{key}") for key, title in _ANSWER_SCORES.items()}
    series = [
        Series(label=title, points=each, style="dots", colour=colour)
        for colour, (title, each) in enumerate(points.items())
        if len(each[0]) > 1
    ]
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
        _overlay(names, [run.held_out() for run in runs], "eval_loss", "Held-out loss", "dots"),
        _overlay(
            names,
            [_mean_of(run.measured("loss")) for run in runs],
            "loss",
            "Training loss, moving mean",
            "line",
        ),
    ]
    charts += [
        replace(
            _overlay(names, [_scaled(run, item) for run in runs], item.key, item.title, "line"),
            unit=item.unit, form=item.form, is_from_zero=True, is_wide=False,
        )
        for item in _QUANTITIES
    ]  # fmt: skip
    return [chart for chart in charts if chart.series]


def page_data(charts: Sequence[Chart], marks: Marks) -> dict[str, Any]:
    """The data block of a page. `points`: the largest number of points of a series in it."""
    num_series = sum(len(chart.series) for chart in charts)
    points = max(MIN_POINTS, min(MAX_POINTS, _PAGE_POINTS // max(1, num_series)))
    steps = [x for chart in charts for s in chart.series for x in (s.points[0][0], s.points[0][-1])]
    return {
        "points": points,
        "x": [min(steps), max(steps)] if steps else [0, 1],
        "resumed": list(marks.resumed),
        "skipped": [list(span) for span in marks.skipped],
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
    """Whether a series of a page has more steps than points."""
    return any(len(series.points[0]) > points for chart in charts for series in chart.series)


def thinned(steps: Array, values: Array, max_points: int = MAX_POINTS) -> tuple[Array, Array]:
    """At most `max_points` of the points: the minimum and maximum of each bin, and both ends.

    The bins have equal numbers of points (`bin_edges`). The values must be finite.
    """
    if len(values) <= max_points:
        return steps, values
    kept = {0, len(values) - 1}
    edges = bin_edges(len(values), max_points)
    for start, end in pairwise(edges):
        chunk = values[start:end]
        kept |= {start + int(chunk.argmin()), start + int(chunk.argmax())}
    indices = sorted(kept)
    return steps[indices], values[indices]


def bin_edges(num_points: int, max_points: int = MAX_POINTS) -> list[int]:
    """Offsets of the bins of `thinned`: two points of each bin and the two ends are kept."""
    num_bins = max(1, (max_points - 2) // 2)
    return [num_points * i // num_bins for i in range(num_bins + 1)]


def smoothed(values: Sequence[float]) -> list[float]:
    """Moving average over a centred window of `smoothing_window` values, shorter at both ends."""
    half = smoothing_window(len(values)) // 2
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return [float(mean) for mean in (sums[high] - sums[low]) / (high - low)]


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


def _chart_of(run: RunRecords, item: _Quantity) -> Chart | None:
    """The chart of a quantity.

    It may have a second series: the predicted values, or the learning rate of the B matrices.
    """
    points = _scaled(run, item)
    if not points[0]:
        return None
    label, second = _second_series(run, item, points)
    series = [Series(label="measured" if label == "predicted" else "", points=points)]
    if second[0]:
        series.append(Series(label=label, points=second, style="dashed", colour=1))
    return Chart(name=item.key, title=item.title, series=series, unit=item.unit, form=item.form)


def _second_series(run: RunRecords, item: _Quantity, points: Points) -> tuple[str, Points]:
    if item.key == "peak_bytes":
        steps, values = run.measured("predicted_bytes")
        return "predicted", (steps, [value * item.scale for value in values])
    speed = number(mapping(run.plan.get("speed")).get("tokens_per_second"))
    if item.key == "tokens_per_second" and speed is not None:
        return "predicted", ([points[0][0], points[0][-1]], [speed, speed])
    if item.key == "lr":
        return "of lora_B", run.measured("lr_lora_b")
    return "", ([], [])


def _scaled(run: RunRecords, item: _Quantity) -> Points:
    steps, values = run.measured(item.key)
    return steps, [value * item.scale for value in values]


def _overlay(
    names: Sequence[str], points: Sequence[Points], key: str, title: str, style: Style
) -> Chart:
    """A wide chart with one series of each run that has the quantity."""
    series = [
        Series(label=name, points=columns, style=style, colour=i)
        for i, (name, columns) in enumerate(zip(names, points, strict=True))
        if columns[0]
    ]
    return Chart(name=key, title=title, series=series, is_wide=True, is_from_zero=False)
