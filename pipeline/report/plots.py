"""Line plots as inline SVG for an HTML page.

The ids in a plot start with its name, because several plots share the page. Text uses the page's
font. Colours are CSS variables (`--curve`, `--second`, `--text`, `--line`); the fallback values are
for a light background.
"""

import io
import math
import re
from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Points = tuple[Sequence[float], Sequence[float]]
Size = tuple[int, int]

WIDE: Size = (1080, 290)
SMALL: Size = (280, 165)
NARROW: Size = (350, 230)  # replaces WIDE on a small screen

_CURVE, _SECOND, _TEXT, _LINE = "#2a66c8", "#c4551a", "#62666f", "#e2e3e7"
_CSS_COLOURS = {_CURVE: "--curve", _SECOND: "--second", _TEXT: "--text", _LINE: "--line"}
_MAX_POINTS = 1000
_MAX_LABELS = 8
_TICK_STEPS = [1, 2, 2.5, 5, 10]


def loss_curve(name: str, training: Points, held_out: Points, *, size: Size = WIDE) -> str:
    """Plot the training loss (thin), its moving average (thick) and the held-out loss (dots)."""
    figure, axes = _axes(size)
    steps, losses = _finite(training)
    axes.plot(*_thinned(steps, losses), color=_CURVE, linewidth=0.8, alpha=0.4)
    smooth_steps, smooth = _thinned(steps, smoothed(losses))
    axes.plot(smooth_steps, smooth, color=_CURVE, linewidth=1.8)
    eval_steps, values = _finite(held_out)
    axes.plot(eval_steps, values, color=_SECOND, linewidth=1, linestyle=(0, (1, 2)))
    axes.plot(eval_steps, values, color=_SECOND, linestyle="none", marker="o", markersize=5.5)
    if len(eval_steps) <= _MAX_LABELS:
        for x, y in zip(eval_steps, values, strict=True):
            axes.annotate(
                f"{y:.3g}",
                (x, y),
                (0, 7),
                textcoords="offset points",
                ha="center",
                color=_SECOND,
                fontsize=11,
            )
    return _svg(figure, name, "Training loss and held-out loss by step")


def line_curve(
    name: str,
    points: Points,
    label: str,
    *,
    tick: Callable[[float], str] = "{:g}".format,
    size: Size = SMALL,
) -> str:
    """Plot a value against the step. The y axis starts at 0, and `tick` formats its labels."""
    figure, axes = _axes(size)
    axes.plot(*_thinned(*_finite(points)), color=_CURVE, linewidth=1.3)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=_TICK_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.set_ylim(bottom=0, top=1.1 * max([*_finite(points)[1], 1e-12]))
    return _svg(figure, name, label)


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


def _finite(points: Points) -> tuple[list[float], list[float]]:
    kept = [(x, y) for x, y in zip(*points, strict=True) if math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Reduce a curve to about `_MAX_POINTS` points: the minimum and maximum of each bin."""
    width = math.ceil(2 * len(xs) / _MAX_POINTS)
    if width < 3:
        return list(xs), list(ys)
    kept: list[int] = []
    for start in range(0, len(xs), width):
        indices = range(start, min(start + width, len(xs)))
        ends = {min(indices, key=ys.__getitem__), max(indices, key=ys.__getitem__)}
        kept += sorted(ends)
    return [xs[i] for i in kept], [ys[i] for i in kept]


def _axes(size: Size) -> tuple[Figure, Axes]:
    width, height = size
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # one viewBox unit is a point
    figure.patch.set_visible(False)
    axes = figure.add_axes((46 / width, 24 / height, 1 - 56 / width, 1 - 38 / height))
    axes.patch.set_visible(False)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6, colors=_TEXT, labelsize=11)
    axes.margins(x=0.02, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(max(4, width // 90), integer=True, steps=_TICK_STEPS))
    return figure, axes


def _svg(figure: Figure, name: str, label: str) -> str:
    buffer = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    text = buffer.getvalue()
    text = re.sub(r"(?s)^.*?<svg[^>]*>|<style.*?</style>|<!--.*?-->", "", text)
    text = re.sub(r' d="([^"]*)"', lambda match: f' d="{_round_coordinates(match[1])}"', text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", text)
    text = re.sub(r" ?font-family: [^;\"]+;?", "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(
        r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text
    )
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for colour, variable in _CSS_COLOURS.items():
        text = text.replace(colour, f"var({variable}, {colour})")
    text = re.sub(r"\s*\n\s*", "\n", text).strip()
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" '
        f'stroke-linejoin="round" stroke-linecap="butt">{text}'
    )


def _round_coordinates(path: str) -> str:
    """Cut the coordinates of an SVG path to two decimals, to shorten the page."""
    return re.sub(r"(\.\d\d)\d+", r"\1", " ".join(path.split()))
