"""Documents of the prepared data, with the supervised text marked.

The library `tokenizers`, which needs no torch, decodes them. The tokenizer.json is that of the run
folder's adapter or merged model, or of the model's folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.commands import command
from pipeline.data.dataset.reader import DataIndex, open_split
from pipeline.data.prepare.show import supervised_segments
from pipeline.errors import UserError
from pipeline.report.folder import RunRecords

_NUM_DOCUMENTS = 4
_MAX_TOKENS = 1500  # of a document; the page says how many are shown


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document.

    `number`: its index in the split. `tokens`, `supervised`, `shown`: numbers of all, of supervised
    and of shown tokens. `parts`: consecutive pieces of the text; True if a piece is supervised.
    """

    number: int
    tokens: int
    supervised: int
    shown: int
    parts: list[tuple[str, bool]]


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The first training documents; `problem`: the reason if there are none."""

    documents: Sequence[Document] = ()
    problem: str = ""


class _Decoder:
    """A tokenizer of the library `tokenizers` with the method `decode` of transformers.

    `supervised_segments` needs only this method.
    """

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))

    def decode(self, ids: list[int], **_: Any) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def first_documents(run: RunRecords) -> Documents:
    """The first documents of the training split, or the reason why they cannot be shown."""
    try:
        split = open_split(DataIndex.load(run.folder / "data").train)
    except UserError as error:
        return Documents(problem=str(error))
    folders = [run.folder / "adapter", run.folder / "merged", Path(run.model_folder)]
    paths = [folder / "tokenizer.json" for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return Documents(
            problem="No tokenizer.json is in adapter/, merged/ or the model's folder, so the "
            f"documents cannot be shown; {command('prepare')} --show prints them."
        )
    try:
        decoder: Any = _Decoder(path)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for a bad file
        return Documents(problem=f"{path} cannot be read: {error}")
    documents = []
    for i in range(min(_NUM_DOCUMENTS, len(split))):
        ids, supervised = (column.tolist() for column in split.document(i))
        shown = ids[:_MAX_TOKENS]
        documents.append(
            Document(
                number=i,
                tokens=len(ids),
                supervised=sum(supervised),
                shown=len(shown),
                parts=list(supervised_segments(shown, supervised[:_MAX_TOKENS], decoder)),
            )
        )
    return Documents(documents=documents)
