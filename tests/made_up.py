"""Made-up runs, which no one trained, in place of train.py: for the tests of lab.compare and lab.search."""

import json
import math
import random
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from conftest import TINY, run_main, save_checkpoint

from common.files import write_json
from common.shards import find_shards
from lab import compare, runs, search
from training.flags import parse_flags
from training.run_json import RUN, code_now
from variants import build

code_once = cache(code_now)  # it takes a second
CRASH = (1, "Traceback (most recent call last):\n  …\nKeyError: 'x'")


def noise(name: str, seed: int) -> float:
    return random.Random(f"{name} {seed}").gauss(0, 0.01)


def made_up(folder: Path, shards: Path, seed: int, loss: float, flags: tuple[str, ...] = (), step: int | None = None) -> Path:
    """Writes what a finished run of these flags leaves, with this validation loss."""
    config = parse_flags([*TINY, "--n-layer", "1", "--n-embd", "8", "--data-dir", str(shards), "--seed", str(seed), *flags])
    config.out_dir = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, step or config.max_steps, build(replace(config.model, vocab_size=257)), "bytes", loss, {"seconds": 2.0})
    launch = {"step": 0, "config": asdict(config), **code_once(), "device": "cpu", "torch": "2", "world_size": 8, "token": "t"}
    run = {"id": "i", "size": "none", "data": find_shards(shards).contents(), "config": asdict(config), "launches": [launch]}
    write_json(folder / RUN, run)
    axes = {"tokens": config.max_steps * config.total_batch_tokens, "seconds": 2.0}
    loss = loss if math.isfinite(loss) else None  # as train.py writes it
    lines = [{"step": config.max_steps - 1, "loss": loss, "tokens_per_second": 100.0, "memory_bytes": 10**6, **axes}]
    lines += [{"step": step, "val_loss": loss and loss + 20 - step, **axes, "tokens": 256 * step} for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def loss_of(name: str, seed: int, argv: Sequence[str] = ()) -> float:
    """better is 0.05 better than the first in each seed, apart from some noise; even is not."""
    return 2.0 + 0.1 * seed - 0.05 * (name == "better") + noise(name, seed) * (name != "plain")


class World:
    """Calls lab.compare and lab.search. Runs are made up when they would start; started lists them."""

    def __init__(self, shards: Path, monkeypatch, capsys):
        self.shards, self.capsys, self.started, self.replayed = shards, capsys, [], []
        self.loss = loss_of  # (name, seed, argv) → a run's loss
        self.failing = {}  # part of a run's path, such as "mlp" or "larger/mlp/2" → exit status and stderr
        self.replay = (0, "")  # what train.py --replay-step does: exit status and stderr
        monkeypatch.setattr(compare, "draw_or_warn", lambda *args: None)
        monkeypatch.setattr(runs, "environment", lambda workers, slot: {})
        for module in (runs, compare):
            monkeypatch.setattr(module, "code_now", code_once)
        monkeypatch.setattr(runs, "launch", self.launch)

    def launch(self, argv: list[str], env: dict) -> "Process":
        folder = Path(argv[argv.index("--out-dir") + 1])
        name, seed = folder.parent.name, int(folder.name)
        if "--replay-step" in argv:
            self.replayed.append((name, seed))
            return Process(*self.replay)
        self.started.append((name, seed))
        status, output = next((how for part, how in self.failing.items() if f"/{part}/" in f"/{folder}/"), (0, ""))
        if not status:
            made_up(folder, self.shards, seed, self.loss(name, seed, argv), tuple(argv))
        return Process(status, output)

    def variant(self, name: str, seeds=(1, 2, 3, 4, 5), flags: tuple[str, ...] = ()) -> str:
        for seed in seeds:
            made_up(Path(name, str(seed)), self.shards, seed, loss_of(Path(name).name, seed), flags)
        return name

    def judge(self, *argv) -> dict:
        assert run_main(compare.main, *argv, "--json") == 0
        return json.loads(self.capsys.readouterr().out)

    def error(self, *argv) -> str:
        self.capsys.readouterr()
        assert run_main(compare.main, *argv) in (2, 3)
        (line,) = (line for line in self.capsys.readouterr().err.splitlines() if line.startswith("error:"))
        return line

    def search(self, *argv, ideas: str) -> tuple[int, str, str]:
        """Returns lab.search's exit status, stdout and stderr."""
        Path("ideas.txt").write_text(ideas)
        status = run_main(search.main, "ideas.txt", self.flags(), "--seeds", 5, *argv)
        return status, *self.capsys.readouterr()

    def flags(self) -> str:
        return "--flags=" + " ".join([*TINY, "--n-layer", "1", "--n-embd", "8", "--data-dir", str(self.shards)])


class Process:
    """A finished process with the interface of subprocess.Popen."""

    def __init__(self, status: int, output: str):
        self.returncode, self.output = status, output

    def communicate(self, timeout=None):
        if self.returncode == 99:
            self.returncode = -15
            raise subprocess.TimeoutExpired("train.py", timeout)
        return "", self.output

    def terminate(self):
        pass
