"""Exit codes of a process, and one message for all ranks."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from tests import ROOT
from tests.messages import assert_mentions

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
    """The finished process whose main function has this body."""
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
        ("raise KeyboardInterrupt", 130, "stopped by Ctrl-C\n"),
        ("sys.exit(5)", 5, ""),
    ],
)
def test_each_error_has_its_exit_code_and_message(body, code, message):
    result = end(body)
    assert (result.returncode, result.stderr) == (code, message)


def test_a_process_that_ends_during_a_progress_bar_leaves_the_cursor_visible():
    code = (
        "from pipeline.cluster.exits import configure_logging, end_process\n"
        "from pipeline.cluster.progress import show_progress\n"
        "configure_logging()\n"
        "with show_progress('loading'): end_process(3)\n"
    )
    terminal, inner = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    result = subprocess.run(
        [sys.executable, "-c", code], stdin=inner, stdout=inner, stderr=inner, env=environment,
        check=False,
    )  # fmt: skip
    os.close(inner)
    output = os.read(terminal, 2**16)
    os.close(terminal)
    hidden, shown = output.rfind(b"\x1b[?25l"), output.rfind(b"\x1b[?25h")
    assert result.returncode == 3
    assert 0 <= hidden < shown, output


def test_a_defect_shows_its_traceback_and_rank():
    result = end("1 / 0", RANK="3")
    assert result.returncode == 1
    assert "rank 3: unexpected error" in result.stderr
    assert "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        ("FileNotFoundError(2, 'No such file or directory', 'a/b')", "a/b"),
        ("OSError(28, 'No space')", "No space"),
        ("OSError(27, 'File too large')", "ulimit -f"),
        ("RuntimeError('Symlink loop from a/b')", "a/b"),  # raised by Path.resolve
    ],
)
def test_an_error_of_the_file_system_is_one_message(error, fact):
    result = end(f"raise {error}")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert fact in result.stderr
    assert "Traceback" in end(f"raise {error}", tracebacks=True).stderr


PRINT = "[print('line', i) for i in range(100_000)]"  # more than a pipe can hold


def run_with_stdout(stdout, body: str = PRINT, closed: bool = False) -> tuple[int, str]:
    """Exit code and standard error; `closed`: the process starts without standard output."""
    result = subprocess.run(
        [sys.executable, "-c", CODE.format(body=body, tracebacks=False)],
        stdout=stdout, stderr=subprocess.PIPE, text=True, check=False,
        preexec_fn=(lambda: os.close(1)) if closed else None,
    )  # fmt: skip
    return result.returncode, result.stderr


@pytest.mark.parametrize(("body", "code"), [("", 0), ("; raise UserError('line 3: no')", 2)])
def test_a_reader_of_the_output_that_ends_early_changes_neither_exit_code_nor_message(body, code):
    expected = (code, "line 3: no\n" if code else "")
    readable, writable = os.pipe()
    os.close(readable)
    assert run_with_stdout(writable, PRINT + body) == expected
    os.close(writable)
    assert run_with_stdout(None, PRINT + body, closed=True) == expected


def test_standard_output_on_a_full_disk_is_an_error():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        code, message = run_with_stdout(full)
    assert code == 1
    assert_mentions(message, "standard output", "No space left on device")
    assert len(message.splitlines()) == 1


def test_a_closed_standard_input_is_empty():
    command = [sys.executable, "-c", CODE.format(body="print(sys.stdin.read())", tracebacks=False)]
    shell = ["bash", "-c", '"$@" <&-', "bash", *command]
    result = subprocess.run(shell, capture_output=True, text=True, check=False, env={})
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n", "")


def test_text_that_the_terminal_cannot_encode_is_escaped():
    result = end(r"print('\u00e9\udcff')", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (0, "\\xe9\\udcff\n")


def test_debug_shows_the_traceback_of_an_error():
    result = end("raise RankZeroError('no')", tracebacks=True)
    assert "Traceback" in result.stderr
    for error in ("UserError", "Stopped"):  # a traceback would not help
        assert end(f"raise {error}('no')", tracebacks=True).stderr == "no\n"
    assert result.stderr.endswith("no\n")


def test_only_local_rank_zero_prints_an_error_that_all_ranks_have():
    names = ["LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_LOCAL_RANK"]
    code = CODE.format(body="raise UserError('no')", tracebacks=False)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env={name: "1"}
        )
        for name in names
    ]
    time.sleep(3)  # until all have raised the error
    running = [process.poll() is None for process in processes]
    for process in processes:
        process.terminate()
    messages = [process.communicate(timeout=5)[1] for process in processes]
    assert running == [True] * len(names)  # each waits until its launcher ends it
    assert messages == [""] * len(names)


def test_os_exit_is_called_in_one_file_only():
    """So that docs/architecture.md can say what may end a process."""
    calls = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "pipeline").rglob("*.py"))
        if re.search(r"^[^`]*\bos\._exit\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert calls == ["pipeline/cluster/exits.py"]
