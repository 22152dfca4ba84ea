"""TrainingState: all objects that the training loop uses; assemble.py builds it."""

from dataclasses import dataclass, field

from pipeline.cluster.heartbeat import Heartbeat
from pipeline.cluster.session import Session
from pipeline.cluster.stop import StopRequests
from pipeline.data.dataset.reader import Split
from pipeline.plan.plan import Plan
from pipeline.train.checkpoint import Progress
from pipeline.train.context import RunContext
from pipeline.train.display import ProgressDisplay
from pipeline.train.engine import Engine
from pipeline.train.folder import RunFolder
from pipeline.train.metrics import InputWait, MetricsFile, PeakBytes, Stopwatch
from pipeline.train.questions import HeldOutQuestions
from pipeline.train.writer import CheckpointWriter


@dataclass(kw_only=True)
class TrainingState:
    """The objects that the training loop uses.

    `saved`: progress at the newest checkpoint in the run folder; None if there is none. `writer`
    and `metrics`: None on ranks other than 0. `frozen_checksum`: checksum of the base before
    training, only with `--debug`. `questions`: held-out rows that `eval_generate` answers.
    `micro_batch_s`: seconds of a micro-batch in the last step. `batches_per_agreement`: number of
    micro-batches after which the ranks agree again, within a step, whether to stop.
    """

    context: RunContext
    folder: RunFolder
    engine: Engine
    train_split: Split
    eval_split: Split | None
    progress: Progress
    saved: Progress | None
    display: ProgressDisplay
    peak: PeakBytes
    writer: CheckpointWriter | None
    metrics: MetricsFile | None
    frozen_checksum: int | None
    questions: HeldOutQuestions | None = None
    input_wait: InputWait = field(default_factory=InputWait)
    step_watch: Stopwatch = field(default_factory=Stopwatch)
    micro_batch_s: float = 0.0
    batches_per_agreement: int = 1

    @property
    def plan(self) -> Plan:
        """The plan of the run, with the schedule for the prepared data."""
        return self.context.plan

    @property
    def session(self) -> Session:
        """The session: placement of this rank, key-value store and process group."""
        return self.context.session

    @property
    def stops(self) -> StopRequests:
        """The stop requests to this rank."""
        return self.context.stops

    @property
    def heartbeat(self) -> Heartbeat:
        """The heartbeat of this rank's main thread."""
        return self.context.heartbeat
