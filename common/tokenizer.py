"""GPT-2's BPE and plain bytes, and fast encoding of many documents."""

import base64
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from common import cli

VOCAB_SIZES = {"gpt2": 50257, "bytes": 257}
OTHER = "other"  # the name of a tokenizer that is known to be none of these

# tables for GPT-2's ids: plain, with an added [PAD], padded to a multiple of 8, padded to a multiple of 64 or 128
ROWS = {257: "bytes"} | dict.fromkeys((50257, 50258, 50264, 50304), "gpt2")


def misfit(name: str, rows: int) -> str:
    """Says that a model with this many ids can't read all ids of a tokenizer; '' if it can."""
    return "" if VOCAB_SIZES[name] <= rows else f"its tokenizer {name} has {VOCAB_SIZES[name]} ids, the model only {rows}"


@dataclass(frozen=True)
class Tokenizer:
    """Encodes text to ids and back. The last id is <|endoftext|>; encode treats the text '<|endoftext|>' as plain text.
    Ids beyond it, which a model with more rows may write, decode to nothing."""

    name: str
    vocab_size: int
    encode: Callable[[str], list[int]]
    decode_bytes: Callable[[list[int]], bytes]

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @property
    def eot(self) -> int:
        return self.vocab_size - 1


@lru_cache
def get_tokenizer(name: str) -> Tokenizer:
    """Returns 'gpt2' (tiktoken, downloads the vocabulary once) or 'bytes' (UTF-8, needs no download). ValueError if it can't."""
    if name == "bytes":
        return Tokenizer(
            name,
            VOCAB_SIZES[name],
            lambda text: list(text.encode("utf-8", "replace")),
            lambda ids: bytes(i for i in ids if i < 256),
        )
    if name != "gpt2":
        raise ValueError(f"no tokenizer named {name!r}: choose gpt2 or bytes")
    import tiktoken

    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as e:  # whatever the HTTP client raises
        if cli.disk_failed(e):
            raise
        raise ValueError(
            f"could not fetch GPT-2's vocabulary ({type(e).__name__}): check the network, "
            "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bytes"
        ) from e
    size = VOCAB_SIZES[name]
    return Tokenizer(name, size, lambda text: encode_bpe(bpe, text), lambda ids: bpe.decode_bytes([i for i in ids if i < size]))


LONG_RUN = 100_000  # blanks; from about a million on, tiktoken's regular expressions overflow their stack
BLANK = r"[^\S\x1c-\x1f]"  # what \s is in GPT-2's pattern; Python's \s also has these four
LONG_RUNS = re.compile(rf"(?<!{BLANK}){BLANK}{{{LONG_RUN},}}")


def encode_bpe(bpe, text: str) -> list[int]:
    """Encodes with tiktoken's bpe, in parts if the text has long runs of blanks. The ids are the same: GPT-2's pattern gives a run's
    last blank to what follows, and takes the rest as one piece. So it splits at the same place."""
    cuts = [run.end() - 1 for run in LONG_RUNS.finditer(text) if run.end() < len(text)] if len(text) > LONG_RUN else []
    with one_line_panics(text):
        if not cuts:
            return bpe.encode_ordinary(text)
        return [i for start, end in pairwise([0, *cuts, len(text)]) for i in bpe.encode_ordinary(text[start:end])]


@contextmanager
def one_line_panics(text: str) -> Iterator[None]:
    """Turns a panic of a library in Rust into a ValueError. Such a panic is no Exception, and can't be sent between processes."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise ValueError(f"the text that starts with {text[:40]!r} can't be tokenized ({e}): leave it out") from None


@lru_cache
def fast_encode(name: str) -> Callable[[list[str]], list[np.ndarray]] | None:
    """Returns a function that encodes many documents, much faster than get_tokenizer(name).encode and with the same ids.
    None if it needs gigatoken and that is not installed."""
    if name == "bytes":
        return lambda texts: [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]
    try:
        import gigatoken
    except ImportError:
        return None
    import tiktoken

    bpe = tiktoken.get_encoding(name)
    with tempfile.NamedTemporaryFile("wb", suffix=".tiktoken") as file:  # gigatoken reads ranks only from a file
        for rank in range(bpe.eot_token):
            file.write(b"%s %d\n" % (base64.b64encode(bpe.decode_single_token_bytes(rank)), rank))
        file.flush()
        fast = gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer="gpt2")

    def encode(texts):
        rows = fast.encode_batch(texts, parallel=False).layout  # fineweb.py encodes chunks in parallel
        return np.split(rows.content.data, rows.offsets.data[1:-1])

    return encode


SAMPLE_CHARS = 2000  # of each chunk, to compare both encoders


def tokenize(tokenizer_name: str, texts: list[str]) -> np.ndarray:
    """Encodes documents into one row, uint16 (N,), with <|endoftext|> before each. The result depends on the text alone."""
    tokenizer = get_tokenizer(tokenizer_name)
    rows = fast_rows(tokenizer, texts) or [tokenizer.encode(text) for text in texts]
    tokens, filled = np.empty(sum(len(row) + 1 for row in rows), np.uint16), 0
    for row in rows:
        tokens[filled] = tokenizer.eot
        tokens[filled + 1 : filled + 1 + len(row)] = row
        filled += 1 + len(row)
    return tokens


def fast_rows(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray] | None:
    """Encodes documents with the fast encoder, and checks it against the plain one on the first characters.
    None if the plain encoder must take over."""
    fast, sample = fast_encode(tokenizer.name), texts[0][:SAMPLE_CHARS]
    if fast is None:
        return None
    try:
        with one_line_panics(sample):
            first, *rows = fast([sample, *texts])
    except (TypeError, ValueError):  # gigatoken rejects lone surrogates
        return None
    if first.tolist() != tokenizer.encode(sample):
        cli.say(f"warning: gigatoken and tiktoken differ on {sample[:40]!r}…: using tiktoken for this chunk")
        return None
    return rows
