"""Reader of metrics.jsonl while training writes it. Each line is a JSON object about one step."""

import json
from pathlib import Path
from typing import Any


class LineReader:
    """Reader that returns each complete line once, as a dict.

    If the file was replaced (it has another inode) or shortened since the last call, it is read
    from its start.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._offset = path, 0, 0

    def new_lines(self) -> list[dict[str, Any]]:
        """The lines since the last call. Damaged lines are skipped."""
        try:
            with self._path.open("rb") as file:
                status = self._path.stat()
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        lines = []
        for text in complete.splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
        return lines


def parse_metrics(line: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """The kind of a line, `train` or `eval`, and its metrics under names such as `train/loss`."""
    kind = "eval" if "eval_loss" in line else "train"
    metrics = {
        f"{kind}/{name.removeprefix('eval_')}": float(value)
        for name, value in line.items()
        if name != "step" and isinstance(value, bool | int | float)
    }
    return kind, metrics
