"""run.json: a run's settings, its data, and the hardware and software of each launch."""

import os
import platform
import re
import secrets
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import plot_log
from common import device
from common.distributed import DistContext
from common.files import read_json, write_json
from training.config import TrainConfig
from training.trainer import Trainer
from variants import VariantConfig

RUN = "run.json"
RUN_REMEDY = "restore it from a copy, or choose another --out-dir"


def read_run(out_dir: Path, step: int | None = None) -> TrainConfig:
    """Reads the settings of the run in a folder: those of its last launch, or of the last launch that did this step."""
    path = out_dir / RUN
    if not path.exists():
        raise ValueError(f"there is no run in {out_dir}; check --out-dir, or start one without --resume")
    run = read_json(path, RUN_REMEDY)
    try:
        settings = run["config"] if step is None else last_launch(run, step)["config"]
        if not isinstance(run["data"], dict) or not isinstance(run["launches"], list):
            raise TypeError("data or launches")
        return TrainConfig(**settings | {"model": VariantConfig(**settings["model"])})
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path} was written by another version of train.py ({e}): resume with that one") from e


def last_launch(run: dict, step: int | None) -> dict:
    """Returns run.json's last launch, or the last one that did this step; {} if there is none."""
    launches = run.get("launches")
    launches = [launch for launch in launches if isinstance(launch, dict)] if isinstance(launches, list) else []
    return ([launch for launch in launches if step is None or launch.get("step", 0) <= step] or [{}])[-1]


def record_launch(config: TrainConfig, world: DistContext, trainer: Trainer, step: int, torchruns: list[str]) -> str:
    """Adds this launch to run.json, with its settings, hardware and software. Returns the run's id."""
    path = Path(config.out_dir, RUN)
    size = plot_log.size_of(trainer.model.num_params()) if trainer.shards.tokenizer == "gpt2" else "none"
    before = {"id": secrets.token_hex(4), "size": size, "data": trainer.shards.contents(), "launches": []}
    if path.exists():
        before |= read_json(path, RUN_REMEDY)
    settings = asdict(config) | {"resume": False, "replay_step": None}
    launch = {
        "step": step,
        "config": settings,
        "command": sys.argv,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.describe(world.device),
        "compiled": trainer.compiled,
        "world_size": world.size,
        "torchrun": torchruns,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, before | {"config": settings, "launches": [*before["launches"], launch]})
    return before["id"]


def git_commit() -> str:
    """Returns the commit of this code, with a '+' if files differ from it; '' without git."""

    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).parent.parent), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def is_restart(out_dir: Path) -> bool:
    """Whether torchrun restarts this process, in a run that the same torchrun started. We don't use torchrun's own count of restarts:
    it misses a restart after a host came back."""
    if torchrun_id() == "" or not (out_dir / RUN).exists():
        return False
    return torchrun_id() in last_launch(read_json(out_dir / RUN, RUN_REMEDY), None).get("torchrun", [])


def torchrun_id() -> str:
    """Identifies this torchrun, the same after its restarts: host and torchrun's temporary folder. '' without torchrun."""
    folder = re.fullmatch(r"(.+)[/\\]attempt_\d+[/\\]\d+[/\\]error\.json", os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return f"{platform.node()} {folder[1]}" if folder else ""  # another path is another launcher's leftover
