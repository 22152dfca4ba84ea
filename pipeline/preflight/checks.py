"""The stages of a preflight and the checks of each, in the order of docs/preflight.md."""

from dataclasses import dataclass

from pipeline.preflight.check import Check
from pipeline.preflight.gpus import DRIVERS, GPU_MEMORY, GPUS
from pipeline.preflight.host import CLOCK, DISK, HOST_MEMORY, RUN_FOLDER, SHARED_MEMORY
from pipeline.preflight.inputs import (
    BASE,
    MODEL,
    PLAN,
    PREPARED_DATA,
    ROWS,
    SETTINGS,
    TOKENIZER,
)
from pipeline.preflight.network import NETWORK, PORT, RANKS
from pipeline.preflight.rates import ALL_REDUCE, ALL_TO_ALL, LINKS, MATRIX_PRODUCT
from pipeline.preflight.software import LIBRARIES, PROCESS_GROUP, QUANTISATION, VERSIONS


@dataclass(frozen=True)
class Stage:
    """Checks whose results rank 0 gathers in one collective.

    The stage is skipped if a check of `requires` has failed, because its probes would fail or hang.
    It is also skipped if `needs_several_ranks` is true and there is one process.
    """

    checks: tuple[Check, ...]
    requires: tuple[Check, ...] = ()
    needs_several_ranks: bool = False


# Training also runs this stage at its start. Its probes need neither torch nor other ranks.
BEFORE_TORCH = Stage(
    (
        SETTINGS, RANKS, VERSIONS, PORT, NETWORK, GPUS, DRIVERS, PLAN, GPU_MEMORY, HOST_MEMORY,
        SHARED_MEMORY, MODEL, BASE, DISK,
    )
)  # fmt: skip
_FOR_ANY_PLAN = (SETTINGS, PLAN)
_FOR_PROCESS_GROUP = (*_FOR_ANY_PLAN, VERSIONS, RANKS, GPUS, NETWORK, LIBRARIES)
STAGES = [
    BEFORE_TORCH,
    # The probes of this stage communicate over the TCP key-value store, without a process group.
    Stage((CLOCK, RUN_FOLDER, PREPARED_DATA), requires=_FOR_ANY_PLAN),
    Stage((TOKENIZER, ROWS), requires=(*_FOR_ANY_PLAN, VERSIONS, MODEL)),
    Stage((LIBRARIES, QUANTISATION, MATRIX_PRODUCT), requires=(*_FOR_ANY_PLAN, VERSIONS, GPUS)),
    Stage((PROCESS_GROUP,), requires=_FOR_PROCESS_GROUP, needs_several_ranks=True),
    Stage(
        (ALL_REDUCE, LINKS, ALL_TO_ALL),
        requires=(*_FOR_PROCESS_GROUP, PROCESS_GROUP),
        needs_several_ranks=True,
    ),
]
