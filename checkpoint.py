"""Saves, verifies, finds and loads checkpoints. Every script loads a model through load_model.

    model_{step:05d}.pt      model (state dict), config (dict), step, val_loss, tokenizer (its name); loads with weights_only=True
    state_{step:05d}.pt      what else an exact resume needs: optimizer, scaler, seconds, skipped steps, recent losses
    model_{step:05d}.json    the seal: size and sha256 of both; a checkpoint counts only if they match

write_checkpoint explains why a kill at any moment is safe.
"""

import os
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
    """The content of a checkpoint's model file. val_loss: None if this step was not validated. weights: saved instead of the model's
    own state dict."""
    return {
        "model": model.state_dict() if weights is None else weights,
        "config": asdict(model.config),
        "step": step,
        "val_loss": val_loss,
        "tokenizer": tokenizer,
    }


def write_checkpoint(folder: Path, step: int, content: dict, state: dict):
    """Writes a checkpoint so that a kill at any moment leaves all of it or none.

    First both .pt files go to disk under temporary names. Then the seal is written: from now on the checkpoint counts. Last, the
    files get their own names. If a kill comes before the seal, recover_interrupted_save deletes the temporary files; after it, it
    renames them. All this holds too if the step already has a checkpoint, which is then replaced."""
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
    """Finishes a save that was killed after it wrote the seal. Cleans up after one that was killed before."""
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
    except RuntimeError as e:  # torch's writer turns a full disk into one
        raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def prune(folder: Path, keep: int, newest: int):
    """Deletes all but the last `keep` complete checkpoints (0 keeps all). Never deletes `newest`, the one just saved. Neither counts
    nor deletes incomplete ones."""
    complete = [step for step in sealed_steps(folder) if find_problem(folder, step) is None] if keep else []
    for step in set(complete[:-keep]) - {newest}:
        for path in reversed(files_of(folder, step)):  # the seal first: without it the rest does not count
            path.unlink()


class SaveError(OSError):
    """A checkpoint could not be written. The message says why, and how much space it needs."""

    def __str__(self):
        return self.strerror


class Saver:
    """Saves the checkpoints of a run. background: copies the tensors to main memory and writes the copy in a thread, while training
    continues. If a save fails, failure() returns the error once; finish() raises it."""

    def __init__(self, folder: Path, keep: int, background: bool):
        self.folder, self.keep, self.background = folder, keep, background
        self.thread, self.error, self.bug = None, None, None

    def save(self, step: int, content: dict, state: dict):
        self.wait()
        if self.background:
            copies = {key: tensor.to("cpu", copy=True) for key, tensor in tensors_in([content, state]).items()}
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
            space = f"{self.folder} is gone"
            if self.folder.exists():
                space = f"{self.folder} has {shutil.disk_usage(self.folder).free / 1e6:,.1f} MB free; earlier checkpoints are untouched"
            why = f"could not save the checkpoint of step {step} ({e.strerror or e}): it needs {need / 1e6:,.1f} MB, {space}"
            self.error = SaveError(e.errno, why)
        except Exception as e:  # a bug: wait raises it, or it would die with this thread
            self.bug = e

    def wait(self):
        if self.thread:
            self.thread.join()
        if self.bug:
            raise self.bug

    def failure(self) -> SaveError | None:
        """The error of the last save, if it failed. Returns each error once."""
        error, self.error = self.error, None
        return error

    def finish(self):
        """Waits for the last save. SaveError if it failed."""
        self.wait()
        if self.error:
            raise self.error


def tensors_in(thing) -> dict[tuple, Tensor]:
    """The tensors in nested dicts and lists, by address and shape. A tied head and its embedding count as one."""
    if isinstance(thing, Tensor):
        return {(thing.data_ptr(), thing.shape): thing}
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ()
    return {key: tensor for part in parts for key, tensor in tensors_in(part).items()}


def with_tensors(thing, tensors: dict[tuple, Tensor]):
    """The same nested dicts and lists, with each tensor replaced by the one under its key. tensors: see tensors_in."""
    if isinstance(thing, Tensor):
        return tensors[thing.data_ptr(), thing.shape]
    if isinstance(thing, dict):
        return {key: with_tensors(value, tensors) for key, value in thing.items()}
    return [with_tensors(value, tensors) for value in thing] if isinstance(thing, list) else thing


# ---- finding and verifying ----


def sealed_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem[6:]) for path in folder.glob("model_*.json") if path.stem[6:].isdigit())


def find_problem(folder: Path, step: int, weights_only: bool = False) -> str | None:
    """What is wrong with a step's checkpoint, or None if it is complete, byte for byte. weights_only: checks only the model file."""
    files = files_of(folder, step)
    if not files.seal.exists():
        return f"{files.seal.name} is missing"
    try:
        seal = read_json(files.seal, "")
        for path in (files.model,) if weights_only else (files.model, files.state):
            if not path.exists():
                return f"{path.name} is missing"
            if path.stat().st_size != seal[path.name]["bytes"] or sha256(path) != seal[path.name]["sha256"]:
                return f"{path.name} is damaged: it does not match {files.seal.name}"
    except (ValueError, KeyError, TypeError):
        return f"{files.seal.name} is damaged"
    return None


def newest_step(folder: Path, at_most: int | None = None, weights_only: bool = False) -> int | None:
    """The newest step, up to at_most, with a complete checkpoint. None if nothing was ever saved. Reports and skips incomplete ones.
    ValueError if all are incomplete: a run must not silently start over."""
    steps = sorted({int(m[1]) for path in folder.glob("model_*") if (m := re.fullmatch(r"model_(\d+)\.(pt|json)", path.name))})
    steps = [step for step in steps if at_most is None or step <= at_most]
    for step in reversed(steps):
        problem = find_problem(folder, step, weights_only)
        if problem is None:
            return step
        print(f"warning: skipping the checkpoint of step {step} in {folder}: {problem}", file=sys.stderr)
    if steps:
        raise ValueError(f"none of the {len(steps)} checkpoints in {folder} is complete: restore one, or use another folder")
    return None


# ---- loading ----


def load_torch(path: Path) -> dict:
    """Loads a .pt file without running code from it. ValueError if it is missing or not a checkpoint."""
    if not path.exists():
        raise ValueError(f"no checkpoint {path}: check the path")
    try:
        with nanogpt.allowed(), open(path, "rb") as file:
            by_name = str(path).encode("utf-8", "replace") == os.fsencode(path)  # mmap needs the name, and PyTorch only takes UTF-8
            return torch.load(path if by_name else file, map_location="cpu", weights_only=True, mmap=by_name)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as e:
        raise ValueError(f"{path} can't be loaded safely, it is damaged or not a checkpoint: use another one") from e


def checkpoint_file(path: str) -> Path | None:
    """The .pt file that a path stands for: the file itself, or the newest complete one in the folder of a run (or of nanoGPT or
    build-nanogpt). None if the path is Hugging Face's."""
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
    """A checkpoint's content (None if it is Hugging Face's), its config and its tokenizer's name (None if unknown)."""
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
            raise TypeError("not a dict")
        content = nanogpt.converted(content) if nanogpt.is_nanogpt(content) else content
        weights, config, tokenizer = content["model"], VariantConfig(**content["config"]), content["tokenizer"]
        if isinstance(tokenizer, str | None) and all(isinstance(p, torch.Tensor) for p in weights.values()):
            return content, config, tokenizer
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, RuntimeError):
        pass
    raise ValueError(f"{file} is not a checkpoint of this project, nanoGPT or build-nanogpt: use one with model, config and tokenizer")


def load_config(path: str, revision: str = "") -> VariantConfig:
    """The config of the model that load_model would load."""
    return open_checkpoint(path, revision)[1]


def hub_commit(path: str, revision: str) -> str:
    """The hub's commit for a name such as gpt2 at a revision ('' is the newest). Returns '' for a local path."""
    return "" if checkpoint_file(path) or Path(path).is_dir() else hf_folder(path, revision or None).name


def load_gpt(path: str, revision: str = "") -> tuple[GPT, str | None]:
    """Loads a model on the CPU. Returns it with its tokenizer's name (None if the vocabulary is unknown)."""
    content, config, tokenizer = open_checkpoint(path, revision)
    if content is None:
        return GPT.from_pretrained(path, revision or None), tokenizer
    model = build(config)
    load_weights(model, content["model"], path)
    return model, tokenizer


def load_model(path: str, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer | None]:
    """Loads a model in eval mode. Returns it with its tokenizer (None if the vocabulary is unknown).

    path: a checkpoint.pt, a run's folder, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl.
    ValueError if it is missing, damaged, or its weights don't fit its config.
    """
    model, tokenizer = load_gpt(str(path))
    return model.to(device).eval(), get_tokenizer(tokenizer) if tokenizer else None


def load_with_tokenizer(path: str, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer]:
    """load_model for scripts that need a tokenizer. ValueError if none is known."""
    model, tokenizer = load_model(path, device)
    if tokenizer is None:
        why = f"no tokenizer is known for a vocabulary of {model.config.vocab_size}"
        raise ValueError(f"{path}: {why}; use it only with train.py --init-from, on shards with this vocabulary")
    return model, tokenizer


def seal_of(folder: Path, step: int) -> str:
    """The text of a checkpoint's seal, '' if it has none."""
    seal = files_of(folder, step).seal
    return seal.read_text(encoding="utf-8") if seal.exists() else ""


def load_training(folder: Path, step: int) -> tuple[dict, dict]:
    """Loads both files of a checkpoint: (model, state). newest_step must have verified it."""
    files = files_of(folder, step)
    return load_torch(files.model), load_torch(files.state)


@torch.no_grad()
def load_weights(model: GPT, state: dict, source):
    """Copies a state dict into the model. ValueError names the first parameter that does not fit. source: for that message."""
    own, state = model.state_dict(), dict(state)
    pad_tables(model, state)
    if unmatched := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{source} does not fit the model: only one of them has {unmatched[0]}; use another checkpoint")
    for name, p in own.items():
        if p.shape != state[name].shape:
            shapes = f"{name} is {tuple(state[name].shape)} there, {tuple(p.shape)} here"
            raise ValueError(f"{source} does not fit the model: {shapes}; use another checkpoint")
        p.copy_(state[name])
