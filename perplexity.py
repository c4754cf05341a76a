"""Measures how well a model predicts text: loss, perplexity, and bits per byte, which compare models with different tokenizers.

python perplexity.py -m log README.md             # any text files
python perplexity.py -m gpt2 edu_fineweb10B       # a folder of shards: what train.py validates on
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from checkpoint import load_with_tokenizer
from common import cli
from common.device import pick_device, pick_dtype
from common.documents import BadRows, How, describe_bad, read_file
from common.shards import Shards, find_shards
from common.text import shown
from common.tokenizer import Tokenizer
from common.validation import raise_errors
from dataloader import TokenStream
from model import GPT
from ops.loss import log_likelihoods
from tasks.judging import perplexity_of
from tasks.readers import Choice, rows_of_text
from variants import inference_copy, set_precision


@dataclass
class PerplexityConfig:
    """Measure how well a model predicts text."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Text files (.jsonl, .json and .parquet: rows of text), or folders of shards."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "gpt2"
    """A checkpoint.pt, a run's folder, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    device: Annotated[str, tyro.conf.arg(aliases=["-d"])] = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32", "int8"] = "fp32"
    """Precision of the matrix products. Losses are always in fp32. int8: 8-bit weights, as in sample.py."""
    max_tokens: int = 10_485_760
    """Tokens to score from the start of a text, or from shards the sequences that train.py's --val-tokens takes (one or more); 0: all."""
    stride: int = 0
    """Tokens of a text to predict per window; 0: all, as in lm-evaluation-harness. Fewer give each more context and take longer."""
    batch_size: int = 8
    """Windows per forward pass. Changes only the rounding."""
    json: bool = False
    """Print JSON."""
    text_field: str = "text"
    """Field or column that has the text, in .parquet, .jsonl and .json."""
    skip_bad_rows: bool = False
    """Leave out rows that can't be read (null, no string, not UTF-8, not JSON, truncated files), and count them."""

    def validate(self):
        """ValueError with all errors at once."""
        errors = cli.at_least(0, self, "max_tokens", "stride") + cli.at_least(1, self, "batch_size")
        errors += [] if self.paths else ["no paths: pass at least one text file or folder of shards"]
        errors += [f"no file {path}: pass text files or folders of shards" for path in self.paths if not Path(path).exists()]
        errors += [f"{path} is a shard: pass its folder" for path in self.paths if Path(path).suffix in (".npy", ".bin")]
        raise_errors(errors)


def rows_of_shards(shards: Shards, seq_len: int, max_tokens: int) -> tuple[Iterator[Choice], int]:
    """The sequences that train.py validates on, and how many ids they predict in all."""
    stream = TokenStream(shards, "val", seq_len, shuffle=False)
    available = stream.sequences_per_epoch
    count = max(1, min(available, max_tokens // seq_len)) if max_tokens else available
    starts = (i * available // count * seq_len for i in range(count))
    return ((stream.read(start, seq_len + 1).tolist(), seq_len) for start in starts), count * seq_len


@torch.no_grad()
def score(model: GPT, tokenizer: Tokenizer, rows: Iterator[Choice], batch_size: int, total: int | None = None) -> dict:
    """Scores a model on rows. Returns tokens (how many were predicted), loss (mean cross entropy in nats per token), perplexity
    (e^loss) and bits_per_byte (total cross entropy in bits per byte of their text; <|endoftext|> has no bytes)."""
    scorer, device = inference_copy(model), model.transformer.wte.weight.device
    tokens, nats, size = 0, 0.0, 0
    with cli.bar(total=total, desc="scoring", unit="tok", unit_scale=True, leave=False) as bar:
        while batch := list(islice(rows, batch_size)):
            longest = max(len(ids) for ids, _ in batch)
            padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch], device=device)  # (B, longest)
            wanted = [row * (longest - 1) + i for row, (ids, n) in enumerate(batch) for i in range(len(ids) - 1 - n, len(ids) - 1)]
            targets = [target for ids, n in batch for target in ids[len(ids) - n :]]
            x = scorer.hidden_states(padded[:, :-1]).flatten(0, 1)[wanted]  # (N, C)
            nats -= log_likelihoods(scorer.logits, x, torch.tensor(targets, device=device)).cpu().double().sum().item()
            tokens += len(targets)
            size += len(tokenizer.decode_bytes([target for target in targets if target != tokenizer.eot]))
            bar.update(len(targets))
    loss = nats / tokens
    return {
        "tokens": tokens,
        "loss": loss,
        "perplexity": perplexity_of(loss),
        "bits_per_byte": nats / math.log(2) / size if size else math.inf,
    }


def read_ids(path: Path, config: PerplexityConfig, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of a file's documents, each after an <|endoftext|>: those that fineweb.py writes into shards. ValueError if
    there are none."""
    bad, ids = BadRows(config.skip_bad_rows), []
    for text in bad.good(read_file(path, How(config.text_field))):
        ids += [tokenizer.eot, *tokenizer.encode(text)]
        if config.max_tokens and len(ids) > config.max_tokens:
            break
    if bad.found:
        cli.say(f"{shown(path)}: {describe_bad(bad.found)}")
    if len(ids) < 2:
        raise ValueError(f"{shown(path)} is empty: pass a file with text")
    return ids[: config.max_tokens + 1] if config.max_tokens else ids


def main():
    with cli.one_line_errors(if_memory_runs_out="lower --batch-size, or use a smaller model"):
        config = cli.parse(PerplexityConfig)
        config.validate()
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        model, tokenizer = load_with_tokenizer(config.model, device)
        if config.dtype == "int8":
            set_precision(model, "int8")
        T, results = model.config.seq_len, []
        for path in config.paths:
            if Path(path).is_dir():
                shards = find_shards(path)
                if shards.tokenizer != tokenizer.name:
                    raise ValueError(f"{path} has {shards.tokenizer} tokens, the model uses {tokenizer.name}: score the text itself")
                if shards.vocab_size > model.config.vocab_size:
                    raise ValueError(f"{path} has {shards.vocab_size} ids, the model {model.config.vocab_size}: score the text itself")
                rows, total = rows_of_shards(shards, T, config.max_tokens)
            else:
                ids = read_ids(Path(path), config, tokenizer)
                rows, total = rows_of_text(ids, T, min(config.stride, T)), len(ids) - 1
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                results.append({"path": path, **score(model, tokenizer, rows, config.batch_size, total)})
            if not config.json:
                text = "{path}: {tokens:,} tokens, loss {loss:.4f}, perplexity {perplexity:.4f}, {bits_per_byte:.4f} bits a byte"
                print(text.format(**results[-1]), flush=True)
        if config.json:
            print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
