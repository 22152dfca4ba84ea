"""A model's chat template as a function: conversation -> text, or why there is none."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.data.formats import Message, RowError
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """The template of a tokenizer; UserError where it has none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        try:
            self._source = tokenizer.get_chat_template()
        except ValueError:
            raise UserError(
                "model: the tokenizer has no chat template (or several and no default), which "
                "rows of `messages` need; use the instruction-tuned model, add a "
                "chat_template.jinja to its folder, or give rows of `prompt` and `completion`"
            ) from None
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.marks_turns = _GENERATION.search(self._source) is not None

    def render(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        """The text of a conversation; `asks`: up to where the model is to go on."""
        return self._render(messages, asks=asks)[0]

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where each {% generation %} block wrote."""
        return self._render(messages)

    def _render(
        self, messages: Sequence[Message], *, asks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = [{"role": m.role, "content": m.content} for m in messages]
        try:
            rendered: Any = render_jinja_template(  # annotated as str, and is a pair
                conversations=[conversation],
                chat_template=self._source,
                return_assistant_tokens_mask=self.marks_turns,
                add_generation_prompt=asks,
                **self._variables,
            )
        except TemplateSyntaxError as error:
            raise UserError(f"model: the chat template is not valid Jinja: {error}") from None
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from None
        texts, marks = rendered
        return texts[0], list(marks[0]) if self.marks_turns else []
