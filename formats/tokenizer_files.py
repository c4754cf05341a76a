"""Tells which tokenizer a Hugging Face folder has. Needs no vocabulary to compare with, only its fingerprint."""

import hashlib
import json
import re
from pathlib import Path

from common.tokenizer import OTHER, ROWS, VOCAB_SIZES

VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# sha256 of a tokenizer's tokens, in the order of their ids, and its merges, one a line
FINGERPRINTS = {
    "gpt2": "9e52e2d09323136cf31fca11e3a80463fe013e9ccfa1c04ac36c8bb825af904d",
    "bytes": "d9d076ac90efd4193540ec4a764547e374e3d3a6324b60e60ad723a600a1ec9a",
}
END = "<|endoftext|>"
MARKER = re.compile(r"<.+>|\[.+\]")  # people also add these as ordinary tokens, such as [PAD]


class DifferentError(ValueError):
    """Says how a file differs from those of our tokenizers."""


def files_of(folder: Path) -> list[Path]:
    """Returns the files of a folder's tokenizer; [] if it has no vocabulary."""
    has_one = any((folder / name).exists() for name in VOCABULARIES)
    return [folder / name for name in (*VOCABULARIES, *SETTINGS) if (folder / name).exists()] if has_one else []


def identify(folder: Path, rows: int) -> tuple[str | None, str]:
    """Returns which tokenizer the model in a folder has: 'gpt2', 'bytes' or OTHER. Without files of a tokenizer, the number of rows in
    the model's table decides; None if it does not tell. For OTHER and None, also returns why."""
    names = [path.name for path in files_of(folder) if path.name in VOCABULARIES]
    if not names:
        name = ROWS.get(rows)
        return name, "" if name else f"no tokenizer is known for a vocabulary of {rows}, and it has no tokenizer.json"
    for file in names:
        try:
            name = name_of(folder, file)
            if VOCAB_SIZES[name] > rows:
                raise DifferentError(f"has {VOCAB_SIZES[name]} ids, its config.json {rows}")
        except DifferentError as e:
            return OTHER, f"its {file} {e}"
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as e:
            return OTHER, f"its {file} can't be read as a tokenizer ({type(e).__name__})"
    return name, ""


def name_of(folder: Path, file: str) -> str:
    """Returns the name of the tokenizer in a file. DifferentError if it is none of ours, or if its settings or added tokens give text
    other ids."""
    if file not in ("tokenizer.json", "vocab.json", "merges.txt"):
        raise DifferentError("is not GPT-2's")
    is_fast = file == "tokenizer.json"
    fast = read(folder / file) if is_fast else {}
    vocab, merges = parts_of_json(fast) if is_fast else parts_of_pair(folder)
    added = added_tokens(folder, fast)
    tokens = {i: token for token, i in vocab.items()} | dict(added)
    prints = {name: fingerprint([str(tokens.get(i)) for i in range(size)], merges) for name, size in VOCAB_SIZES.items()}
    names = [name for name in prints if prints[name] == FINGERPRINTS[name]]
    if not names or len(set(vocab.values())) < len(vocab):
        raise DifferentError("is not GPT-2's: its vocabulary or its merges differ")
    end = VOCAB_SIZES[names[0]] - 1
    apart = {i: special or MARKER.fullmatch(token) for (i, token), special in added.items() if i > end}  # never in ordinary text
    ordinary = [token for i, token in added if (i, token) != (end, END) and not apart.get(i)]
    if ordinary:
        raise DifferentError(f"is not GPT-2's: it reads {ordinary[0]!r} as one token")
    if read(folder / "tokenizer_config.json").get("add_prefix_space"):
        raise DifferentError("is not GPT-2's: it adds a space before a text")
    return names[0]


def read(path: Path) -> dict:
    """Returns a file of JSON, {} if it is missing."""
    return json.loads(path.read_bytes()) if path.exists() else {}


def fingerprint(tokens: list[str], merges: list[str]) -> str:
    return hashlib.sha256("\n".join([*tokens, *merges]).encode("utf-8", "surrogatepass")).hexdigest()


def parts_of_json(fast: dict) -> tuple[dict[str, int], list[str]]:
    """Returns vocabulary and merges of a tokenizer.json. DifferentError if it splits text in another way than GPT-2."""
    model, split = fast["model"], fast.get("pre_tokenizer") or {}
    odd = [model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")]
    if model.get("type", "BPE") != "BPE" or any(odd):
        raise DifferentError("is not GPT-2's: its model is not a plain BPE")
    usual = split.get("type") == "ByteLevel" and not split.get("add_prefix_space") and split.get("use_regex", True)
    if fast.get("normalizer") or not usual:
        raise DifferentError("is not GPT-2's: it splits or changes the text in another way")
    return model["vocab"], [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def parts_of_pair(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Returns vocabulary and merges of vocab.json and merges.txt."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    return json.loads((folder / "vocab.json").read_bytes()), [line for line in lines if line and not line.startswith("#version")]


def added_tokens(folder: Path, fast: dict) -> dict[tuple[int, str], bool]:
    """Returns the added tokens by id and text, with whether they are special: those of tokenizer.json, and those of the other files,
    which older versions of transformers write."""
    entries = [(entry["id"], entry["content"], entry["special"]) for entry in fast.get("added_tokens") or []]
    later = read(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    entries += [(int(i), entry["content"], entry.get("special", False)) for i, entry in later.items()]
    special = json.dumps(read(folder / "special_tokens_map.json"))
    entries += [(i, token, json.dumps(token) in special) for token, i in read(folder / "added_tokens.json").items()]
    added = {}
    for i, token, is_special in entries:
        added[i, token] = added.get((i, token), False) or is_special
    return added
