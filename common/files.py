"""Atomic writes and checksums."""

import errno
import hashlib
import json
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from common import cli

MAX_NAME = 255  # bytes in a file's name


def sync(number: int):
    """Waits until an open file or folder is on disk, if its file system can say so. Some refuse: FUSE, CIFS."""
    try:
        os.fsync(number)
    except OSError as e:
        if cli.disk_failed(e):
            raise


def sync_folder(folder: Path):
    """sync, for the names in a folder. Windows can't open a folder."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError as e:
        if cli.disk_failed(e):
            raise
        return
    try:
        sync(number)
    finally:
        os.close(number)


def temporary_name(name: str) -> str:
    """The name to write a file under before it gets its own. It must not be too long if the file's own name is not."""
    return f"{name}.tmp" if len(os.fsencode(name)) + 4 <= MAX_NAME else f"{name[:60]}.tmp"


def write_temporary(path: Path, write) -> Path:
    """Calls write(file) on a temporary file next to path, syncs it to disk and returns it. Deletes it if anything fails."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            sync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def replace(temporary: Path, path: Path):
    """Renames, and returns once that is on disk. So the disk sees renames in the order of the calls."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_atomically(path: Path, write):
    """Writes path in one piece: a kill or a full disk at any moment leaves the new file or the old one."""
    replace(write_temporary(path, write), path)


def append(path: Path, text: str):
    """Appends lines to a file, all or nothing: OSError if it fails. First ends a line that a kill cut off. Leaves hard links alone:
    a hard-linked copy of a run's folder gets a file of its own."""
    with suppress(FileNotFoundError):
        if os.stat(path).st_nlink > 1:
            write_atomically(path, lambda file: file.write(path.read_bytes()))
    with open(path, "ab+", buffering=0) as file:
        before, data = file.seek(0, os.SEEK_END), text.encode()
        if before and data:
            file.seek(before - 1)
            data = data if file.read(1) == b"\n" else b"\n" + data
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise


def sync_file(path: Path):
    """sync, for a file that is closed. Does nothing if it is missing."""
    with suppress(FileNotFoundError), open(path, "rb+") as file:
        sync(file.fileno())


def write_json(path: Path, content):
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def parse_json(text: bytes | str):
    """Parses JSON strictly. ValueError also for NaN, numbers too large for a float, keys that appear twice, and nesting too deep to
    read."""

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(f"{number:.20} is not a finite number")
        return float(number)

    def whole(number: str) -> int:
        finite(number)
        return int(number)

    def unique(pairs: list[tuple]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key appears twice")
        return found

    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(text, parse_float=finite, parse_int=whole, parse_constant=finite, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextmanager
def naming(path: Path):
    """Adds the path to an OSError that lacks it, as errors while reading do."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


def read_json(path: Path, remedy: str) -> dict:
    """Reads a JSON object. ValueError, with the remedy, if the file holds none."""
    try:
        with naming(path):
            content = parse_json(path.read_bytes())
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}): {remedy}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: {remedy}")
    return content


def sha256(path: Path) -> str:
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
