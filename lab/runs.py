"""The runs of one experiment: each a train.py in a folder of its own, all of the same code and data."""

import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, NamedTuple

import torch

import checkpoint
from common import cli
from common.shards import differences, find_shards
from training.config import TrainConfig
from training.flags import parse_flags, raise_if_changed, recorded_teacher
from training.run_json import RUN, code_now, other_code, read_run, read_run_json

# settings that change no result
MAY_DIFFER = {"verify_shards", "timeout_minutes", "tracker", "keep", "checkpoint_every", "on_save_error"}
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
        return "finished" if last_checkpoint(self.folder).get("step") == recorded.max_steps else "begun"


def last_checkpoint(folder: Path) -> dict:
    """Loads the newest checkpoint. Returns {} if there is none, or if it has no validation loss yet."""
    file = checkpoint.checkpoint_file(str(folder))
    content = checkpoint.load_torch(file) if file else {}
    return content if content.get("val_loss") is not None else {}


def run_all(runs: list[Run], workers: int, mixed: bool) -> list[str]:
    """Trains or resumes the runs that have not finished yet. ValueError if some are of other code or data, before and after it trains;
    with mixed, returns a note about each."""
    code, folders = code_now(), [run.folder for run in runs]
    missing, running, free = [run for run in runs if run.state() != "finished"], [], SimpleQueue()
    refuse_unless(mixed, code_notes(folders, code) + data_notes(folders))
    if stuck := data_notes([run.folder for run in missing]):
        raise ValueError(f"{shortened(stuck)}, so it can't resume: restore the data, or train all runs again in another --out-dir")
    for slot in range(workers):
        free.put(environment(workers, slot))
    pool = ThreadPoolExecutor(workers)
    cli.exit_on_stop_signals()
    try:
        done, name = pool.map(lambda run: train_one(run, running, free), missing), f"runs in {os.path.commonpath(folders)}"
        for _ in cli.bar(done, total=len(missing), desc=name, unit="run", disable=not missing):
            pass
    finally:  # on an error or a signal, start no more runs; the running ones save and exit
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()
        pool.shutdown()
    return refuse_unless(mixed, code_notes(folders, code) + data_notes(folders))  # someone may edit the code while the runs train


def train_one(run: Run, running: list[subprocess.Popen], free: SimpleQueue):
    """Trains or resumes one run in a free worker's environment. ValueError with train.py's last message if it fails."""
    argv, env = run.argv(resume=run.state() == "begun"), free.get()
    process = launch(argv, {"WANDB_RUN_GROUP": run.name} | env)  # trackers then show the seeds of a variant together
    running.append(process)
    messages = [line for line in process.communicate()[1].splitlines() if line.strip()] or ["no message"]
    running.remove(process)
    free.put(env)
    if process.returncode:
        raise ValueError(f"{run.name}: train.py {shlex.join(argv)} exited with {process.returncode}: {messages[-1]}")


def launch(argv: list[str], env: dict) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    return subprocess.Popen([sys.executable, SCRIPT, *argv], env=env, **pipes)


# ---- origins: code, data, machine ----


def code_notes(folders: list[Path], reference: dict) -> list[str]:
    """Names the runs in these folders that were made by other code than the reference, which code_now() or a launch is."""
    notes = []
    for folder in recorded(folders):
        launches = read_run_json(folder / RUN)["launches"]
        if why := next(filter(None, (other_code(launch, reference) for launch in launches)), ""):
            notes.append(f"{folder} was trained by other code ({why})")
    return notes


def data_notes(folders: list[Path]) -> list[str]:
    """Names the runs in these folders whose shards or --init-from have changed since, or whose shards differ from an earlier run's in
    the same --data-dir."""
    contents, weights, first, notes = cache(lambda data_dir: find_shards(data_dir).contents()), cache(checkpoint.fingerprint), {}, []
    for folder in recorded(folders):
        config, run = read_run(folder), read_run_json(folder / RUN)
        data_dir, data = config.data_dir, run["data"]
        if changed := differences(data, contents(data_dir)) or differences(data, first.setdefault(data_dir, data)):
            notes.append(f"{folder} was trained on other data than {data_dir} has now ({shortened(changed)})")
        if config.init_from and run.get("init") not in (None, weights(config.init_from, config.init_revision)):
            notes.append(f"{folder} started from other weights than {config.init_from} has now")
        if config.teacher and run.get("teacher_sha256") not in (None, weights(config.teacher)):
            notes.append(f"{folder} had another teacher than {config.teacher} is now")
    return notes


def recorded(folders: list[Path]) -> list[Path]:
    return [folder for folder in folders if (folder / RUN).exists()]


def refuse_unless(mixed: bool, notes: list[str]) -> list[str]:
    """Returns the notes. ValueError with them unless mixed."""
    if notes and not mixed:
        raise ValueError(f"{shortened(notes)}: train all runs again in another --out-dir, or pass --mixed to use these too")
    return notes


def shortened(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if items[3:] else "")


def machine_notes(folders: list[Path]) -> list[str]:
    """Names the devices, and the versions of torch, if the runs in these folders had several: their speeds can't be compared."""
    launches = [launch for folder in folders for launch in read_run_json(folder / RUN)["launches"]]
    notes = []
    for name in ("device", "torch"):
        found = sorted({str(launch.get(name)) for launch in launches})
        notes += [f"the runs had more than one {name}: {', '.join(found)}"] if found[1:] else []
    return notes


def environment(workers: int, slot: int) -> dict:
    """Returns the environment of a worker's run: its part of the cores, and one of the GPUs that this process may use."""
    env = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers))} | os.environ
    count = torch.cuda.device_count()
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = cards.split(",")[:count] if cards else [str(i) for i in range(count)]
    return env | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if workers > 1 and gpus else {})
