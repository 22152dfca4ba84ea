"""Files with the results of finished batches, from which a stopped `rankzero score` resumes.

A file has the results of one model on one set of rows with one set of options. Its name begins with
a hash of model, rows and options, and ends with the rank. Each rank appends one line for each batch
to its file.
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
    """Losses and answers of one batch.

    `batch`: number of the batch. `rows`: indexes of its rows among all rows. `loss_sums`: for each
    row the sum of the losses of its supervised tokens. `answers`: for each row the generated
    answer, None if the row has no prompt, such as a plain text. `seconds`: time to score the batch.
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
            # JSON has null for a loss that is not a finite number.
            loss_sums = [math.nan if value is None else value for value in values["loss_sums"]]
            result = cls(**values | {"loss_sums": loss_sums})
            is_complete = len(result.answers) == len(result.loss_sums) == len(rows)
        except (TypeError, KeyError):
            return None
        return result if is_complete and result.rows == rows else None


class AnswerFile:
    """The results of one model.

    `identity`: JSON data with everything on which the results depend. `key`: hash of `identity`,
    with which the names of the files begin.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:24]
        self._folder, self._path = folder, folder / f"{self.key}-{rank}.jsonl"

    def read(self, batches: list[list[int]]) -> dict[int, BatchResult]:
        """Number of a batch -> its result, from the files of all ranks and earlier starts.

        `batches`: for each batch the indexes of its rows.
        """
        results: dict[int, BatchResult] = {}
        for path in sorted(self._folder.glob(f"{self.key}-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    values = json.loads(line)
                    rows = batches[values["batch"]]
                except (ValueError, TypeError, KeyError, IndexError, RecursionError):
                    continue  # incomplete, because the process was killed while it wrote the line
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
