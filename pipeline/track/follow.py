"""Send a run's metrics and results to one tracker, during training or afterwards."""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import dump_json, file_sha256, read_json, write_text
from pipeline.track.facts import RunFacts
from pipeline.track.lines import LineReader, parse_metrics
from pipeline.track.trackers import TRACKERS, Tracker

logger = logging.getLogger(__name__)
_POLL_S = 1.0  # interval at which metrics.jsonl is read during training


@dataclass
class SentRecord:
    """RUN_FOLDER/tracking/NAME.json: which data of a run the tracker NAME has received.

    `run_id`: the run's id in the tracker; None before its first start.
    """

    path: Path
    run_id: str | None = None
    # "train" or "eval", the two kinds of lines in metrics.jsonl -> last step that was sent
    steps: dict[str, int] = field(default_factory=dict)
    # "score" or "adapter" -> SHA-256 of the file that was sent
    digests: dict[str, str] = field(default_factory=dict)

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


def send_run(folder: Path, name: str, wait: Callable[[float], bool]) -> None:
    """Send a run's metrics to the tracker `name` until the run has ended, and then its results.

    `wait`: waits for at most the given number of seconds, and returns whether the run has ended.
    Lines that an earlier call has sent are not sent again. Raises the exceptions of the tracker's
    library.
    """
    sent, reader = SentRecord.load(sent_path(folder, name)), LineReader(folder / "metrics.jsonl")
    facts = RunFacts.load(folder)
    if name == "wandb" and sent.run_id and os.environ.get("WANDB_MODE") == "offline":
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
    """Send a line of metrics.jsonl, unless its step was sent before."""
    kind, metrics = parse_metrics(line)
    if line["step"] > sent.steps.get(kind, 0):
        tracker.log(metrics, line["step"])
        sent.steps[kind] = line["step"]


def _send_results(tracker: Tracker, facts: RunFacts, sent: SentRecord) -> None:
    """Send score.json and the adapter, each if it exists and has changed since it was sent."""
    path = facts.folder / "score.json"
    if path.is_file() and _record_if_changed(sent, "score", path):
        scores = read_json(path)
        metrics = {
            f"score/{model}/{name}": float(value)
            for model, numbers in scores["models"].items()
            for name, value in numbers.items()
            if isinstance(value, int | float)  # intervals are lists
        }
        last_step = max(sent.steps.values(), default=0)  # score.json has no step
        tracker.log(metrics, last_step)
        if "answers" in facts.uploads and scores["answers"]:
            rows = [
                {column: str(value) for column, value in answer.items()}
                for answer in scores["answers"]
            ]
            tracker.table("answers", rows)
    weights = facts.folder / "adapter/adapter_model.safetensors"
    has_adapter = "adapter" in facts.uploads and weights.is_file()
    if has_adapter and _record_if_changed(sent, "adapter", weights):
        tracker.artifact("adapter", weights.parent)


def _record_if_changed(sent: SentRecord, name: str, path: Path) -> bool:
    """Record the digest of a file; True if it differs from the digest that was recorded before."""
    digest = file_sha256(path)
    has_changed = sent.digests.get(name) != digest
    sent.digests[name] = digest
    return has_changed


def call_later(seconds: float, function: Callable[[], None]) -> None:
    """Call a function after these seconds, from a thread that does not keep the process alive."""
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
