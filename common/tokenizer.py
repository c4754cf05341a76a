"""Tokenizers: GPT-2's BPE and plain bytes, and fast encoding of many documents.

Every tokenizer's last id is <|endoftext|>.
"""

import base64
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from common import cli

VOCAB_SIZES = {"gpt2": 50257, "bytes": 257}


@dataclass(frozen=True)
class Tokenizer:
    """<|endoftext|> is the last id of every tokenizer here, and the text '<|endoftext|>' is plain text to encode."""

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
    """'gpt2' (tiktoken, which fetches the vocabulary once) or 'bytes' (UTF-8, needs nothing)."""
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
    return Tokenizer(name, VOCAB_SIZES[name], bpe.encode_ordinary, bpe.decode_bytes)


@lru_cache
def fast_encode(name: str) -> Callable[[list[str]], list[np.ndarray]] | None:
    """What get_tokenizer(name).encode makes of each document, many times as fast; None where gigatoken is not installed."""
    if name == "bytes":
        return lambda texts: [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]
    try:
        import gigatoken
    except ImportError:
        return None
    import tiktoken

    bpe = tiktoken.get_encoding(name)
    with tempfile.NamedTemporaryFile("wb", suffix=".tiktoken") as file:  # gigatoken reads ranks from a file in tiktoken's format
        for rank in range(bpe.eot_token):
            file.write(b"%s %d\n" % (base64.b64encode(bpe.decode_single_token_bytes(rank)), rank))
        file.flush()
        fast = gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer="gpt2")

    def encode(texts):
        rows = fast.encode_batch(texts, parallel=False).layout  # the chunks are what is done in parallel
        return np.split(rows.content.data, rows.offsets.data[1:-1])

    return encode


SAMPLE_CHARS = 2000  # of each chunk, encoded both ways


def tokenize(tokenizer_name: str, texts: list[str]) -> np.ndarray:
    """Documents → one uint16 row, <|endoftext|> before each. A chunk's tokens depend on nothing but its text."""
    tokenizer = get_tokenizer(tokenizer_name)
    rows = fast_rows(tokenizer, texts) or [tokenizer.encode(text) for text in texts]
    tokens, filled = np.empty(sum(len(row) + 1 for row in rows), np.uint16), 0
    for row in rows:
        tokens[filled] = tokenizer.eot
        tokens[filled + 1 : filled + 1 + len(row)] = row
        filled += 1 + len(row)
    return tokens


def fast_rows(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray] | None:
    """The documents by the fast encoder, held against the plain one on the first characters; None where that must do them."""
    fast, sample = fast_encode(tokenizer.name), texts[0][:SAMPLE_CHARS]
    if fast is None:
        return None
    try:
        first, *rows = fast([sample, *texts])
    except TypeError:  # gigatoken takes no half of a surrogate pair
        return None
    if first.tolist() != tokenizer.encode(sample):
        print(f"warning: gigatoken and tiktoken differ on {sample[:40]!r}…: tiktoken does this part of the text", file=sys.stderr)
        return None
    return rows
