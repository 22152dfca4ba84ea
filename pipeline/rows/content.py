"""The bytes of a data file: its compression, its kind and its encoding, told by the first bytes."""

import bz2
import gzip
import io
import lzma
import shlex
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

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
_BUFFER_BYTES = 2**17
SUFFIXES = f"{', '.join(_KINDS)}, each also with {', '.join(_COMPRESSED)}"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def kind_of(file: Path) -> Kind:
    """The kind of a file by its first bytes, else by its name; "json" where neither tells."""
    with open_data(file) as stream:
        first = stream.read(6)
    if first[:4] == b"PAR1":
        return "parquet"
    if first == b"ARROW1":
        return "arrow"
    return kind_by_name(file) or "json"


def kind_by_name(file: Path) -> Kind | None:
    """The kind of a file by its suffix, before one of a compression; None for an unknown one."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _KINDS.get(suffixes[-1]) if suffixes else None


def compression_of(file: Path) -> Compression | None:
    """The compression of a file by its first bytes: a server may have unpacked what it is named."""
    with file.open("rb") as stream:
        first = stream.read(10)
    if first[:3] == b"\x1f\x8b\x08":
        return "gz"
    if first[:3] == b"BZh" and first[4:10] == b"1AY&SY":
        return "bz2"
    if first[:6] == b"\xfd7zXZ\x00":
        return "xz"
    return "zst" if first[:4] == b"\x28\xb5\x2f\xfd" else None


def open_data(file: Path) -> BinaryIO:
    """The file's bytes, decompressed.

    Reading raises OSError or EOFError where the compressed bytes are damaged or cut off.
    """
    raw, compression = file.open("rb"), compression_of(file)
    if compression is None:
        return raw
    return io.BufferedReader(_Decompressed(raw, compression), _BUFFER_BYTES)


class _Decompressed(io.RawIOBase):
    """A decompressed file, with OSError or EOFError for damage whatever the compression."""

    def __init__(self, raw: BinaryIO, compression: Compression) -> None:
        self.file, self._stream = raw, _decompressor(raw, compression)
        self.num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        try:
            size: int = self._stream.readinto(buffer)
        except (zlib.error, lzma.LZMAError) as error:
            raise OSError(str(error)) from None
        self.num_bytes += size
        return size

    def close(self) -> None:
        self._stream.close()
        self.file.close()
        super().close()


def ratio_of(stream: BinaryIO) -> float:
    """Decompressed bytes of a file that is open for each of its bytes, by what was read so far."""
    raw = getattr(stream, "raw", None)
    return raw.num_bytes / max(raw.file.tell(), 1) if isinstance(raw, _Decompressed) else 1.0


def _decompressor(raw: BinaryIO, compression: Compression) -> Any:
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == "bz2":
        return bz2.BZ2File(raw)
    if compression == "xz":
        return lzma.LZMAFile(raw)
    import pyarrow  # only here: it takes a while

    return pyarrow.CompressedInputStream(raw, "zstd")


def without_marks(line: bytes) -> bytes:
    """The line without byte order marks: files that are joined have them in the middle."""
    while line.startswith(_BYTE_ORDER_MARK):
        line = line.removeprefix(_BYTE_ORDER_MARK)
    return line


def require_utf8(file: Path) -> None:
    """Raise UserError for text in UTF-16 or UTF-32, with the command that converts it."""
    with open_data(file) as stream:
        first = stream.read(4)
    if (encoding := _other_encoding(first)) is None:
        return
    unpack = "unpack it, then " if compression_of(file) else ""
    old, new = (shlex.quote(f"{file}{suffix}") for suffix in ("", ".utf8"))
    raise UserError(
        f"{file}: {encoding} text (Windows PowerShell's > writes it), expected UTF-8; "
        f"{unpack}convert it: iconv -f {encoding} -t UTF-8 {old} > {new} && mv {new} {old}"
    )


def _other_encoding(first: bytes) -> str | None:
    """The encoding by a byte order mark, else by the zeros of ASCII text; None for neither."""
    if first in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "UTF-32"
    if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    zeros = [byte == 0 for byte in first]
    if zeros == [False, True, False, True]:
        return "UTF-16LE"
    return "UTF-16BE" if zeros == [True, False, True, False] else None
