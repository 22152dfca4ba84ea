"""Build the site from docs/ and the README files with Zensical: `make site`.

The pages are copied to build/site-pages with the folders of the repository, so that their links
work there and here. The built pages are then checked: links and anchors lead somewhere, and no page
loads a script, style sheet, image or font from a network.
"""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"
PAGES = BUILD / "site-pages"
SITE = BUILD / "site"
_FOLDERS = ("docs", "slurm", "ds_configs", "launch/runs")
_SUFFIXES = {".md", ".yaml", ".txt", ".png", ".svg", ".json", ".css"}
# Classes whose elements make the theme's script load a library from a network.
_LOADS_A_LIBRARY = {"mermaid", "glightbox", "md-source", "md-exec"}
# A shell block without prompts, which the highlighter of `console` would take for output.
_COMMANDS = re.compile(r"^( *```)console(?=\n(?:(?! *```)(?! *\$ ).*\n)* *```)", re.MULTILINE)
# Address of a script (npm's iframe-worker 1.0.4, MIT) that Zensical's plugin `offline` adds.
_WORKER = "https://unpkg.com/iframe-worker/shim"
_CODE_LINK = re.compile(r"\]\((?:\.\./)*(pipeline|tests)/[^)]*\)|\]\(LICENSE\)")


class Page(HTMLParser):
    """The links, resources, ids and classes of one HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.resources: set[str] = set()
        self.ids: set[str] = set()
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sort the attributes of one element."""
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[key] for key in ("id", "name") if key in values}
        self.classes |= set(values.get("class", "").split())
        if tag == "a":
            self.links |= {values["href"]} if "href" in values else set()
        else:
            self.resources |= {values[key] for key in ("src", "href", "data") if key in values}
            self.resources |= set(re.findall(r"url\(['\"]?([^'\")]+)", values.get("style", "")))


def problems(site: Path) -> list[str]:
    """Broken links and resources from a network in the pages below `site`."""
    pages = {path.resolve(): Page(path.read_text("utf-8")) for path in site.rglob("*.html")}
    return [
        f"{path.relative_to(site.resolve())}: {problem}"
        for path, page in pages.items()
        for problem in (*_network_problems(page), *_link_problems(path, page, pages))
    ] + [
        f"{path.relative_to(site)}: loads {address}"
        for path in site.rglob("*.css")
        for address in re.findall(r"(?:url\(|@import )['\"]?(\w*:?//[^'\")]+)", path.read_text())
    ]


def _network_problems(page: Page) -> list[str]:
    outside = [r for r in page.resources if urlsplit(r).netloc]
    loading = sorted(page.classes & _LOADS_A_LIBRARY)
    return [f"loads {r}" for r in outside] + [f"class {name} loads a library" for name in loading]


def _link_problems(path: Path, page: Page, pages: dict[Path, Page]) -> list[str]:
    problems = []
    for link in sorted(page.links | page.resources):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or link == "":
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file():
            problems.append(f"{link} leads nowhere")
        elif parts.fragment and target in pages and parts.fragment not in pages[target].ids:
            problems.append(f"{link}: no such anchor")
    return problems


def copy_pages() -> None:
    """Copy the pages and the files that they link to; links to code become plain text."""
    shutil.rmtree(PAGES, ignore_errors=True)
    files = [*ROOT.glob("*.md")]
    for folder in _FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in _SUFFIXES]
    for path in files:
        target = PAGES / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            text = _CODE_LINK.sub("]", path.read_text("utf-8"))
            text = _COMMANDS.sub(r"\1bash", text)
            text = text.replace("](launch/runs)", "](launch/runs/README.md)")
            target.write_text(text, "utf-8")
        else:
            shutil.copyfile(path, target)
    lines = ["# Example run files", ""]
    for path in sorted((ROOT / "launch/runs").glob("*.yaml")):
        lines += [f"## {path.name}", "", "```yaml", path.read_text("utf-8").rstrip(), "```", ""]
    (PAGES / "launch/runs/README.md").write_text("\n".join(lines), "utf-8")


def use_own_worker(site: Path) -> None:
    """Let the pages load the script for the search in files from the site, not from a network."""
    script = site / "assets/javascripts/iframe-worker.js"
    shutil.copyfile(Path(__file__).parent / "iframe-worker/shim.js", script)
    for page in site.rglob("*.html"):
        own = os.path.relpath(script, page.parent)
        page.write_text(page.read_text("utf-8").replace(_WORKER, own), "utf-8")


def main() -> None:
    """Build and check the site; exit 1 if a page has a problem."""
    copy_pages()
    shutil.copyfile(Path(__file__).with_name("zensical.toml"), BUILD / "zensical.toml")
    zensical = Path(sys.executable).with_name("zensical")
    done = subprocess.run(
        [zensical, "build", "--clean", "--config-file", "zensical.toml"], cwd=BUILD, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (SITE / "404.html").unlink()  # its links begin with /, so they work on a server's root only
    use_own_worker(SITE)
    if found := problems(SITE):
        sys.exit("\n".join(found))
    print(f"{SITE / 'index.html'}: {len(list(SITE.rglob('*.html')))} pages, links checked")


if __name__ == "__main__":
    main()
