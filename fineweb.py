"""Turns documents into tokens, and tokens into shards.

    python fineweb.py                                          # FineWeb-Edu's 10 B token sample, streamed from the hub
    python fineweb.py --dataset docs/ more.jsonl.gz --out-dir mine    # your own .parquet .jsonl .json .txt .md .py, also as .gz or .zst
    python fineweb.py --name sample-100BT --out-dir edu_fineweb100B --part 3/8      # on the third of eight machines
    python fineweb.py --pretokenized --out-dir fineweb10B      # ready GPT-2 shards: download only

Kill it whenever you like. Run the same command again: it continues where it stopped.
"""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from common import cli
from common.documents import describe_bad
from common.files import sha256
from common.hub import HubDocuments, brief, busy_or_unreachable, hub_info, retry
from common.locks import HeldFolder, lock_folder
from common.parts import count_of_parts, join_parts
from common.preparation import (
    START_AGAIN,
    describe_changes,
    local_documents,
    resume_point,
    shard_name,
    write_manifest,
    write_progress,
    write_sources,
)
from common.remote import is_url
from common.shard_upload import Upload
from common.shards import MANIFEST, PROGRESS, REMEDY, SOURCES, inspect_shard, part_folder, part_folders, split_of, write_shard
from common.text import kind_of, shown
from common.tokenizer import fast_encode, get_tokenizer, tokenize
from common.validation import raise_errors

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
PRETOKENIZED = "kjj0/fineweb10B-gpt2"
CHUNK_CHARS = 1 << 20  # one worker's unit of work
Ready = Callable[[list[dict]], None]


def ignore(shards: list[dict]):
    """For a folder: nobody has to know that another shard is complete."""


@dataclass
class PrepareConfig:
    """Turn documents into shards of tokens for train.py."""

    dataset: tuple[str, ...] = (FINEWEB_EDU,)
    """A dataset of parquet files on the hub, 'stdlib' (Python's own standard library), or local files and folders."""
    name: str = "sample-10BT"
    """Configuration of the hub's dataset; '' takes its default."""
    revision: str = ""
    """Branch, tag or commit on the hub. fineweb.py records the commit and keeps it on resume."""
    text_field: str = "text"
    """Field or column that has the text, in .parquet, .jsonl, .json and on the hub."""
    skip_bad_rows: bool = False
    """Leave out rows that can't be read (null, not a string, not UTF-8, not JSON, truncated files), and count them."""
    out_dir: str = "edu_fineweb10B"
    """Folder for the shards. A URL such as s3://bucket/edu_fineweb10B: they are made in edu_fineweb10B, and sent there."""
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

    @property
    def token_limit(self) -> int:
        """Returns this part's share of --max-tokens."""
        index, count = self.part_range
        return self.max_tokens * (index + 1) // count - self.max_tokens * index // count

    def errors(self) -> list[str]:
        errors = cli.at_least(1, self, "shard_size") + cli.at_least(0, self, "max_tokens", "workers")
        if not self.dataset:
            errors.append("--dataset has no value: give files, folders, 'stdlib', or one dataset on the hub")
        if self.shard_size > 10**9:
            errors.append(f"--shard-size is {self.shard_size}: it must be at most 1,000,000,000, memory holds two shards")
        if self.part and not (re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.part) and self.part_range[0] < self.part_range[1]):
            errors.append(f"--part is {self.part}: give it as 3/8, the third of eight")
        if self.part and is_url(self.out_dir):
            errors.append(f"--part needs a folder: join the parts there, then run the same command with --out-dir {self.out_dir}")
        if self.part and self.pretokenized:
            errors.append("--part does not work with --pretokenized: leave one of them out")
        if self.pretokenized and len(self.dataset) > 1:
            errors.append("--pretokenized takes one dataset on the hub: leave out the others")
        return errors


# ---- documents ----


def open_documents(config: PrepareConfig, revision: str):
    """Opens --dataset, local or on the hub. revision: what an interrupted run recorded, or ''."""
    if documents := local_documents(config, revision):
        return documents
    paths = [Path(name) for name in config.dataset]
    missing = [str(path) for path in paths if not path.exists()]
    if len(paths) == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+", missing[0]) and not kind_of(paths[0]):
        how = config.name, config.part_range, config.text_field, config.skip_bad_rows
        return HubDocuments(missing[0], revision or config.revision, *how)
    raise ValueError(f"--dataset: {shown(', '.join(missing))} not found: give files, folders, 'stdlib', or one dataset on the hub")


# ---- documents → shards ----


def chunks(documents) -> Iterator[tuple[tuple[dict, dict], list[str]]]:
    """Groups documents into chunks of about CHUNK_CHARS. Yields each with the states before and after it."""
    before, texts, size = documents.state(), [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= CHUNK_CHARS:
            after = documents.state()
            yield (before, after), texts
            before, texts, size = after, [], 0
    if texts or before != documents.state():  # bad rows at the end count too
        yield (before, documents.state()), texts


def encode(tokenizer_name: str, texts: list[str]) -> np.ndarray:
    return tokenize(tokenizer_name, texts) if texts else np.empty(0, np.uint16)


def tokenized(documents, tokenizer_name: str, workers: int) -> Iterator[tuple[tuple[dict, dict], np.ndarray]]:
    """Yields each chunk's states and tokens, in order.

    One worker runs in this thread. More workers are threads if there is a fast encoder, since it releases the GIL; otherwise they are
    processes. To bound memory, it prefetches at most 2 · workers chunks.
    """
    if workers == 1:
        for states, texts in chunks(documents):
            yield states, encode(tokenizer_name, texts)
        return
    with ThreadPoolExecutor(workers) if fast_encode(tokenizer_name) else processes(workers) as pool:
        pending = deque()
        try:
            for states, texts in chunks(documents):
                pending.append((states, pool.submit(encode, tokenizer_name, texts)))
                if len(pending) > 2 * workers:
                    states, result = pending.popleft()
                    yield states, result.result()
            for states, result in pending:
                yield states, result.result()
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
    """Makes the shards in --out-dir. If that is a URL: in a folder that has its last name, and sends them."""
    if config.pretokenized:
        repo = PRETOKENIZED if config.dataset == (FINEWEB_EDU,) else config.dataset[0]
        config = replace(config, dataset=(repo,), name="", tokenizer="gpt2")
    if not is_url(config.out_dir):
        make_shards(config)
        return
    upload = Upload(config)
    if not upload.is_complete():
        make_shards(replace(config, out_dir=str(upload.folder)), upload.ready)
        upload.finish()


def make_shards(config: PrepareConfig, ready: Ready = ignore):
    """Makes the shards in --out-dir, under a lock. A part goes into its own folder there, and parts may run at the same time.
    ready: called with all entries so far, when another shard is complete."""
    out = Path(config.out_dir)
    if config.part:
        make_part(out, config)
    with lock_folder(out, wait=bool(config.part)) as held, explain_full_disk(out):  # wait: another part may be joining
        if config.part or part_folders(out):
            join_parts(held, config)
        elif config.pretokenized:
            fetch_pretokenized(held, config, ready)
        else:
            tokenize_documents(held, config, ready)


@contextmanager
def explain_full_disk(folder: Path):
    """Adds the free space to the error of a full disk."""
    try:
        yield
    except OSError as e:
        if cli.MACHINE_REMEDIES.get(e.errno) != cli.FULL:
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(e.errno, f"{e.strerror}: {folder} has {free:,.0f} MB free, a token takes two bytes") from e


def tokenize_documents(held: HeldFolder, config: PrepareConfig, ready: Ready = ignore):
    """Writes the shards, then the manifest. Resumes after a kill and ends with the same bytes.

    The first shard is for val. A corpus smaller than two shards gives a tenth to val and the rest to train, so two shards are
    gathered in memory before any is written. Only the first of several parts has a val shard.
    """
    get_tokenizer(config.tokenizer)  # fail before downloading data if the vocabulary is missing
    out = held.path
    progress = resume_point(out, config)
    if progress is None:
        return
    documents = open_documents(config, progress["revision"])
    held.check()
    begin(out, progress, documents)

    shards, size = progress["shards"], config.shard_size
    done = sum(shard["tokens"] for shard in shards)
    index, limit = config.part_range[0], config.token_limit
    budget = (limit if config.max_tokens else sys.maxsize) - done
    stream = tokenized(documents, config.tokenizer, config.workers or os.cpu_count() or 1)
    with cli.bar(desc=f"tokenizing into {out}", unit="tok", unit_scale=True, total=limit or None, initial=done) as bar:
        for tokens, resume_from in (pieces := Pieces(stream, 2 * size, budget, progress["skip"], bar.update)):
            first = size
            if not (index or shards) and len(tokens) < 2 * size:  # the whole corpus
                first = len(tokens) // 10 or 1
            for piece in (tokens[:first], *cut(tokens[first:], size)):
                name = shard_name(config, "train" if index or shards else "val", len(shards))
                held.check()
                shards.append(write_shard(out / name, piece))
            held.check()
            write_progress(out, progress | {"shards": shards, **resume_from})
            ready(shards)
    progress["skipped"] = pieces.end.get("skipped", {})
    held.check()
    if not index and len(shards) < 2:
        for name in (PROGRESS, SOURCES, *(shard["file"] for shard in shards)):
            (out / name).unlink(missing_ok=True)
        why = describe_bad(progress["skipped"])
        raise ValueError(f"{' '.join(config.dataset)}: not enough tokens for a val and a train shard{why and f' ({why})'}: give more text")
    write_manifest(out, progress, shards)


def begin(out: Path, progress: dict, documents):
    """Moves the documents to where the progress ends, and records which files they come from. ValueError if the files changed."""
    if progress["revision"] not in ("", documents.revision):
        changed = describe_changes(out, documents.sources)
        raise ValueError(f"the files changed after the first run into {out}{changed}: restore them, or choose another folder")
    if progress["state"] is not None:
        try:
            documents.load_state(progress["state"])
        except (LookupError, TypeError, ValueError, AttributeError) as e:  # the datasets library raises any of them
            raise ValueError(f"{out / PROGRESS} is damaged ({brief(e)}): {START_AGAIN}") from e
    write_sources(out, documents.revision, documents.sources)
    progress["revision"] = documents.revision
    write_progress(out, progress)


def cut(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


@dataclass
class Pieces:
    """Packs chunks into pieces of `room` tokens; the last may be shorter. Drops the first `skip` tokens, then takes `budget`.
    Iterating yields each piece with the point to resume from after it."""

    stream: Iterator
    room: int
    budget: int
    skip: int
    on_tokens: Callable[[int], None]  # called with each number of tokens packed
    end: dict = field(default_factory=dict)  # the state after the last chunk that was used

    def __iter__(self) -> Iterator[tuple[np.ndarray, dict]]:
        piece, filled, resume_from = np.empty(self.room, np.uint16), 0, {}
        skip, budget = self.skip, self.budget
        for (state, after), tokens in self.stream:
            self.end, taken, skip = after, skip, 0
            while taken < len(tokens) and budget:
                n = min(len(tokens) - taken, self.room - filled, budget)
                piece[filled : filled + n] = tokens[taken : taken + n]
                taken, filled, budget = taken + n, filled + n, budget - n
                self.on_tokens(n)
                resume_from = {"state": state, "skip": taken}
                if filled == self.room:
                    yield piece, resume_from
                    filled = 0
            if not budget:
                self.stream.close()
                break
        if filled:
            yield piece[:filled], resume_from


# ---- parts ----


def make_part(out: Path, config: PrepareConfig):
    """Tokenizes a part into its folder. Does nothing if all parts are already joined."""
    index, count = config.part_range
    folder = part_folder(out, index, count)
    with lock_folder(folder) as held, explain_full_disk(folder):
        if (out / MANIFEST).exists():
            return
        if (out / PROGRESS).exists():
            raise ValueError(f"{out} has an unfinished run without --part: finish it, or choose another folder")
        count_of_parts(out)
        tokenize_documents(held, config)


# ---- ready shards ----


def fetch_pretokenized(held: HeldFolder, config: PrepareConfig, ready: Ready = ignore):
    """Downloads .bin shards from the hub until they have --max-tokens train tokens. Skips files that are already there."""
    from huggingface_hub import hf_hub_download

    out, repo = held.path, config.dataset[0]
    progress = resume_point(out, config)
    if progress is None:
        return
    for orphan in (out / ".cache").rglob("*.incomplete"):  # a killed hub client leaves them and never resumes them
        orphan.unlink()
    problem, remedy = f"could not fetch {repo} from the hub", "check the name and the network, then run the same command again"
    info = hub_info(repo, progress["revision"] or config.revision, problem, remedy, files_metadata=True)
    progress["revision"] = info.sha
    held.check()
    write_progress(out, progress)
    files = {file.rfilename: file.lfs for file in info.siblings if file.rfilename.endswith(".bin")}
    if not files:
        raise ValueError(f"{repo} has no .bin shards: leave out --dataset or --pretokenized")
    shards, train_tokens = [], 0
    for file in cli.bar(sorted(files, key=lambda file: (split_of(file) != "val", file)), desc=f"downloading into {out}", unit="shard"):
        if config.max_tokens and train_tokens >= config.max_tokens:
            break
        problem = f"could not fetch {file} of {repo} from the hub"
        retry(problem, remedy, busy_or_unreachable, hf_hub_download, repo, file, repo_type="dataset", revision=info.sha, local_dir=out)
        held.check()
        shards.append(check_download(out, file, files[file] and files[file].sha256))
        ready(shards)
        train_tokens += shards[-1]["tokens"] if split_of(file) != "val" else 0
    held.check()
    write_manifest(out, progress, shards)


def check_download(out: Path, file: str, expected: str | None) -> dict:
    """Returns the manifest entry of a downloaded file. Deletes a damaged file, since the hub's client would keep it forever.
    expected: the hub's sha256, if it has one."""
    try:
        entry = {"file": file, "tokens": inspect_shard(out, {"file": file}).tokens, "sha256": sha256(out / file)}
        if expected not in (None, entry["sha256"]):
            raise ValueError(f"shard {out / file} is damaged (its sha256 is not the hub's)")
        return entry
    except ValueError as e:
        if expected == sha256(out / file):
            raise  # it is as on the hub, so another download would not help
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
