"""Assertions about messages: the facts that a user needs, not the wording.

A fact is a key, a path, a line number, a value or a remedy such as `resume: auto`. Rewording a
message therefore changes no test; dropping a fact from it fails one.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.errors import RankZeroError, UserError


def assert_mentions(message: object, *facts: object) -> None:
    """Every fact stands in the message as a whole word, whatever the case and line breaks."""
    text = re.sub(r"\s+", " ", str(message))
    missing = [fact for fact in map(str, facts) if not _has(text, fact)]
    assert not missing, f"missing {missing} in: {text}"


@contextmanager
def refused(
    *facts: object, error: type[RankZeroError] = UserError
) -> Iterator[pytest.ExceptionInfo[RankZeroError]]:
    """The body raises `error` (exit 2 by default) with a message that has these facts."""
    with pytest.raises(error) as caught:
        yield caught
    assert_mentions(caught.value, *facts)


def _has(text: str, fact: str) -> bool:
    pattern = re.sub(r"\\?\s+", r"\\s+", re.escape(fact.strip()))
    start = r"(?<!\w)" if fact[:1].isalnum() else ""
    end = r"(?!\w)" if fact[-1:].isalnum() else ""
    return re.search(f"{start}{pattern}{end}", text, re.IGNORECASE) is not None
