"""Locks on folders, so that only one process writes into each."""

import errno
import os
import sys
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from common import cli

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# what flock answers where the file system has no such locks: Lustre without -o flock, some NFS and FUSE
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
F_GETPATH = 50  # in macOS's fcntl.h


class HeldFolder:
    """A folder that this process has locked. It stays the same folder if it is moved."""

    def __init__(self, path: Path):
        self.path, self.absolute = path, path.absolute()  # a relative path leads nowhere once the current folder is deleted
        self.handle = os.open(path, os.O_RDONLY) if fcntl else None  # Windows can't open folders; there an open file keeps them in place

    def close(self):
        if self.handle is not None:
            os.close(self.handle)

    def is_here(self) -> bool:
        """Whether the path still leads to this folder."""
        return self.handle is None or self.is_at(self.absolute)

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
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError:  # also if another process deletes the folder at this moment
                if folder.is_file() or any(path.is_symlink() and not path.exists() for path in (folder, *folder.parents)):
                    raise
            with ExitStack() as attempt, suppress(FileNotFoundError):
                held = attempt.enter_context(closing(HeldFolder(folder)))
                file = lock(held, wait, attempt)
                if held.is_here():
                    stack.push(attempt.pop_all())
                    break
            # while this process waited, another one deleted the folder: let go of what is left of it, others wait for that
        try:
            yield held
        finally:
            with suppress(OSError):  # Windows can't delete an open file; another process may delete the folder
                if new and held.is_here() and os.listdir(folder) == [file.name]:
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
        raise cli.TryAgain(f"another process is writing into {held.path}: {cli.WAIT}") from None
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
