"""A model's chat template as a function: conversation -> text, or why there is none."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import UserError
from pipeline.rows.formats import Message, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters, from and to
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_FAULTS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatTemplate:
    """The template of a tokenizer; UserError where it has none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        try:
            self._source = tokenizer.get_chat_template()
        except ValueError:
            raise UserError(
                "model: the tokenizer has no chat template (or several and no default), which "
                "rows of conversations need; use the instruction-tuned model, add a "
                "chat_template.jinja to its folder, set chat_template: chatml, or give rows of "
                "`prompt` and `completion`"
            ) from None
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.marks_turns = _GENERATION.search(self._source) is not None

    def reads(self, key: str) -> bool:
        """Whether the template asks for a key of messages at all."""
        return re.search(rf"[.'\"]{key}\b", self._source) is not None

    def has_tools(self) -> bool:
        """Whether it speaks of tools at all."""
        return "tools" in self._source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        asks: bool = False,
    ) -> str:
        """The text of a conversation; `asks`: up to where the model is to go on."""
        return self._render(messages, tools, asks=asks)[0]

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[str, list[Span]]:
        """The text, and from where to where each {% generation %} block wrote."""
        return self._render(messages, tools)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        asks: bool = False,
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(  # annotated as str, and is a pair
                conversations=[[dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self._source,
                return_assistant_tokens_mask=self.marks_turns,
                add_generation_prompt=asks,
                **self._variables,
            )
        except TemplateSyntaxError as error:
            raise UserError(f"model: the chat template is not valid Jinja: {error}") from None
        except (TemplateError, *_FAULTS) as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from None
        texts, marks = rendered
        return texts[0], list(marks[0]) if self.marks_turns else []


def as_template_gets_it(message: Message) -> dict[str, Any]:
    """A message as templates expect it."""
    return {"role": message.role, "content": message.content, **message.others}


def chatml(tokenizer: "PreTrainedTokenizerBase") -> str:
    """ChatML whose turns end with the end-of-sequence token, often <|im_end|>.

    That is what serving engines stop at. Raises UserError where there is none.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            "chat_template: chatml: the tokenizer has no end-of-sequence token, so the model "
            "would never learn to stop; set eos_token in tokenizer_config.json"
        )
    return _CHATML


def apply_chat_template_setting(
    tokenizer: "PreTrainedTokenizerBase", setting: Literal["model", "chatml"]
) -> None:
    """Give the tokenizer ChatML where the run file says so; UserError where it has its own."""
    if setting == "model":
        return
    wanted = chatml(tokenizer)
    if tokenizer.chat_template not in (None, wanted):
        raise UserError(
            "chat_template: chatml: the model has a chat template of its own, which it was "
            "trained with; leave chat_template out"
        )
    tokenizer.chat_template = wanted
