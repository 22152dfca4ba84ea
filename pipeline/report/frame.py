"""Render a report page from its template, with style, scripts and content security policy.

Jinja2 escapes every value. The exceptions are the files of this package (style and scripts) and the
data block of the charts, in which `data_block` escapes every character with a meaning in HTML. The
content security policy allows the page's own style and scripts, by their hashes, and nothing else.
"""

import base64
import hashlib
import json
import re
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline import __version__
from pipeline.commands import command
from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.report import text

_FOLDER = Path(__file__).parent
UPLOT = _FOLDER / "uplot"  # uPlot 1.6.32, as published on npm; SHA256SUMS has its hashes


def render(template: str, curves: dict[str, Any], *, refresh_s: int = 0, **values: Any) -> str:
    """A page from a template that extends frame.html.jinja.

    `curves`: the data of the charts (`curves.page_data`). `refresh_s`: interval at which the page
    reloads itself; 0 for never. `values`: variables of the template.
    """
    style = "\n".join(_package_files("uplot/uPlot.min.css", "style.css"))
    scripts = _package_files("uplot/uPlot.iife.min.js", "charts.js")
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_source_hash, scripts))}; "
        f"style-src {_source_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    return (
        _environment()
        .get_template(template)
        .render(
            style=style,
            scripts=scripts,
            policy=policy,
            curves_json=data_block(curves),
            refresh_s=refresh_s,
            version=__version__,
            written=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            **values,
        )
    )


def write_page(path: Path, page: str) -> Path:
    """Write a page and return its path. Raises UserError if it cannot be written."""
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
    return path


def data_block(data: Any) -> str:
    """JSON in ASCII without <, > and &, so that no text in it ends the script element."""
    plain = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", plain)


@cache
def _package_files(*names: str) -> list[str]:
    return [(_FOLDER / name).read_text(encoding="utf-8") for name in names]


def _source_hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": text.cell, "moment": text.moment, "pretty": text.pretty}
    environment.globals["command"] = command
    environment.tests["link"] = lambda value: re.fullmatch(r"https?://\S+", str(value)) is not None
    return environment
