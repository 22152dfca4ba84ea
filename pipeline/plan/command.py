"""The commands that start a planned run: here, and under Slurm."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.plan.plan import Plan


def start_commands(plan: Plan, run_file: Path, overrides: Sequence[str]) -> list[str]:
    """One line for this machine or these machines, one for sbatch where there are GPUs."""
    arguments = shlex.join(["launch/train.py", str(run_file), *overrides])
    ranks, nodes = plan.layout.ranks_per_node, plan.layout.nodes
    if plan.hardware.kind == "cpu":
        here = f"deepspeed --num_accelerators {ranks} {arguments}"
        return [f"start      {here if ranks > 1 else f'python {arguments}'}"]
    # Every visible GPU unless fewer are meant: with --num_gpus DeepSpeed's launcher would forget
    # CUDA_VISIBLE_DEVICES (0.19.8 launcher/runner.py), and with it what a scheduler has granted.
    fewer = f"--num_gpus {ranks} " if ranks < plan.hardware.devices_per_node else ""
    hosts = f"--hostfile HOSTS --num_nodes {nodes} " if nodes > 1 else ""
    here = f"deepspeed {hosts}{fewer}{arguments}"
    if nodes == ranks == 1:
        here = f"python {arguments}"
    return [f"start      {here}", f"sbatch     {_sbatch(nodes, ranks, arguments)}"]


def _sbatch(nodes: int, ranks: int, arguments: str) -> str:
    """One torchrun a node, which finds the others by the first node's name: no ssh."""
    head = "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
    run = f"torchrun --nnodes={nodes} --nproc-per-node={ranks}"
    if nodes > 1:
        run += f" --rdzv-backend=c10d --rdzv-endpoint={head}:29500"
    wrapped = shlex.quote(f"srun {run} {arguments}")
    return f"sbatch --nodes={nodes} --ntasks-per-node=1 --gpus-per-node={ranks} --wrap {wrapped}"
