"""Text from a model.

python sample.py -m log --prompt "Hello, I'm a language model,"
"""

import functools
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import cli
from checkpoint import load_with_tokenizer
from device import can_compile, pick_device, pick_dtype
from fineweb import Tokenizer
from model import GPT, KVCache


@dataclass
class SampleConfig:
    """Generate text. The samples alone go to stdout."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """A checkpoint.pt, a run's folder, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    prompt: str = "Hello, I'm a language model,"
    """The text to go on from; '' begins a new document."""
    num_samples: int = 4
    """How many continuations."""
    max_new_tokens: int = 64
    """Tokens to add; a sample ends earlier at <|endoftext|>."""
    temperature: float = 1.0
    """Below 1 sharpens the distribution, above 1 flattens it; 0 always takes the likeliest token."""
    top_k: int = 50
    """Sample among the k likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 1337
    """The same seed gives the same samples."""
    device: Annotated[str, tyro.conf.arg(aliases=["-d"])] = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Precision of the weights and of all that is computed with them; auto is bf16 where the hardware has it."""
    kv_cache: bool = True
    """Keep each position's keys and values instead of computing them again for every token."""
    compile: bool = False
    """torch.compile the step of a token: half a minute once; on a CPU it pays for a long text with --num-samples 1."""

    def validate(self):
        """ValueError with every fault at once."""
        faults = cli.at_least(1, self, "num_samples") + cli.at_least(0, self, "max_new_tokens", "temperature", "top_k", "seed")
        if self.seed >= 2**63:
            faults.append(f"--seed is {self.seed}: it must be below 2^63")
        faults += cli.at_most(10_000, self, "num_samples")
        if not 0 < self.top_p <= 1:
            faults.append(f"--top-p is {self.top_p}: it must be above 0 and at most 1")
        if self.compile and not self.kv_cache:
            faults.append("--compile is for generation with a cache: leave --no-kv-cache out")
        cli.refuse(faults)


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    compile: bool = False,
) -> Tensor:
    """Continues each row of idx by max_new_tokens ids: (B, T) int64 on the model's device → (B, T + max_new_tokens).

    temperature 0 is greedy. top_k 0 and top_p 1.0 leave the distribution as it is. compile: torch.compile the step of a
    token, anew for another model, another batch size or 128 more positions. The model sees at most its last seq_len ids;
    from there on every position shifts with each token, and the cache is of no use. ValueError when T is 0.
    """
    if idx.size(1) == 0:
        raise ValueError("generate needs at least one id to go on from")
    limit = model.config.seq_len
    room = idx.size(1) + max_new_tokens
    cache = KVCache(min(limit, -(-room // 128) * 128 if compile else room)) if use_cache else None
    new = idx  # the ids that the model has not seen yet
    for n in range(max_new_tokens):
        if idx.size(1) > limit:
            cache = None
        if compile and cache is not None and cache.length:
            logits = compiled_step(idx.device.type)(model, new, cache, torch.tensor([cache.length], device=idx.device))
            cache.length += 1
        else:
            x = idx[:, -limit:] if cache is None else new  # (B, T)
            logits = model.logits(model.hidden(x, cache)[:, -1])  # (B, V)
        if n == 0 and not logits.isfinite().all():
            raise ValueError("the model's logits are not finite numbers: its training diverged, use an earlier checkpoint")
        new = next_ids(logits.float(), temperature, top_k, top_p, generator)  # (B, 1)
        idx = torch.cat([idx, new], dim=1)
    return idx


def decode_step(model: GPT, ids: Tensor, cache: KVCache, position: Tensor) -> Tensor:
    """The logits (B, V) that follow the ids (B, 1) at this position (1,)."""
    return model.logits(model.hidden(ids, cache, position)[:, -1])


@functools.cache
def compiled_step(kind: str):
    """decode_step, compiled for a kind of device."""
    launched_as_one = {"triton.cudagraphs": True}  # a step is hundreds of small kernels
    # on a CPU, what a matrix is multiplied with is to be computed once, not again in the loop over each of its rows
    computed_once = {"realize_opcount_threshold": 0, "realize_reads_threshold": 0}
    return torch.compile(decode_step, dynamic=False, options=launched_as_one if kind == "cuda" else computed_once)


def next_ids(logits: Tensor, temperature: float, top_k: int, top_p: float, generator) -> Tensor:
    """(B, V) → (B, 1). Temperature first, then top-k (Fan et al., 2018), then top-p (Holtzman et al., 2020)."""
    if temperature < 1e-4:  # greedy, and no overflow below
        return logits.argmax(-1, keepdim=True)
    logits, ids = (logits / temperature).sort(dim=-1, descending=True, stable=True)  # (B, V)
    if top_k:
        logits, ids = logits[:, :top_k], ids[:, :top_k]
    probs = F.softmax(logits, dim=-1)
    before = probs.cumsum(-1) - probs  # probability of all likelier ids: the likeliest always stays
    probs = probs.masked_fill(before >= top_p, 0.0) if top_p < 1 else probs
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    **how,
) -> list[str]:
    """The prompt and its continuations as text, each up to its first <|endoftext|>. how: as generate has it."""
    device = model.transformer.wte.weight.device
    start = tokenizer.encode(prompt) or [tokenizer.eot]
    idx = torch.tensor([start] * num_samples, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    rows = generate(model, idx, max_new_tokens, generator=generator, **how)[:, len(start) :].tolist()
    return [prompt + tokenizer.decode(row[: row.index(tokenizer.eot)] if tokenizer.eot in row else row) for row in rows]


def main():
    with cli.one_line_errors():
        config = cli.parse(SampleConfig)
        config.validate()
        device = pick_device(config.device)
        if config.compile and not can_compile(device):
            raise ValueError(f"--compile can't be used here on {device.type} (CPU: install g++): leave it out")
        model, tokenizer = load_with_tokenizer(config.model, device)
        model.to(pick_dtype(config.dtype, device))
        texts = sample_texts(
            model, tokenizer, config.prompt, config.num_samples, config.max_new_tokens, config.seed,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, use_cache=config.kv_cache, compile=config.compile,
        )  # fmt: skip
        for number, text in enumerate(texts, 1):
            print(f"--- sample {number} of {len(texts)}", file=sys.stderr, flush=True)
            print(text, flush=True)


if __name__ == "__main__":
    main()
