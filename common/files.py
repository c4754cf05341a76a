"""Atomic writes, checksums and locks."""

import errno
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from common import cli

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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
    """Appends all of the text to a file. If that fails, appends nothing and raises OSError."""
    with open(path, "ab", buffering=0) as file:
        before, data = file.tell(), text.encode()
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise


def write_json(path: Path, content):
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def read_json(path: Path, remedy: str) -> dict:
    """Reads a JSON object. ValueError, with the remedy, if the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}): {remedy}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: {remedy}")
    return content


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock_folder(folder: Path, wait: bool = False):
    """Locks a folder for this process while the block runs. If another process has it: ValueError, or with wait, waits for its end.
    Creates the folder if needed, and removes it at the end if it is new and still empty."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(f"another process is writing into {folder}: wait for it, or choose another --out-dir") from None
        try:
            yield
        finally:
            if new and os.listdir(folder) == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()
