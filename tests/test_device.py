"""What malloc does with a block that is freed, seen by the page faults of asking for another one."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import REPO, TINY

from common import device

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is told what to do where it is glibc's")

# page faults of blocks of 4, 16 and 64 MB: of 1,024, 4,096 and 16,384 pages, or 2, 8 and 32 of the kind of 2 MB. The heap may need
# some turns until it has room for one. glibc itself keeps blocks up to 32 MB once one of them was freed.
COUNT = """
import resource, torch
def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print("faults", *(min(faults(size) for _ in range(30)) for size in (2**20, 2**22, 2**24)))
"""
ALL, GLIBC, SPARING = "4 16 64", "4 16", "4"


def kept(code: str, *argv, **env) -> str:
    """Which blocks, in MB, stay the process's after this code when they are freed. argv: the code's command line."""
    command = [sys.executable, "-c", code + COUNT, *map(str, argv)]
    inherited = {name: value for name, value in os.environ.items() if name not in device.MALLOC_SETTINGS}
    told = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **env}
    result = subprocess.run(command, capture_output=True, text=True, env=inherited | told, timeout=120)
    assert result.returncode == 0, result.stderr
    faults = dict(zip(("4", "16", "64"), map(int, result.stdout.split()[-3:]), strict=True))
    return " ".join(size for size in faults if faults[size] < 2)


def test_freed_memory_stays_with_compiled_training_unless_memory_is_short(shards, tmp_path):
    code = (
        "import train, training.trainer\nfrom common import device\n"
        "device.can_compile, training.trainer.compile_blocks = lambda _: True, lambda *_: None\n"  # as if it had compiled
        "train.main()"
    )
    argv = [*TINY, "--data-dir", shards, "--max-steps", 1, "--val-every", 0, "--out-dir"]
    assert kept(code, *argv, tmp_path / "kept", "--compile") == ALL
    assert kept(code, *argv, tmp_path / "sparing", "--compile", "--activation-memory", 0.5) == SPARING
    assert kept(code, *argv, tmp_path / "eager") == GLIBC


def test_what_the_environment_says_to_malloc_stands():
    code = "import torch; from common import device; device.set_malloc(torch.device('{}'))"
    assert kept(code.format("cpu")) == ALL and kept(code.format("cuda")) == GLIBC
    for name, value in (("MALLOC_MMAP_THRESHOLD_", "4194304"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=4194304")):
        assert kept(code.format("cpu"), **{name: value}) in ("", "4")


def test_a_process_can_go_from_keeping_to_sparing():
    code = "import torch; from common import device\nfor sparing in (False, True): device.set_malloc(torch.device('cpu'), sparing)"
    assert kept(code) == SPARING
