"""Whether a rendering holds every leaf of its row (docs/masks.md has the classes of leaves)."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from json import dumps

from pipeline.data.chat.leaves import (
    REASONING_KEYS,
    TOOLS,
    Kind,
    Leaf,
    names,
    thoughts_in,
    with_fixed_texts,
)
from pipeline.data.chat.template import ChatTemplate, Rendering, Span
from pipeline.data.chat.traced import TracedSpan
from pipeline.rows.formats import Conversation, RowError

_MOST_SHAPES = 256  # remembered: the key of a long agent row is long


@dataclass(frozen=True)
class Omissions:
    """Leaves that a rendering does not hold; `thoughts`: all of a leaf, and nothing else of it."""

    lost: list[Leaf] = field(default_factory=list)
    thoughts: list[tuple[Leaf, list[str]]] = field(default_factory=list)


class Conservation:
    """Finds what a chat template omits, and refuses what it omits against its own design."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._by_design: dict[tuple[object, ...], frozenset[int]] = {}

    def omitted_thoughts(
        self, conversation: Conversation, rendering: Rendering
    ) -> dict[int, list[str]]:
        """Thoughts that the template omits by design, by message; RowError for any other loss."""
        omissions = _omissions(conversation, rendering)
        lost, omitted = omissions.lost, dict[int, list[str]]()
        by_design = self._omits_by_design(conversation) if omissions.thoughts else frozenset()
        for leaf, texts in omissions.thoughts:
            if leaf.message in by_design:
                omitted.setdefault(leaf.message, []).extend(texts)
            else:
                lost.append(leaf)
        if lost:
            is_reasoning = lost[0].kind is Kind.REASONING
            remedy = "; put it into the content as <think>...</think>" if is_reasoning else ""
            raise RowError(f"the chat template does not write {names(lost)}{remedy}")
        return omitted

    def _omits_by_design(self, conversation: Conversation) -> frozenset[int]:
        """Messages whose thoughts the template omits in every row of this shape."""
        fixed, key = with_fixed_texts(conversation)
        if key not in self._by_design:
            if len(self._by_design) >= _MOST_SHAPES:
                self._by_design.clear()
            try:
                omitted = _omissions(fixed, self._template.render(fixed)).thoughts
            except RowError:
                omitted = []
            knows_key = self._template.reads(*REASONING_KEYS)
            self._by_design[key] = frozenset(
                leaf.message for leaf, _ in omitted if knows_key or leaf.kind is Kind.CONTENT
            )
        return self._by_design[key]


def _omissions(conversation: Conversation, rendering: Rendering) -> Omissions:
    result = Omissions()
    written: list[list[TracedSpan]] = [[] for _ in rendering.leaves]
    for span in rendering.spans:
        written[span.source].append(span)
    scalars = _Scalars(rendering)
    for leaf, spans in zip(rendering.leaves, written, strict=True):
        if spans:
            scalars.position = spans[0].stop
        if leaf.kind is Kind.STRUCTURAL or _is_whole(leaf, spans):
            continue
        if not isinstance(leaf.value, str):
            is_written = scalars.is_written(leaf)
        elif leaf.kind is Kind.REASONING and not spans and leaf.value.strip():
            result.thoughts.append((leaf, [leaf.value]))
            continue
        else:
            gaps = list(_unwritten(leaf.value, spans, rendering.text))
            thoughts = _omitted_thoughts(leaf, gaps, conversation)
            if thoughts:
                result.thoughts.append((leaf, thoughts))
            is_written = not gaps or thoughts is not None
        if not is_written:
            result.lost.append(leaf)
    return result


def _is_whole(leaf: Leaf, spans: Sequence[TracedSpan]) -> bool:
    return bool(spans) and spans[0].first == 0 and spans[0].last == len(leaf.value)


def _unwritten(value: str, spans: Sequence[TracedSpan], text: str) -> Iterator[Span]:
    """Parts of a text that the template omits, except white space that is cut or replaced."""
    covered = sorted((span.first, span.last, span.start, span.stop) for span in spans)
    at = 0
    edges = [(0, 0, 0, 0), *covered, (len(value), len(value), len(text), len(text))]
    for before, after in pairwise(edges):
        at = max(at, before[1])
        if at >= after[0]:
            continue
        missing = value[at : after[0]]
        is_edge = at == 0 or after[0] == len(value)
        if not missing.isspace() or not (is_edge or _has_space(text, before[3], after[2])):
            yield at, after[0]


def _has_space(text: str, start: int, stop: int) -> bool:
    """Whether other white space, or markup, stands between two parts that are written."""
    return start < stop and not text[start:stop].isalnum()


def _omitted_thoughts(
    leaf: Leaf, gaps: Sequence[Span], conversation: Conversation
) -> list[str] | None:
    """The thoughts that are not written of a content; None where more or less is missing.

    None of them where only their tags are missing, which the template writes in its own way.
    """
    thoughts = list(thoughts_in(conversation.messages[leaf.message]))
    if leaf.kind is not Kind.CONTENT or not _are_within(gaps, thoughts, leaf.value):
        return None
    omitted, kept = [], 0
    for _, (start, stop) in thoughts:
        inner = leaf.value[start:stop]
        missing = "".join(leaf.value[max(a, start) : min(b, stop)] for a, b in gaps if a < stop)
        if _solid(missing) not in ("", _solid(inner)):
            return None
        if missing.strip():
            omitted.append(inner)
        else:
            kept += bool(inner.strip())
    return None if omitted and kept else omitted


def _are_within(gaps: Sequence[Span], thoughts: Sequence[tuple[Span, Span]], value: str) -> bool:
    """Whether all that the gaps hold lies in one of the thoughts, or is white space around one."""
    for start, stop in gaps:
        inside = [False] * (stop - start)
        for (first, last), _ in thoughts:
            for i in range(max(first, start), min(last, stop)):
                inside[i - start] = True
        outside = [value[start + i] for i, is_inside in enumerate(inside) if not is_inside]
        if outside and (not any(inside) or any(not char.isspace() for char in outside)):
            return False
    return True


def _solid(text: str) -> str:
    return "".join(text.split())


class _Scalars:
    """Numbers, true, false and null carry no spans: they must follow the leaf before them."""

    def __init__(self, rendering: Rendering) -> None:
        self._text, self._leaves = rendering.text, rendering.leaves
        self._starts = [span.start for span in rendering.spans]
        self._spans = rendering.spans
        self._tools: str | None = None
        self.position = 0  # in the text, behind the leaf before

    def is_written(self, leaf: Leaf) -> bool:
        """Whether the leaf is written behind the one before it, or among the tools."""
        spelled = {dumps(leaf.value), str(leaf.value)}
        if leaf.message == TOOLS:
            return any(form in self._around_tools for form in spelled)
        after = bisect_left(self._starts, self.position)
        limit = self._starts[after] if after < len(self._starts) else len(self._text)
        ends = [
            start + len(form)
            for form in spelled
            if (start := self._text.find(form, self.position, limit)) >= 0
        ]
        if not ends:
            return False
        self.position = min(ends)
        return True

    @property
    def _around_tools(self) -> str:
        """What the template writes between the texts of tools: templates reorder schemas."""
        if self._tools is None:
            pieces = []
            bounds = [*self._starts[1:], len(self._text)]
            for span, following in zip(self._spans, bounds, strict=True):
                if self._leaves[span.source].message == TOOLS:
                    pieces.append(self._text[span.stop : following])
            self._tools = "\n".join(pieces)
        return self._tools
