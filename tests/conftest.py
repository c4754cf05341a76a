"""What the tests share: tiny shards, a tiny model's flags, and ways to run the scripts as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from dataloader import write_shard
from files import write_json
from fineweb import get_tokenizer

REPO = Path(__file__).parent.parent

# a model of 35k parameters that sees 256 tokens a step
TINY = (
    "--n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --total-batch-tokens 256 --micro-batch-size 4 --max-lr 3e-3 --warmup-steps 3 "
    "--max-steps 20 --val-every 10 --val-tokens 640 --hellaswag-every 0 --sample-every 0 --checkpoint-every 0 "
    "--device cpu --dtype fp32 --no-compile"
).split()


@pytest.fixture(autouse=True)
def one_thread():
    """Two tiny matrices are slower on two threads, and a fixed order of summation makes runs comparable bit for bit."""
    torch.set_num_threads(1)


def write_shards(folder: Path, sizes: list[int], seed: int = 0) -> Path:
    """Shards of the given sizes, the first for val: text-like bytes, so that a model has something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (b"the cat sat on the mat and saw a dog; " * 50 + bytes(range(97, 123))) * 20
    rng = np.random.default_rng(seed)
    entries = []
    for index, size in enumerate(sizes):
        start = rng.integers(len(text) - 1)
        row = np.resize(np.frombuffer(text[start:] + text[:start], np.uint8), size).astype(np.uint16)
        row[rng.integers(0, size, size // 10)] = rng.integers(0, 257, size // 10)
        entries.append(write_shard(folder / f"tiny_{'train' if index else 'val'}_{index:06d}.npy", row))
    write_json(folder / "manifest.json", {"tokenizer": "bytes", "vocab_size": 257, "shards": entries})
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A val shard and three ragged train shards, one of them shorter than a sequence."""
    return write_shards(tmp_path_factory.mktemp("shards"), [1000, 5003, 17, 3001])


def run_main(main, *argv) -> int:
    """Calls a script's main in this process with a command line. Returns its exit status."""
    before, sys.argv = sys.argv, ["script", *map(str, argv)]
    try:
        main()
    except SystemExit as e:
        return e.code or 0
    finally:
        sys.argv = before
    return 0


def run_train(shards: Path, out_dir: Path, *argv) -> int:
    return run_main(train.main, *TINY, "--data-dir", shards, "--out-dir", out_dir, *argv)


def script(*argv, processes: int = 0, timeout: float = 120, **env) -> subprocess.CompletedProcess:
    """Runs a script as a user does, under torchrun when processes is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *launcher, str(REPO / str(argv[0])), *map(str, argv[1:])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **{key: str(value) for key, value in env.items()}}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


def read_stream(out_dir: Path, stream: str) -> dict[int, str]:
    """Step → value as it stands in log.txt; of two lines of a step the later."""
    lines = [line.split() for line in (out_dir / "log.txt").read_text().splitlines()]
    return {int(step): value for step, name, value in lines if name == stream}


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    try:
        return get_tokenizer("gpt2")
    except ValueError as e:
        pytest.skip(str(e))
