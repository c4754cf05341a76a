"""Reads documents from local files. Every script that takes text from files reads it here.

    .parquet                each row's field 'text', or another that --text-field names
    .jsonl .json            each line's field 'text'; .json may also be one array of rows, or one row
    .txt .md .py            the whole file; CRLF and CR become LF, a byte order mark is dropped

All except .parquet may be packed as .gz or .zst. Text is UTF-8; UTF-16 and UTF-32 need a byte order mark.
A document is a string. Where a document can't be read, the readers yield a Bad: it ends the run, or is counted and left out.
"""

import codecs
import copy
import hashlib
import io
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common import cli
from common.files import sha256
from common.text import ROWS, Bad, decode, decode_python, encoding_of, kind_of, not_decodable, open_bytes, shown, unix_lines

# ---- bad rows ----

FIRST = 3  # places that a count names


class BadRow(ValueError):
    """A row is not a document, and --skip-bad-rows is off."""


@dataclass
class BadRows:
    """Decides what a Bad does: without `skip` it ends the run, with it it is counted."""

    skip: bool = False
    # kind → {"rows": how many, "first": where the first few are, "files": how many of them are whole files, if any}
    found: dict[str, dict] = field(default_factory=dict)

    def add(self, bad: Bad):
        if not self.skip:
            raise BadRow(f"{bad.where}: {bad.why}: {bad.fix}{'' if bad.is_usual else ', or leave it out with --skip-bad-rows'}")
        entry = self.found.setdefault(bad.kind, {"rows": 0, "first": []})
        entry["rows"] += 1
        if bad.is_file:
            entry["files"] = entry.get("files", 0) + 1
        if len(entry["first"]) < FIRST:
            entry["first"].append(bad.where)

    def load(self, found: dict[str, dict]):
        self.found = {}
        for kind, entry in found.items():
            files = {"files": int(entry["files"])} if "files" in entry else {}
            self.found[str(kind)] = {"rows": int(entry["rows"]), "first": [str(place) for place in entry["first"]], **files}

    def good(self, rows: Iterator[str | Bad]) -> Iterator[str]:
        """Yields the documents among the rows."""
        for row in rows:
            if isinstance(row, Bad):
                self.add(row)
            else:
                yield row


def describe_bad(found: dict[str, dict]) -> str:
    """Returns one line about files and rows that were left out, with the first few places; '' if there are none."""
    kinds = [
        f"{entry['rows']:,} {kind} ({'; '.join(entry['first'])}{'; …' if entry['rows'] > len(entry['first']) else ''})"
        for kind, entry in found.items()
    ]
    files = sum(entry.get("files", 0) for entry in found.values())
    counts = {"file": files, "row": sum(entry["rows"] for entry in found.values()) - files}
    some = " and ".join(f"{n:,} {what}{'' if n == 1 else 's'}" for what, n in counts.items() if n)
    return f"--skip-bad-rows left out {some}: {', '.join(kinds)}" if kinds else ""


def add_bad(counts: Iterable[dict[str, dict]]) -> dict[str, dict]:
    """Adds up the bad rows of several parts."""
    total = BadRows()
    for found in counts:
        for kind, entry in found.items():
            mine = total.found.setdefault(kind, {"rows": 0, "first": []})
            mine["rows"] += entry["rows"]
            if "files" in entry:
                mine["files"] = mine.get("files", 0) + entry["files"]
            mine["first"] = [*mine["first"], *entry["first"]][:FIRST]
    return total.found


def read_text(path: Path, tolerant: bool = False) -> str | Bad:
    """Reads a whole file as one document, whatever its name."""
    with open_bytes(path) as file:
        raw = file.read()
    if tolerant:
        return unix_lines(raw.decode("utf-8", "replace"))
    text = decode(raw, shown(path), encoding_of(raw[:4]))
    if isinstance(text, Bad) and kind_of(path) == ".py":
        text = decode_python(raw) or text
    if isinstance(text, str) and "\0" in text:
        text = Bad("binary", shown(path), "it has NUL characters, so it is not plain text", "give another file")
    return text._replace(is_file=True) if isinstance(text, Bad) else unix_lines(text.removeprefix("\ufeff"))


# ---- a file → documents ----


class How(NamedTuple):
    """How to read documents."""

    text_field: str = "text"
    tolerant: bool = False  # as versions before --skip-bad-rows: a wrong byte becomes U+FFFD, a byte order mark stays in plain text


USUAL = How()


def read_file(path: Path, how: How = USUAL) -> Iterator[str | Bad]:
    """Yields a file's documents, and a Bad in place of each that can't be read. Reads a file of no known kind as text."""
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from read_parquet(path, how.text_field)
        elif kind in ROWS:
            with open_bytes(path) as file:
                yield from read_rows(json_lines(file, path, how.tolerant), path, how, kind)
        else:
            yield read_text(path, how.tolerant)
    except (EOFError, zlib.error, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # the disk is at fault, not the file
        yield damaged(path, e)


def damaged(path: Path, e: Exception) -> Bad:
    why = f"it is truncated or damaged ({str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__})"
    return Bad("damaged file", shown(path), why, "restore or download it again", is_file=True)


def read_parquet(path: Path, text_field: str) -> Iterator[str | Bad]:
    import pyarrow.parquet

    try:
        file, name, number = pyarrow.parquet.ParquetFile(path), shown(path), 0
        if text_field not in file.schema_arrow.names:
            yield no_field(file.schema_arrow.names, name, text_field)._replace(is_file=True, is_usual=True)
            return
        for batch in file.iter_batches(1024, columns=[text_field]):
            column = batch.column(text_field)
            try:
                texts = column.to_pylist()
            except UnicodeDecodeError:  # one by one, to see which
                texts = map(scalar, column)
            for text in texts:
                number += 1
                yield check_text(text, f"{name}, row {number:,}", text_field)
    except (pyarrow.ArrowException, OSError, KeyError, IndexError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        yield damaged(path, e)


def scalar(value):
    """Returns a value of Arrow as Python's; the error, if it is not UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError as e:
        return e


def check_text(text, where: str, text_field: str) -> str | Bad:
    """Returns the text if it is one."""
    if isinstance(text, UnicodeDecodeError):
        return not_decodable(text, where)
    if text is None:
        return Bad("null", where, f"the field '{text_field}' is null")
    if not isinstance(text, str):
        return Bad("not a string", where, f"the field '{text_field}' is not a string (but {type(text).__name__})")
    return text


def no_field(names: Iterable, where: str, text_field: str) -> Bad:
    """Says which fields, or columns, there are instead."""
    some = cli.some(names, 8)
    why = f"the field '{text_field}' is missing{some and f' (it has {some})'}"
    return Bad("without the field", where, why, "choose another with --text-field")


def json_lines(file: io.BufferedIOBase, path: Path, tolerant: bool) -> Iterator[tuple[str, str | Bad]]:
    """Yields the lines, each with its place. Splits at LF and CR alone: other line separators may stand inside a string."""
    encoding = "utf-8" if tolerant else encoding_of(file.peek(4)[:4])
    utf8 = encoding == "utf-8"
    pieces = (
        (piece for line in file for piece in (line.splitlines() if b"\r" in line else (line,)))
        if utf8
        else io.TextIOWrapper(file, encoding)
    )
    name, number = shown(path), 0
    try:
        for number, piece in enumerate(pieces, 1):
            where = f"{name}, line {number:,}"
            if number == 1 and utf8:
                piece = piece.removeprefix(codecs.BOM_UTF8)
            if isinstance(piece, bytes):
                piece = piece.decode("utf-8", "replace") if tolerant else decode(piece, where)
            if isinstance(piece, Bad) or piece.strip():
                yield where, piece
    except UnicodeError as e:  # in UTF-16, only the rest can be left out
        yield f"{name}, line {number + 1:,}", damaged(path, e)


LARGEST_VALUE = 1 << 31  # characters of JSON that are parsed in one piece


def read_rows(lines: Iterator[tuple[str, str | Bad]], path: Path, how: How, kind: str) -> Iterator[str | Bad]:
    """Yields the document in each line of JSON. A .json whose first line is not a row by itself is parsed as one value."""
    head = list(itertools.islice(lines, 1)) if kind == ".json" else []
    if head and isinstance(head[0][1], str) and not isinstance(parse(head[0][1]), dict):
        size = len(head[0][1])
        for where, line in lines:
            head.append((where, line))
            size += len(line)
            if size > LARGEST_VALUE:
                fix = "make lines of it, with jq -c '.[]' for example"
                yield Bad("too large", shown(path), "it is one value of more than 2 GB, and its first line is not a row", fix, True)
                return
        rows = value_rows([line for _, line in head], path, how)
        yield from rows
        if rows:
            return
    for number, (where, line) in enumerate(itertools.chain(head, lines)):
        if isinstance(line, Bad):
            yield line
        else:
            yield read_row(parse(line), where, how, not number, escapes="\\u" in line)


def value_rows(lines: list[str | Bad], path: Path, how: How) -> list[str | Bad]:
    """Returns the documents of a file that is one array of rows, or one row. A Bad, if it is an array that can't be parsed."""
    value = next((line for line in lines if isinstance(line, Bad)), None) or parse("\n".join(lines))
    if isinstance(value, dict):
        return [read_row(value, shown(path), how, True)]
    if isinstance(value, list):
        name = shown(path)
        return [read_row(item, f"{name}, item {number:,}", how, number == 1) for number, item in enumerate(value, 1)]
    if lines[0][:1] != "[":
        return []
    return [value if isinstance(value, Bad) else Bad("not JSON", shown(path), f"not JSON ({value})", is_file=True)]


def parse(line: str | Bad):
    """Returns the value of a line of JSON; the error, if it is not JSON."""
    try:
        return line if isinstance(line, Bad) else json.loads(line)
    except (ValueError, RecursionError) as e:
        return e


def read_row(row, where: str, how: How, is_first: bool, escapes: bool = True) -> str | Bad:
    """Returns the text in a row of JSON. Only escapes can hold half a character."""
    if isinstance(row, Exception):
        return Bad("not JSON", where, f"not JSON ({row})")
    if not isinstance(row, dict):
        return Bad("without the field", where, f"the field '{how.text_field}' is missing, this is not an object")
    if how.text_field not in row:
        return no_field(row, where, how.text_field)._replace(is_usual=is_first)
    text = check_text(row[how.text_field], where, how.text_field)
    if escapes and isinstance(text, str) and not text.isascii() and not how.tolerant:
        try:
            text.encode()
        except UnicodeEncodeError:
            return Bad("half a character", where, "it has half of a surrogate pair, such as \\ud800, which is not a character")
    return text


# ---- all files → documents ----


class Found(NamedTuple):
    """A file to read, with the name under which it is recorded: independent of where the dataset lies."""

    name: str
    path: Path


def check_part_count(part_range: tuple[int, int], n_files: int):
    index, count = part_range
    if count > n_files:
        raise ValueError(f"--part {index + 1}/{count} is too fine, the dataset has {n_files} files: make at most {n_files} parts")


class LocalDocuments:
    """Iterates over the documents of local files, in order. part_range (index, count) takes one of `count` blocks of the files.

    The state is the current file, how many of its documents were read, and the bad rows before. So a resumed run does not open the
    files before it. revision: of the contents of all files; if it is given, the files are not hashed.
    """

    def __init__(
        self, files: list[Found], part_range: tuple[int, int] = (0, 1), how: How = USUAL, skip_bad: bool = False, revision: str = ""
    ):
        index, count = part_range
        check_part_count(part_range, len(files))
        self.files, self.how, self.bad = files[index * len(files) // count : (index + 1) * len(files) // count], how, BadRows(skip_bad)
        self.versions = {found.path: version(found.path) for found in self.files}
        self.sources = [] if revision else hash_files(files)
        self.revision = revision or "sha256-" + hashlib.sha256(json.dumps(self.sources).encode()).hexdigest()[:16]
        self.file, self.done, self.across = 0, 0, False

    def state(self) -> dict:
        return {"file": self.file, "documents": self.done, "skipped": copy.deepcopy(self.bad.found)}

    def load_state(self, state: dict):
        """Continues after a state. ValueError, TypeError or KeyError if it is none of these files'."""
        self.file, self.done, self.across = state.get("file", 0), state["documents"], "file" not in state  # older: from the first file
        if not (0 <= self.file < len(self.files) and self.done >= 0):
            raise ValueError("no such document")
        self.bad.load(state.get("skipped", {}))

    def __iter__(self) -> Iterator[str]:
        first, to_skip = self.file, self.done
        for number in range(first, len(self.files)):
            path = self.files[number].path
            self.check_unchanged(path)
            done = 0
            for row in read_file(path, self.how):
                if isinstance(row, Bad):
                    if not to_skip:  # else it is in the state
                        self.bad.add(row)
                    continue
                done += 1
                if to_skip:
                    to_skip -= 1
                else:
                    self.file, self.done = number, done
                    yield row
            self.check_unchanged(path)
            if to_skip and not self.across:
                raise ValueError(f"{shown(path)} has fewer documents than when the run stopped: choose another folder for the shards")

    def check_unchanged(self, path: Path):
        """ValueError if a file changed or vanished since it was hashed: the shards would mix old and new text."""
        try:
            same = version(path) == self.versions[path]
        except OSError as e:
            raise ValueError(f"{shown(path)} can't be read any more ({e.strerror}): put it back and run the same command again") from e
        if not same:
            raise ValueError(f"{shown(path)} changed while it was read: choose another folder for the shards, or put the old file back")


def version(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_size, info.st_mtime_ns


def hash_files(files: list[Found]) -> list[list[str]]:
    """Returns [name, sha256] of each file. Shows a bar if there is much to read."""
    sizes = [found.path.stat().st_size for found in files]
    hashes, total = [], sum(sizes)
    with (
        ThreadPoolExecutor(8) as pool,  # hashing releases the GIL
        cli.bar(desc="checking the files", total=total, unit="B", unit_scale=True, disable=total < 1e9, leave=False) as bar,
    ):
        for digest, size in zip(pool.map(lambda found: sha256(found.path), files), sizes, strict=True):
            hashes.append(digest)
            bar.update(size)
    return [[found.name, digest] for found, digest in zip(files, hashes, strict=True)]


def changes(before: list[list[str]], now: list[list[str]]) -> str:
    """Names the files that differ between two lists of sources; '' if none does, or if one is not known."""
    if not (before and now):
        return ""
    old, new = Counter(map(tuple, before)), Counter(map(tuple, now))
    gone, added = dict((old - new).keys()), dict((new - old).keys())
    groups = {
        "changed": [name for name in gone if name in added],
        "missing": [name for name in gone if name not in added],
        "new": [name for name in added if name not in gone],
    }
    texts = [f"{what}: {cli.some(names)}" for what, names in groups.items() if names]
    return "; ".join(texts) or ("other order" if before != now else "")
