"""From the bytes of a file to characters, a block at a time: compression, byte order marks, what is no text at all."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bitfold.errors import UsageError

BLOCK = 1 << 18  # bytes read at a time
_COMPRESSED: tuple[tuple[bytes, Any], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh91AY&SY", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
)
_MARKS = (  # those of four bytes first: that of UTF-32 begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY = (
    (b"%PDF-", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"{\\rtf", "an RTF document"),
    (b"PK\x03\x04", "a zip archive (or a document or checkpoint that is one)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a rar archive"),
    (b"GGUF", "a GGUF checkpoint"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"Obj\x01", "an Avro file"),
    (b"\x7fELF", "a program"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF8", "a picture"),
    (b"OggS", "a sound"),
    (b"ID3", "a sound"),
    (b"RIFF", "a sound, picture or film"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
)
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


def first_bytes(path: Path, count: int = 512) -> bytes:
    """The beginning of a file, uncompressed; UsageError when it cannot be read."""
    try:
        with _open(path) as stream:
            return stream.read(count)
    except _UNREADABLE as error:
        raise UsageError(f"cannot be read: {error}", where=str(path)) from error


def characters(path: Path) -> Iterator[str]:
    """The text of a file in blocks, uncompressed: UTF-8, or what its byte order mark says.

    Raises:
        UsageError: no text: another encoding, or binary data, by name where it has one.
    """
    begin = first_bytes(path)
    _refuse_binary(begin, path)
    encoding = next((name for mark, name in _MARKS if begin.startswith(mark)), "utf-8")
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    done = 0  # bytes
    try:
        with _open(path) as stream:
            while block := stream.read(BLOCK):
                if encoding.startswith("utf-8") and (at := block.find(b"\0")) >= 0:
                    raise _no_text(path, f"there is a NUL at byte {done + at}")
                yield decoder.decode(block)
                done += len(block)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        what = f"byte {done + error.start} is 0x{error.object[error.start]:02x}" if error.object else "it ends early"
        hint = "save it as UTF-8, such as by: iconv -f latin1 -t utf-8 FILE"
        raise UsageError(
            f"is no {encoding.upper().removesuffix('-SIG')} text: {what}", where=str(path), hint=hint
        ) from error
    except _UNREADABLE as error:
        raise UsageError(f"cannot be read: {error}", where=str(path)) from error


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as stream:
        begin = stream.read(10)
    opened: IO[bytes] = next((o for magic, o in _COMPRESSED if begin.startswith(magic)), open)(path, "rb")
    return opened


def _refuse_binary(begin: bytes, path: Path) -> None:
    found = next((name for magic, name in _BINARY if begin.startswith(magic)), None)
    if begin[:3].isalnum() and b"\0" not in begin:  # a text may begin with the word GGUF
        found = None
    if begin[257:262] == b"ustar":
        found = "a tar archive"
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < 1 << 32 and b"\0" in begin[:8]:
        found = "a safetensors checkpoint"
    if found is not None:
        raise _no_text(path, f"it is {found}")


def _no_text(path: Path, why: str) -> UsageError:
    hint = "a text as UTF-8, JSON lines, CSV or parquet is expected"
    return UsageError(f"is no text: {why}", where=str(path), hint=hint)
