"""Writes a checkpoint as a Hugging Face folder for transformers, lm-evaluation-harness and llama.cpp: weights, config, tokenizer.

python export.py -m log --out-dir exported
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from checkpoint import load_with_tokenizer
from common import cli
from common.device import pick_dtype
from common.files import read_json
from common.tokenizer import Tokenizer

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@dataclass
class ExportConfig:
    """Export a model as a folder that other programs load."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """A checkpoint.pt, a run's folder, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    out_dir: str = "exported"
    """Output folder. Replaces an earlier export."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the exported weights."""


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The tokenizer.json of the `tokenizers` library: byte-level BPE (Radford et al., 2019). The byte tokenizer has no merges.
    Unlike ours, it reads the text '<|endoftext|>' as the special token."""
    tokens = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.eot)}
    merges = [" ".join(map(as_text, halves(token, tokens))) for token in tokens if len(token) > 1]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": tokenizer.eot, "content": "<|endoftext|>", "special": True}
    return {
        "version": "1.0",
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
        "pre_tokenizer": level,
        "post_processor": level | {"trim_offsets": False},
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {as_text(token): i for token, i in tokens.items()} | {"<|endoftext|>": tokenizer.eot},
            "merges": merges,
        },
    }


def as_text(token: bytes) -> str:
    """Spells a token with one character per byte, like GPT-2's vocabulary: printable Latin-1 characters stay, other bytes become
    the characters from 256 on. So no token contains a space or a control character."""
    return "".join(CHARS[byte] for byte in token)


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARS = {byte: chr(byte) for byte in PRINTABLE}
CHARS |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - CHARS.keys()))}


def halves(token: bytes, tokens: dict[bytes, int]) -> list[bytes]:
    """The two tokens that were merged into this one. Applies all merges that come before its own."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        first = min(range(len(parts) - 1), key=lambda i: tokens.get(parts[i] + parts[i + 1], len(tokens)))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def save_tokenizer(tokenizer: Tokenizer, folder: Path, seq_len: int):
    """Writes tokenizer.json and tokenizer_config.json. seq_len: the model's; transformers warns about longer texts."""
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len, **special}
    config["model_input_names"] = ["input_ids", "attention_mask"]  # transformers 4 adds token types, which GPT-2 would embed
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer), ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main():
    with cli.one_line_errors():
        config = cli.parse(ExportConfig)
        folder = Path(config.out_dir)
        # in a run's folder, config.json would hide the checkpoints
        if folder.is_dir() and (others := {path.name.removesuffix(".tmp") for path in folder.iterdir()} - FILES):
            raise ValueError(f"{folder} has other files ({min(others)}, …): choose another --out-dir")
        model, tokenizer = load_with_tokenizer(config.model)
        model.to(pick_dtype(config.dtype, torch.device("cpu"))).save_pretrained(folder)
        save_tokenizer(tokenizer, folder, model.config.seq_len)
        kind = read_json(folder / "config.json", "")["architectures"][0]
        print(f"{folder}: {kind}, {model.num_params():,} parameters in {config.dtype}, tokenizer {tokenizer.name}")


if __name__ == "__main__":
    main()
