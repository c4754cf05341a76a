"""GPT-2's BPE and plain bytes, and fast encoding of many documents."""

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
    """Encodes text to ids and back. The last id is <|endoftext|>; encode treats the text '<|endoftext|>' as plain text."""

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
    return Tokenizer(name, VOCAB_SIZES[name], bpe.encode_ordinary, bpe.decode_bytes)


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
        first, *rows = fast([sample, *texts])
    except TypeError:  # gigatoken rejects lone surrogates
        return None
    if first.tolist() != tokenizer.encode(sample):
        print(f"warning: gigatoken and tiktoken differ on {sample[:40]!r}…: using tiktoken for this chunk", file=sys.stderr)
        return None
    return rows
