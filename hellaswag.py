"""Scores a model on HellaSwag (Zellers et al., 2019): which of four endings does it find most likely?

    python hellaswag.py -m gpt2                        # OpenAI's weights; downloads the 10,042 tasks once
    torchrun --standalone --nproc_per_node=8 hellaswag.py -m log

Two metrics share the name acc_norm (GPT-2 124M: 0.2955 and 0.3114):
  completion style   raw text, context and ending tokenized separately; acc_norm divides by the ending's tokens
  harness style      lm-evaluation-harness's cleaned text and 'Activity: ' prefix; acc_norm divides by its characters
"""

import json
import math
import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoint import load_with_tokenizer
from common import cli
from common.device import pick_dtype
from common.distributed import DistContext, exit_without_others, join_world
from common.files import parse_json, write_atomically
from common.tokenizer import Tokenizer
from common.validation import raise_errors
from model import GPT
from ops.attention import causal_mask
from ops.loss import log_likelihoods
from variants import inference_copy

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
VAL_TASKS = 10_042


@dataclass
class HellaSwagConfig:
    """Score a model on HellaSwag's validation set."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "gpt2"
    """A checkpoint.pt, a run's folder, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    device: Annotated[str, tyro.conf.arg(aliases=["-d"])] = "auto"
    """auto, cpu, cuda or mps."""
    file: str = "hellaswag_val.jsonl"
    """File of tasks. The default is downloaded if it is missing."""
    limit: int = 0
    """Score only this many tasks, from the first; 0: all."""
    style: Literal["both", "completion", "harness"] = "both"
    """Metrics to compute. One takes half the time."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Precision of the matrix products. Losses are always in fp32."""
    batch_tokens: int = 0
    """Tokens per forward pass; 0: what suits the device. Changes no answer."""
    out: str = ""
    """Write predictions and log-probabilities to this file, one line of JSON per task."""


# ---- tasks ----


def load_tasks(path: str | Path, limit: int = 0) -> list[dict]:
    """Reads the tasks of a file in HellaSwag's own layout. Downloads the default file if it is missing.
    ValueError names the first line that is not a task."""
    path = Path(path)
    if not path.exists() and path.name == HellaSwagConfig.file:
        download(URL, path)
    raise_errors(missing(path))
    downloaded = path.name == HellaSwagConfig.file
    tasks, remedy = [], "move the file elsewhere to download it again" if downloaded else f"pass HellaSwag's {HellaSwagConfig.file}"
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if limit and len(tasks) == limit:
                break
            if not line.strip():
                continue
            task = read_task(line)
            if task is None:
                raise ValueError(f"{path}, line {number}: not a HellaSwag task; {remedy}")
            tasks.append(task)
    if not tasks:
        raise ValueError(f"{path} has no tasks; {remedy}")
    return tasks


def missing(path: Path) -> list[str]:
    """An error if the file does not exist and load_tasks would not download it."""
    available = path.is_file() or (path.name == HellaSwagConfig.file and not path.exists())
    return [] if available else [f"no file {path}: pass HellaSwag's {HellaSwagConfig.file}"]


def read_task(line: bytes) -> dict | None:
    """The task in a line, or None if the line is not a task."""
    try:
        task = parse_json(line)
        texts, endings = [task["ctx"], task["ctx_a"], task["ctx_b"], task["activity_label"]], task["endings"]
        valid = isinstance(endings, list) and len(endings) == 4 and all(isinstance(text, str) for text in texts + endings)
        return task if valid and str(task["label"]) in ("0", "1", "2", "3") else None
    except (ValueError, KeyError, TypeError):
        return None


def download(url: str, path: Path):
    """Downloads the validation set. Keeps the file only if it has all rows."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            text = response.read()
    except (OSError, HTTPException) as e:
        raise ValueError(f"could not download {url} ({e}): check the network, or put the file at {path}") from e
    rows = text.count(b"\n")
    if rows != VAL_TASKS:
        raise ValueError(f"{url} returned {rows} rows instead of {VAL_TASKS}: try again later, or put the file at {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text))


@dataclass
class Row:
    """A context and one ending: the last `scored` of its ids. acc_norm divides by `length`."""

    ids: list[int]
    scored: int
    length: int


def completion_rows(task: dict, tokenizer: Tokenizer) -> list[Row]:
    context = tokenizer.encode(task["ctx"])
    endings = [tokenizer.encode(" " + ending) for ending in task["endings"]]
    return [Row(context + ending, len(ending), len(ending)) for ending in endings]


def harness_rows(task: dict, tokenizer: Tokenizer) -> list[Row]:
    """Builds rows like lm-evaluation-harness 0.4: tokenizes context and ending together, then cuts after as many tokens as the
    context alone has."""
    query = clean(f"{task['activity_label']}: {task['ctx_a']} {task['ctx_b'].capitalize()}")
    context = len(tokenizer.encode(query.rstrip()))
    rows = []
    for ending in map(clean, task["endings"]):
        ids = tokenizer.encode(f"{query} {ending}")
        rows.append(Row(ids, len(ids) - context, len(ending)))
    return rows


def clean(text: str) -> str:
    """Removes WikiHow's markup from the text, like lm-evaluation-harness."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# ---- scores ----


@dataclass
class Tree:
    """A task's rows in one sequence: the shared context once, then the rest of each row, which sees the context and itself."""

    ids: np.ndarray  # (L,)
    positions: np.ndarray  # (L,) of each id in its own row
    branch: np.ndarray  # (L,) 0 in the context, then the row's number
    scored: np.ndarray  # (N,) where the endings' tokens are predicted, row by row
    targets: np.ndarray  # (N,) these tokens
    counts: list[int]  # of these tokens in each row
    lengths: list[int]  # of each row: acc_norm divides by it


def merge_rows(rows: list[Row], seq_len: int) -> Tree:
    """Merges a task's rows. A row longer than the model's sequence loses the start of its context. Leaves out each row's last id,
    which predicts nothing."""
    paths = [row.ids[-(seq_len + 1) :] for row in rows]
    counts = [min(row.scored, len(path) - 1) for row, path in zip(rows, paths, strict=True)]
    shared = min(len(path) - n for path, n in zip(paths, counts, strict=True))  # the shortest context, cut where rows differ
    shared = next((i for i in range(shared) if len({path[i] for path in paths}) > 1), shared)
    ids, positions, branch, scored, targets = paths[0][:shared], list(range(shared)), [0] * shared, [], []
    for number, (path, n) in enumerate(zip(paths, counts, strict=True), 1):
        offset = len(ids) - shared  # from an index in this row to its index in the tree
        scored += [i if i < shared else i + offset for i in range(len(path) - 1 - n, len(path) - 1)]
        targets += path[len(path) - n :]
        ids += path[shared:-1]
        positions += range(shared, len(path) - 1)
        branch += [number] * (len(path) - 1 - shared)
    arrays = (np.array(part, np.int32) for part in (ids, positions, branch, scored, targets))
    return Tree(*arrays, counts, [row.length for row in rows])


def batches(trees: list[Tree], batch_tokens: int) -> Iterator[list[int]]:
    """Yields indices of trees in groups of similar length, longest first. A padded group has at most batch_tokens, or one tree."""
    order = sorted(range(len(trees)), key=lambda i: -len(trees[i].ids))
    while order:
        n = max(1, batch_tokens // len(trees[order[0]].ids))
        yield order[:n]
        order = order[n:]


@torch.no_grad()
def log_probs(
    model: GPT, trees: list[Tree], batch_tokens: int, progress: bool = False, stopped: Callable[[], bool] = lambda: False
) -> list[list[float]]:
    """The log-probability in nats of each ending given its context, for each tree. Softmax and sum never run in bf16.
    stopped: called before each batch; True skips the rest."""
    model, device = inference_copy(model), model.transformer.wte.weight.device
    # cuDNN's attention plans every new shape, and nearly every batch has a new shape
    kernels = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if device.type == "cuda" else nullcontext()
    result = [[] for _ in trees]
    with kernels, cli.bar(total=len(trees), desc="HellaSwag", unit="task", leave=False, disable=not progress) as bar:
        for batch in batches(trees, batch_tokens):
            if stopped():
                break
            B, L = len(batch), len(trees[batch[0]].ids)
            ids, positions, branch = np.zeros((3, B, L), np.int64)  # padded on the right
            for j, tree in enumerate(trees[i] for i in batch):
                n = len(tree.ids)
                ids[j, :n], positions[j, :n], branch[j, :n] = tree.ids, tree.positions, tree.branch
            scored = np.concatenate([j * L + trees[i].scored.astype(np.int64) for j, i in enumerate(batch)])
            targets = np.concatenate([trees[i].targets for i in batch]).astype(np.int64)
            ids, positions, branch, scored, targets = (
                torch.from_numpy(array).to(device) for array in (ids, positions, branch, scored, targets)
            )
            mask = (branch[:, None, :, None] == branch[:, None, None, :]) | (branch[:, None, None, :] == 0)  # own row or context
            x = model.hidden_states(ids, positions=positions, mask=mask & causal_mask(L, L, device))  # (B, L, C)
            log_p = log_likelihoods(model.logits, x.flatten(0, 1)[scored], targets)  # (N,): only these positions need logits
            sums = [part.sum().item() for part in log_p.cpu().double().split([n for i in batch for n in trees[i].counts])]
            for i in batch:
                result[i], sums = sums[: len(trees[i].counts)], sums[len(trees[i].counts) :]
            bar.update(B)
    return result


def answers(lengths: list[int], log_p: list[float]) -> dict:
    """The most likely ending by sum and by mean. The first one wins a tie, as in argmax."""
    mean = [p / length if length else float("-inf") for p, length in zip(log_p, lengths, strict=True)]
    return {"pred": log_p.index(max(log_p)), "pred_norm": mean.index(max(mean)), "log_probs": log_p}


# style → the function that builds its rows, the prefix of its metrics
STYLES = {"completion": (completion_rows, ""), "harness": (harness_rows, "harness_")}


def build_trees(
    tasks: list[dict], tokenizer: Tokenizer, seq_len: int, world: DistContext, styles=tuple(STYLES)
) -> dict[tuple[int, str], Tree]:
    """Tokenizes the tasks that this process scores. Returns {(the task's number, style): its tree}."""
    mine = range(world.rank, len(tasks), world.size)
    return {(i, style): merge_rows(STYLES[style][0](tasks[i], tokenizer), seq_len) for i in mine for style in styles}


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: list[dict],
    world: DistContext,
    batch_tokens: int = 0,
    autocast=None,
    styles=tuple(STYLES),
    stopped: Callable[[], bool] = lambda: False,
    trees: dict[tuple[int, str], Tree] | None = None,
) -> tuple[dict[str, float], list[dict]]:
    """Scores tasks on all processes. Returns the accuracies (acc, acc_norm, harness_acc, harness_acc_norm) and each task's
    answers, for these styles.

    batch_tokens: 0 picks what suits the device. autocast: a context for the matrix products. stopped: whether to give up; if one
    process gives up, all raise Stopped. trees: from build_trees for these styles, to score the same tasks again. ValueError if a
    log-probability is NaN.
    """
    if trees is None:
        trees = build_trees(tasks, tokenizer, model.config.seq_len, world, styles)
    batch_tokens = batch_tokens or (1024 if world.device.type == "cpu" else 32768)  # a CPU's caches hold about this much
    with autocast or nullcontext():
        scores = log_probs(model, list(trees.values()), batch_tokens, world.is_main, stopped)
    given_up = stopped()
    scored = {i: {"ind": tasks[i].get("ind", i), "label": int(tasks[i]["label"])} for i, _ in trees}
    if not given_up:
        for ((i, style), tree), log_p in zip(trees.items(), scores, strict=True):
            scored[i][style] = answers(tree.lengths, log_p)
    merged = {i: task for part in world.gather_unless(given_up, scored) for i, task in part.items()}
    if any(math.isnan(p) for task in merged.values() for style in styles for p in task[style]["log_probs"]):
        raise ValueError("the model's losses are NaN: its training diverged, use an earlier checkpoint")

    accuracies = {}
    for style in styles:
        for metric, pred in (("acc", "pred"), ("acc_norm", "pred_norm")):
            right = sum(task[style][pred] == task["label"] for task in merged.values())
            accuracies[STYLES[style][1] + metric] = right / len(merged)
    return accuracies, [merged[i] for i in range(len(tasks))]


def main():
    with exit_without_others(), cli.one_line_errors(if_memory_runs_out="lower --batch-tokens, or use a smaller model"):
        config = cli.parse(HellaSwagConfig)
        errors = cli.at_least(0, config, "limit", "batch_tokens")
        if config.out and (Path(config.out).is_dir() or not Path(config.out).parent.is_dir()):
            errors.append(f"--out {config.out} is not a file in an existing folder: choose another path")
        raise_errors(errors)
        with join_world(config.device) as world:
            world.on_main(lambda: raise_errors(missing(Path(config.file))))
            model, tokenizer = load_with_tokenizer(config.model, world.device)
            tasks = world.on_main(lambda: load_tasks(config.file, config.limit))
            styles = tuple(STYLES) if config.style == "both" else (config.style,)
            dtype = pick_dtype(config.dtype, world.device)
            autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
            scores, answered = evaluate(model, tokenizer, tasks, world, config.batch_tokens, autocast, styles)
            if not world.is_main:
                return
            if config.out:
                lines = "".join(json.dumps(task) + "\n" for task in answered)
                write_atomically(Path(config.out), lambda file: file.write(lines.encode()))
            for prefix in (STYLES[style][1] for style in styles):
                acc, acc_norm = scores[f"{prefix}acc"], scores[f"{prefix}acc_norm"]
                print(f"{len(tasks)} {prefix}acc: {acc:.4f} {prefix}acc_norm: {acc_norm:.4f}")


if __name__ == "__main__":
    main()
