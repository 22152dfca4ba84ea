"""Log output: INFO of rank 0 and warnings of all ranks, unless the caller has set handlers."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

CODE = """
import logging, sys
{before}
from pipeline.cluster.logs import configure_logging
configure_logging()
configure_logging()
logger = logging.getLogger("pipeline.train.run")
logger.info("step %d", 3)
logger.debug("a detail")
logger.warning("disk is slow")
"""
CALLERS_HANDLER = "logging.basicConfig(stream=sys.stderr, format='mine %(message)s')"


def output(before: str = "", **env: str) -> subprocess.CompletedProcess:
    code = CODE.format(before=before)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env)


def test_rank_0_shows_plain_lines_on_standard_output():
    result = output()
    assert (result.stdout, result.stderr) == ("step 3\ndisk is slow\n", "")


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_other_ranks_show_warnings_only(name):
    assert output(**{name: "2"}).stdout == "rank 2: disk is slow\n"


def test_a_library_user_keeps_the_handlers_that_were_configured():
    result = output(CALLERS_HANDLER)
    assert (result.stdout, result.stderr) == ("", "mine disk is slow\n")
