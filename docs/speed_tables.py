"""Tables of docs/benchmarks.md from tests/bench/speed.jsonl, the results of `make bench`.

    python docs/speed_tables.py RESULTS.jsonl

prints the tables of another file.
"""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parents[1] / "tests/bench/speed.jsonl"
_BEGIN, _END = "<!-- measured speed -->\n", "<!-- end of measured speed -->"
Line = dict[str, Any]


def with_tables(page: str) -> str:
    """The page with the tables between its markers."""
    before, rest = page.split(_BEGIN)
    text = tables(RESULTS) if RESULTS.is_file() else "No results yet."
    return f"{before}{_BEGIN}{text}\n{_END}{rest.split(_END)[1]}"


def tables(path: Path) -> str:
    """A table for each cell. Only runs of the commit of the last line count."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not lines:
        return "No results yet."
    last = lines[-1]
    lines = [line for line in lines if line["commit"] == last["commit"]]
    parts = [_conditions(lines, last)]
    parts += [
        f"**{cell}**\n\n" + _table([line for line in lines if line["cell"] == cell])
        for cell in dict.fromkeys(line["cell"] for line in lines)
    ]
    return "\n\n".join(parts)


def _conditions(lines: list[Line], last: Line) -> str:
    settings, form = last["settings"], "the quick form, " if last["quick"] else ""
    model = "the first ten layers of SmolLM2-135M" if last["quick"] else "SmolLM2-135M"
    rows = settings["batch_size"] * settings["accumulation_steps"] * last["ranks"]
    loads = [line["load"] for line in lines if "load" in line]
    load = f"{min(loads):.1f} to {max(loads):.1f}" if loads else "unknown"
    return (
        f"{last['date']}, commit {last['commit']}, {form}{last['cpu']}, {last['memory_gib']} GiB, "
        f"Python {last['python']}, {last['ranks']} ranks, {last['rows']}, {model} in bf16, "
        f"{rows} sequences a step, steps {settings['first_measured']} to {settings['max_steps']}. "
        f"Load before a run: {load}."
    )


def _table(lines: list[Line]) -> str:
    """Medians of each tool; the range in parentheses if it ran more than once."""
    tools: dict[str, list[Line]] = {}
    for line in lines:
        tools.setdefault(line["tool"], []).append(line)
    succeeded = {tool: [r for r in runs if "error" not in r] for tool, runs in tools.items()}
    peers = [
        median(run["useful_per_s"] for run in runs)
        for tool, runs in succeeded.items()
        if tool != "RankZero" and runs
    ]
    table = [
        "| tool | runs | useful tokens/s | RankZero relative to it | supervised tokens/s | padding "
        "| first step, s | wall time, s | memory, GB | share of bare products |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours = succeeded.get("RankZero")
    for tool, runs in sorted(succeeded.items(), key=_order):
        if not runs:
            table.append(f"| {tool} | 0 | failed | | | | | | | |")
            continue
        rate = median(run["useful_per_s"] for run in runs)
        ratio = median(run["useful_per_s"] for run in ours) / rate if ours else None
        shares = [r["useful_per_s"] * r["flops_per_token"] / r["bare_flops"] for r in runs]
        padding = [run["padding_share"] for run in runs if "padding_share" in run]
        cells = [
            tool,
            str(len(runs)),
            _spread([run["useful_per_s"] for run in runs], "{:.0f}"),
            "" if ratio is None or tool == "RankZero" else f"{ratio:.2f}",
            f"{median(run['supervised_per_s'] for run in runs):.0f}",
            f"{median(padding):.0%}" if padding else "",
            _spread([run["first_step_s"] for run in runs], "{:.0f}"),
            f"{median(run['wall_s'] for run in runs):.0f}",
            f"{median(run['pss_bytes'] for run in runs) / 1e9:.2f}",
            f"{median(shares):.0%}",
        ]
        table.append(f"| {' | '.join(cells)} |")
    if ours and peers:
        best = median(run["useful_per_s"] for run in ours) / max(peers)
        table += ["", f"RankZero reaches {best:.2f} times the useful tokens/s of the best other."]
    return "\n".join(table)


def _order(item: tuple[str, list[Line]]) -> float:
    _, runs = item
    return -median(run["useful_per_s"] for run in runs) if runs else 0.0


def _spread(values: list[float], form: str) -> str:
    text = form.format(median(values))
    if len(values) == 1:
        return text
    return f"{text} ({form.format(min(values))} to {form.format(max(values))})"


if __name__ == "__main__":
    print(tables(Path(sys.argv[1])))
