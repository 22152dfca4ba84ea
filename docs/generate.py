"""Generate pages of docs/, the plan in the README and the JSON schema of run files.

With `--check`, only compare the files with the generated texts.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import long_figures
import long_tables
import lora_figures
import peer_tables
import speed_tables
from model_tables import models
from run_files import planned_run_files, with_prediction
from scale_tables import with_tables

from pipeline.config.presets import PRESETS, RANGES
from pipeline.config.schema import run_file_schema
from pipeline.config.settings import RunSettings, condition_text
from pipeline.config.traits import Change
from pipeline.files import dump_json
from pipeline.plan.rules.table import RULES

HERE = Path(__file__).parent
ROOT = HERE.parent
_CHANGES: dict[Change, str] = {
    "result": "changes the trained adapter; the start is refused unless `overwrite: true`",
    "documents": "changes the training documents; the start is refused unless "
    "`accept_changes: [data]`",
    "files": "like `documents`, if the content of the files differs; their names do not matter",
    "base": "changes the base model; the start is refused unless `accept_changes: [base]`",
    "total_steps": "changes the learning rate schedule; the start is refused unless "
    "`accept_changes: [total_steps]`",
    "selection": "like `result` with `keep_best` or `early_stopping_patience`, else like `run`",
    "run": "changes only how the run is executed, monitored or saved; the run resumes",
}
# Lines of a plan, by their first word, that the README shows.
_PLAN_LINES = (
    "model", "run", "zero_stage", "checkpointed_layers", "memory", "steps", "speed",
)  # fmt: skip
_SOURCES = {
    "DeepSpeed": "https://github.com/deepspeedai/DeepSpeed/blob/v{}/deepspeed",
    "transformers": "https://github.com/huggingface/transformers/blob/v{}/src/transformers",
    "bitsandbytes": "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/{}/bitsandbytes",
}


def configuration() -> str:
    schema = RunSettings.model_json_schema()
    lines = [
        "# Settings of a run file",
        "",
        "This page lists every setting of a run file, with its values, default and effect. `make "
        "docs` generates it from the code.",
        "",
        "A run file is a flat YAML mapping. Any setting can also be given as `key=value` on the "
        "command line.",
        "Precedence: defaults < presets < run file < command line.",
        "`launch/runs` has example run files and their JSON schema, which `launch/plan.py "
        "--schema` prints. If the first line of a run file is `# yaml-language-server: "
        "$schema=schema.json`, editors complete and check its keys.",
        "In a path, a leading `~`, `$NAME` and `${NAME}` are expanded, and `$$` stands for a "
        "dollar sign. The run folder's run.yaml keeps the text as written.",
        "",
        "The environment variable `RANKZERO_CACHE` names the cache folder (default "
        "`~/.cache/rankzero`). Later runs of the same user reuse its content: the hashes of base "
        "models and, for a model class that RankZero does not list itself, the sizes of its layers "
        "and whether it passed the checks that it is trained correctly.",
        "",
        "The column `change` says what a changed value does when the run in `output_dir` is "
        "started again:",
        "",
        *(f"- `{change}`: {meaning}" for change, meaning in _CHANGES.items()),
        "",
        "| setting | values | default | change | what it does |",
        "|---|---|---|---|---|",
    ]
    required = set(schema["required"])
    for name, described in schema["properties"].items():
        field = RunSettings.model_fields[name]
        default = (
            "required"
            if name in required
            else f"`{_json(field.get_default(call_default_factory=True))}`"
        )
        change = described.get("change", "result")
        effect = "; ".join(map(condition_text, described.get("needs", ())))
        text = described["description"] + (f" {effect[0].upper()}{effect[1:]}." if effect else "")
        cells = [f"`{name}`", _values(described), default, change, text]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Presets", "", "| preset | sets | usual range |", "|---|---|---|"]
    for name, values in PRESETS.items():
        sets = ", ".join(f"`{key}: {_json(value)}`" for key, value in values.items())
        spans = RANGES.get(name, {}).items()
        ranges = ", ".join(f"{key} {low}-{high}" for key, (low, high) in spans)
        lines.append(f"| `{name}` | {sets} | {ranges} |")
    return "\n".join(lines) + "\n"


def rules() -> str:
    lines = [
        "# Rules",
        "",
        "This page lists the known problems that every plan and every start of a run checks. Look "
        "up a rule here by the id in its message. `make docs` generates the page from the code.",
        "",
        "A rule of level `refuse` ends the run with exit code 2 before anything is loaded. Rules "
        "of level `warn` and `advise` are shown with the plan.",
        "A user's own DeepSpeed JSON (`deepspeed_json`) is first merged into the generated config; "
        "then the same rules check the result. Keys that DeepSpeed does not read are refused "
        "before the merge.",
        "A rule without versions holds for every version that the project supports. Some messages "
        "end the reason with a colon and the keys or values of the run that it concerns.",
        "",
        "| rule | level | why | what to do | versions | source |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.id}` | {r.level} | {r.reason} | {r.remedy} | {_code(r.versions)} | "
        f"{_linked(r.source)} |"
        for r in RULES
    ]
    return "\n".join(lines) + "\n"


def _values(described: dict) -> str:
    options = described.get("anyOf", [described])
    return " or ".join(dict.fromkeys(_value(option) for option in options))


def _value(option: dict) -> str:
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    if "const" in option:
        return f"`{option['const']}`"
    if option.get("$ref") == "#/$defs/DataSource":
        return "`{path, weight, limit}`"
    kind = {
        "integer": "whole number", "number": "number", "string": "text", "boolean": "true, false",
        "array": "list", "null": "`null`",
        "object": "mapping",
    }[option["type"]]  # fmt: skip
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    beyond_any_use = 1e6  # such a maximum only catches slips
    bounds = [
        f"{sign} {option[key]:g}"
        for key, sign in signs.items()
        if key in option and not (key == "maximum" and option[key] >= beyond_any_use)
    ]
    return f"{kind} {' and '.join(bounds)}".rstrip()


def _linked(source: str) -> str:
    """A file and line of a library as a link to it at that version."""

    def link(match: re.Match[str]) -> str:
        library, version, path, line = match.groups()
        place = f"#L{line}" if line else ""
        return f"[{match[0]}]({_SOURCES[library].format(version)}/{path}{place})"

    return re.sub(rf"({'|'.join(_SOURCES)}) ([\d.]+) ([\w/]+\.py)(?::(\d+))?", link, source)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _json(value: object) -> str:
    return json.dumps(value)


def readme(text: str) -> str:
    """The README with the output of its plan command, shortened to the lines of `_PLAN_LINES`."""
    command = re.search(r"^\$ python (launch/plan\.py .*)\n", text, re.MULTILINE)
    assert command is not None, "README.md has no plan"
    plan = subprocess.run(
        [sys.executable, *command[1].split()],
        cwd=ROOT,
        # a cached model of this name would be read instead of the sizes that ship
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(ROOT / "no-cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert plan.returncode == 0, plan.stderr
    shown = [line for line in plan.stdout.splitlines() if line.split()[0] in _PLAN_LINES]
    end = text.index("```", command.end())
    return text[: command.end()] + "\n".join(shown) + "\n" + text[end:]


def main() -> None:
    pages = {
        HERE / "configuration.md": configuration(),
        HERE / "rules.md": rules(),
        HERE / "models.md": models(),
        ROOT / "launch/runs/schema.json": dump_json(run_file_schema()),
        HERE / "converting.md": peer_tables.with_tables(
            (HERE / "converting.md").read_text(encoding="utf-8")
        ),
        HERE / "long.md": long_figures.with_tables(
            long_tables.with_tables((HERE / "long.md").read_text(encoding="utf-8"))
        ),
        HERE / "images/long.svg": long_figures.figure(),
        HERE / "lora.md": lora_figures.with_tables((HERE / "lora.md").read_text(encoding="utf-8")),
        HERE / "benchmarks.md": speed_tables.with_tables(
            (HERE / "benchmarks.md").read_text(encoding="utf-8")
        ),
        HERE / "images/lora.svg": lora_figures.figure(),
        HERE / "scale.md": with_tables((HERE / "scale.md").read_text(encoding="utf-8")),
        **{path: with_prediction(path) for path in planned_run_files()},
        ROOT / "README.md": readme((ROOT / "README.md").read_text(encoding="utf-8")),
    }
    stale = []
    for path, text in pages.items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)}: not what the code says; run `make docs`")


if __name__ == "__main__":
    main()
