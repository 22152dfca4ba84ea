"""Assertions about the facts in a message, independent of its wording.

A fact is a key, a path, a line number, a value or a remedy such as `resume: auto`. Rewording a
message therefore changes no test; dropping a fact from it fails one.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.errors import RankZeroError, UserError


def assert_mentions(message: object, *facts: object) -> None:
    """Assert that the message has every fact as a whole word; case and line breaks are ignored."""
    text = re.sub(r"\s+", " ", str(message))
    missing = [fact for fact in map(str, facts) if not _has_fact(text, fact)]
    assert not missing, f"missing {missing} in: {text}"


@contextmanager
def refused(
    *facts: object, error: type[RankZeroError] = UserError
) -> Iterator[pytest.ExceptionInfo[RankZeroError]]:
    """Assert that the body raises `error` (default: UserError) with these facts in its message."""
    with pytest.raises(error) as caught:
        yield caught
    assert_mentions(caught.value, *facts)


def _has_fact(text: str, fact: str) -> bool:
    # re.escape puts a backslash before each space of the fact.
    pattern = re.sub(r"\\?\s+", r"\\s+", re.escape(fact.strip()))
    no_word_before = r"(?<!\w)" if fact[:1].isalnum() else ""
    no_word_after = r"(?!\w)" if fact[-1:].isalnum() else ""
    return re.search(f"{no_word_before}{pattern}{no_word_after}", text, re.IGNORECASE) is not None
