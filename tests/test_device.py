"""What malloc does with a block that is freed, seen by the page faults of asking for another one."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import REPO, TINY
from test_hellaswag import make_tasks

from model import GPT, GPTConfig

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


def main_of(name: str) -> str:
    return f"import {name}; {name}.main()"


def test_freed_memory_stays_with_training_unless_memory_is_short(shards, tmp_path):
    argv = [*TINY, "--data-dir", shards, "--max-steps", 1, "--val-every", 0, "--checkpoint-every", 0]
    assert is_kept(main_of("train"), *argv, "--out-dir", tmp_path / "kept")
    assert not is_kept(main_of("train"), *argv, "--out-dir", tmp_path / "sparing", "--activation-memory", 0)


def test_freed_memory_stays_with_scoring(tmp_path):
    torch.manual_seed(0)
    GPT(GPTConfig(257, 64, 2, 2, 32)).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("some text")
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in make_tasks(4)))
    assert is_kept(main_of("hellaswag"), "-m", tmp_path / "model", "-d", "cpu", "--file", tmp_path / "tasks.jsonl")
    assert is_kept(main_of("perplexity"), tmp_path / "text", "-m", tmp_path / "model", "-d", "cpu")


def test_what_the_environment_says_to_malloc_stands():
    code = "import torch, device; device.set_malloc(torch.device('{}'))"
    assert is_kept(code.format("cpu")) and not is_kept(code.format("cuda"))
    assert not is_kept(code.format("cpu"), MALLOC_MMAP_THRESHOLD_="4194304")
    assert not is_kept(code.format("cpu"), GLIBC_TUNABLES="glibc.malloc.mmap_threshold=4194304")
