"""The quickstart data are reproducible and varied, and no held-out row is in the training set."""

import json

import pytest

from tests.bench.quickstart_data import make_data

pytestmark = pytest.mark.unit

KEYS = ["item", "quantity", "size", "day", "time", "delivery"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with train.jsonl and heldout.jsonl."""
    folder = tmp_path_factory.mktemp("quickstart")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def orders(folder):
    """For "train" and "heldout": customer's message -> order, the JSON object of the answer."""
    return {name: read_orders(folder / f"{name}.jsonl") for name in ("train", "heldout")}


def read_orders(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    roles = ["system", "user", "assistant"]
    assert all([message["role"] for message in chat] == roles for chat in chats)
    orders = {user["content"]: json.loads(reply["content"]) for _, user, reply in chats}
    assert len(orders) == len(lines), "two rows have the same message"
    return orders


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
    rows = set((folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines())
    other_rows = set((tmp_path / "heldout.jsonl").read_text(encoding="utf-8").splitlines())
    assert len(other_rows) == 300
    assert not rows & other_rows


def test_there_are_enough_rows_and_all_messages_differ(orders):
    train, heldout = orders["train"], orders["heldout"]
    assert len(train) >= 400
    assert len(heldout) >= 60
    assert not train.keys() & heldout.keys()


def test_no_held_out_pair_of_item_and_quantity_is_in_train(orders):
    pairs = {
        name: {(order["item"], order["quantity"]) for order in split.values()}
        for name, split in orders.items()
    }
    assert not pairs["train"] & pairs["heldout"]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_has_the_same_keys_and_values_of_the_right_types(orders, split):
    for message, order in orders[split].items():
        assert list(order) == KEYS, message
        assert isinstance(order["quantity"], int), message
        assert order["size"] in {"small", "large", None}, message
        assert isinstance(order["delivery"], bool), message


def test_the_wording_is_varied_and_short(orders):
    train = orders["train"]
    first_words = {message.split()[0].lower() for message in train}
    beginnings = {" ".join(message.lower().split()[:3]) for message in train}
    different_orders = {json.dumps(order) for order in train.values()}
    assert len(first_words) > 50
    assert len(beginnings) > 0.6 * len(train)
    assert len(different_orders) > 0.9 * len(train)
    for key in ("size", "day", "time"):  # mentioned in some messages, omitted in others
        num_omitted = sum(order[key] is None for order in train.values())
        assert 0.1 * len(train) < num_omitted < 0.6 * len(train), key
    assert max(len(message) for message in train) < 200  # characters
    # A brace would be a placeholder that was not replaced, and two spaces an empty phrase.
    assert not any("{" in message or "  " in message for message in train)
