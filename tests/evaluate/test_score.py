"""Scores of runs and models: same numbers for all ranks and interruptions, and what is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

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
from pipeline.evaluate.rows import examples_of_file, held_out_examples
from pipeline.evaluate.score import ScoreOptions, score_models
from pipeline.evaluate.subjects import subjects_of
from pipeline.model.fingerprint import base_fingerprint
from pipeline.plan.cost import answers as cost_of_answers
from tests.evaluate.runs import make_run
from tests.messages import assert_mentions, refused
from tests.plans import gpu
from tests.ranks import run_ranks

pytestmark = pytest.mark.tensor


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("score"))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(cost_of_answers, "BATCH_ROWS", 3)


def score_of(session, answers, arguments, *, data=None, rows=200, regex=None, max_new_tokens=None):
    subjects = subjects_of([str(each) for each in arguments], (), data)
    settings = subjects[0].settings
    examples = (
        held_out_examples(arguments[0], settings)
        if data is None
        else examples_of_file(str(data), settings)
    )
    options = ScoreOptions(
        rows=rows, max_new_tokens=max_new_tokens, answers=answers,
        pattern=None if regex is None else parse_pattern(regex),
    )  # fmt: skip
    return score_models(subjects, examples, options, session)


def alone():
    return Session(Placement(), detect_hardware())


def numbers(scores):
    """The scores without the measured time."""
    models = {name: {**each, "seconds": 0} for name, each in scores["models"].items()}
    return {**scores, "models": models}


def count_answers(monkeypatch, *, fail_after=10**9):
    """Replace the generation by one that counts prompts, and fails after `fail_after` batches."""
    counted, original = [], Generator.answers

    def answers(self, model, prompts, on_token, **options):
        if len(counted) >= fail_after:
            raise KeyboardInterrupt
        counted.append(len(prompts))
        return original(self, model, prompts, on_token, **options)

    monkeypatch.setattr(Generator, "answers", answers)
    return counted


def test_base_and_adapter_are_scored_with_intervals(run, tmp_path):
    scores = score_of(alone(), tmp_path / "answers", [run], regex=r"(\d+)$")
    assert (scores["rows"], [*scores["models"]]) == (10, ["base", "adapter"])
    base, adapter = scores["models"].values()
    for each in (base, adapter):
        low, high = each["loss_interval"]
        assert low < each["loss"] < high
        assert {"perplexity", "exact_match_interval", "regex_match_interval"} <= each.keys()
    assert base["loss"] != adapter["loss"]
    assert len(scores["answers"]) == 10
    assert any(row["base"] != row["adapter"] for row in scores["answers"])
    json.dumps(scores, allow_nan=False)


def on_rank(session, run, answers):
    cost_of_answers.BATCH_ROWS = 3
    return score_of(session, answers, [run])


def test_the_progress_names_all_rows_and_ends_at_100_percent(run, tmp_path, monkeypatch):
    works = {}

    @contextmanager
    def recorded(text, total=None, **_):
        works[text] = work = Work(text, total)
        work.total = total
        yield work

    monkeypatch.setattr(score, "show_progress", recorded)
    score_of(alone(), tmp_path / "answers", [run])
    for name in ("base", "adapter"):
        work = works[f"{name}: scoring 10 rows"]
        assert work.done == work.total


def test_a_rank_of_two_shows_the_number_of_all_rows(run, tmp_path):
    texts = run_ranks(progress_texts, run, tmp_path / "answers", tmp_path=tmp_path)
    assert texts == [["base: scoring 10 rows", "adapter: scoring 10 rows"]] * 2


def progress_texts(session, run, answers):
    cost_of_answers.BATCH_ROWS = 3
    texts = []

    @contextmanager
    def recorded(text, total=None, **_):
        texts.append(text)
        yield Work(text, total)

    score.show_progress = recorded
    score_of(session, answers, [run])
    return [text for text in texts if "scoring" in text]


def test_two_ranks_have_the_numbers_of_one(run, tmp_path):
    expected = score_of(alone(), tmp_path / "one", [run])
    first, second = run_ranks(on_rank, run, tmp_path / "two", tmp_path=tmp_path)
    assert second == {}
    assert numbers(first) == numbers(expected)
    texts = [path.read_text() for path in (tmp_path / "two").iterdir()]
    batches = [line for text in texts for line in text.split("\n") if line]
    assert (len(texts), len(batches)) == (4, 8)  # 2 ranks x 2 models; each batch is scored once


def test_a_killed_score_generates_no_written_answer_again(run, tmp_path, monkeypatch):
    expected = score_of(alone(), tmp_path / "whole", [run])
    with monkeypatch.context() as patch:
        count_answers(patch, fail_after=2)
        with pytest.raises(KeyboardInterrupt):
            score_of(alone(), tmp_path / "answers", [run])
    (file,) = (tmp_path / "answers").iterdir()
    with file.open("ab") as stream:
        stream.write(b'{"batch": 2, "rows": [1')  # cut by the kill
    counted = count_answers(monkeypatch)
    scores = score_of(alone(), tmp_path / "answers", [run])
    assert sum(counted) == 10 - 2 * 3 + 10  # the rest of the base, and the adapter
    assert numbers(scores) == numbers(expected)
    counted.clear()
    assert numbers(score_of(alone(), tmp_path / "answers", [run])) == numbers(expected)
    assert not counted


@pytest.mark.parametrize("change", [{"answers": None}, {"answers": 5}, {"loss_sums": None}])
def test_a_line_of_answers_that_is_not_of_this_form_is_scored_again(tmp_path, change):
    file = AnswerFile(tmp_path, {}, rank=0)
    result = BatchResult(batch=0, rows=[3], loss_sums=[1.0], answers=["a"], seconds=1.0)
    file.append(result)
    assert file.read([[3]]) == {0: result}
    damaged = dataclasses.asdict(result) | change
    next(tmp_path.iterdir()).write_text(json.dumps(damaged))
    assert file.read([[3]]) == {}


def other_adapter(run, tmp_path):
    weights = run / "adapter/adapter_config.json"
    config = json.loads(weights.read_text())
    weights.write_text(json.dumps(config | {"lora_alpha": 3}))
    return {}


def other_base(run, tmp_path):
    config = run.parent / "base/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    return {}


def other_rows(run, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text((run.parent / "heldout.jsonl").read_text().replace("ask", "tell"))
    return {"data": path}


def other_length(run, tmp_path):
    return {"max_new_tokens": 3}


@pytest.mark.parametrize(
    ("change", "generated"),
    [(other_adapter, 10), (other_base, 20), (other_rows, 20), (other_length, 20)],
)
def test_answers_of_another_adapter_base_rows_or_length_are_not_reused(
    run, tmp_path, monkeypatch, change, generated
):
    shutil.copytree(run.parent, tmp_path / "copy")
    own = tmp_path / "copy/run"
    text = (own / "run.yaml").read_text()
    (own / "run.yaml").write_text(text.replace(str(run.parent), str(tmp_path / "copy")))
    score_of(alone(), tmp_path / "answers", [own])
    options = change(own, tmp_path)
    counted = count_answers(monkeypatch)
    score_of(alone(), tmp_path / "answers", [own], **options)
    assert sum(counted) == generated


def test_runs_and_models_are_scored_on_the_same_rows_and_equal_models_once(run, tmp_path):
    base = run.parent / "base"
    scores = score_of(alone(), tmp_path / "answers", [run, base], rows=4)
    assert [*scores["models"]] == [f"{run} base", f"{run} adapter"]  # the model is the run's base
    (tmp_path / "other").mkdir()
    other = make_run(tmp_path / "other")
    scores = score_of(alone(), tmp_path / "answers", [run, other], rows=4)
    assert [*scores["models"]] == [f"{run} base", f"{run} adapter"]  # equal weights
    assert "adapter_sha256" in scores


def test_rows_of_every_kind_are_scored(run, tmp_path):
    turns = [{"role": "user", "content": "größe ✓"}, {"role": "assistant", "content": "ok ✓"}]
    rows = [
        {"messages": turns},
        {"prompt": "2 + 2 =", "completion": " 4"},
        {"prompt": "", "completion": "no question"},
        {"text": "a text without a question"},
        {"prompt": "long " * 200, "completion": "longer than the model"},
        {"nothing": 1},
    ]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = score_of(alone(), tmp_path / "answers", [run], data=data)
    assert scores["rows"] == 4  # the long prompt has no supervised token within max_length
    assert [row["expected"] for row in scores["answers"]] == ["ok ✓", " 4"]
    assert scores["models"]["base"]["exact_match_rows"] == 2


def test_rows_that_cannot_be_read_are_reported_also_if_enough_others_follow(run, tmp_path, caplog):
    data = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a b c", "completion": "d e"})
    data.write_text("\n".join(["not JSON", good, good + "\n"]), encoding="utf-8")
    with caplog.at_level("INFO"):
        score_of(alone(), tmp_path / "answers", [run], data=data, rows=1)
    assert_mentions(caplog.text, "1 rows skipped", "JSON")


def test_one_row_is_scored_and_none_is_refused(run, tmp_path):
    scores = score_of(alone(), tmp_path / "answers", [run], rows=1)
    assert scores["models"]["base"]["loss_interval"] is None
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n')
    with refused("no usable row"):
        score_of(alone(), tmp_path / "answers", [run], data=tmp_path / "bad.jsonl")
    with refused("--data", "missing.jsonl"):
        score_of(alone(), tmp_path / "answers", [run], data=tmp_path / "missing.jsonl")
    with refused("--regex", "eval_regex=null", "matches no expected answer"):
        score_of(alone(), tmp_path / "answers", [run], regex="never")


def test_a_full_disk_keeps_the_written_answers(run, tmp_path, monkeypatch):
    (tmp_path / "answers").write_text("a file, so that no answer can be written")
    with pytest.raises(SingleRankError) as error:
        score_of(alone(), tmp_path / "answers", [run])
    assert_mentions(str(error.value), tmp_path / "answers", "start again")


def test_a_base_that_differs_in_one_byte_is_refused_before_it_is_loaded(run, tmp_path):
    shutil.copytree(run.parent, tmp_path / "copy")
    own, base = tmp_path / "copy/run", tmp_path / "copy/base"
    text = (own / "run.yaml").read_text()
    (own / "run.yaml").write_text(text.replace(str(run.parent), str(tmp_path / "copy")))
    record = {"base": "org/name", "fingerprint": base_fingerprint(base).as_json()}
    (own / "adapter" / TRAINED_ON).write_text(json.dumps(record))
    (shard,) = base.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with refused(base, "1 of", "model."):
        subjects_of([str(own)], (), None)


def test_batches_hold_prompts_of_similar_length_and_bound_the_cache():
    lengths = [5, 900, 20, 7, 900, 1, 0, 6]
    batches = plan_batches(lengths, 10)
    assert sorted(i for batch in batches for i in batch) == [*range(8)]
    assert batches[0][:2] == [1, 4]  # the longest first, ties in the order of the rows
    assert all(len(batch) <= 3 for batch in batches)
    assert [len(batch) for batch in plan_batches([20000, 20000], 10)] == [1, 1]
    assert plan_batches([], 10) == []


def test_prompts_near_the_last_position_of_the_model_share_batches_only_with_equally_long_ones():
    assert plan_batches([5, 28, 25, 3, 28], 10, 30) == [[1, 4], [2], [0, 3]]


def test_a_long_prompt_does_not_shorten_the_answers_to_others(run, tmp_path):
    def answer_to_short(*prompts):
        data = tmp_path / f"{len(prompts)}.jsonl"
        rows = [{"prompt": prompt, "completion": " 1"} for prompt in prompts]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        answers = tmp_path / f"answers-{len(prompts)}"
        scores = score_of(alone(), answers, [run], data=data, max_new_tokens=200)
        return scores["answers"][-1]["base"]

    assert answer_to_short("a" * 100, "one") == answer_to_short("one")


def test_a_merged_model_and_the_same_folder_as_a_model_are_loaded_separately(run, monkeypatch):
    (subject, *_), loaded = subjects_of([str(run)], (), None), []
    for name in ("load_base", "load_plain"):
        monkeypatch.setattr(
            loading, name, lambda *a, name=name, **k: loaded.append(name) or torch.nn.Module()
        )
    loader = loading.ModelLoader(torch.device("cpu"))
    for is_merged in (True, False, False):
        same_folder = dataclasses.replace(subject, adapter=None, is_merged=is_merged)
        with loader.loaded(same_folder):
            pass
    assert loaded == ["load_plain", "load_base"]


def test_a_score_needs_neither_the_ranks_nor_the_host_memory_of_the_training(run, monkeypatch):
    small = dataclasses.replace(gpu(80, count=1), host_bytes=6 * 2**30)
    monkeypatch.setattr(loading, "detect_hardware", lambda: small)
    long = {"max_length": 2**28, "offload_activations": True, "mlp_tiles": 8}
    groups = {"sequence_parallel_size": 4, "zero_stage": 3, "hpz_partition_size": 4}
    settings = load_settings(run / "run.yaml").model_copy(update=long | groups)
    assert loading.single_process_plan(settings).world_size == 1


def test_a_prompt_that_fills_the_model_has_an_empty_answer(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = run.parent / "base"
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    generator = Generator(
        tokenizer=AutoTokenizer.from_pretrained(base), ends=frozenset(), max_new_tokens=50,
        max_positions=30,
    )  # fmt: skip
    steps = []
    answers = generator.answers(model, ["a" * 30, "b" * 25], lambda: steps.append(1))
    assert answers[0] == ""
    assert len(steps) <= 5  # the second prompt has 25 of 30 positions


def test_a_run_without_held_out_rows_is_refused_before_torch_is_imported(run, tmp_path):
    text = (run / "run.yaml").read_text()
    shutil.copytree(run / "adapter", tmp_path / "run/adapter")
    kept = [line for line in text.splitlines() if not line.startswith("eval_data")]
    (tmp_path / "run/run.yaml").write_text("\n".join(kept))
    script = (
        "import sys\n"
        "from pipeline.cli.score import score\n"
        "from pipeline.errors import UserError\n"
        f"sys.argv = ['score.py', {str(tmp_path / 'run')!r}]\n"
        "try:\n"
        "    score()\n"
        "except UserError as error:\n"
        "    print(error, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_mentions(result.stdout, tmp_path / "run", "no eval_data", "--data", "False")
