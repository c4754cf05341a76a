"""Atomic writes, checksums and locks."""

import errno
import hashlib
import json
import math
import os
import sys
from contextlib import ExitStack, closing, contextmanager, suppress
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


# ---- locks ----

# what flock answers where the file system has no such locks: Lustre without -o flock, some NFS and FUSE
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
F_GETPATH = 50  # in macOS's fcntl.h


class HeldFolder:
    """A folder that this process has locked. It stays the same folder if it is moved."""

    def __init__(self, path: Path):
        self.path = path
        self.handle = os.open(path, os.O_RDONLY) if fcntl else None  # Windows can't open folders; there an open file keeps them in place

    def close(self):
        if self.handle is not None:
            os.close(self.handle)

    def is_here(self) -> bool:
        """Whether the path still leads to this folder."""
        return self.handle is None or self.is_at(self.path)

    def is_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self.handle))
        except OSError:
            return False

    def whereabouts(self) -> Path | None:
        """Returns where the folder is now, even if it was moved. None if it was deleted, or if the system can't tell."""
        if self.is_here():
            return self.path
        try:
            if sys.platform == "darwin":
                place = fcntl.fcntl(self.handle, F_GETPATH, bytes(1024)).rstrip(b"\0")
            else:
                place = os.readlink(f"/proc/self/fd/{self.handle}")
        except OSError:
            return None
        found = Path(os.fsdecode(place))
        return found if self.is_at(found) else None

    def check(self):
        """ValueError if the path leads elsewhere by now."""
        if not self.is_here():
            place = self.whereabouts()
            where = f"moved to {place}: continue there" if place else "deleted: run the same command again"
            raise ValueError(f"{self.path} was {where}; this process was writing into it")


@contextmanager
def lock_folder(folder: Path, wait: bool = False):
    """Locks a folder for this process while the block runs, and yields it as a HeldFolder. If another process has it: ValueError, or
    with wait, waits for its end. Creates the folder if needed, and removes it at the end if it is new and still empty."""
    new = not folder.exists()
    with ExitStack() as stack:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(closing(HeldFolder(folder)))
            with suppress(FileNotFoundError):
                file = lock(held, wait, stack)
                if held.is_here():
                    break
            # while this process waited, another one deleted the folder, which was empty
        try:
            yield held
        finally:
            if new and held.is_here() and os.listdir(folder) == [file.name]:
                with suppress(OSError):  # Windows can't delete an open file
                    file.unlink()
                    folder.rmdir()


def lock(held: HeldFolder, wait: bool, stack: ExitStack) -> Path:
    """Locks a folder until the stack closes, and returns its lock file. TryAgain if another process has it.

    Locks both the folder and a file in it. A lock on the folder can't be deleted by mistake. A file's lock also works on NFS and
    Windows. Without any lock, RunFolder still notices a second process.
    """
    file = held.path / ".lock"
    try:
        if fcntl is None:
            import filelock

            stack.enter_context(filelock.FileLock(file, timeout=-1 if wait else 0))
            return file
        has_locks = flock(held.handle, wait)
        if has_locks and file.exists() and file.stat().st_nlink > 1:  # a hard-linked copy of another folder shares its lock
            file.unlink()
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        stack.callback(os.close, opened)
        if not flock(opened, wait) and not has_locks:
            cli.say(f"warning: {held.path} is on a file system without locks: start only one process in it")
    except (BlockingIOError, PermissionError, TimeoutError) as e:
        if isinstance(e, PermissionError) and e.filename:  # opening the file failed, not locking it
            raise
        raise cli.TryAgain(f"another process is writing into {held.path}: wait for it, or choose another --out-dir") from None
    return file


def flock(handle: int, wait: bool) -> bool:
    """Locks an open file or folder. Returns False if its file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        if e.errno in NO_LOCKS:
            return False
        raise
    return True
