"""--remote: sends a run's checkpoints and logs to a bucket while it trains, and fetches them on an empty machine.

Training never waits for the bucket: threads do all of this, on rank 0. If the bucket fails, they say so once, try again, and say once
that they have caught up. bucket.py has the layout, lease.py what happens if two machines are the run.
"""

import math
import shlex
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from checkpoint import files_of, find_problem, recover_interrupted_save, sealed_steps
from common import cli
from common.files import parse_json
from common.remote import Remote
from common.run_folder import RUN, RunFolder, run_id
from training import flags
from training.bucket import TEXTS, Bucket, download_texts, fetch_newest, prune
from training.config import TrainConfig
from training.lease import Lease, LeaseLost
from training.stop import StopSignal, stopped_at

PATIENCE = 600.0  # seconds that the end of a run waits for a bucket that fails
PAUSES = 1.0, 30.0  # seconds between two tries: first, and at most


@contextmanager
def opened(folder: RunFolder, given: TrainConfig):
    """If --remote is set, fetches what is newer there into the locked folder, and sends what the run saves while the block runs. At the
    end, waits until all has arrived: SystemExit if it can't. given: the flags, without the settings of the run that they resume.

    ValueError if another run or another launch has the URL, or if it can't be used."""
    known = (folder.path / RUN).exists()
    config = flags.parse_config() if known else given
    if not config.remote:
        yield
        return
    if not known:
        flags.raise_if_taken(folder.path, half_fetched=config.resume)
    StopSignal.current = None  # of an earlier run in this process
    mirror = Mirror(Remote(config.remote), folder, config)
    try:
        mirror.begin(config.resume)
        folder.mirror = mirror
        yield
    except BaseException as e:
        missing = mirror.end(wait=isinstance(e, SystemExit), stopping=True)
        if missing and not mirror.lost:
            cli.say(f"warning: {missing}")
        raise
    if missing := mirror.end(wait=True):
        cli.say(f"error: {missing}")
        sys.exit(1)


# ---- the begin: on an empty machine, too ----


def fetch(remote: Remote, folder: Path, resume: bool, newest: int, damaged: set) -> tuple[int, int]:
    """Fetches a checkpoint after step `newest`, the folder's, or if there is none at all, the run itself. Returns the newest steps of the
    folder and of the bucket; -1: none. damaged: what was reported before. ValueError if another run is there."""
    bucket, ours = Bucket(remote), run_id(folder)
    check_owner(bucket, ours, folder, resume)
    for name in {*bucket.damaged} - damaged:
        damaged.add(name)
        cli.say(f"warning: {remote.url}/{name} is missing, or doesn't fit the files beside it: these are not resumed")
    if resume:
        fetched = fetch_newest(bucket, folder, newest, damaged)
        newest = newest if fetched is None else fetched
        if fetched is None and ours is None and bucket.runs:
            download_texts(remote, bucket.newest_launch(), folder)
    return newest, max((each.step for each in bucket.checkpoints), default=-1)


def check_owner(bucket: Bucket, ours: str | None, folder: Path, resume: bool):
    """ValueError if the bucket has another run than this folder, or one that can't be told. ours: the id of the run in the folder."""
    others, url = bucket.ids() - {ours}, bucket.remote.url
    if bucket.damaged and not bucket.runs:
        raise ValueError(f"{url}/{bucket.damaged[0]} is missing or damaged: restore it, or choose another --remote")
    if others and not resume:
        raise ValueError(f"{url} has a run already: add --resume to continue it, or choose another --remote")
    if others and (ours or len(others) > 1):
        here = f"the one in {folder} is {ours}" if ours else "one folder is for one run"
        raise ValueError(f"{url} has the run {cli.some(sorted(others))}, and {here}: choose another --remote")


def newest_complete(folder: Path) -> int:
    """Returns the newest step with a complete checkpoint, without a word about damaged ones: the bucket may have better ones. -1: none."""
    return next((step for step in reversed(sealed_steps(folder)) if find_problem(folder, step) is None), -1)


# ---- while the run trains ----


class Health:
    """Whether a bucket answers. Says once that it fails, and once that all is well again: it answers, and up_to_date() is true.
    warn: called with the line."""

    def __init__(self, url: str, up_to_date: Callable[[], bool]):
        self.url, self.up_to_date, self.warn = url, up_to_date, cli.say
        self.problems: dict[str, str] = {}  # by task, while it fails
        self.since = math.inf  # time of the first failure
        self.lock = threading.Lock()

    def attempt(self, task: str, work: Callable[[], None]) -> bool:
        """Calls work. Returns whether it succeeded."""
        try:
            work()
        except Exception as e:  # the packages of the stores may raise anything
            if isinstance(e, LeaseLost):
                raise
            with self.lock:
                if self.since == math.inf:
                    self.since = time.monotonic()
                    self.warn(f"warning: {cli.in_one_line(e)}; training continues, and {task} is tried again")
                self.problems[task] = cli.in_one_line(e)
            return False
        with self.lock:
            self.problems.pop(task, None)
            if self.since < math.inf and not self.problems and self.up_to_date():
                self.since = math.inf
                self.warn(f"{self.url} works again and is up to date")
        return True


class Save(NamedTuple):
    """A checkpoint to send. The same step may be saved again, with its evaluation: then the number differs."""

    step: int
    number: int


class Mirror:
    """Sends one launch's files in a thread, and renews its lease in another. lost: why it must stop, if another launch took over."""

    def __init__(self, remote: Remote, folder: RunFolder, config: TrainConfig):
        self.remote, self.folder, self.keep, self.notice = remote, folder, config.keep, config.notice_seconds
        self.launch, self.lost = f"launch-{folder.token}", ""
        self.health = Health(remote.url, lambda: self.wanted == self.sent)
        self.wanted: Save | None = None
        self.sending: int | None = None  # a step
        self.sent: Save | None = None
        self.run = None  # its id, once run.json has arrived
        self.arrived: set[str] = set()  # checkpoint files
        self.texts: dict[str, bytes] = {}  # the logs, as last sent
        self.changed, self.closing = threading.Condition(), threading.Event()
        self.lease, self.threads = Lease(remote, folder.token, folder.path), []

    def begin(self, resume: bool):
        """Fetches what is newer than the folder, takes the lease and starts the threads."""
        path, known, damaged = self.folder.path, run_id(self.folder.path), set()
        recover_interrupted_save(path)
        self.lease.watch(1.2)  # a machine that stands by downloads nothing
        newest, _ = fetch(self.remote, path, resume, newest_complete(path), damaged)  # meanwhile, the lease may change
        self.lease.acquire()
        newest, there = fetch(self.remote, path, resume, newest, damaged)
        if newest > there:
            self.saved(newest)
        if run_id(path) != known:  # the run was fetched: its settings count
            config = flags.parse_config()
            self.keep, self.notice = config.keep, config.notice_seconds
        for task in (self.send_all, self.renew_lease):
            self.threads.append(threading.Thread(target=self.until_lost, args=[task], name=f"--remote: {task.__name__}", daemon=True))
            self.threads[-1].start()

    def until_lost(self, task: Callable[[], None]):
        """Runs a thread's task. If another launch has taken over, says so once, and the run stops."""
        try:
            task()
        except LeaseLost as e:
            if not (self.closing.is_set() or self.lost):
                self.lost = str(e)
                self.health.warn(f"warning: {e}: this launch sends nothing more, and stops")

    def saved(self, step: int):
        """Sends a checkpoint that was just saved, and the log. Returns at once. An older one that waits is skipped."""
        with self.changed:
            self.wanted = Save(step, self.wanted.number + 1 if self.wanted else 0)
            self.arrived -= {path.name for path in files_of(Path(), step)}
            self.changed.notify_all()

    def end(self, wait: bool, stopping: bool = False) -> str:
        """Ends the threads and releases the lease. wait: first, until all has arrived; after a signal or an error (stopping), at most
        for --notice-seconds. Returns what is missing, or ''."""
        if wait and self.threads:
            self.wait_until_sent(time.monotonic() if stopping else math.inf)
        self.closing.set()
        self.health.warn = lambda text: None
        with self.changed:
            self.changed.notify_all()
        if not self.threads:  # it was refused while it began
            self.lease.release()
        for thread in self.threads:
            thread.join(5 if stopping or self.health.problems else 60)  # a bucket that is gone must not hold up the end
        return self.missing()

    def wait_until_sent(self, since: float):
        """Waits until everything has arrived. since: when the end began, if the machine may be taken away now."""
        said, began = False, time.monotonic()
        while self.missing() and not self.lost:
            now = time.monotonic()
            if now > (stopped_at() or since) + self.notice or now - max(began, self.health.since) > PATIENCE:
                return
            if not said:
                self.health.warn(f"waiting until {self.remote.url} has the checkpoint of step {self.wanted.step}")
                said = True
            try:
                with self.changed:
                    self.changed.wait(0.2)
            except KeyboardInterrupt:  # the user doesn't want to wait
                return
        if not self.lost:
            self.health.warn(f"everything is in {self.remote.url}")

    def missing(self) -> str:
        """Says what the bucket lacks, or ''."""
        if self.lost or self.wanted == self.sent:
            return self.lost
        why = next(iter(self.health.problems.values()), "there was no time left")
        place = shlex.quote(str(self.folder.path))
        return f"{self.remote.url} lacks the checkpoint of step {self.wanted.step} ({why}); to send it: --resume --out-dir {place}"

    def renew_lease(self):
        while not self.closing.wait(self.lease.every):
            self.health.attempt("the lease", self.lease.renew)
        self.lease.release()

    def send_all(self):
        """Sends until the end whatever is due."""
        pause, longest = PAUSES
        while not self.closing.is_set() and not self.lost:
            with self.changed:
                if self.wanted == self.sent and (self.run or not self.folder.run):
                    self.changed.wait(1)  # training doesn't tell when it writes run.json
                    continue
            if self.health.attempt("sending", self.send):
                pause = PAUSES[0]
            else:
                self.closing.wait(pause)
                pause = min(2 * pause, longest)

    def send(self):
        """Sends the logs, then the newest checkpoint, its seal last: what is sealed there is complete, and its log reaches as far."""
        save = self.wanted
        self.sending = save and save.step
        try:
            self.send_texts()
            if save != self.sent:
                self.send_checkpoint(save)
        except FileNotFoundError as e:
            if self.wanted == save:  # else a newer one was saved meanwhile, and this one deleted
                raise OSError(f"{e.filename} is gone, and could not be sent to {self.remote.url}") from None
        with self.changed:
            self.changed.notify_all()

    def send_texts(self):
        folder, run = self.folder.path, run_id(self.folder.path)
        if run is None or run != (self.run or run):
            raise OSError(f"{folder} is not this run's any more: sent nothing to {self.remote.url}")
        for name in TEXTS:  # run.json first: with it, prune knows that the others are this run's
            if (folder / name).exists():
                data = (folder / name).read_bytes()
                data = data[: data.rfind(b"\n") + 1]
                self.remote.put(data, f"{self.launch}/{name}")
                if name != RUN:
                    self.texts[name] = data
        self.run = run

    def send_checkpoint(self, save: Save):
        files = files_of(self.folder.path, save.step)
        seal = files.seal.read_bytes()
        if parse_json(seal)[files.model.name].get("run") != self.run:
            raise OSError(f"{files.seal} is not of this run: sent nothing to {self.remote.url}")
        for path in files[:2]:
            if self.lost or (stopped_at() and self.wanted != save):  # now there is only time for the newest
                return
            if path.name not in self.arrived:
                self.remote.put(path, f"{self.launch}/{path.name}")
                with self.changed:
                    if self.wanted == save:
                        self.arrived.add(path.name)
        if self.lost or (self.wanted != save and self.wanted.step == save.step):  # saved again: these may be parts of both
            return
        self.remote.put(seal, f"{self.launch}/{files.seal.name}")
        self.sent = save
        if stopped_at():  # no time for this either
            return
        try:
            found = Bucket(self.remote)
            self.lease.renew()  # if it is ours now, nothing that was found can be of a launch that takes over
            prune(found, self.run, self.keep, self.launch)
        except ValueError as e:
            self.health.warn(f"warning: the checkpoint of step {save.step} has arrived, but older ones could not be deleted ({e})")
