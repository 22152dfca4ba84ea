"""Which rank of how many this process is, from the environment alone. Pure, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import UserError

# What DeepSpeed's launcher and torchrun both set for every rank; some of them without the others
# is what makes DeepSpeed fall back to MPI discovery (DeepSpeed 0.19.8, comm/comm.py:844).
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """This process among all processes of the run."""

    launcher: str = "one process"
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    @property
    def nodes(self) -> int:
        """Machines of the run; every one starts the same number of ranks."""
        return self.world_size // self.local_size

    def variables(self) -> dict[str, str]:
        """What DeepSpeed reads; complete, so that its MPI discovery never runs unasked."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_SIZE": str(self.local_size),
            "CROSS_RANK": str(self.rank // self.local_size),
            "CROSS_SIZE": str(self.nodes),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def from_environment(env: Mapping[str, str]) -> Placement:
    """Placement as DeepSpeed's launcher or torchrun set it, or one process without a launcher.

    Raises UserError where the environment contradicts itself, rather than training N times alone.
    """
    there = [name for name in _RANK_VARIABLES if name in env]
    if not there:
        _refuse_unknown_launcher(env)
        return Placement()
    if missing := [name for name in _RANK_VARIABLES if name not in env]:
        raise UserError(
            f"environment: {', '.join(there)} set but not {', '.join(missing)}; start with "
            "`deepspeed launch/train.py RUN.yaml`, or unset them all for one process"
        )
    number = {name: _number(env, name) for name in _RANK_VARIABLES if name != "MASTER_ADDR"}
    local_name = "LOCAL_SIZE" if "LOCAL_SIZE" in env else "LOCAL_WORLD_SIZE"
    local_size = _number(env, local_name) if local_name in env else number["WORLD_SIZE"]
    rank, world = number["RANK"], number["WORLD_SIZE"]
    if not 0 <= rank < world or not 0 <= number["LOCAL_RANK"] < local_size:
        raise UserError(
            f"environment: RANK={rank} of WORLD_SIZE={world}, LOCAL_RANK={number['LOCAL_RANK']} "
            f"of {local_size} on this machine: a rank must be below its size"
        )
    if world % local_size:
        raise UserError(
            f"environment: WORLD_SIZE={world} is not a multiple of {local_name}={local_size}; "
            "every machine must start the same number of ranks"
        )
    return Placement(
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed",
        rank=rank,
        local_rank=number["LOCAL_RANK"],
        world_size=world,
        local_size=local_size,
        master_addr=env["MASTER_ADDR"],
        master_port=number["MASTER_PORT"],
    )


def _refuse_unknown_launcher(env: Mapping[str, str]) -> None:
    for name, launcher in (
        ("SLURM_NTASKS", "Slurm"),
        ("OMPI_COMM_WORLD_SIZE", "mpirun"),
        ("PMI_SIZE", "mpirun"),
    ):
        if env.get(name, "1") not in ("", "1"):
            raise UserError(
                f"environment: {name}={env[name]} but no rank is set, so each of these processes "
                f"would train alone; under {launcher} start one `torchrun` or `deepspeed` a node"
            )


def _number(env: Mapping[str, str], name: str) -> int:
    if not env[name].isdigit():
        raise UserError(f"environment: {name}={env[name]!r} is not a whole number")
    return int(env[name])
