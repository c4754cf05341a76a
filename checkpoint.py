"""Checkpoints: saving, verifying, finding and loading them. Every script loads a model through load_model.

    model_{step:05d}.pt      weights_only: model (state dict), config (dict), step, val_loss, tokenizer (its name)
    state_{step:05d}.pt      what else an exact resume needs: optimizer, scaler, seconds
    model_{step:05d}.json    size and sha256 of both, written last: without it, or unlike it, a checkpoint does not count

Each file is written under another name and renamed, so a kill at any moment leaves the checkpoints before it whole.
"""

import hashlib
import pickle
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from dataloader import read_json, sha256, write_atomically, write_json
from fineweb import VOCAB_SIZES, Tokenizer, get_tokenizer
from model import GPT, GPTConfig, config_from_hf, hf_folder


def names(step: int) -> tuple[str, str, str]:
    return f"model_{step:05d}.pt", f"state_{step:05d}.pt", f"model_{step:05d}.json"


# ---- writing ----


class HashingFile:
    """A file that hashes what is written to it, so that a checkpoint need not be read again to be summed."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def write_torch(path: Path, content: dict) -> dict:
    """Saves content atomically and returns what verifies it."""
    digest = None

    def write(file):
        nonlocal digest
        hashing = HashingFile(file)
        torch.save(content, hashing)
        digest = hashing.sha256.hexdigest()

    write_atomically(path, write)
    return {"bytes": path.stat().st_size, "sha256": digest}


def save_checkpoint(folder: Path, step: int, model: GPT, tokenizer: str, val_loss: float | None, state: dict) -> Path:
    """Writes the checkpoint of a step, unless it stands there whole already, and returns the model file's path."""
    model_name, state_name, seal_name = names(step)
    if fault(folder, step) is None:
        return folder / model_name
    content = {
        "model": model.state_dict(),
        "config": asdict(model.config),
        "step": step,
        "val_loss": val_loss,
        "tokenizer": tokenizer,
    }
    seal = {model_name: write_torch(folder / model_name, content), state_name: write_torch(folder / state_name, state)}
    write_json(folder / seal_name, seal)
    return folder / model_name


def prune(folder: Path, keep: int):
    """Deletes all but the newest `keep` sealed checkpoints (0 keeps all), the seal of each before its files."""
    for step in sealed_steps(folder)[:-keep] if keep else []:
        for name in reversed(names(step)):
            (folder / name).unlink(missing_ok=True)


# ---- finding and verifying ----


def sealed_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem[6:]) for path in folder.glob("model_*.json") if path.stem[6:].isdigit())


def fault(folder: Path, step: int) -> str | None:
    """What is wrong with the checkpoint of a step, or None when it is whole, byte for byte."""
    *_, seal_name = names(step)
    if not (folder / seal_name).exists():
        return f"{seal_name} is missing: its saving did not finish"
    try:
        seal = read_json(folder / seal_name)
        for name, expected in seal.items():
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                return f"{name} is damaged: not the bytes that were saved"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{seal_name} is damaged"
    return None


def newest_step(folder: Path) -> int | None:
    """The newest step with a whole checkpoint; None when nothing was ever saved. Names those it passes over.
    ValueError when there are checkpoints and none is whole: a run must not silently begin again."""
    steps = sorted({int(m[1]) for path in folder.glob("model_*") if (m := re.fullmatch(r"model_(\d+)\.(pt|json)", path.name))})
    for step in reversed(steps):
        problem = fault(folder, step)
        if problem is None:
            return step
        print(f"warning: skipping the checkpoint of step {step} in {folder}: {problem}", file=sys.stderr)
    if steps:
        raise ValueError(f"none of the {len(steps)} checkpoints in {folder} is whole: bring one back, or choose another --out-dir")
    return None


# ---- loading ----


def load_torch(path: Path) -> dict:
    """torch.load that runs no code from the file. ValueError when it is missing or no checkpoint."""
    if not path.exists():
        raise ValueError(f"no checkpoint {path}: check the path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as e:
        raise ValueError(f"{path} can't be loaded safely: damaged, or not a checkpoint of this project") from e


def checkpoint_file(path: str) -> Path | None:
    """The .pt file that a path means: itself, or the newest whole one of a run's folder. None: it is Hugging Face's."""
    folder = Path(path)
    if folder.suffix == ".pt":
        return folder
    if folder.is_dir() and not (folder / "config.json").exists() and (step := newest_step(folder)) is not None:
        return folder / names(step)[0]
    return None


def open_checkpoint(path: str) -> tuple[dict | None, GPTConfig, str | None]:
    """A checkpoint's content (None: it is Hugging Face's), its config and the name of its tokenizer, if that is known."""
    file = checkpoint_file(path)
    if file is None:
        config = config_from_hf(hf_folder(path))
        return None, config, next((name for name, size in VOCAB_SIZES.items() if size == config.vocab_size), None)
    step = re.fullmatch(r"model_(\d+)", file.stem)
    if step and (file.parent / names(int(step[1]))[2]).exists() and (problem := fault(file.parent, int(step[1]))):
        raise ValueError(f"{file.parent}: {problem}; use another checkpoint")
    content = load_torch(file)
    try:
        return content, GPTConfig(**content["config"]), content["tokenizer"]
    except (KeyError, TypeError) as e:
        raise ValueError(f"{file} is not a checkpoint of this project: {e}") from e


def load_config(path: str) -> GPTConfig:
    """The shape of the model that load_model would load."""
    return open_checkpoint(path)[1]


def load_gpt(path: str) -> tuple[GPT, str | None]:
    """The model on the CPU, and the name of its tokenizer (None where the vocabulary is no known one)."""
    content, config, tokenizer = open_checkpoint(path)
    if content is None:
        return GPT.from_pretrained(path), tokenizer
    model = GPT(config)
    load_weights(model, content["model"], path)
    return model, tokenizer


def load_model(path: str, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer | None]:
    """A model ready to use, in eval mode, and its tokenizer (None where the vocabulary is no known one).

    path: a checkpoint.pt, a run's folder, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl.
    Raises ValueError for what is missing, damaged or of another shape.
    """
    model, tokenizer = load_gpt(str(path))
    return model.to(device).eval(), get_tokenizer(tokenizer) if tokenizer else None


def load_training(folder: Path, step: int) -> tuple[dict, dict]:
    """Both files of a checkpoint that newest_step found whole: the model's and the state's."""
    model_name, state_name, _ = names(step)
    return load_torch(folder / model_name), load_torch(folder / state_name)


@torch.no_grad()
def load_weights(model: GPT, state: dict, source):
    """Copies a state dict into the model. ValueError names the first parameter that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{source} is of another shape: {name} is in one of the two models only")
    for name, p in own.items():
        if p.shape != state[name].shape:
            raise ValueError(f"{source} is of another shape: {name} is {tuple(state[name].shape)} there, {tuple(p.shape)} here")
        p.copy_(state[name])
