"""Run files: precedence of values, forms of numbers, and refusals with place and remedy."""

from pathlib import Path

import pytest

from pipeline.config.load import dump_settings, load_settings
from pipeline.config.presets import PRESETS
from pipeline.config.settings import RunSettings, replaced_preset_values
from pipeline.errors import UserError
from tests.messages import assert_mentions, refused

pytestmark = pytest.mark.unit

REQUIRED = "model: m\ntrain_data: t.jsonl\noutput_dir: run\n"


@pytest.fixture
def run_file(tmp_path: Path):
    """Function that writes a run file: the three required settings, and this text from line 4."""

    def write(text: str) -> Path:
        path = tmp_path / "RUN.yaml"
        path.write_text(REQUIRED + text, encoding="utf-8")
        return path

    return write


def test_defaults_are_the_balanced_preset(run_file):
    settings = load_settings(run_file(""))
    assert (settings.lora_r, settings.alpha, settings.lora_dropout) == (64, 128, 0.05)
    assert settings.lora_target_modules == "auto"


def test_precedence_is_preset_run_file_command_line(run_file):
    path = run_file("preset: [small, memory-constrained]\nlr: 3e-4\nbatch_size: 2\n")
    settings = load_settings(path, ["lr=5e-5", "lora_target_modules=[q_proj]"])
    assert settings.epochs == 3  # the preset small
    assert settings.load_in_4bit is True  # the preset memory-constrained
    assert settings.batch_size == 2  # the run file has precedence over the preset
    assert settings.lr == 5e-5  # the command line has precedence over the run file
    assert settings.lora_target_modules == ["q_proj"]


@pytest.mark.parametrize(
    ("preset", "given", "key", "value"),
    [
        ("small", "max_steps: 500", "epochs", "auto"),
        ("memory-constrained", "global_batch_size: 12", "gradient_accumulation_steps", "auto"),
        ("memory-constrained", "load_in_8bit: true", "load_in_4bit", False),
        ("speed-optimized", "fp16: true", "bf16", "auto"),
    ],
)
def test_a_user_s_value_replaces_a_contradicting_preset_value(run_file, preset, given, key, value):
    """The user's key may be another one than the preset's, such as `max_steps` for `epochs`."""
    settings = load_settings(run_file(f"preset: {preset}\n{given}\n"))
    assert getattr(settings, key) == value
    reasons = replaced_preset_values(settings)
    assert reasons.keys() == {key}
    assert_mentions(reasons[key], given.split(":")[0], f"{key}: {PRESETS[preset][key]}")
    preset_alone = load_settings(run_file(f"preset: {preset}\n"))
    assert getattr(preset_alone, key) == PRESETS[preset][key]
    assert not replaced_preset_values(preset_alone)


def test_max_steps_and_epochs_are_both_used_if_the_user_sets_both(run_file):
    settings = load_settings(run_file("preset: small\nmax_steps: 500\nepochs: 2\n"))
    assert (settings.max_steps, settings.epochs) == (500, 2)


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1E-3", 1e-3), ("0.001", 1e-3), ("2", 2.0), (".5", 0.5)]
)
def test_every_usual_form_of_a_number_is_read_as_a_number(run_file, text, value):
    assert load_settings(run_file(f"lr: {text}\n")).lr == value


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("lora_rnk: 8", ["RUN.yaml:4", "lora_rnk", "lora_r"]),
        ("lerning_rate: 8", ["RUN.yaml:4", "lerning_rate", "did you mean 'lr'"]),
        ("learning_rate: 1", ["RUN.yaml:4", "learning_rate", "lr"]),
        ("lora_r: no", ["RUN.yaml:4", "lora_r", "whole number", "'no'"]),
        ("lora_r: true", ["lora_r", "whole number"]),
        ("zero_stage: true", ["zero_stage"]),
        ("zero_stage: 4", ["zero_stage", 3]),
        ("lr: '3e-4'", ["lr", "number"]),
        ("lr: 0", ["lr", "0"]),
        ("bf16: true\nfp16: true", ["RUN.yaml:4", "RUN.yaml:5", "bf16", "fp16"]),
        ("load_in_4bit: true\nload_in_8bit: true", ["load_in_4bit", "load_in_8bit"]),
        ("split_turns: true\ntrain_on: all", ["split_turns", "train_on: assistant"]),
        ("keep_best: true", ["keep_best", "eval_data"]),
        ("time_limit: 90", ["RUN.yaml:4", "time_limit", "HH:MM:SS", "90"]),
        ("warmup_steps: 1.5", ["RUN.yaml:4", "warmup_steps", "1.5", "whole number"]),
        ("time_limit: 0", ["RUN.yaml:4", "time_limit", "HH:MM:SS", "0"]),
        ("preset: 5", ["RUN.yaml:4", "preset", "small", "list"]),
        ("preset: [[small]]", ["RUN.yaml:4", "preset", "small"]),
        ("lr: .inf", ["lr", "finite"]),
        ("lora_r: 010", ["lora_r"]),
        *(
            (f"time_limit: '{value}'", ["RUN.yaml:4", "time_limit", "HH:MM:SS"])
            for value in ("90", "00:00:00", "²:00:00", "٣:00:00", "1:00", "-1:00:00", "1 : 2 : 3")
        ),
        ("init_lora_weights: corda", ["RUN.yaml:4", "corda", "forward pass", "gaussian"]),
        ("init_lora_weights: corda", ["RUN.yaml:4", "corda", "ZeRO", "gaussian"]),
        ("init_lora_weights: orthogonal", ["RUN.yaml:4", "orthogonal", "gaussian"]),
        ("preset: bigg", ["preset", "bigg", "balanced"]),
        ("lora_r: 8\nlora_r: 9", ["RUN.yaml:5", "lora_r", "line 4"]),
        ("lora_r: [", ["RUN.yaml:5", "YAML"]),
        ("eval_data: {path: x, wieght: 2}", ["RUN.yaml:4: eval_data", "wieght", "weight"]),
        ("eval_data: [a, {path: x, rows: 2}]", ["rows", "path, weight, limit"]),
        ("eval_data: {weight: 2}", ["eval_data", "path"]),
        ("eval_data: {path: x, weight: 0}", ["eval_data", "weight", 0]),
        ("eval_data: {path: x, limit: 1.5}", ["eval_data", "limit", "whole number"]),
        ("eval_data: [7]", ["eval_data", "list", "{path, weight, limit}"]),
        ("eval_data: true", ["eval_data", "train_data", "0.05", "200"]),
        *(
            (f"eval_data: {value}", ["eval_data", "share", 0, 1])
            for value in ("1.0", "5%", "0.0", "-0.5", "5 %", ".nan", ".inf")
        ),
        ("eval_data: 0", ["eval_data", "rows", 1]),
        ("eval_data: []", ["RUN.yaml:4", "eval_data", "empty"]),
        ("trackers: none", ["RUN.yaml:4", "trackers", "leave it out"]),
        ("trackers: wandb", ["RUN.yaml:4", "trackers", "in brackets: [wandb]"]),
        ("accept_changes: data", ["RUN.yaml:4", "in brackets: [data]"]),
        ("trackers: [wandb, wandb]", ["RUN.yaml:4", "trackers", "wandb", "twice"]),
        ("preset: [small, small]", ["RUN.yaml:4", "preset", "small", "twice"]),
        ("lora_r:\t8", ["RUN.yaml:4", "YAML", "tab", "spaces"]),
        ("columns:\n\ttext: a", ["RUN.yaml:5", "YAML", "tab", "spaces"]),
        ("training: {lr: 1, epochs: 2}", ["training", "nested", "lr, epochs", "convert"]),
        ("lora: {r: 8}", ["lora", "nested", "r", "convert"]),
        ("colums: {text: a}", ["colums", "did you mean 'columns'"]),
        ("run_name: ''", ["run_name", "empty"]),
        ("'': 5", ["RUN.yaml:4", "'': unknown setting"]),
    ],
)
def test_wrong_input_is_refused_with_place_and_remedy(run_file, text, facts):
    with refused(*facts):
        load_settings(run_file(text + "\n"))


@pytest.mark.parametrize("text", ["eval_steps: 0", "save_steps: 0", "epochs: 0"])
def test_a_number_or_fraction_has_one_lower_bound(run_file, text):
    with pytest.raises(UserError) as error:
        load_settings(run_file(text + "\n"))
    assert_mentions(str(error.value), "must be above 0")
    assert "at least" not in str(error.value)


@pytest.mark.parametrize("key", ["train_data", "output_dir", "model"])
def test_a_required_setting_without_a_value_has_no_default(run_file, key):
    with pytest.raises(UserError) as error:
        load_settings(run_file(""), [f"{key}="])
    assert_mentions(str(error.value), key)
    assert "leave it out" not in str(error.value)


@pytest.mark.parametrize(
    "override", ["train_data={path: x, wieght: 2}", "eval_data=1.0", "eval_data=5%"]
)
def test_a_wrong_data_source_gets_a_message_of_our_own(run_file, override):
    """Without it, the error would name each type of the union: "must be text or a list ..."."""
    with pytest.raises(UserError) as error:
        load_settings(run_file(""), [override])
    assert "must be text" not in str(error.value)
    assert "valid" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trackers=wandb", "list in brackets"),
        ("lr=fast", "a number"),
        ("lora_target_modules=3", "must be text or a list in brackets"),
        ("lora_r=0", "at least 1"),
    ],
)
def test_a_wrong_type_is_refused_in_plain_words(run_file, override, words):
    with refused(override.partition("=")[0], words):
        load_settings(run_file(""), [override])


def test_a_number_as_train_data_is_refused_with_the_kinds_of_sources(run_file):
    with refused("train_data", "file", "folder", "org/name:split"):
        load_settings(run_file(""), ["train_data=7"])


@pytest.mark.parametrize(
    "value", ["0.05", "20", "x.jsonl", "[x, {path: y, limit: 2}]", "{path: x, weight: 2}"]
)
def test_eval_data_is_a_fraction_a_number_of_rows_or_sources(run_file, value):
    assert load_settings(run_file(""), [f"eval_data={value}"]).eval_data is not None


def test_times_and_dates_are_not_read_as_numbers_and_date_objects(run_file):
    """YAML 1.1 reads 12:00:00 as 43200 in base 60, and 2024-01-01 as a date; YAML 1.2 does not."""
    settings = load_settings(run_file("time_limit: 12:00:00\n"), ["output_dir=2024-01-01"])
    assert settings.time_limit_s == 12 * 3600
    assert settings.output_dir == "2024-01-01"


def test_all_wrong_keys_are_in_one_message(run_file):
    """The message has a line for each unknown key, invalid value and invalid path."""
    with pytest.raises(UserError) as error:
        load_settings(run_file("lr: x\nnum_epochs: 3\n"), ["lora_r=0", "epochs=none", "resume=$"])
    keys = sorted(line.split(": ")[1] for line in str(error.value).splitlines())
    assert keys == ["epochs", "lora_r", "lr", "num_epochs", "resume"]


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path, text):
    path = tmp_path / "RUN.yaml"
    path.write_text(text)
    with refused("RUN.yaml", "key: value"):
        load_settings(path)


def test_a_missing_key_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "RUN.yaml"
    path.write_text("model: m\n")
    with refused("RUN.yaml", "train_data", "required"):
        load_settings(path)
    with refused("NO.yaml"):
        load_settings(tmp_path / "NO.yaml")


def test_dumped_settings_load_as_the_same(run_file, tmp_path):
    settings = load_settings(run_file("preset: aggressive\nlr: 1e-5\ntime_limit: '01:00:00'\n"))
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_settings(settings))
    assert load_settings(copy) == settings


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(run_file, name):
    settings = load_settings(run_file(f"preset: {name}\n"))
    for key, value in PRESETS[name].items():
        assert getattr(settings, key) == value


def test_every_setting_is_described():
    for name, field in RunSettings.model_fields.items():
        assert field.description, name


def test_a_hub_model_keeps_its_name_and_gets_the_commit_of_the_local_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    path = tmp_path / "RUN.yaml"
    path.write_text("model: org/name-1.5\ntrain_data: t\noutput_dir: o\n")
    assert load_settings(path).model == "org/name-1.5"
    folder = tmp_path / "hub/models--org--name-1.5"
    snapshot = folder / "snapshots/abc123"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc123")
    settings = load_settings(path)
    assert (settings.model, settings.model_revision) == ("org/name-1.5", "abc123")
    assert settings.model_folder == snapshot
    # The main branch of the local cache moves to another commit; a dumped run keeps its commit.
    (folder / "refs/main").write_text("later")
    (folder / "snapshots/later").mkdir()
    path.write_text(dump_settings(settings))
    assert load_settings(path).model_folder == snapshot
    assert load_settings(path, ["model_revision=main"]).model_revision == "later"
    assert load_settings(path, ["model=org/other"]).model_folder == Path("org/other")
    with refused("RUN.yaml:", "model_revision", tmp_path):
        load_settings(path, [f"model={tmp_path}"])


@pytest.mark.parametrize(
    "text",
    [
        "global_batch_size: 1000000000000", "epochs: 1e300", "lr: 1e300",
        "hang_timeout_s: 1000000000000", "dataloader_num_workers: 100000",
        "dataloader_prefetch_factor: 1000000000", "output_dir: ''", "deepspeed_json: ''",
    ],
)  # fmt: skip
def test_absurd_numbers_and_empty_paths_are_refused_with_their_line(tmp_path, text):
    key = text.partition(":")[0]
    other_lines = [line for line in REQUIRED.splitlines() if not line.startswith(key)]
    path = tmp_path / "RUN.yaml"
    path.write_text("\n".join([*other_lines, text]))
    with refused(f"RUN.yaml:{len(other_lines) + 1}", key):
        load_settings(path)


def test_a_weight_that_repeats_a_source_beyond_memory_is_refused(run_file):
    path = run_file("")
    with refused("weight"):
        load_settings(path, ["train_data={path: t, weight: 1e308}"])


def test_a_path_that_cannot_be_expanded_gives_one_message(tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    path = tmp_path / "RUN.yaml"
    path.write_text("model: m\ntrain_data: t\noutput_dir: $NOT_SET/x\n")
    with refused("RUN.yaml:3", "output_dir", "$NOT_SET") as caught:
        load_settings(path)
    assert "\n" not in str(caught.value)


def test_a_run_file_of_thousands_of_unknown_keys_gives_one_short_message(run_file):
    with refused("RUN.yaml:4", "k0", "more errors") as error:
        load_settings(run_file("".join(f"k{i}: 1\n" for i in range(2000))))
    assert len(str(error.value).splitlines()) < 100  # far below 2000


@pytest.mark.parametrize("value", ["yes", "no", "on", "TRUE"])
def test_a_word_for_a_boolean_is_refused_with_the_values_that_work(tmp_path, value):
    path = tmp_path / "RUN.yaml"
    path.write_text(f"model: m\ntrain_data: t\noutput_dir: o\nload_in_4bit: {value}\n")
    with refused("RUN.yaml:4", "load_in_4bit", "true or false"):
        load_settings(path)
