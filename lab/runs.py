"""The runs of one experiment: each a train.py in a folder of its own, all of the same code and data."""

import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, NamedTuple

import torch

import checkpoint
from common import cli
from lab.origins import MAY_DIFFER, code_notes, data_notes, refuse_unless, shortened
from training.config import LOWER_LR, LOWER_MEMORY, SMALLER_MODEL, TrainConfig
from training.flags import parse_flags, raise_if_changed, recorded_teacher
from training.run_json import RUN, code_now, is_finished, read_run

SCRIPT = Path(__file__).parent.parent / "train.py"


def split(flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as e:
        raise ValueError(f"{e}: check the quotes and backslashes in the flags") from e


def folder_of(out_dir: str, name: str, seed: int) -> Path:
    return Path(out_dir, re.sub(r"[^\w.-]|^\.", "_", name), str(seed))


class Run(NamedTuple):
    """A run of train.py in a folder of its own."""

    name: str
    flags: list[str]
    folder: Path

    @property
    def seed(self) -> str:
        return self.folder.name

    def config(self) -> TrainConfig:
        """Parses and checks the flags. Exits 2 on an unknown flag. ValueError names the variant if its settings are invalid."""
        try:
            config = parse_flags(self.argv())
        except SystemExit:
            cli.say(f"error: train.py rejects the flags of {self.name!r}: correct them")
            raise
        if config.init_from:  # its weights decide the shape
            config = parse_flags(self.argv(), checkpoint.load_config(config.init_from, config.init_revision))
        try:
            config.validate(1)
            if config.plan or config.replay_step is not None or "--resume" in self.flags:
                raise ValueError("--plan, --replay-step and --resume start no new run: leave them out")
        except ValueError as e:
            raise ValueError(f"{self.name}: {e}") from e
        return config

    def argv(self, resume: bool = False) -> list[str]:
        """Returns train.py's command line, to start the run or to resume it."""
        return [*(["--resume"] if resume else self.flags), "--out-dir", str(self.folder)]

    def state(self) -> Literal["new", "begun", "finished"]:
        """Says how far the run got. ValueError if its folder has a run with other flags."""
        if not (self.folder / RUN).exists():
            return "new"
        wanted, recorded = self.config(), read_run(self.folder)
        # the shards and the hub decide these, not the flags
        wanted.model.vocab_size, wanted.init_revision = recorded.model.vocab_size, recorded.init_revision
        wanted.teacher = recorded_teacher(wanted.teacher, recorded.teacher)
        try:
            raise_if_changed(recorded, wanted, MAY_DIFFER, str(self.folder))
        except ValueError as e:
            raise ValueError(f"{self.name}: {e}, or choose another --out-dir") from e
        return "finished" if is_finished(self.folder) else "begun"


def last_checkpoint(folder: Path) -> dict:
    """Loads the newest checkpoint. Returns {} if there is none, or if it has no validation loss yet."""
    file = checkpoint.checkpoint_file(str(folder))
    content = checkpoint.load_torch(file) if file else {}
    return content if content.get("val_loss") is not None else {}


class IdeaFailed(ValueError):
    """A run failed because of its code or its settings. Another idea may still succeed."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason  # without the command


def run_all(
    runs: list[Run], workers: int, mixed: bool, failures: dict[str, str] | None = None, needed: str = "", max_minutes: float = 0
) -> list[str]:
    """Trains or resumes the runs that have not finished yet. ValueError if some are of other code or data, before and after it trains;
    with mixed, returns a note about each. failures: gets name → reason of each idea that failed, except of the needed one; such an idea
    starts no more runs. Without it, and if the machine is at fault, any failure is a ValueError."""
    code, folders = code_now(), [run.folder for run in runs]
    missing, running, free = [run for run in runs if run.state() != "finished"], [], SimpleQueue()
    refuse_unless(mixed, code_notes(folders, code) + data_notes(folders))
    if stuck := data_notes([run.folder for run in missing]):
        raise ValueError(f"{shortened(stuck)}, so it can't resume: restore the data, or train all runs again in another --out-dir")
    for slot in range(workers):
        free.put(environment(workers, slot))

    def attempt(run: Run):
        try:
            if failures is None or run.name not in failures:
                train_one(run, running, free, max_minutes)
        except IdeaFailed as e:
            if failures is None or run.name == needed:
                raise
            failures[run.name] = e.reason

    pool = ThreadPoolExecutor(workers)
    cli.exit_on_stop_signals()
    try:
        done, name = pool.map(attempt, missing), f"runs in {os.path.commonpath(folders)}"
        for _ in cli.bar(done, total=len(missing), desc=name, unit="run", disable=not missing):
            pass
    finally:  # on an error or a signal, start no more runs; the running ones save and exit
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()
        pool.shutdown()
    return refuse_unless(mixed, code_notes(folders, code) + data_notes(folders))  # someone may edit the code while the runs train


def train_one(run: Run, running: list[subprocess.Popen], free: SimpleQueue, max_minutes: float):
    """Trains or resumes one run in a free worker's environment. ValueError with train.py's last message if it fails: IdeaFailed if the
    run is to blame, or takes longer than max_minutes (0: no limit)."""
    argv, env = run.argv(resume=run.state() == "begun"), free.get()
    process = launch(argv, {"WANDB_RUN_GROUP": run.name} | env)  # trackers then show the seeds of a variant together
    running.append(process)
    try:
        output = process.communicate(timeout=60 * max_minutes or None)[1]
    except subprocess.TimeoutExpired:
        process.terminate()  # it saves and exits
        process.communicate()
        reason = f"seed {run.seed} took longer than {max_minutes:g} minutes"
        raise IdeaFailed(f"{run.name}: {reason}", reason) from None
    finally:
        running.remove(process)
        free.put(env)
    if process.returncode:
        why, _ = why_it_failed(process.returncode, output)
        message = f"{run.name}: train.py {shlex.join(argv)} exited with {process.returncode}: {why}"
        if is_to_blame(process.returncode, output):
            raise IdeaFailed(message, f"seed {run.seed}: {why.removeprefix('error: ')}")
        raise ValueError(message)


def why_it_failed(status: int, output: str) -> tuple[str, bool]:
    """Returns why a run failed, and whether its settings are to blame: it diverged, or memory ran out."""
    lines = output.strip().splitlines() or ["no message"]
    if status == -9:  # SIGKILL: Linux ends the process that uses the most memory
        return "killed, probably because memory ran out", True
    why = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    return why, any(remedy in why for remedy in (LOWER_LR, LOWER_MEMORY, SMALLER_MODEL))


def is_to_blame(status: int, output: str) -> bool:
    """Whether a run's own code or settings made it fail, rather than the machine or someone who stopped it."""
    crashed = status == 1 and "Traceback (most recent call last)" in output
    return crashed or status in (2, -signal.SIGSEGV, -signal.SIGABRT) or why_it_failed(status, output)[1]


def launch(argv: list[str], env: dict) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    return subprocess.Popen([sys.executable, SCRIPT, *argv], env=env, **pipes)


def environment(workers: int, slot: int) -> dict:
    """Returns the environment of a worker's run: its part of the cores, and one of the GPUs that this process may use."""
    env = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers))} | os.environ
    count = torch.cuda.device_count()
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = cards.split(",")[:count] if cards else [str(i) for i in range(count)]
    return env | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if workers > 1 and gpus else {})
