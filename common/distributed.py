"""A process among those that torchrun started, and what they do together."""

import gc
import os
import pickle
import secrets
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.device import pick_device


class Stopped(Exception):
    """A signal asked for the end while there was still work to do: raised on all processes alike."""


class PeerLost(Exception):
    """Another process died, or did not answer within the timeout."""


@dataclass(frozen=True)
class DistContext:
    """One process among `size`; a run without torchrun is a world of one."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def rows(self, row: torch.Tensor) -> list[list[float]]:
        """Every process's row (N,), by rank, on every process."""
        table = row.new_zeros(self.size, len(row))
        table[self.rank] = row
        return self.sum(table).tolist()

    def broadcast(self, tensors: list[torch.Tensor], owner):
        """Each tensor of the process owner(number of the tensor) to all others, in place."""
        if self.size > 1:
            for work in [dist.broadcast(tensor, owner(i), async_op=True) for i, tensor in enumerate(tensors)]:
                work.wait()

    def copy(self, function):
        """Rank 0's result of function, tensors and all, on every process."""
        things = [function() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(things)
        return things[0]

    def gather(self, thing) -> list:
        """Every process's picklable thing, by rank, on every process."""
        things = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(things, thing)
        return things

    def gather_unless(self, stopped: bool, thing) -> list:
        """gather, for what a signal may cut short on some of the processes: Stopped on all of them when it did on any."""
        things = self.gather((stopped, thing))
        if any(stopped for stopped, _ in things):
            raise Stopped
        return [thing for _, thing in things]

    def on_all(self, function) -> list:
        """Runs function on every process. Their picklable results by rank; or the first ValueError or OSError, on all alike."""
        result = error = None
        try:
            result = function()
        except (ValueError, OSError) as e:
            error = e
        results, errors = zip(*self.gather((result, error)), strict=True)
        for error in filter(None, errors):
            error.is_shared = not self.is_main  # for rank 0 alone to print
            raise error
        return list(results)

    def on_main(self, function):
        """Runs function on rank 0 alone. Its picklable result, or its ValueError or OSError, is every process's."""
        return self.on_all(lambda: function() if self.is_main else None)[0]


@contextmanager
def join_world(device: str, timeout_minutes: float = 10.0, store: dist.Store | None = None):
    """The process group for as long as the block lasts: nccl on CUDA, gloo on CPU, none without torchrun. PeerLost when
    another process ends, or does not come to what they do together within the timeout. store: what rendezvous returned, if it was
    called before."""
    device = pick_device(device)
    if "RANK" not in os.environ:
        yield DistContext(device)
        return
    if store is None:
        _, store = rendezvous(lambda: None, timeout_minutes)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes)
    try:
        with naming_lost_peers():
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            yield DistContext(device, rank, size)
    except BaseException as e:
        traceback.clear_frames(e.__traceback__)  # they hold DDP, which must go before the group
        raise
    finally:
        gc.collect()  # when DDP goes last, it waits with Python's lock for a gloo thread that waits for the lock (torch 2.13)
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def naming_lost_peers():
    """PeerLost for what PyTorch raises when another process is gone."""
    try:
        yield
    except RuntimeError as e:
        if "gloo" not in str(e) and not isinstance(e, dist.DistError):
            raise
        traceback.clear_frames(e.__traceback__)
        rank, why = os.environ["RANK"], str(e).splitlines()[0]
        raise PeerLost(
            f"rank {rank} lost touch with another, which died or hangs, as it may say itself; if it only was slow, raise "
            f"--timeout-minutes ({why})"
        ) from None


# ---- before there is a group ----


def rendezvous(load: Callable, timeout_minutes: float):
    """What load returns on rank 0, or its ValueError or OSError, on every process; and the store where they leave their addresses
    for each other, None without torchrun. PeerLost when one does not come within the timeout.

    Rank 0 decides alone since other hosts may lack the run's folder. It answers each process that asks, until all have said
    that they heard: torchrun keeps the store when it starts processes again (pytorch/pytorch#135712) and counts restarts on each
    host by itself, so that what a process finds there may be left by one that is dead. Each answer has the name of an attempt
    that none before had, and under it the store is empty."""
    if "RANK" not in os.environ:
        return load(), None
    with naming_lost_peers():
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=timeout_minutes)))
        deadline = time.monotonic() + 60 * timeout_minutes
        attempt, result, error = serve_rendezvous(store, size, load, deadline) if rank == 0 else join_rendezvous(store, rank, deadline)
    if error:
        error.is_shared = rank != 0  # for rank 0 alone to print
        raise error
    return result, dist.PrefixStore(attempt, store)


def serve_rendezvous(store: dist.Store, size: int, load: Callable, deadline: float) -> tuple:
    """Rank 0's part of rendezvous: the name of the attempt, and what load returned or raised."""
    result = error = None
    try:
        result = load()
    except (ValueError, OSError) as e:
        error = e
    attempt = secrets.token_hex(8)
    told = attempt, result, error
    missing = set(range(1, size))

    def all_heard() -> bool:
        for rank in sorted(missing):
            if store.check([f"{attempt} heard by {rank}"]):
                missing.remove(rank)
            elif store.check([f"{rank} asks"]):
                store.set(f"answer to {store.get(f'{rank} asks').decode()}", pickle.dumps(told))
        return not missing

    wait_until(all_heard, deadline, lambda: f"ranks {', '.join(map(str, sorted(missing)))}")
    return told


def join_rendezvous(store: dist.Store, rank: int, deadline: float) -> tuple:
    """The other ranks' part of rendezvous: what rank 0 answers."""
    me = secrets.token_hex(8)
    store.set(f"{rank} asks", me)
    wait_until(lambda: store.check([f"answer to {me}"]), deadline, lambda: "rank 0")
    attempt, result, error = pickle.loads(store.get(f"answer to {me}"))
    store.set(f"{attempt} heard by {rank}", b"")
    return attempt, result, error


def wait_until(done: Callable[[], bool], deadline: float, whom: Callable[[], str]):
    while not done():
        if time.monotonic() > deadline:
            raise PeerLost(f"rank {os.environ['RANK']} waited in vain for {whom()}: start all hosts within --timeout-minutes of each other")
        time.sleep(0.02)
