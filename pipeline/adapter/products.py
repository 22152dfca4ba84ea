"""Products of a run's adapter: merged/, score.json and report.html.

If a run is extended, its adapter changes and these products are outdated. Then they are marked as
outdated, and not removed.
"""

import logging
from contextlib import suppress
from pathlib import Path

from pipeline.adapter.merge_output import MARKER
from pipeline.adapter.trained_on import adapter_sha256
from pipeline.files import dump_json, read_json, read_json_or_empty, write_text

logger = logging.getLogger(__name__)

OUTDATED = "outdated"  # key in rankzero_merge.json and score.json
_NOTE = "made from an earlier adapter of this run; make it again"
# Attribute in a page of `report --watch`, which writes the page again at the end of the run.
_REFRESHING = ' data-refresh="'
_BANNER = f'<body>\n<p class="off"><b>Outdated:</b> {_NOTE}.</p>\n'


def mark_outdated(run_folder: Path) -> None:
    """Mark the products that were not made from the present adapter of the run."""
    sha256 = adapter_sha256(run_folder / "adapter")
    marked = []
    for name in (f"merged/{MARKER}", "score.json"):
        with suppress(OSError, ValueError):
            record = read_json(run_folder / name)
            if record.get("adapter_sha256") != sha256:
                write_text(run_folder / name, dump_json(record | {OUTDATED: _NOTE}))
                marked.append(name)
    report = run_folder / "report.html"
    with suppress(OSError, ValueError):
        page = report.read_text(encoding="utf-8")
        if _REFRESHING not in page:
            if _BANNER not in page:
                write_text(report, page.replace("<body>\n", _BANNER, 1))
            marked.append(report.name)
    if marked:
        logger.info("%s: %s", ", ".join(marked), _NOTE)


def is_merged_from(run_folder: Path) -> bool | None:
    """Whether merged/ was made from the present adapter; None if the merge recorded no hash."""
    recorded = read_json_or_empty(run_folder / "merged" / MARKER).get("adapter_sha256")
    return None if recorded is None else recorded == adapter_sha256(run_folder / "adapter")
