"""Arguments of train.sbatch: job arrays with a line of settings for each task, and wrong input."""

import pytest

from tests.messages import assert_mentions
from tests.slurm.fake_slurm import ranks_script, status

pytestmark = pytest.mark.unit


# Lines of settings; empty lines and comments do not count. The last must not be executed by bash.
SWEEP = """\
# one line for each task
lr=1e-4 lora_target_modules="[q_proj, v_proj]"

output_dir='runs/a b' lr=$(touch_nothing)
"""


def test_a_task_of_an_array_uses_its_line_and_requeues_only_itself(job):
    (job.submit_folder / "my sweep.txt").write_text(SWEEP)
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    script = ranks_script(status("stopped"), 75).replace("run/", "run-1/")
    code, output = job.train(script, "@my sweep.txt", "epochs=2", **array)
    assert code == 75, output
    srun = job.calls("srun")[-1]
    assert srun[-5:] == [
        "my run.yaml", "epochs=2", "lr=1e-4", "lora_target_modules=[q_proj, v_proj]",
        "output_dir=run-1",
    ]  # fmt: skip
    assert job.requeued() == ["7_1"]  # `7` would be all tasks of the array


def test_a_line_may_set_output_dir_and_is_never_executed(job):
    (job.submit_folder / "s.txt").write_text(SWEEP.replace("lr=$(touch_nothing)", "seed=1"))
    script = ranks_script(status("done")).replace("run/", "'runs/a b/'")
    code, output = job.train(script, "@s.txt", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert code == 0, output
    assert job.calls("srun")[-1][-2:] == ["output_dir=runs/a b", "seed=1"]
    (job.submit_folder / "s.txt").write_text(SWEEP)
    code, output = job.train(script, "@s.txt", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert (code, "found '$(touch_nothing)'" in output) == (2, True), output


@pytest.mark.parametrize(
    ("words", "task", "facts"),
    [
        ([], None, ["run file first"]),
        (["lr=1"], None, ["run file first"]),
        (["my run.yaml", "lorar=1"], None, ["lorar", "lora_r"]),
        (["nowhere.yaml"], None, ["nowhere.yaml"]),
        (["my run.yaml", "@s.txt"], None, ["--array=1-N", "@SWEEP.txt"]),
        (["my run.yaml"], "1", ["--array=1-N", "@SWEEP.txt"]),
        (["my run.yaml", "@s.txt"], "3", ["s.txt", "line 3"]),
        (["my run.yaml", "@s.txt"], "0", ["task 0", "--array=1-N"]),
        (["my run.yaml", "@nowhere.txt"], "1", ["nowhere.txt"]),
        (["my run.yaml", "@s.txt", "@t.txt"], "1", ["@s.txt", "@t.txt"]),
        (["my run.yaml", "@broken.txt"], "2", ["broken.txt:4", "lr=2 name='x y", "unmatched"]),
    ],
)
def test_wrong_input_is_exit_2_before_a_rank_is_started(job, words, task, facts):
    (job.submit_folder / "s.txt").write_text(SWEEP)
    (job.submit_folder / "broken.txt").write_text("# rates\nlr=1\n\nlr=2 name='x y\n")
    array = {} if task is None else {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": task}
    code, output = job.run("train.sbatch", *words, **array)
    assert code == 2, output
    assert_mentions(output, *facts)
    # The only call creates folders on the nodes; no call starts ranks.
    assert len(job.calls("srun")) == 1
    assert job.requeued() == []
    assert not (job.submit_folder / "run").exists()
