"""A job without Slurm: the batch script with fakes of srun, scontrol and containers."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import dump_json
from tests import ROOT

# Each fake records its calls: one line per call, with tabs between the words. Tests set the
# behaviour of the fakes with files in the folder $FAKE.

# away-show, away-requeue: number of calls of that command during which slurmctld is down.
# no_requeue: if this file exists, `scontrol requeue` fails.
SCONTROL = """\
printf '%s\\t' scontrol "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls"
away=$(cat "$FAKE/away-$1" 2>/dev/null || echo 0)
if [[ $away -gt 0 ]]; then
    echo $((away - 1)) >"$FAKE/away-$1"
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
case $1 in
    show) printf 'JobId=7 JobName=x\\n   JobState=%s D=(null)\\n' "$(cat "$FAKE/job_state")"
          printf '   Command=%s\\n   WorkDir=/\\n' "$(cat "$FAKE/command")" ;;
    requeue) [[ ! -e $FAKE/no_requeue ]] ;;
esac
"""
# A step with mkdir creates no folders; if the file slow_disk exists, it creates the file `started`
# and takes 1 s. A step with `python -P -c` in a container runs the container's python. Every other
# step runs the script $FAKE/ranks in place of the ranks, with the folder of their logs in $LOGS.
SRUN = """\
printf '%s\\t' srun "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls"
env >"$FAKE/environment"
case "$*" in *mkdir*) [[ ! -e $FAKE/slow_disk ]] || { touch started; /bin/sleep 1; }; exit 0 ;; esac
case "$*" in *" --container-image="*" python -P -c "*)
    while [[ $1 != python ]]; do shift; done
    PATH=$FAKE/image:$PATH exec "$@"
esac
for word in "$@"; do
    case $word in --output=*) logs=${word#--output=}; export LOGS=${logs%/*} ;; esac
done
exec bash -c "$(cat "$FAKE/ranks")"
"""
# Skips a check that only imports RankZero, which takes half a second.
PYTHON = """\
case "$*" in *"import pipeline.errors") exit 0 ;; esac
exec "{python}" "$@"
"""

# `apptainer exec [OPTIONS] IMAGE.sif COMMAND` runs COMMAND, with the container's python first in
# PATH. FakeJob.use_container creates this python.
APPTAINER = """\
printf '%s\\t' apptainer "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls"
while [[ $1 != *.sif ]]; do shift; done
shift
PATH=$FAKE/image:$PATH exec "$@"
"""

# Shortens the script's sleeps of 1 s (between polls) and 1.5 s (while srun starts); prints any
# other sleep instead of sleeping.
SLEEP = """\
case $1 in 1) exec /bin/sleep 0.1 ;; 1.5) exec /bin/sleep 0.2 ;; esac
echo "sleeps $1"
"""


def status(state: str, **fields) -> str:
    """status.json with the fields that a run writes."""
    values = {
        "state": state, "step": 4, "total_steps": 9, "exit_code": None, "reason": None,
        "host": "node1", "started": 123.25,
    }  # fmt: skip
    return dump_json(values | fields)


def ranks_script(text: str = "", code: int = 0, more: str = "") -> str:
    """The script of the ranks: write `text` to status.json, run `more`, and exit with the code."""
    write = f"cat >run/status.json <<'END'\n{text}END\n" if text else ""
    return f"{write}{more}\nexit {code}\n"


@dataclass
class FakeJob:
    """A job: its copy of the batch script, its submit folder, and the fake programs."""

    folder: Path
    environment: dict[str, str]

    def start(
        self, script: str, *words: str, do: str = "exit 0", cwd: Path | None = None, **more: str
    ) -> subprocess.Popen:
        """Start a batch script with the arguments `words`, and `more` environment variables.

        `do` is the script of its ranks.
        """
        fake, checkout = self.folder / "fake", self.folder / "my checkout"
        (fake / "ranks").write_text(do)
        # The arguments of sbatch, which scontrol prints.
        command = " ".join([f"../my checkout/slurm/{script}", *words])
        (fake / "command").write_text(command)
        copied_script = self.folder / "slurm_script"
        shutil.copy(checkout / "slurm" / script, copied_script)
        return subprocess.Popen(
            ["bash", copied_script, *words],
            cwd=cwd or self.submit_folder, env=self.environment | more, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, script: str, *words: str, do: str = "exit 0", **more: str) -> tuple[int, str]:
        """Exit code and output of a batch script; arguments as for `start`."""
        process = self.start(script, *words, do=do, **more)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def train(self, do: str, *words: str, **more: str) -> tuple[int, str]:
        """Exit code and output of train.sbatch; `do` is the script of its ranks."""
        return self.run("train.sbatch", "my run.yaml", *words, do=do, **more)

    @property
    def submit_folder(self) -> Path:
        return self.folder / "submitted here"

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of each call of a fake program."""
        lines = (self.folder / "fake/calls").read_text().splitlines()
        words = [line.rstrip("\t").split("\t") for line in lines]
        return [line[1:] for line in words if line[0] == program]

    def use_container(self, words: str) -> None:
        """Set `container` in env.sh to `words`.

        Only the container's python (fake/image) can import RankZero then, not the node's python.
        """
        script = self.folder / "my checkout/slurm/env.sh"
        text = script.read_text()
        assert text.count("\ncontainer=()\n") == 1
        script.write_text(text.replace("\ncontainer=()\n", f"\ncontainer=({words})\n"))
        (self.folder / "fake/image").mkdir()
        python = self.folder / "fake/bin/python"
        python.rename(self.folder / "fake/image/python")
        python.write_text("#!/bin/bash\nexit 1\n")
        python.chmod(0o755)

    def requeued(self) -> list[str]:
        """The job ids that `scontrol requeue` was called with."""
        return [call[1] for call in self.calls("scontrol") if call[0] == "requeue"]

    def variable(self, name: str) -> str | None:
        """A variable in the environment of the last srun."""
        lines = (self.folder / "fake/environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line).get(name)


def make_job(tmp_path: Path) -> FakeJob:
    """A job of two nodes of eight GPUs, in a checkout and a submit folder with spaces."""
    fake, submit_folder = tmp_path / "fake", tmp_path / "submitted here"
    (fake / "bin").mkdir(parents=True)
    submit_folder.mkdir()
    shutil.copytree(ROOT / "slurm", tmp_path / "my checkout/slurm")
    (submit_folder / "my run.yaml").write_text("model: m\ntrain_data: t\noutput_dir: run\n")
    (fake / "job_state").write_text("RUNNING Reason=None")
    python = PYTHON.format(python=sys.executable)
    programs = {
        "scontrol": SCONTROL, "srun": SRUN, "python": python, "sleep": SLEEP,
        "apptainer": APPTAINER,
    }  # fmt: skip
    for name, text in programs.items():
        path = fake / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}")
        path.chmod(0o755)
    return FakeJob(
        tmp_path,
        {
            "PATH": f"{fake / 'bin'}:/usr/bin:/bin", "FAKE": str(fake), "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_ON_NODE": "64", "SLURMD_NODENAME": "node1",
            "SLURM_SUBMIT_DIR": str(submit_folder),
        },
    )  # fmt: skip
