"""Read the configuration of another training program as one flat mapping of options.

Supported are YAML files, JSON files, and shell scripts, in which the command with the most options
is read.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config.located import parse_value, read_located
from pipeline.config.peers import normalised
from pipeline.errors import UserError

Program = Literal["axolotl", "LLaMA-Factory", "ms-swift", "torchtune", "TRL"]

# Program -> options that only this program has. A configuration without any of them is taken for
# one of TRL, whose options all exist in other programs too.
_TYPICAL_OPTIONS: Mapping[Program, frozenset[str]] = {
    "axolotl": frozenset({"base_model", "sequence_len", "micro_batch_size", "val_set_size"}),
    "LLaMA-Factory": frozenset({"finetuning_type", "cutoff_len", "dataset_dir", "stage"}),
    "ms-swift": frozenset({"train_type", "tuner_type", "split_dataset_ratio", "model_id_or_path"}),
}
# Nested option of torchtune -> flat option with the same meaning.
_TORCHTUNE_OPTIONS = {
    "checkpointer.checkpoint_dir": "model_name_or_path",
    "checkpointer.output_dir": "output_dir",
    "tokenizer.max_seq_len": "max_seq_len",
    "model.lora_rank": "lora_rank",
    "model.lora_alpha": "lora_alpha",
    "model.lora_dropout": "lora_dropout",
    "model.lora_attn_modules": "lora_attn_modules",
    "model.apply_lora_to_mlp": "apply_lora_to_mlp",
    "model.apply_lora_to_output": "apply_lora_to_output",
    "model.use_dora": "use_dora",
    "model.quantize_base": "load_in_4bit",
    "optimizer.lr": "lr",
    "optimizer.weight_decay": "weight_decay",
    "optimizer._component_": "optimizer",
    "run_val_every_n_steps": "eval_steps",
    "lr_scheduler.num_warmup_steps": "warmup_steps",
    "lr_scheduler._component_": "lr_scheduler",
    "dataset.packed": "packing",
    "dataset.train_on_input": "train_on_inputs",
    "metric_logger._component_": "metric_logger",
    "metric_logger.project": "wandb_project",
}
_TORCHTUNE_DATA_SETS = {  # defaults of torchtune 0.6.1
    "alpaca_dataset": "tatsu-lab/alpaca",
    "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "grammar_dataset": "liweili/c4_200m",
    "samsum_dataset": "Samsung/samsum",
    "slimorca_dataset": "Open-Orca/SlimOrca-Dedup",
}
# Nested options of torchtune that are left out: `_torchtune_sources` reads those of the data set,
# and the others name a class that follows from the model.
_TORCHTUNE_SOURCE_KEYS = (
    "data_files", "split", "column_map", "conversation_column", "conversation_style",
)  # fmt: skip
_TORCHTUNE_SKIPPED = (
    *("dataset.source", "dataset._component_", "dataset.column_map.instruction"),
    *("dataset.column_map.input", "dataset.column_map.output"),
    *(f"dataset.{key}" for key in _TORCHTUNE_SOURCE_KEYS),
    *("model._component_", "tokenizer._component_", "checkpointer._component_"),
)
# Sections of files of other programs whose options count as options of the file.
_SECTIONS = {
    "lora_config", "peft_config", "training_arguments", "training_args", "sft_config", "bnb_config",
    "bnb_config_kwargs", "quantization_config", "model_args", "data_args", "dataset_mixture",
}  # fmt: skip
_ASSIGNMENT = re.compile(r"(?:export )?([A-Za-z_]\w*)=(.*)")  # shell: NAME=VALUE
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")  # shell: $NAME or ${NAME}
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\}")  # torchtune: ${output_dir}, another option's value


@dataclass(frozen=True)
class PeerConfig:
    """The options of another program's configuration.

    `options`: name, such as `learning_rate`, -> value.
    """

    path: Path
    program: Program
    options: Mapping[str, Any]


def read_peer_config(path: Path) -> PeerConfig:
    """Read a configuration and detect its program. Raises UserError if it has no options."""
    if path.suffix in (".sh", ".bash", ".sbatch", ".slurm"):
        command = _training_command(path)
        options = _command_options(command, path)
        first_words = command[:2]  # such as `swift sft` or `python swift/cli/sft.py`
        has_program_name = any(Path(word).name in ("swift", "sft.py") for word in first_words)
        is_swift = has_program_name and "swift" in " ".join(first_words)
    else:
        kind: Literal["YAML", "JSON"] = "JSON" if path.suffix == ".json" else "YAML"
        options, is_swift = read_located(path, kind).values, False
    if any(isinstance(value, dict) and "_component_" in value for value in options.values()):
        return PeerConfig(path, "torchtune", _flat_torchtune_options(options))
    options = {normalised(name): value for name, value in _without_sections(options).items()}
    if is_swift:
        return PeerConfig(path, "ms-swift", options)
    num_typical = {
        name: len(typical & options.keys()) for name, typical in _TYPICAL_OPTIONS.items()
    }
    best_match = max(num_typical, key=lambda name: num_typical[name])
    return PeerConfig(path, best_match if num_typical[best_match] else "TRL", options)


def _without_sections(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with those of a section of the file in place of the section."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        is_section = name in _SECTIONS and isinstance(value, dict)
        for key, item in value.items() if is_section else [(name, value)]:
            flat.setdefault(key, item)
    return flat


def _flat_torchtune_options(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a torchtune file under flat names such as `lora_rank`.

    An option without a flat name keeps its dotted name, such as `optimizer.fused`.
    """
    options: dict[str, Any] = {}
    for name, value in nested.items():
        if name in ("dataset", "datasets"):
            options["dataset"] = _torchtune_sources(value)
            if _trains_on_input(value):
                options["train_on_inputs"] = True
        elif name == "dataset_val":
            options["eval_dataset"] = _torchtune_sources(value)
        for dotted_name, option_value in _flatten_section(name, value):
            text = option_value if isinstance(option_value, str) else ""
            resolved = option_value
            if reference := _REFERENCE.match(text):
                resolved = f"{nested.get(reference[1], '')}{text[reference.end() :]}"
            flat_name = _TORCHTUNE_OPTIONS.get(dotted_name)
            if dotted_name == "model._component_" and "qlora" in text:
                options["load_in_4bit"] = True
            elif flat_name and flat_name not in options:
                is_class = dotted_name.endswith("._component_")
                options[flat_name] = text.rpartition(".")[2] if is_class else resolved
            elif dotted_name not in _TORCHTUNE_SKIPPED:
                options[dotted_name] = resolved
    return options


def _flatten_section(name: str, value: Any) -> list[tuple[str, Any]]:
    """Dotted name and value of each option in a section of a torchtune file."""
    if name in ("datasets", "dataset_val") or (name == "dataset" and isinstance(value, list)):
        return []
    if not isinstance(value, dict):
        return [(name, value)]
    options = []
    for key, item in value.items():
        options += _flatten_section(f"{name}.{key}", item)
    return options


def _torchtune_sources(value: Any) -> list[dict[str, Any]]:
    """The data sets of a torchtune file in the form of axolotl's `datasets`.

    torchtune names a function that builds the data set, such as torchtune.datasets.alpaca_dataset,
    and perhaps its source.
    """
    sources = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            continue
        builder = str(item.get("_component_", "")).rpartition(".")[2]
        path = item.get("source") or _TORCHTUNE_DATA_SETS.get(builder, builder)
        options = {key: item[key] for key in _TORCHTUNE_SOURCE_KEYS if item.get(key)}
        sources.append({"path": path, **options})
    return sources


def _trains_on_input(value: Any) -> bool:
    """Whether every data set trains on its prompts too, as torchtune's Alpaca does by default."""
    return all(
        isinstance(item, dict)
        and "alpaca" in str(item.get("_component_"))
        and item.get("train_on_input", True)
        for item in (value if isinstance(value, list) else [value])
    )


def _training_command(path: Path) -> list[str]:
    """The words of a shell script's training command: the command with the most options."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    commands: list[list[str]] = []
    variables: dict[str, str] = {}

    def expand(match: re.Match[str]) -> str:
        return variables.get(match[1], match[0])

    for line in re.sub(r"\\\r?\n", " ", text).splitlines():  # joins lines that end with a backslash
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quote that is not closed: not a training command
            continue
        words = [_VARIABLE.sub(expand, word) for word in words]
        if len(words) == 1 and (assignment := _ASSIGNMENT.match(words[0])):
            variables[assignment[1]] = assignment[2]
        commands.append(words)
    command = max(commands, key=_num_options, default=[])
    if not _num_options(command):
        raise UserError(f"{path}: no command with options such as --learning_rate 1e-4")
    return [word for word in command if not _ASSIGNMENT.match(word)]


def _num_options(command: list[str]) -> int:
    return sum(word.startswith("--") for word in command)


def _command_options(command: list[str], path: Path) -> dict[str, Any]:
    """Options of a command: one value, a list of values, or True if no value follows the name."""
    texts: dict[str, list[str]] = {}  # option -> the words that follow it
    option = ""
    for word in command:
        if word.startswith("--"):
            option, _, value = word.partition("=")
            texts[option] = [value] if value else []
        elif word.endswith(".py"):
            option = ""  # the program's options follow those of its launcher
        elif option:
            texts[option].append(word)
    options: dict[str, Any] = {}
    for option, words in texts.items():
        values = [parse_value(word, f"{path}: {option}") for word in words]
        if len(values) == 1:
            options[option] = values[0]
        else:
            options[option] = values or True
    return options
