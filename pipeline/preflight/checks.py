"""The list of checks, in stages. docs/preflight.md explains them in this order."""

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
    """Checks whose results are gathered together.

    The stage is skipped if a check of `requires` has failed, because the stage would fail or hang.
    """

    checks: tuple[Check, ...]
    requires: tuple[Check, ...] = ()
    needs_several_ranks: bool = False


# Training runs this stage too. It needs neither torch nor communication between ranks.
BEFORE_TORCH = Stage(
    (
        SETTINGS, RANKS, VERSIONS, PORT, NETWORK, GPUS, DRIVERS, PLAN, GPU_MEMORY, HOST_MEMORY,
        SHARED_MEMORY, MODEL, BASE, DISK,
    )
)  # fmt: skip
_PLANNED = (SETTINGS, PLAN)
_CONNECTED = (*_PLANNED, VERSIONS, RANKS, GPUS, NETWORK, LIBRARIES)
STAGES = [
    BEFORE_TORCH,
    # The ranks communicate over the key-value store.
    Stage((CLOCK, RUN_FOLDER, PREPARED_DATA), requires=_PLANNED),
    Stage((TOKENIZER, ROWS), requires=(*_PLANNED, VERSIONS, MODEL)),
    Stage((LIBRARIES, QUANTISATION, MATRIX_PRODUCT), requires=(*_PLANNED, VERSIONS, GPUS)),
    Stage((PROCESS_GROUP,), requires=_CONNECTED, needs_several_ranks=True),
    Stage(
        (ALL_REDUCE, LINKS, ALL_TO_ALL),
        requires=(*_CONNECTED, PROCESS_GROUP),
        needs_several_ranks=True,
    ),
]
