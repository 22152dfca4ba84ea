"""Rows, settings and prepared data for the tests in this folder."""

import json

from pipeline.config.settings import RunSettings
from pipeline.data.dataset.reader import open_split
from pipeline.data.prepare.prepare import prepare_data


class Run:
    """A run on the model and the rows of a folder: its settings and its prepared data.

    `data`: the folder of the prepared data. `audit`, `rejects`: contents of the files of that name.
    """

    def __init__(self, folder):
        self.folder, self.data = folder, folder / "run" / "data"
        self.train, self.eval = folder / "train.jsonl", folder / "eval.jsonl"

    def settings(self, **values):
        keys = {
            "model": str(self.folder / "model"),
            "train_data": str(self.train),
            "eval_data": str(self.eval),
            "output_dir": str(self.folder / "run"),
        }
        return RunSettings.model_validate(keys | values)

    def prepare(self, limit=None, **values):
        """Prepare the data; `limit`: rows to use per split, `values`: settings that differ."""
        return prepare_data(self.settings(**values), self.data, limit)

    def audit(self, split="train"):
        return json.loads((self.data / "audit.json").read_text())[split]

    def rejects(self):
        return [json.loads(line) for line in (self.data / "rejects.jsonl").read_text().splitlines()]

    def file_states(self):
        """Modification time and inode of every path under data/."""
        paths = [self.data, *self.data.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}

    def append(self, *lines):
        with self.train.open("a") as stream:
            stream.writelines(f"{line}\n" for line in lines)


def row(answer, question="q"):
    """A line of JSON with one question and one answer."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def write_lines(path, rows):
    path.write_text("".join(f"{line}\n" for line in rows))


def long_rows(count=40):
    """Rows of many lengths: some are bad, duplicates, or have no answer within 128 tokens."""
    rows = [
        row(f"answer {i} " * (1 + i % 9), question="q " * (1 + i * 7 % 70)) for i in range(count)
    ]
    return [*rows, "{", row(" "), rows[3], rows[7]]


def content(data):
    """The content of every published file by name, without the cache of hashes."""
    return {
        str(path.relative_to(data)): path.read_bytes()
        for path in sorted(data.rglob("*"))
        if path.is_file() and path.name != "fingerprints.json"
    }


def documents_of(index):
    """The token ids of each document of a prepared split."""
    split = open_split(index)
    return [tuple(split.document(i)[0].tolist()) for i in range(len(split))]
