"""How a process ends: exit codes, and one message however many ranks."""

import re
import subprocess
import sys
import time

import pytest

from tests import ROOT

pytestmark = pytest.mark.unit

CODE = """
import sys
from pipeline.cluster.exits import run_main
from pipeline.errors import *
def body():
    {body}
run_main(body, tracebacks={tracebacks})
"""


def end(body: str, tracebacks: bool = False, **environment: str):
    return subprocess.run(
        [sys.executable, "-c", CODE.format(body=body, tracebacks=tracebacks)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("pass", 0, ""),
        ("raise UserError('line 3: no')", 2, "line 3: no\n"),
        ("raise RankZeroError('lost')", 1, "lost\n"),
        ("raise Stopped('again later')", 75, "again later\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("sys.exit(5)", 5, ""),
    ],
)
def test_exit_codes_and_messages(body, code, message):
    result = end(body)
    assert (result.returncode, result.stderr) == (code, message)


def test_a_defect_shows_its_traceback_and_rank():
    result = end("1 / 0", RANK="3")
    assert result.returncode == 1
    assert "rank 3: unexpected error" in result.stderr
    assert "ZeroDivisionError" in result.stderr


def test_debug_shows_the_traceback_of_an_error():
    result = end("raise RankZeroError('no')", tracebacks=True)
    assert "Traceback" in result.stderr
    for error in ("UserError", "Stopped"):  # where in the code that was helps nobody
        assert end(f"raise {error}('no')", tracebacks=True).stderr == "no\n"
    assert result.stderr.endswith("no\n")


@pytest.mark.parametrize(
    "name", ["LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_LOCAL_RANK"]
)
def test_only_local_rank_zero_prints_a_common_message(name):
    process = subprocess.Popen(
        [sys.executable, "-c", CODE.format(body="raise UserError('no')", tracebacks=False)],
        stderr=subprocess.PIPE, text=True, env={name: "1"},
    )  # fmt: skip
    time.sleep(2)
    assert process.poll() is None  # it waits to be ended by its launcher ...
    process.terminate()
    _, message = process.communicate(timeout=5)
    assert message == ""  # ... silently


def test_os_exit_stands_in_one_file():
    """The question who may end a process then leads to one file (docs/architecture.md)."""
    calls = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "pipeline").rglob("*.py"))
        if re.search(r"^[^`]*\bos\._exit\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert calls == ["pipeline/cluster/exits.py"]
