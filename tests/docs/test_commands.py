"""Every command of the pages runs here or in another test, or the page says what it needs.

Commands of this project (verbs, such as train) run with a tiny model in place of the named files.
In a code block of a page, the comment `# needs ...` names the machine or the program that the
commands below it need.
"""

import re
import shutil
from contextlib import suppress

import pytest
import yaml

from tests import ROOT
from tests.commands import Command
from tests.docs.pages import (
    NAMES,
    PAGES,
    CommandLine,
    blocks,
    command_lines,
    commands_outside_shell_blocks,
)
from tests.evaluate.runs import SETTINGS
from tests.tiny import make_model, make_rows

pytestmark = pytest.mark.e2e

LINES = {
    line.text: line
    for name, page in zip(NAMES, PAGES, strict=True)
    if name != "CHANGELOG.md"
    for line in command_lines(name, page.read_text(encoding="utf-8"))
}
# Beginning of a command -> the file that runs such commands, or the reason why nothing does.
ELSEWHERE = {
    "make": "Makefile",
    "sbatch": "tests/slurm/test_jobs.py",
    "srun": "tests/slurm/test_jobs.py",
    "container=(": "tests/slurm/test_sbatch.py",
    "torchrun": "tests/cli/test_launchers.py",
    "mpirun": "tests/cli/test_launchers.py",
    "accelerate": "tests/cli/test_launchers.py",
    "deepspeed --hostfile": "tests/cli/test_launchers.py",
    "deepspeed --module": "tests/cli/test_launchers.py",
    "deepspeed --master_port": "tests/cli/test_launchers.py",
    "python launch/export.py RUN_FOLDER --gguf": "tests/adapter/test_export.py",
    "rankzero export RUN_FOLDER --gguf": "tests/adapter/test_export.py",
    "python launch/publish.py": "tests/adapter/test_hub.py",
    "python launch/merge.py RUN_FOLDER --onto": "tests/adapter/test_merge_quantised.py",
    "python launch/report.py RUN_FOLDER --watch": "tests/report/test_watch.py",
    "rankzero track": "tests/track/test_trackers.py",
    "rankzero slurm": "tests/cli/test_rankzero.py",
    "touch": "tests/cluster/test_stop.py",
    "python -m tests.bench": "a measurement, not a command for users",
    ". .venv/bin/activate": "of the shell",
    "export": "of the shell",
    "for lr in": "of the shell",
    "do": "of the shell",
    "done": "of the shell",
    "pip install": "an installation",
}
# Words of commands -> words in their place, such as files of the workspace.
REPLACED_WORDS = {
    "RUN.yaml": "RUN.yaml", "SECOND.yaml": "SECOND.yaml", "CONFIG.yaml": "axolotl.yaml",
    "RUN_FOLDER": "run", "my-run": "run", "$SCRATCH/first": "run", "MODEL": "base",
    "A": "run/adapter", "A:0.7": "run/adapter:0.7", "B:0.3": "run/adapter:0.3",
    "runs/lr-1e-4": "run", "runs/lr-2e-4": "run2", "runs/lr-4e-4": "run3", "DIR": "folder",
    "runs/lora-70b": "run",
    "FILE": "heldout.jsonl", "data/agent.jsonl": "train.jsonl",
    "data/documents.jsonl": "train.jsonl", "quickstart/run": "run",
    "N": "3", "R": "8", "$lr": "1e-4",
    "/data/models/llama-3.1-8b-instruct": "base",
}  # fmt: skip
OTHER_RUNS = ("run2", "run3")  # copies of the run folder `run`
# Settings that replace those of a run file, for a run of the tiny model.
TINY = {
    "model": "base", "train_data": "train.jsonl", "eval_data": "heldout.jsonl", "output_dir": "out",
    "max_length": 128, "max_steps": 1, "global_batch_size": 2, "batch_size": 1, "bf16": False,
    "max_rejected": 1,
}  # fmt: skip
_VERB = re.compile(
    r"(?:(?:python|deepspeed(?: --\w+(?: \d+)?)*) launch/(\w+)\.py|rankzero (\w+)) (.+)"
)


def is_run_elsewhere(line: CommandLine) -> bool:
    beginnings = (re.escape(beginning) + r"(?!(?<=\w)[\w-])" for beginning in ELSEWHERE)
    return line.needs is not None or any(re.match(each, line.text) for each in beginnings)


def words_of(line: CommandLine) -> tuple[str, ...]:
    """The script and its arguments, with files of the workspace and settings of a tiny run."""
    match = _VERB.fullmatch(line.text)
    assert match, f"{line.page}: {line.text}: no test runs it, and the page names no need of it"
    arguments = match[3].replace("RUN_FOLDER RUN_FOLDER", "RUN_FOLDER run2")
    arguments = arguments.replace("'#### (-?[\\d.,]+)'", ".")  # a regular expression with a space
    arguments = re.sub(r"\s>.*|\.\.\.|[\[\]]", "", arguments)
    words = []
    for word in arguments.split():
        key, equals, value = word.partition("=")
        value = "out" if key == "output_dir" else REPLACED_WORDS.get(value, value)
        words.append(f"{key}={value}" if equals else REPLACED_WORDS.get(word, word))
    verb = match[1] or match[2]  # of `python launch/VERB.py`, or of `rankzero VERB`
    if verb == "plan" and "--nodes" in words:
        words.append("global_batch_size=128")  # a multiple of the ranks
    if verb in ("train", "prepare") and words[0].startswith("launch/runs/"):
        keys = {word.partition("=")[0] for word in words}
        words += [f"{key}={value}" for key, value in TINY.items() if key not in keys]
    return f"launch/{verb}.py", *words


COMMANDS_TO_RUN = sorted({words_of(line) for line in LINES.values() if not is_run_elsewhere(line)})


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with runs of a tiny model, and the files that the commands name."""
    folder = tmp_path_factory.mktemp("commands")
    make_model(folder / "base")
    make_rows(folder / "train.jsonl", 8)
    make_rows(folder / "heldout.jsonl", 4)
    (folder / "RUN.yaml").write_text(yaml.safe_dump(SETTINGS | TINY))
    second = {"init_adapter": "run/adapter"}
    (folder / "SECOND.yaml").write_text(yaml.safe_dump(SETTINGS | TINY | second))
    (folder / "axolotl.yaml").write_text("base_model: m\nadapter: lora\nlora_r: 8\n")
    (folder / "templates").mkdir()
    page = (ROOT / "docs/howto/chat-template.md").read_text(encoding="utf-8")
    (folder / "templates/support.jinja").write_text(blocks(page, "jinja")[0])
    (folder / "launch").symlink_to(ROOT / "launch")
    run_here(folder, "launch/train.py", "RUN.yaml", "output_dir=run")
    for name in OTHER_RUNS:
        shutil.copytree(folder / "run", folder / name)
    return folder


@pytest.mark.parametrize("words", COMMANDS_TO_RUN, ids=" ".join)
def test_a_command_of_a_page_runs(template, tmp_path, words):
    workspace = shutil.copytree(template, tmp_path / "workspace", symlinks=True)
    if "--undo" in words:
        run_here(workspace, "launch/merge.py", "run")
    run_here(workspace, *words)


def run_here(workspace, *words):
    with Command(*words, cwd=workspace) as command:
        code, output = command.wait_for_end()
    has_remedy = "does not fit" in output and " with " in output  # a plan for a small GPU
    assert code == 0 or (has_remedy and words[0] == "launch/plan.py"), output


def test_the_pages_have_commands_of_each_kind():
    assert len(COMMANDS_TO_RUN) > 40
    assert sum(line.needs is not None for line in LINES.values()) > 5


@pytest.mark.parametrize(
    "text",
    [
        "```console\npython launch/nosuch\n```",
        "```console\n$ nosuch --all\n```",
        "```bash\ntouch RUN/stop; nosuch\n```",
        "```bash\nexport A=1 && nosuch\n```",
        "```bash\nmake test | nosuch\n```",
        "```bash\nmake test || nosuch\n```",
        "```console\ntouchall RUN\n```",
        "```console\nmake-docs\n```",
        "```console\n# needs \nnosuch\n```",
        "```console\nDS_ACCELERATOR=cpu A=b nosuch\n```",
        "`python3 launch/nosuch.py RUN.yaml`",
        "`A=1 deepspeed --nosuch launch/train RUN`",
        "`echo question | rankzero`, `echo question | python launch/talk RUN`",
    ],
)
def test_a_command_that_nothing_runs_is_found(text):
    def is_accounted_for(line):
        with suppress(AssertionError):
            return is_run_elsewhere(line) or words_of(line)
        return False

    assert not all(map(is_accounted_for, command_lines("page", text)))


@pytest.mark.parametrize(
    "text",
    ["```sh\n{}\n```", "```\n$ {}\n```", "```text\nA=1 {}\n```", "a\n\n    {}\n", "a\n\n\t{}\n"],
)
def test_commands_are_in_blocks_that_are_marked_as_shell(text):
    assert commands_outside_shell_blocks(text.format("python launch/plan.py RUN.yaml"))
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not commands_outside_shell_blocks(pages)


@pytest.mark.parametrize("beginning", ELSEWHERE)
def test_each_entry_of_elsewhere_is_in_the_pages_and_names_a_file_or_a_reason(beginning):
    assert any(text.startswith(beginning) for text in LINES), f"no page has {beginning}"
    file_or_reason = ELSEWHERE[beginning]
    assert " " in file_or_reason or (ROOT / file_or_reason).is_file()


@pytest.mark.parametrize(
    "target",
    sorted(
        {
            word
            for line in LINES
            if line.startswith("make ")
            for word in line.split()[1:]
            if "=" not in word
        }
    ),
)
def test_a_target_of_make_exists(target):
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", text, re.MULTILINE)
