"""Shared by the tests: tiny shards, flags of a tiny model, and ways to run the scripts as a user does."""

import importlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import train
from common.files import read_json, write_json
from common.run_folder import RunFolder
from common.shards import write_shard
from common.tokenizer import get_tokenizer
from training.run_json import hashes_of_code
from variants import VariantConfig

REPO = Path(__file__).parent.parent
THOROUGH = bool(os.environ.get("THOROUGH"))  # more cases in some slow tests than CI has time for

if hasattr(signal, "SIGHUP"):  # under nohup, all of our processes would ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# a model of 35k parameters that sees 256 tokens a step
TINY = (
    "--n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --total-batch-tokens 256 --micro-batch-size 4 --max-lr 3e-3 --warmup-steps 3 "
    "--max-steps 20 --val-every 10 --val-tokens 640 --hellaswag-every 0 --sample-every 0 --checkpoint-every 0 "
    "--device cpu --dtype fp32 --no-compile"
).split()


def pytest_addoption(parser):
    parser.addoption("--renew-golden", action="store_true", help="write new losses for test_golden_run")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Runs the tests in two processes, if pytest-xdist is installed and -n is not given. Most of the time is waiting. A file's tests stay
    together, because they share runs. The GPU's tests share one process, as they share its memory."""
    option = config.option
    if getattr(option, "numprocesses", 0) is None and not hasattr(config, "workerinput") and option.markexpr != "gpu":
        option.numprocesses = 2
        option.dist = "loadfile" if option.dist == "no" else option.dist


def covered(figure) -> list[str]:
    """Names what a figure's legends cover or lose: panels with their labels, or the figure's edge."""
    figure.draw_without_rendering()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    found = []
    for box in [legend.get_window_extent() for legend in legends]:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        found += [] if inside else [f"a legend leaves the figure: {box}"]
        for axes in figure.axes:
            parts = filter(None, [axes.get_window_extent(), axes.xaxis.get_tightbbox(), axes.yaxis.get_tightbbox()])
            found += [f"a legend covers {axes.get_title(loc='left')}"] * any(part.overlaps(box) for part in parts)
    return found


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written, the latest last."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    return figures


@pytest.fixture(scope="session", autouse=True)
def one_thread_from_the_start():
    """For fixtures of modules, such as runs that tests compare theirs with: they come before one_thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Runs PyTorch on one thread. That is faster for tiny matrices, and a fixed order of sums makes runs equal bit for bit."""
    torch.set_num_threads(1)


def write_shards(folder: Path, sizes: list[int], seed: int = 0) -> Path:
    """Writes shards of the given sizes, the first for val. They hold text-like bytes, so that a model has something to learn."""
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


@pytest.fixture
def world(shards, tmp_path, monkeypatch, capsys):
    """Calls lab.compare and lab.search in an empty folder, without pictures, on made-up runs: see made_up.World."""
    from made_up import World  # it needs SciPy and more

    monkeypatch.chdir(tmp_path)
    return World(shards, monkeypatch, capsys)


def make_tasks(n: int) -> list[dict]:
    """Tasks of random words in HellaSwag's layout. Some have WikiHow's markup, extra spaces or an empty ctx_b."""
    generator = random.Random(0)
    words = "the a man woman she He runs [title] jumps [substeps] over café dog's and then, (slowly) into  water.".split(" ")

    def sentence(n):
        return " ".join(generator.choices(words, k=n))

    tasks = []
    for i in range(n):
        a, b = sentence(generator.randrange(3, 12)), sentence(generator.randrange(0, 4))
        endings = [sentence(generator.randrange(2, 9)) + generator.choice(["", ".", " "]) for _ in range(4)]
        task = {"ind": i, "activity_label": sentence(2), "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}".strip(), "endings": endings}
        tasks.append(task | {"label": generator.randrange(4), "split": "val", "split_type": "indomain", "source_id": "x"})
    return tasks


def ids_for(config: VariantConfig, batch: int = 3, length: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (batch, length or config.seq_len), generator=generator)


def save_checkpoint(folder: Path, step: int, model, tokenizer: str, val_loss: float | None, state: dict) -> Path:
    """Writes a checkpoint and returns its model file's path."""
    checkpoint.write_checkpoint(RunFolder(folder), step, checkpoint.content_of(step, model, tokenizer, val_loss), state)
    return checkpoint.files_of(folder, step).model


class Trap:
    """Creates a file 'fired' when it is unpickled."""

    def __reduce__(self):
        return (open, ("fired", "w"))


def trace_only():
    """Makes torch.compile trace without compiling C++."""
    compile = torch.compile
    torch.compile = lambda f, **how: compile(f, backend="aot_eager", **how)


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


def rewrite_run(folder: Path, change: Callable[[dict], None]):
    """Changes each launch in a run's run.json."""
    run = read_json(folder / "run.json", "")
    for launch in run["launches"]:
        change(launch)
    write_json(folder / "run.json", run)


def script(*argv, processes: int = 0, timeout: float = 120, **env) -> subprocess.CompletedProcess:
    """Runs a script as a user does, under torchrun if processes is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    is_module = str(argv[0]).startswith("lab.")
    command = [sys.executable, *launcher, *(["-m", argv[0]] if is_module else [str(REPO / str(argv[0]))]), *map(str, argv[1:])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **{key: str(value) for key, value in env.items()}}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=REPO if is_module else None)


def seconds_of(*argv) -> float:
    """Seconds that Python takes with these arguments. It must succeed."""
    began = time.monotonic()
    subprocess.run([sys.executable, *map(str, argv)], capture_output=True, check=True, cwd=REPO)
    return time.monotonic() - began


# ---- processes that start in milliseconds: forked from a server that has loaded PyTorch ----

FORKS = multiprocessing.get_context("forkserver")
hashes_of_code()  # takes half a second, and each fork inherits what it keeps


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    FORKS.set_forkserver_preload(["conftest", "torch._dynamo", "torch.distributed.fsdp", "matplotlib.pyplot"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), str(REPO / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()


def in_fork(name: str, argv: list[str], env: dict[str, str], outputs: tuple[Path, Path], first: Callable | None):
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    os.environ.update(env)
    sys.argv = [name, *argv]
    if first:
        first()
    importlib.import_module(name).main()


class Forked:
    """A running script, in one process or in as many as torchrun would start. Nothing watches them as torchrun does."""

    def __init__(self, folder: Path, name: str, *argv, processes: int = 0, first: Callable | None = None, **env):
        """folder: for the output. first: called in each process before the script's main."""
        self.outputs = [(folder / f"{name}_{rank}.out", folder / f"{name}_{rank}.err") for rank in range(processes or 1)]
        for path in sum(self.outputs, ()):
            path.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank, outputs in enumerate(self.outputs):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = {key: str(value) for key, value in {**(world if processes else {}), **env}.items()}
            self.processes.append(FORKS.Process(target=in_fork, args=(name, [*map(str, argv)], variables, outputs, first)))
            self.processes[-1].start()

    def wait(self, timeout: float = 60) -> subprocess.CompletedProcess:
        """Waits for all ranks. Returns the exit status of the first that failed, rank 0's stdout and everyone's stderr."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(deadline - time.monotonic())
        late = [process.kill() for process in self.processes if process.exitcode is None]
        out, err = self.outputs[0][0].read_text(), "".join(err.read_text() for _, err in self.outputs)
        assert not late, f"still running after {timeout} s: {err}"
        status = next((process.exitcode for process in self.processes if process.exitcode), 0)
        return subprocess.CompletedProcess([], status, out, err)


def forked(folder: Path, name: str, *argv, timeout: float = 60, **how) -> subprocess.CompletedProcess:
    return Forked(folder, name, *argv, **how).wait(timeout)


class Finished:
    """forked's result with the interface of subprocess.Popen, in place of runs.launch's."""

    def __init__(self, result):
        self.returncode, self.communicate = result.returncode, lambda timeout=None: ("", result.stderr)


def kill_after(seconds: float):
    """Sends SIGKILL to this process after some seconds."""

    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def kill_at_write(folder: Path, number: int, delay: float = 0.0):
    """Counts this process's writes below folder: files opened to write, renamed or deleted. Sends SIGKILL `delay` seconds after number
    `number`. A timer alone could miss the writes of a fast machine."""
    count = 0

    def hook(event, args):
        nonlocal count
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(str(folder)):
            count += 1
            if count == number:
                kill_after(delay) if delay else os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def read_stream(out_dir: Path, stream: str) -> dict[int, str]:
    """Step → value, as written in log.txt. If a step has two lines, the later one wins."""
    lines = [line.split() for line in (out_dir / "log.txt").read_text().splitlines()]
    return {int(step): value for step, name, value in lines if name == stream}


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    try:
        return get_tokenizer("gpt2")
    except ValueError as e:
        pytest.skip(str(e))
