"""Reads the text in a file: which kinds of files there are, packed files, encodings, line ends."""

import codecs
import gzip
import io
import os
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common import cli

TEXT, ROWS, PACKED = (".txt", ".md", ".py"), (".jsonl", ".json"), (".gz", ".zst")
READABLE = (".parquet", *ROWS, *TEXT)
ENDINGS = f"{' '.join(READABLE)} (all except .parquet also as {' or '.join(PACKED)})"


def kind_of(path: Path) -> str:
    """Returns '.txt', '.json' and so on, also for BOOK.TXT and c4.json.gz. '' if no reader knows the ending."""
    name = path.name.lower()
    packed = name.endswith(PACKED)
    kind = os.path.splitext("x" + (os.path.splitext(name)[0] if packed else name))[1]
    return kind if kind in READABLE and not (packed and kind == ".parquet") else ""


def shown(path) -> str:
    """Returns a name for messages, with a box for each character that a terminal can't show."""
    return cli.some([path])


class Bad(NamedTuple):
    """What a reader yields in place of a document."""

    kind: str  # what the count says
    where: str  # file and row
    why: str
    fix: str = "fix or remove this document"
    is_file: bool = False  # a whole file, or the rest of one
    is_usual: bool = False  # all rows are probably like it, so --skip-bad-rows would leave out everything


BOMS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SAVE, SAVE_UTF16 = (f"save it as UTF-8 (iconv -f {name} -t utf-8)" for name in ("ITS_ENCODING", "utf-16le"))


def encoding_of(head: bytes) -> str:
    """Returns the encoding that a file's first bytes announce; UTF-8 if they announce none."""
    return next((name for bom, name in BOMS if head.startswith(bom)), "utf-8")


def decode(raw: bytes, where: str, encoding: str = "utf-8") -> str | Bad:
    """Decodes bytes strictly: a wrong character in a million would be trained on without a word."""
    if encoding == "utf-8" and raw[:4096].count(0) > len(raw[:4096]) // 4:
        return Bad("not UTF-8", where, "it looks like UTF-16 without a byte order mark", SAVE_UTF16)
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as e:
        return not_decodable(e, where)


def not_decodable(e: UnicodeDecodeError, where: str) -> Bad:
    name = e.encoding.upper().removesuffix("-LE").removesuffix("-BE")
    return Bad(f"not {name}", where, f"not {name} at byte offset {e.start:,} (0x{e.object[e.start : e.start + 1].hex()})", SAVE)


def decode_python(raw: bytes) -> str | None:
    """Decodes a Python file in the encoding that its first lines declare (PEP 263). None if they declare none."""
    try:
        return raw.decode(tokenize.detect_encoding(io.BytesIO(raw).readline)[0])
    except (SyntaxError, UnicodeError, LookupError):
        return None


def unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedIOBase]:
    """Opens a file and unpacks it. Its first bytes tell how, whatever its name: a browser may have unpacked a .gz."""
    with open(path, "rb") as file:
        magic = file.peek(4)[:4]
        if magic[:2] == b"\x1f\x8b":
            with gzip.open(file) as unpacked:
                yield unpacked
        elif magic == b"\x28\xb5\x2f\xfd" or magic[1:] == b"\x2a\x4d\x18":  # a frame of zstd, or one to skip
            import pyarrow

            yield io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 18)
        else:
            yield file
