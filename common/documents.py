"""Reads documents from local files and folders."""

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path


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
        self.revision = "files-" + hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]
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
