"""What a chat template writes around the texts of a conversation: literals and holes.

A rendering with markers in place of the texts shows the literals. The rendering of a real
conversation must then be these literals, in order and to the last character, with its own texts
in the holes; else it is not of this skeleton.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.data.chat.template import Span
from pipeline.rows.formats import RowError

_MOST_PLACES = 256  # of one hole: more means that the texts are full of the template's own marks


_Way = tuple["_Way", Span] | None  # the spans of holes, last first


@dataclass(frozen=True)
class Hole:
    """A place for the content of a message; or, not `is_content`, for what is made of its parts."""

    message: int | None  # None: the tools
    is_content: bool
    has_thought: bool = False  # in its content, which the template may leave out or rewrite


@dataclass(frozen=True)
class Skeleton:
    """H holes between H + 1 literals."""

    literals: tuple[str, ...]
    holes: tuple[Hole, ...]

    def fit(self, text: str, contents: Sequence[str]) -> list[Span] | None:
        """The span of each hole in a rendering; None where it is not of this skeleton.

        First each content has to stand in its hole as it is, but for white space around it or
        JSON's escapes; failing that, the template may have changed some. Raises RowError where
        the text can be divided in more than one way.
        """
        for is_strict in (True, False):
            found = self._divisions(text, contents, is_strict)
            if found is not None:
                return found
        return None

    def _divisions(self, text: str, contents: Sequence[str], is_strict: bool) -> list[Span] | None:
        if not text.startswith(self.literals[0]):
            return None
        # Where a hole may begin -> in how many ways (2: more than one), and the spans of one way.
        ways: dict[int, tuple[int, _Way]] = {len(self.literals[0]): (1, None)}
        for index in range(len(self.holes)):
            after: dict[int, tuple[int, _Way]] = {}
            for start, (count, way) in ways.items():
                for end in self._ends(text, start, index, contents, is_strict):
                    following = end + len(self.literals[index + 1])
                    known = after.get(following, (0, None))[0]
                    after[following] = (min(known + count, 2), (way, (start, end)))
                    if len(after) > _MOST_PLACES:
                        raise _uncertain()
            ways = after
        if len(text) not in ways:
            return None
        count, way = ways[len(text)]
        if count > 1:
            raise _uncertain()
        return _spans(way)

    def _ends(
        self, text: str, start: int, index: int, contents: Sequence[str], is_strict: bool
    ) -> Iterator[int]:
        """Where a hole that begins at `start` may end, so that its literal follows."""
        hole, literal = self.holes[index], self.literals[index + 1]
        is_last = index + 1 == len(self.holes)
        if hole.is_content and hole.message is not None:
            for said in variants(contents[hole.message], hole.has_thought):
                end = start + len(said)
                if text.startswith(said, start) and text.startswith(literal, end):
                    yield end
                    return
            if is_strict and not hole.has_thought:
                return
        if is_last:
            if text.endswith(literal) and start <= len(text) - len(literal):
                yield len(text) - len(literal)
        else:
            end = text.find(literal, start)
            while end >= 0:
                yield end
                end = text.find(literal, end + 1)


def _spans(way: "_Way") -> list[Span]:
    found: list[Span] = []
    while way is not None:
        way, span = way
        found.append(span)
    return found[::-1]


def variants(content: str, has_thought: bool = False) -> Iterator[str]:
    """How a template may write a content: as it is, stripped, as JSON's text, without thought."""
    yield content
    yield content.strip()
    yield json.dumps(content, ensure_ascii=False)[1:-1]
    if has_thought:
        answer = content.rpartition("</think>")[2]
        yield answer
        yield answer.lstrip("\n")
        yield answer.strip()


def _uncertain() -> RowError:
    return RowError(
        "a message holds what the chat template writes between messages, so which tokens a turn "
        "owns is not certain"
    )
