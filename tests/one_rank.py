"""Runs a script as the only rank of a process group, so that a machine with one GPU runs the code of many: nccl, DDP and --shard.

python -m torch.distributed.run --standalone --nproc_per_node=1 tests/one_rank.py train …
"""

import importlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).parent.parent))

from conftest import trace_only

from common import distributed


class Many(int):
    """A number that passes for more than it is."""

    def __gt__(self, other: int) -> bool:
        return int(self) >= other


ALONE = distributed.Launch(rank=0, size=Many(1), local_rank=0, local_size=1, by_torchrun=True)


@contextmanager
def one_rank(device: torch.device):
    """Joins a process group of this process alone. Yields its DistContext, which passes for one of several ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "launched", lambda: ALONE)
        with distributed.join_world(device.type, store=dist.HashStore()) as world:
            yield world


def main(name: str):
    distributed.launched = lambda: ALONE
    if os.environ.get("GPU_TESTS_ON") == "cpu":
        trace_only()
    importlib.import_module(name).main()


if __name__ == "__main__":
    del sys.argv[0]  # the script sees its own name first
    main(sys.argv[0])
