"""The table of checks. Each is two small functions: what a rank looks at, and what all of it says.

docs/preflight.md explains them in this order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.preflight.content import judge_rows, judge_tokenizer, look_at_rows, look_at_tokenizer
from pipeline.preflight.findings import Finding, Seen
from pipeline.preflight.gpus import judge_device_memory, judge_drivers, judge_gpus, look_at_gpus
from pipeline.preflight.host import (
    judge_host_memory,
    judge_shared_memory,
    look_at_host_memory,
    look_at_shared_memory,
)
from pipeline.preflight.inputs import judge_disk, judge_model, look_at_disk, look_at_model
from pipeline.preflight.libraries import (
    judge_group,
    judge_tile,
    judge_torch,
    look_at_group,
    look_at_tile,
    look_at_torch,
)
from pipeline.preflight.network import (
    judge_network,
    judge_port,
    judge_ranks,
    look_at_network,
    look_at_port,
    look_at_ranks,
)
from pipeline.preflight.rates import (
    judge_pairs,
    judge_product,
    judge_sum,
    look_at_pairs,
    look_at_product,
    look_at_sum,
)
from pipeline.preflight.same import (
    judge_base,
    judge_data_key,
    judge_plan,
    judge_settings,
    judge_versions,
    look_at_base,
    look_at_data_key,
    look_at_plan,
    look_at_settings,
    look_at_versions,
)
from pipeline.preflight.subject import Subject
from pipeline.preflight.together import judge_clock, judge_folder, look_at_clock, look_at_folder

By = Literal["rank", "machine", "first"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """`look` is done by every rank, by local rank 0 of each machine, or by rank 0 alone.

    It returns JSON and raises UserError for what fails whatever the others see. `judge` is pure
    and gets all answers, on rank 0. `otherwise` is the remedy for an error that brings none along.
    """

    name: str
    look: Callable[[Subject], Any]
    judge: Callable[[Seen], Iterable[Finding]]
    otherwise: str
    by: By = "rank"
    needs: Literal["nothing", "settings", "plan"] = "plan"


# fmt: off
# No torch, no collective: training makes these too, before it loads a model.
CHEAP = (
    Check(name="settings", look=look_at_settings, judge=judge_settings,
        needs="nothing", otherwise="docs/configuration.md lists every setting"),
    Check(name="ranks", look=look_at_ranks, judge=judge_ranks,
        needs="nothing", otherwise="start it with `deepspeed`, torchrun, srun or mpirun"),
    Check(name="versions", look=look_at_versions, judge=judge_versions,
        needs="nothing", otherwise="install the project again (make install)"),
    Check(name="port", look=look_at_port, judge=judge_port,
        by="first", needs="nothing", otherwise="give the launcher another port"),
    Check(name="network", look=look_at_network, judge=judge_network,
        by="machine", needs="nothing", otherwise="ask the administrator how they are connected"),
    Check(name="gpus", look=look_at_gpus, judge=judge_gpus,
        needs="nothing", otherwise="nvidia-smi shows what the driver sees"),
    Check(name="drivers", look=look_at_gpus, judge=judge_drivers,
        needs="nothing", otherwise="nvidia-smi shows what the driver sees"),
    Check(name="plan", look=look_at_plan, judge=judge_plan,
        needs="settings", otherwise="launch/plan.py shows what would fit"),
    Check(name="gpu memory", look=look_at_gpus, judge=judge_device_memory,
        otherwise="nvidia-smi shows what the driver sees"),
    Check(name="host memory", look=look_at_host_memory, judge=judge_host_memory,
        by="machine", otherwise="look at /proc/meminfo and the control group"),
    Check(name="shared memory", look=look_at_shared_memory, judge=judge_shared_memory,
        by="machine", otherwise="look at /dev/shm"),
    Check(name="model", look=look_at_model, judge=judge_model,
        by="machine", otherwise="download the model again"),
    Check(name="base", look=look_at_base, judge=judge_base,
        by="machine", otherwise="download the model again"),
    Check(name="disk", look=look_at_disk, judge=judge_disk,
        by="first", otherwise="give another output_dir"),
)
# Ranks talk over the key-value store.
TOGETHER = (
    Check(name="clock", look=look_at_clock, judge=judge_clock,
        otherwise="look at the machine's clock"),
    Check(name="run folder", look=look_at_folder, judge=judge_folder,
        otherwise="give another output_dir"),
    Check(name="prepared data", look=look_at_data_key, judge=judge_data_key,
        otherwise="run launch/prepare.py with the run file"),
)
CONTENT = (
    Check(name="tokenizer", look=look_at_tokenizer, judge=judge_tokenizer,
        by="machine", otherwise="copy the model's tokenizer files anew"),
    Check(name="rows", look=look_at_rows, judge=judge_rows,
        by="first", otherwise="launch/prepare.py says more"),
)
DEVICE = (
    Check(name="libraries", look=look_at_torch, judge=judge_torch,
        otherwise="install the project again (make install)"),
    Check(name="4 bits", look=look_at_tile, judge=judge_tile,
        otherwise="python -m bitsandbytes tells what its library found"),
    Check(name="matrix product", look=look_at_product, judge=judge_product,
        otherwise="nvidia-smi -q and dmesg tell of a broken device"),
)
# Through the process group, one stage after the other.
GROUP = (
    Check(name="process group", look=look_at_group, judge=judge_group,
        otherwise="NCCL_DEBUG=INFO tells what it tries"),
)
LINKS = (
    Check(name="all-reduce", look=look_at_sum, judge=judge_sum,
        otherwise="NCCL_DEBUG=INFO tells what it tries"),
    Check(name="links", look=look_at_pairs, judge=judge_pairs,
        otherwise="NCCL_DEBUG=INFO tells what it tries"),
)
# fmt: on
STAGES: dict[str, tuple[Check, ...]] = {
    "before torch": CHEAP,
    "together": TOGETHER,
    "content": CONTENT,
    "device": DEVICE,
    "process group": GROUP,
    "links": LINKS,
}
