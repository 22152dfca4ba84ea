"""Training: a run that is ready to step; made in assemble.py, used by the loop."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.heartbeat import Pulse
from pipeline.cluster.session import Session
from pipeline.cluster.stop import StopRequests
from pipeline.data.dataset.reader import Split
from pipeline.plan.plan import Plan
from pipeline.train.checkpoint import Checkpoints, Progress
from pipeline.train.engine import Engine
from pipeline.train.metrics import InputWait, MetricsFile, PeakBytes
from pipeline.train.progress import ProgressDisplay
from pipeline.train.saving import Saver
from pipeline.train.status import RunStatus


@dataclass(kw_only=True)
class Training:
    """A run that is ready to step. `saver`, `metrics` and `status` are rank 0's alone."""

    plan: Plan
    session: Session
    engine: Engine
    train_split: Split
    eval_split: Split | None
    folder: Path
    checkpoints: Checkpoints
    progress: Progress
    saved: Progress | None  # of the newest checkpoint in the folder
    display: ProgressDisplay
    stops: StopRequests
    pulse: Pulse
    peak: PeakBytes
    input_wait: InputWait
    saver: Saver | None
    metrics: MetricsFile | None
    status: RunStatus | None
    frozen_checksum: int | None  # of --debug, which looks at it again at the end
