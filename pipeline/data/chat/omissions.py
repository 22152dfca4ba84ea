"""Check that a chat template writes every text of a row (docs/masks.md).

The strings, keys and scalars of a row are its leaves (leaves.py).
"""

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
    leaf_names,
    placeholder_of_same_shape,
    reasoning_blocks,
)
from pipeline.data.chat.template import ChatTemplate, Rendering, Span
from pipeline.data.chat.traced import TracedSpan
from pipeline.rows.examples import Conversation, RowError

_MAX_CACHED_SHAPES = 256  # limits the memory of the keys, which are long for agent rows


@dataclass(frozen=True)
class Omissions:
    """Leaves missing from a rendering.

    `lost`: leaves with missing text that is not a whole reasoning block. `reasoning`: leaves from
    which only whole reasoning blocks are missing, with the texts of these blocks.
    """

    lost: list[Leaf] = field(default_factory=list)
    reasoning: list[tuple[Leaf, list[str]]] = field(default_factory=list)


class OmissionCheck:
    """Raises RowError for a row if the chat template omits one of its leaves.

    Reasoning may be missing if the template omits it by design, that is, whatever its text is.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._by_design: dict[tuple[object, ...], frozenset[int]] = {}

    def omitted_reasoning(
        self, conversation: Conversation, rendering: Rendering
    ) -> dict[int, list[str]]:
        """Texts of the reasoning that the template omits by design, by message index.

        Raises RowError for any other omission.
        """
        omissions = _find_omissions(conversation, rendering)
        lost, omitted = omissions.lost, dict[int, list[str]]()
        by_design = self._omits_by_design(conversation) if omissions.reasoning else frozenset()
        for leaf, texts in omissions.reasoning:
            if leaf.message in by_design:
                omitted.setdefault(leaf.message, []).extend(texts)
            else:
                lost.append(leaf)
        if lost:
            raise RowError(self._loss_message(lost))
        return omitted

    def _loss_message(self, lost: Sequence[Leaf]) -> str:
        """The reason to reject a row because the template does not write these leaves."""
        if lost[0].message == TOOLS and not self._template.reads_tools:
            return (
                "the row has tools, and the chat template does not write any: describe them in the "
                "system message, or set chat_template to a template that writes tools"
            )
        is_reasoning = lost[0].kind is Kind.REASONING
        remedy = "; put it into the content as <think>...</think>" if is_reasoning else ""
        return f"the chat template does not write {leaf_names(lost)}{remedy}"

    def _omits_by_design(self, conversation: Conversation) -> frozenset[int]:
        """Indexes of the messages whose reasoning the template omits in every row of this shape."""
        fixed, key = placeholder_of_same_shape(conversation)
        if key not in self._by_design:
            if len(self._by_design) >= _MAX_CACHED_SHAPES:
                self._by_design.clear()
            try:
                omitted = _find_omissions(fixed, self._template.render(fixed)).reasoning
            except RowError:
                omitted = []
            knows_key = self._template.reads(*REASONING_KEYS)
            self._by_design[key] = frozenset(
                leaf.message for leaf, _ in omitted if knows_key or leaf.kind is Kind.CONTENT
            )
        return self._by_design[key]


def _find_omissions(conversation: Conversation, rendering: Rendering) -> Omissions:
    """Compare the leaves of a conversation with the spans of its rendering."""
    result = Omissions()
    written: list[list[TracedSpan]] = [[] for _ in rendering.leaves]
    for span in rendering.spans:
        written[span.source].append(span)
    scalars = _Scalars(rendering)
    for leaf, spans in zip(rendering.leaves, written, strict=True):
        if spans:
            scalars.position = spans[0].stop
        if leaf.kind is Kind.STRUCTURAL or _is_complete(leaf, spans):
            continue
        if not isinstance(leaf.value, str):
            is_written = scalars.is_written(leaf)
        elif leaf.kind is Kind.REASONING and not spans and leaf.value.strip():
            result.reasoning.append((leaf, [leaf.value]))
            continue
        else:
            gaps = list(_missing_parts(leaf.value, spans, rendering.text))
            blocks = _omitted_blocks(leaf, gaps, conversation)
            if blocks:
                result.reasoning.append((leaf, blocks))
            is_written = not gaps or blocks is not None
        if not is_written:
            result.lost.append(leaf)
    return result


def _is_complete(leaf: Leaf, spans: Sequence[TracedSpan]) -> bool:
    return bool(spans) and spans[0].first == 0 and spans[0].last == len(leaf.value)


def _missing_parts(value: str, spans: Sequence[TracedSpan], text: str) -> Iterator[Span]:
    """Spans of a leaf that the template omits, except white space that it strips or replaces."""
    covered = sorted((span.first, span.last, span.start, span.stop) for span in spans)
    at = 0
    edges = [(0, 0, 0, 0), *covered, (len(value), len(value), len(text), len(text))]
    for before, after in pairwise(edges):
        at = max(at, before[1])
        if at >= after[0]:
            continue
        missing = value[at : after[0]]
        is_edge = at == 0 or after[0] == len(value)
        if not missing.isspace() or not (is_edge or _is_separated(text, before[3], after[2])):
            yield at, after[0]


def _is_separated(text: str, start: int, stop: int) -> bool:
    """Whether the template writes white space or markup between two parts of a text."""
    return start < stop and not text[start:stop].isalnum()


def _omitted_blocks(
    leaf: Leaf, gaps: Sequence[Span], conversation: Conversation
) -> list[str] | None:
    """Texts of the reasoning blocks that are missing from a message's content.

    None if other text or a part of a block is missing. Empty if only the tags of blocks are
    missing, because the template writes its own tags.
    """
    blocks = list(reasoning_blocks(conversation.messages[leaf.message]))
    if leaf.kind is not Kind.CONTENT or not _are_within(gaps, blocks, leaf.value):
        return None
    omitted, kept = [], 0
    for _, (start, stop) in blocks:
        inner = leaf.value[start:stop]
        missing = "".join(leaf.value[max(a, start) : min(b, stop)] for a, b in gaps if a < stop)
        if _strip_all_space(missing) not in ("", _strip_all_space(inner)):
            return None
        if missing.strip():
            omitted.append(inner)
        else:
            kept += bool(inner.strip())
    return None if omitted and kept else omitted


def _are_within(gaps: Sequence[Span], blocks: Sequence[tuple[Span, Span]], value: str) -> bool:
    """Whether all gaps are in reasoning blocks and in the white space around them."""
    for start, stop in gaps:
        inside = [False] * (stop - start)
        for (first, last), _ in blocks:
            for i in range(max(first, start), min(last, stop)):
                inside[i - start] = True
        outside = [value[start + i] for i, is_inside in enumerate(inside) if not is_inside]
        if outside and (not any(inside) or any(not char.isspace() for char in outside)):
            return False
    return True


def _strip_all_space(text: str) -> str:
    return "".join(text.split())


class _Scalars:
    """Searches for scalars, which have no spans, in the text after the preceding leaf."""

    def __init__(self, rendering: Rendering) -> None:
        self._text, self._leaves = rendering.text, rendering.leaves
        self._starts = [span.start for span in rendering.spans]
        self._spans = rendering.spans
        self._tools: str | None = None
        self.position = 0  # offset in the text at which the preceding leaf ends

    def is_written(self, leaf: Leaf) -> bool:
        """Whether the scalar is written before the next string, or anywhere among the tools."""
        forms = {dumps(leaf.value), str(leaf.value)}  # true and True
        if leaf.message == TOOLS:
            return any(form in self._around_tools for form in forms)
        after = bisect_left(self._starts, self.position)
        limit = self._starts[after] if after < len(self._starts) else len(self._text)
        ends = [
            start + len(form)
            for form in forms
            if (start := self._text.find(form, self.position, limit)) >= 0
        ]
        if not ends:
            return False
        self.position = min(ends)
        return True

    @property
    def _around_tools(self) -> str:
        """The text after each string of the tools, joined.

        The whole text is searched, because a template may write scalars in another order.
        """
        if self._tools is None:
            texts = []
            bounds = [*self._starts[1:], len(self._text)]
            for span, following in zip(self._spans, bounds, strict=True):
                if self._leaves[span.source].message == TOOLS:
                    texts.append(self._text[span.stop : following])
            self._tools = "\n".join(texts)
        return self._tools
