"""Conversations: prompts as in scoring, histories, Ctrl-C, and conversations that do not fit."""

import json

import pytest
import torch

from pipeline.evaluate.generate import Generator
from pipeline.evaluate.loading import ModelLoader
from pipeline.evaluate.rows import RowEncoder
from pipeline.evaluate.subjects import subjects_of
from pipeline.evaluate.talk import Talk
from pipeline.rows.examples import Conversation, Message
from tests.evaluate.runs import make_run
from tests.messages import refused

pytestmark = pytest.mark.tensor


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("talk"), rows=2)


@pytest.fixture
def talk(run):
    subjects = subjects_of([str(run)], (), None)
    return Talk(subjects, ModelLoader(torch.device("cpu")), max_new_tokens=5)


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that the models get."""
    seen, original = [], Generator.answers

    def answers(self, model, given, on_token, **options):
        seen.extend(given)
        return original(self, model, given, on_token, **options)

    monkeypatch.setattr(Generator, "answers", answers)
    return seen


def said_by(talk, name, text):
    parts = []
    assert talk.answer(name, text, parts.append)
    return "".join(parts)


def test_the_prompt_equals_that_of_a_score(run, talk, prompts):
    said_by(talk, "base", "how many?")
    encoder = RowEncoder(subjects_of([str(run)], (), None)[0].settings)
    turns = (Message("user", "how many?"), Message("assistant", "two"))
    assert prompts == [encoder.encode(Conversation(turns)).question.prompt]


def test_base_and_adapter_keep_their_own_answers_until_the_reset(talk, prompts):
    first = {name: said_by(talk, name, "one") for name in ("base", "adapter")}
    assert first["base"] != first["adapter"]
    for name in ("base", "adapter"):
        said_by(talk, name, "two")
        assert f"one<|im_end|>\n<|im_start|>assistant\n{first[name]}<|im_end|>" in prompts[-1]
    talk.reset()
    talk.system = "be brief"
    said_by(talk, "base", "three")
    assert "one" not in prompts[-1]
    assert prompts[-1].startswith("<|im_start|>system\nbe brief<|im_end|>")


def test_ctrl_c_stops_an_answer_and_keeps_what_was_written(talk, prompts):
    parts = []

    def write(part):
        parts.append(part)
        raise KeyboardInterrupt

    assert not talk.answer("base", "one", write)
    said_by(talk, "base", "two")
    assert f"assistant\n{parts[0]}<|im_end|>" in prompts[-1]


def test_a_conversation_that_does_not_fit_is_refused_and_forgotten(talk, prompts):
    with refused("256", "/reset"):
        said_by(talk, "base", "long " * 100)
    assert not prompts
    assert said_by(talk, "base", "short")


def test_prompts_of_a_run_on_completions_stand_alone_without_a_template(tmp_path, prompts):
    run = make_run(tmp_path)
    rows = "".join(json.dumps({"prompt": f"p{i}", "completion": " c"}) + "\n" for i in range(4))
    (tmp_path / "train.jsonl").write_text(rows)
    from pipeline.config.load import load_settings
    from pipeline.data.prepare.prepare import prepare_data

    prepare_data(load_settings(run / "run.yaml"), run / "data", processes=1)
    talk = Talk(subjects_of([str(run)], (), None), ModelLoader(torch.device("cpu")), 5)
    assert not talk.is_chat
    said_by(talk, "base", "one")
    said_by(talk, "base", "two")
    assert prompts == ["one", "two"]
