"""Shards of tokens on disk, and the endless stream of training sequences over them.

    {prefix}_{val|train}_{index:06d}.npy    one-dimensional uint16, each document preceded by <|endoftext|>
    manifest.json                           written last: tokenizer, vocabulary, source, tokens and sha256 of each shard

A folder without a manifest is read as GPT-2 shards, .npy as build-nanogpt writes them or .bin as llm.c does.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import cli
from common.files import read_json, sha256, write_atomically

MANIFEST = "manifest.json"
BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 256 * 4  # llm.c's header: 256 little-endian int32

REMEDY = "delete the folder and make the shards again with fineweb.py"

# ---- shards ----


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Writes tokens (N,) as uint16 and returns the shard's entry for the manifest."""
    assert tokens.dtype == np.uint16 and tokens.ndim == 1

    def write(file):  # not np.save, which says nothing when the disk is too full for the last 4096 bytes
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
        file.write(tokens)

    write_atomically(path, write)
    return {"file": path.name, "tokens": len(tokens), "sha256": sha256(path)}


def open_shard(folder: Path, entry: dict) -> np.ndarray:
    """The tokens (N,) uint16 of a manifest's entry, memory-mapped: nothing is read before it is used.
    ValueError when the file is missing or damaged."""
    path = folder / entry["file"]
    if not path.exists():
        raise ValueError(f"shard {path} is missing: copy it back, or {REMEDY}")
    try:
        tokens = open_bin(path) if path.suffix == ".bin" else np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as e:
        raise ValueError(f"shard {path} is damaged ({e}): {REMEDY}") from e
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"shard {path} is an archive of arrays, expected one array: {REMEDY}")
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise ValueError(f"shard {path} holds {tokens.ndim}-dimensional {tokens.dtype}, expected 1-dimensional uint16: {REMEDY}")
    if len(tokens) != entry.get("tokens", len(tokens)):
        raise ValueError(f"shard {path} has {len(tokens):,} tokens, the manifest says {entry['tokens']:,}: {REMEDY}")
    return tokens


def open_bin(path: Path) -> np.ndarray:
    """llm.c's and modded-nanogpt's format: a header of 256 int32 (magic, version, tokens, …), then uint16 tokens."""
    header = np.fromfile(path, "<i4", 3)
    if len(header) < 3 or header[0] != BIN_MAGIC or header[1] != BIN_VERSION:
        raise ValueError(f"its header is not magic {BIN_MAGIC}, version {BIN_VERSION}")
    expected, found = BIN_HEADER_BYTES + 2 * int(header[2]), path.stat().st_size
    if found != expected:
        raise ValueError(f"its header promises {expected:,} bytes, it has {found:,}")
    return np.memmap(path, "<u2", mode="r", offset=BIN_HEADER_BYTES)


# ---- a folder of shards ----


def split_of(file: str) -> str | None:
    """'train' or 'val', by a shard's name; None for another file's."""
    match = re.search(r"_(train|val)_\d+\.(npy|bin)$", file)
    return match and match[1]


@dataclass
class Shards:
    """A folder's manifest, or what stands in for one."""

    folder: Path
    tokenizer: str = "gpt2"
    vocab_size: int = 50257
    entries: list[dict] = field(default_factory=list)  # file, and tokens and sha256 where a manifest says so

    def split(self, name: str) -> list[dict]:
        """The entries of 'train' or 'val', in order."""
        return [entry for entry in self.entries if split_of(entry["file"]) == name]

    def contents(self) -> dict[str, list]:
        """File → its bytes and, where a manifest or verify_shards says it, its sha256."""
        return {entry["file"]: [(self.folder / entry["file"]).stat().st_size, entry.get("sha256")] for entry in self.entries}


def differences(before: dict[str, list], now: dict[str, list]) -> list[str]:
    """What has happened to a folder's files between two of its contents()."""
    gone = [f"{file} is missing" for file in before.keys() - now.keys()]
    new = [f"{file} was added" for file in now.keys() - before.keys()]
    both = before.keys() & now.keys()
    found = sorted(gone + new + [f"{file} has changed" for file in both if not same(before[file], now[file])])
    return found or ([] if list(before) == list(now) else ["the manifest has the shards in another order"])


def same(a: list, b: list) -> bool:
    return a[0] == b[0] and (a[1] == b[1] or None in (a[1], b[1]))


def part_folder(folder: Path, index: int, count: int) -> Path:
    """Where fineweb.py makes the index-th, from 0, of `count` parts of a folder's shards."""
    return folder / f"part-{index + 1}-of-{count}"


def part_folders(folder: Path) -> dict[Path, int]:
    """Those that are there, and the number of parts that each says there are to be."""
    found = {path: re.fullmatch(r"part-\d+-of-(\d+)", path.name) for path in folder.glob("part-*-of-*")}
    return {path: int(match[1]) for path, match in found.items() if match}


def find_shards(folder: str | Path) -> Shards:
    """Reads the manifest, or lists the files where there is none. ValueError when there are no shards for both splits."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"no shards: {folder} is a file, give the folder that shards are in")
    if not folder.is_dir():
        raise ValueError(f"no shards: the folder {folder} does not exist; make it: python fineweb.py --out-dir {folder}")
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST, REMEDY)
        try:
            entries = [
                {"file": str(entry["file"]), "tokens": int(entry["tokens"]), "sha256": entry["sha256"]} for entry in manifest["shards"]
            ]
            shards = Shards(folder, str(manifest["tokenizer"]), int(manifest["vocab_size"]), entries)
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{folder / MANIFEST} is not a manifest of shards ({type(e).__name__}: {e}): {REMEDY}") from e
    else:
        if part_folders(folder):
            raise ValueError(f"{folder} holds parts that were not joined: give the fineweb.py command that made one again, without --part")
        files = sorted(path.name for path in folder.iterdir() if path.suffix in (".npy", ".bin"))
        shards = Shards(folder, entries=[{"file": name} for name in files])
    for split in ("train", "val"):
        if not shards.split(split):
            raise ValueError(f"no {split} shard in {folder}; finish or make the shards: python fineweb.py --out-dir {folder}")
    return shards


def verify_shards(shards: Shards):
    """Reads every shard: the bytes must have the manifest's sha256 (without a manifest it is noted here) and every id must
    be in the vocabulary. ValueError names the first that is at fault."""

    def check(entry, tokens):
        path = shards.folder / entry["file"]
        found = sha256(path)
        if entry.setdefault("sha256", found) != found:
            raise ValueError(f"shard {path} is damaged (its sha256 is not the manifest's): {REMEDY}")
        if len(tokens):
            check_id(int(tokens.max()), shards.vocab_size, path)

    entries = shards.entries
    opened = [open_shard(shards.folder, entry) for entry in entries]  # not in the threads: Python 3.11 parses headers in one at a time
    with ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
        checks = pool.map(check, entries, opened)
        list(cli.bar(checks, desc="verifying shards", total=len(entries), unit="shard", disable=len(entries) < 10))


def check_id(largest: int, vocab_size: int, path: Path):
    if largest >= vocab_size:
        raise ValueError(f"shard {path} holds id {largest}, the vocabulary has {vocab_size}: {REMEDY}")


# ---- the stream ----


class TokenStream:
    """A split's shards as one row of tokens, cut into fixed sequences and served in an endless, seeded order.

    Sequence i is tokens [i·T, i·T + T]: T inputs and, one further, T targets, also across a shard's end. So every
    token but the row's first is a target exactly once an epoch (the last N - 1 mod T, too few for a sequence, never
    are). The sequence at a position of the stream is a pure function of (seed, position): nothing to save or restore,
    and the same whatever the number of processes or the micro batch.
    """

    def __init__(self, shards: Shards, split: str, seq_len: int, shuffle: bool = True, seed: int = 1337):
        self.paths = [shards.folder / entry["file"] for entry in shards.split(split)]
        self.tokens = [open_shard(shards.folder, entry) for entry in shards.split(split)]
        self.ends = np.cumsum([len(tokens) for tokens in self.tokens])  # of each shard, in the row
        self.vocab_size = shards.vocab_size
        self.seq_len = seq_len
        self.shuffle = shuffle
        self.seed = seed
        self.sequences_per_epoch = (int(self.ends[-1]) - 1) // seq_len
        if self.sequences_per_epoch < 1:
            raise ValueError(
                f"{shards.folder} has {self.ends[-1]:,} {split} tokens, fewer than one sequence of {seq_len} + 1: "
                "choose a smaller --seq-len or more data"
            )

    def batch(self, positions) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the stream (B of them) → inputs and targets, each (B, T) int64. ValueError for an id that the
        vocabulary does not have."""
        T = self.seq_len
        rows = np.stack([self.read(self.sequence_at(p) * T, T + 1) for p in positions])  # (B, T + 1)
        return rows[:, :-1].copy(), rows[:, 1:].copy()  # two copies: validation writes into its targets

    def sequence_at(self, position: int) -> int:
        epoch, place = divmod(int(position), self.sequences_per_epoch)
        return permute(place, self.sequences_per_epoch, mix(self.seed, epoch)) if self.shuffle else place

    def place(self, position: int) -> str:
        """Where the sequence at a position of the stream begins, for people."""
        shard, offset = self.locate(self.sequence_at(position) * self.seq_len)
        return f"{self.paths[shard].name} from token {offset:,}"

    def locate(self, start: int) -> tuple[int, int]:
        """The shard that a token of the row lies in, and its place there."""
        shard = int(np.searchsorted(self.ends, start, side="right"))
        return shard, start - int(self.ends[shard]) + len(self.tokens[shard])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the row as int64, from as many shards as they lie in."""
        parts = []
        while count > 0:
            shard, offset = self.locate(start)
            part = self.tokens[shard][offset : offset + count].astype(np.int64)
            check_id(int(part.max()), self.vocab_size, self.paths[shard])  # a shard can change after it was verified, or not be
            parts.append(part)
            start += len(part)
            count -= len(part)
        return np.concatenate(parts)


def rank_positions(step: int, batch: int, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """The positions that a rank takes in a step, a range for each micro step; batch and micro_batch in sequences.

    A step is positions [step·batch, (step + 1)·batch) whatever the world: they are dealt out micro step by micro step,
    and within one rank by rank.
    """
    starts = range(step * batch + rank * micro_batch, (step + 1) * batch, world_size * micro_batch)
    return [range(start, start + micro_batch) for start in starts]


def mix(a: int, b: int) -> int:
    """Two integers → 64 well-mixed bits (splitmix64: Steele, Lea & Flood, 2014)."""
    x = (a * 0x9E3779B97F4A7C15 + b + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def permute(i: int, n: int, key: int) -> int:
    """Where i stands in a pseudorandom permutation of range(n) chosen by key, with no table of n entries:
    a Feistel network is a permutation of 2^(2·half) ≥ n numbers, walked until the result is below n
    (Black & Rogaway, 2002). Not NumPy's shuffle, whose order may change from release to release."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for round in range(4):
            left, right = right, left ^ (mix(key + round, right) & mask)
        i = left << half | right
        if i < n:
            return i
