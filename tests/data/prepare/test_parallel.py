"""Worker processes give the same results in the same order, and their errors reach the caller."""

import os
import signal
import subprocess
import sys
from functools import partial

import psutil
import pytest

from pipeline.data.prepare import job, lines, parallel
from pipeline.data.prepare.parallel import parallel_map
from pipeline.data.prepare.prepare import prepare_data
from pipeline.errors import RankZeroError, UserError
from tests import ROOT
from tests.data.prepare.preparation import content, long_rows, write_lines
from tests.messages import refused
from tests.ranks import CONTEXT

pytestmark = pytest.mark.tensor


@pytest.fixture(autouse=True)
def _forked_workers(monkeypatch):
    """Fork the workers from the forkserver of tests/ranks.py; a spawned worker imports for seconds.

    The last test starts a process of its own, which spawns its workers.
    """
    monkeypatch.setattr(parallel, "get_context", lambda _: CONTEXT)


def make_squares(fails_at):
    """Return the function that a worker applies to each item; each worker calls this once."""
    return partial(square, fails_at)


def square(fails_at, number):
    """The square, and the id of the process that computed it; an error for `fails_at`."""
    if number == fails_at:
        raise UserError(f"{number} is wrong")
    return number * number, os.getpid()


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_order_and_from_all_processes(processes):
    results = list(parallel_map(range(60), partial(make_squares, None), processes=processes))
    assert [number for number, _ in results] == [number * number for number in range(60)]
    caller = os.getpid()
    is_computed_by_caller = {pid == caller for _, pid in results}
    assert is_computed_by_caller == {processes == 1}


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_is_raised_after_the_results_before_it(processes):
    results = parallel_map(range(60), partial(make_squares, 5), processes=processes)
    assert [next(results)[0] for _ in range(5)] == [0, 1, 4, 9, 16]
    with refused("5 is wrong"):
        next(results)


def test_five_items_are_too_few_for_worker_processes():
    results = list(parallel_map(range(5), partial(make_squares, None)))
    assert {pid for _, pid in results} == {os.getpid()}


def test_the_number_of_items_read_ahead_is_bounded():
    num_read = 0

    def items():
        nonlocal num_read
        for number in range(1000):
            num_read += 1
            yield number

    results = parallel_map(items(), partial(make_squares, None), processes=2)
    next(results)
    results.close()
    assert num_read < 20


@pytest.mark.parametrize(("processes", "over_length"), [(2, "truncate"), (3, "split")])
def test_the_number_of_processes_does_not_change_the_result(
    run, monkeypatch, processes, over_length
):
    write_lines(run.train, long_rows(300))
    monkeypatch.setattr(lines, "CHUNK_ROWS", 7)
    values = {"max_length": 128, "over_length": over_length, "max_rejected": 0.9}
    settings = run.settings(eval_data=0.1, **values)
    alone, together = run.folder / "alone", run.folder / "together"
    prepare_data(settings, alone, processes=1)
    prepare_data(settings, together, processes=processes)
    assert content(alone) == content(together)
    assert any(name.startswith("eval-") for name in content(alone))


def test_a_user_error_of_a_worker_reaches_the_caller(run):
    template = run.folder / "model" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with refused("chat template"):
        prepare_data(run.settings(), run.data, processes=2)
    assert not list(run.data.iterdir())


def test_a_killed_worker_is_reported(run, monkeypatch):
    monkeypatch.setattr(job, "ChunkTokeniser", KilledTokeniser)
    with refused("memory", error=RankZeroError):
        prepare_data(run.settings(), run.data, processes=2)
    assert not list(run.data.iterdir())


class KilledTokeniser:
    """A tokenisation worker that is killed by a signal."""

    def __init__(self, settings, threshold):
        pass

    def __call__(self, chunk):
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_their_killed_parent(run):
    code = (
        "import os, sys, signal, psutil\n"
        "from pathlib import Path\n"
        "from pipeline.config.settings import RunSettings\n"
        "from pipeline.data.prepare import prepare\n"
        "from pipeline.data.dataset.writer import SplitWriter\n"
        "def add_and_die(self, *args):\n"
        "    children = psutil.Process().children(recursive=True)\n"
        "    print(*(child.pid for child in children), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "SplitWriter.add = add_and_die\n"
        "settings = RunSettings.model_validate_json(sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    prepare.prepare_data(settings, Path(sys.argv[2]), processes=2)\n"
    )
    command = [sys.executable, "-c", code, run.settings().model_dump_json(), str(run.data)]
    killed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    children = [int(pid) for pid in killed.stdout.split()]
    assert len(children) >= 2
    running = [psutil.Process(pid) for pid in children if psutil.pid_exists(pid)]
    assert psutil.wait_procs(running, timeout=20)[1] == []
    run.prepare()
    assert not [path for path in run.data.iterdir() if path.name.endswith(".tmp")]
