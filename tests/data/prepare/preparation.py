"""Rows, run files and prepared sets of the tests in this folder."""

import json

from pipeline.config.settings import RunSettings
from pipeline.data.dataset.reader import open_split
from pipeline.data.prepare.prepare import prepare_data


class Run:
    def __init__(self, folder):
        self.folder, self.data = folder, folder / "run" / "data"
        self.train, self.eval = folder / "train.jsonl", folder / "eval.jsonl"

    def settings(self, **values):
        given = {
            "model": str(self.folder / "model"),
            "train_data": str(self.train),
            "eval_data": str(self.eval),
            "output_dir": str(self.folder / "run"),
        }
        return RunSettings.model_validate(given | values)

    def prepare(self, limit=None, **values):
        """Prepare with these settings in place of the usual ones."""
        return prepare_data(self.settings(**values), self.data, limit)

    def audit(self, split="train"):
        return json.loads((self.data / "audit.json").read_text())[split]

    def rejects(self):
        return [json.loads(line) for line in (self.data / "rejects.jsonl").read_text().splitlines()]

    def everything(self):
        """Every name under data/, with when it was written and as what file."""
        paths = [self.data, *self.data.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}

    def append(self, *lines):
        with self.train.open("a") as stream:
            stream.writelines(f"{line}\n" for line in lines)


def row(answer, question="q"):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def lines_of(path, rows):
    path.write_text("".join(f"{line}\n" for line in rows))


def long_rows(count=40):
    """Rows of many lengths, some bad, some twice, some without an answer within 128 tokens."""
    rows = [
        row(f"answer {i} " * (1 + i % 9), question="q " * (1 + i * 7 % 70)) for i in range(count)
    ]
    return [*rows, "{", row(" "), rows[3], rows[7]]


def content(data):
    """Every published file but the host's own memory of hashes, by name."""
    return {
        str(path.relative_to(data)): path.read_bytes()
        for path in sorted(data.rglob("*"))
        if path.is_file() and path.name != "fingerprints.json"
    }


def documents_of(index):
    split = open_split(index)
    return [tuple(split.document(i)[0].tolist()) for i in range(len(split))]
