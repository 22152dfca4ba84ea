"""Compression, file format and text encoding of a data file, detected from its first bytes."""

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
_BYTES_OF_KIND = 64  # from which the kind of a file is detected
_BYTES_OF_LINES = 2**16  # from which the line ends of a file are detected
SUFFIXES = f"{', '.join(_KINDS)}, each also with {', '.join(_COMPRESSED)}"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NOT_ONLY_GZIP = (
    "its gzip data is followed by other bytes; if these hold no rows, remove them: "
    "gzip -dc FILE > NEW_FILE"
)
_HTML = "an HTML page, perhaps of a failed download; download the file again"
# First bytes of files that hold no rows, without space and in lower case, with what the files are
# and what to do.
_WITHOUT_ROWS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the data; run `git lfs pull`",
    b"<!doctype html": _HTML,
    b"<html": _HTML,
    b"<?xml": "an XML document, perhaps of a failed download; download the file again",
    b"pk\x03\x04": "a ZIP archive (.zip, .xlsx, .docx); unpack it, or save a workbook as CSV",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it",
    b"rar!\x1a\x07": "a RAR archive; unpack it",
    b"\xd0\xcf\x11\xe0": "an Excel or Word document (.xls, .doc); save its table as CSV",
    b"sqlite format 3": "an SQLite database; export a table as CSV or Parquet",
    b"%pdf-": "a PDF document; extract its text",
    b"\x1f\x8b\x08": "compressed twice; decompress it once",
}


def reason_without_rows(first: bytes) -> str:
    """What a file is that holds no rows, from its first bytes; empty if it may hold rows."""
    first = first.lstrip().lower()
    return next((why for start, why in _WITHOUT_ROWS.items() if first.startswith(start)), "")


def detect_kind(file: Path) -> Kind:
    """The file format, from the first bytes or, if these are of no known format, from the name.

    "json" if the name has no known suffix either. Raises UserError for a file that holds no rows.
    """
    with open_data(file) as stream:
        first = stream.read(_BYTES_OF_KIND)
    if reason := reason_without_rows(first):
        raise UserError(f"{file}: this is {reason}")
    if first[:4] == b"PAR1":
        return "parquet"
    if first[:6] == b"ARROW1":
        return "arrow"
    return kind_from_name(file) or "json"


def kind_from_name(file: Path) -> Kind | None:
    """The file format, from the suffix before any compression suffix; None if unknown."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _KINDS.get(suffixes[-1]) if suffixes else None


def detect_compression(file: Path) -> Compression | None:
    """The compression of a file, from its first bytes; None for none.

    The name is not used, because some download tools decompress a file but keep the name *.gz.
    """
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
    """Open a file for reading; a compressed file is decompressed on the fly.

    Reading raises OSError or EOFError if the compressed bytes are damaged or truncated.
    """
    raw, compression = file.open("rb"), detect_compression(file)
    if compression is None:
        return raw
    return io.BufferedReader(_Decompressed(raw, compression), _BUFFER_BYTES)


class _Decompressed(io.RawIOBase):
    """Stream of a decompressed file. Damaged data raises OSError or EOFError in every format.

    `num_bytes`: decompressed bytes that have been read so far.
    """

    def __init__(self, raw: BinaryIO, compression: Compression) -> None:
        self.file, self._stream = raw, _decompressor(raw, compression)
        self.num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        try:
            size: int = self._stream.readinto(buffer)
        except gzip.BadGzipFile as error:
            # After its data GzipFile looks for more gzip data; the first bytes of a file are gzip.
            if str(error).startswith("Not a gzipped file"):
                raise OSError(_NOT_ONLY_GZIP) from None
            raise
        except (zlib.error, lzma.LZMAError) as error:
            raise OSError(str(error)) from None
        self.num_bytes += size
        return size

    def close(self) -> None:
        self._stream.close()
        self.file.close()
        super().close()


def compression_ratio(stream: BinaryIO) -> float:
    """Decompressed bytes per compressed byte, in the part of the stream that was read so far."""
    raw = getattr(stream, "raw", None)
    return raw.num_bytes / max(raw.file.tell(), 1) if isinstance(raw, _Decompressed) else 1.0


def _decompressor(raw: BinaryIO, compression: Compression) -> Any:
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == "bz2":
        return bz2.BZ2File(raw)
    if compression == "xz":
        return lzma.LZMAFile(raw)
    import pyarrow  # slow to import, and only needed for zst

    return pyarrow.CompressedInputStream(raw, "zstd")


def strip_byte_order_marks(line: bytes) -> bytes:
    """Remove byte order marks (BOM) at the start of a line.

    If several files with a BOM were concatenated, the result has one wherever a file began.
    """
    while line.startswith(_BYTE_ORDER_MARK):
        line = line.removeprefix(_BYTE_ORDER_MARK)
    return line


def require_utf8(file: Path) -> None:
    """Raise a UserError if the file is binary, or text in UTF-16 or UTF-32.

    For text, the message has a conversion command.
    """
    with open_data(file) as stream:
        first = stream.read(_BYTES_OF_KIND)
    if encoding := _detect_utf16_or_32(first[:4]):
        raise UserError(
            f"{file}: {encoding} text (Windows PowerShell's > writes it), expected UTF-8; "
            f"{_conversion(file, f'iconv -f {encoding} -t UTF-8')}"
        )
    # A JSON file with zero bytes was damaged, for example by a power cut; each of its rows is read.
    is_json = first.strip(b"\0 \t\r\n" + _BYTE_ORDER_MARK)[:1] in (b"{", b"[", b"")
    if b"\0" in first and not is_json:
        raise UserError(
            f"{file}: binary data of no known format ({SUFFIXES}); if it is an archive, unpack it; "
            "if it is text in UTF-16, convert it with iconv -f UTF-16LE -t UTF-8; else export its "
            "rows as JSONL, CSV or Parquet"
        )


def require_line_feeds(file: Path) -> None:
    """Raise a UserError with a conversion command if the lines of a text file end with CR."""
    with open_data(file) as stream:
        first = stream.read(_BYTES_OF_LINES)
    if b"\r" in first.strip() and b"\n" not in first:
        command = _conversion(file, r"tr '\r' '\n' <")
        raise UserError(
            f"{file}: its lines end with CR (old Mac programs write it), expected LF or CR LF; "
            f"{command}"
        )


def _conversion(file: Path, command: str) -> str:
    """The advice to replace a file by the output of a command, whose last argument is the file."""
    first_step = "decompress it, then " if detect_compression(file) else ""
    source, target = shlex.quote(str(file)), shlex.quote(f"{file}.utf8")
    return f"{first_step}convert it: {command} {source} > {target} && mv {target} {source}"


def _detect_utf16_or_32(first: bytes) -> str | None:
    """The encoding, from a byte order mark or the zero bytes of ASCII text; None for neither."""
    if first in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "UTF-32"
    if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    zeros = [byte == 0 for byte in first]
    if zeros == [False, True, False, True]:
        return "UTF-16LE"
    return "UTF-16BE" if zeros == [True, False, True, False] else None
