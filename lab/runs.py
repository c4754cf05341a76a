"""The runs of one experiment: each a train.py in a folder of its own, all of the same code and data."""

import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Literal, NamedTuple

import torch

import checkpoint
from common import cli
from common.files import read_json, write_json
from common.run_folder import MAY_DIFFER
from lab.origins import code_notes, data_notes, refuse_unless
from training.config import LOWER_LR, LOWER_MEMORY, SMALLER_MODEL, TrainConfig
from training.flags import holds_a_run, parse_flags, raise_if_changed, recorded_teachers
from training.run_json import RUN, code_now, is_finished, read_run

SCRIPT = Path(__file__).parent.parent / "train.py"
FAILED = "failed.json"  # in an idea's folder
KILLED = -9  # by SIGKILL, which Windows lacks: Linux ends the process that uses the most memory
SECONDS_TO_SAVE = 60  # after SIGTERM


class IdeaFailed(ValueError):
    """An idea's code, flags or settings are wrong. Another idea may still succeed."""

    def __init__(self, name: str, reason: str, message: str = ""):
        """message: the reason with its command or remedy."""
        super().__init__(message or f"{name}: {reason}")
        self.name, self.reason = name, reason


class OtherFlags(ValueError):
    """A folder has a run with other flags."""


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
        """Parses and checks the flags. IdeaFailed if one is unknown, or if the settings are invalid."""
        try:
            config = parse_flags(self.argv())
        except SystemExit as e:  # it has named the flag
            raise IdeaFailed(self.name, "train.py rejects its flags", f"{self.name}: train.py rejects its flags, correct them") from e
        if config.init_from:  # its weights decide the shape
            config = parse_flags(self.argv(), checkpoint.load_config(config.init_from, config.init_revision))
        try:
            config.validate(1)
            if config.plan or config.rehearse or config.replay_step is not None or "--resume" in self.flags:
                raise ValueError("--plan, --rehearse, --replay-step and --resume start no new run: leave them out")
        except ValueError as e:
            raise IdeaFailed(self.name, str(e)) from e
        return config

    def argv(self, resume: bool = False) -> list[str]:
        """Returns train.py's command line, to start the run or to resume it."""
        return [*(["--resume"] if resume else self.flags), "--out-dir", str(self.folder)]

    def state(self) -> Literal["new", "begun", "finished"]:
        """Says how far the run got. OtherFlags if its folder has a run with other flags. ValueError if it has lost its run.json."""
        if not (self.folder / RUN).exists():
            if holds_a_run(self.folder):
                raise ValueError(f"{self.folder} has files of a run, but no {RUN}: restore that, or delete the folder to train it again")
            return "new"
        wanted, recorded = self.config(), read_run(self.folder)
        # the shards and the hub decide these, not the flags
        wanted.model.vocab_size, wanted.init_revision = recorded.model.vocab_size, recorded.init_revision
        wanted.teacher = recorded_teachers(wanted.teacher, recorded.teacher)
        try:
            raise_if_changed(recorded, wanted, MAY_DIFFER | {"out_dir"}, str(self.folder))
        except ValueError as e:
            raise OtherFlags(f"{self.name}: {e}, or choose another --out-dir") from e
        return "finished" if is_finished(self.folder) else "begun"


def last_checkpoint(folder: Path) -> dict:
    """Loads the newest checkpoint. Returns {} if there is none, or if it has no validation loss yet."""
    file = checkpoint.checkpoint_file(str(folder))
    content = checkpoint.load_torch(file) if file else {}
    return content if content.get("val_loss") is not None else {}


# ---- ideas that failed ----


def remember_failure(run: Run, reason: str, code: dict):
    """Writes down why an idea failed, so that no later command tries it again."""
    folder = run.folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FAILED, {"reason": reason, "flags": run.flags, "code": code["code"]})


def earlier_failure(runs: list[Run], code: dict) -> str:
    """Returns why an earlier command found that an idea fails; "" if none did, or if its flags or its code have changed since."""
    path = runs[0].folder.parent / FAILED
    kept = read_json(path, "delete it to try the idea again") if path.exists() else {}
    same = kept.get("flags") in [run.flags for run in runs] and kept.get("code") == code["code"]
    return str(kept.get("reason")) if same else ""


# ---- train ----


class Trial(NamedTuple):
    """How run_all treats ideas. Without it, a run that fails ends everything."""

    failures: dict[str, str]  # name → reason; gets those of this call
    needed: str  # the name that must not fail
    proof: Path | None  # a run of the needed one: if it finished, but fails now, the machine is at fault
    max_minutes: float  # a run that takes longer has failed; 0: no limit


def run_all(runs: list[Run], workers: int, mixed: bool, trial: Trial | None = None) -> list[str]:
    """Trains or resumes the runs that have not finished yet. ValueError if some are of other code or data, before and after it trains;
    with mixed, returns a note about each. An idea that fails starts no more runs, and the others continue. ValueError if the machine is at
    fault, or if the needed one fails."""
    code, folders = code_now(), [run.folder for run in runs]
    missing = [run for run in runs if run.state() != "finished"]
    refuse_unless(mixed, code_notes(folders, code) + data_notes(folders))
    if stuck := data_notes([run.folder for run in missing]):
        raise ValueError(f"{cli.some(stuck, 3)}, so it can't resume: restore the data, or train all runs again in another --out-dir")
    pool, workshop = ThreadPoolExecutor(workers), Workshop(workers, code, trial)
    cli.exit_on_stop_signals()
    try:
        done, name = as_completed([pool.submit(workshop.attempt, run) for run in missing]), f"runs in {os.path.commonpath(folders)}"
        for future in cli.bar(done, total=len(missing), desc=name, unit="run", disable=not missing):
            future.result()
    finally:  # on an error or a signal, start no more runs; the running ones save and exit
        pool.shutdown(wait=False, cancel_futures=True)
        workshop.running.close()
        pool.shutdown()
    return refuse_unless(mixed, code_notes(folders, code) + data_notes(folders))  # someone may edit the code while the runs train


class Running:
    """The processes that train. After close(), each is ended, also one that starts a moment later: it saves and exits."""

    def __init__(self):
        self.processes, self.closed, self.lock = [], False, Lock()

    def add(self, process: subprocess.Popen):
        with self.lock:
            self.processes.append(process)
            if self.closed:
                process.terminate()

    def remove(self, process: subprocess.Popen):
        with self.lock:
            self.processes.remove(process)

    def close(self):
        with self.lock:
            for process in self.processes if not self.closed else ():  # a second signal would end it without a save
                process.terminate()
            self.closed = True


class Workshop:
    """What the threads that train share."""

    def __init__(self, workers: int, code: dict, trial: Trial | None):
        self.code, self.trial, self.running = code, trial, Running()
        self.free = SimpleQueue()  # an environment for each worker
        for slot in range(workers):
            self.free.put(environment(workers, slot))

    def attempt(self, run: Run):
        """Trains a run, unless its idea has failed. Remembers if it fails."""
        trial = self.trial
        if self.running.closed or (trial and run.name in trial.failures):
            return
        env = self.free.get()
        try:
            train_one(run, self.running, env, trial)
        except Exception as e:
            if not (isinstance(e, IdeaFailed) and trial and run.name != trial.needed):
                self.running.close()  # before another worker begins a run
                raise
            trial.failures[run.name] = e.reason
            remember_failure(run, e.reason, self.code)
        finally:
            self.free.put(env)


def train_one(run: Run, running: Running, env: dict, trial: Trial | None):
    """Trains or resumes one run. ValueError with train.py's last message if it fails: IdeaFailed if the run is to blame, or takes too
    long."""
    argv = run.argv(resume=run.state() == "begun")
    env = {"WANDB_RUN_GROUP": run.name} | env  # trackers then show the seeds of a variant together
    minutes = trial.max_minutes if trial else 0
    try:
        status, _, errors = run_to_end(argv, running, env, minutes)
    except subprocess.TimeoutExpired:
        raise IdeaFailed(run.name, f"seed {run.seed} took longer than {minutes:g} minutes") from None
    if not status:
        return
    why = why_it_failed(status, errors)
    message = f"{run.name}: train.py {shlex.join(argv)} exited with {status}: {why}"
    if not is_to_blame(status, errors):
        raise ValueError(message)
    if trial and status != 2 and (fault := fault_of_machine(trial, running, env)):
        raise ValueError(f"{message}. {trial.needed} fails now too ({fault}): mend the machine, then run this command again")
    raise IdeaFailed(run.name, f"seed {run.seed}: {why.removeprefix('error: ')}", message)


def run_to_end(argv: list[str], running: Running, env: dict, minutes: float = 0) -> tuple[int, str, str]:
    """Runs train.py. Returns its exit status, stdout and stderr. TimeoutExpired if it takes longer than minutes: it saves then, unless it
    hangs."""
    process = launch(argv, env)
    running.add(process)
    try:
        output, errors = process.communicate(timeout=60 * minutes or None)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.communicate(timeout=SECONDS_TO_SAVE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        raise
    finally:
        running.remove(process)
    return process.returncode, output, errors


def fault_of_machine(trial: Trial, running: Running, env: dict) -> str:
    """Computes the first step of the proof, which changes nothing on disk. Returns why that fails; "" if it works, or if there is no
    proof yet."""
    if not (trial.proof and (trial.proof / RUN).exists() and is_finished(trial.proof)):
        return ""
    status, output, errors = run_to_end(["--replay-step", "0", "--out-dir", str(trial.proof)], running, env)
    works = status == 0 or "in the log: " in output  # other hardware gives other bits
    return "" if works else why_it_failed(status, errors)


def why_it_failed(status: int, output: str) -> str:
    """Returns the last message of a run that failed."""
    if status == KILLED:
        return "killed, probably because memory ran out"
    lines = output.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])


def settings_to_blame(status: int, output: str) -> bool:
    """Whether a run diverged or needed too much memory."""
    return status == KILLED or any(x in why_it_failed(status, output) for x in (LOWER_LR, LOWER_MEMORY, SMALLER_MODEL))


def is_to_blame(status: int, output: str) -> bool:
    """Whether a run's own code or settings made it fail, rather than the machine or someone who stopped it."""
    crashed = status == 1 and "Traceback (most recent call last)" in output
    refused = status == 2 and not any(remedy in why_it_failed(status, output) for remedy in (cli.WAIT, cli.CHECK_NETWORK))
    return crashed or refused or status in (-signal.SIGSEGV, -signal.SIGABRT) or settings_to_blame(status, output)


def share_hardware(workers: int) -> bool:
    """Whether this many runs slow each other."""
    return workers > max(1, torch.cuda.device_count())


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
