"""Checkpoints: saving, verifying, finding and loading them. Every script loads a model through load_model.

    model_{step:05d}.pt      weights_only: model (state dict), config (dict), step, val_loss, tokenizer (its name)
    state_{step:05d}.pt      what else an exact resume needs: optimizer, scaler, seconds, skipped steps, recent losses
    model_{step:05d}.json    the seal: size and sha256 of both; without it, or unlike it, they do not count

Why a kill at any moment is safe stands at write_checkpoint.
"""

import pickle
import re
import shutil
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.files import read_json, replace, sha256, write_json, write_temporary
from common.tokenizer import VOCAB_SIZES, Tokenizer, get_tokenizer
from formats import nanogpt
from formats.huggingface import hf_folder, pad_tables, shape_from_hf
from model import GPT
from variants import VariantConfig, build


class Files(NamedTuple):
    """A checkpoint's three files."""

    model: Path
    state: Path
    seal: Path


def files_of(folder: Path, step: int) -> Files:
    return Files(folder / f"model_{step:05d}.pt", folder / f"state_{step:05d}.pt", folder / f"model_{step:05d}.json")


# ---- writing ----


def content_of(step: int, model: GPT, tokenizer: str, val_loss: float | None, weights: dict[str, Tensor] | None = None) -> dict:
    """What a checkpoint's model file holds. val_loss: None when not validated at this step. weights: where the model's state dict is not
    what is to be saved."""
    return {
        "model": model.state_dict() if weights is None else weights,
        "config": asdict(model.config),
        "step": step,
        "val_loss": val_loss,
        "tokenizer": tokenizer,
    }


def write_checkpoint(folder: Path, step: int, content: dict, state: dict):
    """Both files lie on the disk under temporary names, then the seal, from which on the checkpoint counts, then come their own
    names. So a kill leaves either nothing that counts, or what
    recover_interrupted_save finishes: also where it replaces one of the same step."""
    files = files_of(folder, step)
    temporaries = []
    try:
        for path, part in ((files.model, content), (files.state, state)):
            temporaries.append(write_temporary(path, lambda file, part=part: save_torch(part, file)))
        write_json(files.seal, {path.stem: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in temporaries})
    except BaseException:
        for path in temporaries:
            path.unlink()
        raise
    for path in temporaries:
        replace(path, path.with_suffix(""))


def recover_interrupted_save(folder: Path):
    """Finishes a save that a kill cut short after its seal, and removes what is left of one that had not come so far."""
    for path in folder.glob("model_*.json.tmp"):
        path.unlink()
    for path in [*folder.glob("model_*.pt.tmp"), *folder.glob("state_*.pt.tmp")]:
        seal = folder / f"model_{path.stem[6:-3]}.json"
        try:
            sealed = read_json(seal, "")[path.stem]["sha256"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            sealed = None
        if sealed == sha256(path):
            replace(path, path.with_suffix(""))
        else:
            path.unlink()


def save_torch(content: dict, file):
    try:
        torch.save(content, file)
    except RuntimeError as e:  # what torch's writer says when the disk is full
        raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def prune(folder: Path, keep: int, newest: int):
    """Deletes all but the last `keep` whole checkpoints (0 keeps all), and never `newest`, the one just saved. What is not
    whole is neither counted nor deleted. The seal of each goes before its files."""
    whole = [step for step in sealed_steps(folder) if find_problem(folder, step) is None] if keep else []
    for step in set(whole[:-keep]) - {newest}:
        for path in reversed(files_of(folder, step)):
            path.unlink()


class SaveError(OSError):
    """A checkpoint that could not be written, with what was in the way and what it needs."""

    def __str__(self):
        return self.strerror


class Saver:
    """Saves the checkpoints of a run. In the background: from a copy in main memory, in a thread, while training goes on;
    else at once. A failure is kept until it is asked for."""

    def __init__(self, folder: Path, keep: int, background: bool):
        self.folder, self.keep, self.background = folder, keep, background
        self.thread, self.error, self.bug = None, None, None

    def save(self, step: int, content: dict, state: dict):
        self.wait()
        if self.background:
            copies = {place: tensor.to("cpu", copy=True) for place, tensor in tensors_in([content, state]).items()}
            content, state = with_tensors([content, state], copies)
        self.thread = threading.Thread(target=self.write, args=(step, content, state))
        self.thread.start()
        if not self.background:
            self.wait()

    def write(self, step: int, content: dict, state: dict):
        try:
            write_checkpoint(self.folder, step, content, state)
            prune(self.folder, self.keep, step)
            self.error = None
        except OSError as e:
            need = sum(tensor.nbytes for tensor in tensors_in([content, state]).values())
            there = f"{self.folder} is gone"
            if self.folder.exists():
                there = f"{self.folder} has {shutil.disk_usage(self.folder).free / 1e6:,.1f} MB free; those before it are untouched"
            why = f"the checkpoint of step {step} could not be saved ({e.strerror or e}): it needs {need / 1e6:,.1f} MB, {there}"
            self.error = SaveError(e.errno, why)
        except Exception as e:  # a fault of the program, which must not die with the thread
            self.bug = e

    def wait(self):
        if self.thread:
            self.thread.join()
        if self.bug:
            raise self.bug

    def failure(self) -> SaveError | None:
        """Why the last one that was written failed, if it did; told once."""
        error, self.error = self.error, None
        return error

    def finish(self):
        """Raises SaveError when the last save failed."""
        self.wait()
        if self.error:
            raise self.error


def tensors_in(thing) -> dict[tuple, Tensor]:
    """The tensors in nested dicts and lists by where they lie: one that stands twice, as the tied head does, is there once."""
    if isinstance(thing, Tensor):
        return {(thing.data_ptr(), thing.shape): thing}
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ()
    return {place: tensor for part in parts for place, tensor in tensors_in(part).items()}


def with_tensors(thing, tensors: dict[tuple, Tensor]):
    """The same nested dicts and lists with other tensors in the places of its own."""
    if isinstance(thing, Tensor):
        return tensors[thing.data_ptr(), thing.shape]
    if isinstance(thing, dict):
        return {key: with_tensors(value, tensors) for key, value in thing.items()}
    return [with_tensors(value, tensors) for value in thing] if isinstance(thing, list) else thing


# ---- finding and verifying ----


def sealed_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem[6:]) for path in folder.glob("model_*.json") if path.stem[6:].isdigit())


def find_problem(folder: Path, step: int, weights_only: bool = False) -> str | None:
    """What is wrong with the checkpoint of a step, or None when it is whole, byte for byte; weights_only: its model file."""
    files = files_of(folder, step)
    if not files.seal.exists():
        return f"{files.seal.name} is missing"
    try:
        seal = read_json(files.seal, "")
        for path in (files.model,) if weights_only else (files.model, files.state):
            if not path.exists():
                return f"{path.name} is missing"
            if path.stat().st_size != seal[path.name]["bytes"] or sha256(path) != seal[path.name]["sha256"]:
                return f"{path.name} is damaged: not the bytes that {files.seal.name} says were saved"
    except (ValueError, KeyError, TypeError):
        return f"{files.seal.name} is damaged"
    return None


def newest_step(folder: Path, at_most: int | None = None, weights_only: bool = False) -> int | None:
    """The newest step, up to at_most, with a whole checkpoint; None when none was ever saved. Names those it passes over.
    ValueError when there are checkpoints and none is whole: a run must not silently begin again."""
    steps = sorted({int(m[1]) for path in folder.glob("model_*") if (m := re.fullmatch(r"model_(\d+)\.(pt|json)", path.name))})
    steps = [step for step in steps if at_most is None or step <= at_most]
    for step in reversed(steps):
        problem = find_problem(folder, step, weights_only)
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
        with nanogpt.allowed():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as e:
        raise ValueError(f"{path} can't be loaded safely: damaged, or not a checkpoint of this project") from e


def checkpoint_file(path: str) -> Path | None:
    """The .pt file that a path means: itself, or the newest whole one of a run's folder, also of nanoGPT's or build-nanogpt's. None:
    it is Hugging Face's."""
    folder = Path(path)
    if folder.suffix == ".pt":
        return folder
    ours = (folder / "run.json").exists() or any(folder.glob("state_*")) or sealed_steps(folder)
    if not ours and (theirs := sorted([*folder.glob("ckpt.pt"), *folder.glob("model_*.pt")])):
        return theirs[-1]
    if folder.is_dir() and not (folder / "config.json").exists():
        step = newest_step(folder, weights_only=True)
        return None if step is None else files_of(folder, step).model
    return None


def open_checkpoint(path: str, revision: str = "") -> tuple[dict | None, VariantConfig, str | None]:
    """A checkpoint's content (None: it is Hugging Face's), its config and the name of its tokenizer, if that is known."""
    file = checkpoint_file(path)
    if file is None:
        config = VariantConfig(**shape_from_hf(hf_folder(path, revision or None)))
        return None, config, next((name for name, size in VOCAB_SIZES.items() if size == config.vocab_size), None)
    numbered = re.fullmatch(r"model_(\d+)", file.stem)
    if numbered and file.with_suffix(".json").exists() and (problem := find_problem(file.parent, int(numbered[1]), weights_only=True)):
        raise ValueError(f"{file.parent}: {problem}; use another checkpoint")
    content = load_torch(file)
    try:
        if not isinstance(content, dict):
            raise TypeError("no dict")
        content = nanogpt.converted(content) if nanogpt.is_nanogpt(content) else content
        weights, config, tokenizer = content["model"], VariantConfig(**content["config"]), content["tokenizer"]
        if isinstance(tokenizer, str | None) and all(isinstance(p, torch.Tensor) for p in weights.values()):
            return content, config, tokenizer
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, RuntimeError):
        pass
    raise ValueError(f"{file} is not a checkpoint of this project, nanoGPT or build-nanogpt: it has no model, config and tokenizer")


def load_config(path: str, revision: str = "") -> VariantConfig:
    """The shape of the model that load_model would load."""
    return open_checkpoint(path, revision)[1]


def hub_commit(path: str, revision: str) -> str:
    """The commit of the hub that a name such as gpt2 stands for at a revision, '' being its newest; '' for what is local."""
    return "" if checkpoint_file(path) or Path(path).is_dir() else hf_folder(path, revision or None).name


def load_gpt(path: str, revision: str = "") -> tuple[GPT, str | None]:
    """The model on the CPU, and the name of its tokenizer (None where the vocabulary is no known one)."""
    content, config, tokenizer = open_checkpoint(path, revision)
    if content is None:
        return GPT.from_pretrained(path, revision or None), tokenizer
    model = build(config)
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
        why = f"no tokenizer is known for a vocabulary of {model.config.vocab_size}"
        raise ValueError(f"{path}: {why}; it can only be trained on, on shards of its own")
    return model, tokenizer


def seal_of(folder: Path, step: int) -> str:
    """What the seal of a checkpoint says, '' where there is none."""
    seal = files_of(folder, step).seal
    return seal.read_text() if seal.exists() else ""


def load_training(folder: Path, step: int) -> tuple[dict, dict]:
    """Both files of a checkpoint that newest_step found whole: the model's and the state's."""
    files = files_of(folder, step)
    return load_torch(files.model), load_torch(files.state)


@torch.no_grad()
def load_weights(model: GPT, state: dict, source):
    """Copies a state dict into the model. ValueError names the first parameter that does not fit."""
    own, state = model.state_dict(), dict(state)
    pad_tables(model, state)
    if odd := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{source} is of another shape: {odd[0]} is in one of the two models only")
    for name, p in own.items():
        if p.shape != state[name].shape:
            raise ValueError(f"{source} is of another shape: {name} is {tuple(state[name].shape)} there, {tuple(p.shape)} here")
        p.copy_(state[name])
