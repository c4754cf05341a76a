"""Saves, verifies, finds and loads checkpoints. Every script loads a model through load_model.

    model_{step:05d}.pt      model (state dict), config (dict), step, val_loss, tokenizer (its name); loads with weights_only=True
    state_{step:05d}.pt      what else an exact resume needs: optimizer, scaler, seconds, skipped steps, recent losses
    model_{step:05d}.json    the seal: size and sha256 of both, step and run; a checkpoint counts only if they match. "timed": true, if
                             --checkpoint-minutes made it between those of --checkpoint-every

write_checkpoint explains why a kill at any moment is safe. The run is the id in run.json. The state names the run, the step and the
sha256 of its model file, so files of other steps or runs don't pass for this one's.
"""

import hashlib
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common import cli
from common.distributed import SAVING
from common.files import naming, read_json, replace, sha256, write_json, write_temporary
from common.run_folder import RUN, LostFolder, RunFolder, run_id
from common.tokenizer import VOCAB_SIZES, Tokenizer, get_tokenizer, misfit
from common.validation import from_dict, raise_errors
from formats import nanogpt, tokenizer_files
from formats.huggingface import hf_folder, pad_tables
from model import GPT
from variants import VariantConfig, build, build_on_meta, hf_config


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


TIMED = "timed"  # in a seal


def write_checkpoint(folder: RunFolder, step: int, content: dict, state: dict, timed: bool = False):
    """Writes a checkpoint so that a kill at any moment leaves all of it or none.

    First both .pt files go to disk under temporary names. Then the seal is written: from now on the checkpoint counts. Last, the
    files get their own names. If a kill comes before the seal, recover_interrupted_save deletes the temporary files; after it, it
    renames them. All this holds too if the step already has a checkpoint, which is then replaced.

    OSError, before the seal, if the folder is no longer this run's."""
    folder.check()
    files = files_of(folder.path, step)
    temporaries, seal, owner = [], {TIMED: True} if timed else {}, {"run": folder.id, "step": step}
    try:
        for path, part in ((files.model, content), (files.state, state | owner)):
            if path == files.state:
                part["model_sha256"] = seal[files.model.name]["sha256"]
            temporaries.append(temporary := write_temporary(path, lambda file, part=part: save_torch(part, file)))
            seal[path.name] = {"bytes": temporary.stat().st_size, "sha256": sha256(temporary), **owner}
        folder.check()
        write_json(files.seal, seal)
    except BaseException:
        folder.check()  # first: the files may be another run's by now
        for path in temporaries:
            path.unlink(missing_ok=True)
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


def outdated(regular: list, timed: list, keep: int) -> list:
    """Returns those of a run's complete checkpoints, each list from old to new, that are deleted once there is a newer one: all but the
    last `keep` regular ones (0 keeps all), and each timed one, which only bridges the time until the next."""
    return timed + (regular[:-keep] if keep else [])


def prune(folder: Path, keep: int, *spared: int | None):
    """Deletes outdated checkpoints. Never deletes the spared steps, such as the one just saved. Neither counts nor deletes incomplete ones
    and those of other runs."""
    timed = [step for step in sealed_steps(folder) if is_timed(folder, step)]
    regular = [step for step in sealed_steps(folder) if step not in timed] if keep else []
    complete = [[step for step in steps if find_problem(folder, step) is None] for steps in (regular, timed)]
    for step in set(outdated(*complete, keep)).difference(spared):
        for path in reversed(files_of(folder, step)):  # the seal first: without it the rest does not count
            path.unlink()


def is_timed(folder: Path, step: int) -> bool:
    try:
        return read_json(files_of(folder, step).seal, "").get(TIMED) is True
    except (OSError, ValueError):
        return False


class SaveError(OSError):
    """A checkpoint could not be written. The message says why, and how much space it needs."""

    def __str__(self):
        return self.strerror


class Saver:
    """Saves the checkpoints of a run. background: copies the tensors to main memory and writes the copy in a thread, while training
    continues. If a save fails, failure() returns the error once; finish() raises it. If a save can't delete the oldest checkpoints,
    it warns: nothing is lost."""

    def __init__(self, folder: RunFolder, keep: int, background: bool, warn: Callable[[str], None] = lambda text: None):
        self.folder, self.keep, self.background, self.warn = folder, keep, background, warn
        self.thread, self.error, self.bug = None, None, None

    def save(self, step: int, content: dict, state: dict, timed: bool = False):
        self.wait()
        if self.background:
            copies = {key: tensor.to("cpu", copy=True) for key, tensor in tensors_in([content, state]).items()}
            content, state = with_tensors([content, state], copies)
        self.thread = threading.Thread(target=self.write, args=(step, content, state, timed), name=SAVING)
        self.thread.start()
        if not self.background:
            self.wait()

    def write(self, step: int, content: dict, state: dict, timed: bool):
        try:
            try:
                write_checkpoint(self.folder, step, content, state, timed)
            except (LostFolder, FileNotFoundError):  # while the files were being written
                self.follow_folder()
                write_checkpoint(self.folder, step, content, state, timed)
            self.error = None
        except OSError as e:
            self.error = self.explain(e, step, content, state)
        except Exception as e:  # a bug: wait raises it, or it would die with this thread
            self.bug = e
        else:
            if self.folder.mirror:
                self.folder.mirror.saved(step)
            self.prune(step)

    def follow_folder(self):
        """If the folder is no longer this run's, finds another one for what is left to write."""
        if self.folder.problem():
            self.folder.rescue()
            self.warn(f"warning: {self.folder.lost}: this run stops and saves everything in {self.folder.path}")

    def prune(self, step: int):
        try:
            self.folder.check()
            sending = self.folder.mirror and self.folder.mirror.sending  # or a slow upload might never complete a checkpoint
            prune(self.folder.path, self.keep, step, sending)
        except OSError as e:
            self.warn(f"warning: the checkpoint of step {step} is saved, but older ones could not be deleted ({e})")

    def explain(self, e: OSError, step: int, content: dict, state: dict) -> SaveError:
        folder, need = self.folder.path, sum(tensor.nbytes for tensor in tensors_in([content, state]).values())
        try:
            space = f"{folder} has {shutil.disk_usage(folder).free / 1e6:,.1f} MB free; earlier checkpoints are untouched"
        except OSError as gone:  # the disk may be away
            space = f"{folder} is gone" if isinstance(gone, FileNotFoundError) else f"{folder} can't be reached"
        why = f"could not save the checkpoint of step {step} ({e.strerror or e}): it needs {need / 1e6:,.1f} MB, {space}"
        return SaveError(e.errno, why)

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
    """What is wrong with a step's checkpoint, or None if it is complete, byte for byte, and of the run in this folder.
    weights_only: checks only the model file."""
    files = files_of(folder, step)
    if not files.seal.exists():
        return f"{files.seal.name} is missing"
    paths = (files.model,) if weights_only else (files.model, files.state)
    try:
        seal, run = read_json(files.seal, ""), run_id(folder)
        for path in paths:
            if not path.exists():
                return f"{path.name} is missing"
            if seal[path.name].keys() not in ({"bytes", "sha256"}, {"bytes", "sha256", "run", "step"}):  # older seals have the first two
                return f"{files.seal.name} is damaged"
            if wrong := misplaced(path, seal[path.name], step, run):
                return wrong
            if path.stat().st_size != seal[path.name]["bytes"] or sha256(path) != seal[path.name]["sha256"]:
                return f"{path.name} is damaged: it does not match {files.seal.name}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{files.seal.name} is damaged"
    for path in (files.model, files.state):  # a seal may have been made for files of another step or run
        try:
            content = load_torch(path)
        except ValueError:
            if path not in paths:  # not needed, so it may be missing or damaged
                continue
            return f"{path.name} is damaged"
        if wrong := misplaced(path, content, step, run):
            return wrong
        if content.get("model_sha256") not in (None, seal[files.model.name]["sha256"]):
            return f"{path.name} belongs to another {files.model.name}"
    return None


def misplaced(path: Path, owner: dict, step: int, run: str | None) -> str | None:
    """Says that a file is of another step or run, from what its seal or its content records. Older versions recorded less."""
    if owner.get("step", step) != step:
        return f"{path.name} is of step {owner['step']}"
    if None not in (run, owner.get("run")) and owner["run"] != run:
        return f"{path.name} is of another run, {owner['run']}; this one is {run}"
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
        cli.say(f"warning: skipping the checkpoint of step {step} in {folder}: {problem}")
    if steps:
        raise ValueError(f"none of the {len(steps)} checkpoints in {folder} can be resumed: restore one, or use another folder")
    return None


# ---- loading ----


NO_CHECKPOINT = "is not a checkpoint of this project, nanoGPT or build-nanogpt: use one with model, config and tokenizer"


def load_torch(path: Path) -> dict:
    """Loads a .pt file without running code from it. ValueError if it is missing or not a checkpoint."""
    if not path.exists():
        raise ValueError(f"no checkpoint {path}: check the path")
    with naming(path), open(path, "rb") as file:  # OSError says why, if the file can't be read
        file.read(1)
    try:
        by_name = str(path).encode("utf-8", "replace") == os.fsencode(path)  # mmap needs the name, and PyTorch only takes UTF-8
        with nanogpt.allowed(), warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # about types in a damaged file
            content = torch.load(path if by_name else file, map_location="cpu", weights_only=True, mmap=by_name)
    except Exception as e:  # damaged bytes make the unpickler raise anything
        if cli.disk_failed(e):
            raise
        raise ValueError(f"{path} can't be loaded safely, it is damaged or not a checkpoint: use another one, or copy it again") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} {NO_CHECKPOINT}")
    return content


def checkpoint_file(path: str) -> Path | None:
    """The .pt file that a path stands for: the file itself, or the newest complete one in the folder of a run (or of nanoGPT or
    build-nanogpt). None if the path is Hugging Face's."""
    folder = Path(path)
    if folder.suffix == ".pt":
        return folder
    ours = (folder / RUN).exists() or any(folder.glob("state_*")) or sealed_steps(folder)
    if not ours and (theirs := [path for pattern in ("ckpt.pt", "model_*.pt") for path in folder.glob(pattern)]):
        return max(theirs, key=lambda path: (int(path.stem[6:]) if path.stem[6:].isdecimal() else -1, path.name))
    if folder.is_dir() and not (folder / "config.json").exists():
        step = newest_step(folder, weights_only=True)
        return None if step is None else files_of(folder, step).model
    return None


class Opened(NamedTuple):
    """What a path to a model leads to."""

    content: dict | None  # of the .pt file; None if it is Hugging Face's
    config: VariantConfig
    tokenizer: str | None  # its name; None if unknown, OTHER if a folder of Hugging Face has one of its own
    no_tokenizer: str  # why this project can't use it; '' if it can


def open_checkpoint(path: str, revision: str = "") -> Opened:
    """Opens a model's file or folder, and checks it. Allocates no model."""
    file = checkpoint_file(path)
    if file is None:
        folder = hf_folder(path, revision or None)
        config = hf_config(folder)
        return Opened(None, config, *tokenizer_files.identify(folder, config.vocab_size))
    numbered = re.fullmatch(r"model_(\d+)", file.stem)
    if numbered and file.with_suffix(".json").exists() and (problem := find_problem(file.parent, int(numbered[1]), weights_only=True)):
        raise ValueError(f"{file.parent}: {problem}; use another checkpoint")
    content = load_torch(file)
    try:
        check_weights(content["model"], file)
        content = nanogpt.converted(content) if nanogpt.is_nanogpt(content) else content
        settings, tokenizer = content["config"], content["tokenizer"]
        if not isinstance(settings, dict) or not isinstance(tokenizer, str | None):
            raise TypeError("config or tokenizer")
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{file} {NO_CHECKPOINT}") from e
    config = from_dict(VariantConfig, settings, file)
    raise_errors([f"{file}: {error}" for error in config.errors()])
    if tokenizer in VOCAB_SIZES:
        return Opened(content, config, tokenizer, misfit(tokenizer, config.vocab_size))
    why = (
        f"its tokenizer {tokenizer!r} is not known here" if tokenizer else f"no tokenizer is known for a vocabulary of {config.vocab_size}"
    )
    return Opened(content, config, tokenizer, why)


def check_weights(weights: dict[str, Tensor], file: Path):
    """ValueError if these are not a model's weights, or more numbers than the file holds: a small file can describe huge tensors.
    TypeError if they are no state dict."""
    if not isinstance(weights, dict) or not all(isinstance(name, str) and isinstance(p, Tensor) for name, p in weights.items()):
        raise TypeError("no state dict")
    for name, p in weights.items():
        if p.layout != torch.strided or p.device.type != "cpu" or not (p.is_floating_point() or name.endswith(".attn.bias")):
            raise ValueError(f"{file}: {name} is {p.dtype} on {p.device}, and only plain floating-point weights can be loaded")
    if sum(p.nbytes for p in tensors_in(weights).values()) > file.stat().st_size:
        raise ValueError(f"{file} is damaged: its tensors are larger than the file; use another one, or copy it again")


def load_config(path: str, revision: str = "") -> VariantConfig:
    """The config of the model that load_model would load."""
    return open_checkpoint(path, revision).config


def hub_commit(path: str, revision: str) -> str:
    """The hub's commit for a name such as gpt2 at a revision ('' is the newest). Returns '' for a local path."""
    return "" if checkpoint_file(path) or Path(path).is_dir() else hf_folder(path, revision or None).name


def fingerprint(path: str, revision: str = "") -> str:
    """Returns a sha256 that says whether a model is still the same: of its .pt file, or of a Hugging Face folder's config and weights."""
    if file := checkpoint_file(path):
        return sha256(file)
    folder = hf_folder(path, revision or None)
    hashes = [sha256(file) for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def load_gpt(path: str, revision: str = "") -> tuple[GPT, Opened]:
    """Loads a model on the CPU. Returns it with what open_checkpoint says about it."""
    opened = open_checkpoint(path, revision)
    if opened.content is None:
        return GPT.from_pretrained(path, revision or None), opened
    weights = opened.content["model"]
    check_fit(opened.config, weights, path)
    model = build(opened.config)
    load_weights(model, weights, path)
    return model, opened


def load_model(path: str, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer | None]:
    """Loads a model in eval mode. Returns it with its tokenizer (None if the model has another one, or it is unknown).

    path: a checkpoint.pt, a run's folder, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl.
    ValueError if it is missing, damaged, or its weights don't fit its config.
    """
    model, opened = load_gpt(str(path))
    return model.to(device).eval(), None if opened.no_tokenizer else get_tokenizer(opened.tokenizer)


def load_with_tokenizer(path: str, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer]:
    """load_model for scripts that need a tokenizer. ValueError if none fits."""
    model, opened = load_gpt(str(path))
    if opened.no_tokenizer:
        raise ValueError(f"{path}: {opened.no_tokenizer}; use it only with export.py, or with train.py --init-from on shards with its ids")
    return model.to(device).eval(), get_tokenizer(opened.tokenizer)


def seal_of(folder: Path, step: int) -> str:
    """The text of a checkpoint's seal, '' if it has none."""
    seal = files_of(folder, step).seal
    return seal.read_text(encoding="utf-8") if seal.exists() else ""


def load_training(folder: Path, step: int) -> tuple[dict, dict]:
    """Loads both files of a checkpoint: (model, state). newest_step must have verified it."""
    files = files_of(folder, step)
    return load_torch(files.model), load_torch(files.state)


def check_fit(config: VariantConfig, state: dict, source):
    """ValueError if the weights don't fit a model of this config. Allocates no model: a damaged config may ask for terabytes."""
    if config.n_layer // config.share_layers * config.n_expert > len(state):
        layers = f"{config.n_layer} layers of {config.n_expert} experts"
        raise ValueError(f"{source} does not fit the model: its config has {layers}, its weights are {len(state)} tensors")
    matched(build_on_meta(config), state, source)


@torch.no_grad()
def load_weights(model: GPT, state: dict, source):
    """Copies a state dict into the model. ValueError names the first parameter that does not fit. source: for that message."""
    own = model.state_dict()
    for name, p in matched(model, state, source).items():
        own[name].copy_(p)


def matched(model: GPT, state: dict, source) -> dict[str, Tensor]:
    """Returns the state dict with the model's padding rows. ValueError names the first parameter that does not fit."""
    own, state = model.state_dict(), dict(state)
    pad_tables(model, state)
    if unmatched := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{source} does not fit the model: only one of them has {unmatched[0]}; use another checkpoint")
    for name, p in own.items():
        if p.shape != state[name].shape:
            shapes = f"{name} is {tuple(state[name].shape)} there, {tuple(p.shape)} here"
            raise ValueError(f"{source} does not fit the model: {shapes}; use another checkpoint")
    return state
