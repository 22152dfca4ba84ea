"""The help of every verb fits in the width of the terminal, with whole words."""

import ast
import sys

import pytest

from pipeline.cli.arguments import Parser
from pipeline.cli.rankzero import VERBS
from tests import ROOT

pytestmark = pytest.mark.unit


def help_text(verb: str) -> str:
    """The help of a verb without its options; the module of the verb is not imported."""
    module = ast.parse((ROOT / f"pipeline/cli/{verb}.py").read_text())
    return Parser(verb, ast.get_docstring(module)).format_help()


@pytest.mark.parametrize("program", ["launch/train.py", "/usr/bin/rankzero"])
@pytest.mark.parametrize("verb", VERBS)
def test_the_help_has_the_same_words_at_every_width(monkeypatch, verb, program):
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setenv("COLUMNS", "200")
    wide = help_text(verb)
    for width in (60, 80, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        text = help_text(verb)
        assert max(map(len, text.splitlines())) <= width, text
        assert text.split() == wide.split()


def test_a_description_of_a_command_is_moved_below_it_only_if_its_block_is_too_wide(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rankzero"])
    monkeypatch.setenv("COLUMNS", "80")
    assert "rankzero score RUN_FOLDER\n    base, adapter" in help_text("score")
    monkeypatch.setenv("COLUMNS", "120")
    assert "rankzero score RUN_FOLDER      " in help_text("score")


def test_a_path_that_is_longer_than_a_line_stays_whole(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rankzero"])
    monkeypatch.setenv("COLUMNS", "60")
    path = "/a-long-folder-name" * 5 + "/scoring.md"
    assert path in Parser("score", f"All measures are in {path} with examples.").format_help()
