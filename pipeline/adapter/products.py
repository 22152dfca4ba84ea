"""Products of a run's adapter: merged/, score.json and report.html.

If a run is extended, its adapter changes and these products are outdated. Then they are marked as
outdated, and not removed.
"""

import html
import logging
import shlex
from contextlib import suppress
from pathlib import Path

from pipeline.adapter.merge_output import MARKER
from pipeline.adapter.trained_on import adapter_sha256
from pipeline.commands import command
from pipeline.files import dump_json, read_json, read_json_or_empty, write_text

logger = logging.getLogger(__name__)

OUTDATED = "outdated"  # key in rankzero_merge.json and score.json
_REASON = "made from an earlier adapter of this run"
# Attribute in a page of `report --watch`, which writes the page again at the end of the run.
_REFRESHING = ' data-refresh="'
_BANNER = '<body>\n<p class="off"><b>Outdated:</b> '


def mark_outdated(run_folder: Path) -> None:
    """Mark the products that were not made from the present adapter of the run."""
    sha256 = adapter_sha256(run_folder / "adapter")
    marked, commands = [], []  # names of the products, and the commands that make them again
    for name, verb in ((f"merged/{MARKER}", "merge"), ("score.json", "score")):
        remedy = _command(verb, run_folder)
        with suppress(OSError, ValueError):
            record = read_json(run_folder / name)
            if record.get("adapter_sha256") != sha256:
                note = f"{_REASON}; make it again: {remedy}"
                write_text(run_folder / name, dump_json(record | {OUTDATED: note}))
                marked.append(name)
                commands.append(remedy)
    report, remedy = run_folder / "report.html", _command("report", run_folder)
    with suppress(OSError, ValueError):
        page = report.read_text(encoding="utf-8")
        if _REFRESHING not in page:
            if _BANNER not in page:
                note = f"{_BANNER}{_REASON}; make it again: {html.escape(remedy)}</p>\n"
                write_text(report, page.replace("<body>\n", note, 1))
            marked.append(report.name)
            commands.append(remedy)
    if marked:
        logger.info("%s: %s; make again: %s", ", ".join(marked), _REASON, "; ".join(commands))


def _command(verb: str, run_folder: Path) -> str:
    return f"{command(verb)} {shlex.quote(str(run_folder))}"


def is_merged_from(run_folder: Path) -> bool | None:
    """Whether merged/ was made from the present adapter; None if the merge recorded no hash."""
    recorded = read_json_or_empty(run_folder / "merged" / MARKER).get("adapter_sha256")
    return None if recorded is None else recorded == adapter_sha256(run_folder / "adapter")
