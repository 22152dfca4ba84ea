"""Tables of docs/converting.md: options of other training programs and their counterparts here.

docs/peer_options.json has the names of the options of each program: the annotated fields of its
argument classes, read on 2026-11-30 in its package. axolotl: axolotl/utils/schemas. LLaMA-Factory:
llamafactory/hparams. ms-swift: swift/arguments/base_args, sft_args.py and tuner_args.py and
swift/trainers/arguments.py. TRL: SFTConfig and its base, ModelConfig and ScriptArguments.
transformers: TrainingArguments, whose options all of them except axolotl inherit.
"""

import json
from pathlib import Path

from pipeline.config.peers import ADVICE, VALUES, advice
from pipeline.config.settings import RunSettings, settings_by_trait

_OPTIONS = Path(__file__).parent / "peer_options.json"


def with_tables(page: str) -> str:
    """The page with the tables between its markers as the code makes them now."""
    begin, end = "<!-- tables -->\n", "<!-- end of tables -->"
    before, rest = page.split(begin)
    return f"{before}{begin}{tables()}\n{end}{rest.split(end)[1]}"


def tables() -> str:
    """A section for each program, and the table of values."""
    programs = json.loads(_OPTIONS.read_text(encoding="utf-8"))
    sections = [_section(program, names.split()) for program, names in programs.items()]
    return "\n".join([*sections, _values()])


def _section(program: str, options: list[str]) -> str:
    by_name = settings_by_trait("peers")
    same = [option for option in options if option in RunSettings.model_fields]
    renamed = {option: by_name[option] for option in options if option in by_name}
    renamed = {option: name for option, name in renamed.items() if option != name}
    others: dict[str, list[str]] = {}
    for option in options:
        if option not in same and option not in renamed and (text := advice(option)):
            others.setdefault(text, []).append(option)
    order = list(ADVICE.values())
    unknown = len(options) - len(same) - len(renamed) - sum(map(len, others.values()))
    lines = [
        f"### {program}",
        "",
        "Same name here; the meaning may differ in details ([configuration.md](configuration.md)): "
        f"{_named(same)}.",
        "",
        "| option | here |",
        "|---|---|",
    ]
    by_setting = {name: [o for o in renamed if renamed[o] == name] for name in by_name.values()}
    lines += [f"| {_named(names)} | `{name}` |" for name, names in by_setting.items() if names]
    ordered = sorted(others, key=order.index)
    lines += [f"| {_named(others[text])} | {text} |" for text in ordered]
    lines += ["", f"{unknown} other options have no counterpart; `launch/convert.py` lists yours."]
    return "\n".join([*lines, ""])


def _values() -> str:
    lines = [
        "### Values with another name here", "", "| setting | value elsewhere | here |",
        "|---|---|---|",
    ]  # fmt: skip
    for setting, by_value in VALUES.items():
        for value, text in by_value.items():
            if "*" not in value:
                lines.append(f"| `{setting}` | `{value}` | {text} |")
    return "\n".join(lines)


def _named(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
