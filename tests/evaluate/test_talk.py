"""Conversations with base and adapter: prompts, histories, Ctrl-C, and refusals."""

import json

import pytest
import torch

from pipeline.evaluate.generate import Generator
from pipeline.evaluate.loading import ModelLoader
from pipeline.evaluate.model_specs import model_specs
from pipeline.evaluate.rows import RowEncoder
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
    specs = model_specs([str(run)], (), None)
    return Talk(specs, ModelLoader(torch.device("cpu")), max_new_tokens=5)


@pytest.fixture
def prompts(monkeypatch):
    """A list that records each prompt that is given to a model."""
    recorded, original = [], Generator.answers

    def record_and_answer(self, model, prompts, on_token, **options):
        recorded.extend(prompts)
        return original(self, model, prompts, on_token, **options)

    monkeypatch.setattr(Generator, "answers", record_and_answer)
    return recorded


def answer_of(talk, name, text):
    """The complete answer of base or adapter to a user's message."""
    parts = []
    is_complete = talk.answer(name, text, parts.append)
    assert is_complete
    return "".join(parts)


def test_a_message_is_rendered_as_the_prompt_of_a_scored_row(run, talk, prompts):
    answer_of(talk, "base", "how many?")
    encoder = RowEncoder(model_specs([str(run)], (), None)[0].settings)
    turns = (Message("user", "how many?"), Message("assistant", "two"))
    assert prompts == [encoder.encode(Conversation(turns)).question.prompt]


def test_base_and_adapter_keep_their_own_answers_until_the_reset(talk, prompts):
    first = {name: answer_of(talk, name, "one") for name in ("base", "adapter")}
    assert first["base"] != first["adapter"]
    for name in ("base", "adapter"):
        answer_of(talk, name, "two")
        assert f"one<|im_end|>\n<|im_start|>assistant\n{first[name]}<|im_end|>" in prompts[-1]
    talk.reset()
    talk.system = "be brief"
    answer_of(talk, "base", "three")
    assert "one" not in prompts[-1]
    assert prompts[-1].startswith("<|im_start|>system\nbe brief<|im_end|>")


def test_an_answer_stopped_by_ctrl_c_stays_in_the_history(talk, prompts):
    written = []

    def write_and_interrupt(part):
        written.append(part)
        raise KeyboardInterrupt

    is_complete = talk.answer("base", "one", write_and_interrupt)
    assert not is_complete
    answer_of(talk, "base", "two")
    assert f"assistant\n{written[0]}<|im_end|>" in prompts[-1]


def test_a_message_too_long_for_the_model_is_refused_and_not_in_the_history(talk, prompts):
    with refused("256", "/reset"):  # the model supports 256 tokens, and each character is one
        answer_of(talk, "base", "long " * 100)
    assert not prompts
    assert answer_of(talk, "base", "short")


def test_after_training_on_prompts_with_completions_a_message_is_the_whole_prompt(
    tmp_path, prompts
):
    run = make_run(tmp_path)
    rows = "".join(json.dumps({"prompt": f"p{i}", "completion": " c"}) + "\n" for i in range(4))
    (tmp_path / "train.jsonl").write_text(rows)
    from pipeline.config.load import load_settings
    from pipeline.data.prepare.prepare import prepare_data

    prepare_data(load_settings(run / "run.yaml"), run / "data", processes=1)
    talk = Talk(model_specs([str(run)], (), None), ModelLoader(torch.device("cpu")), 5)
    assert not talk.is_chat
    answer_of(talk, "base", "one")
    answer_of(talk, "base", "two")
    assert prompts == ["one", "two"]
