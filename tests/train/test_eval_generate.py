"""Answers at evaluations: on all ranks, at every stage, without an effect on the training."""

import pytest

from pipeline.adapter.gather import gather_weights
from pipeline.data.dataset.reader import DataIndex
from pipeline.errors import UserError
from pipeline.evaluate.generate import Generator
from pipeline.evaluate.heldout import held_out_loss
from pipeline.train.questions import held_out_questions
from tests.evaluate.runs import make_run
from tests.messages import assert_mentions
from tests.ranks import run_ranks
from tests.tiny import Documents, make_plan, make_tokenizer
from tests.train_tiny import build_engine, work

pytestmark = pytest.mark.engine
PROMPTS = ["one", "two two", "a longer prompt", "x", "y z"]


def generator():
    tokenizer = make_tokenizer()
    ends = frozenset([tokenizer.eos_token_id])
    return Generator(tokenizer=tokenizer, ends=ends, max_new_tokens=6)


def train(session, folder, settings, *, answers_after):
    """Answers after some of four steps with dropout; at the end the adapter and a held-out loss."""
    plan, engine = build_engine(session, folder, {"lora_dropout": 0.2, **settings})
    rank, size = session.placement.rank, session.placement.world_size
    answers = []
    for step in range(4):
        batches, supervised = work(plan, Documents(), step, rank)
        engine.optimizer_step(batches, supervised, 1e-2)
        if step in answers_after:
            for first in range(0, len(PROMPTS), size):  # in the last pass some ranks have none
                own = PROMPTS[first + rank : first + rank + 1]
                answers.append(engine.answers(generator(), own, lambda: None))
    weights = gather_weights(engine.parameters, keep=True)
    # At one document in a micro-batch, the second of two ranks has an empty one.
    loss = held_out_loss(engine.evaluate, Documents(5), session, plan.layout)
    return answers, {key: tensor.tolist() for key, tensor in weights.items()}, loss


def with_and_without_answers(session, folder):
    """By stage: answers of the rank and weights of a run with answers, and weights without."""
    results = {}
    for stage in (2, 3):
        settings = {"zero_stage": stage, "batch_size": 2, "gradient_checkpointing": True}
        answers, weights, _ = train(session, folder, settings, answers_after=(0, 1, 3))
        _, without, _ = train(session, folder, settings, answers_after=())
        results[stage] = answers, weights, without
    return results


def test_answers_leave_the_adapter_bitwise_unchanged(tiny_model, tmp_path):
    by_rank = run_ranks(with_and_without_answers, tiny_model, tmp_path=tmp_path)
    for stage in (2, 3):
        _, weights, without = by_rank[0][stage]
        assert weights == without
        assert [len(each) for each in by_rank[0][stage][0]] == [1, 1, 1] * 3
        assert [len(each) for each in by_rank[1][stage][0]] == [1, 1, 0] * 3


KEYS = [{"mlp_tiles": 3}, {"new_tokens": ["<a>"]}]


def answers_and_losses(session, folder, runs):
    results = (train(session, folder, settings, answers_after=(3,)) for settings in runs)
    return [(answers, loss) for answers, _, loss in results]


def test_answers_are_equal_at_every_stage_and_number_of_ranks(tiny_model, tmp_path):
    def in_order(results):
        answers = [answers for answers, _ in results]
        return [text for texts in zip(*answers, strict=True) for each in texts for text in each]

    runs = [{"batch_size": 1, "lora_dropout": 0.0, **keys} for keys in KEYS]
    alone = [settings | {"zero_stage": 2, "mlp_tiles": 1} for settings in runs]
    whole_runs = run_ranks(answers_and_losses, tiny_model, alone, tmp_path=tmp_path, world_size=1)
    sharded = [settings | {"zero_stage": 3} for settings in runs]
    sharded_runs = run_ranks(answers_and_losses, tiny_model, sharded, tmp_path=tmp_path)
    for number in range(len(runs)):
        whole = [results[number] for results in whole_runs]
        sharded = [results[number] for results in sharded_runs]
        assert len(in_order(whole)) == len(PROMPTS)
        assert any(in_order(whole))
        assert in_order(sharded) == in_order(whole)
        for _, loss in sharded:
            assert loss == pytest.approx(whole[0][1], rel=1e-5)


def questions_of(session, run, settings):
    plan = make_plan(run.parent / "base", session.placement.world_size, **settings)
    try:
        questions = held_out_questions(plan, DataIndex.load(run / "data"), session)
    except UserError as error:
        return str(error)
    batches = [list(batch) for batch in questions.batches_of_rank(session.placement)]
    expected = list(enumerate(questions.expected))
    return len(questions.prompts), batches, questions.scores(expected)


def test_every_rank_gets_equally_many_batches_of_questions(tmp_path):
    run = make_run(tmp_path, rows=20)
    data = {"eval_data": str(tmp_path / "heldout.jsonl"), "output_dir": str(run)}
    first, second = run_ranks(
        questions_of, run, data | {"eval_generate": 17, "eval_regex": r"\d+"}, tmp_path=tmp_path
    )
    assert first[0] == second[0] == 17
    assert len(first[1]) == len(second[1])
    assert sorted(i for batch in first[1] + second[1] for i in batch) == [*range(17)]
    assert first[2]["exact_match"] == first[2]["regex_match"] == 1
    assert "loss" not in first[2]


def test_held_out_rows_without_questions_are_refused_on_all_ranks(tmp_path):
    run = make_run(tmp_path, rows=2)
    (tmp_path / "texts.jsonl").write_text('{"text": "no question"}\n')
    data = {"eval_data": str(tmp_path / "texts.jsonl"), "output_dir": str(run)}
    for message in run_ranks(questions_of, run, data | {"eval_generate": 1}, tmp_path=tmp_path):
        assert_mentions(message, "eval_generate", "eval_data")
