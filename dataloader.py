"""Reads and writes shards of tokens, and serves training sequences from them in an endless stream.

    {prefix}_{val|train}_{index:06d}.npy    one-dimensional uint16, each document preceded by <|endoftext|>
    manifest.json                           written last: tokenizer, vocabulary, source, tokens and sha256 of each shard

Without a manifest, a folder is read as GPT-2 shards: .npy from build-nanogpt or .bin from llm.c.
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

REMEDY = "delete the folder and run fineweb.py again"

# ---- shards ----


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Writes tokens, uint16 (N,), and returns the shard's entry for the manifest."""
    assert tokens.dtype == np.uint16 and tokens.ndim == 1

    def write(file):  # np.save raises no error if the disk is too full for the last 4096 bytes
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
        file.write(tokens)

    write_atomically(path, write)
    return {"file": path.name, "tokens": len(tokens), "sha256": sha256(path)}


def open_shard(folder: Path, entry: dict) -> np.ndarray:
    """Memory-maps the tokens of a manifest's entry, uint16 (N,). ValueError if the file is missing or damaged."""
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
    """Memory-maps a .bin file of llm.c or modded-nanogpt: 256 int32 (magic, version, token count, …), then uint16 tokens."""
    header = np.fromfile(path, "<i4", 3)
    if len(header) < 3 or header[0] != BIN_MAGIC or header[1] != BIN_VERSION:
        raise ValueError(f"its header is not magic {BIN_MAGIC}, version {BIN_VERSION}")
    expected, found = BIN_HEADER_BYTES + 2 * int(header[2]), path.stat().st_size
    if found != expected:
        raise ValueError(f"its header promises {expected:,} bytes, it has {found:,}")
    return np.memmap(path, "<u2", mode="r", offset=BIN_HEADER_BYTES)


# ---- a folder of shards ----


def split_of(file: str) -> str | None:
    """Returns 'train' or 'val', from a shard's name. None if the file is no shard."""
    match = re.search(r"_(train|val)_\d+\.(npy|bin)$", file)
    return match and match[1]


@dataclass
class Shards:
    """A folder's manifest, or its defaults if there is none."""

    folder: Path
    tokenizer: str = "gpt2"
    vocab_size: int = 50257
    entries: list[dict] = field(default_factory=list)  # file; tokens and sha256 too if a manifest has them

    def split(self, name: str) -> list[dict]:
        """Returns the entries of 'train' or 'val', in order."""
        return [entry for entry in self.entries if split_of(entry["file"]) == name]

    def contents(self) -> dict[str, list]:
        """Maps each file to [size in bytes, sha256]. The sha256 is from the manifest or verify_shards; None if unknown."""
        return {entry["file"]: [(self.folder / entry["file"]).stat().st_size, entry.get("sha256")] for entry in self.entries}


def differences(before: dict[str, list], now: dict[str, list]) -> list[str]:
    """Lists what changed between two contents() of a folder."""
    gone = [f"{file} is missing" for file in before.keys() - now.keys()]
    new = [f"{file} was added" for file in now.keys() - before.keys()]
    both = before.keys() & now.keys()
    found = sorted(gone + new + [f"{file} has changed" for file in both if not same_content(before[file], now[file])])
    return found or ([] if list(before) == list(now) else ["the manifest has the shards in another order"])


def same_content(a: list, b: list) -> bool:
    """Whether the sizes agree, and the sha256 too if both are known."""
    return a[0] == b[0] and (a[1] == b[1] or None in (a[1], b[1]))


def part_folder(folder: Path, index: int, count: int) -> Path:
    """Returns the folder in which fineweb.py makes part `index` (from 0) of `count`."""
    return folder / f"part-{index + 1}-of-{count}"


def part_folders(folder: Path) -> dict[Path, int]:
    """Maps each existing part folder to the number of parts in its name."""
    found = {path: re.fullmatch(r"part-\d+-of-(\d+)", path.name) for path in folder.glob("part-*-of-*")}
    return {path: int(match[1]) for path, match in found.items() if match}


def find_shards(folder: str | Path) -> Shards:
    """Reads the manifest, or lists the files if there is none. ValueError unless both splits have shards."""
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
            raise ValueError(f"{folder} has parts that are not joined yet: run the same fineweb.py command without --part")
        files = sorted(path.name for path in folder.iterdir() if path.suffix in (".npy", ".bin"))
        shards = Shards(folder, entries=[{"file": name} for name in files])
    for split in ("train", "val"):
        if not shards.split(split):
            raise ValueError(f"no {split} shard in {folder}; make or finish the shards: python fineweb.py --out-dir {folder}")
    return shards


def verify_shards(shards: Shards):
    """Reads every shard and checks its sha256 and its ids. Without a manifest, it fills in each entry's sha256 instead.
    ValueError names the first bad shard."""

    def check(entry, tokens):
        path = shards.folder / entry["file"]
        found = sha256(path)
        if entry.setdefault("sha256", found) != found:
            raise ValueError(f"shard {path} is damaged (its sha256 is not the manifest's): {REMEDY}")
        if len(tokens):
            check_id(int(tokens.max()), shards.vocab_size, path)

    entries = shards.entries
    opened = [open_shard(shards.folder, entry) for entry in entries]  # outside the threads: Python 3.11 can't parse headers in parallel
    with ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
        checks = pool.map(check, entries, opened)
        list(cli.bar(checks, desc="verifying shards", total=len(entries), unit="shard", disable=len(entries) < 10))


def check_id(largest: int, vocab_size: int, path: Path):
    if largest >= vocab_size:
        raise ValueError(f"shard {path} holds id {largest}, the vocabulary has {vocab_size}: {REMEDY}")


# ---- the stream ----


class TokenStream:
    """Joins a split's shards into one row of tokens, cuts it into fixed sequences and serves them in an endless, seeded order.

    Sequence i is tokens [i·T, i·T + T]: T inputs and, shifted by one, T targets. It may cross the end of a shard. So every token
    is a target exactly once per epoch, except the row's first token and the last (N - 1) mod T, too few for a sequence.
    The sequence at a position is a pure function of (seed, position). So there is no state to save, and world size and micro
    batch change nothing.
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
        """Returns inputs and targets, each int64 (B, T), at B positions of the stream. ValueError if an id is not in the
        vocabulary."""
        T = self.seq_len
        rows = np.stack([self.read(self.sequence_at(p) * T, T + 1) for p in positions])  # (B, T + 1)
        return rows[:, :-1].copy(), rows[:, 1:].copy()  # two copies: validation writes into its targets

    def sequence_at(self, position: int) -> int:
        epoch, place = divmod(int(position), self.sequences_per_epoch)
        return permute(place, self.sequences_per_epoch, mix(self.seed, epoch)) if self.shuffle else place

    def place(self, position: int) -> str:
        """Names the shard and token where the sequence at a position begins, for messages."""
        shard, offset = self.locate(self.sequence_at(position) * self.seq_len)
        return f"{self.paths[shard].name} from token {offset:,}"

    def locate(self, start: int) -> tuple[int, int]:
        """Returns the shard of the row's token `start`, and the token's offset in it."""
        shard = int(np.searchsorted(self.ends, start, side="right"))
        return shard, start - int(self.ends[shard]) + len(self.tokens[shard])

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns tokens [start, start + count) of the row as int64, across shards."""
        parts = []
        while count > 0:
            shard, offset = self.locate(start)
            part = self.tokens[shard][offset : offset + count].astype(np.int64)
            check_id(int(part.max()), self.vocab_size, self.paths[shard])  # a shard may be unverified, or change later
            parts.append(part)
            start += len(part)
            count -= len(part)
        return np.concatenate(parts)


def rank_positions(step: int, batch: int, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """Returns a rank's positions in a step, one range per micro step. batch and micro_batch are in sequences.

    A step takes positions [step·batch, (step + 1)·batch) for any world size. They go to micro steps in order, and within a
    micro step to ranks in order.
    """
    starts = range(step * batch + rank * micro_batch, (step + 1) * batch, world_size * micro_batch)
    return [range(start, start + micro_batch) for start in starts]


def mix(a: int, b: int) -> int:
    """Hashes two integers into 64 bits (splitmix64: Steele, Lea & Flood, 2014)."""
    x = (a * 0x9E3779B97F4A7C15 + b + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def permute(i: int, n: int, key: int) -> int:
    """Returns the image of i under a pseudorandom permutation of range(n), chosen by key, without a table.

    A Feistel network permutes 2^(2·half) ≥ n numbers; apply it until the result is below n (Black & Rogaway, 2002).
    NumPy's shuffle may change its order from release to release; this order never changes.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for round in range(4):
            left, right = right, left ^ (mix(key + round, right) & mask)
        i = left << half | right
        if i < n:
            return i
