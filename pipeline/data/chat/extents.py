"""Positions of the messages of a conversation in the text that the chat template writes.

A rendering has spans: characters that come from one leaf, which is a string, key or scalar of the
row (leaves.py). All other characters come from the template.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.data.chat.leaves import TOOLS, Kind
from pipeline.data.chat.template import Rendering, Span
from pipeline.rows.examples import Conversation, RowError


@dataclass(frozen=True)
class Extent:
    """Position of a message in the rendered text, as character offsets."""

    start: int  # start of its first leaf
    stop: int  # end of its last leaf
    previous_stop: int  # end of the preceding message's last leaf, 0 without one
    previous_role: str | None  # role of the preceding message
    next_start: int  # start of the next message's first leaf, or end of the text


@dataclass
class MessageExtents:
    """Extents of the messages in a rendering, by message index.

    `repeated`: messages that are written twice. `interleaved`: messages between whose texts another
    message is written.
    """

    extents: dict[int, Extent] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)
    interleaved: set[int] = field(default_factory=set)


class _Run(NamedTuple):
    """Consecutive spans of one message: its index (or TOOLS), and the offsets [start, stop)."""

    message: int
    start: int
    stop: int


def locate_messages(rendering: Rendering, conversation: Conversation) -> MessageExtents:
    """Find the extent of each message. If a text is written twice, the first copy counts.

    Messages that the template omits have no extent.
    """
    result = MessageExtents()
    num_written: dict[int, int] = {}  # leaf -> number of its characters in the spans so far
    runs: list[_Run] = []
    for span in rendering.spans:
        leaf = rendering.leaves[span.source]
        if span.first < num_written.get(span.source, 0):
            if leaf.kind in (Kind.CONTENT, Kind.REASONING):
                result.repeated.add(leaf.message)
            continue
        num_written[span.source] = span.last
        if runs and runs[-1].message == leaf.message:
            runs[-1] = runs[-1]._replace(stop=span.stop)
        else:
            runs.append(_Run(leaf.message, span.start, span.stop))
    indexes: dict[int, list[int]] = {}  # message -> indexes of its runs
    for number, run in enumerate(runs):
        indexes.setdefault(run.message, []).append(number)
    for message, numbers in indexes.items():
        if message == TOOLS:
            continue
        if len(numbers) > 1:
            result.interleaved.add(message)
        first, last = numbers[0], numbers[-1]
        previous = runs[first - 1] if first > 0 else None
        previous_role = None
        if previous is not None and previous.message != TOOLS:
            previous_role = conversation.messages[previous.message].role
        result.extents[message] = Extent(
            start=runs[first].start,
            stop=runs[last].stop,
            previous_stop=previous.stop if previous is not None else 0,
            previous_role=previous_role,
            next_start=runs[last + 1].start if last + 1 < len(runs) else len(rendering.text),
        )
    return result


def require_unambiguous(message: int, located: MessageExtents) -> None:
    """Raise RowError if a message has no unique, connected span in the rendered text."""
    if message in located.repeated:
        raise RowError("the chat template writes an assistant turn more than once")
    if message in located.interleaved:
        raise RowError("the chat template mixes the texts of several messages")


def generation_blocks(rendering: Rendering, conversation: Conversation) -> dict[int, list[Span]]:
    """Spans of the {% generation %} blocks, by index of the assistant message.

    A block belongs to the message whose text it contains. A block without text of the row belongs
    to the preceding assistant message, or to the following one if the preceding message is not an
    assistant's.
    """
    spans = [span for span in rendering.spans if rendering.leaves[span.source].message != TOOLS]
    starts = [span.start for span in spans]
    blocks_by_message: dict[int, list[Span]] = {}
    for start, stop in rendering.generated:
        following = bisect_left(starts, start)  # first span that starts in or after the block
        candidates = [n for n in (following, following - 1) if 0 <= n < len(spans)]
        has_no_text = following < len(spans) and spans[following].start >= stop
        if has_no_text:
            candidates.reverse()
        for number in candidates:
            message = rendering.leaves[spans[number].source].message
            if conversation.messages[message].role == "assistant":
                blocks_by_message.setdefault(message, []).append((start, stop))
                break
    return blocks_by_message
