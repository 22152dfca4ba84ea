"""An installed wheel has every file that its commands read or name."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import ROOT
from tests.messages import assert_mentions

pytestmark = [pytest.mark.unit, pytest.mark.timeout(200)]
_NOT_IN_SOURCES = shutil.ignore_patterns(".*", "build", "tests", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the files that `pip install` of the wheel would write."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=_NOT_IN_SOURCES)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=folder / "source", check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "_Warning" not in done.stderr, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def rankzero(installed: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `rankzero` from the files of the wheel, in the folder that contains them."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli.rankzero", *words],
        cwd=installed, env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": "/"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_the_page_that_a_message_names_is_in_the_wheel(installed, tmp_path):
    run_file = tmp_path / "RUN.yaml"
    run_file.write_text("qqqq: 1\n")
    done = rankzero(installed, "plan", run_file)
    assert done.returncode == 2
    assert_mentions(done.stderr, installed / "pipeline/pages/configuration.md")


def test_the_page_that_a_help_text_names_is_in_the_wheel(installed):
    page = installed / "pipeline/pages/scoring.md"
    assert str(page) in rankzero(installed, "score", "--help").stdout
    assert page.read_bytes() == (ROOT / "docs/scoring.md").read_bytes()


def test_every_page_that_the_package_names_is_in_the_wheel_under_its_path_there(installed):
    names = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        names |= set(re.findall(r"\{(?:DOCS|docs)\}/([\w./-]+\.md)", text))
    assert {"rules.md", "merging.md"} <= names
    missing = [name for name in names if not (installed / "pipeline/pages" / name).is_file()]
    assert missing == []


def test_the_batch_scripts_are_in_the_wheel(installed, tmp_path):
    done = rankzero(installed, "slurm", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "slurm/train.sbatch").is_file()
