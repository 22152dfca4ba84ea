"""Promises about the tree itself: no torch where there must be none, docs as generated."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.unit

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.py"))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("room", ["config.load", "plan.plan", "cluster.exits", "train.run"])
def test_no_torch_until_it_is_needed(room):
    code = (
        f"import sys, pipeline.{room}; "
        "print(sorted({'torch', 'transformers', 'peft', 'deepspeed'} & set(sys.modules)))"
    )
    result = python("-c", code)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path('launch/{script}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print('torch' in sys.modules)\n"
    )
    result = python("-c", code)
    assert "RUN" in result.stdout, result.stderr
    assert "torch" not in result.stdout or result.stdout.strip().endswith("False")
    assert not result.stdout.strip().endswith("True")


def test_no_script_shadows_a_module():
    scripts = [*(ROOT / "launch").glob("*.py"), *(ROOT / "launch/quickstart").glob("*.py")]
    assert scripts
    for script in scripts:
        spec = importlib.util.find_spec(script.stem)
        is_folder = spec is not None and spec.origin is None  # a mere folder of that name
        assert spec is None or is_folder or Path(spec.origin).parent == script.parent, script


def test_scripts_are_short():
    for script in (ROOT / "launch").glob("*.py"):
        assert len(script.read_text().splitlines()) < 60, script


def test_generated_docs_are_up_to_date():
    result = python("docs/generate.py", "--check")
    assert result.returncode == 0, result.stderr


def test_links_in_the_docs_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm/README.md"]
    pages += (ROOT / "docs").glob("*.md")
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
