"""Literals and holes against texts."""

import pytest

from pipeline.data.chat.skeleton import Hole, Skeleton
from pipeline.rows.formats import RowError

pytestmark = pytest.mark.tensor

TWO = Skeleton(("[", "|", "]"), (Hole(0, is_content=True), Hole(1, is_content=True)))


def fit(text, *contents):
    spans = TWO.fit(text, contents)
    return spans and [text[start:end] for start, end in spans]


def test_contents_stand_as_they_are_stripped_or_as_json():
    assert fit("[a|b]", "a", "b") == ["a", "b"]
    assert fit("[a|b|c]", "a|b", "c") == ["a|b", "c"]
    assert fit("[a|b|c]", " a|b ", "c") == ["a|b", "c"]
    assert fit("[a|b\\n|c]", "a|b\n", "c") == ["a|b\\n", "c"]
    assert fit("[ a|b]", " a", "b") == [" a", "b"]


def test_to_the_last_character():
    for text in ("[a|b]!", "[a|b", "a|b]", "[ab]", ""):
        assert fit(text, "a", "b") is None
    assert TWO.fit("[]", ["", ""]) is None


def test_a_changed_content_is_found_by_what_is_around_it():
    assert fit("[A|b]", "a", "b") == ["A", "b"]
    assert fit("[|]", "a", "b") == ["", ""]


def test_more_than_one_division_is_refused():
    with pytest.raises(RowError, match="not certain"):
        fit("[A|b|C]", "a|b", "c")
    with pytest.raises(RowError, match="not certain"):
        fit(f"[{'|' * 1000}]", "a", "b")
