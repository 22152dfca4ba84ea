"""The data sets of another training program as `train_data` or `eval_data`, and `columns`."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.peer_files import PeerConfig

_FILE_BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # paths that `datasets` reads as files
# Name of a column in LLaMA-Factory's dataset_info.json -> its name in the setting `columns`.
_FACTORY_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "system": "system",
    "messages": "conversations", "tools": "tools",
}  # fmt: skip
# Name of a column in torchtune's `column_map` for an instruct_dataset -> its name in `columns`.
_INSTRUCT_COLUMNS = {"input": "prompt", "output": "completion"}
# Key of a data set's description with the name of a column -> that column's name in `columns`.
_FIELDS = {
    "field_messages": "messages", "conversation_column": "messages", "field": "text",
    "field_tools": "tools", "field_system": "system", "field_instruction": "instruction",
    "field_input": "input", "field_output": "output",
}  # fmt: skip
# Names of the columns with conversations that need no renaming: the form of the row decides.
_OWN_NAMES = dict.fromkeys(("messages", "conversations"), ("messages", "conversations"))
# Other keys of a description that are read, or that say what is detected from the rows.
_READ_KEYS = {
    "path", "id", "hf_hub_url", "file_name", "data_files", "split", "train_on_split", "weight",
    "name", "config", "subset", "columns", "column_map", "message_property_mappings", "tags",
    "type", "ds_type", "formatting", "conversation_style",
}  # fmt: skip
_IS_DETECTED = "the format of each row is detected"


@dataclass
class ConvertedData:
    """Data sets in the form of a run file.

    `notes`: remarks for the comment. `has_slice`: whether only a part of a split is named.
    """

    sources: list[Any] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    has_slice: bool = False

    @property
    def value(self) -> Any:
        """The value of `train_data` or `eval_data`."""
        return self.sources[0] if len(self.sources) == 1 else self.sources

    @property
    def note(self) -> str:
        """The remarks, each once."""
        return "; ".join(dict.fromkeys(self.notes))


def convert_data_sets(value: Any, config: PeerConfig, limit: Any = None) -> ConvertedData:
    """Convert the data sets of any of the programs.

    An item is a mapping (axolotl, torchtune, TRL), a name in dataset_info.json (LLaMA-Factory), a
    hub name, or a hub name with a number of rows, such as `org/name#500` (ms-swift). `limit`:
    number of rows to read of each data set that has no own limit.
    """
    items = value if isinstance(value, list) else str(value).split(",")
    registry = _registered_data_sets(config)
    data = ConvertedData()
    for item in items:
        if isinstance(item, dict):
            name, num_rows, description = "", "", item
        else:
            name, _, num_rows = str(item).partition("#")
            description = registry.get(str(item).strip(), {})
        options: dict[str, Any] = {"weight": description.get("weight")}
        options["limit"] = int(num_rows) if num_rows.isdigit() else limit
        split, _, part = _split_of(description, config).rstrip("]").partition("[")
        if part:
            data.has_slice = True
            options |= _slice_options(part, data)
        given = {key: number for key, number in options.items() if _is_number(number)}
        paths = _paths(name.strip(), split, description, config, data)
        if len(paths) > 1 and "limit" in given:
            data.notes.append("limit counts the rows of each file")
        data.sources += [{"path": path, **given} if given else path for path in paths]
        data.columns |= _renamed_columns(description)
        _note_other_keys(description, data)
    return data


def _split_of(description: Mapping[str, Any], config: PeerConfig) -> str:
    """The split of a data set, perhaps with a slice, such as `train[:20%]`."""
    split = description.get("split") or description.get("train_on_split")
    return str(split or config.options.get("dataset_train_split") or "train")


def _paths(
    name: str,
    split: str,
    description: Mapping[str, Any],
    config: PeerConfig,
    data: ConvertedData,
) -> list[str]:
    """Paths of a data set, or its hub name with the split.

    `description`: the mapping that describes the data set, empty if there is only a name.
    """
    if file := description.get("file_name"):
        folder = Path(str(config.options.get("dataset_dir", "data")))
        return [str(folder / str(file))]
    names = (description.get(key) for key in ("path", "id", "hf_hub_url"))
    path = str(next(filter(None, names), name)).strip()
    for key in ("name", "config", "subset"):
        if description.get(key) not in (None, "", "default"):
            data.notes.append(f"{key}: {description[key]}: name the files of this configuration")
    if description.get("type"):
        data.notes.append(_IS_DETECTED)
    if not description and config.program == "LLaMA-Factory":
        data.notes.append(
            "a name in dataset_info.json: replace it by the path or hub name of the data"
        )
        return [path]
    files = description.get("data_files")
    if files and (path in _FILE_BUILDERS or not is_hub_name(path)):
        return [str(file) for file in files] if isinstance(files, list) else [str(files)]
    if not is_hub_name(path):
        return [path]
    return [f"{path}:{split}"]


def _slice_options(text: str, data: ConvertedData) -> dict[str, float]:
    """`limit` or `weight` for a slice such as `:500` or `:20%` of a split."""
    if first := re.fullmatch(r":(\d+)(%?)", text):
        if not first[2]:
            return {"limit": int(first[1])}
        data.notes.append(f"[{text}]: {first[1]} % of the rows, chosen by their content")
        return {"weight": int(first[1]) / 100}
    data.notes.append(
        f"[{text}] is left out, so the whole split is used: write a file of these rows"
    )
    return {}


def is_hub_name(path: str) -> bool:
    """Whether a text has the form of a hub name, `ORG/NAME`, and not that of a relative path."""
    organisation, _, name = path.partition("/")
    is_pair = bool(organisation and name) and "/" not in name
    is_file = name.endswith((".json", ".jsonl", ".csv", ".parquet"))
    return is_pair and not is_file and organisation not in (".", "..", "~", "data")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _renamed_columns(description: Mapping[str, Any]) -> dict[str, str]:
    """The setting `columns` for a data set: name of a column in RankZero -> name in the data."""
    columns: dict[str, Any] = {}
    row_format = description.get("type")
    fields = {**description, **(row_format if isinstance(row_format, dict) else {})}
    for key, column in _FIELDS.items():
        columns[column] = fields.get(key) or columns.get(column)
    column_maps = (
        (description.get("columns"), _FACTORY_COLUMNS),
        (description.get("column_map"), _INSTRUCT_COLUMNS),
    )
    for column_map, names in column_maps:
        if isinstance(column_map, dict):
            is_alpaca = "instruction" in column_map  # torchtune's names are then RankZero's
            columns |= {
                name if is_alpaca else names.get(name, ""): data_name
                for name, data_name in column_map.items()
            }
    return {
        column: data_name
        for column, data_name in columns.items()
        if column
        and isinstance(data_name, str)
        and data_name
        and data_name not in _OWN_NAMES.get(column, (column,))
    }


def _note_other_keys(description: Mapping[str, Any], data: ConvertedData) -> None:
    """Note the keys of a description that are not converted."""
    row_format = description.get("type")
    keys = [*description, *(row_format if isinstance(row_format, dict) else ())]
    others = [str(key) for key in keys if key not in _READ_KEYS and key not in _FIELDS]
    if others:
        data.notes.append(f"not converted: {', '.join(others)}")


def _registered_data_sets(config: PeerConfig) -> Mapping[str, Any]:
    """LLaMA-Factory's dataset_info.json, in `dataset_dir`: name -> description of a data set.

    Empty if there is no such file.
    """
    folder = Path(str(config.options.get("dataset_dir", "data")))
    for path in (folder, config.path.parent / folder):
        try:
            entries = json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return entries if isinstance(entries, dict) else {}
    return {}
