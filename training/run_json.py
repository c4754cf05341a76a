"""run.json: a run's settings, its data, and the hardware and software of each launch."""

import ast
import hashlib
import os
import platform
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

import checkpoint
import plot_log
from common import device
from common.distributed import DistContext
from common.files import read_json
from common.run_folder import RUN, RunFolder
from common.validation import from_dict, has_type
from training.budget import ended_by, seconds_in
from training.config import TrainConfig
from training.trainer import Trainer
from variants import VariantConfig

RUN_REMEDY = "restore it from a copy, or choose another --out-dir"


def read_run(out_dir: Path, step: int | None = None) -> TrainConfig:
    """Reads the settings of the run in a folder: those of its last launch, or of the last launch that did this step."""
    path = out_dir / RUN
    if not path.exists():
        raise ValueError(f"there is no run in {out_dir}; check --out-dir, or start one without --resume")
    run = read_run_json(path)
    launch = run if step is None else last_launch(run, step)
    if "config" not in launch:
        raise ValueError(f"{path} has no launch that did step {step}: {RUN_REMEDY}")
    settings = launch["config"]
    return from_dict(TrainConfig, settings | {"model": from_dict(VariantConfig, settings["model"], path)}, path)


def is_finished(out_dir: Path) -> bool:
    """Whether the run in a folder has ended by its --max-steps or --max-seconds, and its newest complete checkpoint was validated.
    ValueError if there is no run, or if it has checkpoints but no complete one."""
    config, file = read_run(out_dir), checkpoint.checkpoint_file(str(out_dir))
    content = checkpoint.load_torch(file) if file else {}
    if content.get("val_loss") is None:
        return False
    step, seconds = content["step"], 0.0
    if config.max_seconds:
        seconds = seconds_in(checkpoint.load_torch(checkpoint.files_of(out_dir, step).state))
    return ended_by(config, step, seconds) != []


def read_run_json(path: Path) -> dict:
    """Reads a run.json, and checks the types of everything that some script reads from it. ValueError if it is damaged."""
    run = read_json(path, RUN_REMEDY)

    def is_config(value) -> bool:
        return isinstance(value, dict) and isinstance(value.get("model"), dict)

    def is_data(value) -> bool:
        entries = value.values() if isinstance(value, dict) else [None]
        return all(isinstance(e, list) and len(e) == 2 and has_type(e[0], int) and has_type(e[1], str | None) for e in entries)

    def is_launch(value) -> bool:
        """Older launches lack some of these, and had one torchrun."""
        kinds = {"step": int, "torchrun": list | str, "device": str, "world_size": int, "token": str, "code": dict}
        known = isinstance(value, dict) and all(has_type(value[name], kind) for name, kind in kinds.items() if name in value)
        return known and ("config" not in value or is_config(value["config"])) and value.get("world_size", 1) >= 1

    checks = {"config": is_config, "data": is_data, "launches": lambda value: isinstance(value, list) and all(map(is_launch, value))}
    wrong = [name for name, holds in checks.items() if not holds(run.get(name))]
    wrong += [name for name in ("id", "size", "teacher_sha256", "init") if not has_type(run.get(name, ""), str)]
    if wrong:
        raise ValueError(f"{path} is damaged, or was written by another version of train.py (see its {', '.join(wrong)}): {RUN_REMEDY}")
    return run


def last_launch(run: dict, step: int | None) -> dict:
    """Returns run.json's last launch, or the last one that did this step; {} if there is none."""
    return ([launch for launch in run["launches"] if step is None or launch.get("step", 0) <= step] or [{}])[-1]


def record_launch(config: TrainConfig, world: DistContext, trainer: Trainer, folder: RunFolder, step: int, torchruns: list[str]) -> str:
    """Adds this launch to run.json, with its settings, hardware and software. Returns the run's id."""
    folder.check()
    path = folder.path / RUN
    params = trainer.model.num_params()
    size = plot_log.size_of(params) if trainer.shards.tokenizer == "gpt2" else "none"
    before = {"id": secrets.token_hex(4), "size": size, "params": params, "data": trainer.shards.contents(), "launches": []}
    if config.teacher:
        before["teacher_sha256"] = teachers_fingerprint(config)
    if path.exists():
        before |= read_run_json(path)
    elif config.init_from:
        before["init"] = checkpoint.fingerprint(config.init_from, config.init_revision)
    settings = asdict(config) | {"resume": False, "replay_step": None}
    launch = {
        "token": folder.token,
        "step": step,
        "config": settings,
        "command": sys.argv,
        **code_now(),
        "torch": torch.__version__,
        "device": device.describe(world.device),
        "compiled": trainer.compiled,
        "world_size": world.size,
        "torchrun": torchruns,
    }
    folder.begin(before | {"config": settings, "launches": [*before["launches"], launch]})
    return folder.id


# the files that compute a loss
FOLDERS = ("training", "ops", "formats", "common")
CODE = ("train.py", "model.py", "variants.py", "dataloader.py", "checkpoint.py", *(f"{folder}/**/*.py" for folder in FOLDERS))


def teachers_fingerprint(config: TrainConfig, fingerprint: Callable[[str], str] = checkpoint.fingerprint) -> str:
    """Returns the fingerprints of the teachers, in an order of their own, separated by commas."""
    return ",".join(sorted(map(fingerprint, config.teachers)))


def code_now() -> dict:
    """Returns the commit, and a hash of each file in CODE: a dirty commit alone doesn't say which change a run had."""
    return {"commit": git_commit(), "python": platform.python_version(), "code": hashes_of_code()}


def hashes_of_code() -> dict[str, str]:
    root = Path(__file__).parent.parent
    files = sorted(path for pattern in CODE for path in root.glob(pattern))
    return {path.relative_to(root).as_posix(): hash_of_code(path.read_text(encoding="utf-8")) for path in files}


@cache
def hash_of_code(text: str) -> str:
    """Returns a hash of what a file computes, from its text. Comments, docstrings and layout don't count."""
    try:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                docstring = [isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in body]
                node.body = [part for part, is_one in zip(body, docstring, strict=True) if not is_one] or [ast.Pass()]
        text = ast.unparse(tree)
    except SyntaxError:  # a broken file that nothing imports
        pass
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def other_code(launch: dict, reference: dict) -> str:
    """Says how a launch's code differs from the reference's, each as code_now() returns it; '' if it is the same. Older versions
    recorded only the commit."""
    changed = changed_files(launch, reference)
    if changed is not None:
        names = ", ".join(changed)
        before, now = (".".join(str(each.get("python")).split(".")[:2]) for each in (launch, reference))
        return names and names + (f"; or Python {before} reads it differently than {now}" if before != now else "")
    before, now = (str(each.get("commit") or "unknown") for each in (launch, reference))
    same = before == now != "unknown" and not before.endswith("+")  # '+': files differ from the commit
    return "" if same else f"commit {before[:8]}{'+' * before.endswith('+')} against {now[:8]}{'+' * now.endswith('+')}"


def changed_files(launch: dict, reference: dict) -> list[str] | None:
    """Names the files whose code differs between two launches. None if one is older, and recorded only its commit."""
    ours, theirs = launch.get("code"), reference.get("code")
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return None
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


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
    return torchrun_id() in last_launch(read_run_json(out_dir / RUN), None).get("torchrun", [])


def torchrun_id() -> str:
    """Identifies this torchrun, the same after its restarts: host and torchrun's temporary folder. '' without torchrun."""
    folder = re.fullmatch(r"(.+)[/\\]attempt_\d+[/\\]\d+[/\\]error\.json", os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return f"{platform.node()} {folder[1]}" if folder else ""  # another path is another launcher's leftover
