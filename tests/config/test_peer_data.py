"""Data sets in the configurations of other programs become `train_data`, `eval_data`, `columns`."""

from pathlib import Path
from typing import Any

import pytest

from tests.config.test_convert import AXOLOTL, TORCHTUNE, TRL, converted, write_run_file
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit
BASE = "base_model: org/base\nadapter: lora\nlearning_rate: 1e-4\noutput_dir: out\n"


def data_settings(folder: Path, text: str, name: str = "config.yaml") -> dict[str, Any]:
    """The settings of the data, as plain values without defaults."""
    settings = converted(folder, text, name=name)
    values = settings.model_dump(include={"train_data", "eval_data", "columns"})
    return {key: value for key, value in values.items() if value not in (None, {})}


def test_every_data_file_is_taken_over(tmp_path: Path) -> None:
    text = BASE + "datasets: [{path: json, data_files: [a.jsonl, b.jsonl], type: completion}]\n"
    assert data_settings(tmp_path, text) == {"train_data": ["a.jsonl", "b.jsonl"]}


@pytest.mark.parametrize(
    ("split", "source"),
    [
        ("train", "org/chats:train"),
        ("train[:500]", {"path": "org/chats:train", "weight": 1.0, "limit": 500}),
        ("train[:20%]", {"path": "org/chats:train", "weight": 0.2, "limit": None}),
        ("train[50%:]", "org/chats:train"),
    ],
)
def test_a_part_of_a_split_becomes_limit_or_weight(
    tmp_path: Path, split: str, source: object
) -> None:
    text = f"{BASE}datasets: [{{path: org/chats, type: chat_template, split: '{split}'}}]\n"
    assert data_settings(tmp_path, text) == {"train_data": source}
    if "%:" in split:
        assert_mentions((tmp_path / "RUN.yaml").read_text(), "[50%:]", "whole split")


def test_a_part_of_data_files_becomes_a_limit_of_each_file(tmp_path: Path) -> None:
    files = "[{path: json, data_files: ['a[1].jsonl', b.jsonl], split: 'train[:9]'}]"
    paths = data_settings(tmp_path, f"{BASE}datasets: {files}\n")["train_data"]
    assert [(data["path"], data["limit"]) for data in paths] == [("a[1].jsonl", 9), ("b.jsonl", 9)]
    assert_mentions((tmp_path / "RUN.yaml").read_text(), "each file")


def test_test_datasets_are_held_out_unless_they_are_a_part_of_a_split(tmp_path: Path) -> None:
    text = BASE + "datasets: [{path: org/a}]\ntest_datasets: [{path: e.jsonl, ds_type: json}]\n"
    assert data_settings(tmp_path, text)["eval_data"] == "e.jsonl"
    text = (
        BASE + "datasets: [{path: org/a}]\ntest_datasets: [{path: org/a, split: 'train[95%:]'}]\n"
    )
    assert "eval_data" not in data_settings(tmp_path, text)
    assert_mentions((tmp_path / "RUN.yaml").read_text(), "test_datasets", "eval_data")


def test_names_of_columns_in_a_format_are_converted_and_other_keys_are_named(
    tmp_path: Path,
) -> None:
    text = BASE + (
        "datasets:\n  - path: a.jsonl\n    shards: 4\n    field_tools: functions_of_row\n"
        "    type: {field_instruction: question, field_output: answer, format: '[INST]'}\n"
    )
    columns = {"tools": "functions_of_row", "instruction": "question", "output": "answer"}
    assert data_settings(tmp_path, text) == {"train_data": "a.jsonl", "columns": columns}
    assert_mentions((tmp_path / "RUN.yaml").read_text(), "not converted", "shards", "format")


def test_a_mixture_of_trl_becomes_sources_with_weights(tmp_path: Path) -> None:
    text = TRL.replace("dataset_name: org/chats\n", "") + (
        "dataset_mixture:\n  test_split_size: 0.1\n  datasets:\n"
        "    - {id: org/a, config: default, split: train_sft, columns: [messages], weight: 0.5}\n"
        "    - {id: org/b}\n"
    )
    first = {"path": "org/a:train_sft", "weight": 0.5, "limit": None}
    assert data_settings(tmp_path, text) == {"train_data": [first, "org/b:train"], "eval_data": 0.1}


@pytest.mark.parametrize(
    ("options", "eval_data"),
    [
        ("", None),
        ("eval_strategy: steps", "org/chats:test"),
        ("eval_strategy: epoch\ndataset_test_split: test_sft", "org/chats:test_sft"),
    ],
)
def test_trl_evaluates_on_another_split_of_the_data_set(
    tmp_path: Path, options: str, eval_data: object
) -> None:
    assert data_settings(tmp_path, TRL + options).get("eval_data") == eval_data


def test_a_list_of_data_sets_of_torchtune_and_its_validation_set(tmp_path: Path) -> None:
    before, _, after = TORCHTUNE.partition("dataset:\n")
    data = """
dataset:
  - {_component_: torchtune.datasets.instruct_dataset, source: org/a, split: train}
  - {_component_: torchtune.datasets.samsum_dataset}
dataset_val: {_component_: torchtune.datasets.instruct_dataset, source: org/v, split: test}
run_val_every_n_steps: 50
"""
    text = before + data + after[after.index("optimizer:") :]
    assert data_settings(tmp_path, text) == {
        "train_data": ["org/a:train", "Samsung/samsum:train"], "eval_data": "org/v:test",
    }  # fmt: skip
    assert converted(tmp_path, text).eval_steps == 50


def test_columns_of_torchtune_are_taken_over(tmp_path: Path) -> None:
    text = TORCHTUNE.replace(
        "alpaca_cleaned_dataset", "instruct_dataset\n  source: org/a\n  "
        "column_map: {input: question, output: answer}",
    )  # fmt: skip
    columns = {"prompt": "question", "completion": "answer"}
    assert data_settings(tmp_path, text)["columns"] == columns


def test_torchtunes_alpaca_trains_on_its_prompts_unless_that_is_off(tmp_path: Path) -> None:
    assert converted(tmp_path, TORCHTUNE).train_on == "all"
    off = TORCHTUNE.replace("packed: true", "packed: true\n  train_on_input: false")
    assert converted(tmp_path, off).train_on == "assistant"


def test_the_text_column_of_trl_is_taken_over(tmp_path: Path) -> None:
    text = TRL + "dataset_text_field: body\n"
    assert data_settings(tmp_path, text)["columns"] == {"text": "body"}


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_conversation_under_a_usual_name_needs_no_columns(tmp_path: Path, column: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(
        '{"chats": {"file_name": "c.json", "formatting": "sharegpt", "columns": {"messages": "'
        f'{column}"}}, "tags": {{"role_tag": "role", "content_tag": "content"}}}}}}'
    )
    text = "model_name_or_path: org/m\nstage: sft\nfinetuning_type: lora\ndataset: chats\n"
    assert data_settings(tmp_path, text + "output_dir: o\n") == {"train_data": "data/c.json"}


def test_the_number_of_rows_of_an_older_ms_swift_is_taken_over(tmp_path: Path) -> None:
    config = (
        '{"model_id_or_path": "org/m", "sft_type": "lora", "dataset": ["a.jsonl"], '
        '"train_dataset_sample": 100, "dataset_test_ratio": 0.1, "output_dir": "o"}'
    )
    source = {"path": "a.jsonl", "weight": 1.0, "limit": 100}
    expected = {"train_data": source, "eval_data": 0.1}
    assert data_settings(tmp_path, config, "config.json") == expected


def test_the_keys_of_a_data_set_that_are_read_are_not_named_as_left_out(tmp_path: Path) -> None:
    text = write_run_file(tmp_path, AXOLOTL).read_text()
    assert "not converted" not in text
