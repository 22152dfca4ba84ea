"""Table and figure of docs/long.md from tests/bench/long.jsonl, which `make bench-long` writes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "tests/bench/long.jsonl"
_BEGIN, _END = "<!-- measured lengths -->\n", "<!-- end of measured lengths -->"
_LEFT, _WIDTH, _GAP = 60, 300, 80  # pixels: labels of an axis, a panel, between panels
_TOP, _HEIGHT, _LEGEND_ROW = 40, 260, 20
_COLOURS = (("#2f6f9f", "#6fb1e0"), ("#b5521b", "#f09a5f"), ("#3d7d3a", "#86c983"),
            ("#7a4b9b", "#c19be0"), ("#8a6d00", "#d9bd4a"))  # fmt: skip
_IDLE_LOAD = 0.5  # of the system before a case
Line = dict[str, Any]


def with_tables(page: str) -> str:
    """The page with the table of all measured cases between its markers."""
    before, rest = page.split(_BEGIN)
    return f"{before}{_BEGIN}{_conditions()}\n\n{_table()}\n{_END}{rest.split(_END)[1]}"


def _lines() -> list[Line]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def _conditions() -> str:
    """When the lines were measured, and whether other programs ran."""
    lines = _lines()
    dates, loads = sorted({line["date"] for line in lines}), [line["load"] for line in lines]
    rates = [line["product_rate"] / 1e9 for line in lines]
    is_busy = max(loads) > _IDLE_LOAD
    text = (
        f"{', '.join(dates)}, 2 x86-64 cores, one thread a rank; load before a case "
        f"{min(loads):.1f} to {max(loads):.1f}; products of fp32 matrices at {min(rates):.0f} to "
        f"{max(rates):.0f} GFLOP a CPU second."
    )
    if is_busy:
        text += (
            " **Other programs ran on this machine**: CPU seconds are longer than on an idle one, "
            "by caches and memory that are shared; bytes do not depend on it."
        )
    return text


def _table() -> str:
    lines = [
        "| length | group | layout | tokens a CPU second | predicted | MiB a rank | predicted | |",
        "|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for line in _lines():
        error = line["predicted_bytes"] / line["bytes"] - 1
        lines.append(
            f"| {line['length']:,} | {line['group']} | {line['savings']} | {_speed(line):,.0f} | "
            f"{_predicted_speed(line):,.0f} | {_mib(line):.1f} | {_predicted_mib(line):.1f} | "
            f"{error:+.1%} |"
        )
    return "\n".join(lines)


def _speed(line: Line) -> float:
    return float(line["length"] / line["cpu_s"])


def _predicted_speed(line: Line) -> float:
    return float(line["length"] / line["predicted_cpu_s"])


def _mib(line: Line) -> float:
    return float(line["bytes"] / 2**20)


def _predicted_mib(line: Line) -> float:
    return float(line["predicted_bytes"] / 2**20)


def figure() -> str:
    """An SVG with two panels over the length: tokens a CPU second, and MiB a rank."""
    series: dict[str, list[Line]] = {}
    for line in _lines():
        ranks = "1 rank" if line["group"] == 1 else f"groups of {line['group']}"
        series.setdefault(f"{ranks}, {line['savings']}", []).append(line)
    second = _LEFT + _WIDTH + _GAP
    parts = _panel(_LEFT, "tokens a CPU second", series, _speed, _predicted_speed)
    parts += _panel(second, "MiB a rank", series, _mib, _predicted_mib)
    legend_top = _TOP + _HEIGHT + 56
    for number, name in enumerate(series):
        y = legend_top + number * _LEGEND_ROW
        parts.append(f'<circle class="s{number} dot" cx="{_LEFT}" cy="{y - 4}" r="4"/>')
        parts.append(_text(_LEFT + 12, y, name))
    parts.append(_text(second, legend_top, "dots and solid lines: measured"))
    parts.append(_text(second, legend_top + _LEGEND_ROW, "dashed lines: predicted"))
    width = second + _WIDTH + 20
    height = legend_top + len(series) * _LEGEND_ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'role="img" aria-label="measured and predicted speed and memory over sequence length">\n'
        f"<style>{_style(len(series))}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(
    left: float,
    title: str,
    series: dict[str, list[Line]],
    measured: Callable[[Line], float],
    predicted: Callable[[Line], float],
) -> list[str]:
    """Axes with logarithmic scales, and two curves for each series."""
    lines = [line for of_series in series.values() for line in of_series]
    lengths = sorted({line["length"] for line in lines})
    values = [value(line) for line in lines for value in (measured, predicted)]
    low, high = 2 ** math.floor(math.log2(min(values))), 2 ** math.ceil(math.log2(max(values)))

    def point(length: float, value: float) -> tuple[float, float]:
        across = math.log(length / lengths[0]) / math.log(lengths[-1] / lengths[0])
        up = math.log(value / low) / math.log(high / low)
        return left + across * _WIDTH, _TOP + (1 - up) * _HEIGHT

    parts = [_text(left, 20, title)]
    for length in lengths:
        x, bottom = point(length, low)
        parts.append(_grid(x, x, _TOP, bottom))
        parts.append(_text(x, bottom + 18, f"{length // 1024}k", "middle"))
    parts.append(_text(left + _WIDTH / 2, _TOP + _HEIGHT + 34, "tokens of a sequence", "middle"))
    mark = low
    while mark <= high:
        x, y = point(lengths[0], mark)
        parts.append(_grid(x, x + _WIDTH, y, y))
        parts.append(_text(x - 8, y + 4, f"{mark:,g}", "end"))
        mark *= 2
    for number, of_series in enumerate(series.values()):
        for kind, value in (("solid", measured), ("dashed", predicted)):
            points = [point(line["length"], value(line)) for line in of_series]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline class="s{number} {kind}" points="{path}"/>')
            if kind == "solid":
                parts += [
                    f'<circle class="s{number} dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
                    for x, y in points
                ]
    return parts


def _style(num_series: int) -> str:
    def colours(index: int) -> str:
        return " ".join(
            f".s{number} {{ stroke: {_COLOURS[number][index]} }} "
            f".s{number}.dot {{ fill: {_COLOURS[number][index]} }}"
            for number in range(num_series)
        )

    return (
        "text { font: 13px sans-serif; fill: #444 } .grid { stroke: #ddd } "
        "polyline { fill: none; stroke-width: 1.5 } .dashed { stroke-dasharray: 5 4 } "
        f"{colours(0)} @media (prefers-color-scheme: dark) {{ text {{ fill: #ccc }} "
        f".grid {{ stroke: #555 }} {colours(1)} }}"
    )


def _grid(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>'
