"""No template trains any kind of conversation wrongly, and docs/masks.md says which it refuses."""

import pytest

from tests.data.chat.matrix import FAMILIES, TEMPLATES, table, written_table

pytestmark = pytest.mark.tensor


def test_every_template_is_in_the_matrix():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)


def test_every_cell_is_trained_right_or_refused_as_the_docs_say():
    assert table() == written_table(), "run `make templates`"
