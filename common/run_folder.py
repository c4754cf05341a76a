"""The folder of a run, and the proof that it still is this run's: every file that counts carries the run's id."""

import errno
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from common.files import read_json, write_atomically, write_json
from common.locks import HeldFolder

RUN = "run.json"
# settings that change no result
MAY_DIFFER = {
    "verify_shards", "timeout_minutes", "tracker", "keep", "checkpoint_every", "checkpoint_minutes", "on_save_error", "remote",
    "notice_seconds",
}  # fmt: skip
# settings that change no loss of a run, apart from its seed; the data are compared by their sha256
NO_LOSS = MAY_DIFFER | {
    "seed", "out_dir", "data_dir", "resume", "replay_step", "init_revision", "plan", "rehearse", "gpu", "gpus", "price", "rate",
    "val_every", "hellaswag_every", "hellaswag_file", "eval_every", "eval_tasks", "eval_limit", "sample_every", "sample_prompt",
    "sample_tokens", "self_check",
}  # fmt: skip


def without_seed(settings: dict, seed: int) -> dict:
    """Returns the settings that decide a run's loss, apart from its seed."""
    found = {name: value for name, value in settings.items() if name not in NO_LOSS | {"model"}}
    for name in ("teacher", "init_from"):  # each seed may have its own: log/teacher/1/model_01200.pt
        found[name] = re.sub(rf"(?<=/){seed}(?=[/,]|$)", "SEED", str(found.get(name, "")))
    return found


def run_id(folder: Path) -> str | None:
    """Returns the id of the run in a folder; None if there is none."""
    try:
        found = read_json(folder / RUN, "").get("id")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


class LostFolder(OSError):
    """The run's folder is no longer its own. The message says why."""

    def __str__(self):
        return self.strerror


class RunFolder:
    """The folder that a launch writes into. Check it before each write: someone may move it, delete it or start another run there.

    run.json is the proof. Each launch writes its own token into it, so a file with another token belongs to another launch.
    """

    def __init__(self, path: Path):
        self.path = path
        self.token = secrets.token_hex(8)  # in run.json, it proves that the folder is this launch's
        self.mirror = None  # on rank 0 with --remote, a training.mirror.Mirror
        self.home = path.absolute()  # the current folder may be deleted too
        self.held: HeldFolder | None = None  # on rank 0, from lock_folder
        self.run, self.seen = None, None  # run.json's content, as this launch wrote it, and the file's identity
        self.lost = ""  # why this launch had to leave the folder

    @property
    def id(self) -> str | None:
        return self.run and self.run["id"]

    def begin(self, run: dict):
        """Writes run.json. Its last launch must have a token. From now on, the folder is this launch's."""
        self.run = run
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_run()

    def write_run(self):
        write_json(self.path / RUN, self.run)
        self.seen = identity(self.path / RUN)

    def restored(self) -> bool:
        """Writes run.json again if only the file was lost. Returns False if the folder is gone, perhaps while this writes."""
        if not (self.held and self.held.is_here()):
            return False
        try:
            self.write_run()
        except OSError:  # the folder is gone by now, or the disk is full: the next check tries again
            return self.held.is_here()
        return True

    def problem(self) -> str:
        """Says why this folder is no longer this launch's. Returns '' if it is."""
        if self.run is None:  # the launch is still checking its data
            gone = self.held and not self.held.is_here()
            return f"{self.path} was moved or deleted while this run was starting" if gone else ""
        try:
            found = identity(self.path / RUN)
        except OSError:  # a network disk may be away for a moment
            return ""
        if found and found == self.seen:
            return ""
        if not found:
            return "" if self.restored() else f"{self.path} was moved or deleted while this run was writing into it"
        try:
            other = read_json(self.path / RUN, "")
        except OSError:
            return ""
        except ValueError:  # damaged, or half written by an editor
            other = {}
        if not other and self.restored():
            return ""
        if token(other) == token(self.run):  # a copy, or a file system that numbers files differently each time
            self.seen = found
            return ""
        if other.get("id") == self.id:
            return f"another process resumed the run in {self.path}"
        return f"{self.path} belongs to another run now"

    def check(self):
        """Raises LostFolder if this folder is no longer this launch's."""
        if problem := self.problem():
            raise LostFolder(errno.ENOENT, problem)

    def rescue(self):
        """Finds a place for what this launch still has to write: where its folder is now, or a new folder beside the old one."""
        self.lost = self.problem()
        moved = self.held and self.held.whereabouts()
        if moved and moved != self.path and is_of(moved, self.run):
            self.path = moved
            self.seen = identity(moved / RUN)
            return
        name, number = f"{self.home.name}-{self.id}", 1
        while (place := self.home.with_name(name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        self.path = place
        self.path.mkdir(parents=True)  # the parent may be gone too
        with suppress(OSError):
            for name, data in [*self.mirror.texts.items()] if self.mirror else ():  # the logs, as far as the bucket has them
                write_atomically(self.path / name, lambda file, data=data: file.write(data))
        self.write_run()  # last: from now on, other threads write here


def identity(path: Path) -> tuple | None:
    """Returns what changes if a file is replaced or rewritten. None if there is no file."""
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def token(run: dict) -> str | None:
    """Returns the token of run.json's last launch."""
    launches = run.get("launches")
    last = launches[-1] if isinstance(launches, list) and launches else None
    return last.get("token") if isinstance(last, dict) else None


def is_of(folder: Path, run: dict) -> bool:
    """Whether a folder's run.json is the one that this launch wrote."""
    try:
        return token(read_json(folder / RUN, "")) == token(run)
    except (OSError, ValueError):
        return False
