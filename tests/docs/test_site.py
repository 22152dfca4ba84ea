"""The check of the built site finds broken links, and scripts, styles or images from a network."""

import hashlib
import importlib.util

import pytest

from tests import ROOT

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def build():
    """The module docs/site/build.py."""
    spec = importlib.util.spec_from_file_location("site_build", ROOT / "docs/site/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problems_of(build, folder, body):
    """The problems of a site whose first page has this body."""
    (folder / "other.html").write_text("<h2 id='here'>Here</h2>")
    (folder / "index.html").write_text(f"<html><body>{body}</body></html>")
    return build.problems(folder)


@pytest.mark.parametrize(
    "body",
    [
        "<script src='https://cdn.example/x.js'></script>",
        "<link rel=stylesheet href='//fonts.example/x.css'>",
        "<img src='http://example.com/x.png'>",
        "<div style='background: url(https://example.com/x.png)'></div>",
        "<pre class='mermaid'>graph</pre>",
        "<a href='missing.html'>x</a>",
        "<a href='other.html#missing'>x</a>",
        "<a href='#missing'>x</a>",
    ],
)
def test_a_problem_of_a_page_is_found(build, tmp_path, body):
    assert len(problems_of(build, tmp_path, body)) == 1


def test_a_style_sheet_that_loads_from_a_network_is_found(build, tmp_path):
    (tmp_path / "x.css").write_text("@font-face { src: url(https://fonts.example/x.woff) }")
    assert len(problems_of(build, tmp_path, "")) == 1


def test_links_and_resources_of_the_site_itself_are_not_a_problem(build, tmp_path):
    (tmp_path / "x.js").write_text("")
    body = "<script src='x.js'></script><a href='other.html#here'>x</a><a href='https://a.b'>y</a>"
    assert problems_of(build, tmp_path, body) == []


def test_the_script_for_the_search_is_the_published_one_and_comes_from_the_site(build, tmp_path):
    folder = ROOT / "docs/site/iframe-worker"
    digest = hashlib.sha256((folder / "shim.js").read_bytes()).hexdigest()
    assert digest == "e8e412dbcfea9b7e31b5ffa288d7b6035915e714c542f4176a0cdbe262fc9609"
    assert (folder / "LICENSE").read_text().startswith("Copyright (c)")
    (tmp_path / "assets/javascripts").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/page.html"
    page.write_text("<script src=https://unpkg.com/iframe-worker/shim></script>")
    build.use_own_worker(tmp_path)
    assert build.problems(tmp_path) == []
    assert "../assets/javascripts/iframe-worker.js" in page.read_text()


@pytest.mark.parametrize(
    ("page", "language"),
    [
        ("```console\nmake test\n```\n", "bash"),
        ("1. Step\n   ```console\n   make test\n   ```\n", "bash"),
        ("```console\n$ make test\n1 passed\n```\n", "console"),
        ("```console\nmake test\n```\n\n```console\n$ make test\n```\n", "bash"),
    ],
)
def test_a_block_of_commands_without_prompts_is_highlighted_as_commands(build, page, language):
    changed = build._COMMANDS.sub(r"\1bash", page)
    assert changed == page.replace("console", language, 1)


def test_every_page_of_the_project_is_in_the_navigation():
    text = (ROOT / "docs/site/zensical.toml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f'"{page.relative_to(ROOT)}"' in text, f"zensical.toml lacks {page}"
