"""Commands, settings, links and anchors that the pages name exist."""

import argparse
import re
from importlib import import_module

import pytest
import yaml

from pipeline.cli.arguments import Parser
from pipeline.cli.rankzero import VERBS
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from tests import ROOT
from tests.docs.pages import NAMES, PAGES, anchors, blocks, links, project_commands

pytestmark = pytest.mark.unit

TEXTS = {name: page.read_text(encoding="utf-8") for name, page in zip(NAMES, PAGES, strict=True)}
COMMANDS = [
    (name, verb, words) for name, text in TEXTS.items() for verb, words in project_commands(text)
]


class CapturedParser(Exception):
    """Ends the function of a verb (a command such as train), and carries its argument parser."""


def parser_of(verb, monkeypatch):
    """The argument parser that a verb builds; nothing else of the verb runs."""

    def capture(self, *_):
        raise CapturedParser(self)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", capture)
        patch.setattr(Parser, "parse_intermixed_args", capture)
        with pytest.raises(CapturedParser) as caught:
            getattr(import_module(f"pipeline.cli.{verb}"), verb)()
    return caught.value.args[0]


def check_arguments(parser, words):
    """Parse the arguments of a command of a page, with numbers and names for its placeholders."""
    values = {"NAME": "wandb", "TFLOPS": "100", "GIB": "80"}
    words = [values.get(w, "1" if re.fullmatch("[A-Z]", w) else w) for w in words]
    parsed = argparse.ArgumentParser.parse_intermixed_args(parser, words)
    for override in getattr(parsed, "overrides", []):
        key = override.partition("=")[0]
        assert key == "key" or key in RunSettings.model_fields, f"no setting {key}"
    run_file = getattr(parsed, "run_file", None)
    if run_file is not None and str(run_file).startswith("launch/"):
        assert (ROOT / run_file).is_file(), run_file


def test_the_pages_have_commands():
    assert len(COMMANDS) > 100


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_of_the_pages_parses(verb, monkeypatch):
    parser = parser_of(verb, monkeypatch)
    for page, _, words in [command for command in COMMANDS if command[1] == verb and command[2]]:
        try:
            check_arguments(parser, words)
        except (UserError, AssertionError) as error:
            pytest.fail(f"{page}: {verb} {' '.join(words)}: {error}")


def test_every_verb_of_the_pages_exists():
    unknown = {(page, verb) for page, verb, _ in COMMANDS if verb not in VERBS}
    assert not unknown - {(page, verb) for page, verb in unknown if page == "CHANGELOG.md"}


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if blocks(text, "yaml")])
def test_yaml_of_a_page_has_only_settings(name):
    for block in blocks(TEXTS[name], "yaml"):
        keys = set(yaml.safe_load(block))
        assert keys <= set(RunSettings.model_fields), keys - set(RunSettings.model_fields)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_targets_of_the_links_of_a_page_exist(name):
    page = ROOT / name
    for link in links(TEXTS[name]):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link
