"""Find the data files of a path, folder or glob in `train_data` or `eval_data`.

Caches of `datasets`, run folders and the files of other splits are skipped.
"""

import difflib
import glob
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from pipeline.config.hub import lacks_split
from pipeline.errors import UserError, first_few
from pipeline.files import read_json
from pipeline.rows.content import SUFFIXES, kind_from_name, open_data

# Metadata files that `datasets` writes into a folder of data.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Word in the name of a file or folder -> split.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("eval", "evaluation", "heldout", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_NOT_LETTERS = re.compile(r"[\W\d_]+")
# Words that are skipped when a split is read from a name: suffixes, and `of` of "00000-of-00003".
_IGNORED_WORDS = {
    "",
    "of",
    "jsonl",
    "ndjson",
    "json",
    "csv",
    "parquet",
    "arrow",
    "gz",
    "bz",
    "xz",
    "zst",
}
# Name of a file of a split on the hub, such as train_sft-00000-of-00003.parquet.
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-\w+)?\.\w+")
# Folders and files that prepare writes to `data/` of a run folder. If the data is refused,
# it writes only rejects.jsonl.
_SPLIT_FOLDER = re.compile(r"(train|eval)-[0-9a-f]{16}")
_REJECTS, _SUMMARIES = "rejects.jsonl", {"index.json", "audit.json", "fingerprints.json"}
_SKIPPED = "caches, run folders and files not listed in state.json"


class DataFiles(NamedTuple):
    """Data files in reading order. `notes`: messages about skipped files."""

    files: list[Path]
    notes: tuple[str, ...] = ()


def find_files(name: str, key: str) -> DataFiles:
    """The data files of a path, folder or glob, in a fixed order.

    In a folder these are the files that its `state.json` lists. Without that file they are all
    files below the folder with a known suffix. If the files are named after splits, the setting
    `key` (train_data or eval_data) selects the split. A file with several links is returned once.
    Raises UserError if a file cannot be read or all are empty.
    """
    try:
        data = _find_files(name, key)
    except OSError as error:  # a forbidden folder, a name that is too long
        raise UserError(f"{key}: {error.filename or name}: {error.strerror}") from None
    check_files(data.files, name, key)
    # Keeps the first link to a file, at the position of the last one.
    unique = {file.resolve(): file for file in reversed(data.files)}
    return data._replace(files=list(unique.values())[::-1])


def check_files(files: Sequence[Path], name: str, key: str) -> None:
    """Raise UserError if a file cannot be read or all files are empty."""
    are_empty = [_is_empty(file, key) for file in files]  # a list: every file must be opened
    if all(are_empty):
        raise UserError(f"{key}: {name} is empty; expected rows, such as one JSON object per line")


def has_known_suffix(file: Path) -> bool:
    """Whether the file is named like a data file and is not a metadata file of `datasets`."""
    return kind_from_name(file) is not None and file.name not in _METADATA


def _find_files(name: str, key: str) -> DataFiles:
    """The data files of a path, folder or glob, before they are checked."""
    path = Path(name)
    if path.is_dir():
        return _find_in_folder(path, key)
    if path.exists():
        return DataFiles([path])
    if not glob.has_magic(name):
        hint = _missing_split_hint(name) or _similar_names_hint(path)
        raise UserError(f"{key}: {name}: no such file{hint}")
    matches = sorted(Path(match) for match in glob.glob(name, recursive=True))  # noqa: PTH207
    matches = [match for match in matches if not match.is_dir()]
    # The root of the glob and the folders below it are skipped if they are run folders.
    root = _glob_root(path)
    folders = {folder for match in matches for folder in match.parents} - {*root.parents}
    run_folders = {folder for folder in folders if _is_run_folder(folder)}

    def is_skipped(file: Path) -> bool:
        is_in_run_folder = not run_folders.isdisjoint(file.parents)
        return is_in_run_folder or _is_cache(file) or _is_written_by_prepare(file)

    files = [match for match in matches if not is_skipped(match)]
    if not files:
        skipped = "; files in run folders and caches are skipped" if matches else ""
        raise UserError(f"{key}: no file matches {name}{skipped}")
    return DataFiles(files, _skip_note(name, set(matches) - set(files), root, _SKIPPED))


def _find_in_folder(folder: Path, key: str) -> DataFiles:
    """The data files of a folder that the setting `key` (train_data or eval_data) uses."""
    if _is_run_folder(folder):
        raise UserError(f"{key}: {folder} is a run folder; name a folder with data, or files")
    search = _FolderSearch()
    search.visit(folder, key)
    if not search.files:
        raise UserError(f"{key}: {folder} has no data files; known suffixes are {SUFFIXES}")
    files, other_splits = _select_split(search.files, folder, key)
    notes = (
        *_skip_note(str(folder), search.skipped, folder, _SKIPPED),
        *_skip_note(str(folder), other_splits, folder, "files that are named after other splits"),
        *_skip_note(str(folder), search.unknown, folder, "files with other suffixes"),
    )
    return DataFiles(files, notes)


class _FolderSearch:
    """Recursive search for the data files below a folder.

    A folder is visited once, even if symbolic links lead to it again. `skipped`: run folders, and
    files that are caches or not listed in state.json. `unknown`: files with other suffixes, except
    hidden files, metadata, Markdown files and LICENSE.
    """

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.skipped: list[Path] = []
        self.unknown: list[Path] = []
        self._visited: set[Path] = set()

    def visit(self, folder: Path, key: str) -> None:
        """Collect the data files of a folder and of the folders below it."""
        resolved = folder.resolve()
        if resolved in self._visited:
            return
        self._visited.add(resolved)
        listed = _files_in_state_json(folder, key)
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            if path.name.startswith((".", "_")):
                continue
            if path.is_dir():
                if _is_run_folder(path) or _SPLIT_FOLDER.fullmatch(path.name):
                    self.skipped.append(path)
                else:
                    self.visit(path, key)
            elif has_known_suffix(path):
                is_data = not _is_cache(path) if listed is None else path.name in listed
                if is_data and not _is_written_by_prepare(path):
                    self.files.append(path)
                else:
                    self.skipped.append(path)
            elif path.name not in _METADATA and path.suffix != ".md" and path.stem != "LICENSE":
                self.unknown.append(path)


def _files_in_state_json(folder: Path, key: str) -> list[str] | None:
    """The file names in the state.json of `Dataset.save_to_disk`; None for other folders."""
    try:
        state = read_json(folder / "state.json")
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{key}: {folder}: state.json lists {missing[0]}, which does not exist")
    if state.get("_indices_data_files"):
        raise UserError(
            f"{key}: {folder}: an old version of `datasets` saved this data set with a selection "
            "of rows; load it, call flatten_indices() and save it again"
        )
    return names


def _is_cache(file: Path) -> bool:
    """Whether a file is the cached result of a `map` or `filter` of `datasets`."""
    return file.name.startswith("cache-") and file.suffix == ".arrow"


def _is_run_folder(folder: Path) -> bool:
    """Whether train or prepare wrote the folder as a run folder."""
    return (
        (folder / ".owner").exists()
        or ((folder / "run.yaml").exists() and (folder / "status.json").exists())
        or _is_prepared(folder / "data")
    )


def _is_written_by_prepare(file: Path) -> bool:
    """Whether the file's name and folder show that prepare wrote it."""
    return (
        file.name == _REJECTS
        or _SPLIT_FOLDER.fullmatch(file.parent.name) is not None
        or (file.name in _SUMMARIES and _is_prepared(file.parent))
    )


def _is_prepared(folder: Path) -> bool:
    """Whether a folder is the `data/` of a run folder, with files that prepare wrote."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return {"index.json", "audit.json"} <= names or any(map(_SPLIT_FOLDER.fullmatch, names))


def _glob_root(pattern: Path) -> Path:
    """The folder before the first wildcard of a glob."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _select_split(files: Sequence[Path], folder: Path, key: str) -> tuple[list[Path], list[Path]]:
    """Divide files into those of the split for the setting `key`, and those of other splits.

    `train_data` uses all files except those of validation and test. `eval_data` uses the files of
    validation if there are any, else those of test, else the same files as `train_data`.
    """
    splits = {file: _split_from_name(file.relative_to(folder)) for file in files}
    allowed: tuple[str | None, ...] = (None, "train")
    if key == "eval_data":
        for name in ("test", "validation"):
            if name in splits.values():
                allowed = (name,)
    selected = [file for file in files if splits[file] in allowed]
    others = [file for file in files if splits[file] not in allowed]
    if not selected:
        raise UserError(
            f"{key}: {folder}: every file is named after another split "
            f"({_listed(others, folder)}); to train on one, name the file itself"
        )
    _require_one_split(selected, folder, key)
    return selected, others


def _require_one_split(files: Sequence[Path], folder: Path, key: str) -> None:
    """Raise UserError if files belong to several splits, such as train_sft and train_gen."""
    by_split: dict[str, Path] = {}  # name of a split -> glob or folder of its files
    for file in files:
        parent = file.parent
        if (match := _SHARD.fullmatch(file.name)) and not (parent / "state.json").exists():
            by_split.setdefault(match[1], parent / f"{match[1]}-*")
        elif (parent.parent / "dataset_dict.json").exists():
            by_split.setdefault(parent.name, parent)
    named = {name: path for name, path in by_split.items() if _first_word(name) in _SPLITS}
    if len(named) > 1:
        raise UserError(
            f"{key}: {folder} has several splits: {', '.join(sorted(named))}; name one, such as "
            f"{min(named.values())}, or list several"
        )


def _first_word(name: str) -> str:
    """The letters before the first digit or separator of a name, in lower case."""
    return _NOT_LETTERS.split(name.lower())[0]


def _split_from_name(file: Path) -> str | None:
    """The split that the name of a file, or of a folder in its path, begins or ends with.

    For example "train" for train-00000-of-00003.parquet and for train/part1.jsonl.
    """
    for name in reversed(file.parts):
        words = [word for word in _NOT_LETTERS.split(name.lower()) if word not in _IGNORED_WORDS]
        for word in (*words[:1], *words[-1:]):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _skip_note(name: str, paths: Iterable[Path], root: Path, description: str) -> tuple[str, ...]:
    """The message that names the skipped `paths`; no message if there are none.

    `name`: path or glob in the run file. `description`: what the skipped paths are.
    """
    skipped = sorted(paths)
    return (f"{name}: {description} are skipped: {_listed(skipped, root)}",) if skipped else ()


def _listed(paths: Sequence[Path], root: Path) -> str:
    """The first few paths as text, relative to `root`, and the number of the others."""
    return first_few([str(path.relative_to(root)) for path in paths])


def _is_empty(file: Path, key: str) -> bool:
    """Whether a file is empty after decompression. Raises UserError if it cannot be read."""
    if file.is_symlink() and not file.exists():
        raise UserError(f"{key}: {file} is a link to {file.readlink()}, which does not exist")
    if not file.is_file():
        raise UserError(f"{key}: {file} is not a regular file; a pipe or device is read only once")
    try:
        with open_data(file) as stream:
            return not stream.read(1)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}: {file}: cannot be read: {reason}") from None


def _missing_split_hint(name: str) -> str:
    """Hint for a name that may be a hub data set without its split; else empty."""
    path = Path(name)
    if path.parent.is_dir() or kind_from_name(path) or not lacks_split(name):
        return ""
    return f"; a hub data set needs a split: {name}:train"


def _similar_names_hint(file: Path) -> str:
    """Hint with up to three files of the same folder: similar names, or else data files."""
    if not file.parent.is_dir():
        return f"; there is no folder {file.parent} either"
    names = [path.name for path in file.parent.iterdir() if path.is_file()]
    suggested = difflib.get_close_matches(file.name, names, n=3)
    if not suggested:
        suggested = sorted(name for name in names if kind_from_name(Path(name)))[:3]
    return f"; there is {', '.join(suggested)}" if suggested else ""
