"""One process of a torchrun job, and what its processes do together."""

import functools
import gc
import os
import pickle
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from common import cli
from common.device import pick_device, share_compile_workers


class Stopped(Exception):
    """A signal asked to stop before the work was done. Raised on all ranks alike."""


class PeerLost(Exception):
    """Another rank died, or did not answer within the timeout."""


@dataclass(frozen=True)
class DistContext:
    """One process of a world of `size`. Without torchrun, the world is one process.

    On CUDA, tensors of the model go through nccl, everything else through a gloo group in main memory. A gloo operation raises an error
    if another rank dies or is late. nccl would wait, and then abort the process with a message that few users understand.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    first_on_host: bool = True  # also if the launcher doesn't say which processes share a host
    several_hosts: bool = False
    group: dist.ProcessGroup | None = None  # the gloo group beside nccl; None: there is only the default group, gloo itself
    timeout: float = 600.0  # seconds that a rank waits for the others

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows(self, row: torch.Tensor) -> list[list[float]]:
        """Every rank's row (N,), in order of rank, on every rank. PeerLost if a rank doesn't come, or doesn't finish the work on its GPU
        that this one waits for."""
        table = row.new_zeros(self.size, len(row))
        table[self.rank] = row
        if self.size > 1:
            dist.all_reduce(table)
        if self.group:
            dist.all_reduce(torch.zeros(()), group=self.group)  # while the GPUs work: have all ranks come?
            self.wait_for_gpu()
        return table.tolist()

    def wait_for_gpu(self):
        """Waits for the work on this GPU. It ends only if all ranks do their part of it. PeerLost after the timeout."""
        done, deadline = torch.cuda.Event(), time.monotonic() + self.timeout
        done.record()
        wait_until(done.query, deadline, lambda: lost_touch(self.rank, "its GPU waits for theirs"), pause=1e-4)

    def broadcast(self, tensors: list[torch.Tensor], owner):
        """Sends each tensor from rank owner(index of the tensor) to all others, in place."""
        if self.size > 1:
            for work in [dist.broadcast(tensor, owner(i), async_op=True) for i, tensor in enumerate(tensors)]:
                work.wait()

    def copy(self, function):
        """Runs function on rank 0 and sends its result, tensors included, to every rank."""
        things = [function() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(things, group=self.group, device=torch.device("cpu"))
        return things[0]

    def gather(self, thing) -> list:
        """Every rank's picklable thing, in order of rank, on every rank."""
        things = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(things, thing, group=self.group)
        return things

    def gather_unless(self, stopped: bool, thing) -> list:
        """gather, for work that a signal may interrupt. Stopped on all ranks if any was stopped."""
        things = self.gather((stopped, thing))
        if any(stopped for stopped, _ in things):
            raise Stopped
        return [thing for _, thing in things]

    def on_all(self, function) -> list:
        """Runs function on every rank. Returns their picklable results in order of rank, or raises the first ValueError or OSError on
        all of them."""
        result = error = None
        try:
            result = function()
        except (ValueError, OSError) as e:
            error = e
        results, errors = zip(*self.gather((result, error)), strict=True)
        for error in filter(None, errors):
            error.is_shared = not self.is_main  # so that only rank 0 prints it
            raise error
        return list(results)

    def on_main(self, function):
        """Runs function on rank 0 only. Every rank returns its picklable result, or raises its ValueError or OSError."""
        return self.on_all(lambda: function() if self.is_main else None)[0]


# ---- how this process was started ----


class Launch(NamedTuple):
    """What the launcher of several processes says about this one."""

    rank: int
    size: int
    local_rank: int | None  # among the processes on this host; Kubeflow's PyTorchJob doesn't tell
    local_size: int | None
    by_torchrun: bool

    def gpu(self, count: int) -> int:
        """Returns the index of this process's GPU, of `count` that it sees. ValueError if torchrun started too many processes.
        Other launchers may show each process only its own GPU."""
        if self.by_torchrun and (self.local_size or 1) > max(1, count):
            raise ValueError(f"{self.local_size} processes on this host, but PyTorch sees {count} GPUs: pass --nproc_per_node={count}")
        return (self.rank if self.local_rank is None else self.local_rank) % max(1, count)


def launched() -> Launch | None:
    """Reads how this process was started, from the variables that torchrun, Kubeflow and others set. None if it works alone.
    ValueError if they are incomplete or contradict each other. The one place that reads RANK and the like."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: value for name in names if (value := os.environ.get(name, "").strip())}
    if len(lone := given.keys() & {"RANK", "WORLD_SIZE"}) < 2:
        for name in lone:  # another launcher's leftover
            warn_once(f"warning: ignoring {name}={given[name]}, since {'WORLD_SIZE' if name == 'RANK' else 'RANK'} is not set")
        return None
    remedy = "start with torchrun, or unset RANK and WORLD_SIZE to run one process"
    try:
        numbers = {name: int(value) for name, value in given.items() if name != "MASTER_ADDR"}
    except ValueError as e:
        raise ValueError(f"one of {', '.join(names[:2] + names[3:])} is not a number ({e}): {remedy}") from e
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={size} contradict each other: {remedy}")
    if size == 1:
        return None
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in given]:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={size} are set, but {' and '.join(missing)} not: {remedy}")
    return Launch(rank, size, numbers.get("LOCAL_RANK"), numbers.get("LOCAL_WORLD_SIZE"), "TORCHELASTIC_RUN_ID" in os.environ)


@functools.cache
def warn_once(text: str):
    cli.say(text)


@contextmanager
def join_world(device: str, timeout_minutes: float = 10.0, store: dist.Store | None = None):
    """Joins the process group while the block runs: nccl and gloo on CUDA, gloo on a CPU, none for a single process. PeerLost if another
    process ends, or does not join a collective operation within the timeout. store: from rendezvous, if that was called before."""
    launch = launched()
    device = pick_device(device, warn=launch is None or launch.rank == 0)
    if launch is None:
        yield DistContext(device)
        return
    if store is None:
        _, store = rendezvous(lambda: None, timeout_minutes)
    if device.type == "cuda":
        device = torch.device("cuda", launch.gpu(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    share_compile_workers(launch.local_size or 1)
    try:
        with naming_lost_peers(launch.rank):
            group = join_groups(launch, device, store, timeout_minutes)
            first, several = launch.local_rank in (None, 0), launch.local_size != launch.size
            yield DistContext(device, launch.rank, launch.size, first, several, group, 60 * timeout_minutes)
    except BaseException as e:
        if not leaving_waits():  # else exit_without_others ends the process, once the error is printed
            traceback.clear_frames(e.__traceback__)  # frames hold DDP, which must be freed before the group
            leave_groups()
        raise
    leave_groups()


WATCHDOG = 3  # timeouts until nccl aborts the process. rows raises PeerLost within two
SAVING = "saving"  # the name of a thread that writes a checkpoint: exit_without_others waits for it, as any exit does


def join_groups(launch: Launch, device: torch.device, store: dist.Store, timeout_minutes: float) -> dist.ProcessGroup | None:
    """Joins the default group. On CUDA, it is nccl's: also joins a gloo group and returns it."""
    how, timeout = dict(store=store, rank=launch.rank, world_size=launch.size), timedelta(minutes=timeout_minutes)
    if device.type != "cuda":
        dist.init_process_group("gloo", timeout=timeout, **how)
        return None
    dist.init_process_group("nccl", timeout=WATCHDOG * timeout, device_id=device, **how)
    return dist.new_group(backend="gloo", timeout=timeout)


def leave_groups():
    gc.collect()  # DDP freed later holds the GIL and waits for a gloo thread that waits for the GIL (torch 2.13)
    if dist.is_initialized():
        dist.destroy_process_group()


def leaving_waits() -> bool:
    """Whether this process is in an nccl group. To leave it, a rank waits for the others, which may wait for this one in a collective
    operation."""
    return dist.is_initialized() and dist.get_backend() == "nccl"


@contextmanager
def exit_without_others():
    """Ends this process at once if the block fails inside an nccl group. The others notice that it is gone. Put this around the code that
    prints the error. A PeerLost becomes one line and status 1 here, in any group."""
    try:
        with one_line_if_lost():
            yield
    except BaseException as e:
        if not leaving_waits():
            raise
        if not isinstance(e, SystemExit):
            sys.excepthook(type(e), e, e.__traceback__)
        for thread in threading.enumerate():
            if thread.name == SAVING:
                thread.join()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        status = (e.code or 0) if isinstance(e, SystemExit) else 1
        os._exit(status if isinstance(status, int) else 1)


@contextmanager
def one_line_if_lost():
    try:
        yield
    except PeerLost as e:
        cli.say(f"error: {e}")
        sys.exit(1)


@contextmanager
def naming_lost_peers(rank: int):
    """Turns PyTorch's errors about a lost process into PeerLost."""
    try:
        yield
    except RuntimeError as e:
        if "gloo" not in str(e) and not isinstance(e, dist.DistError):
            raise
        traceback.clear_frames(e.__traceback__)
        raise PeerLost(lost_touch(rank, str(e).splitlines()[0])) from None


def lost_touch(rank: int, why: str) -> str:
    return (
        f"rank {rank} lost touch with another rank, which died or hangs: look for its own error; if it was only slow, raise "
        f"--timeout-minutes ({why})"
    )


# ---- before there is a group ----


def rendezvous(load: Callable, timeout_minutes: float):
    """Runs load on rank 0 and returns its result on every process, or raises its ValueError or OSError there. Also returns the store
    through which the processes find each other (None without torchrun). PeerLost if one does not come within the timeout.

    Only rank 0 runs load, since other hosts may lack the run's folder. It answers each process that asks, until all have
    confirmed. The store may hold entries of dead processes: torchrun keeps it when it restarts processes
    (pytorch/pytorch#135712), and each host counts restarts by itself. So each answer names a new attempt at random, and the
    group uses only keys under that name."""
    launch = launched()
    if launch is None:
        return load(), None
    with naming_lost_peers(launch.rank):
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=timeout_minutes)))
        deadline = time.monotonic() + 60 * timeout_minutes
        attempt, result, error = serve_rendezvous(store, size, load, deadline) if rank == 0 else join_rendezvous(store, rank, deadline)
    if error:
        error.is_shared = rank != 0  # so that only rank 0 prints it
        raise error
    return result, dist.PrefixStore(attempt, store)


def serve_rendezvous(store: dist.Store, size: int, load: Callable, deadline: float) -> tuple:
    """Rank 0's part of rendezvous. Returns the attempt's name, and load's result and error."""
    result = error = None
    try:
        result = load()
    except (ValueError, OSError) as e:
        error = e
    attempt = secrets.token_hex(8)
    answer = attempt, result, error
    missing = set(range(1, size))

    def all_confirmed() -> bool:
        for rank in sorted(missing):
            if store.check([f"{attempt} heard by {rank}"]):
                missing.remove(rank)
            elif store.check([f"{rank} asks"]):
                store.set(f"answer to {store.get(f'{rank} asks').decode()}", pickle.dumps(answer))
        return not missing

    wait_until(all_confirmed, deadline, lambda: late(0, f"ranks {', '.join(map(str, sorted(missing)))}"))
    return answer


def join_rendezvous(store: dist.Store, rank: int, deadline: float) -> tuple:
    """The other ranks' part of rendezvous. Returns rank 0's answer."""
    me = secrets.token_hex(8)
    store.set(f"{rank} asks", me)
    wait_until(lambda: store.check([f"answer to {me}"]), deadline, lambda: late(rank, "rank 0"))
    attempt, result, error = pickle.loads(store.get(f"answer to {me}"))
    store.set(f"{attempt} heard by {rank}", b"")
    return attempt, result, error


def late(rank: int, whom: str) -> str:
    return f"rank {rank} waited too long for {whom}: start all hosts within --timeout-minutes of each other"


def wait_until(done: Callable[[], bool], deadline: float, why: Callable[[], str], pause: float = 0.02):
    """Calls done until it returns True. PeerLost with the text why() at the deadline, a time.monotonic()."""
    while not done():
        if time.monotonic() > deadline:
            raise PeerLost(why())
        time.sleep(pause)
