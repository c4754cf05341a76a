"""Checkpoints: saving, verifying, finding and loading them. Every script loads a model through load_model.

    model_{step:05d}.pt      weights_only: model (state dict), config (dict), step, val_loss, tokenizer (its name)
    state_{step:05d}.pt      what else an exact resume needs: optimizer, scaler, seconds
    model_{step:05d}.json    the seal: size and sha256 of both, written last; without it, or unlike it, they do not count

Each file is written under another name and renamed, so a kill at any moment leaves the checkpoints before it whole.
"""

import pickle
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from files import read_json, sha256, write_atomically, write_json
from fineweb import VOCAB_SIZES, Tokenizer, get_tokenizer
from model import GPT, GPTConfig, config_from_hf, hf_folder


class Files(NamedTuple):
    """A checkpoint's three files."""

    model: Path
    state: Path
    seal: Path


def files_of(folder: Path, step: int) -> Files:
    return Files(folder / f"model_{step:05d}.pt", folder / f"state_{step:05d}.pt", folder / f"model_{step:05d}.json")


# ---- writing ----


def save_checkpoint(folder: Path, step: int, model: GPT, tokenizer: str, val_loss: float | None, state: dict) -> Path:
    """Writes the checkpoint of a step and returns the model file's path. val_loss: None when not validated at this step."""
    files = files_of(folder, step)
    content = {
        "model": model.state_dict(),
        "config": asdict(model.config),
        "step": step,
        "val_loss": val_loss,
        "tokenizer": tokenizer,
    }
    for path, part in ((files.model, content), (files.state, state)):
        write_atomically(path, lambda file, part=part: torch.save(part, file))
    write_json(files.seal, {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in (files.model, files.state)})
    return files.model


def prune(folder: Path, keep: int, newest: int):
    """Deletes all but the last `keep` sealed checkpoints up to `newest`, the one just saved (0 keeps all). Later ones
    were found damaged by the resume that came to this step, and go too. The seal of each goes before its files."""
    steps = sealed_steps(folder)
    kept = [step for step in steps if step <= newest][-keep:]
    for step in sorted(set(steps) - set(kept)) if keep else []:
        for path in reversed(files_of(folder, step)):
            path.unlink(missing_ok=True)


# ---- finding and verifying ----


def sealed_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem[6:]) for path in folder.glob("model_*.json") if path.stem[6:].isdigit())


def fault(folder: Path, step: int, weights_only: bool = False) -> str | None:
    """What is wrong with the checkpoint of a step, or None when it is whole, byte for byte; weights_only: its model file."""
    files = files_of(folder, step)
    if not files.seal.exists():
        return f"{files.seal.name} is missing: its saving did not finish"
    try:
        seal = read_json(files.seal, "")
        for path in (files.model,) if weights_only else (files.model, files.state):
            if not path.exists():
                return f"{path.name} is missing"
            if path.stat().st_size != seal[path.name]["bytes"] or sha256(path) != seal[path.name]["sha256"]:
                return f"{path.name} is damaged: not the bytes that were saved"
    except (ValueError, KeyError, TypeError):
        return f"{files.seal.name} is damaged"
    return None


def newest_step(folder: Path, weights_only: bool = False) -> int | None:
    """The newest step with a whole checkpoint; None when nothing was ever saved. Names those it passes over.
    ValueError when there are checkpoints and none is whole: a run must not silently begin again."""
    steps = sorted({int(m[1]) for path in folder.glob("model_*") if (m := re.fullmatch(r"model_(\d+)\.(pt|json)", path.name))})
    for step in reversed(steps):
        problem = fault(folder, step, weights_only)
        if problem is None:
            return step
        print(f"warning: skipping the checkpoint of step {step} in {folder}: {problem}", file=sys.stderr)
    if steps:
        raise ValueError(f"none of the {len(steps)} checkpoints in {folder} is whole: bring one back, or use another folder")
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
    if folder.is_dir() and not (folder / "config.json").exists():
        step = newest_step(folder, weights_only=True)
        return None if step is None else files_of(folder, step).model
    return None


def open_checkpoint(path: str) -> tuple[dict | None, GPTConfig, str | None]:
    """A checkpoint's content (None: it is Hugging Face's), its config and the name of its tokenizer, if that is known."""
    file = checkpoint_file(path)
    if file is None:
        config = config_from_hf(hf_folder(path))
        return None, config, next((name for name, size in VOCAB_SIZES.items() if size == config.vocab_size), None)
    numbered = re.fullmatch(r"model_(\d+)", file.stem)
    if numbered and file.with_suffix(".json").exists() and (problem := fault(file.parent, int(numbered[1]), weights_only=True)):
        raise ValueError(f"{file.parent}: {problem}; use another checkpoint")
    content = load_torch(file)
    try:
        weights, config, tokenizer = content["model"], GPTConfig(**content["config"]), content["tokenizer"]
        if isinstance(tokenizer, str) and all(isinstance(p, torch.Tensor) for p in weights.values()):
            return content, config, tokenizer
    except (KeyError, TypeError, IndexError, ValueError, AttributeError):
        pass
    raise ValueError(f"{file} is not a checkpoint of this project: it has no model, config and tokenizer")


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


def load_with_tokenizer(path: str, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer]:
    """load_model for what can't do without a tokenizer: ValueError where none is known."""
    model, tokenizer = load_model(path, device)
    if tokenizer is None:
        raise ValueError(f"{path}: no tokenizer is known for a vocabulary of {model.config.vocab_size}; it can only be fine-tuned")
    return model, tokenizer


def load_training(folder: Path, step: int) -> tuple[dict, dict]:
    """Both files of a checkpoint that newest_step found whole: the model's and the state's."""
    files = files_of(folder, step)
    return load_torch(files.model), load_torch(files.state)


@torch.no_grad()
def load_weights(model: GPT, state: dict, source):
    """Copies a state dict into the model. ValueError names the first parameter that does not fit."""
    own = model.state_dict()
    if odd := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{source} is of another shape: {odd[0]} is in one of the two models only")
    for name, p in own.items():
        if p.shape != state[name].shape:
            raise ValueError(f"{source} is of another shape: {name} is {tuple(state[name].shape)} there, {tuple(p.shape)} here")
        p.copy_(state[name])
