"""Batch scripts in containers, with fakes of pyxis (in srun) and apptainer."""

import pytest

from tests.messages import assert_mentions
from tests.slurm.fake_slurm import ranks_script, status

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("script", ["train.sbatch", "debug.sbatch"])
@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("apptainer exec --nv /i/rankzero.sif", ["apptainer", "exec", "--nv", "/i/rankzero.sif"]),
        ('--container-image=/i/r.sqsh --container-mounts="/a b:/c"',
         ["--container-image=/i/r.sqsh", "--container-mounts=/a b:/c"]),
    ],
    ids=["apptainer", "pyxis"],
)  # fmt: skip
def test_ranks_run_in_the_container(job, script, words, call):
    job.use_container(words)
    code, output = job.run(script, "my run.yaml", do=ranks_script(status("done")))
    assert code == 0, output
    srun = job.calls("srun")[-1]
    start = srun.index("python")
    assert srun[start - len(call) : start] == call


@pytest.mark.parametrize(
    ("words", "program"),
    [
        ("apptainer exec --nv /i/rankzero.sif", "apptainer"),
        ('--container-image=/i/r.sqsh --container-mounts="/a b:/c"', "srun"),
    ],
    ids=["apptainer", "pyxis"],
)
def test_the_checks_of_train_sbatch_run_in_the_container(job, words, program):
    job.use_container(words)
    code, output = job.train(ranks_script(status("done")))
    assert code == 0, output
    checks = [words for words in job.calls(program) if {"-P", "-c"} <= set(words)]
    assert len(checks) == 2  # RankZero can be imported, and the run file loads


def test_a_wrong_run_file_is_refused_by_the_python_of_the_container(job):
    job.use_container("apptainer exec /i/rankzero.sif")
    code, output = job.train(ranks_script(status("done")), "lorar=1")
    assert code == 2, output
    assert_mentions(output, "lorar", "lora_r")


def test_a_container_without_rankzero_is_refused(job):
    job.use_container("apptainer exec /i/empty.sif")
    (job.folder / "fake/image/python").write_text("#!/bin/bash\nexit 1\n")
    code, output = job.train(ranks_script(status("done")))
    assert code == 1, output
    assert_mentions(output, "apptainer exec /i/empty.sif", "env.sh")
