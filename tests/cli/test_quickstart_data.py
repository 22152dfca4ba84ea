"""The quickstart data are reproducible and varied, and no held-out row is in the training set."""

import json

import pytest

from tests.bench.quickstart_data import make_data

pytestmark = pytest.mark.unit

KEYS = ["item", "quantity", "size", "day", "time", "delivery"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    def read(name):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        chats = [json.loads(line)["messages"] for line in lines]
        roles = ["system", "user", "assistant"]
        assert all([m["role"] for m in chat] == roles for chat in chats)
        return {user["content"]: json.loads(reply["content"]) for _, user, reply in chats}, len(
            lines
        )

    return {name: read(f"{name}.jsonl") for name in ("train", "heldout")}


def test_data_is_reproducible_and_an_unchanged_file_is_not_rewritten(folder, tmp_path):
    make_data(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["heldout.jsonl", "train.jsonl"]
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    make_data(tmp_path)
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in names}


def test_another_seed_gives_other_held_out_rows_and_the_same_training_rows(folder, tmp_path):
    make_data(tmp_path, heldout_seed=8, num_heldout=300)
    assert (tmp_path / "train.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()
    ours = set((folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines())
    fresh = (tmp_path / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(set(fresh)) == 300
    assert not ours & set(fresh)


def test_there_are_enough_rows_and_all_messages_differ(rows):
    (train, num_train), (heldout, num_heldout) = rows["train"], rows["heldout"]
    assert (len(train), len(heldout)) == (num_train, num_heldout)  # all messages differ
    assert num_train >= 400
    assert num_heldout >= 60
    assert not train.keys() & heldout.keys()


def test_no_held_out_pair_of_item_and_quantity_is_in_train(rows):
    pairs = [
        {(facts["item"], facts["quantity"]) for facts in part.values()} for part, _ in rows.values()
    ]
    assert not pairs[0] & pairs[1]


def test_every_answer_has_the_same_keys_and_values_of_the_right_types(rows):
    for part, _ in rows.values():
        for text, facts in part.items():
            assert list(facts) == KEYS, text
            assert isinstance(facts["quantity"], int), text
            assert facts["size"] in {"small", "large", None}, text
            assert isinstance(facts["delivery"], bool), text


def test_the_wording_is_varied_and_short(rows):
    train, num_train = rows["train"]
    assert len({text.split()[0].lower() for text in train}) > 50
    assert len({" ".join(text.lower().split()[:3]) for text in train}) > 0.6 * num_train
    assert len({json.dumps(facts) for facts in train.values()}) > 0.9 * num_train
    for key in ("size", "day", "time"):  # mentioned in some messages, omitted in others
        omitted = sum(facts[key] is None for facts in train.values())
        assert 0.1 * num_train < omitted < 0.6 * num_train, key
    assert max(len(text) for text in train) < 200
    assert not any("{" in text or "  " in text for text in train)
