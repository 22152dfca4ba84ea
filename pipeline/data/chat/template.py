"""ChatTemplate: renders a conversation as text and records the origin of each character."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.chat.leaves import (
    PLACEHOLDER_TOOL,
    REASONING_KEYS,
    Kind,
    Leaf,
    Style,
    placeholder,
    trace,
)
from pipeline.data.chat.traced import GENERATED, TracedSpan, make_environment, spans_of
from pipeline.errors import UserError
from pipeline.rows.examples import Conversation, RowError

if TYPE_CHECKING:
    from jinja2.nodes import Template
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, stop)
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PLACEHOLDER = "placeholder"
# Errors of a template's expressions, apart from Jinja's own.
_ERRORS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
# Variables whose values `_render` sets, so that chat_template_kwargs cannot.
_SET_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
# Forms of tool calls that `call_style` tries; it prefers the earlier ones.
_CALL_STYLES = [
    Style(content, ids) for ids in ("given", "short", "named") for content in ("", None)
]
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Rendering:
    """A conversation as text, with its leaves and their spans.

    A leaf is a string, key or scalar of the row. `spans`: spans of the text that come from a leaf,
    sorted by their start. `generated`: spans of the {% generation %} blocks.
    """

    text: str
    leaves: list[Leaf]
    spans: list[TracedSpan]
    generated: list[Span]


class ChatTemplate:
    """A chat template in Jinja.

    `variables`: values for the template's variables other than messages and tools. `needs_tools`:
    the template is only for conversations with tools, so placeholder conversations get one.
    `marks_turns`: the template has {% generation %} blocks, which enclose what the model generates.
    """

    def __init__(
        self, source: str, variables: Mapping[str, Any], *, needs_tools: bool = False
    ) -> None:
        from jinja2 import TemplateSyntaxError

        self._variables, self._needs_tools = variables, needs_tools
        environment = make_environment()
        try:
            self._template = environment.from_string(source)
            self._tree = environment.parse(source)
        except TemplateSyntaxError as error:
            raise UserError(f"model: the chat template is not valid Jinja: {error}") from None
        self._undefined: Any = environment.undefined
        self._keys = _keys_read(self._tree)
        self.marks_turns = _GENERATION.search(source) is not None

    def reads(self, *keys: str) -> bool:
        """Whether the template reads one of these keys from any object."""
        return not self._keys.isdisjoint(keys)

    @cached_property
    def reads_tools(self) -> bool:
        """Whether the template reads the variable `tools`."""
        from jinja2.meta import find_undeclared_variables

        return "tools" in find_undeclared_variables(self._tree)

    def render(
        self, conversation: Conversation, *, add_generation_prompt: bool = False
    ) -> Rendering:
        """Render a conversation. Raises RowError if the template raises an error."""
        others = [message.others for message in conversation.messages]
        has_calls = any(keys.get("tool_calls") for keys in others)
        style = self.call_style if has_calls else Style()
        if any(keys.get(name) for keys in others for name in REASONING_KEYS):
            style = replace(style, has_reasoning_parts=self._has_reasoning_parts)
        return self._render(conversation, style, add_generation_prompt)

    def with_blank_spans(self, conversation: Conversation, rendering: Rendering) -> Rendering:
        """The rendering with an empty span for the content of each message without content.

        Such content has no characters to trace. Its position is found in another rendering, which
        has a placeholder for it. If the two renderings differ in anything else, the given one is
        returned unchanged.
        """
        messages = conversation.messages
        blank = {i for i, m in enumerate(messages) if m.role != "assistant" and not m.content}
        if not blank:
            return rendering
        filled = tuple(
            replace(m, content=_PLACEHOLDER) if i in blank else m for i, m in enumerate(messages)
        )
        try:
            other = self.render(replace(conversation, messages=filled))
        except RowError:
            return rendering
        # The other text without its placeholders, and its spans at their offsets there.
        text, spans = "", list[TracedSpan]()
        stop = 0  # up to here the other text has been copied
        for span in other.spans:
            leaf = other.leaves[span.source]
            start = len(text) + span.start - stop
            size = span.stop - span.start
            if leaf.message in blank and leaf.kind is Kind.CONTENT:
                text += other.text[stop : span.start]
                stop, size = span.stop, 0
            spans.append(span._replace(start=start, stop=start + size))
        if text + other.text[stop:] != rendering.text:
            return rendering
        return replace(rendering, leaves=other.leaves, spans=spans)

    @cached_property
    def call_style(self) -> Style:
        """The first style for which the template writes the name and the arguments of a call."""
        for style in _CALL_STYLES:
            for roles in (("user", "call", "tool", "assistant"), ("user", "call", "tool")):
                try:
                    rendering = self._render(
                        placeholder(*roles), style, add_generation_prompt=False
                    )
                except RowError:
                    continue
                paths = {rendering.leaves[span.source].path for span in rendering.spans}
                keys_in_calls = {path[-1] for path in paths if "tool_calls" in path}
                if {"name", "word"} <= keys_in_calls:  # `word`: the placeholder's only argument
                    return style
        return Style()

    @cached_property
    def _has_reasoning_parts(self) -> bool:
        """Whether the template writes reasoning only if it is a part of the content."""
        question, answer = placeholder("user", "assistant").messages
        thinking = replace(answer, others={"reasoning_content": "thought"})
        try:
            plain = self._render(Conversation((question, answer)), Style(), False).text
        except RowError:
            return False

        def writes_reasoning(style: Style) -> bool:
            try:
                rendering = self._render(Conversation((question, thinking)), style, False)
            except RowError:
                return False
            kinds = {rendering.leaves[span.source].kind for span in rendering.spans}
            # A template that does not know such parts may write them as JSON or repr.
            is_dumped = rendering.text.count("type") > plain.count("type")
            return {Kind.CONTENT, Kind.REASONING} <= kinds and not is_dumped

        if writes_reasoning(Style(has_reasoning_parts=False)):
            return False
        return writes_reasoning(Style(has_reasoning_parts=True))

    def _render(
        self, conversation: Conversation, style: Style, add_generation_prompt: bool
    ) -> Rendering:
        """Render a conversation in this style. Raises RowError if the template raises an error."""
        from jinja2 import TemplateError

        if self._needs_tools and not conversation.tools:
            conversation = replace(conversation, tools=(PLACEHOLDER_TOOL,))
        traced = trace(conversation, style)
        self._undefined.path_of = staticmethod(traced.path_of)
        try:
            text = self._template.render(
                messages=traced.messages,
                tools=traced.tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (TemplateError, *_ERRORS) as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from None
        spans = sorted(span for span in spans_of(text) if span.start < span.stop)
        return Rendering(
            text=str.__str__(text),
            leaves=traced.leaves,
            spans=[span for span in spans if span.source != GENERATED],
            generated=[span[:2] for span in spans if span.source == GENERATED],
        )


def _keys_read(tree: "Template") -> set[str]:
    """Keys in expressions such as message.key, message['key'] and message.get('key').

    The first argument of every call counts as a key.
    """
    from jinja2.nodes import Call, Const, Getattr, Getitem

    keys = {node.attr for node in tree.find_all(Getattr)}
    named = [node.arg for node in tree.find_all(Getitem)]
    named += [node.args[0] for node in tree.find_all(Call) if node.args]
    return keys | {node.value for node in named if isinstance(node, Const)}


def load_template(
    tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any], *, has_tools: bool
) -> ChatTemplate:
    """The tokenizer's chat template; for rows with tools its `tool_use` template, if it has one.

    Raises UserError if the tokenizer has no template.
    """
    try:
        source = tokenizer.get_chat_template(tools=[] if has_tools else None)
    except ValueError:
        raise UserError(
            "model: the tokenizer has no chat template (or several and no default), which "
            "rows of conversations need; use the instruction-tuned model, set chat_template: "
            "FILE.jinja or chat_template: chatml, or give rows of `prompt` and `completion`"
        ) from None
    _require_read(source, kwargs, tokenizer.special_tokens_map)
    variables = {**tokenizer.special_tokens_map, **kwargs}
    return ChatTemplate(source, variables, needs_tools=has_tools)


def _require_read(source: str, kwargs: Mapping[str, Any], special_tokens: Collection[str]) -> None:
    """Raise UserError for a key of chat_template_kwargs that the template does not read."""
    from jinja2 import TemplateSyntaxError
    from jinja2.meta import find_undeclared_variables

    if not kwargs:
        return
    environment = make_environment()
    try:
        known = find_undeclared_variables(environment.parse(source))
    except TemplateSyntaxError as error:
        raise UserError(f"model: the chat template is not valid Jinja: {error}") from None
    known -= {*_SET_VARIABLES, *environment.globals, *special_tokens}
    if unread := sorted({*kwargs} - known):
        raise UserError(
            f"chat_template_kwargs: the chat template does not read {', '.join(unread)}; it "
            f"reads {', '.join(sorted(known)) or 'nothing except messages and tools'}"
        )


def require_generation_prompt(template: ChatTemplate) -> None:
    """Raise UserError for a file whose template writes an answer's header only with the answer.

    Servers end a prompt with the text that the template adds for add_generation_prompt. A header
    that is missing or different there, such as `<|assistant|>`, is neither in the prompt nor
    trained.
    """
    question, answer = placeholder("user"), placeholder("user", "assistant")
    try:
        prompt = template.render(question, add_generation_prompt=True).text
        without_prompt = template.render(question).text
        text = template.render(answer).text
    except RowError:
        return  # for example, it needs a system message
    is_prompt_added = prompt != without_prompt
    before_answer = text[: max(text.find(answer.messages[1].content), 0)]
    if is_prompt_added and _headers_differ(without_prompt, prompt, before_answer):
        raise UserError(
            f"chat_template: before an answer the template writes "
            f"{before_answer.splitlines()[-1]!r}, but if add_generation_prompt is true, it writes "
            f"{prompt.splitlines()[-1]!r}; a server would write the second, which the model never "
            "sees in training; write the same header in both places"
        )
    header = before_answer.removeprefix(prompt).strip()
    is_refused = before_answer.startswith(prompt) and header and not is_prompt_added
    if is_refused and not template.marks_turns:
        raise UserError(
            f"chat_template: the template writes {header!r} before an answer, but not at the end "
            "of the prompt if add_generation_prompt is true; a server would not write it, and the "
            "model would not learn to write it; add {%- if add_generation_prompt %}...{% endif %}"
        )


def _headers_differ(without_prompt: str, prompt: str, before_answer: str) -> bool:
    """Whether a prompt ends with another header than the text before an answer.

    `without_prompt`: the same prompt without the header. The headers may differ after a part that
    they share, such as the tag of the role, because templates write other tags for reasoning.
    """
    length = common_prefix_length(prompt, before_answer)
    if length in (len(prompt), len(before_answer)):  # one continues the other
        return False
    tag = prompt.rfind("<", 0, length)
    if tag > prompt.rfind(">", 0, length):  # they differ within a tag
        length = tag
    elif prompt[length].isalpha() and before_answer[length].isalpha():
        return True
    return before_answer.startswith(without_prompt) and length <= len(without_prompt)


def chatml(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A ChatML template whose turns end with the tokenizer's end-of-sequence token.

    Inference servers stop at that token, which is often <|im_end|>. Raises UserError if the
    tokenizer has none.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            "chat_template: chatml: the tokenizer has no end-of-sequence token, so the model "
            "would never learn to stop; set eos_token in tokenizer_config.json"
        )
    return _CHATML


def apply_chat_template_setting(tokenizer: "PreTrainedTokenizerBase", setting: str) -> None:
    """Set the chat template of the run file on the tokenizer.

    Raises UserError if `chatml` would replace a template of the model.
    """
    if setting == "model":
        return
    if setting != "chatml":
        tokenizer.chat_template = read_template(setting)
        return
    template = chatml(tokenizer)
    if tokenizer.chat_template not in (None, template):
        raise UserError(
            "chat_template: chatml: the model has a chat template of its own, which it was "
            "trained with; leave chat_template out, or name a file"
        )
    tokenizer.chat_template = template


def read_template(path: str) -> str:
    """The text of a template file. Raises UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat_template: {path}: cannot be read as UTF-8 text ({error}); give `model`, "
            "`chatml` or a Jinja file"
        ) from None


def common_prefix_length(text: str, other_text: str) -> int:
    """Number of characters with which both texts begin."""
    for i, (char, other_char) in enumerate(zip(text, other_text, strict=False)):
        if char != other_char:
            return i
    return min(len(text), len(other_text))
