"""The page of `make bench-gpu`, from its results."""

from tests.bench.step_profile import KINDS

GIB = 2**30


def page(results):
    """The results as Markdown; `results` is the content of gpu.json."""
    machine, parts = results["machine"], results["parts"]
    size = " (tiny shapes: the numbers say nothing about speed)" if results["tiny"] else ""
    lines = [
        f"# {machine['device']}, {results['date']}{size}",
        "",
        "Command: `make bench-gpu`. "
        + ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
        + f", Python {machine['python']}, CUDA {machine['cuda']}.",
        "Missing: " + ", ".join(k for k, v in machine["packages"].items() if not v) + ".",
        "",
        "| run | tokens/s | steps, s | predicted tokens/s | peak, GiB | predicted peak, GiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_cell(name, part) for name, part in parts.items() if "step_seconds" in part]
    profiles = {name: part for name, part in parts.items() if KINDS.keys() <= part.keys()}
    if profiles:
        lines += ["", "| kind | " + " | ".join(profiles) + " |", "|---" * (len(profiles) + 1) + "|"]
        lines += [
            f"| {kind} | " + " | ".join(f"{part[kind]:.1%}" for part in profiles.values()) + " |"
            for kind in KINDS
        ]
    others = {
        name: part
        for name, part in parts.items()
        if "step_seconds" not in part and name not in profiles
    }
    lines += ["", *(f"- {name}: {_values(part)}" for name, part in others.items()), ""]
    return "\n".join(lines)


def _cell(name, part):
    """The row of a run in the table."""
    seconds, peak = part["step_seconds"], part["peak_bytes"]
    cells = [
        name,
        f"{part['tokens_per_second']:,.0f}",
        f"{min(seconds):.3f} to {max(seconds):.3f}",
        f"{part['predicted_tokens_per_second']:,.0f}",
        "not measured" if peak is None else f"{peak / GIB:.2f}",
        f"{part['predicted_bytes'] / GIB:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _values(part):
    """Names and values of a part, in one line."""
    values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in part.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())
