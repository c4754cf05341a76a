"""Reads, checks and writes shards of tokens, and the manifest of a folder of them.

    {prefix}_{val|train}_{index:06d}.npy    one-dimensional uint16, each document preceded by <|endoftext|>
    manifest.json                           written last: tokenizer, vocabulary, source, tokens and sha256 of each shard

Without a manifest, a folder is read as GPT-2 shards: .npy from build-nanogpt or .bin from llm.c.
"""

import hashlib
import os
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import cli
from common.files import naming, read_json, sha256, write_atomically
from common.validation import has_type

MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # beside it while a preparation runs, or after it was interrupted
SOURCES = "sources.json"  # which files the text is from, with their sha256
NPY_MAGIC = b"\x93NUMPY"
BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 256 * 4  # llm.c's header: 256 little-endian int32
BIN_MAGIC_UINT32 = 20240801  # llm.c's files of Llama 3's tokens

MAKE_AGAIN = "make the shards again in another folder"  # train.py --preset quickstart makes some too
REMEDY = f"copy it again from its source, or {MAKE_AGAIN}"

# ---- shards ----


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Writes tokens, uint16 (N,), and returns the shard's entry for the manifest."""
    assert tokens.dtype == np.uint16 and tokens.ndim == 1

    def write(file):  # np.save raises no error if the disk is too full for the last 4096 bytes
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
        file.write(tokens)

    write_atomically(path, write)
    return {"file": path.name, "tokens": len(tokens), "sha256": sha256(path)}


class Shard(NamedTuple):
    """Where a file's tokens are. All ranks and both splits keep these instead of open files: a run may have 20,000 shards."""

    path: Path
    offset: int  # of the first token, in bytes
    tokens: int
    version: tuple[int, int]  # inode and time of modification: a file that was replaced is another shard

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns tokens [start, start + count), fewer at the shard's end, as uint16."""
        count = min(count, self.tokens - start)
        with naming(self.path):
            data = read_bytes(open_file(self), self.offset + 2 * start, 2 * count)
        if len(data) < 2 * count:
            raise ValueError(f"shard {self.path} has become shorter since the start: restore it, then run the same command again")
        return np.frombuffer(data, "<u2")


class OpenFile:
    """A file that closes when this object is freed."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.descriptor)


@lru_cache(maxsize=100)  # macOS allows a process 256 open files; opening a file on a network disk is slow
def open_file(shard: Shard) -> OpenFile:
    return OpenFile(shard.path)


def read_bytes(file: OpenFile, offset: int, count: int) -> bytes:
    """Reads up to count bytes. Unlike a memory map, it raises OSError if the disk fails; a map would kill the process."""
    if hasattr(os, "pread"):
        return os.pread(file.descriptor, count, offset)
    os.lseek(file.descriptor, offset, os.SEEK_SET)  # Windows
    return os.read(file.descriptor, count)


def inspect_shard(folder: Path, entry: dict) -> Shard:
    """Reads the header of a manifest's entry. ValueError if the file is missing, damaged or not a shard, OSError if it can't be read."""
    path = folder / entry["file"]
    try:
        with naming(path), open(path, "rb") as file:
            status = os.fstat(file.fileno())
            offset = first_token(file, path, status.st_size, entry)
    except FileNotFoundError:
        raise ValueError(f"shard {path} is missing: copy it back, or {MAKE_AGAIN}") from None
    return Shard(path, offset, (status.st_size - offset) // 2, (status.st_ino, status.st_mtime_ns))


def first_token(file, path: Path | str, size: int, entry: dict) -> int:
    """Returns the offset of a shard's first token, in bytes. file: begins like the shard. path: for messages. ValueError if its header,
    its size in bytes or a manifest's entry contradict each other."""
    offset, tokens = (bin_header if str(path).endswith(".bin") else npy_header)(file, path)
    if size != offset + 2 * tokens:
        raise damaged(path, f"its header promises {offset + 2 * tokens:,} bytes, it has {size:,}")
    if tokens != entry.get("tokens", tokens):
        raise ValueError(f"shard {path} has {tokens:,} tokens, the manifest says {entry['tokens']:,}: {REMEDY}")
    return offset


def damaged(path: Path | str, why: str) -> ValueError:
    return ValueError(f"shard {path} is damaged ({why}): {REMEDY}")


def npy_header(file, path: Path) -> tuple[int, int]:
    """Returns the offset of the first token and the number of tokens, from the header that np.save writes. Reads it by itself: numpy
    would evaluate it as Python, and reserve as much memory as a damaged header asks for."""
    start = file.read(12)
    if start[:2] == b"PK":
        raise ValueError(f"shard {path} is an archive of arrays (.npz), expected one array: save each with np.save")
    if start[:6] != NPY_MAGIC or start[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise damaged(path, "it does not begin like a .npy file" if start else "it is empty")
    width = 2 if start[6] == 1 else 4
    file.seek(8 + width)
    size = int.from_bytes(start[8 : 8 + width], "little")
    header = file.read(min(size, 10_000)).decode("latin-1")
    dtype, shape = re.search(r"'descr': *'([^']{1,20})'", header), re.search(r"'shape': *\(([0-9, ]{0,100})\)", header)
    if not (dtype and shape and len(header) == size):
        raise damaged(path, "its header can't be read")
    sizes = [int(part) for part in shape[1].split(",") if part.strip(" ").isdigit()]
    if dtype[1] not in ("<u2", "=u2", "|u2") or len(sizes) != 1:
        raise wrong_type(path, f"{len(sizes)}-dimensional {type_name(dtype[1])}")
    return 8 + width + size, sizes[0]


def type_name(code: str) -> str:
    try:
        return str(np.dtype(code))
    except (TypeError, ValueError, SyntaxError):
        return repr(code)


def wrong_type(path: Path, found: str) -> ValueError:
    return ValueError(
        f"shard {path} holds {found}, expected 1-dimensional uint16: if all ids are below 65,536, write them as uint16 into another "
        "folder; if it was uint16 once, copy it again from its source"
    )


def bin_header(file, path: Path) -> tuple[int, int]:
    """The same from a .bin file of llm.c or modded-nanogpt: 256 int32 (magic, version, token count, …), then uint16 tokens."""
    data = file.read(BIN_HEADER_BYTES)
    header = np.frombuffer(data, "<i4") if len(data) == BIN_HEADER_BYTES else (0, 0, 0)
    if header[0] == BIN_MAGIC_UINT32:
        raise wrong_type(path, "llm.c's uint32")
    if header[0] != BIN_MAGIC or header[1] != BIN_VERSION:
        raise damaged(path, f"its header is not llm.c's: magic {BIN_MAGIC}, version {BIN_VERSION}")
    return BIN_HEADER_BYTES, int(header[2])


def open_shard(folder: Path, entry: dict) -> np.ndarray:
    """Returns all tokens of a manifest's entry, uint16 (N,), memory-mapped. ValueError and OSError as inspect_shard."""
    shard = inspect_shard(folder, entry)
    return np.memmap(shard.path, "<u2", "r", shard.offset, (shard.tokens,)) if shard.tokens else np.empty(0, np.uint16)


# ---- a folder of shards ----


def split_of(file: str) -> str | None:
    """Returns 'train' or 'val', from a shard's name. None if the file is not a shard."""
    match = re.search(r"_(train|val)_\d+\.(npy|bin)$", file)
    return match and match[1]


@dataclass
class Shards:
    """A folder's manifest, or its defaults if there is none."""

    folder: Path
    tokenizer: str = "gpt2"
    vocab_size: int = 50257
    entries: list[dict] = field(default_factory=list)  # file; tokens and sha256 too if a manifest has them

    def open(self, split: str) -> list[Shard]:
        """Returns the shards of 'train' or 'val', in order. ValueError and OSError as inspect_shard."""
        return [inspect_shard(self.folder, entry) for entry in self.split(split)]

    def read(self, spans: list[tuple[Shard, int, int]]) -> list[np.ndarray]:
        """Returns the tokens of each span (shard, first token, count) as uint16."""
        return [shard.read(start, count) for shard, start, count in spans]

    def prepare(self, verify: bool):
        """Makes the shards ready on this host, or raises a ValueError. verify: read them all, see verify_shards."""
        if verify:
            verify_shards(self)

    def fetch_ahead(self, needed: list[int]):
        """Begins to fetch what this host lacks of these train shards. Here it has them all."""

    def missing_bytes(self) -> int:
        """Returns how much this host has yet to fetch."""
        return 0

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
        manifest = read_manifest(folder)
        shards = Shards(folder, manifest["tokenizer"], manifest["vocab_size"], manifest["shards"])
    else:
        if (folder / PROGRESS).exists() or (folder / SOURCES).exists():
            raise ValueError(f"{folder} is not finished: run the same fineweb.py command again, or wait if it is still running")
        if part_folders(folder):
            raise ValueError(f"{folder} has parts that are not joined yet: run the same fineweb.py command without --part")
        # macOS writes files like ._x_train_000001.npy
        files = sorted(path.name for path in folder.iterdir() if split_of(path.name) and not path.name.startswith("."))
        shards = Shards(folder, entries=[{"file": name} for name in files])
    raise_repeated(shards)
    for split in ("train", "val"):
        if not shards.split(split):
            raise ValueError(no_shard(shards, split))
    return shards


def no_shard(shards: Shards, split: str) -> str:
    """Says that a split has no shard, and what to do."""
    folder, problem = shards.folder, f"no {split} shard in {shards.folder}"
    if (folder / f"{split}.bin").exists():
        return (
            f"{problem}: {split}.bin looks like nanoGPT's, which has no header; if its tokens are GPT-2's, write them as a shard: "
            f"np.save('data_{split}_000000.npy', np.memmap('{split}.bin', np.uint16, 'r'))"
        )
    if (folder / MANIFEST).exists():
        return f"{problem}: its {MANIFEST} lists none; if this is one of several parts, join them and give the whole folder"
    if not shards.entries:
        return f"no shards in {folder}: give the folder that shards are in, or make some: python fineweb.py --out-dir {folder}"
    name = shards.entries[0]["file"]
    if split == "train":
        return f"{problem}: {name} alone is there; add train shards, named like {name.replace('_val_', '_train_')}"
    new = re.sub(r"_train_\d+", "_val_000000", name)
    if len(shards.entries) == 1:
        return f"{problem}: {name} alone is there; add a shard named {new}"
    return f"{problem}: choose a train shard for validation and rename it, such as {name} to {new}"


def read_manifest(folder: Path) -> dict:
    """Reads a folder's manifest.json. ValueError if it is damaged."""
    remedy = f"restore it from a copy, or {MAKE_AGAIN}"
    return checked_manifest(read_json(folder / MANIFEST, remedy), folder / MANIFEST, remedy)


def checked_manifest(manifest: dict, path: Path | str, remedy: str) -> dict:
    """Returns a manifest. ValueError if it is damaged. path, remedy: for the message."""
    kinds = {"tokenizer": str, "vocab_size": int, "source": str, "revision": str, "settings": dict, "skipped": dict}
    wrong = [name for name, kind in kinds.items() if name in manifest and not has_type(manifest[name], kind)]
    wrong += sorted({"tokenizer", "vocab_size"} - manifest.keys())
    if not wrong and manifest["vocab_size"] < 1:
        wrong = ["vocab_size"]
    if not wrong and not are_entries(manifest.get("shards")):
        wrong = ["shards"]
    if wrong:
        raise ValueError(f"{path} is not a manifest of shards (see its {', '.join(wrong)}): {remedy}")
    return manifest


def are_entries(shards) -> bool:
    """Whether this, from a file, is a manifest's list of shards."""

    def is_entry(entry) -> bool:
        kinds = {"file": str, "tokens": int, "sha256": str}
        typed = isinstance(entry, dict) and all(has_type(entry.get(name), kind) for name, kind in kinds.items())
        inside = typed and not Path(entry["file"]).is_absolute() and ".." not in Path(entry["file"]).parts
        return inside and entry["tokens"] >= 0 and entry["file"].isprintable()

    return isinstance(shards, list) and all(map(is_entry, shards))


def raise_repeated(shards: Shards):
    """ValueError if two entries are the same file, by name or by link: a run would see its tokens twice."""
    seen = {}
    for entry in shards.entries:
        path = shards.folder / entry["file"]
        try:
            status = os.stat(path)
        except OSError:  # inspect_shard says why
            continue
        file = (status.st_dev, status.st_ino, status.st_size) if status.st_ino else path  # 0: this file system has no numbers
        if file in seen:
            raise ValueError(repeated(shards.folder, seen[file], entry["file"]))
        seen[file] = entry["file"]


def repeated(folder: Path, first: str, second: str) -> str:
    """Says that two entries are one file, and what to do."""
    if first == second:
        return f"{folder / MANIFEST} lists {first} twice: restore it from a copy, or {MAKE_AGAIN}"
    then = "keep one of them, move the other elsewhere"
    if (folder / MANIFEST).exists():
        then = f"keep one of them, move the other elsewhere, and restore that file from a copy ({MANIFEST} lists both)"
    return f"{folder / first} and {second} are names of one file: {then}"


def verify_shards(shards: Shards):
    """Reads every shard and checks its sha256 and its ids. Without a manifest, it fills in each entry's sha256 instead.
    ValueError names the first bad shard."""
    for_each(shards.entries, lambda entry: verify_shard(shards.folder, entry, shards.vocab_size), "verifying shards")


def verify_shard(folder: Path, entry: dict, vocab_size: int):
    """verify_shards, for one entry."""
    shard = inspect_shard(folder, entry)
    found, largest = checksum(shard)
    if entry.setdefault("sha256", found) != found:
        raise damaged(shard.path, "its sha256 is not the manifest's")
    check_id(largest, vocab_size, shard.path)


def for_each(entries: list[dict], work: Callable[[dict], None], what: str):
    """Calls work on each entry, in eight threads, with a bar if there are many. Raises the first error."""
    with ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
        list(cli.bar(pool.map(work, entries), desc=what, total=len(entries), unit="shard", disable=len(entries) < 10))


def checksum(shard: Shard) -> tuple[str, int]:
    """Returns the file's sha256 and its largest id, -1 without tokens. Reads it once, a megabyte at a time."""
    digest, largest = hashlib.sha256(), -1
    with naming(shard.path), open(shard.path, "rb") as file:
        digest.update(file.read(shard.offset))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, "<u2", len(chunk) // 2).max(initial=0)))
    return digest.hexdigest(), largest


def check_id(largest: int, vocab_size: int, path: Path):
    if largest >= vocab_size:
        raise ValueError(
            f"shard {path} holds id {largest}, the vocabulary has {vocab_size}: it is damaged or another tokenizer made it; {REMEDY}"
        )
