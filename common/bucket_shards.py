"""Shards in a bucket: --data-dir s3://… copies them to this machine, and a run reads from both until all are here.

The order of an epoch is random, so the first step needs a few tokens of every shard. Nobody has to wait for 20 GB: each process reads
the tokens it needs from the bucket, while one process of each host downloads whole shards. A shard is verified before it gets its name
in the folder of copies, so a file that is there is complete. From then on, it is read there.
"""

import errno
import io
import math
import os
import re
import shutil
import threading
import time
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import cli
from common.files import parse_json, replace
from common.locks import lock_folder
from common.remote import Remote, is_url
from common.shards import (
    MANIFEST,
    PROGRESS,
    Shard,
    Shards,
    checked_manifest,
    find_shards,
    first_token,
    for_each,
    inspect_shard,
    verify_shard,
)

COPIES = "SHARD_COPIES"  # the variable that says where the folder of copies is
AT_ONCE = 4  # downloads
HEADER = 1024  # bytes that hold any header
PATIENCE = 600.0  # seconds that the start waits for a bucket that fails
STEP_PATIENCE = 480.0  # that a step waits for it: less than --timeout-minutes
PAUSES = 1.0, 30.0  # seconds between two tries: first, and at most
UPLOAD = "run the fineweb.py command that filled it again, or upload the folder again"
WRONG = "delete the checkpoints that this launch saved, also under --remote, then resume"


def open_shards(place: str | Path) -> Shards:
    """Returns the shards of a folder (find_shards) or of a URL (bucket_shards)."""
    return bucket_shards(str(place)) if is_url(place) else find_shards(place)


def bucket_shards(url: str) -> "BucketShards":
    """Reads a bucket's manifest and the headers of its shards. ValueError if something is missing or damaged."""
    remote = remote_of(url)
    data = remote.read(MANIFEST)
    if data is None:
        found = remote.list()
        if PROGRESS in found:
            raise ValueError(f"{remote.url} is not finished: run the same fineweb.py command again, or wait if it is still running")
        there = f"it has {cli.some(sorted(found))}" if found else "nothing is there"
        raise ValueError(f"{remote.url} has no {MANIFEST}, {there}: check the URL, or fill it: python fineweb.py --out-dir {remote.url}")
    try:
        manifest = parse_json(data)
    except ValueError as e:
        raise ValueError(f"{remote.url}/{MANIFEST} is not valid JSON ({e}): {UPLOAD}") from None
    manifest = checked_manifest(manifest if isinstance(manifest, dict) else {}, f"{remote.url}/{MANIFEST}", UPLOAD)
    name = re.sub(r"[^\w.-]", "_", remote.url.rpartition("/")[2])
    # named after the content: other shards under the same URL get another folder
    folder = Path(os.environ.get(COPIES) or "shard_copies", f"{name}-{sha256(data).hexdigest()[:8]}")
    shards = BucketShards(folder, manifest["tokenizer"], manifest["vocab_size"], manifest["shards"], url=remote.url)
    shards.inspect()
    return shards


@lru_cache
def remote_of(url: str) -> Remote:
    return Remote(url, "--data-dir")


class BucketShard(NamedTuple):
    """A shard that may still be in the bucket only."""

    path: Path  # of the copy
    file: str  # its name in the bucket
    offset: int  # of the first token, in bytes
    tokens: int


class Damaged(ValueError):
    """A shard in the bucket has other bytes than the manifest promises."""


@dataclass
class BucketShards(Shards):
    """The shards under a URL, with copies in `folder`. Each entry also has its size in `bytes`, and the `offset` of its first token."""

    url: str = ""
    copies: dict = field(default_factory=dict)  # file → Shard, once this process has found the copy
    unverified: dict = field(default_factory=dict)  # file → [(first token, count, checksum)] that this process read in the bucket
    download: "Download | None" = None
    failing: "Failing | None" = None  # while reading

    def inspect(self):
        """Adds size and offset to each entry. ValueError if a shard is missing or damaged."""
        remote, files, sizes = remote_of(self.url), [entry["file"] for entry in self.entries], {}
        if len(set(files)) < len(files):
            raise ValueError(f"{self.url}/{MANIFEST} lists a shard twice: {UPLOAD}")
        for folder in {file.rpartition("/")[0] for file in files}:
            sizes |= {f"{folder}/{name}".lstrip("/"): size for name, size in remote.list(folder).items()}
        if lacking := [file for file in files if sizes.get(file) is None]:
            raise ValueError(f"{self.url} lacks {cli.some(lacking)}: {UPLOAD}")
        for split in ("train", "val"):
            if not self.split(split):
                raise ValueError(f"{self.url}/{MANIFEST} lists no {split} shard: {UPLOAD}")
        headers = remote.ranges([(file, 0, min(HEADER, sizes[file])) for file in files])
        for entry, header in zip(self.entries, headers, strict=True):
            name, size = f"{self.url}/{entry['file']}", sizes[entry["file"]]
            entry |= {"bytes": size, "offset": first_token(io.BytesIO(header), name, size, entry)}

    def contents(self) -> dict[str, list]:
        return {entry["file"]: [entry["bytes"], entry["sha256"]] for entry in self.entries}

    def open(self, split: str) -> list[BucketShard]:
        return [BucketShard(self.folder / e["file"], e["file"], e["offset"], e["tokens"]) for e in self.split(split)]

    # ---- copies ----

    def prepare(self, verify: bool):
        """Deletes copies that are damaged, and downloads the validation shards."""

        def check(entry):
            path = self.folder / entry["file"]
            if path.exists():
                try:
                    verify_shard(self.folder, entry, self.vocab_size) if verify else inspect_shard(self.folder, entry)
                except ValueError as e:
                    path.unlink(missing_ok=True)
                    cli.say(f"warning: {str(e).partition(': ')[0]}: it is downloaded again")

        for_each(self.entries, check, "verifying shards")
        Download(self, self.lacking(self.split("val")), PATIENCE).wait()

    def fetch_ahead(self, needed: list[int]):
        train = self.split("train")
        lacking = self.lacking([train[index] for index in needed])
        size = sum(entry["bytes"] for entry in lacking) / 1e6
        todo = f"; downloading {len(lacking)} of {len(needed)} train shards ({size:,.1f} MB), until then steps also read the bucket"
        cli.say(f"copies of the shards in {self.url} are in {self.folder}{todo if lacking else ''}")
        self.download = Download(self, lacking)

    def missing_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.entries if not (self.folder / entry["file"]).exists())

    def lacking(self, entries: list[dict]) -> list[dict]:
        """Returns those of the shards that have no copy yet. OSError if the disk has too little room for them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = [entry for entry in entries if not (self.folder / entry["file"]).exists()]
        need, free = sum(entry["bytes"] for entry in found), shutil.disk_usage(self.folder).free
        if need > free:
            where = f"{self.folder} has {free / 1e6:,.1f} MB free (another place: {COPIES}=/mnt/disk before the command)"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: the shards need {need / 1e6:,.1f} MB more, {where}")
        return found

    def fetch(self, entry: dict):
        """Downloads a shard, unless its copy is here. Only one process of this host does, the others wait. Damaged if the bytes are
        wrong three times; another ValueError if the bucket fails or refuses; OSError if this disk fails."""
        path, problem = self.folder / entry["file"], ""
        if path.exists():
            return
        with lock_folder(path.with_name(f"{path.name}.part"), wait=True) as held:
            if path.exists():
                return
            part = held.path / path.name
            for _ in range(3):
                remote_of(self.url).get(entry["file"], part)
                try:
                    verify_shard(held.path, entry | {"file": path.name}, self.vocab_size)
                except ValueError as e:
                    problem = str(e)
                    part.unlink(missing_ok=True)
                else:
                    replace(part, path)
                    shutil.rmtree(held.path, ignore_errors=True)
                    return
        raise Damaged(f"{self.url}/{entry['file']} is damaged ({problem.partition(': ')[0]}): {UPLOAD}; if training had begun, {WRONG}")

    # ---- reading ----

    def read(self, spans: list[tuple[BucketShard, int, int]]) -> list[np.ndarray]:
        """Returns the tokens of each span: from the copies, or all at once from the bucket. If the bucket fails, waits for it."""
        self.failing = self.failing or Failing(self.url, "training waits for it")
        while True:
            if self.download:
                self.download.check()
            for file in [*self.unverified]:
                self.find_copy(file)
            copies = [self.find_copy(shard.file) for shard, _, _ in spans]
            parts = [copy and copy.read(start, count) for copy, (_, start, count) in zip(copies, spans, strict=True)]
            lacking = [number for number, part in enumerate(parts) if part is None]
            try:
                for number, part in zip(lacking, self.read_bucket([spans[number] for number in lacking]), strict=True):
                    parts[number] = part
                self.failing.over()
                return parts
            except Damaged:
                raise
            except ValueError as e:
                self.failing.wait(e, STEP_PATIENCE)

    def find_copy(self, file: str) -> Shard | None:
        """Returns a shard's copy; None if it is not here yet. Damaged if this process has read other bytes in the bucket before."""
        if file not in self.copies and (self.folder / file).exists():
            copy = inspect_shard(self.folder, {"file": file})
            for first, n, checksum in self.unverified.get(file, []):
                if zlib.crc32(copy.read(first, n)) != checksum:
                    raise Damaged(f"{self.url}/{file} had other bytes when this launch read them than now: {WRONG}")
            self.copies[file] = copy
            self.unverified.pop(file, None)
        return self.copies.get(file)

    def read_bucket(self, spans: list[tuple[BucketShard, int, int]]) -> list[np.ndarray]:
        """Returns the tokens of each span, unverified: find_copy compares them once the shard is here."""
        places = [(shard.offset + 2 * start, shard.offset + 2 * (start + count)) for shard, start, count in spans]
        found = remote_of(self.url).ranges([(span[0].file, *place) for span, place in zip(spans, places, strict=True)]) if spans else []
        for (shard, start, count), data in zip(spans, found, strict=True):
            if len(data) < 2 * count:
                raise Damaged(f"{self.url}/{shard.file} has become shorter since the start: {UPLOAD}")
            self.unverified.setdefault(shard.file, []).append((start, count, zlib.crc32(data)))
        return [np.frombuffer(data, "<u2") for data in found]


class Failing:
    """A bucket that fails, perhaps. Says so once, and once that all tasks work again. meanwhile: what happens until then."""

    def __init__(self, url: str, meanwhile: str):
        self.url, self.meanwhile, self.since, self.pause, self.lock = url, meanwhile, None, PAUSES[0], threading.Lock()
        self.tasks: set[str] = set()  # that fail

    def wait(self, e: ValueError, patience: float = math.inf, task: str = ""):
        """Sleeps until a task's next try. Raises e once the bucket has failed for longer than `patience` seconds."""
        with self.lock:
            self.tasks.add(task)
            if self.since is None:
                self.since = time.monotonic()
                cli.say(f"warning: {cli.in_one_line(e)}; {self.meanwhile}")
            if time.monotonic() - self.since > patience:
                raise e
            pause, self.pause = self.pause, min(2 * self.pause, PAUSES[1])
        time.sleep(pause)

    def over(self, task: str = ""):
        with self.lock:
            self.tasks.discard(task)
            if self.since is not None and not self.tasks:
                self.since, self.pause = None, PAUSES[0]
                cli.say(f"{self.url} works again")


class Download:
    """Threads that download shards in order until all are here. failed: the error that stopped them."""

    def __init__(self, shards: BucketShards, entries: list[dict], patience: float = math.inf):
        self.shards, self.waiting, self.left, self.patience, self.failed = shards, list(entries), len(entries), patience, None
        self.failing, self.lock = Failing(shards.url, "the download is tried again"), threading.Lock()
        for _ in range(min(AT_ONCE, len(entries))):
            threading.Thread(target=self.work, name="--data-dir: download", daemon=True).start()

    def work(self):
        try:
            while entry := self.next():
                self.fetch(entry)
        except Exception as e:  # another thread raises it: check()
            self.failed = e

    def next(self) -> dict | None:
        with self.lock:
            return self.waiting.pop(0) if self.waiting and not self.failed else None

    def fetch(self, entry: dict):
        while not self.failed:
            try:
                self.shards.fetch(entry)
                break
            except Damaged:
                raise
            except ValueError as e:
                self.failing.wait(e, self.patience, entry["file"])
        self.failing.over(entry["file"])
        with self.lock:
            self.left -= 1

    def check(self):
        if self.failed:
            raise self.failed

    def wait(self):
        """Returns once all are here. Ctrl-C ends it: the threads don't keep the process alive."""
        while self.left:
            self.check()
            time.sleep(0.02)
