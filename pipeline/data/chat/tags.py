"""Tags such as <think> and <tool_response> in a row's texts, checked in the rendered text.

A rendering has spans: characters that come from one string of the row, its leaf. All other
characters come from the template.
"""

import re

from pipeline.data.chat.leaves import Kind
from pipeline.data.chat.template import Rendering
from pipeline.rows.examples import RowError
from pipeline.rows.reasoning import closing_tag

_TAG = re.compile(r"\s*(<[A-Za-z_:]+>)")


def require_no_doubled_tag(rendering: Rendering) -> None:
    """Raise RowError if a text begins with the tag that the template has written before it.

    Rows in the style of Hermes have <tool_response> around the results of tools, and the templates
    of Qwen write it around each result.
    """
    previous_stop = 0
    for span in rendering.spans:
        leaf = rendering.leaves[span.source]
        tag = _TAG.match(rendering.text, span.start, span.stop)
        is_at_leaf_start = not str(leaf.value)[: span.first].strip()
        from_template = rendering.text[previous_stop : span.start]
        if tag and is_at_leaf_start and from_template.rstrip().endswith(tag[1]):
            raise RowError(
                f"{leaf.name} begins with {tag[1]}, and the chat template writes this tag before "
                "it, so it would be there twice; remove the tag and its closing tag from the row"
            )
        previous_stop = span.stop


def closing_tags(rendering: Rendering) -> dict[int, re.Match[str]]:
    """The first tag in the content of each message that closes reasoning, by message index."""
    tags: dict[int, re.Match[str]] = {}
    for span in rendering.spans:
        leaf = rendering.leaves[span.source]
        if leaf.kind is Kind.CONTENT and leaf.message not in tags:
            tag = closing_tag(rendering.text, span.start, span.stop)
            if tag is not None:
                tags[leaf.message] = tag
    return tags
