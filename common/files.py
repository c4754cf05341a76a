"""Files that are either whole or not there, and their checksums."""

import errno
import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path


def write_temporary(path: Path, write) -> Path:
    """Calls write(file) on a temporary file beside path, puts it on disk and returns it; nothing stays of one that fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def replace(temporary: Path, path: Path):
    """Renames, and returns when that is on disk: what is renamed later can't come there earlier."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_atomically(path: Path, write):
    """A kill or a full disk at any moment leaves path whole, or as it was."""
    replace(write_temporary(path, write), path)


def append(path: Path, text: str):
    """Adds text to a file, all of it or, with an OSError, nothing."""
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
    """A JSON object. ValueError with the remedy when the file is none."""
    try:
        content = json.loads(path.read_text())
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
    """Makes the folder this process's own for as long as the block lasts; when another one has it, ValueError, or wait for
    its end. A folder that it had to make and that nothing was put into goes again."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(f"another process is writing into {folder}: wait for it, or choose another --out-dir") from None
        try:
            yield
        finally:
            if new and os.listdir(folder) == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()
