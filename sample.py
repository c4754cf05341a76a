"""Generates text with a model.

python sample.py -m log --prompt "Hello, I'm a language model,"
"""

import codecs
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from checkpoint import load_with_tokenizer
from common import cli
from common.device import compile_problem, mend_compile_cache, pick_device
from common.tokenizer import Tokenizer
from common.validation import raise_errors
from model import GPT
from ops.kv_cache import KVCache
from variants import inference_copy, prepare_compiled_token, set_precision, with_switches

FROM_FILE = "FILE:"


class Sampling(NamedTuple):
    """How to choose the next id: see SampleConfig."""

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass
class SampleConfig:
    """Generate text. Only the samples go to stdout."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """A checkpoint.pt, a run's folder, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    prompt: str = "Hello, I'm a language model,"
    """The text to continue; '' starts a new document. FILE:prompt.txt reads it from a file."""
    num_samples: int = 4
    """Number of samples."""
    max_new_tokens: int = 64
    """Tokens to add. A sample ends early at <|endoftext|>."""
    temperature: float = 1.0
    """Below 1 sharpens the distribution, above 1 flattens it. 0 always takes the likeliest token."""
    top_k: int = 50
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample from the tokens with at least this share of the likeliest one's probability; 0: from all."""
    repetition_penalty: float = 1.0
    """Make tokens that the text already has less likely, such as 1.2. 1: off."""
    seed: int = 1337
    """The same seed gives the same samples."""
    device: Annotated[str, tyro.conf.arg(aliases=["-d"])] = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32", "int8"] = "fp32"
    """Precision of weights and computation. auto: bf16 if the hardware supports it. int8: 8-bit weights, the rest as in auto on CUDA, and
    in fp32 elsewhere."""
    kv_cache: bool = True
    """Cache keys and values instead of recomputing them for every token."""
    compile: bool = False
    """torch.compile the step that adds a token. It takes half a minute; on a CPU it pays for a long text with --num-samples 1."""
    draft: str = ""
    """A smaller model with the same tokenizer that proposes tokens; '' for none. It pays most with --num-samples 1."""
    draft_tokens: int = 4
    """Tokens that the draft proposes per pass of the model."""

    def validate(self):
        """ValueError with all errors at once."""
        errors = cli.at_least(1, self, "num_samples", "draft_tokens")
        errors += cli.at_least(0, self, "max_new_tokens", "temperature", "top_k", "seed")
        if self.seed >= 2**63:
            errors.append(f"--seed is {self.seed}: it must be below 2^63")
        errors += cli.at_most(10_000, self, "num_samples")
        if not 0 < self.top_p <= 1:
            errors.append(f"--top-p is {self.top_p}: it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            errors.append(f"--min-p is {self.min_p}: it must be from 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            errors.append(f"--repetition-penalty is {self.repetition_penalty}: it must be above 0 and finite")
        if self.compile and not self.kv_cache:
            errors.append("--compile needs the KV cache: drop --no-kv-cache")
        if self.draft and not self.kv_cache:
            errors.append("--draft needs the KV cache: drop --no-kv-cache")
        if self.draft and self.compile:
            errors.append("--draft and --compile don't work together: drop one")
        raise_errors(errors)

    @property
    def sampling(self) -> Sampling:
        return Sampling(*(getattr(self, name) for name in Sampling._fields))


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
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """Continues each row of idx by max_new_tokens ids: (B, T) int64 on the model's device → (B, T + max_new_tokens).

    temperature: 0 is greedy. top_k, top_p, min_p: 0, 1.0 and 0 turn them off. compile: torch.compile the step that adds a token; it
    recompiles for another model, another batch size, or every 128 more positions. draft: a model that proposes draft_tokens ids
    per pass, see speculate; use_cache and compile then have no effect. counts: adds up the model's "passes", the "ids" added to each
    row, and the draft's "proposed" and "accepted" ids. The model sees at most its last seq_len ids.
    Longer texts shift every position with each token, so they use neither cache nor draft.
    ValueError if T is 0, the draft has another vocabulary, or SampleConfig rejects a number.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    return torch.cat([idx, *grow(model, idx, max_new_tokens, sampling, generator, use_cache, compile, draft, draft_tokens, counts)], dim=1)


def grow(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    compile: bool = False,
    draft: GPT | None = None,
    draft_tokens: int = 4,
    counts: Counter | None = None,
) -> Iterator[Tensor]:
    """Yields what generate adds, a few ids (B, n) at a time. See generate."""
    if idx.dim() != 2 or idx.size(1) == 0:
        raise ValueError(f"generate needs ids (B, T) with T at least 1: these are {tuple(idx.shape)}")
    SampleConfig("", max_new_tokens=max_new_tokens, draft_tokens=draft_tokens, **sampling._asdict()).validate()
    if compile and with_switches(model.config).n_expert > 1:
        raise ValueError("--compile does not work with experts: drop it")
    end, counts = idx.size(1) + max_new_tokens, Counter() if counts is None else counts
    if draft is not None:
        fast = inference_copy(model, rows=len(idx) * (draft_tokens + 1)), inference_copy(draft, rows=len(idx))
        for new in speculate(*fast, idx, end, draft_tokens, sampling, generator, counts):
            idx = torch.cat([idx, new], dim=1)
            counts["ids"] += new.size(1)
            yield new
    for new, _ in stream(model, idx, end - idx.size(1), sampling, generator, use_cache, compile):
        counts.update(passes=1, ids=1)
        yield new


@torch.no_grad()
def stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    use_cache: bool = True,
    compile: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields what generate adds, one position at a time: the ids (B, 1) and the model's logits (B, V) for them.
    ValueError if logits are not finite. Compiled steps raise it at the end."""
    limit, end = model.config.seq_len, idx.size(1) + max_new_tokens
    compile = compile and use_cache
    if compile:
        prepare_compiled_token(model)
        cache = own = empty_cache(model, idx, min(limit, -(-end // 128) * 128))
    else:
        model, cache = inference_copy(model, rows=idx.size(0)), KVCache(min(limit, end)) if use_cache else None
    new, position = idx, None  # the latest ids; their position (1,), for compiled steps
    largest = torch.zeros((), device=idx.device)  # of the compiled steps' logits: read once at the end, because reading waits
    while idx.size(1) < end:
        if idx.size(1) > limit:
            cache = None
        if compile and cache is not None and cache.length:
            position = static_position(cache, idx.device) if position is None else position + 1  # a copy from the CPU would wait
            logits = compiled_step(idx.device.type)(model, new, cache, position)
            largest = torch.maximum(largest, logits.abs().amax())
            cache.length += 1
        else:
            logits = next_logits(model, idx[:, -limit:] if cache is None else idx, cache)[:, -1]  # (B, V)
        new = next_ids(logits.float(), sampling, idx, generator)  # (B, 1)
        idx = torch.cat([idx, new], dim=1)
        yield new, logits
    if compile:
        SPARE[model] = own
    if not largest.isfinite():
        raise ValueError(f"the model's {DIVERGED}")


def static_position(cache: KVCache, device: torch.device) -> Tensor:
    """Returns the cache's length (1,) on the device, for the first compiled step."""
    cache.mark_static()
    return torch.tensor([cache.length], device=device)


SPARE = WeakKeyDictionary()  # each model's last cache of compiled steps, while no text uses it


def empty_cache(model: GPT, idx: Tensor, room: int) -> KVCache:
    """Returns the cache of the model's last compiled text if it fits, else a new one. A CUDA graph works for one cache's addresses:
    PyTorch records another one for another cache, and stops using graphs after 128."""
    kind = idx.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.lm_head.weight.dtype
    made_for = room, len(idx), idx.device, dtype, torch.is_inference_mode_enabled()  # its tensors can't be written outside of that mode
    cache = SPARE.pop(model, None)  # a second text at the same time finds none
    if cache is None or cache.made_for != made_for:
        cache = KVCache(room)
        cache.made_for = made_for
    cache.reset()
    return cache


@torch.no_grad()
def speculate(
    model: GPT,
    draft: GPT,
    idx: Tensor,
    end: int,
    draft_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    counts: Counter,
) -> Iterator[Tensor]:
    """Decodes speculatively (Leviathan et al., 2023; Chen et al., 2023): continues ids (B, T) to (B, end), or up to the model's last
    position. Yields the ids (B, n) of each pass.

    The draft draws k ids, each from its distribution q. One pass of the model gives its distribution p for all of them. It accepts
    an id with probability min(1, p / q). A draw from max(p - q, 0) replaces the first rejected id. If all k are accepted, one more
    is drawn from p. So every id has the distribution p, and greedy decoding gives the model's own ids, up to rounding: a pass over
    several ids sums in another order. All rows advance to the first rejection in any row.
    """
    vocab_size, limit = model.config.vocab_size, model.config.seq_len
    if draft.config.vocab_size != vocab_size:
        raise ValueError(f"the draft has {draft.config.vocab_size} ids, the model {vocab_size}: use a draft with as many")
    cache, draft_cache = (KVCache(min(net.config.seq_len, end), slack=draft_tokens) for net in (model, draft))
    while (length := idx.size(1)) < end and length <= limit:
        k = max(0, min(draft_tokens, end - length - 1, limit - length, draft.config.seq_len - length + 1))
        ids, q = propose(draft, idx, k, draft_cache, sampling, generator)
        probs, candidates = distribution(next_logits(model, ids, cache, k + 1).float(), sampling, ids)  # (B, k + 1, n)
        p = torch.zeros_like(q).scatter_(2, candidates, probs)
        proposed = ids[:, length:, None]  # (B, k, 1)
        p_proposed, q_proposed = p[:, :k].gather(2, proposed), q[:, :k].gather(2, proposed)
        accepted = torch.rand(proposed.shape, generator=generator, device=idx.device) * q_proposed < p_proposed
        n = int(accepted.all(0).cumprod(0).sum())  # ids accepted in all rows
        residual = (probs[:, n] - q[:, n].gather(1, candidates[:, n])).clamp(min=0)
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, probs[:, n])  # p = q leaves 0, but rejects nothing
        new = draw(residual, candidates[:, n], generator)
        if n < k:
            new = torch.where(accepted[:, n], proposed[:, n], new)
        idx = torch.cat([ids[:, : length + n], new], dim=1)
        cache.length, draft_cache.length = length + n, min(draft_cache.length, length + n)
        counts.update(passes=1, proposed=proposed.numel(), accepted=int(accepted[:, : n + 1].sum()))
        yield idx[:, length:]  # last: the reader may stop here


def propose(draft: GPT, idx: Tensor, k: int, cache: KVCache, sampling: Sampling, generator) -> tuple[Tensor, Tensor]:
    """Lets the draft draw k more ids: (B, T) → (B, T + k), and their distributions q (B, k + 1, V). The last q is 0, so that
    p - q is p there."""
    ids, q = idx, torch.zeros(idx.size(0), k + 1, draft.config.vocab_size, device=idx.device)
    for i in range(k):
        probs, candidates = distribution(next_logits(draft, ids, cache, name="draft").float(), sampling, ids)  # (B, 1, n)
        q[:, i : i + 1].scatter_(2, candidates, probs)
        ids = torch.cat([ids, draw(probs[:, 0], candidates[:, 0], generator)], dim=1)
    return ids, q


DIVERGED = "logits are not finite: its training diverged, use an earlier checkpoint"


def next_logits(model: GPT, ids: Tensor, cache: KVCache | None, n: int = 1, name: str = "model") -> Tensor:
    """The logits (B, n, V) after the last n of the ids (B, T). Computes only ids that are not in the cache yet.
    ValueError if the logits are not finite. name: the model's, in that message."""
    seen = cache.length if cache is not None else 0
    logits = model.logits(model.hidden_states(ids[:, seen:], cache)[:, -n:])
    if not logits.isfinite().all():
        raise ValueError(f"the {name}'s {DIVERGED}")
    return logits


def decode_step(model: GPT, ids: Tensor, cache: KVCache, position: Tensor) -> Tensor:
    """The logits (B, V) after the ids (B, 1) at position (1,)."""
    return model.logits(model.hidden_states(ids, cache, position)[:, -1])


@functools.cache
def compiled_step(device_type: str):
    """decode_step, compiled for a type of device."""
    # a step is hundreds of small kernels: a CUDA graph launches them at once, and tuning finds their block sizes
    cuda_options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    # compute the input of a matrix product once; fused into the product, it would be recomputed for every row of the weights
    cpu_options = {"realize_opcount_threshold": 0, "realize_reads_threshold": 0}
    return torch.compile(decode_step, dynamic=False, options=cuda_options if device_type == "cuda" else cpu_options)


def next_ids(logits: Tensor, sampling: Sampling, ids: Tensor, generator) -> Tensor:
    """Draws the id after each row of ids (B, T), from its logits (B, V): (B, 1)."""
    probs, candidates = distribution(logits[:, None], sampling, ids)
    return draw(probs[:, 0], candidates[:, 0], generator)


def distribution(logits: Tensor, sampling: Sampling, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, n, V) after the last n of the ids (B, T) → probabilities (B, n, k) of the k likeliest ids (B, n, k). All other ids
    have probability 0.

    Applies the repetition penalty (Keskar et al., 2019), temperature, top-k (Fan et al., 2018), top-p (Holtzman et al., 2020), then
    min-p (Nguyen et al., 2024).
    """
    temperature, top_k, top_p, min_p, penalty = sampling
    if penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for i in range(logits.size(1)):  # the later of the last n ids see more of the text
            seen[:, i].scatter_(1, ids[:, : ids.size(1) - logits.size(1) + 1 + i], True)
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if temperature < 1e-4:  # greedy; a tiny temperature would overflow below
        ids = logits.argmax(-1, keepdim=True)
        return torch.ones_like(ids, dtype=logits.dtype), ids
    logits = logits / temperature
    if top_k:  # sorting all ids would take longer than a small model's pass
        logits, ids = logits.topk(min(top_k, logits.size(-1)))
    else:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    probs = F.softmax(logits, dim=-1)
    if top_p < 1:
        before = probs.cumsum(-1) - probs  # of all likelier ids: 0 for the likeliest, so it always stays
        probs = probs.masked_fill(before >= top_p, 0.0)
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs[..., :1], 0.0)
    if top_p < 1 or min_p:
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, ids


def draw(weights: Tensor, ids: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws an id from each row in proportion to its weight: (B, n), (B, n) → (B, 1). Gives the same ids as torch.multinomial,
    which would stop to check the weights and leave the GPU idle between compiled steps."""
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
    sampling: Sampling | None = None,
    show: Callable[[str], None] | None = None,
    **options,
) -> list[str]:
    """The prompt with each continuation, as text up to its first <|endoftext|>. show: called with each piece of the first text as it
    is written. options: passed to grow."""
    device = model.transformer.wte.weight.device
    start = tokenizer.encode(prompt) or [tokenizer.eot]
    idx = torch.tensor([start] * num_samples, device=device)
    texts = [GrowingText(tokenizer) for _ in range(num_samples)]
    show, unshown = show or (lambda piece: None), prompt  # the prompt comes with the first piece: nothing is shown before an error
    for new in grow(model, idx, max_new_tokens, sampling or Sampling(), torch.Generator(device).manual_seed(seed), **options):
        pieces = [text.add(ids) for text, ids in zip(texts, new.tolist(), strict=True)]
        show(unshown + pieces[0])
        unshown = ""
        if all(text.ended for text in texts):
            break
    pieces = [text.end() for text in texts]
    show(unshown + pieces[0])
    return [prompt + text.text for text in texts]


class GrowingText:
    """A text that ids are added to, up to the first <|endoftext|>. A character appears when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.ended = "", False

    def add(self, ids: list[int]) -> str:
        """Returns the text that these ids add."""
        if self.ended:
            return ""
        self.ended = self.tokenizer.eot in ids
        ids = ids[: ids.index(self.tokenizer.eot)] if self.ended else ids
        return self.append(self.decoder.decode(self.tokenizer.decode_bytes(ids)))

    def end(self) -> str:
        """Returns what the bytes of an unfinished character become."""
        return self.append(self.decoder.decode(b"", final=True))

    def append(self, piece: str) -> str:
        self.text += piece
        return piece


def read_prompt(given: str) -> str:
    """Returns the text of a --prompt. ValueError if its file can't be read."""
    if not given.startswith(FROM_FILE):
        return given
    try:
        return Path(given.removeprefix(FROM_FILE)).read_text(encoding="utf-8-sig")  # Windows editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"--prompt {given}: can't read the file ({cli.in_one_line(e)}): give the path of a text in UTF-8") from e


def write_samples(config: SampleConfig, model: GPT, tokenizer: Tokenizer, prompt: str, draft: GPT | None):
    """Writes the samples to stdout, the first one as it grows, and their numbers to stderr."""
    counts, pieces, clean = Counter(), [], cli.printable if sys.stdout.isatty() else str

    def show(piece: str):
        if not pieces:
            cli.say(f"--- sample 1 of {config.num_samples}")
        pieces.append(piece)
        print(clean(piece), end="", flush=True)

    _, *others = sample_texts(
        model, tokenizer, prompt, config.num_samples, config.max_new_tokens, config.seed, config.sampling, show,
        use_cache=config.kv_cache, compile=config.compile, draft=draft, draft_tokens=config.draft_tokens, counts=counts,
    )  # fmt: skip
    print()
    for number, text in enumerate(others, 2):
        cli.say(f"--- sample {number} of {config.num_samples}")
        print(clean(text), flush=True)
    if counts["proposed"]:
        rate, per_pass = counts["accepted"] / counts["proposed"], counts["ids"] / counts["passes"]
        cli.say(
            f"draft: {counts['accepted']:,} of {counts['proposed']:,} tokens accepted ({rate:.0%}); "
            f"each pass of the model added {per_pass:.2f} tokens to a sample"
        )


def main():
    with cli.one_line_errors(if_memory_runs_out="lower --num-samples or --max-new-tokens, or use a smaller model"):
        config = cli.parse(SampleConfig)
        config.validate()
        prompt = read_prompt(config.prompt)
        device = pick_device(config.device)
        problem = compile_problem(device) if config.compile else ""
        if problem:
            raise ValueError(f"drop --compile, which does not work here: {problem}")
        if config.compile:
            mend_compile_cache()
        model, tokenizer = load_with_tokenizer(config.model, device)
        set_precision(model, config.dtype)
        draft = None
        if config.draft:
            draft, draft_tokenizer = load_with_tokenizer(config.draft, device)
            set_precision(draft, config.dtype)
            if draft_tokenizer.name != tokenizer.name:
                raise ValueError(
                    f"--draft uses {draft_tokenizer.name} tokens, the model {tokenizer.name}: use a draft with the same tokenizer"
                )
        write_samples(config, model, tokenizer, prompt, draft)


if __name__ == "__main__":
    main()
