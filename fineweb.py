"""Documents → tokens → shards.

    python fineweb.py                                          # FineWeb-Edu's 10 B token sample, streamed from the hub
    python fineweb.py --dataset docs/ more.jsonl.gz --out-dir mine    # your own .parquet .jsonl(.gz) .txt .md .py
    python fineweb.py --name sample-100BT --out-dir edu_fineweb100B --part 3/8      # on the third of eight machines
    python fineweb.py --pretokenized --out-dir fineweb10B      # ready GPT-2 shards, nothing to tokenize

A prep that was killed goes on where it stopped when the same command is given again.
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
CHUNK_CHARS = 1 << 20  # what a worker tokenizes at a time


@dataclass
class PrepareConfig:
    """Turn documents into shards of tokens for train.py."""

    dataset: tuple[str, ...] = (FINEWEB_EDU,)
    """A dataset on the hub, 'stdlib' (the running Python's own library), or local files and folders."""
    name: str = "sample-10BT"
    """Which configuration of the hub's dataset; '' for its default."""
    revision: str = ""
    """Branch, tag or commit on the hub; the commit it resolves to is recorded and kept."""
    out_dir: str = "edu_fineweb10B"
    """Where the shards go."""
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    """GPT-2's BPE (50,257 ids), or one id a byte (257)."""
    shard_size: int = 100_000_000
    """Tokens in a shard."""
    max_tokens: int = 0
    """Stop after so many tokens, each part after its share of them; 0 takes all."""
    workers: int = 0
    """Threads (without gigatoken: processes) that tokenize; 0 is one a core."""
    part: str = ""
    """Take only this part of the dataset's files, as 3/8, the third of eight blocks: for several processes or machines. When all
    parts are in --out-dir, the last to finish, or the same command without --part, joins them."""
    pretokenized: bool = False
    """Download ready .bin shards (kjj0/fineweb10B-gpt2) instead of tokenizing."""

    @property
    def part_range(self) -> tuple[int, int]:
        """--part as (its number from 0, how many there are); the whole is the only one."""
        number, count = map(int, (self.part or "1/1").split("/"))
        return number - 1, count

    def errors(self) -> list[str]:
        errors = cli.at_least(1, self, "shard_size") + cli.at_least(0, self, "max_tokens", "workers")
        if not self.dataset:
            errors.append("--dataset has no value: give files, folders, 'stdlib', or one dataset of the hub")
        if self.shard_size > 10**9:
            errors.append(f"--shard-size is {self.shard_size}: two shards are held in memory, it must be at most 1,000,000,000")
        if self.part and not (re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.part) and self.part_range[0] < self.part_range[1]):
            errors.append(f"--part is {self.part}: give it as 3/8, the third of eight")
        if self.part and self.pretokenized:
            errors.append("--part is for documents: leave it out, or --pretokenized")
        return errors


# ---- documents ----


def check_part_count(part_range: tuple[int, int], n_files: int):
    index, count = part_range
    if count > n_files:
        raise ValueError(f"--part {index + 1}/{count} of {n_files} files: make at most {n_files} parts")


class LocalDocuments:
    """The documents of local files, in order, or of a share (index, count) of them: one of `count` blocks of files.
    Its state is the file that was read last, and how many documents of it: no file before it is opened again."""

    def __init__(self, files: list[Path], part_range: tuple[int, int] = (0, 1)):
        index, count = part_range
        check_part_count(part_range, len(files))
        listing = [f"{path.name} {path.stat().st_size}" for path in files]
        self.revision = "files-" + hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]
        self.files = files[index * len(files) // count : (index + 1) * len(files) // count]
        self.file, self.done = 0, 0

    def state(self) -> dict:
        return {"file": self.file, "documents": self.done}

    def load_state(self, state: dict):
        self.file, self.done = state.get("file", 0), state["documents"]  # before parts, all were counted from the first file

    def __iter__(self) -> Iterator[str]:
        first, already = self.file, self.done
        for file in range(first, len(self.files)):
            for done, text in enumerate(read_file(self.files[file]), 1):
                if already:
                    already -= 1
                else:
                    self.file, self.done = file, done
                    yield text


READABLE = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".md", ".py")


def read_file(path: Path) -> Iterator[str]:
    """A .txt, .md or .py file is one document; a line of .jsonl and a row of .parquet are one each (field 'text')."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024, columns=["text"]):
                for text in batch.column("text").to_pylist():
                    yield require_text(text, str(path))
        except (pyarrow.ArrowException, OSError, KeyError, IndexError) as e:
            raise ValueError(f"{path} can't be read as parquet with a column 'text' ({e}): fetch it again or leave it out") from e
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield require_text(parse_line(line), f"{path}, line {number}")
            except (gzip.BadGzipFile, EOFError, zlib.error) as e:
                raise ValueError(f"{path} is not whole ({e}): fetch it again or leave it out") from e
    else:
        yield path.read_text(encoding="utf-8", errors="replace")


def parse_line(line: str):
    """The field 'text' of a line of JSON, or None."""
    try:
        return json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def require_text(text, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: a document without a field 'text' that is text: mend or remove it")
    return text


def local_files(paths: list[Path]) -> list[Path]:
    """Files as given; of a folder all readable ones below it, by name."""
    files = []
    for path in paths:
        if not path.is_dir() and not (path.is_file() and path.name.endswith(READABLE)):
            raise ValueError(f"{path}: only {' '.join(READABLE)} files are read")
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(READABLE)) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path} has no {' '.join(READABLE)} file in it")
        files += found
    return files


def stdlib_files() -> list[Path]:
    """The running Python's standard library, shuffled by name so that the val shard is a fair sample of it."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for pattern in ("*.py", "*.txt") for path in root.rglob(pattern))
    files = (path for path in files if not {"site-packages", "dist-packages", "__pycache__"} & set(path.parts))
    return [root / path for path in sorted(files, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())]


HUB_TIMEOUT = 30  # seconds without a byte, for a call of the hub's client that has no limit of its own


def hub_info(repo: str, revision: str, problem: str, remedy: str, **how):
    """What the hub says of a dataset at a revision, or '' for its newest: commit and files."""
    from huggingface_hub import HfApi

    return retry(problem, remedy, busy, HfApi().dataset_info, repo, revision=revision or None, timeout=HUB_TIMEOUT, **how)


def retry(problem: str, remedy: str, passes: Callable[[Exception], bool], call: Callable, *args, **how):
    """What the call gives in the end, however often it fails with what passes. The hub's client raises dozens of kinds."""
    for failures in itertools.count(1):
        try:
            return call(*args, **how)
        except Exception as e:
            if cli.disk_failed(e):
                raise
            if not passes(e):
                raise ValueError(f"{problem} ({brief(e)}): {remedy}") from e
            wait(problem, e, failures)


def wait(problem: str, e: Exception, failures: int):
    """Until the next attempt, unless there were enough. The hub's client itself has tried several times before, no sooner
    than Retry-After says."""
    if failures > 8:
        raise ValueError(f"{problem} ({brief(e)}), {failures} times: give the command again later to go on") from e
    print(f"{problem} ({brief(e)}): trying again in {2**failures} s", file=sys.stderr)
    time.sleep(2**failures)


def brief(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip()}".splitlines()[0]


def busy(e: Exception) -> bool:
    """Whether the hub answered, but not yet: with 429 or 5xx."""
    status = getattr(getattr(e, "response", None), "status_code", 0)
    return status in (408, 429) or status >= 500


def busy_or_away(e: Exception) -> bool:
    """The same, or there was no answer."""
    return busy(e) or (getattr(e, "response", None) is None and not isinstance(e, ValueError))


class HubDocuments:
    """A dataset streamed from the hub, one text column of it, or of a share (index, count) of its files: one of `count` blocks.
    Its state is the dataset's own."""

    def __init__(self, repo: str, name: str, revision: str, part_range: tuple[int, int] = (0, 1)):
        self.repo, self.name, self.part_range = repo, name, part_range
        problem = f"there is no file or folder {repo} here, and it could not be found on the hub"
        self.revision = hub_info(repo, revision, problem, "check the name, the revision and the network").sha
        self.dataset = retry(f"{repo} could not be opened", "check --name, --part and the network", busy, self.open)

    def open(self):
        from datasets import load_dataset

        dataset = load_dataset(self.repo, self.name or None, split="train", streaming=True, revision=self.revision, columns=["text"])
        index, count = self.part_range
        check_part_count(self.part_range, dataset.num_shards)  # what datasets calls a shard is a file
        return dataset.shard(count, index, contiguous=True)

    def state(self) -> dict:
        return self.dataset.state_dict()

    def load_state(self, state: dict):
        self.dataset.load_state_dict(state)

    def __iter__(self) -> Iterator[str]:
        failures = 0
        while True:
            try:
                if failures:  # the state outlives the connection
                    state, self.dataset = self.state(), self.open()
                    self.load_state(state)
                for row in self.dataset:
                    yield require_text(row["text"], self.repo)
                    failures = 0
                return
            except (ValueError, KeyError, TypeError) as e:  # not the network's fault
                raise ValueError(
                    f"{self.repo} could not be read ({brief(e)}): choose a dataset of parquet files with a column 'text'"
                ) from e
            except Exception as e:
                if cli.disk_failed(e):
                    raise
                failures += 1
                wait(f"{self.repo} could not be read", e, failures)


def local_documents(config: PrepareConfig) -> LocalDocuments | None:
    """The documents that --dataset names when they are all here."""
    if config.dataset == ("stdlib",):
        return LocalDocuments(stdlib_files(), config.part_range)
    paths = [Path(name) for name in config.dataset]
    return LocalDocuments(local_files(paths), config.part_range) if all(path.exists() for path in paths) else None


def open_documents(config: PrepareConfig, revision: str):
    """The documents that --dataset names. revision: the one recorded by a prep to go on with, or ''."""
    if documents := local_documents(config):
        return documents
    paths = [Path(name) for name in config.dataset]
    missing = [str(path) for path in paths if not path.exists()]
    if len(paths) == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+", missing[0]) and not missing[0].endswith(READABLE):
        return HubDocuments(missing[0], config.name, revision or config.revision, config.part_range)
    raise ValueError(f"--dataset: {', '.join(missing)} not found: give files, folders, 'stdlib', or one dataset of the hub")


# ---- documents → shards ----


def chunks(documents) -> Iterator[tuple[dict, list[str]]]:
    """Documents in groups of about CHUNK_CHARS, each with the state to read it again from."""
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
    """Each chunk's state and tokens, in order. One worker is this thread. More are threads where the encoder runs without
    Python's lock, else spawned processes; few chunks ahead of need."""
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
            raise ValueError("a tokenizing process was killed, by want of memory as a rule: try fewer --workers") from e
        finally:
            pool.shutdown(cancel_futures=True)


def processes(workers: int) -> ProcessPoolExecutor:
    # spawned, not forked: a fork copies the locks that the download's and the progress bar's threads may hold
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=begin_worker)


def begin_worker():
    """Ctrl-C is the parent's to handle; and when the parent is gone, a worker goes too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def prepare(config: PrepareConfig):
    """Fills --out-dir, as its only writer; a part is written into a folder of its own there, beside others."""
    out = Path(config.out_dir)
    if config.part:
        make_part(out, config)
    with lock_folder(out, wait=bool(config.part)), explain_full_disk(out):  # another part may be joining them
        if config.part or part_folders(out):
            join_parts(out, config)
        elif config.pretokenized:
            fetch_pretokenized(config)
        else:
            tokenize_documents(out, config)


@contextmanager
def explain_full_disk(folder: Path):
    """Has the error of a full disk say how much room there is."""
    try:
        yield
    except OSError as e:
        if not cli.disk_failed(e):
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(e.errno, f"{e.strerror}: {folder} has {free:,.0f} MB free, a token takes two bytes") from e


def tokenize_documents(out: Path, config: PrepareConfig):
    """Writes the shards and, last, the manifest. Given again after a kill, it goes on and ends with the same bytes.

    Two shards are gathered before they are written, so that a corpus of less than two can still be divided: a tenth of
    it is for val, the rest for train. Of a larger one the first shard is for val. Of several parts only the first has one.
    """
    get_tokenizer(config.tokenizer)  # before anything is downloaded
    progress = resume_point(out, config)
    if progress is None:
        return
    documents = open_documents(config, progress["revision"])
    if progress["revision"] not in ("", documents.revision):
        raise ValueError(f"the files have changed since this prep of {out} began: delete the folder and begin again")
    if progress["state"] is not None:
        documents.load_state(progress["state"])
    progress["revision"] = documents.revision
    write_json(out / PROGRESS, progress)

    shards, size = progress["shards"], config.shard_size
    done = sum(shard["tokens"] for shard in shards)
    index, count = config.part_range
    limit = config.max_tokens * (index + 1) // count - config.max_tokens * index // count
    budget = (limit if config.max_tokens else sys.maxsize) - done
    stream = tokenized(documents, config.tokenizer, config.workers or os.cpu_count())
    with cli.bar(desc=f"tokenizing into {out}", unit="tok", unit_scale=True, total=limit or None, initial=done) as bar:
        for tokens, resume_from in pack(stream, 2 * size, budget, progress["skip"], bar.update):
            first = size
            if not (index or shards) and len(tokens) < 2 * size:  # this is the whole corpus
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
    prefix = re.sub(r"[^a-z0-9]", "", Path(config.dataset[0]).stem.lower()) or "documents"
    return f"{prefix}_{split}_{index:06d}.npy"


def cut(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def pack(stream, room: int, budget: int, skip: int, count: Callable[[int], None]) -> Iterator[tuple[np.ndarray, dict]]:
    """The first `budget` tokens of the stream, after the `skip` first, in pieces of `room`, the last as long as it comes;
    with each piece the point to resume after it. count: told of every tokens that went in."""
    piece, filled, resume_from = np.empty(room, np.uint16), 0, {}
    for state, tokens in stream:
        taken, skip = skip, 0
        while taken < len(tokens) and budget:
            n = min(len(tokens) - taken, room - filled, budget)
            piece[filled : filled + n] = tokens[taken : taken + n]
            taken, filled, budget = taken + n, filled + n, budget - n
            count(n)
            resume_from = {"state": state, "skip": taken}
            if filled == room:
                yield piece, resume_from
                filled = 0
        if not budget:
            stream.close()
            break
    if filled:
        yield piece[:filled], resume_from


START_AGAIN = "delete the folder and begin again"


def settings_of(config: PrepareConfig) -> dict:
    """What decides a prep's bytes, as JSON gives it back."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("out_dir", "workers")}
    if not config.part:
        del settings["part"]
    return settings | {"dataset": list(config.dataset)}


def is_complete(out: Path, config: PrepareConfig) -> bool:
    """Whether this prep's manifest is there, and says so. ValueError when it is another's."""
    if not (out / MANIFEST).exists():
        return False
    manifest, documents = read_json(out / MANIFEST, START_AGAIN), local_documents(config)
    if manifest.get("settings") != settings_of(config):
        raise ValueError(f"{out} holds shards made with other settings: choose another --out-dir, or delete it")
    if documents and documents.revision != manifest["revision"]:
        raise ValueError(f"the files have changed since {out} was made of them: choose another --out-dir, or delete it")
    (out / PROGRESS).unlink(missing_ok=True)  # of a kill between the last two steps
    print(f"{out} is complete already")
    return True


def resume_point(out: Path, config: PrepareConfig) -> dict | None:
    """Where a prep in this folder stands: from the start, from its progress file, or None when it is complete.
    ValueError when the folder holds something else."""
    if is_complete(out, config):
        return None
    settings = settings_of(config)
    fresh = {"settings": settings, "revision": "", "shards": [], "state": None, "skip": 0}
    if (out / PROGRESS).exists():
        progress = read_json(out / PROGRESS, START_AGAIN)
        if progress.keys() != fresh.keys():
            raise ValueError(f"{out / PROGRESS} is damaged: {START_AGAIN}")
        if not progress["shards"]:  # nothing that could be lost; but a commit of the hub stays the one that was recorded
            same = progress["settings"] == settings and not progress["revision"].startswith("files-")
            return fresh | {"revision": progress["revision"]} if same else fresh
        if progress["settings"] != settings:
            raise ValueError(f"{out} holds an unfinished prep with other settings: give the same ones, or delete it")
        return progress
    if any(path.suffix in (".npy", ".bin") for path in out.iterdir()):
        raise ValueError(f"{out} holds shards that this command did not make: choose another --out-dir")
    return fresh


def write_manifest(out: Path, progress: dict, shards: list[dict]):
    """The last step of a prep: from here on the folder counts as complete."""
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
    """Tokenizes a part into its folder, unless all parts were joined already."""
    index, count = config.part_range
    folder = part_folder(out, index, count)
    with lock_folder(folder), explain_full_disk(folder):
        if (out / MANIFEST).exists():
            return
        if (out / PROGRESS).exists():
            raise ValueError(f"{out} holds an unfinished prep without --part: finish that, choose another --out-dir, or delete it")
        count_of_parts(out)
        tokenize_documents(folder, config)


def count_of_parts(out: Path) -> int:
    """How many parts there are to be, by the names of their folders."""
    counts = set(part_folders(out).values())
    if len(counts) > 1:
        raise ValueError(f"{out} holds parts of {' and of '.join(map(str, sorted(counts)))}: delete all folders of the ones or the others")
    return counts.pop()


def join_parts(out: Path, config: PrepareConfig):
    """Puts the shards of all parts into --out-dir in order and writes the manifest. Given again after a kill, it goes on.
    While parts are missing, one that has been made says so, and the command for all ends with a ValueError."""
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
    for folder in part_folders(out):  # also of a kill before this step
        shutil.rmtree(folder)


def report_missing_parts(out: Path, config: PrepareConfig, missing: list[str]):
    some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
    todo = f"{out} still lacks {some}: make them with --part, or copy their folders there; then the same command without --part joins all"
    if not config.part:
        raise ValueError(todo)
    print(todo)


def check_parts_match(config: PrepareConfig, folders: list[Path], manifests: list[dict]):
    """ValueError when parts are not of one dataset at one revision, or not made with these settings."""

    def comparable(settings: dict) -> dict:
        return {key: value for key, value in settings.items() if key not in ("part", "revision")}

    ours, revision, errors = comparable(settings_of(config)), manifests[0]["revision"], []
    for folder, manifest in zip(folders, manifests, strict=True):
        if comparable(manifest["settings"]) != ours:
            errors.append(f"{folder} was made with other settings: give the same, or delete it and make that part again")
        if manifest["revision"] != revision:
            errors.append(
                f"{folder} was made of {manifest['revision']}, {folders[0]} of {revision}: delete it and make that part again of the same"
            )
    raise_errors(errors)


def move_shards(out: Path, config: PrepareConfig, folders: list[Path], manifests: list[dict]) -> list[dict]:
    """Renames the parts' shards, and returns their entries for the manifest of all. A missing or damaged one is a ValueError
    before the first is renamed."""
    moves, shards = [], []
    for folder, manifest in zip(folders, manifests, strict=True):
        for entry in manifest["shards"]:
            split = split_of(entry["file"])
            shards.append(entry | {"file": shard_name(config, split, len(shards))})
            source, target = folder / entry["file"], out / shards[-1]["file"]
            if target.exists() and not source.exists():  # renamed before a kill
                open_shard(out, shards[-1])
                continue
            open_shard(folder, entry)
            if target.exists():
                raise ValueError(f"{target} is in the way of {source}: move or delete it")
            moves.append((source, target))
    for source, target in moves:
        os.replace(source, target)
    return shards


# ---- ready shards ----


def fetch_pretokenized(config: PrepareConfig):
    """Downloads the hub's .bin shards, at least as many as hold --max-tokens; what is there already is not fetched again."""
    from huggingface_hub import hf_hub_download

    out = Path(config.out_dir)
    repo = PRETOKENIZED if config.dataset == (FINEWEB_EDU,) else config.dataset[0]
    config = PrepareConfig(**asdict(config) | {"dataset": (repo,), "name": "", "tokenizer": "gpt2"})
    progress = resume_point(out, config)
    if progress is None:
        return
    for orphan in (out / ".cache").rglob("*.incomplete"):  # of a kill: the hub's client leaves them, and begins anew
        orphan.unlink()
    problem, remedy = f"could not fetch {repo} from the hub", "check the name and the network, and give the command again to go on"
    info = hub_info(repo, progress["revision"] or config.revision, problem, remedy, files_metadata=True)
    progress["revision"] = info.sha
    write_json(out / PROGRESS, progress)
    files = {file.rfilename: file.lfs for file in info.siblings if file.rfilename.endswith(".bin")}
    if not files:
        raise ValueError(f"{repo} has no .bin shards: leave --dataset out, or --pretokenized")
    shards, train_tokens = [], 0
    for file in cli.bar(sorted(files, key=lambda file: (split_of(file) != "val", file)), desc=f"downloading into {out}", unit="shard"):
        if config.max_tokens and train_tokens >= config.max_tokens:
            break
        problem = f"could not fetch {file} of {repo} from the hub"
        retry(problem, remedy, busy_or_away, hf_hub_download, repo, file, repo_type="dataset", revision=info.sha, local_dir=out)
        shards.append(check_download(out, file, files[file] and files[file].sha256))
        train_tokens += shards[-1]["tokens"] if split_of(file) != "val" else 0
    write_manifest(out, progress, shards)


def check_download(out: Path, file: str, expected: str | None) -> dict:
    """The manifest's entry of a file that was fetched. One that is not whole is deleted: the client would keep it for good.
    expected: its sha256 as the hub has it, where it does."""
    try:
        entry = {"file": file, "tokens": len(open_shard(out, {"file": file})), "sha256": sha256(out / file)}
        if expected not in (None, entry["sha256"]):
            raise ValueError(f"shard {out / file} is damaged (its sha256 is not the hub's)")
        return entry
    except ValueError as e:
        (out / file).unlink()
        fault = str(e).removesuffix(f": {REMEDY}")
        raise ValueError(f"{fault}: it was deleted, give the command again to fetch it again") from e


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the workers and their pool end in order
    with cli.one_line_errors(cli.AGAIN):
        config = cli.parse(PrepareConfig)
        raise_errors(config.errors())
        prepare(config)


if __name__ == "__main__":
    main()
