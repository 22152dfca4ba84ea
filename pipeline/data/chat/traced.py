"""Traced: strings that record their origin in the row, and the Jinja environment for them.

A `Traced` string has the same methods and results as `str`. It also has spans, which map its
characters to characters in strings of the row. A method of `str` that is not overridden here
returns the text without spans. The row is then rejected, because the origin of the text is unknown.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

if TYPE_CHECKING:
    from jinja2 import Environment

GENERATED = -1  # `source` of spans that mark the text of a {% generation %} block
_JSON_OR_REPR_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'')


class TracedSpan(NamedTuple):
    """Characters [start, stop) of a string, which come from characters [first, last) of a source.

    `source`: index of a leaf, which is one string or scalar of the row (leaves.py), or GENERATED.
    """

    start: int
    stop: int
    source: int
    first: int
    last: int


class Traced(str):
    """A string with spans for the characters whose source is known."""

    __slots__ = ("_spans",)
    _spans: tuple[TracedSpan, ...]  # the _ hides it from templates, which Jinja sandboxes

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return join_traced((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return join_traced((other, self)) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        text = str.__getitem__(self, key)
        if not isinstance(key, slice):
            start = key.__index__()
            start += len(self) if start < 0 else 0
            return self._slice(start, start + 1)
        start, stop, step = key.indices(len(self))
        return self._slice(start, max(start, stop)) if step == 1 else text

    def __iter__(self) -> Iterator[str]:
        return (self._slice(i, i + 1) for i in range(len(self)))

    def strip(self, chars: str | None = None, /) -> str:
        start = len(self) - len(str.lstrip(self, chars))
        return self._slice(start, start + len(str.strip(self, chars)))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._slice(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._slice(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self._slice(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        return self._slice(0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._locate(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._locate(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._locate(str.splitlines(self, keepends=True))
        if keepends:
            return lines
        without_ends = str.splitlines(self)
        return [line[: len(text)] for line, text in zip(lines, without_ends, strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, separator, after = self._locate(str.partition(self, sep))
        return before, separator, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        start = len(self) - len(str.rpartition(self, sep)[2])
        middle = start - len(sep) if sep in self else 0
        return self._slice(0, middle), self._slice(middle, start), self._slice(start, len(self))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """`str.replace`; a replacement gets the source of the characters that it replaces."""
        if not old:
            return str.replace(self, old, new, count)
        pieces: list[str] = []
        copied, num_left = 0, count.__index__()  # characters; replacements, -1 for all
        while num_left and (start := self.find(old, copied)) >= 0:
            stop = start + len(old)
            pieces += [self._slice(copied, start), _with_spans_of(self._slice(start, stop), new)]
            copied, num_left = stop, num_left - 1
        return join_traced((*pieces, self._slice(copied, len(self))))

    def join(self, parts: Iterable[str], /) -> str:
        return _join(self, parts)

    def upper(self) -> str:
        return _with_spans_of(self, str.upper(self))

    def lower(self) -> str:
        return _with_spans_of(self, str.lower(self))

    def title(self) -> str:
        return _with_spans_of(self, str.title(self))

    def capitalize(self) -> str:
        return _with_spans_of(self, str.capitalize(self))

    def _slice(self, start: int, stop: int) -> str:
        """The characters [start, stop) with their spans."""
        text = str.__getitem__(self, slice(start, stop))
        if start <= 0 and stop >= len(self):
            return self
        spans = [_overlap(span, start, stop) for span in self._spans]
        return with_spans(text, [span for span in spans if span.start < span.stop])

    def _locate(self, parts: Sequence[str], sep: str | None = None) -> list[str]:
        """Add spans to substrings of this string, which `parts` has in their order.

        `sep`: text between two substrings.
        """
        substrings, position = [], 0
        for part in parts:
            start = self.index(part, position)
            stop = start + len(part)
            substrings.append(self._slice(start, stop))
            position = stop + len(sep or "")
        return substrings


class Arguments(dict[str, Any]):
    """Arguments of a tool call: a dict that becomes JSON text if a template concatenates it."""

    def __str__(self) -> str:
        return _trace_strings(json.dumps(self, ensure_ascii=False), self)

    def __add__(self, other: str) -> str:
        return join_traced((str(self), other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return join_traced((other, str(self))) if isinstance(other, str) else NotImplemented


def with_spans(text: str, spans: Iterable[TracedSpan]) -> str:
    """A `Traced` string with these spans, or a `str` if there are none."""
    all_spans = tuple(spans)
    if not all_spans:
        return str.__str__(text)
    result = Traced(text)
    result._spans = all_spans
    return result


def traced_from(text: str, source: int) -> str:
    """A `Traced` string that comes entirely from one source."""
    return with_spans(text, (TracedSpan(0, len(text), source, 0, len(text)),) if text else ())


def spans_of(text: str) -> tuple[TracedSpan, ...]:
    """The spans of a string; none for a `str`."""
    return text._spans if isinstance(text, Traced) else ()


def join_traced(parts: Iterable[str]) -> str:
    """`"".join` that keeps the spans."""
    pieces = list(parts)
    spans: list[TracedSpan] = []
    start = 0
    for piece in pieces:
        if type(piece) is Traced:
            spans += _shift(piece._spans, start) if start else piece._spans
        start += len(piece)
    return with_spans("".join(pieces), spans)


def make_environment() -> "Environment":
    """The Jinja environment of transformers for chat templates, modified to preserve spans.

    Modified are: the operator ~, which concatenates; {% generation %} blocks, which become spans
    with the source GENERATED; the filters `tojson`, `join` and `string`; `', '.join(...)`; and the
    message of an error about a missing key.
    """
    from jinja2.compiler import CodeGenerator, Frame
    from jinja2.ext import Extension
    from jinja2.nodes import CallBlock, Concat, Node
    from jinja2.parser import Parser
    from transformers.utils.chat_template_utils import _compile_jinja_template

    class TracingCodeGenerator(CodeGenerator):
        # Jinja's own code for `a ~ b` calls "".join, which drops the spans.
        def visit_Concat(self, node: Concat, frame: Frame) -> None:  # noqa: N802 - Jinja's name
            self.write("environment.concat(map(environment.finalize, (")
            for child in node.nodes:
                self.visit(child, frame)
                self.write(", ")
            self.write(")))")

    class GenerationBlock(Extension):
        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it
        priority = 1000  # after the extension of transformers, so that this one replaces it

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            text = caller()
            return with_spans(text, (*spans_of(text), TracedSpan(0, len(text), GENERATED, 0, 0)))

    # An empty template, compiled only to get the environment of transformers.
    original: Any = _compile_jinja_template("{# empty #}").environment

    missing = _missing_class(original.undefined)
    environment: Any = original.overlay(
        extensions=[GenerationBlock], finalize=_as_text, undefined=missing
    )
    to_json, call = environment.filters["tojson"], environment.call

    def traced_json(value: Any, *arguments: Any, **named: Any) -> str:
        if isinstance(value, missing):
            value._fail_with_undefined_error()
        text: str = to_json(value, *arguments, **named)
        is_sorted = named.get("sort_keys", len(arguments) > 3 and arguments[3])
        return _trace_strings(text, value, is_sorted=bool(is_sorted))

    # The parameters have the names that Jinja gives them; `d` is the separator.
    def traced_join(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        parts = value if attribute is None else [item[attribute] for item in value]
        return _join(d, map(_as_text, parts))

    def traced_call(context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        """Call a function, but with a `str.join` that preserves spans, as in `', '.join(...)`."""
        text = getattr(function, "__self__", None)
        if type(text) is str and function.__name__ == "join":
            return _join(text, *arguments)
        return call(context, function, *arguments, **named)

    environment.code_generator_class = TracingCodeGenerator
    environment.concat = join_traced
    environment.call = traced_call
    environment.filters = {
        **environment.filters,
        "tojson": traced_json,
        "join": traced_join,
        "string": _as_text,
    }
    return environment  # type: ignore[no-any-return]


def _missing_class(base: Any) -> Any:
    """A class of undefined values for Jinja, whose errors name the missing key.

    `base`: the environment's class of undefined values.
    """

    class Missing(base):  # type: ignore[misc]
        """A key that a template reads but an object of the row does not have.

        The error names the path of that object, such as tools[0].function. `path_of` finds it;
        template.py sets `path_of` for each row.
        """

        path_of: Callable[[object], str] = staticmethod(lambda value: "")

        @property
        def _undefined_message(self) -> str:
            path = type(self).path_of(self._undefined_obj)
            return f"{path} has no {self._undefined_name}" if path else super()._undefined_message

    return Missing


def _join(separator: str, parts: Iterable[str]) -> str:
    """`separator.join(parts)` that keeps the spans."""
    pieces: list[str] = []
    for part in parts:
        pieces += [separator, part] if pieces else [part]
    return join_traced(pieces)


def _as_text(value: Any) -> str:
    """The text that Jinja writes for a value, with spans."""
    text = str(value)
    return _trace_strings(text, value) if type(value) in (dict, list, tuple) else text


def _trace_strings(text: str, value: Any, *, is_sorted: bool = False) -> str:
    """Add spans to `text`, the JSON or Python repr of a value that contains traced strings.

    `is_sorted`: the keys of mappings are sorted in `text`.
    """
    strings = list(_strings_in(value, is_sorted))
    matches = list(_JSON_OR_REPR_STRING.finditer(text))
    if len(matches) != len(strings):
        return text
    spans: list[TracedSpan] = []
    for match, source in zip(matches, strings, strict=True):
        if source_spans := spans_of(source):
            start, stop = match.start() + 1, match.end() - 1
            if stop - start == len(source):  # nothing is escaped
                spans += _shift(source_spans, start)
            else:
                spans += _escaped_spans(source, source_spans, text[start:stop], start)
    return with_spans(text, spans)


def _strings_in(value: Any, is_sorted: bool) -> Iterator[str]:
    """The strings and keys in a value, in the order in which JSON and repr write them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value) if is_sorted else value:
            yield key if isinstance(key, str) else str(key)
            yield from _strings_in(value[key], is_sorted)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings_in(item, is_sorted)


def _escaped_spans(
    source: str, spans: Sequence[TracedSpan], escaped: str, offset: int
) -> Iterator[TracedSpan]:
    """Spans of `escaped`, which is `source` with escapes.

    `spans`: those of `source`. `offset`: start of `escaped` in the whole text. A single span over
    all of `source` covers all of `escaped`. Other spans are kept only if the escapes are those of
    JSON.
    """
    if len(spans) == 1 and spans[0].stop - spans[0].start == len(source):
        yield TracedSpan(offset, offset + len(escaped), *spans[0][2:])
        return
    for is_ascii in (False, True):
        pieces = [json.dumps(char, ensure_ascii=is_ascii)[1:-1] for char in str.__str__(source)]
        if "".join(pieces) == escaped:
            starts = list(accumulate(map(len, pieces), initial=0))  # of each piece in `escaped`
            for span in spans:
                yield TracedSpan(offset + starts[span.start], offset + starts[span.stop], *span[2:])
            return


def _with_spans_of(text: str, new: str) -> str:
    """`new` with the spans of `text`, from which it was derived, for example by `upper`.

    If the lengths differ, the characters do not align; `new` then has one span over all sources.
    """
    spans = spans_of(text)
    if len(text) == len(new) or not new:
        return with_spans(new, spans if new else ())
    if not spans:
        return new
    whole = spans[0]
    return with_spans(new, (TracedSpan(0, len(new), whole.source, whole.first, spans[-1].last),))


def _overlap(span: TracedSpan, start: int, stop: int) -> TracedSpan:
    """The part of a span inside [start, stop), with offsets relative to `start`."""
    first, last = max(span.start, start), min(span.stop, stop)
    if span.stop - span.start != span.last - span.first:  # escaped: characters do not align
        return TracedSpan(first - start, last - start, *span[2:])
    return TracedSpan(
        first - start,
        last - start,
        span.source,
        span.first + first - span.start,
        span.last - (span.stop - last),
    )


def _shift(spans: Iterable[TracedSpan], offset: int) -> list[TracedSpan]:
    return [TracedSpan(span.start + offset, span.stop + offset, *span[2:]) for span in spans]
