"""Turns documents into tokens, and tokens into shards.

    python fineweb.py                                          # FineWeb-Edu's 10 B token sample, streamed from the hub
    python fineweb.py --dataset docs/ more.jsonl.gz --out-dir mine    # your own .parquet .jsonl(.gz) .txt .md .py
    python fineweb.py --name sample-100BT --out-dir edu_fineweb100B --part 3/8      # on the third of eight machines
    python fineweb.py --pretokenized --out-dir fineweb10B      # ready GPT-2 shards: download only

Kill it whenever you like. Run the same command again: it continues where it stopped.
"""

import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from common import cli
from common.files import lock_folder, read_json, sha256, write_json
from common.tokenizer import VOCAB_SIZES, fast_encode, get_tokenizer, tokenize
from common.validation import raise_errors
from dataloader import MANIFEST, REMEDY, open_shard, part_folder, part_folders, split_of, write_shard

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
PRETOKENIZED = "kjj0/fineweb10B-gpt2"
PROGRESS = "progress.json"
CHUNK_CHARS = 1 << 20  # one worker's unit of work


@dataclass
class PrepareConfig:
    """Turn documents into shards of tokens for train.py."""

    dataset: tuple[str, ...] = (FINEWEB_EDU,)
    """A dataset on the hub, 'stdlib' (Python's own standard library), or local files and folders."""
    name: str = "sample-10BT"
    """Configuration of the hub's dataset; '' takes its default."""
    revision: str = ""
    """Branch, tag or commit on the hub. fineweb.py records the commit and keeps it on resume."""
    out_dir: str = "edu_fineweb10B"
    """Folder for the shards."""
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    """gpt2 is GPT-2's BPE (50,257 ids). bytes has one id per byte (257)."""
    shard_size: int = 100_000_000
    """Tokens per shard."""
    max_tokens: int = 0
    """Stop after this many tokens; 0 takes all. Parts divide them equally."""
    workers: int = 0
    """Threads that tokenize (processes, if gigatoken is not installed); 0 is one per core."""
    part: str = ""
    """Take one block of the dataset's files: 3/8 is the third of eight. The last part joins them all; so does a run without --part."""
    pretokenized: bool = False
    """Download ready .bin shards (kjj0/fineweb10B-gpt2) instead of tokenizing."""

    @property
    def part_range(self) -> tuple[int, int]:
        """Returns --part as (index from 0, number of parts); (0, 1) without --part."""
        number, count = map(int, (self.part or "1/1").split("/"))
        return number - 1, count

    def errors(self) -> list[str]:
        errors = cli.at_least(1, self, "shard_size") + cli.at_least(0, self, "max_tokens", "workers")
        if not self.dataset:
            errors.append("--dataset has no value: give files, folders, 'stdlib', or one dataset on the hub")
        if self.shard_size > 10**9:
            errors.append(f"--shard-size is {self.shard_size}: it must be at most 1,000,000,000, memory holds two shards")
        if self.part and not (re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.part) and self.part_range[0] < self.part_range[1]):
            errors.append(f"--part is {self.part}: give it as 3/8, the third of eight")
        if self.part and self.pretokenized:
            errors.append("--part does not work with --pretokenized: leave one of them out")
        return errors


# ---- documents ----


def check_part_count(part_range: tuple[int, int], n_files: int):
    index, count = part_range
    if count > n_files:
        raise ValueError(f"--part {index + 1}/{count} is too fine, the dataset has {n_files} files: make at most {n_files} parts")


class LocalDocuments:
    """Iterates over the documents of local files, in order. part_range (index, count) takes one of `count` blocks of the files.

    The state is the current file and how many of its documents were read. So a resumed run does not open the files before it.
    """

    def __init__(self, files: list[Path], part_range: tuple[int, int] = (0, 1)):
        index, count = part_range
        check_part_count(part_range, len(files))
        listing = [f"{path.name} {path.stat().st_size}" for path in files]
        self.revision = "files-" + hashlib.sha256("\n".join(listing).encode(errors="surrogateescape")).hexdigest()[:16]
        self.files = files[index * len(files) // count : (index + 1) * len(files) // count]
        self.file, self.done = 0, 0

    def state(self) -> dict:
        return {"file": self.file, "documents": self.done}

    def load_state(self, state: dict):
        self.file, self.done = state.get("file", 0), state["documents"]  # older states count documents from the first file

    def __iter__(self) -> Iterator[str]:
        first, to_skip = self.file, self.done
        for file in range(first, len(self.files)):
            for done, text in enumerate(read_file(self.files[file]), 1):
                if to_skip:
                    to_skip -= 1
                else:
                    self.file, self.done = file, done
                    yield text


READABLE = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".md", ".py")


def read_file(path: Path) -> Iterator[str]:
    """Yields a file's documents: each row of .parquet, each line of .jsonl (field 'text'), or a whole .txt, .md or .py file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024, columns=["text"]):
                for text in batch.column("text").to_pylist():
                    yield require_text(text, str(path))
        except (pyarrow.ArrowException, OSError, KeyError, IndexError) as e:
            raise ValueError(f"can't read {path} as parquet with a column 'text' ({e}): download it again or leave it out") from e
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield require_text(parse_line(line), f"{path}, line {number}")
            except (gzip.BadGzipFile, EOFError, zlib.error) as e:
                raise ValueError(f"{path} is truncated or damaged ({e}): download it again or leave it out") from e
    else:
        yield path.read_text(encoding="utf-8", errors="replace")


def parse_line(line: str):
    """Returns the field 'text' of a line of JSON, or None."""
    try:
        return json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def require_text(text, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: the field 'text' is missing or not a string: fix or remove this document")
    return text


def local_files(paths: list[Path]) -> list[Path]:
    """Lists the files, and all readable files below each folder, sorted by name."""
    files = []
    for path in paths:
        if not path.is_dir() and not (path.is_file() and path.name.endswith(READABLE)):
            raise ValueError(f"can't read {path}: give a folder, or a file that ends in {' '.join(READABLE)}")
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(READABLE)) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path} contains no {' '.join(READABLE)} files: give another folder")
        files += found
    return files


def stdlib_files() -> list[Path]:
    """Lists the files of Python's standard library. They are sorted by a hash of the name, so that the val shard is a fair sample."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for pattern in ("*.py", "*.txt") for path in root.rglob(pattern))
    files = (path for path in files if not {"site-packages", "dist-packages", "__pycache__"} & set(path.parts))
    return [root / path for path in sorted(files, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())]


HUB_TIMEOUT = 30  # seconds without a byte; dataset_info has no limit by default


def hub_info(repo: str, revision: str, problem: str, remedy: str, **kwargs):
    """Asks the hub for a dataset's commit and files at a revision; '' is the newest."""
    from huggingface_hub import HfApi

    return retry(problem, remedy, busy, HfApi().dataset_info, repo, revision=revision or None, timeout=HUB_TIMEOUT, **kwargs)


def retry(problem: str, remedy: str, is_temporary: Callable[[Exception], bool], call: Callable, *args, **kwargs):
    """Returns the call's result. Tries again after temporary failures; any other failure is a ValueError."""
    for failures in itertools.count(1):
        try:
            return call(*args, **kwargs)
        except Exception as e:  # the hub's client raises dozens of types
            if cli.disk_failed(e):
                raise
            if not is_temporary(e):
                raise ValueError(f"{problem} ({brief(e)}): {remedy}") from e
            back_off(problem, e, failures)


def back_off(problem: str, e: Exception, failures: int):
    """Sleeps before the next attempt. ValueError after too many failures. The hub's client has already retried each attempt
    several times, and it respects Retry-After."""
    if failures > 8:
        raise ValueError(f"{problem} ({brief(e)}) after {failures} attempts: run the same command again later") from e
    print(f"{problem} ({brief(e)}): retrying in {2**failures} s", file=sys.stderr)
    time.sleep(2**failures)


def brief(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip()}".splitlines()[0]


def busy(e: Exception) -> bool:
    """Whether the hub answered that it is overloaded or down for now (408, 429 or 5xx)."""
    status = getattr(getattr(e, "response", None), "status_code", 0)
    return status in (408, 429) or status >= 500


def busy_or_unreachable(e: Exception) -> bool:
    """Whether the hub is busy or did not answer."""
    return busy(e) or (getattr(e, "response", None) is None and not isinstance(e, ValueError))


class HubDocuments:
    """Streams the column 'text' of a dataset on the hub. part_range (index, count) takes one of `count` blocks of its files.
    The state is that of the datasets library."""

    def __init__(self, repo: str, name: str, revision: str, part_range: tuple[int, int] = (0, 1)):
        self.repo, self.name, self.part_range = repo, name, part_range
        problem = f"{repo} is no local path, and looking it up on the hub failed"
        self.revision = hub_info(repo, revision, problem, "check the name, the revision and the network").sha
        self.dataset = retry(f"could not open {repo}", "check --name, --part and the network", busy, self.open)

    def open(self):
        from datasets import load_dataset

        dataset = load_dataset(self.repo, self.name or None, split="train", streaming=True, revision=self.revision, columns=["text"])
        index, count = self.part_range
        check_part_count(self.part_range, dataset.num_shards)  # a shard of datasets is a file
        return dataset.shard(count, index, contiguous=True)

    def state(self) -> dict:
        return self.dataset.state_dict()

    def load_state(self, state: dict):
        self.dataset.load_state_dict(state)

    def __iter__(self) -> Iterator[str]:
        failures = 0
        while True:
            try:
                if failures:  # reconnect and continue from the same document
                    state, self.dataset = self.state(), self.open()
                    self.load_state(state)
                for row in self.dataset:
                    yield require_text(row["text"], self.repo)
                    failures = 0
                return
            except (ValueError, KeyError, TypeError) as e:  # the data is at fault, not the network
                raise ValueError(f"could not read {self.repo} ({brief(e)}): choose a dataset of parquet files with a column 'text'") from e
            except Exception as e:
                if cli.disk_failed(e):
                    raise
                failures += 1
                back_off(f"could not read {self.repo}", e, failures)


def local_documents(config: PrepareConfig) -> LocalDocuments | None:
    """Opens --dataset if it is stdlib or if all its paths exist. None otherwise."""
    if config.dataset == ("stdlib",):
        return LocalDocuments(stdlib_files(), config.part_range)
    paths = [Path(name) for name in config.dataset]
    return LocalDocuments(local_files(paths), config.part_range) if all(path.exists() for path in paths) else None


def open_documents(config: PrepareConfig, revision: str):
    """Opens --dataset, local or on the hub. revision: the commit that an interrupted run recorded, or ''."""
    if documents := local_documents(config):
        return documents
    paths = [Path(name) for name in config.dataset]
    missing = [str(path) for path in paths if not path.exists()]
    if len(paths) == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+", missing[0]) and not missing[0].endswith(READABLE):
        return HubDocuments(missing[0], config.name, revision or config.revision, config.part_range)
    raise ValueError(f"--dataset: {', '.join(missing)} not found: give files, folders, 'stdlib', or one dataset on the hub")


# ---- documents → shards ----


def chunks(documents) -> Iterator[tuple[dict, list[str]]]:
    """Groups documents into chunks of about CHUNK_CHARS. Yields each with the state to load before reading it again."""
    state, texts, size = documents.state(), [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= CHUNK_CHARS:
            yield state, texts
            state, texts, size = documents.state(), [], 0
    if texts:
        yield state, texts


def tokenized(documents, tokenizer_name: str, workers: int) -> Iterator[tuple[dict, np.ndarray]]:
    """Yields each chunk's state and tokens, in order.

    One worker runs in this thread. More workers are threads if there is a fast encoder, since it releases the GIL; otherwise they are
    processes. To bound memory, it prefetches at most 2 · workers chunks.
    """
    if workers == 1:
        for state, texts in chunks(documents):
            yield state, tokenize(tokenizer_name, texts)
        return
    with ThreadPoolExecutor(workers) if fast_encode(tokenizer_name) else processes(workers) as pool:
        pending = deque()
        try:
            for state, texts in chunks(documents):
                pending.append((state, pool.submit(tokenize, tokenizer_name, texts)))
                if len(pending) > 2 * workers:
                    state, result = pending.popleft()
                    yield state, result.result()
            for state, result in pending:
                yield state, result.result()
        except BrokenProcessPool as e:
            raise ValueError("a tokenizing process was killed, probably because memory ran out: try fewer --workers") from e
        finally:
            pool.shutdown(cancel_futures=True)


def processes(workers: int) -> ProcessPoolExecutor:
    # spawn, not fork: a fork copies locks that the threads of the download and the progress bar may hold
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=begin_worker)


def begin_worker():
    """Leaves Ctrl-C and a closed terminal to the parent, and exits when the parent dies."""
    for name in {"SIGINT", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
        signal.signal(getattr(signal, name), signal.SIG_IGN)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def prepare(config: PrepareConfig):
    """Makes the shards in --out-dir, under a lock. A part goes into its own folder there, and parts may run at the same time."""
    out = Path(config.out_dir)
    if config.part:
        make_part(out, config)
    with lock_folder(out, wait=bool(config.part)), explain_full_disk(out):  # wait: another part may be joining
        if config.part or part_folders(out):
            join_parts(out, config)
        elif config.pretokenized:
            fetch_pretokenized(config)
        else:
            tokenize_documents(out, config)


@contextmanager
def explain_full_disk(folder: Path):
    """Adds the free space to the error of a full disk."""
    try:
        yield
    except OSError as e:
        if not cli.disk_failed(e):
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(e.errno, f"{e.strerror}: {folder} has {free:,.0f} MB free, a token takes two bytes") from e


def tokenize_documents(out: Path, config: PrepareConfig):
    """Writes the shards, then the manifest. Resumes after a kill and ends with the same bytes.

    The first shard is for val. A corpus smaller than two shards gives a tenth to val and the rest to train, so two shards are
    gathered in memory before any is written. Only the first of several parts has a val shard.
    """
    get_tokenizer(config.tokenizer)  # fail before downloading data if the vocabulary is missing
    progress = resume_point(out, config)
    if progress is None:
        return
    documents = open_documents(config, progress["revision"])
    if progress["revision"] not in ("", documents.revision):
        raise ValueError(f"the files changed after the first run into {out}: restore them, or choose another --out-dir")
    if progress["state"] is not None:
        documents.load_state(progress["state"])
    progress["revision"] = documents.revision
    write_json(out / PROGRESS, progress)

    shards, size = progress["shards"], config.shard_size
    done = sum(shard["tokens"] for shard in shards)
    index, count = config.part_range
    limit = config.max_tokens * (index + 1) // count - config.max_tokens * index // count
    budget = (limit if config.max_tokens else sys.maxsize) - done
    stream = tokenized(documents, config.tokenizer, config.workers or os.cpu_count() or 1)
    with cli.bar(desc=f"tokenizing into {out}", unit="tok", unit_scale=True, total=limit or None, initial=done) as bar:
        for tokens, resume_from in pack(stream, 2 * size, budget, progress["skip"], bar.update):
            first = size
            if not (index or shards) and len(tokens) < 2 * size:  # the whole corpus
                first = len(tokens) // 10 or 1
            for piece in (tokens[:first], *cut(tokens[first:], size)):
                name = shard_name(config, "train" if index or shards else "val", len(shards))
                shards.append(write_shard(out / name, piece))
            write_json(out / PROGRESS, progress | {"shards": shards, **resume_from})
    if not index and len(shards) < 2:
        for name in (PROGRESS, *(shard["file"] for shard in shards)):
            (out / name).unlink()
        raise ValueError(f"{' '.join(config.dataset)}: not enough tokens for a val and a train shard: give more text")
    write_manifest(out, progress, shards)


def shard_name(config: PrepareConfig, split: str, index: int) -> str:
    prefix = re.sub(r"[^a-z0-9]", "", Path(config.dataset[0]).stem.lower())[:200] or "documents"  # a name has at most 255 bytes
    return f"{prefix}_{split}_{index:06d}.npy"


def cut(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def pack(stream, room: int, budget: int, skip: int, on_tokens: Callable[[int], None]) -> Iterator[tuple[np.ndarray, dict]]:
    """Packs chunks into pieces of `room` tokens; the last may be shorter. Drops the first `skip` tokens, then takes `budget`.
    Yields each piece with the point to resume from after it. on_tokens is called with each number of tokens packed."""
    piece, filled, resume_from = np.empty(room, np.uint16), 0, {}
    for state, tokens in stream:
        taken, skip = skip, 0
        while taken < len(tokens) and budget:
            n = min(len(tokens) - taken, room - filled, budget)
            piece[filled : filled + n] = tokens[taken : taken + n]
            taken, filled, budget = taken + n, filled + n, budget - n
            on_tokens(n)
            resume_from = {"state": state, "skip": taken}
            if filled == room:
                yield piece, resume_from
                filled = 0
        if not budget:
            stream.close()
            break
    if filled:
        yield piece[:filled], resume_from


START_AGAIN = "delete the folder and run the same command again"


def settings_of(config: PrepareConfig) -> dict:
    """Returns the settings that determine the shards' bytes, as JSON types."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("out_dir", "workers")}
    if not config.part:
        del settings["part"]
    return settings | {"dataset": list(config.dataset)}


def is_complete(out: Path, config: PrepareConfig) -> bool:
    """Whether this run's manifest exists; prints so. ValueError if it belongs to other settings or files."""
    if not (out / MANIFEST).exists():
        return False
    manifest, documents = read_json(out / MANIFEST, START_AGAIN), local_documents(config)
    if manifest.get("settings") != settings_of(config):
        raise ValueError(f"{out} has shards made with other settings: choose another --out-dir")
    if documents and documents.revision != manifest["revision"]:
        raise ValueError(f"the files changed since {out} was made from them: choose another --out-dir")
    (out / PROGRESS).unlink(missing_ok=True)  # left by a kill between the last two steps
    print(f"{out} is already complete")
    return True


def resume_point(out: Path, config: PrepareConfig) -> dict | None:
    """Returns the progress to resume from: that of the progress file, or of a new run. None if the folder is complete.
    ValueError if it contains something else."""
    if is_complete(out, config):
        return None
    settings = settings_of(config)
    fresh = {"settings": settings, "revision": "", "shards": [], "state": None, "skip": 0}
    if (out / PROGRESS).exists():
        progress = read_json(out / PROGRESS, START_AGAIN)
        if progress.keys() != fresh.keys():
            raise ValueError(f"{out / PROGRESS} is damaged: {START_AGAIN}")
        if not progress["shards"]:  # nothing to lose, so settings may change; keep the recorded commit of the hub
            same = progress["settings"] == settings and not progress["revision"].startswith("files-")
            return fresh | {"revision": progress["revision"]} if same else fresh
        if progress["settings"] != settings:
            raise ValueError(f"{out} has an unfinished run with other settings: use the same settings, or choose another --out-dir")
        return progress
    if any(path.suffix in (".npy", ".bin") for path in out.iterdir()):
        raise ValueError(f"{out} has shards that this command did not make: choose another --out-dir")
    return fresh


def write_manifest(out: Path, progress: dict, shards: list[dict]):
    """Writes the manifest, the last step: from now on the folder is complete."""
    settings = progress["settings"]
    manifest = {
        "tokenizer": settings["tokenizer"],
        "vocab_size": VOCAB_SIZES[settings["tokenizer"]],
        "source": " ".join(settings["dataset"]),
        "revision": progress["revision"],
        "tokens": sum(shard["tokens"] for shard in shards),
        "settings": settings,
        "shards": shards,
    }
    write_json(out / MANIFEST, manifest)
    (out / PROGRESS).unlink(missing_ok=True)
    val_tokens = sum(shard["tokens"] for shard in shards if split_of(shard["file"]) == "val")
    print(f"{out}: {manifest['tokens']:,} tokens in {len(shards)} shards, {val_tokens:,} of them for validation")


# ---- parts → one set of shards ----


def make_part(out: Path, config: PrepareConfig):
    """Tokenizes a part into its folder. Does nothing if all parts are already joined."""
    index, count = config.part_range
    folder = part_folder(out, index, count)
    with lock_folder(folder), explain_full_disk(folder):
        if (out / MANIFEST).exists():
            return
        if (out / PROGRESS).exists():
            raise ValueError(f"{out} has an unfinished run without --part: finish it, or choose another --out-dir")
        count_of_parts(out)
        tokenize_documents(folder, config)


def count_of_parts(out: Path) -> int:
    """Returns the number of parts, from the names of their folders."""
    counts = set(part_folders(out).values())
    if len(counts) > 1:
        raise ValueError(f"{out} mixes parts of {' and of '.join(map(str, sorted(counts)))}: move one kind elsewhere")
    return counts.pop()


def join_parts(out: Path, config: PrepareConfig):
    """Moves the shards of all parts into --out-dir, in order, and writes the manifest. Resumes after a kill.
    If parts are missing, it prints them; without --part it raises a ValueError."""
    if not is_complete(out, replace(config, part="")):
        count = count_of_parts(out)
        folders = [part_folder(out, index, count) for index in range(count)]
        if missing := [folder.name for folder in folders if not (folder / MANIFEST).exists()]:
            return report_missing_parts(out, config, missing)
        manifests = [read_json(folder / MANIFEST, START_AGAIN) for folder in folders]
        check_parts_match(config, folders, manifests)
        shards = move_shards(out, config, folders, manifests)
        settings = {key: value for key, value in manifests[0]["settings"].items() if key != "part"}
        write_manifest(out, {"settings": settings, "revision": manifests[0]["revision"]}, shards)
    for folder in part_folders(out):  # some may remain from a kill
        shutil.rmtree(folder)


def report_missing_parts(out: Path, config: PrepareConfig, missing: list[str]):
    some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
    todo = f"{out} still lacks {some}: make them with --part or copy their folders there, then run the same command without --part"
    if not config.part:
        raise ValueError(todo)
    print(todo)


def check_parts_match(config: PrepareConfig, folders: list[Path], manifests: list[dict]):
    """ValueError if parts differ in their settings from ours, or in their data from each other."""

    def comparable(settings: dict) -> dict:
        return {key: value for key, value in settings.items() if key not in ("part", "revision")}

    ours, revision, errors = comparable(settings_of(config)), manifests[0]["revision"], []
    for folder, manifest in zip(folders, manifests, strict=True):
        if comparable(manifest["settings"]) != ours:
            errors.append(f"{folder} was made with other settings: use the same, or move it away and make that part again")
        if manifest["revision"] != revision:
            errors.append(
                f"{folder} was made from {manifest['revision']}, {folders[0]} from {revision}: "
                "move one away and make it again from the same data"
            )
    raise_errors(errors)


def move_shards(out: Path, config: PrepareConfig, folders: list[Path], manifests: list[dict]) -> list[dict]:
    """Renames the parts' shards into --out-dir and returns their entries for the manifest. ValueError if a shard is missing or
    damaged, before any is renamed."""
    moves, shards = [], []
    for folder, manifest in zip(folders, manifests, strict=True):
        for entry in manifest["shards"]:
            split = split_of(entry["file"])
            shards.append(entry | {"file": shard_name(config, split, len(shards))})
            source, target = folder / entry["file"], out / shards[-1]["file"]
            if target.exists() and not source.exists():  # already renamed before a kill
                open_shard(out, shards[-1])
                continue
            open_shard(folder, entry)
            if target.exists():
                raise ValueError(f"{target} is in the way of {source}: move it elsewhere")
            moves.append((source, target))
    for source, target in moves:
        os.replace(source, target)
    return shards


# ---- ready shards ----


def fetch_pretokenized(config: PrepareConfig):
    """Downloads .bin shards from the hub until they have --max-tokens train tokens. Skips files that are already there."""
    from huggingface_hub import hf_hub_download

    out = Path(config.out_dir)
    repo = PRETOKENIZED if config.dataset == (FINEWEB_EDU,) else config.dataset[0]
    config = PrepareConfig(**asdict(config) | {"dataset": (repo,), "name": "", "tokenizer": "gpt2"})
    progress = resume_point(out, config)
    if progress is None:
        return
    for orphan in (out / ".cache").rglob("*.incomplete"):  # a killed hub client leaves them and never resumes them
        orphan.unlink()
    problem, remedy = f"could not fetch {repo} from the hub", "check the name and the network, then run the same command again"
    info = hub_info(repo, progress["revision"] or config.revision, problem, remedy, files_metadata=True)
    progress["revision"] = info.sha
    write_json(out / PROGRESS, progress)
    files = {file.rfilename: file.lfs for file in info.siblings if file.rfilename.endswith(".bin")}
    if not files:
        raise ValueError(f"{repo} has no .bin shards: leave out --dataset or --pretokenized")
    shards, train_tokens = [], 0
    for file in cli.bar(sorted(files, key=lambda file: (split_of(file) != "val", file)), desc=f"downloading into {out}", unit="shard"):
        if config.max_tokens and train_tokens >= config.max_tokens:
            break
        problem = f"could not fetch {file} of {repo} from the hub"
        retry(problem, remedy, busy_or_unreachable, hf_hub_download, repo, file, repo_type="dataset", revision=info.sha, local_dir=out)
        shards.append(check_download(out, file, files[file] and files[file].sha256))
        train_tokens += shards[-1]["tokens"] if split_of(file) != "val" else 0
    write_manifest(out, progress, shards)


def check_download(out: Path, file: str, expected: str | None) -> dict:
    """Returns the manifest entry of a downloaded file. Deletes a damaged file, since the hub's client would keep it forever.
    expected: the hub's sha256, if it has one."""
    try:
        entry = {"file": file, "tokens": len(open_shard(out, {"file": file})), "sha256": sha256(out / file)}
        if expected not in (None, entry["sha256"]):
            raise ValueError(f"shard {out / file} is damaged (its sha256 is not the hub's)")
        return entry
    except ValueError as e:
        (out / file).unlink()
        fault = str(e).removesuffix(f": {REMEDY}")
        raise ValueError(f"{fault}: deleted it, run the same command again to download it") from e


def main():
    cli.exit_on_stop_signals()  # shuts the pool down cleanly
    with cli.one_line_errors(cli.AGAIN, "pass fewer --workers or a smaller --shard-size"):
        config = cli.parse(PrepareConfig)
        raise_errors(config.errors())
        prepare(config)


if __name__ == "__main__":
    main()
