"""Traced strings: strings that behave like `str` and know the origin of their characters.

The texts of a conversation are traced when a chat template renders them, so that the loss mask is
exact. A span (start, stop, source, first, last) says that the characters `start` to `stop` of a
string are those from `first` to `last` of the text with the number `source`.
"""

import json
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.chat.traced import (
    Arguments,
    join_traced,
    make_environment,
    spans_of,
    traced_from,
)

pytestmark = pytest.mark.unit

texts = st.text(st.sampled_from("abAx<>\n \t\u00e9"), max_size=12)
REPLACED = defaultdict(str, a="XYZ")  # characters that may stand for "a" after a replacement
METHODS = [  # name of a method of str, and its arguments
    ("strip",),
    ("lstrip",),
    ("rstrip",),
    ("strip", "ab"),
    ("split",),
    ("split", "a"),
    ("split", "ab", 1),
    ("rsplit", "a", 1),
    ("rsplit", None, 1),
    ("splitlines",),
    ("splitlines", True),
    ("partition", "a"),
    ("rpartition", "a"),
    ("removeprefix", "a"),
    ("removesuffix", "\n"),
    ("replace", "a", "XY"),
    ("replace", "ab", ""),
    ("replace", "a", "Z", 1),
    ("upper",),
    ("lower",),
    ("title",),
    ("capitalize",),
]


def assert_spans_match(text, sources):
    """Each span has the characters of its source, ignoring case."""
    for start, stop, source, first, last in spans_of(text):
        assert 0 <= start < stop <= len(text)
        part, origin = text[start:stop], sources[source][first:last]
        assert part.lower() == origin.lower() or part in REPLACED[origin]


@pytest.mark.parametrize("call", METHODS, ids=str)
@given(one=texts, two=texts)
def test_methods_return_the_results_of_str(call, one, two):
    name, *arguments = call
    text = join_traced((traced_from(one, 0), "-", traced_from(two, 1)))
    expected = getattr(str.__str__(text), name)(*arguments)
    result = getattr(text, name)(*arguments)
    assert result == expected
    for part in [result] if isinstance(result, str) else result:
        assert_spans_match(part, {0: one, 1: two})


@given(one=texts.filter(bool), cut=st.tuples(st.integers(-14, 14), st.integers(-14, 14)))
def test_slices_keep_their_position_in_the_source(one, cut):
    text = traced_from(one, 3)
    part = text[slice(*cut)]
    assert part == one[slice(*cut)]
    for start, stop, source, first, last in spans_of(part):
        assert (start, stop, source) == (0, len(part), 3)
        assert one[first:last] == part
    assert [str(character) for character in text] == list(one)


def render(template, **variables):
    return make_environment().from_string(template).render(**variables)


# Template -> its text with a = "one" and b = "two".
WRITTEN = {
    "{{ a ~ '-' ~ b }}": "one-two",
    "{{ '<' + a + '>' }}{{ b }}": "<one>two",
    "{% set x %}{{ a }}!{% endset %}{{ x }}{{ b }}": "one!two",
    "{% macro m(t) %}[{{ t }}]{% endmacro %}{{ m(a) }}{{ m(b) }}": "[one][two]",
    "{{ [a, b] | join(', ') }}": "one, two",
    "{{ ', '.join([a, b]) }}": "one, two",
    "{{ {'k': [a, b]} | tojson }}": '{"k": ["one", "two"]}',
    "{{ {'k': [a, b]} }}": "{'k': ['one', 'two']}",
    "{{ a | trim }}{{ b | string }}": "onetwo",
    "{% for x in [a, b] %}{{ loop.index }}{{ x }}{% endfor %}": "1one2two",
    "{% set ns = namespace(t='') %}{% for x in [a, b] %}{% set ns.t = ns.t + x %}{% endfor %}"
    "{{ ns.t }}": "onetwo",
    "{% generation %}{{ a }}{% endgeneration %}{{ b }}": "onetwo",
}


@pytest.mark.parametrize("template", WRITTEN)
def test_texts_rendered_by_jinja_keep_their_source(template):
    text = render(template, a=traced_from("one", 0), b=traced_from("two", 1))
    assert text == WRITTEN[template]
    by_source = {span.source: text[span.start : span.stop] for span in spans_of(text)}
    assert by_source[0] == "one"
    assert by_source[1] == "two"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.booleans())
def test_json_escapes_are_traced(text, is_ascii):
    template = f"{{{{ value | tojson(ensure_ascii={is_ascii}) }}}}"
    result = render(template, value={"k": [1, traced_from(text, 0)], traced_from("n", 1): None})
    assert json.loads(result) == {"k": [1, text], "n": None}
    (span,) = (span for span in spans_of(result) if span.source == 0)
    assert json.loads(f'"{result[span.start : span.stop]}"') == text
    assert (span.first, span.last) == (0, len(text))


def test_arguments_are_a_mapping_and_become_json_text_when_concatenated():
    arguments = Arguments({"city": traced_from("Oslo", 0), "n": 1})
    text = '{"city": "Oslo", "n": 1}'
    for template in ("{{ '<' + a + '>' }}", "{{ '<' ~ a ~ '>' }}", "<{{ a }}>", "<{{ a|tojson }}>"):
        result = render(template, a=arguments)
        assert result == f"<{text}>"
        (span,) = spans_of(result)
        assert result[span.start : span.stop] == "Oslo"
    assert render("{{ a.city }}{{ a is mapping }}{{ a is string }}", a=arguments) == "OsloTrueFalse"


def test_a_template_cannot_reach_the_spans():
    from jinja2.exceptions import SecurityError

    for template in ("{{ a._spans.x }}", "{{ a.__class__.x }}", "{{ a._slice(0, 1) }}"):
        with pytest.raises(SecurityError):
            render(template, a=traced_from("one", 0))
