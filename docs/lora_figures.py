"""Table and figure of docs/lora.md from tests/bench/lora.jsonl, which `make bench-lora` writes."""

import json
import math
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parents[1] / "tests/bench/lora.jsonl"
_BEGIN, _END = "<!-- measured -->\n", "<!-- end of measured -->"
_LEFT, _WIDTH, _GAP, _ROW = 260, 200, 40, 26  # pixels: names, a panel, between panels, a line
_LOSSES = (0.001, 0.01, 0.1, 1.0)  # marks of the axis
_STYLE = (
    "text { font: 13px sans-serif; fill: #444 } .grid { stroke: #ddd } circle { fill: #2f6f9f; "
    "fill-opacity: 0.75 } @media (prefers-color-scheme: dark) { text { fill: #ccc } "
    ".grid { stroke: #555 } circle { fill: #6fb1e0 } }"
)


def with_tables(page: str) -> str:
    """The page with the table of all measured runs between its markers."""
    before, rest = page.split(_BEGIN)
    return f"{before}{_BEGIN}{table()}\n{_END}{rest.split(_END)[1]}"


def variants() -> dict[str, list[dict[str, Any]]]:
    """The lines of each variant; the best exact match first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()):
        name = line["variant"] + ("" if line["heldout_seed"] == 300 else " *")
        groups.setdefault(f"{name} ({line['train_rows']} rows)", []).append(line)
    return dict(sorted(groups.items(), key=lambda item: -_mean(item[1], "exact_match")))


def table() -> str:
    lines = ["| settings | seeds | steps | exact match | held-out loss |", "|---|---|---|---|---|"]
    for name, runs in variants().items():
        match = _with_range([100 * run["exact_match"] for run in runs], "{:.1f}")
        loss = _with_range([run["loss"] for run in runs], "{:.4f}")
        lines.append(f"| {name} | {len(runs)} | {runs[0]['steps']} | {match} % | {loss} |")
    return "\n".join(lines)


def figure() -> str:
    """An SVG with a dot for each run: exact match on the left, held-out loss on the right."""
    groups = variants()
    height = _ROW * (len(groups) + 2)
    bottom, second = height - _ROW, _LEFT + _WIDTH + _GAP
    parts = [_text(_LEFT, 16, "exact match, %"), _text(second, 16, "held-out loss")]
    for share in (0.0, 0.5, 1.0):
        parts += _mark(_LEFT + share * _WIDTH, bottom, f"{100 * share:.0f}")
    for loss in _LOSSES:
        parts += _mark(second + _loss_offset(loss), bottom, f"{loss:g}")
    for number, (name, runs) in enumerate(groups.items()):
        y = _ROW * (number + 1.5)
        parts.append(_text(_LEFT - 12, y + 4, name, "end"))
        for run in runs:
            parts.append(_dot(_LEFT + run["exact_match"] * _WIDTH, y))
            parts.append(_dot(second + _loss_offset(run["loss"]), y))
    width = second + _WIDTH + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img" aria-label="exact match and held-out loss of each run">\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return mean(run[key] for run in runs)


def _with_range(values: list[float], form: str) -> str:
    text = form.format(mean(values))
    ends = f"{form.format(min(values))} to {form.format(max(values))}"
    return f"{text} ({ends})" if len(values) > 1 else text


def _loss_offset(loss: float) -> float:
    low, high = math.log(_LOSSES[0]), math.log(_LOSSES[-1])
    return _WIDTH * min(1.0, max(0.0, (math.log(loss) - low) / (high - low)))


def _mark(x: float, bottom: float, label: str) -> list[str]:
    line = f'<line class="grid" x1="{x:.0f}" x2="{x:.0f}" y1="{_ROW}" y2="{bottom}"/>'
    return [line, _text(x, bottom + 18, label, "middle")]


def _dot(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.0f}" r="4.5"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'
