"""Invariants of the source tree: packages without torch, scripts of launch/, links of pages.

A verb is a subcommand of `rankzero`, such as `train` in `rankzero train`. It has a script of the
same name in launch/ and a module of the same name in pipeline/cli/.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli.rankzero import VERBS
from tests import ROOT
from tests.commands import run_without_torch
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit

SCRIPTS = sorted(
    path.name for path in (ROOT / "launch").glob("*.py") if path.stem != "not_installed"
)


@pytest.mark.parametrize("module", ["config.load", "plan.plan", "cluster.exits", "train.run"])
def test_import_of_a_module_loads_no_torch(module):
    code = (
        f"import sys, pipeline.{module}; "
        "print(sorted({'torch', 'transformers', 'peft', 'deepspeed'} & set(sys.modules)))"
    )
    result = run_without_torch("-c", code)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_no_torch(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path('launch/{script}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print('torch' in sys.modules)\n"
    )
    result = run_without_torch("-c", code)
    assert "RUN" in result.stdout, result.stderr  # the help has the argument RUN.yaml
    *_, is_torch_loaded = result.stdout.split()
    assert is_torch_loaded == "False"


def test_no_script_has_the_name_of_an_importable_module():
    scripts = [*(ROOT / "launch").glob("*.py"), *(ROOT / "launch/quickstart").glob("*.py")]
    assert scripts
    for script in scripts:
        spec = importlib.util.find_spec(script.stem)
        is_namespace_package = spec is not None and spec.origin is None
        assert spec is None or is_namespace_package or Path(spec.origin).parent == script.parent, (
            script
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_only_calls_its_verb(script):
    verb = script.removesuffix(".py")
    lines = (ROOT / "launch" / script).read_text().splitlines()
    _docstring, *code = [line for line in lines if line]
    assert code == [
        "try:", f"    from pipeline.cli.{verb} import main",
        "except ModuleNotFoundError as error:", "    from not_installed import exit_with_advice",
        "    exit_with_advice(error)",
        'if __name__ == "__main__":', "    main()",
    ]  # fmt: skip


@pytest.mark.parametrize("has_package", [False, True])
@pytest.mark.parametrize("script", [*SCRIPTS, "quickstart/quickstart.py"])
def test_a_python_without_the_dependencies_gets_the_commands_that_install_them(script, has_package):
    variables = {"PYTHONPATH": str(ROOT)} if has_package else {}
    for local_rank, has_message in (("0", True), ("1", False)):
        result = subprocess.run(
            [sys.executable, "-S", ROOT / "launch" / script],  # -S: without site-packages
            env=variables | {"LOCAL_RANK": local_rank}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == has_message
        if has_message:
            assert_mentions(result.stderr, script, sys.executable, "install", "activate")


def test_every_verb_has_its_script():
    # `rankzero slurm` copies the folder slurm/, which a clone of the repository has.
    verbs_with_script = set(VERBS) - {"slurm"}
    assert sorted(f"{verb}.py" for verb in verbs_with_script) == SCRIPTS


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_argument_gives_a_message_of_one_line_and_exit_code_2(verb):
    result = run_without_torch("-m", "pipeline.cli.rankzero", verb, "--nonsense")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert_mentions(result.stderr, f"rankzero {verb}", "--help")


def test_the_message_for_an_unknown_verb_has_all_verbs():
    result = run_without_torch("-m", "pipeline.cli.rankzero", "trian")
    assert result.returncode == 2
    assert_mentions(result.stderr, "trian", *VERBS)


PAGES = sorted([*ROOT.glob("*.md"), ROOT / "slurm/README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_and_named_tests_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    if page.name != "CHANGELOG.md":  # its links to removed files are history
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert "://" in target or (page.parent / target).exists(), target
    if page.name in ("README.md", "promises.md", "CONTRIBUTING.md"):
        for path in re.findall(r"`(tests/[\w/.]+)`", text):
            assert (ROOT / path).exists(), path


def test_the_command_in_the_readme_runs_as_printed():
    (command,) = re.findall(r"^\$ python (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    result = run_without_torch(*command.split())
    assert result.returncode == 0, result.stderr
