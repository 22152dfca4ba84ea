"""Check that a chat template writes every text of a row (docs/masks.md).

The strings, keys and scalars of a row are its leaves (leaves.py). A rendering has spans, which map
its characters to characters of leaves (traced.py).
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from json import dumps
from operator import attrgetter

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

_MAX_CACHED_SHAPES = 256  # the keys are long for rows with many messages, and take memory


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

    Reasoning may be missing if the template also omits it in a placeholder conversation of the same
    shape. The template then omits it by design, such as the reasoning of all turns but the last.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        # Shape of a conversation -> indexes of the messages whose reasoning is omitted by design.
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
        placeholder, shape = placeholder_of_same_shape(conversation)
        if shape not in self._by_design:
            if len(self._by_design) >= _MAX_CACHED_SHAPES:
                self._by_design.clear()
            try:
                rendering = self._template.render(placeholder)
                omitted = _find_omissions(placeholder, rendering).reasoning
            except RowError:
                omitted = []
            # A template that reads no reasoning key omits such texts because it does not know them.
            knows_reasoning = self._template.reads(*REASONING_KEYS)
            self._by_design[shape] = frozenset(
                leaf.message for leaf, _ in omitted if knows_reasoning or leaf.kind is Kind.CONTENT
            )
        return self._by_design[shape]


def _find_omissions(conversation: Conversation, rendering: Rendering) -> Omissions:
    """Compare the leaves of a conversation with the spans of its rendering."""
    result = Omissions()
    spans_of_leaves: list[list[TracedSpan]] = [[] for _ in rendering.leaves]
    for span in rendering.spans:
        spans_of_leaves[span.source].append(span)
    scalars = _Scalars(rendering)
    for leaf, spans in zip(rendering.leaves, spans_of_leaves, strict=True):
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
            gaps = list(_missing_spans(leaf.value, spans, rendering.text))
            blocks = _omitted_blocks(leaf, gaps, conversation)
            if blocks:
                result.reasoning.append((leaf, blocks))
            is_written = not gaps or blocks is not None
        if not is_written:
            result.lost.append(leaf)
    return result


def _is_complete(leaf: Leaf, spans: Sequence[TracedSpan]) -> bool:
    """Whether the first span of a leaf covers the whole leaf."""
    return bool(spans) and spans[0].first == 0 and spans[0].last == len(leaf.value)


def _missing_spans(value: str, spans: Sequence[TracedSpan], text: str) -> Iterator[Span]:
    """Spans of a leaf that the template omits, except white space that it strips or replaces.

    `value`: the leaf. `spans`: those of `text` that come from this leaf.
    """
    in_order = sorted(spans, key=attrgetter("first", "last", "start", "stop"))
    begin = TracedSpan(start=0, stop=0, source=0, first=0, last=0)
    end = TracedSpan(len(text), len(text), source=0, first=len(value), last=len(value))
    covered = 0  # the leaf has been compared up to this character
    for before, after in pairwise([begin, *in_order, end]):
        covered = max(covered, before.last)
        if covered >= after.first:
            continue
        is_space = value[covered : after.first].isspace()
        is_stripped = covered == 0 or after.first == len(value)
        between = text[before.stop : after.start]
        is_replaced = bool(between) and not between.isalnum()  # by white space or markup
        if not (is_space and (is_stripped or is_replaced)):
            yield covered, after.first


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
    omitted, is_any_written = [], False
    for _, (start, stop) in blocks:  # without tags
        reasoning = leaf.value[start:stop]
        missing = "".join(
            leaf.value[max(gap_start, start) : min(gap_stop, stop)]
            for gap_start, gap_stop in gaps
            if gap_start < stop
        )
        if _without_space(missing) not in ("", _without_space(reasoning)):
            return None
        if missing.strip():
            omitted.append(reasoning)
        elif reasoning.strip():
            is_any_written = True
    return None if omitted and is_any_written else omitted


def _are_within(gaps: Sequence[Span], blocks: Sequence[tuple[Span, Span]], value: str) -> bool:
    """Whether each gap has characters of reasoning blocks, and otherwise only white space."""
    for start, stop in gaps:
        outside, position = "", start
        for (first, last), _ in blocks:
            if first < stop and last > start:
                outside += value[position:first]
                position = min(last, stop)
        outside += value[position:stop]
        if outside.strip() or len(outside) == stop - start:
            return False
    return True


def _without_space(text: str) -> str:
    return "".join(text.split())


class _Scalars:
    """Searches for numbers, booleans and null, which have no spans, after the preceding leaf."""

    def __init__(self, rendering: Rendering) -> None:
        self._text, self._leaves = rendering.text, rendering.leaves
        self._starts = [span.start for span in rendering.spans]
        self._spans = rendering.spans
        self._tools: str | None = None
        self.position = 0  # offset in the text at which the preceding leaf ends

    def is_written(self, leaf: Leaf) -> bool:
        """Whether a scalar is written before the next string; moves `position` behind it.

        A scalar of a tool definition may be written anywhere among the tools.
        """
        forms = {dumps(leaf.value), str(leaf.value)}  # such as true and True
        if leaf.message == TOOLS:
            return any(form in self._around_tools for form in forms)
        following = bisect_left(self._starts, self.position)
        limit = self._starts[following] if following < len(self._starts) else len(self._text)
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
        """The text after each string of the tool definitions, up to the next string, joined.

        A template may write the scalars of a definition in another order than the row.
        """
        if self._tools is None:
            texts = []
            bounds = [*self._starts[1:], len(self._text)]
            for span, following in zip(self._spans, bounds, strict=True):
                if self._leaves[span.source].message == TOOLS:
                    texts.append(self._text[span.stop : following])
            self._tools = "\n".join(texts)
        return self._tools
