"""Messages name a command as the user started it: a script of the clone, or `rankzero VERB`."""

import ast
import os
import subprocess
import sys

import pytest

from pipeline.cli.rankzero import VERBS
from pipeline.commands import command, script
from tests import ROOT

pytestmark = pytest.mark.unit

# For each line of standard input, forks a process that calls `main` with the words of the line, as
# the console script `rankzero` of an installed package does. Prints the exit code and the line.
CONSOLE_SCRIPT = """
import importlib, os, sys
sys.argv = ["/usr/bin/rankzero"]
from pipeline.cli.rankzero import VERBS, main
for verb in VERBS:  # imported once for all forked processes
    importlib.import_module(f"pipeline.cli.{verb}")
for line in sys.stdin:
    if (child := os.fork()) == 0:
        sys.argv = [*sys.argv, *line.split()]
        main()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(1, f"== {code} {line}".encode())
"""
# Options of other training programs. The message about each names a command or a setting.
PEER_KEYS = "do_train: true\nhub_model_id: a/b\nskip_prepare_dataset: true\nplot_loss: true\n"


@pytest.mark.parametrize(
    ("program", "one_process", "with_launcher"),
    [
        ("launch/train.py", "python launch/plan.py", "launch/plan.py"),
        # None: not checked, because it is quoted in the same way.
        ("/my clone/launch/train.py", "python '/my clone/launch/plan.py'", None),
        ("/venv/bin/rankzero", "rankzero plan", "--module pipeline.cli.plan"),
        ("/site-packages/pipeline/cli/train.py", "rankzero plan", "--module pipeline.cli.plan"),
    ],
)
def test_a_verb_is_named_as_the_program_was_started(
    monkeypatch, program, one_process, with_launcher
):
    monkeypatch.setattr(sys, "argv", [program, "RUN.yaml"])
    assert command("plan") == one_process
    assert with_launcher is None or script("plan") == with_launcher


@pytest.mark.parametrize(
    ("program", "one_process"),
    [("train.py", "python plan.py"), ("./train.py", "python plan.py"), ("-c", "rankzero plan")],
)
def test_in_the_folder_of_the_scripts_a_script_is_named_only_if_one_was_started(
    monkeypatch, program, one_process
):
    monkeypatch.chdir(ROOT / "launch")
    monkeypatch.setattr(sys, "argv", [program, "RUN.yaml"])
    assert command("plan") == one_process


def test_no_text_in_the_package_names_a_script_of_the_clone():
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # pipeline/commands.py builds the names; launch/VERB.py stands for all scripts.
                is_allowed = path == ROOT / "pipeline/commands.py" or "launch/VERB.py" in node.value
                names_script = any(f"launch/{verb}.py" in node.value for verb in VERBS)
                assert is_allowed or not names_script, (
                    f"{path}:{node.lineno}: use pipeline.commands"
                )


def test_no_message_of_an_installed_package_names_a_clone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "peer.yaml").write_text(PEER_KEYS)
    run = tmp_path / "run"
    run.mkdir()
    required = "model: model\ntrain_data: {}\noutput_dir: run\n"
    (run / "run.yaml").write_text(required.format("rows.jsonl"))
    (tmp_path / "hub.yaml").write_text(required.format("nobody/nothing"))
    (tmp_path / "keys.yaml").write_text(required.format("rows.jsonl") + PEER_KEYS)
    # Arguments of `rankzero`. Each command ends with a help text or an error message.
    command_lines = [f"{verb} --help" for verb in VERBS] + [f"{verb} --nonsense" for verb in VERBS]
    command_lines += [
        f"{verb} run" for verb in ("merge", "score", "export", "talk", "publish", "report")
    ]
    command_lines += ["train keys.yaml", "prepare hub.yaml", "train hub.yaml", "preflight hub.yaml"]
    command_lines += ["convert peer.yaml", "plan --model nobody/nothing"]
    command_lines += ["plan --model Qwen/Qwen3-8B --gpu h100-80gb --nodes 2"]
    result = subprocess.run(
        [sys.executable, "-c", CONSOLE_SCRIPT], input="\n".join(command_lines) + "\n",
        capture_output=True, text=True, cwd=tmp_path, check=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub"), "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert all(f"{line}\n" in result.stdout for line in command_lines)
    assert "Traceback" not in output
    assert "launch/" not in output
    assert output.count("rankzero") > len(command_lines)


def test_a_script_of_the_clone_names_scripts_of_the_clone(tmp_path):
    (tmp_path / "RUN.yaml").write_text("model: m\ntrain_data: t\noutput_dir: o\ndo_train: true\n")
    result = subprocess.run(
        [sys.executable, "launch/train.py", tmp_path / "RUN.yaml"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "python launch/train.py always trains" in result.stderr
