"""Whether malloc keeps freed blocks: a kept block causes no page faults when it is allocated again."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import REPO, TINY

from common import device

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="set_malloc needs glibc")

# Counts page faults of blocks of 4, 16 and 64 MB: 1,024, 4,096 and 16,384 pages, or 2, 8 and 32 huge pages of 2 MB. The heap may
# need a few rounds to make room for a block. glibc by itself keeps blocks of up to 32 MB, once it has freed one.
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
    """The sizes in MB of freed blocks that the process keeps after running this code. argv: the code's command line."""
    command = [sys.executable, "-c", code + COUNT, *map(str, argv)]
    inherited = {name: value for name, value in os.environ.items() if name not in device.MALLOC_SETTINGS}
    own = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **env}
    result = subprocess.run(command, capture_output=True, text=True, env=inherited | own, timeout=120)
    assert result.returncode == 0, result.stderr
    faults = dict(zip(("4", "16", "64"), map(int, result.stdout.split()[-3:]), strict=True))
    return " ".join(size for size in faults if faults[size] < 2)


@pytest.mark.slow
def test_compiled_training_keeps_freed_memory(shards, tmp_path):
    code = (
        "import train, training.trainer\nfrom common import device\n"
        "device.can_compile, training.trainer.compile_blocks = lambda _: True, lambda *_: None\n"  # pretends to compile
        "train.main()"
    )
    argv = [*TINY, "--data-dir", shards, "--max-steps", 1, "--val-every", 0, "--out-dir"]
    assert kept(code, *argv, tmp_path / "kept", "--compile") == ALL
    assert kept(code, *argv, tmp_path / "sparing", "--compile", "--activation-memory", 0.5) == SPARING
    assert kept(code, *argv, tmp_path / "eager") == GLIBC


@pytest.mark.slow
def test_malloc_settings_in_environment_win():
    code = "import torch; from common import device; device.set_malloc(torch.device('{}'))"
    assert kept(code.format("cpu")) == ALL and kept(code.format("cuda")) == GLIBC
    for name, value in (("MALLOC_MMAP_THRESHOLD_", "4194304"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=4194304")):
        assert kept(code.format("cpu"), **{name: value}) in ("", "4")


@pytest.mark.slow
def test_set_malloc_can_switch_to_sparing():
    code = "import torch; from common import device\nfor sparing in (False, True): device.set_malloc(torch.device('cpu'), sparing)"
    assert kept(code) == SPARING
