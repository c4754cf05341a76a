"""Measures finished runs: loss, speed, memory and cache."""

import math
import statistics
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import checkpoint
from common import cli
from common.bucket_shards import open_shards
from common.device import can_compile, pick_device
from common.distributed import DistContext
from common.logs import read_metrics
from common.shards import differences
from common.tokenizer import get_tokenizer
from lab.origins import last_of
from lab.runs import last_checkpoint
from model import GPT
from ops.kv_cache import KVCache
from perplexity import rows_of_shards
from train import load_teachers
from training.run_json import RUN, code_now, other_code, read_run, read_run_json
from training.trainer import Trainer
from variants import VariantConfig, build, build_on_meta, flops_per_token, idle_params

code_of_this_process = cache(code_now)  # it takes a second; later edits don't change what is imported


def measure(folder: Path) -> dict:
    """Returns the numbers of a finished run. Loss in nats per token, memory and cache in bytes. curve: tokens → validation loss."""
    config = read_run(folder)
    metrics = read_metrics(folder / "metrics.jsonl", ["tokens_per_second", "memory_bytes", "seconds", "training_seconds", "tokens"])
    rates = list(metrics["tokens_per_second"].values())
    if not rates:
        raise ValueError(f"{folder / 'metrics.jsonl'} has no steps: delete the folder to train the run again, or leave it out")
    validations = read_metrics(folder / "metrics.jsonl", ["tokens", "val_loss"], "val_loss")
    model, loss = build_on_meta(config.model), last_checkpoint(folder)["val_loss"]
    params, per_token = read_run_json(folder / RUN).get("params", model.num_params()), bytes_per_token(folder)
    ours = params == model.num_params()  # else other code has built it, and this checkout can't count for it
    return {
        "tokens": max(metrics["tokens"].values(), default=config.max_steps * config.total_batch_tokens),
        "val_loss": loss,
        "bits_per_byte": loss / math.log(2) / per_token if per_token else None,
        "seconds": max((metrics["training_seconds"] or metrics["seconds"]).values()),  # older runs have only seconds with compiling
        "tokens_per_second": statistics.median(rates[len(rates) // 2 :]),  # it has compiled by then
        "memory_bytes": max(metrics["memory_bytes"].values()),
        "params": params,
        "active_params": params - idle_params(model) if ours else params,
        "flops_per_token": flops_per_token(model) if ours else None,
        "cache_bytes": cache_bytes(config.model) if ours else None,
        "not_a_language_model": check_predictions(folder),
        "curve": {validations["tokens"][step]: loss for step, loss in sorted(validations["val_loss"].items()) if step},
    }


def check_predictions(folder: Path) -> str:
    """Returns why the loss of a run's model means nothing, by this checkout's code; "" if it is fine, or if other code trained it."""
    if other_code(last_of(folder), code_of_this_process()):
        return ""
    try:
        return not_a_language_model(checkpoint.load_gpt(str(folder))[0].eval())
    except Exception as e:  # an idea's code may fail in any way
        if cli.out_of_memory(e):
            raise
        return f"from its checkpoint, it can't predict parts of a text ({cli.in_one_line(e)})"


@torch.no_grad()
def not_a_language_model(model: GPT) -> str:
    """Returns what is wrong with a model's predictions. They must not depend on later tokens, and the loss must be theirs."""
    length = min(model.config.seq_len, 256)
    ids = torch.randint(model.config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1], ids[:, 1:]
    whole = model(x)[0][0]  # (T, V)
    if not whole.isfinite().all():
        return "its predictions are not finite"
    ends = [max(1, length * part // 8 - part) for part in range(1, 8)]  # odd and even: a leak within blocks ends with its block
    apart = [(model(x[:, :end])[0][0] - whole[:end]).abs().max().item() for end in ends]
    if sorted(apart)[-3] > 1e-3 * whole.abs().max().item():  # three: rounding may send a token to another expert
        return "its predictions depend on later tokens"
    loss = F.cross_entropy(whole, y[0]).item()
    return "" if math.isclose(model(x, y)[1].item(), loss, rel_tol=1e-3) else "its loss is not the cross entropy of its predictions"


def bytes_per_token(folder: Path) -> float | None:
    """Returns how many bytes of text a token of the run's validation has, by perplexity.py's rule: <|endoftext|> has none. None if the
    shards or the vocabulary are not at hand."""
    config = read_run(folder)
    try:
        shards = open_shards(config.data_dir)
        if differences(read_run_json(folder / RUN)["data"], shards.contents()):
            return None
        return validated_bytes(config.data_dir, config.model.seq_len, config.val_tokens)
    except (ValueError, OSError):
        return None


@cache
def validated_bytes(data_dir: str, seq_len: int, val_tokens: int) -> float | None:
    """Returns the bytes per token of the targets that train.py validates on."""
    shards = open_shards(data_dir)
    tokenizer, counts = get_tokenizer(shards.tokenizer), np.zeros(2**16, np.int64)
    rows, total = rows_of_shards(shards, seq_len, val_tokens)
    for ids, _ in rows:
        counts += np.bincount(ids[1:], minlength=2**16)
    return sum(int(counts[i]) * len(tokenizer.decode_bytes([i])) for i in counts.nonzero()[0].tolist() if i != tokenizer.eot) / total


def speeds_in_turns(folders: list[Path], steps: int, turn: int = 5) -> list[float]:
    """Measures the training speed of each run: tokens per second, from its median step.

    All runs take turns of a few steps in this process, so a machine whose speed drifts treats them alike. The last compiled run's
    device.set_malloc applies to all. That matters if variants differ in --compile or --activation-memory.
    """
    trainers, seconds = [], [[] for _ in folders]
    for folder in folders:
        config = read_run(folder)
        device = pick_device(config.device)
        model, shards, compiled = build(config.model), open_shards(config.data_dir), config.compile and can_compile(device)
        trainers.append(Trainer(config, DistContext(device), model, shards, compiled, load_teachers(config)))
    torch._dynamo.config.recompile_limit = 10**6  # every variant compiles its own code
    turns = range(0, turn + steps, turn)  # the first turn compiles and does not count
    for start in cli.bar(turns, desc="steps in turns", unit="turn"):
        for trainer, times in zip(trainers, seconds, strict=True):
            for step in range(start, start + turn):
                began = time.perf_counter()
                trainer.update(step % trainer.config.max_steps)  # the schedule ends at max_steps
                times.append(time.perf_counter() - began)
    medians = [statistics.median(times[turn : turn + steps]) for times in seconds]
    return [trainer.config.total_batch_tokens / median for trainer, median in zip(trainers, medians, strict=True)]


@torch.no_grad()
def cache_bytes(config: VariantConfig) -> int | None:
    """Returns the bytes of the KV cache for one sequence of seq_len positions in fp32. Computes nothing: the tensors are fake. None if the
    model needs real numbers, or has no cache."""
    kv_cache, dense = KVCache(config.seq_len), replace(config, n_expert=1, n_expert_active=1)  # a router needs real numbers
    try:
        with FakeTensorMode():
            build(dense)(torch.zeros(1, 1, dtype=torch.long), cache=kv_cache)
    except Exception:  # an idea's code may fail in any way
        return None
    return kv_cache.nbytes()
