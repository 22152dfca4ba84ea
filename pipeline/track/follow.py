"""Send a run to one tracker: once, or while it is training."""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import dump_json, file_sha256, read_json, write_text
from pipeline.track.facts import RunFacts
from pipeline.track.lines import LineReader, metrics_of
from pipeline.track.trackers import TRACKERS, Tracker

logger = logging.getLogger(__name__)
_POLL_S = 1.0


@dataclass
class SentRecord:
    """RUN/tracking/NAME.json: the run's id in the tracker, and the data that was sent to it."""

    path: Path
    run_id: str | None = None
    steps: dict[str, int] = field(default_factory=dict)  # kind of line -> last step
    digests: dict[str, str] = field(default_factory=dict)  # score.json and adapter -> SHA-256

    @classmethod
    def load(cls, path: Path) -> "SentRecord":
        """Read the file; empty if there is none, or if it is damaged."""
        try:
            values = read_json(path)
            return cls(path, values["run_id"], values["steps"], values["digests"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls(path)

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = {"run_id": self.run_id, "steps": self.steps, "digests": self.digests}
        write_text(self.path, dump_json(values))


def sent_path(folder: Path, tracker: str) -> Path:
    """The file that records which data of a run a tracker has received."""
    return folder / "tracking" / f"{tracker}.json"


def follow(folder: Path, name: str, wait: Callable[[float], bool]) -> None:
    """Send a run's metrics to a tracker until `wait` returns True, and then its results.

    `wait`: waits for at most this many seconds, and returns whether the run has ended. Lines that
    an earlier call has sent are not sent again. Raises the exceptions of the tracker's library.
    """
    sent, reader = SentRecord.load(sent_path(folder, name)), LineReader(folder / "metrics.jsonl")
    facts = RunFacts.of(folder)
    is_segment = name == "wandb" and sent.run_id and os.environ.get("WANDB_MODE") == "offline"
    if is_segment:
        logger.info("wandb: offline, so this start adds a segment to the run %s", sent.run_id)
    tracker = TRACKERS[name](facts, sent.run_id)
    sent.run_id = tracker.run_id
    sent.save()
    has_ended = False
    while not has_ended:
        has_ended = wait(_POLL_S)
        if lines := reader.new_lines():
            try:
                for line in lines:
                    _send_line(tracker, line, sent)
            finally:
                sent.save()
    _send_results(tracker, facts, sent)
    tracker.finish()
    sent.save()


def _send_line(tracker: Tracker, line: dict[str, Any], sent: SentRecord) -> None:
    kind, metrics = metrics_of(line)
    if line["step"] > sent.steps.get(kind, 0):
        tracker.log(metrics, line["step"])
        sent.steps[kind] = line["step"]


def _send_results(tracker: Tracker, facts: RunFacts, sent: SentRecord) -> None:
    """Send score.json and the adapter, each if it exists and has changed since it was sent."""
    path = facts.folder / "score.json"
    if path.is_file() and _is_new(sent, "score", path):
        scores = read_json(path)
        metrics = {
            f"score/{model}/{name}": float(value)
            for model, numbers in scores["models"].items()
            for name, value in numbers.items()
            if isinstance(value, int | float)  # intervals are lists
        }
        tracker.log(metrics, max(sent.steps.values(), default=0))
        if "answers" in facts.uploads and scores["answers"]:
            rows = [{key: str(v) for key, v in answer.items()} for answer in scores["answers"]]
            tracker.table("answers", rows)
    weights = facts.folder / "adapter/adapter_model.safetensors"
    if "adapter" in facts.uploads and weights.is_file() and _is_new(sent, "adapter", weights):
        tracker.artifact("adapter", weights.parent)


def _is_new(sent: SentRecord, name: str, path: Path) -> bool:
    """Whether a file differs from the one that was sent last. Records its digest as sent."""
    digest = file_sha256(path)
    is_new, sent.digests[name] = sent.digests.get(name) != digest, digest
    return is_new


def call_later(seconds: float, function: Callable[[], None]) -> None:
    """Call a function after these seconds, from a thread that does not keep the process alive."""
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
