"""What malloc does with a block that is freed, seen by the page faults of asking for another one."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import REPO, TINY

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is told what to do where it is glibc's")

# a block of 64 MB is 16,384 pages, or 32 of the kind of 2 MB; the heap may need some turns until it has room for one
COUNT = """
import resource, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print("faults", min(faults() for _ in range(30)))
"""


def is_kept(code: str, *argv, **env) -> bool:
    """Whether after this code freed memory stays the process's. argv: the code's command line."""
    command = [sys.executable, "-c", code + COUNT, *map(str, argv)]
    told = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **env}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | told, timeout=120)
    assert result.returncode == 0, result.stderr
    faults = int(result.stdout.split()[-1])
    assert faults < 8 or faults >= 32
    return faults < 8


def test_freed_memory_stays_with_compiled_training_unless_memory_is_short(shards, tmp_path):
    code = "import model, train; model.GPT.compile_blocks = lambda *_: None; train.main()"  # as if it had compiled
    argv = [*TINY, "--data-dir", shards, "--max-steps", 1, "--val-every", 0, "--out-dir"]
    assert is_kept(code, *argv, tmp_path / "kept", "--compile")
    assert not is_kept(code, *argv, tmp_path / "sparing", "--compile", "--activation-memory", 0.5)
    assert not is_kept(code, *argv, tmp_path / "eager")


def test_what_the_environment_says_to_malloc_stands():
    code = "import torch, device; device.set_malloc(torch.device('{}'))"
    assert is_kept(code.format("cpu")) and not is_kept(code.format("cuda"))
    assert not is_kept(code.format("cpu"), MALLOC_MMAP_THRESHOLD_="4194304")
    assert not is_kept(code.format("cpu"), GLIBC_TUNABLES="glibc.malloc.mmap_threshold=4194304")
