"""Files that are either whole or not there, and their checksums."""

import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, write):
    """Calls write(file) on a temporary file, then renames it: a kill at any moment leaves path whole, or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
def hold(folder: Path):
    """Makes the folder this process's own for as long as the block lasts; ValueError when another one has it. A folder
    that it had to make and that nothing was put into goes again."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing into {folder}: wait for it, or choose another --out-dir") from None
        try:
            yield
        finally:
            if new and os.listdir(folder) == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()
