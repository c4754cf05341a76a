"""Lists the files to read in users' folders, and says which others are skipped and why."""

import errno
import hashlib
import itertools
import os
import sysconfig
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path

from common import cli
from common.documents import Found, How, read_file
from common.text import ENDINGS, PACKED, kind_of, shown

TOOLS = ("__pycache__", "node_modules")
AGAIN = "other names of files that are read anyway"


@dataclass
class Listing:
    """The files to read, in order, and what was skipped: reason → names."""

    files: list[Found] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    seen: set = field(default_factory=set)  # the identity of each file that is read

    def add(self, found: Found, root: Path):
        """Adds a file, unless it is there by another name."""
        if identity(found.path) in self.seen:
            self.skip(AGAIN, found.path, root)
        else:
            self.files.append(found)
        self.seen.add(identity(found.path))

    def skip(self, reason: str, path: Path, root: Path):
        self.skipped[reason].append(str(path.relative_to(root)))

    def summary(self) -> list[str]:
        """Lines that say what is read, what is skipped, and why."""
        endings = [os.path.splitext(found.path.name.lower())[1] for found in self.files]
        kinds = Counter(kind_of(found.path) + (end if end in PACKED else "") for found, end in zip(self.files, endings, strict=True))
        read = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        return [f"reading {len(self.files):,} {'file' if len(self.files) == 1 else 'files'}: {read}", *self.reasons()]

    def reasons(self) -> list[str]:
        return [f"skipping {reason} ({len(names):,}): {cli.some(names)}" for reason, names in self.skipped.items()]


def list_files(paths: list[Path], text_field: str, out: Path | None = None) -> Listing:
    """Lists the files, and all readable files below each folder, sorted by name, each file once. Doesn't enter the folder `out`."""
    listing = Listing()
    for path in paths:
        if path.is_dir():
            found, again = Listing(skipped=listing.skipped, seen=listing.seen), len(listing.skipped.get(AGAIN, ()))
            walk(path, out, found)
            leave_out_other_json(found, path, text_field)
            if not found.files and len(listing.skipped.get(AGAIN, ())) == again:
                why = "; ".join(found.reasons())
                raise ValueError(f"{shown(path)} contains no {ENDINGS} files{why and f' ({why})'}: give another folder")
            listing.files += found.files
        elif path.is_file() and kind_of(path):
            listing.add(Found(path.name, path), path.parent)
        else:
            raise ValueError(f"can't read {shown(path)}: give a folder, or a file that ends in {ENDINGS}")
    return listing


def walk(root: Path, out: Path | None, listing: Listing):
    """Adds the files below a folder, sorted by name, each file once. Follows links to folders, but enters no folder twice."""
    known = {identity(folder) for folder in root.resolve().parents}
    found, folders = [], deque([(root, False)])
    while folders:
        folder, linked = folders.popleft()
        if out and out.exists() and folder != root and os.path.samefile(folder, out):
            listing.skip("--out-dir", folder, root)
            continue
        if identity(folder) in known:
            listing.skip("links to folders that are read anyway, or that this one is in", folder, root)
            continue
        known.add(identity(folder))
        for entry in entries_of(folder, root, listing):
            is_link = linked or entry.is_symlink()
            if not entry.is_dir():
                found.append((is_link, Path(entry.path)))
            elif is_link:
                folders.append((Path(entry.path), True))  # after all real ones, so that a file keeps its own name
            else:
                folders.appendleft((Path(entry.path), False))
    for _, path in sorted(found):
        listing.add(Found((Path(root.name) / path.relative_to(root)).as_posix(), path), root)
    listing.files.sort(key=lambda found: found.path)


def identity(path: Path):
    """Returns what two names of one file or folder have in common."""
    try:
        info = os.stat(path)
    except OSError:  # a folder around the root may be closed to us
        return os.path.realpath(path)
    return (info.st_dev, info.st_ino) if info.st_ino else os.path.realpath(path)  # some file systems have no inodes


def entries_of(folder: Path, root: Path, listing: Listing) -> list[os.DirEntry]:
    """Returns a folder's readable files and the folders to enter. Notes the others."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as e:
        listing.skip(unreadable(e.strerror), folder, root)
        return []
    kept = []
    for entry in found:
        try:
            reason = skip_reason(entry)
        except OSError as e:
            reason = unreadable(e.strerror)
        if reason:
            listing.skip(reason, Path(entry.path), root)
        else:
            kept.append(entry)
    return kept


def unreadable(why: str) -> str:
    return f"unreadable files and folders, {why}"


def skip_reason(entry: os.DirEntry) -> str:
    """Says why a folder's entry is left out; '' if it is read."""
    if entry.name.startswith("."):
        return "hidden files and folders"
    if entry.is_dir():
        return "folders of tools" if entry.name in TOOLS or os.path.exists(os.path.join(entry.path, "pyvenv.cfg")) else ""
    if not os.path.exists(entry.path):
        return "broken links"
    if not entry.is_file():
        return "pipes, sockets and devices"
    if not kind_of(Path(entry.name)):
        return "files of other kinds"
    if not os.access(entry.path, os.R_OK):
        return unreadable(os.strerror(errno.EACCES))
    return "" if entry.stat().st_size else "empty files"


def leave_out_other_json(listing: Listing, root: Path, text_field: str):
    """Skips the .json files that hold no rows: most folders have settings in such files."""
    data = []
    for found in listing.files:
        if kind_of(found.path) == ".json" and not has_rows(found.path, text_field):
            listing.skip(f".json files without a field '{text_field}'", found.path, root)
            listing.seen.discard(identity(found.path))  # --dataset may name it too
        else:
            data.append(found)
    listing.files = data


def has_rows(path: Path, text_field: str) -> bool:
    """Whether one of a file's first rows has the field, even a bad one."""
    rows = itertools.islice(read_file(path, How(text_field)), 20)
    return any(isinstance(row, str) or row.kind not in ("not JSON", "without the field") for row in rows)


def stdlib_files() -> list[Found]:
    """Lists the files of Python's standard library. They are sorted by a hash of the name, so that the val shard is a fair sample."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for pattern in ("*.py", "*.txt") for path in root.rglob(pattern))
    files = (path for path in files if not {"site-packages", "dist-packages", "__pycache__"} & set(path.parts))
    ordered = sorted(files, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    return [Found(path.as_posix(), root / path) for path in ordered]


def older_files(paths: list[Path]) -> list[Found]:
    """Lists the files that versions before --skip-bad-rows read, in their order."""
    endings, files = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".md", ".py"), []
    for path in paths:
        files += sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(endings)) if path.is_dir() else [path]
    return [Found(path.name, path) for path in files]


def older_revision(files: list[Found]) -> str:
    """Returns the revision that those versions recorded: of names and sizes."""
    listing = [f"{found.path.name} {found.path.stat().st_size}" for found in files]
    return "files-" + hashlib.sha256("\n".join(listing).encode("utf-8", "surrogateescape")).hexdigest()[:16]
