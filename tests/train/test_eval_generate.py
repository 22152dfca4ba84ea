"""Answers at evaluations: on one and two ranks, at ZeRO-2 and 3, without an effect on training."""

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
from tests.train_tiny import batches_of_step, build_engine

pytestmark = pytest.mark.engine
PROMPTS = ["one", "two two", "a longer prompt", "x", "y z"]  # not divisible by two ranks


def generator():
    tokenizer = make_tokenizer()
    end_ids = frozenset([tokenizer.eos_token_id])
    return Generator(tokenizer=tokenizer, end_ids=end_ids, max_new_tokens=6)


def train(session, folder, settings, *, answers_after):
    """Train four steps, by default with dropout. Returns answers, final adapter, held-out loss.

    `answers_after`: steps after which the ranks answer PROMPTS. Each entry of the answers is the
    list of answers that this rank generated in one batch.
    """
    plan, engine = build_engine(session, folder, {"lora_dropout": 0.2, **settings})
    rank, size = session.placement.rank, session.placement.world_size
    answers = []
    for step in range(4):
        batches, supervised = batches_of_step(plan, Documents(), step, rank)
        engine.optimizer_step(batches, supervised, 1e-2)
        if step in answers_after:
            for first in range(0, len(PROMPTS), size):  # in the last pass some ranks have none
                prompts_of_rank = PROMPTS[first + rank : first + rank + 1]
                answers.append(engine.answers(generator(), prompts_of_rank, lambda: None))
    weights = gather_weights(engine.parameters, keep=True)
    # With one document in a micro-batch, the last micro-batch of the second of two ranks is empty.
    loss = held_out_loss(engine.evaluate, Documents(5), session, plan.layout)
    return answers, {key: tensor.tolist() for key, tensor in weights.items()}, loss


def with_and_without_answers(session, folder):
    """Stage -> answers of the rank, weights of the run with answers, weights of one without."""
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
        (answers, weights, weights_without_answers), (answers_of_rank_1, *_) = (
            results[stage] for results in by_rank
        )
        assert weights == weights_without_answers
        # Rank 1 has no prompt in the third batch of each of three evaluations.
        assert [len(batch) for batch in answers] == [1, 1, 1] * 3
        assert [len(batch) for batch in answers_of_rank_1] == [1, 1, 0] * 3


# Settings that change the modules which generation calls: the MLP, and the embedding and the head.
MODULE_CHANGES = [{"mlp_tiles": 3}, {"new_tokens": ["<a>"]}]


def answers_and_losses(session, folder, runs):
    """For each run, a pair: the answers after the last step, and the held-out loss."""
    results = (train(session, folder, settings, answers_after=(3,)) for settings in runs)
    return [(answers, loss) for answers, _, loss in results]


def in_order_of_prompts(results_by_rank):
    """The answers of all ranks. Prompt i was answered by rank i modulo the number of ranks."""
    answers_by_rank = [answers for answers, _ in results_by_rank]
    in_order = []
    for batches in zip(*answers_by_rank, strict=True):  # a batch of each rank
        for batch in batches:
            in_order += batch
    return in_order


def test_answers_on_one_rank_at_zero_2_equal_those_on_two_ranks_at_zero_3(tiny_model, tmp_path):
    runs = [{"batch_size": 1, "lora_dropout": 0.0, **change} for change in MODULE_CHANGES]
    # the reference: one rank, ZeRO-2, MLPs without tiles
    settings = [run | {"zero_stage": 2, "mlp_tiles": 1} for run in runs]
    on_one_rank = run_ranks(
        answers_and_losses, tiny_model, settings, tmp_path=tmp_path, world_size=1
    )
    settings = [run | {"zero_stage": 3} for run in runs]
    on_two_ranks = run_ranks(answers_and_losses, tiny_model, settings, tmp_path=tmp_path)
    for index in range(len(runs)):
        [(_, expected_loss)] = expected = [results[index] for results in on_one_rank]
        sharded = [results[index] for results in on_two_ranks]
        answers = in_order_of_prompts(expected)
        assert len(answers) == len(PROMPTS)
        assert any(answers)
        assert in_order_of_prompts(sharded) == answers
        for _, loss in sharded:
            assert loss == pytest.approx(expected_loss, rel=1e-5)


def questions_of(session, run, settings):
    """Number of questions, batches of the rank (indices of questions), and scores of a perfect run.

    Or the message, if the held-out rows are refused.
    """
    plan = make_plan(run.parent / "base", session.placement.world_size, **settings)
    try:
        questions = held_out_questions(plan, DataIndex.load(run / "data"), session)
    except UserError as error:
        return str(error)
    batches = [list(batch) for batch in questions.batches_of_rank(session.placement)]
    perfect_answers = list(enumerate(questions.expected))
    return len(questions.prompts), batches, questions.scores(perfect_answers)


def test_every_rank_gets_equally_many_batches_of_questions(tmp_path):
    run = make_run(tmp_path, rows=20)
    data = {"eval_data": str(tmp_path / "heldout.jsonl"), "output_dir": str(run)}
    settings = data | {
        "eval_generate": 17,
        "eval_regex": r"\d+",
    }  # in one batch, so rank 1 has an empty one
    (total, batches, scores), (total_1, batches_1, _) = run_ranks(
        questions_of, run, settings, tmp_path=tmp_path
    )
    assert total == total_1 == 17
    assert len(batches) == len(batches_1)
    assert sorted(index for batch in batches + batches_1 for index in batch) == [*range(17)]
    assert scores["exact_match"] == scores["regex_match"] == 1
    assert "loss" not in scores


def test_held_out_rows_without_questions_are_refused_on_all_ranks(tmp_path):
    run = make_run(tmp_path, rows=2)
    (tmp_path / "texts.jsonl").write_text('{"text": "no question"}\n')
    data = {"eval_data": str(tmp_path / "texts.jsonl"), "output_dir": str(run)}
    for message in run_ranks(questions_of, run, data | {"eval_generate": 1}, tmp_path=tmp_path):
        assert_mentions(message, "eval_generate", "eval_data")
