"""Writes a checkpoint as a Hugging Face folder for transformers, lm-evaluation-harness and llama.cpp: weights, config, tokenizer, and a
model card.

python export.py -m log --out-dir exported
"""

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from checkpoint import Opened, checkpoint_file, load_gpt
from common import cli
from common.device import pick_dtype
from common.files import read_json
from common.logs import read_metrics
from common.shards import MANIFEST
from common.tokenizer import Tokenizer, get_tokenizer
from formats import tokenizer_files
from formats.huggingface import hf_folder
from formats.model_card import model_card
from training.run_json import RUN, last_launch, read_run, read_run_json

CARD = "README.md"
WEIGHTS = {"config.json", "model.safetensors", CARD}
OURS = {"tokenizer.json", "tokenizer_config.json"}


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


def special_ids(source: Path | None, tokenizer: Tokenizer | None) -> dict:
    """The ids of special tokens for config.json: those of the Hugging Face folder that the model comes from, else the tokenizer's."""
    names = ("bos_token_id", "eos_token_id")
    if source is None:
        return dict.fromkeys(names, tokenizer.eot if tokenizer else None)
    theirs = read_json(source / "config.json", "")
    return {name: theirs[name] for name in (*names, "pad_token_id") if name in theirs}


def export(config: ExportConfig) -> str:
    """Writes the folder, with the tokenizer's own files if it comes from a Hugging Face folder that has some. Writes no tokenizer if the
    right one is not known. Returns a line that says what was written."""
    model, opened = load_gpt(config.model)
    source = hf_folder(config.model) if checkpoint_file(config.model) is None else None
    copied = tokenizer_files.files_of(source) if source else []
    why = opened.no_tokenizer
    tokenizer = None if why or copied else get_tokenizer(opened.tokenizer)
    folder = Path(config.out_dir)
    raise_if_taken(folder, source, WEIGHTS | ({path.name for path in copied} if copied else OURS if tokenizer else set()))
    model.to(pick_dtype(config.dtype, torch.device("cpu"))).save_pretrained(folder, special_ids(source, tokenizer))
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    if tokenizer:
        save_tokenizer(tokenizer, folder, model.config.seq_len)
    if why:
        note = "copied the files of its own tokenizer" if copied else f"wrote no tokenizer; put the files of the right one into {folder}"
        cli.say(f"warning: {why}: {note}")
    kind = read_json(folder / "config.json", "")["architectures"][0]
    facts, scores, prompt = origin(config.model, opened)
    facts = {"architecture": kind, "parameters": f"{model.num_params():,} in {config.dtype}"} | facts
    prompt = prompt if copied or tokenizer else None
    (folder / CARD).write_text(model_card(folder.resolve().name, facts, scores, prompt), encoding="utf-8")
    label = f"tokenizer {opened.tokenizer}" if not why else "its own tokenizer" if copied else "no tokenizer"
    return f"{folder}: {kind}, {model.num_params():,} parameters in {config.dtype}, {label}"


def origin(path: str, opened: Opened) -> tuple[dict[str, str], dict[tuple[str, str], float], str]:
    """Returns what is known of a model's training, for its card: facts, scores and a prompt."""
    file, prompt = checkpoint_file(path), "Hello, I'm a language model,"
    if file is None:
        return {"from": path}, {}, prompt
    step, val_loss = opened.content.get("step"), opened.content.get("val_loss")
    scores = {} if val_loss is None else {("validation split", "loss in nats per token"): val_loss}
    if step is None or not (file.parent / RUN).exists():
        return {}, scores, prompt
    config, launch = read_run(file.parent, step), last_launch(read_run_json(file.parent / RUN), step)
    manifest = Path(config.data_dir, MANIFEST)
    made = read_json(manifest, "") if manifest.exists() else {}
    facts = {
        "started from": config.init_from,
        "trained on": f"{step * config.total_batch_tokens:,} tokens in {step:,} steps",
        "data": " ".join(filter(None, (made.get("source"), made.get("revision")))),
        "learned from": config.teacher,
        "code": f"commit {launch['commit']}" if launch.get("commit") else "",
    }
    hellaswag = read_metrics(file.parent / "metrics.jsonl", ["hellaswag_acc_norm"], "hellaswag_acc_norm")["hellaswag_acc_norm"]
    scores |= {("HellaSwag", "acc_norm"): hellaswag[step]} if step in hellaswag else {}
    return {row: text for row, text in facts.items() if text}, scores, config.sample_prompt


def raise_if_taken(folder: Path, source: Path | None, names: set[str]):
    """ValueError if the folder is the model's own, or has files that the export would not replace: in a run's folder, config.json would
    hide the checkpoints, and another tokenizer would be the wrong one. names: the files that the export writes."""
    if source and folder.exists() and folder.samefile(source):
        raise ValueError(f"{folder} is the model's own folder: choose another --out-dir")
    if folder.is_dir() and (others := {path.name.removesuffix(".tmp") for path in folder.iterdir()} - names):
        raise ValueError(f"{folder} has other files ({min(others)}, …): choose another --out-dir")


def main():
    with cli.one_line_errors():
        config = cli.parse(ExportConfig)
        print(export(config))
        folder = Path(config.out_dir)
        cli.say(f"its card is {folder / CARD}; to share it: hf upload {shlex.quote(folder.resolve().name)} {shlex.quote(str(folder))}")


if __name__ == "__main__":
    main()
