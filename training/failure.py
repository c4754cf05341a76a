"""failed.txt: why a run can't go on. It ends a loop around torchrun, which itself always exits with 1.

launches.json counts the launches in a row that began with the same checkpoint. Too many of them are such a reason too.
"""

import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from checkpoint import sealed_steps
from common import cli
from common.distributed import launched
from common.files import read_json, write_json
from common.locks import lock_folder
from training.flags import out_dir_of
from training.run_json import is_restart, torchrun_id

FAILED = "failed.txt"
LAUNCHES = "launches.json"
ENOUGH = 3  # launches without a new checkpoint


class Hopeless(SystemExit):
    """Ends a run with status 1, for a lasting reason: restarting won't help."""

    def __init__(self, reason: str):
        super().__init__(1)
        self.reason = reason


@contextmanager
def recorded():
    """Writes failed.txt if the block fails for a lasting reason. Only under torchrun; once per host. If this torchrun then restarts its
    processes, ends them at once: ValueError. The next torchrun removes the file."""
    if torchrun_id() == "" or "--rehearse" in sys.argv:  # the exit status says it, or the rehearsal, which leaves the folder alone
        yield
        return
    path = out_dir_of() / FAILED
    raise_if_failed_before(path)
    try:
        yield
    except BaseException as e:
        if reason := final_reason(e):
            with suppress(ValueError, OSError):
                write_reason(path, reason)
        raise
    path.with_name(LAUNCHES).unlink(missing_ok=True)


def count_launch(folder: Path):
    """Counts this launch. ValueError if the last ones saved no new checkpoint: the next one would hardly do. Only under torchrun; call it
    on rank 0, in a locked folder, once nothing is known that a later launch might not meet, such as another process at work."""
    if torchrun_id() == "":
        return
    path, newest, launches = folder / LAUNCHES, max(sealed_steps(folder), default=None), 1
    with suppress(OSError, ValueError):
        before = read_json(path, "")
        if "newest" in before and before["newest"] == newest and isinstance(before.get("launches"), int):
            launches += before["launches"]
    if launches > ENOUGH:
        path.unlink()  # the user has fixed something, and starts again
        since = "at all" if newest is None else f"since that of step {newest}"
        raise ValueError(f"{ENOUGH} launches in a row saved no checkpoint {since}: read why each of them ended, then start again")
    with suppress(OSError):  # a full disk
        write_json(path, {"newest": newest, "launches": launches})


def raise_if_failed_before(path: Path):
    """ValueError if this torchrun has failed for good before. Else removes what an earlier one left."""
    launch = launched()
    first = launch is None or launch.local_rank in (None, 0)
    lines = []
    with suppress(FileNotFoundError):  # the first process may be removing it
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if torchrun_id() in lines:
        error = ValueError(f"restarting won't help: {lines[0]}")
        error.is_shared = not first  # so that one process prints it
        raise error
    if first and lines:
        path.unlink(missing_ok=True)


def final_reason(e: BaseException) -> str:
    """Says why a restart must fail again; '' if it may succeed, as after a full disk or a lost process."""
    if isinstance(e, Hopeless):
        return e.reason
    if isinstance(e, SystemExit):
        return "train.py rejects these flags" if e.code == 2 else ""
    wrong = isinstance(e, ValueError) and not isinstance(e, cli.TryAgain)
    unusable = isinstance(e, OSError) and e.errno in cli.REMEDIES and not cli.disk_failed(e)
    return str(e) if wrong or unusable or cli.out_of_memory(e) else ""


def write_reason(path: Path, reason: str):
    """Adds the reason to the file. ValueError if another torchrun's run is at work in this folder: its loop must not stop."""
    ours = False
    with suppress(ValueError):
        ours = is_restart(path.parent)
    if ours:
        append_reason(path, reason)
    else:
        with lock_folder(path.parent):
            append_reason(path, reason)


def append_reason(path: Path, reason: str):
    with open(path, "a", encoding="utf-8") as file:  # hosts may share the folder, and each looks for its own line
        file.write(f"{reason}\n\nRestarting won't help. The next launch removes this file.\n{torchrun_id()}\n")
