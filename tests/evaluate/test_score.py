"""Scores depend neither on the number of ranks nor on an interruption; bad input is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.adapter.trained_on import TRAINED_ON
from pipeline.cluster.devices import detect_hardware
from pipeline.cluster.placement import Placement
from pipeline.cluster.progress import Work
from pipeline.cluster.session import Session
from pipeline.config.load import load_settings
from pipeline.errors import SingleRankError
from pipeline.evaluate import loading, score
from pipeline.evaluate.answers import AnswerFile, BatchResult
from pipeline.evaluate.generate import Generator, plan_batches
from pipeline.evaluate.measures import parse_pattern
from pipeline.evaluate.model_specs import model_specs
from pipeline.evaluate.rows import examples_of_file, held_out_examples
from pipeline.evaluate.score import ScoreOptions, score_models
from pipeline.model.fingerprint import base_fingerprint
from pipeline.plan.cost import answers as cost_of_answers
from tests.adapter.merged import edit_json
from tests.evaluate.runs import make_run
from tests.messages import assert_mentions, refused
from tests.plans import gpu
from tests.ranks import run_ranks

pytestmark = pytest.mark.tensor


ROWS_PER_BATCH = 3  # so that the 10 held-out rows of the run are 4 batches
NUM_ROWS = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with 10 held-out rows. Its parent has the folder `base` of its model."""
    return make_run(tmp_path_factory.mktemp("score"), rows=NUM_ROWS)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(cost_of_answers, "BATCH_ROWS", ROWS_PER_BATCH)


def compute_scores(
    session, answers, folders, *, data=None, rows=200, regex=None, max_new_tokens=None
):
    """The contents of score.json for run folders and model folders.

    `answers`: folder for the results of batches. `data`: file with rows; None for the held-out rows
    of the first run.
    """
    specs = model_specs([str(folder) for folder in folders], (), data)
    settings = specs[0].settings
    examples = (
        held_out_examples(folders[0], settings)
        if data is None
        else examples_of_file(str(data), settings)
    )
    options = ScoreOptions(
        rows=rows, max_new_tokens=max_new_tokens, answers=answers,
        pattern=None if regex is None else parse_pattern(regex),
    )  # fmt: skip
    return score_models(specs, examples, options, session)


def single_process():
    return Session(Placement(), detect_hardware())


def without_seconds(scores):
    """The scores without the measured time."""
    models = {
        name: {**scores_of_model, "seconds": 0}
        for name, scores_of_model in scores["models"].items()
    }
    return {**scores, "models": models}


def count_generated(monkeypatch, *, interrupt_after=10**9):
    """Returns a list, to which each batch that is generated from now on appends its number of rows.

    After `interrupt_after` batches, Ctrl-C interrupts the generation.
    """
    batch_sizes, original = [], Generator.answers

    def count_and_answer(self, model, prompts, on_token, **options):
        if len(batch_sizes) >= interrupt_after:
            raise KeyboardInterrupt
        batch_sizes.append(len(prompts))
        return original(self, model, prompts, on_token, **options)

    monkeypatch.setattr(Generator, "answers", count_and_answer)
    return batch_sizes


def test_base_and_adapter_are_scored_with_intervals(run, tmp_path):
    scores = compute_scores(single_process(), tmp_path / "answers", [run], regex=r"(\d+)$")
    assert (scores["rows"], [*scores["models"]]) == (NUM_ROWS, ["base", "adapter"])
    base, adapter = scores["models"].values()
    for model_scores in (base, adapter):
        low, high = model_scores["loss_interval"]
        assert low < model_scores["loss"] < high
        assert {"perplexity", "exact_match_interval", "regex_match_interval"} <= model_scores.keys()
    assert base["loss"] != adapter["loss"]
    assert len(scores["answers"]) == NUM_ROWS
    assert any(row["base"] != row["adapter"] for row in scores["answers"])
    json.dumps(scores, allow_nan=False)  # raises an error for a number that is not finite


def test_the_progress_names_all_rows_and_ends_at_100_percent(run, tmp_path, monkeypatch):
    shown = {}  # text of the progress -> the work

    @contextmanager
    def record_progress(text, total=None, **_):
        shown[text] = work = Work(text, total)
        work.total = total
        yield work

    monkeypatch.setattr(score, "show_progress", record_progress)
    compute_scores(single_process(), tmp_path / "answers", [run])
    for name in ("base", "adapter"):
        work = shown[f"{name}: scoring {NUM_ROWS} rows"]
        assert work.done == work.total


def test_the_progress_of_each_of_two_ranks_names_the_rows_of_both(run, tmp_path):
    texts = run_ranks(progress_texts, run, tmp_path / "answers", tmp_path=tmp_path)
    assert texts == [[f"{name}: scoring {NUM_ROWS} rows" for name in ("base", "adapter")]] * 2


def progress_texts(session, run, answers):
    """Runs on each rank: the texts of the progress of scoring."""
    cost_of_answers.BATCH_ROWS = ROWS_PER_BATCH
    texts = []

    @contextmanager
    def record_progress(text, total=None, **_):
        texts.append(text)
        yield Work(text, total)

    score.show_progress = record_progress
    compute_scores(session, answers, [run])
    return [text for text in texts if "scoring" in text]


def test_scores_of_two_ranks_equal_those_of_one(run, tmp_path):
    expected = compute_scores(single_process(), tmp_path / "one", [run])
    scores, scores_of_rank_1 = run_ranks(
        compute_scores_on_rank, run, tmp_path / "two", tmp_path=tmp_path
    )
    assert without_seconds(scores) == without_seconds(expected)
    assert scores_of_rank_1 == {}
    answer_files = [path.read_text() for path in (tmp_path / "two").iterdir()]
    assert len(answer_files) == 2 * 2  # of 2 ranks and 2 models
    lines = [line for text in answer_files for line in text.split("\n") if line]
    assert len(lines) == 2 * 4  # of 2 models with 4 batches: each batch is scored once


def compute_scores_on_rank(session, run, answers):
    """Runs on each rank."""
    cost_of_answers.BATCH_ROWS = ROWS_PER_BATCH
    return compute_scores(session, answers, [run])


def test_an_interrupted_score_resumes_without_generating_a_written_answer_again(
    run, tmp_path, monkeypatch
):
    expected = compute_scores(single_process(), tmp_path / "uninterrupted", [run])
    with monkeypatch.context() as patch:
        count_generated(patch, interrupt_after=2)
        with pytest.raises(KeyboardInterrupt):
            compute_scores(single_process(), tmp_path / "answers", [run])
    (file,) = (tmp_path / "answers").iterdir()
    with file.open("ab") as stream:
        stream.write(b'{"batch": 2, "rows": [1')  # an incomplete line, as after a kill
    batch_sizes = count_generated(monkeypatch)
    scores = compute_scores(single_process(), tmp_path / "answers", [run])
    remaining_of_base = NUM_ROWS - 2 * ROWS_PER_BATCH
    assert sum(batch_sizes) == remaining_of_base + NUM_ROWS  # and all rows of the adapter
    assert without_seconds(scores) == without_seconds(expected)
    batch_sizes.clear()
    again = compute_scores(single_process(), tmp_path / "answers", [run])
    assert without_seconds(again) == without_seconds(expected)
    assert not batch_sizes


@pytest.mark.parametrize("change", [{"answers": None}, {"answers": 5}, {"loss_sums": None}])
def test_a_damaged_line_of_an_answer_file_is_ignored(tmp_path, change):
    file = AnswerFile(tmp_path, {}, rank=0)
    result = BatchResult(batch=0, rows=[3], loss_sums=[1.0], answers=["a"], seconds=1.0)
    file.append(result)
    rows_of_batches = [[3]]
    assert file.read(rows_of_batches) == {0: result}
    damaged = dataclasses.asdict(result) | change
    next(tmp_path.iterdir()).write_text(json.dumps(damaged))
    assert file.read(rows_of_batches) == {}


def copy_run(run, folder):
    """Copy a run and its base to a folder; return the run folder of the copy."""
    shutil.copytree(run.parent, folder)
    run_file = folder / "run/run.yaml"
    run_file.write_text(run_file.read_text().replace(str(run.parent), str(folder)))
    return folder / "run"


# Each of these functions changes something on which the answers depend: a file of the run, or an
# argument of compute_scores, which the function returns.


def change_adapter(run, tmp_path):
    path = run / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 3}))
    return {}


def change_base(run, tmp_path):
    path = run.parent / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))
    return {}


def change_rows(run, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text((run.parent / "heldout.jsonl").read_text().replace("ask", "tell"))
    return {"data": path}


def change_answer_length(run, tmp_path):
    return {"max_new_tokens": 3}


@pytest.mark.parametrize(
    ("change", "num_generated"),
    [
        (change_adapter, NUM_ROWS),  # the answers of the base are reused
        (change_base, 2 * NUM_ROWS),
        (change_rows, 2 * NUM_ROWS),
        (change_answer_length, 2 * NUM_ROWS),
    ],
)
def test_answers_of_another_adapter_base_rows_or_length_are_not_reused(
    run, tmp_path, monkeypatch, change, num_generated
):
    copy = copy_run(run, tmp_path / "copy")
    compute_scores(single_process(), tmp_path / "answers", [copy])
    options = change(copy, tmp_path)
    batch_sizes = count_generated(monkeypatch)
    compute_scores(single_process(), tmp_path / "answers", [copy], **options)
    assert sum(batch_sizes) == num_generated


def test_equal_models_under_different_names_are_scored_once(run, tmp_path):
    base = run.parent / "base"
    scores = compute_scores(single_process(), tmp_path / "answers", [run, base], rows=4)
    assert [*scores["models"]] == [f"{run} base", f"{run} adapter"]
    (tmp_path / "other").mkdir()
    run_with_equal_weights = make_run(tmp_path / "other")
    scores = compute_scores(
        single_process(), tmp_path / "answers", [run, run_with_equal_weights], rows=4
    )
    assert [*scores["models"]] == [f"{run} base", f"{run} adapter"]
    assert "adapter_sha256" in scores


def test_rows_of_every_format_are_scored(run, tmp_path):
    turns = [{"role": "user", "content": "größe ✓"}, {"role": "assistant", "content": "ok ✓"}]
    rows = [
        {"messages": turns},
        {"prompt": "2 + 2 =", "completion": " 4"},
        {"prompt": "", "completion": "no question"},
        {"text": "a text without a question"},
        # Skipped, because truncation at max_length leaves no supervised token.
        {"prompt": "long " * 200, "completion": "longer than the model"},
        {"nothing": 1},  # skipped: no format has this column
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = compute_scores(single_process(), tmp_path / "answers", [run], data=data)
    assert scores["rows"] == 4
    assert [row["expected"] for row in scores["answers"]] == ["ok ✓", " 4"]
    assert scores["models"]["base"]["exact_match_rows"] == 2


def test_rows_that_cannot_be_read_are_reported_even_if_enough_rows_follow(run, tmp_path, caplog):
    data = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "a b c", "completion": "d e"})
    data.write_text(f"not JSON\n{row}\n{row}\n", encoding="utf-8")
    with caplog.at_level("INFO"):
        compute_scores(single_process(), tmp_path / "answers", [run], data=data, rows=1)
    assert_mentions(caplog.text, "1 rows skipped", "JSON")


def test_a_single_row_is_scored_without_an_interval(run, tmp_path):
    scores = compute_scores(single_process(), tmp_path / "answers", [run], rows=1)
    assert scores["models"]["base"]["loss_interval"] is None


def test_data_without_usable_rows_and_a_pattern_without_matches_are_refused(run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n')
    with refused("no usable row"):
        compute_scores(single_process(), tmp_path / "answers", [run], data=tmp_path / "bad.jsonl")
    with refused("--data", "missing.jsonl"):
        compute_scores(
            single_process(), tmp_path / "answers", [run], data=tmp_path / "missing.jsonl"
        )
    with refused("--regex", "eval_regex=null", "matches no expected answer"):
        compute_scores(single_process(), tmp_path / "answers", [run], regex="never")


def test_if_answers_cannot_be_written_the_message_says_how_to_continue(run, tmp_path):
    (tmp_path / "answers").write_text("a file in the place of the folder for the answers")
    with pytest.raises(SingleRankError) as error:
        compute_scores(single_process(), tmp_path / "answers", [run])
    assert_mentions(str(error.value), tmp_path / "answers", "start again")


def test_a_base_that_differs_in_one_byte_is_refused_before_it_is_loaded(run, tmp_path):
    copy = copy_run(run, tmp_path / "copy")
    base = tmp_path / "copy/base"
    record = {"base": "org/name", "fingerprint": base_fingerprint(base).as_json()}
    (copy / "adapter" / TRAINED_ON).write_text(json.dumps(record))
    (shard,) = base.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # flips one bit
    shard.write_bytes(content)
    with refused(base, "1 of", "model."):
        model_specs([str(copy)], (), None)


def test_a_truncated_adapter_is_refused_before_a_model_is_loaded(run, tmp_path):
    copy = copy_run(run, tmp_path / "copy")
    path = copy / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with refused(path, "bytes", "header"):
        model_specs([str(copy)], (), None)


def rename_weights(adapter):
    path = adapter / "adapter_model.safetensors"
    renamed = {key.replace("q_proj", "qx_proj"): t for key, t in load_file(path).items()}
    save_file(renamed, path)
    return ["q_proj.lora_A"]


def target_fewer_layers(adapter):
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj"])
    return ["v_proj.lora_A"]


def target_other_layers(adapter):
    edit_json(adapter / "adapter_config.json", target_modules=["nothing"])
    return ["nothing"]


def change_sizes(adapter):
    path = adapter / "adapter_model.safetensors"
    weights = {k: t[:, :8] if "lora_A" in k else t for k, t in load_file(path).items()}
    save_file({key: t.contiguous() for key, t in weights.items()}, path)
    return ["q_proj", (32, 8), (32, 32)]


@pytest.mark.parametrize(
    "damage", [rename_weights, target_fewer_layers, target_other_layers, change_sizes]
)
def test_an_adapter_of_which_peft_does_not_load_each_weight_is_refused(run, tmp_path, damage):
    """peft leaves weights that it does not find at their initial values, and only warns."""
    copy = copy_run(run, tmp_path / "copy")
    facts = damage(copy / "adapter")
    with refused(copy / "adapter", *facts):
        compute_scores(single_process(), tmp_path / "answers", [copy])


def test_batches_have_prompts_of_similar_length_and_a_limited_number_of_tokens():
    lengths = [5, 900, 20, 7, 900, 1, 0, 6]
    batches = plan_batches(lengths, max_new_tokens=10)
    assert sorted(i for batch in batches for i in batch) == [*range(len(lengths))]
    assert batches[0][:2] == [1, 4]  # the longest first, equal lengths in the order of the rows
    assert all(len(batch) <= ROWS_PER_BATCH for batch in batches)
    # A batch may have 32768 tokens of prompts and answers, which is less than 2 x 20010.
    assert plan_batches([20000, 20000], max_new_tokens=10) == [[0], [1]]
    assert plan_batches([], max_new_tokens=10) == []


def test_prompts_near_the_last_position_of_the_model_share_batches_only_with_equally_long_ones():
    # Prompts of 28 and 25 tokens leave 2 and 5 of 30 positions, less than max_new_tokens.
    batches = plan_batches([5, 28, 25, 3, 28], max_new_tokens=10, max_positions=30)
    assert batches == [[1, 4], [2], [0, 3]]


def test_a_long_prompt_does_not_shorten_the_answers_to_others(run, tmp_path):
    def answer_to_last(*prompts):
        data = tmp_path / f"{len(prompts)}.jsonl"
        rows = [{"prompt": prompt, "completion": " 1"} for prompt in prompts]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        answers = tmp_path / f"answers-{len(prompts)}"
        scores = compute_scores(single_process(), answers, [run], data=data, max_new_tokens=200)
        return scores["answers"][-1]["base"]

    # With the 256 positions of the model, the long prompt leaves fewer than max_new_tokens.
    assert answer_to_last("a" * 100, "one") == answer_to_last("one")


def test_a_merged_model_and_the_same_folder_as_a_model_are_loaded_separately(run, monkeypatch):
    calls = []  # names of the functions that load a model

    def replace_loading(function_name):
        def load(*args, **options):
            calls.append(function_name)
            return torch.nn.Module()

        monkeypatch.setattr(loading, function_name, load)

    replace_loading("load_base")
    replace_loading("load_plain")  # loads a merged model
    spec = model_specs([str(run)], (), None)[0]
    loader = loading.ModelLoader(torch.device("cpu"))
    for is_merged in (True, False, False):  # the second model is loaded only once
        with loader.loaded(dataclasses.replace(spec, adapter=None, is_merged=is_merged)):
            pass
    assert calls == ["load_plain", "load_base"]


def test_a_score_needs_neither_the_ranks_nor_the_memory_of_the_training(run, monkeypatch):
    one_gpu = dataclasses.replace(gpu(80, count=1), host_bytes=6 * 2**30)
    monkeypatch.setattr(loading, "detect_hardware", lambda: one_gpu)
    needs_much_memory = {"max_length": 2**28, "offload_activations": True, "mlp_tiles": 8}
    needs_4_ranks = {"sequence_parallel_size": 4, "zero_stage": 3, "hpz_partition_size": 4}
    settings = load_settings(run / "run.yaml")
    settings = settings.model_copy(update=needs_much_memory | needs_4_ranks)
    assert loading.single_process_plan(settings).world_size == 1


def test_a_prompt_that_fills_all_positions_of_the_model_has_an_empty_answer(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = run.parent / "base"
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    generator = Generator(
        tokenizer=AutoTokenizer.from_pretrained(base), end_ids=frozenset(), max_new_tokens=50,
        max_positions=30,
    )  # fmt: skip
    forward_passes = []
    prompts = ["a" * 30, "b" * 25]  # of 30 and 25 tokens
    answers = generator.answers(model, prompts, lambda: forward_passes.append(1))
    assert answers[0] == ""
    assert len(forward_passes) <= 5  # tokens that the second answer may have


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [([], ["RUN", "no eval_data", "--data"]), (["--data", "RUN/none.jsonl"], ["RUN/none.jsonl"])],
)
def test_a_command_without_rows_is_refused_before_torch_is_imported(
    run, tmp_path, arguments, facts
):
    folder = tmp_path / "run"
    text = (run / "run.yaml").read_text()
    shutil.copytree(run / "adapter", folder / "adapter")
    lines = [line for line in text.splitlines() if not line.startswith("eval_data")]
    (folder / "run.yaml").write_text("\n".join(lines))
    words = ["score.py", "RUN", *arguments]
    script = (
        "import sys\n"
        "from pipeline.cli.score import score\n"
        "from pipeline.errors import UserError\n"
        f"sys.argv = {[word.replace('RUN', str(folder)) for word in words]!r}\n"
        "try:\n"
        "    score()\n"
        "except UserError as error:\n"
        "    print(error, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    # The last word, False, says that torch is not imported.
    facts = [fact.replace("RUN", str(folder)) for fact in facts]
    assert_mentions(result.stdout, *facts, "False")


def test_without_the_merged_model_it_is_not_checked_either(run, tmp_path, caplog):
    copy = copy_run(run, tmp_path / "copy")
    (copy / "merged").mkdir(exist_ok=True)
    (copy / "merged" / "rankzero_merge.json").unlink(missing_ok=True)
    specs = model_specs([str(copy)], (), None, with_merged=False)
    assert [spec.name for spec in specs] == ["base", "adapter"]
    assert not caplog.records
    model_specs([str(copy)], (), None)
    assert "merged" in caplog.text
