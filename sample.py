"""Text from a model.

python sample.py -m log --prompt "Hello, I'm a language model,"
"""

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from checkpoint import load_with_tokenizer
from common import cli
from common.device import can_compile, mend_compile_cache, pick_device, pick_dtype
from common.tokenizer import Tokenizer
from common.validation import raise_errors
from model import GPT
from ops.kv_cache import KVCache
from variants import with_switches


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
    draft: str = ""
    """A smaller model with the same tokenizer, given as -m is. It proposes tokens that the model checks in one pass: the
    distribution stays the model's own. All samples go on together, so it pays most with --num-samples 1; '' for none."""
    draft_tokens: int = 4
    """How many tokens the draft proposes at a time."""

    def validate(self):
        """ValueError with all errors at once."""
        errors = cli.at_least(1, self, "num_samples", "draft_tokens")
        errors += cli.at_least(0, self, "max_new_tokens", "temperature", "top_k", "seed")
        if self.seed >= 2**63:
            errors.append(f"--seed is {self.seed}: it must be below 2^63")
        errors += cli.at_most(10_000, self, "num_samples")
        if not 0 < self.top_p <= 1:
            errors.append(f"--top-p is {self.top_p}: it must be above 0 and at most 1")
        if self.compile and not self.kv_cache:
            errors.append("--compile is for generation with a cache: leave --no-kv-cache out")
        if self.draft and not self.kv_cache:
            errors.append("--draft is for generation with a cache: leave --no-kv-cache out")
        if self.draft and self.compile:
            errors.append("--draft and --compile don't go together: leave one of them out")
        raise_errors(errors)


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
    draft: GPT | None = None,
    draft_tokens: int = 4,
    counts: Counter | None = None,
    progress: bool = False,
) -> Tensor:
    """Continues each row of idx by max_new_tokens ids: (B, T) int64 on the model's device → (B, T + max_new_tokens).

    temperature 0 is greedy. top_k 0 and top_p 1.0 leave the distribution as it is. compile: torch.compile the step of a
    token, anew for another model, another batch size or 128 more positions. draft: a model that proposes draft_tokens ids at
    a time, see speculate; with it use_cache and compile make no difference. counts: has the model's "passes" added, and of
    the draft's ids those "proposed" and "accepted". progress: a bar on stderr, when it takes more than two seconds. The model
    sees at most its last seq_len ids; from there on every position shifts with each token, and cache and draft are of no
    use. ValueError when T is 0, the draft has another vocabulary, or a number is outside what SampleConfig allows.
    """
    if idx.dim() != 2 or idx.size(1) == 0:
        raise ValueError(f"generate needs ids (B, T), at least one in a row, to go on from: these are {tuple(idx.shape)}")
    SampleConfig("", "", 1, max_new_tokens, temperature, top_k, top_p, draft_tokens=draft_tokens).validate()
    if compile and with_switches(model.config).n_expert > 1:
        raise ValueError("a token's path through experts can't be compiled: leave --compile out")
    end = idx.size(1) + max_new_tokens
    counts = Counter() if counts is None else counts
    how = temperature, top_k, top_p
    if draft is not None:
        idx = speculate(model, draft, idx, end, draft_tokens, how, generator, counts)
    rows = [idx]
    steps = stream(model, idx, end - idx.size(1), *how, generator, use_cache, compile)
    for new, _ in cli.bar(steps, total=end - idx.size(1), desc="sampling", unit="tok", delay=2, leave=False, disable=not progress):
        rows.append(new)
        counts["passes"] += 1
    return torch.cat(rows, dim=1)


@torch.no_grad()
def stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
    use_cache: bool = True,
    compile: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What generate adds, as it comes: the ids (B, 1) of a position after the other, each with the model's logits (B, V) for it.
    ValueError when these are not finite, from compiled steps not before the end."""
    limit, end = model.config.seq_len, idx.size(1) + max_new_tokens
    cache = KVCache(min(limit, -(-end // 128) * 128 if compile else end)) if use_cache else None
    new, position = idx, None  # the latest ids, and the first of their positions, where compiled code asks for it
    largest = torch.zeros((), device=idx.device)  # of the compiled steps' logits: looked at once, since to look is to wait
    while idx.size(1) < end:
        if idx.size(1) > limit:
            cache = None
        if compile and cache is not None and cache.length:
            if position is None:
                cache.mark_static()
                position = torch.tensor([cache.length], device=idx.device)
            else:  # not brought from the CPU each time, for which a step would wait for the one before
                position = position + 1
            logits = compiled_step(idx.device.type)(model, new, cache, position)
            largest = torch.maximum(largest, logits.abs().amax())
            cache.length += 1
        else:
            logits = next_logits(model, idx[:, -limit:] if cache is None else idx, cache)[:, -1]  # (B, V)
        new = next_ids(logits.float(), temperature, top_k, top_p, generator)  # (B, 1)
        idx = torch.cat([idx, new], dim=1)
        yield new, logits
    if not largest.isfinite():
        raise ValueError(f"the model's {DIVERGED}")


def speculate(
    model: GPT,
    draft: GPT,
    idx: Tensor,
    end: int,
    draft_tokens: int,
    how: tuple[float, int, float],
    generator: torch.Generator | None,
    counts: Counter,
) -> Tensor:
    """Speculative decoding (Leviathan et al., 2023; Chen et al., 2023): ids (B, T) → (B, end), or as far as the model has
    positions. how: temperature, top_k, top_p.

    The draft draws k ids, each from its distribution q. One pass of the model gives its own distribution p at all of them. An id is
    accepted with probability min(1, p / q). The first rejected one is replaced by a draw from max(p - q, 0); after k accepted ones
    another is drawn from p. So every id has the distribution p, and greedy decoding gives the model's own ids (up to rounding: a
    pass over several ids adds in another order). All rows advance to the first rejection in any of them.
    """
    vocab_size, limit = model.config.vocab_size, model.config.seq_len
    if draft.config.vocab_size != vocab_size:
        raise ValueError(f"the draft has {draft.config.vocab_size} ids, the model {vocab_size}: take a draft with the model's tokenizer")
    cache, draft_cache = (KVCache(min(net.config.seq_len, end), slack=draft_tokens) for net in (model, draft))
    while (length := idx.size(1)) < end and length <= limit:
        k = max(0, min(draft_tokens, end - length - 1, limit - length, draft.config.seq_len - length + 1))
        ids, q = propose(draft, idx, k, draft_cache, how, generator)
        probs, candidates = distribution(next_logits(model, ids, cache, k + 1).float(), *how)  # (B, k + 1, n)
        p = torch.zeros_like(q).scatter_(2, candidates, probs)
        proposed = ids[:, length:, None]  # (B, k, 1)
        p_proposed, q_proposed = p[:, :k].gather(2, proposed), q[:, :k].gather(2, proposed)
        accepted = torch.rand(proposed.shape, generator=generator, device=idx.device) * q_proposed < p_proposed
        n = int(accepted.all(0).cumprod(0).sum())  # ids accepted in all rows
        residual = (probs[:, n] - q[:, n].gather(1, candidates[:, n])).clamp(min=0)
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, probs[:, n])  # 0 where p = q: all are accepted
        new = draw(residual, candidates[:, n], generator)
        if n < k:
            new = torch.where(accepted[:, n], proposed[:, n], new)
        idx = torch.cat([ids[:, : length + n], new], dim=1)
        cache.length, draft_cache.length = length + n, min(draft_cache.length, length + n)
        counts.update(passes=1, proposed=proposed.numel(), accepted=int(accepted[:, : n + 1].sum()))
    return idx


def propose(draft: GPT, idx: Tensor, k: int, cache: KVCache, how: tuple[float, int, float], generator) -> tuple[Tensor, Tensor]:
    """Ids (B, T) → with k more drawn by the draft (B, T + k), and their distributions (B, k + 1, V), the last of which is 0: there
    p - q is p."""
    ids, q = idx, torch.zeros(idx.size(0), k + 1, draft.config.vocab_size, device=idx.device)
    for i in range(k):
        probs, candidates = distribution(next_logits(draft, ids, cache, name="draft")[:, -1].float(), *how)
        q[:, i].scatter_(1, candidates, probs)
        ids = torch.cat([ids, draw(probs, candidates, generator)], dim=1)
    return ids, q


DIVERGED = "logits are not finite numbers: its training diverged, use an earlier checkpoint"


def next_logits(model: GPT, ids: Tensor, cache: KVCache | None, n: int = 1, name: str = "model") -> Tensor:
    """The logits (B, n, V) that follow the last n of the ids (B, T); a cache holds the first of these."""
    seen = cache.length if cache is not None else 0
    logits = model.logits(model.hidden_states(ids[:, seen:], cache)[:, -n:])
    if not logits.isfinite().all():
        raise ValueError(f"the {name}'s {DIVERGED}")
    return logits


def decode_step(model: GPT, ids: Tensor, cache: KVCache, position: Tensor) -> Tensor:
    """The logits (B, V) that follow the ids (B, 1) at this position (1,)."""
    return model.logits(model.hidden_states(ids, cache, position)[:, -1])


@functools.cache
def compiled_step(kind: str):
    """decode_step, compiled for a kind of device."""
    # a step is hundreds of small kernels, whose sizes are tried out
    launched_as_one = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    # on a CPU, what a matrix is multiplied with is to be computed once, not again in the loop over each of its rows
    computed_once = {"realize_opcount_threshold": 0, "realize_reads_threshold": 0}
    return torch.compile(decode_step, dynamic=False, options=launched_as_one if kind == "cuda" else computed_once)


def next_ids(logits: Tensor, temperature: float, top_k: int, top_p: float, generator) -> Tensor:
    """(B, V) → (B, 1)."""
    return draw(*distribution(logits, temperature, top_k, top_p), generator)


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Logits (..., V) → the probabilities (..., n) of the n likeliest ids (..., n); of all others they are 0.

    Temperature first, then top-k (Fan et al., 2018), then top-p (Holtzman et al., 2020).
    """
    if temperature < 1e-4:  # greedy, and no overflow below
        ids = logits.argmax(-1, keepdim=True)
        return torch.ones_like(ids, dtype=logits.dtype), ids
    logits = logits / temperature
    if top_k:  # to sort all of them would take longer than a small model's pass
        logits, ids = logits.topk(min(top_k, logits.size(-1)))
    else:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    probs = F.softmax(logits, dim=-1)
    if top_p < 1:
        before = probs.cumsum(-1) - probs  # probability of all likelier ids: the likeliest always stays
        probs = probs.masked_fill(before >= top_p, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, ids


def draw(weights: Tensor, ids: Tensor, generator: torch.Generator | None) -> Tensor:
    """One of the ids of each row, likely as its weight: (B, n), (B, n) → (B, 1). As torch.multinomial does it, but that one stops
    to check the weights, and between compiled steps a GPU would have nothing to do meanwhile."""
    if ids.size(1) == 1:
        return ids
    race = weights / torch.empty_like(weights).exponential_(generator=generator)
    return ids.gather(1, race.argmax(-1, keepdim=True))


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
        if config.compile:
            mend_compile_cache()
        dtype = pick_dtype(config.dtype, device)
        model, tokenizer = load_with_tokenizer(config.model, device)
        model.to(dtype)
        draft = None
        if config.draft:
            draft, own = load_with_tokenizer(config.draft, device)
            draft.to(dtype)
            if own.name != tokenizer.name:
                raise ValueError(f"--draft has the tokenizer {own.name}, the model {tokenizer.name}: take a draft with the model's")
        counts = Counter()
        texts = sample_texts(
            model, tokenizer, config.prompt, config.num_samples, config.max_new_tokens, config.seed,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, use_cache=config.kv_cache, compile=config.compile,
            draft=draft, draft_tokens=config.draft_tokens, counts=counts, progress=True,
        )  # fmt: skip
        for number, text in enumerate(texts, 1):
            print(f"--- sample {number} of {len(texts)}", file=sys.stderr, flush=True)
            print(cli.printable(text) if sys.stdout.isatty() else text, flush=True)
        if counts["proposed"]:
            share, speed = counts["accepted"] / counts["proposed"], config.max_new_tokens / counts["passes"]
            print(
                f"draft: {counts['accepted']:,} of {counts['proposed']:,} tokens accepted ({share:.0%}); "
                f"a pass of the model added {speed:.2f} tokens to a sample", file=sys.stderr,
            )  # fmt: skip


if __name__ == "__main__":
    main()
