"""A name in `train_data` or `eval_data` -> the files that it stands for, and their bytes."""

import bz2
import difflib
import glob
import gzip
import io
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from pipeline.config.hub import is_without_split
from pipeline.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Kind = Literal["jsonl", "json", "csv", "parquet", "arrow"]
Compression = Literal["gz", "bz2", "xz", "zst"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What `datasets` writes beside the rows.
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_BUFFER_BYTES = 2**20
SUFFIXES = f"{', '.join(_KINDS)}, each also with {', '.join(_COMPRESSED)}"


def find_files(name: str, key: str) -> list[Path]:
    """Files of a path, folder or glob, in a fixed order, readable and not all of them empty.

    Of a folder, every file beneath it with a known suffix. A file that links name more than once
    is one file. Raises UserError that names `key`.
    """
    try:
        files = _find(name, key)
    except OSError as error:  # a forbidden folder, a name that is too long
        raise UserError(f"{key}: {error.filename or name}: {error.strerror}") from None
    check_files(files, name, key)
    return list({file.resolve(): file for file in reversed(files)}.values())[::-1]


def _find(name: str, key: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = _beneath(path, set())
        if not files:
            raise UserError(f"{key}: {path} is a folder without data files ({SUFFIXES})")
    elif path.exists():
        files = [path]
    elif glob.has_magic(name):
        files = sorted(Path(found) for found in glob.glob(name, recursive=True))  # noqa: PTH207
        files = [file for file in files if not file.is_dir()]
        if not files:
            raise UserError(f"{key}: no file is named like {name}")
    else:
        raise UserError(f"{key}: {name}: no such file{_split_forgotten(name) or _nearby(path)}")
    return files


def check_files(files: Sequence[Path], name: str, key: str) -> None:
    """Raise UserError unless every file can be read and one of them holds something."""
    empty = [_is_empty(file, key) for file in files]  # each is looked at
    if all(empty):
        raise UserError(f"{key}: {name} is empty; expected rows, such as a JSON object on a line")


def has_known_suffix(file: Path) -> bool:
    """Whether the name says that the file holds rows."""
    return _kind_by_name(file) is not None and file.name not in _NO_ROWS


def kind_of(file: Path) -> Kind:
    """What a file holds: by its first bytes, else by its name; "json" where neither says."""
    with open_data(file) as stream:
        first = stream.read(6)
    if first[:4] == b"PAR1":
        return "parquet"
    if first == b"ARROW1":
        return "arrow"
    return _kind_by_name(file) or "json"


def compression_of(file: Path) -> Compression | None:
    """How a file is compressed, by its first bytes: names lie where a server has unpacked."""
    with file.open("rb") as stream:
        first = stream.read(10)
    if first[:3] == b"\x1f\x8b\x08":
        return "gz"
    if first[:3] == b"BZh" and first[4:10] == b"1AY&SY":
        return "bz2"
    if first[:6] == b"\xfd7zXZ\x00":
        return "xz"
    return "zst" if first[:4] == b"\x28\xb5\x2f\xfd" else None


def open_data(file: Path, raw: BinaryIO | None = None) -> BinaryIO:
    """The file's bytes, decompressed; `raw`: the file where it is open already.

    Reading raises OSError or EOFError where the compressed bytes are damaged or cut off.
    """
    raw = file.open("rb") if raw is None else raw
    compression = compression_of(file)
    if compression is None:
        return raw
    inner: io.RawIOBase
    if compression == "gz":
        inner = _Unpacked(raw, gzip.GzipFile(fileobj=raw))
    elif compression == "bz2":
        inner = _Unpacked(raw, bz2.BZ2File(raw))
    elif compression == "xz":
        inner = _Unpacked(raw, lzma.LZMAFile(raw))  # noqa: SIM115 - closed with `inner`
    else:
        inner = _Zstandard(raw)
    return io.BufferedReader(inner, _BUFFER_BYTES)


class _Unpacked(io.RawIOBase):
    """A stream of the standard library, with one kind of error and the file closed at its end."""

    def __init__(self, raw: BinaryIO, stream: io.BufferedIOBase) -> None:
        self._raw, self._stream = raw, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        import zlib

        try:
            return self._stream.readinto(buffer)
        except (zlib.error, lzma.LZMAError) as error:
            raise OSError(str(error)) from None

    def close(self) -> None:
        self._stream.close()
        self._raw.close()
        super().close()


class _Zstandard(io.RawIOBase):
    """Frames of zstd one after the other; its own reader takes a frame cut off for its end."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._decompressor = raw, zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._frame = self._decompressor.decompressobj()
        self._has_begun = False
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(2**15)
            if not self._packed:
                if self._has_begun:
                    raise EOFError("the compressed file ends before its data does")
                return 0
            self._unpack()
        into = memoryview(buffer).cast("B")
        size = min(len(into), len(self._unpacked))
        into[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def _unpack(self) -> None:
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._error as error:
            raise OSError(str(error)) from None
        self._has_begun, self._packed = True, b""
        if self._frame.eof:
            self._packed, self._has_begun = self._frame.unused_data, False
            self._frame = self._decompressor.decompressobj()

    def close(self) -> None:
        self._raw.close()
        super().close()


def _beneath(folder: Path, seen: set[Path]) -> list[Path]:
    """Its files; `seen`: folders that were looked into, which links may name again."""
    found: list[Path] = []
    if (real := folder.resolve()) in seen:
        return found
    seen.add(real)
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():
            found += _beneath(path, seen)
        elif has_known_suffix(path):
            found.append(path)
    return found


def _kind_by_name(file: Path) -> Kind | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _is_empty(file: Path, key: str) -> bool:
    if not file.is_file():
        raise UserError(f"{key}: {file} is not a file that can be read twice (a pipe, a device)")
    try:
        with open_data(file) as stream:
            return not stream.read(1)
    except (OSError, EOFError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{key}: {file}: cannot be read: {said}") from None


def _split_forgotten(name: str) -> str:
    path = Path(name)
    if path.parent.is_dir() or _kind_by_name(path) or not is_without_split(name):
        return ""
    return f"; a hub data set is named with its split: {name}:train"


def _nearby(file: Path) -> str:
    if not file.parent.is_dir():
        return f"; there is no folder {file.parent} either"
    names = [path.name for path in file.parent.iterdir() if path.is_file()]
    near = difflib.get_close_matches(file.name, names, n=3)
    near = near or sorted(name for name in names if _kind_by_name(Path(name)))[:3]
    return f"; there is {', '.join(near)}" if near else ""
