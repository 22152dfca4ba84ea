"""The commands that start a planned run: here, and under Slurm."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.plan.plan import Plan

_GIB = 2**30
# What a node needs beside the prediction: Python and CUDA of the first seconds, files on their way.
_SPARE_MEMORY = 1.25
_CPUS_PER_GPU = 4  # one trains, others read and prepare its input


def start_commands(plan: Plan, run_file: Path, overrides: Sequence[str]) -> list[str]:
    """One line for this machine or these machines, one for sbatch where there are GPUs."""
    words = shlex.join([str(run_file), *overrides])
    ranks, nodes = plan.layout.ranks_per_node, plan.layout.nodes
    if plan.hardware.kind == "cpu":
        here = f"deepspeed --num_accelerators {ranks} launch/train.py {words}"
        return [f"start      {here if ranks > 1 else f'python launch/train.py {words}'}"]
    # Every visible GPU unless fewer are meant: with --num_gpus DeepSpeed's launcher would forget
    # CUDA_VISIBLE_DEVICES (0.19.8 launcher/runner.py), and with it what a scheduler has granted.
    fewer = f"--num_gpus {ranks} " if ranks < plan.hardware.devices_per_node else ""
    hosts = f"--hostfile HOSTS --num_nodes {nodes} " if nodes > 1 else ""
    here = f"deepspeed {hosts}{fewer}launch/train.py {words}"
    if nodes == ranks == 1:
        here = f"python launch/train.py {words}"
    memory = math.ceil(plan.memory.host_peak_bytes * _SPARE_MEMORY / _GIB)
    asked = (
        f"--nodes={nodes} --gpus-per-node={ranks} --cpus-per-gpu={_CPUS_PER_GPU} --mem={memory}G"
    )
    return [f"start      {here}", f"sbatch     sbatch {asked} slurm/train.sbatch {words}"]
