"""The table of checks. Each is two small functions: what a rank looks at, and what all of it says.

docs/preflight.md explains them in this order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.preflight.check import Finding, ProbeResults
from pipeline.preflight.content import assess_rows, assess_tokenizer, probe_rows, probe_tokenizer
from pipeline.preflight.context import RankContext
from pipeline.preflight.gpus import assess_device_memory, assess_drivers, assess_gpus, probe_gpus
from pipeline.preflight.host import (
    assess_host_memory,
    assess_shared_memory,
    probe_host_memory,
    probe_shared_memory,
)
from pipeline.preflight.inputs import assess_disk, assess_model, probe_disk, probe_model
from pipeline.preflight.libraries import (
    assess_group,
    assess_tile,
    assess_torch,
    probe_group,
    probe_tile,
    probe_torch,
)
from pipeline.preflight.network import (
    assess_network,
    assess_port,
    assess_ranks,
    probe_network,
    probe_port,
    probe_ranks,
)
from pipeline.preflight.rates import (
    assess_pairs,
    assess_product,
    assess_sum,
    probe_pairs,
    probe_product,
    probe_sum,
)
from pipeline.preflight.same import (
    assess_base,
    assess_data_key,
    assess_plan,
    assess_settings,
    assess_versions,
    probe_base,
    probe_data_key,
    probe_plan,
    probe_settings,
    probe_versions,
)
from pipeline.preflight.together import assess_clock, assess_folder, probe_clock, probe_folder

By = Literal["rank", "machine", "first"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """`look` is done by every rank, by local rank 0 of each machine, or by rank 0 alone.

    It returns JSON and raises UserError for what fails whatever the others see. `judge` is pure
    and gets all answers, on rank 0. `otherwise` is the remedy for an error that brings none along.
    """

    name: str
    look: Callable[[RankContext], Any]
    judge: Callable[[ProbeResults], Iterable[Finding]]
    otherwise: str
    by: By = "rank"
    needs: Literal["nothing", "settings", "plan"] = "plan"


# fmt: off
# No torch, no collective: training makes these too, before it loads a model.
CHEAP = (
    Check(name="settings", look=probe_settings, judge=assess_settings,
        needs="nothing", otherwise="docs/configuration.md lists every setting"),
    Check(name="ranks", look=probe_ranks, judge=assess_ranks,
        needs="nothing", otherwise="start it with `deepspeed`, torchrun, srun or mpirun"),
    Check(name="versions", look=probe_versions, judge=assess_versions,
        needs="nothing", otherwise="install the project again (make install)"),
    Check(name="port", look=probe_port, judge=assess_port,
        by="first", needs="nothing", otherwise="give the launcher another port"),
    Check(name="network", look=probe_network, judge=assess_network,
        by="machine", needs="nothing", otherwise="ask the administrator how they are connected"),
    Check(name="gpus", look=probe_gpus, judge=assess_gpus,
        needs="nothing", otherwise="nvidia-smi shows what the driver sees"),
    Check(name="drivers", look=probe_gpus, judge=assess_drivers,
        needs="nothing", otherwise="nvidia-smi shows what the driver sees"),
    Check(name="plan", look=probe_plan, judge=assess_plan,
        needs="settings", otherwise="launch/plan.py shows what would fit"),
    Check(name="gpu memory", look=probe_gpus, judge=assess_device_memory,
        otherwise="nvidia-smi shows what the driver sees"),
    Check(name="host memory", look=probe_host_memory, judge=assess_host_memory,
        by="machine", otherwise="look at /proc/meminfo and the control group"),
    Check(name="shared memory", look=probe_shared_memory, judge=assess_shared_memory,
        by="machine", otherwise="look at /dev/shm"),
    Check(name="model", look=probe_model, judge=assess_model,
        by="machine", otherwise="download the model again"),
    Check(name="base", look=probe_base, judge=assess_base,
        by="machine", otherwise="download the model again"),
    Check(name="disk", look=probe_disk, judge=assess_disk,
        by="first", otherwise="give another output_dir"),
)
# Ranks talk over the key-value store.
TOGETHER = (
    Check(name="clock", look=probe_clock, judge=assess_clock,
        otherwise="look at the machine's clock"),
    Check(name="run folder", look=probe_folder, judge=assess_folder,
        otherwise="give another output_dir"),
    Check(name="prepared data", look=probe_data_key, judge=assess_data_key,
        otherwise="run launch/prepare.py with the run file"),
)
CONTENT = (
    Check(name="tokenizer", look=probe_tokenizer, judge=assess_tokenizer,
        by="machine", otherwise="copy the model's tokenizer files anew"),
    Check(name="rows", look=probe_rows, judge=assess_rows,
        by="first", otherwise="launch/prepare.py says more"),
)
DEVICE = (
    Check(name="libraries", look=probe_torch, judge=assess_torch,
        otherwise="install the project again (make install)"),
    Check(name="4 bits", look=probe_tile, judge=assess_tile,
        otherwise="python -m bitsandbytes tells what its library found"),
    Check(name="matrix product", look=probe_product, judge=assess_product,
        otherwise="nvidia-smi -q and dmesg tell of a broken device"),
)
# Through the process group, one stage after the other.
GROUP = (
    Check(name="process group", look=probe_group, judge=assess_group,
        otherwise="NCCL_DEBUG=INFO tells what it tries"),
)
LINKS = (
    Check(name="all-reduce", look=probe_sum, judge=assess_sum,
        otherwise="NCCL_DEBUG=INFO tells what it tries"),
    Check(name="links", look=probe_pairs, judge=assess_pairs,
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
