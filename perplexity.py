"""How well a model predicts text: loss, perplexity, and bits a byte, which compares models with other tokenizers too.

python perplexity.py -m log README.md             # any text files
python perplexity.py -m gpt2 edu_fineweb10B       # a folder of shards: what train.py validates on
"""

import json
import math
import sys
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
from common.tokenizer import Tokenizer
from common.validation import raise_errors
from dataloader import Shards, TokenStream, find_shards
from model import GPT
from ops.loss import log_likelihoods
from variants import scoring_copy


@dataclass
class PerplexityConfig:
    """Measure how well a model predicts text."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Text files, or folders of shards."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "gpt2"
    """A checkpoint.pt, a run's folder, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    device: Annotated[str, tyro.conf.arg(aliases=["-d"])] = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Precision of the matrix products; the losses are in fp32 in any case."""
    max_tokens: int = 10_485_760
    """The first tokens of a text, or as many whole sequences of a folder as train.py's --val-tokens would take, at least one; 0: all."""
    stride: int = 0
    """For texts: predict so many tokens a window, with as much before them as the model sees. Fewer give each token more to go
    by and take longer; 0: as many as the window has, as lm-evaluation-harness does."""
    batch_size: int = 8
    """Windows at a time; changes nothing but the rounding."""
    json: bool = False
    """Print JSON."""

    def validate(self):
        """ValueError with all errors at once."""
        errors = cli.at_least(0, self, "max_tokens", "stride") + cli.at_least(1, self, "batch_size")
        errors += [] if self.paths else ["give at least one text file or folder of shards"]
        errors += [f"no file {path}: give text files or folders of shards" for path in self.paths if not Path(path).exists()]
        errors += [f"{path} is a shard: give its folder" for path in self.paths if Path(path).suffix in (".npy", ".bin")]
        raise_errors(errors)


# a row is one window: its ids, and how many of the last of them are predicted
Row = tuple[list[int], int]


def rows_of_text(ids: list[int], seq_len: int, stride: int) -> Iterator[Row]:
    """All ids but the first predicted once, each from at most seq_len before it. The last window reaches as far back as the
    model sees."""
    done, last = 0, len(ids) - 1
    while done < last:
        end = min(last, done + (stride if done and stride else seq_len))
        yield ids[max(0, end - seq_len) : end + 1], end - done
        done = end


def rows_of_shards(shards: Shards, seq_len: int, max_tokens: int) -> tuple[Iterator[Row], int]:
    """The sequences that train.py validates on, and how many ids are predicted in them."""
    stream = TokenStream(shards, "val", seq_len, shuffle=False)
    there = stream.sequences_per_epoch
    count = max(1, min(there, max_tokens // seq_len)) if max_tokens else there
    starts = (i * there // count * seq_len for i in range(count))
    return ((stream.read(start, seq_len + 1).tolist(), seq_len) for start in starts), count * seq_len


@torch.no_grad()
def score(model: GPT, tokenizer: Tokenizer, rows: Iterator[Row], batch_size: int, total: int | None = None) -> dict:
    """tokens: how many were predicted; loss: their mean cross entropy in nats; perplexity: e^loss; bits_per_byte: their sum in bits
    by the bytes of text that they stand for, where <|endoftext|> has none."""
    scorer, device = scoring_copy(model), model.transformer.wte.weight.device
    tokens, nats, size = 0, 0.0, 0
    with cli.bar(total=total, desc="scoring", unit="tok", unit_scale=True, leave=False) as bar:
        while batch := list(islice(rows, batch_size)):
            longest = max(len(ids) for ids, _ in batch)
            padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch], device=device)  # (B, longest), on the right
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
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / size if size else math.inf,
    }


def read_text(path: Path, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    """<|endoftext|>, which every text of the training data has before it, and the text's ids. ValueError where there is none."""
    text = path.read_bytes().decode("utf-8", "replace")  # line ends as they are
    if "\N{REPLACEMENT CHARACTER}" in text:
        print(f"warning: {path} is not all UTF-8: what is not counts as a replacement character", file=sys.stderr)
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError(f"{path} is empty: give a file with text")
    return [tokenizer.eot, *(ids[:max_tokens] if max_tokens else ids)]


def main():
    with cli.one_line_errors():
        config = cli.parse(PerplexityConfig)
        config.validate()
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        model, tokenizer = load_with_tokenizer(config.model, device)
        T, results = model.config.seq_len, []
        for path in config.paths:
            if Path(path).is_dir():
                shards = find_shards(path)
                if shards.tokenizer != tokenizer.name:
                    raise ValueError(f"{path} has tokens of {shards.tokenizer}, the model those of {tokenizer.name}: score the text itself")
                rows, total = rows_of_shards(shards, T, config.max_tokens)
            else:
                ids = read_text(Path(path), tokenizer, config.max_tokens)
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
