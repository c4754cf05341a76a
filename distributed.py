"""A process among those that torchrun started, and what they do together."""

import gc
import os
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from device import pick_device


class Stopped(Exception):
    """A signal asked for the end while there was still work to do: raised on all processes alike."""


class PeerLost(Exception):
    """Another process died, or did not answer within the timeout."""


@dataclass(frozen=True)
class World:
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
def join_world(device: str, timeout_minutes: float = 10.0):
    """The process group for as long as the block lasts: nccl on CUDA, gloo on CPU, none without torchrun. PeerLost when
    another process ends, or does not come to what they do together within the timeout."""
    device = pick_device(device)
    if "RANK" not in os.environ:
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    try:
        begin_group("nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes))
        yield World(device, dist.get_rank(), dist.get_world_size())
    except BaseException as e:
        traceback.clear_frames(e.__traceback__)  # they hold DDP, which must go before the group:
        if isinstance(e, RuntimeError) and ("gloo" in str(e) or isinstance(e, dist.DistError)):
            rank, why = os.environ["RANK"], str(e).splitlines()[0]
            raise PeerLost(
                f"rank {rank} lost touch with another, which died or hangs, as it may say itself; if it only was slow, raise "
                f"--timeout-minutes ({why})"
            ) from None
        raise
    finally:
        gc.collect()  # when DDP goes last, it waits with Python's lock for a gloo thread that waits for the lock (torch 2.13)
        if dist.is_initialized():
            dist.destroy_process_group()


def begin_group(backend: str, timeout: timedelta):
    """init_process_group, also in a process that torchrun --max-restarts starts again: torchrun keeps the store where ranks leave
    their addresses for each other (pytorch/pytorch#135712), and those of the attempt before must not be found in it. Over
    several nodes the attempts are not counted alike: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun does it."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
