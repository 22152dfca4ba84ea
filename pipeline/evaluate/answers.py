"""Results of scored batches on the disk, so that a stopped score resumes.

A file has the results of one model on one set of rows with one set of options; its name is the hash
of all of these. Each rank appends to a file of its own, one line per batch.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pipeline.errors import SingleRankError
from pipeline.files import dump_json


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """Losses and answers of a batch of rows. `rows`: indexes of the rows; `seconds`: of the batch.

    An answer is None if its row has no question.
    """

    batch: int
    rows: list[int]
    loss_sums: list[float]
    answers: list[str | None]
    seconds: float

    @classmethod
    def from_json(cls, values: Any, rows: list[int]) -> Self | None:
        """Read a line of an answer file; None if it is damaged or has other rows than `rows`."""
        try:
            sums = [math.nan if each is None else each for each in values["loss_sums"]]
            result = cls(**values | {"loss_sums": sums})
            is_complete = result.rows == rows and len(result.answers) == len(result.loss_sums)
            return result if is_complete and len(result.answers) == len(rows) else None
        except (TypeError, KeyError):
            return None


class AnswerFile:
    """The results of one model. `identity`: everything on which they depend, as JSON values."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:24]
        self._folder, self._path = folder, folder / f"{self.key}-{rank}.jsonl"

    def read(self, batches: list[list[int]]) -> dict[int, BatchResult]:
        """The complete results of all ranks and earlier starts, by the number of the batch."""
        results: dict[int, BatchResult] = {}
        for path in sorted(self._folder.glob(f"{self.key}-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    values = json.loads(line)
                    rows = batches[values["batch"]]
                except (ValueError, TypeError, KeyError, IndexError, RecursionError):
                    continue  # cut by a kill
                if (result := BatchResult.from_json(values, rows)) is not None:
                    results[result.batch] = result
        return results

    def append(self, result: BatchResult) -> None:
        """Append a result. The line break comes first, in case the last line is incomplete."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(f"\n{dump_json(asdict(result), indent=None)}".encode())
        except OSError as error:
            raise SingleRankError(
                f"{self._path}: {error.strerror}; the answers that were written before are "
                "complete: start again to continue"
            ) from None
