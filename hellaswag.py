"""HellaSwag (Zellers et al., 2019): which of four endings does a model find most likely? The only file that scores them.

    python hellaswag.py -m gpt2                        # OpenAI's weights; downloads the 10,042 tasks once
    torchrun --standalone --nproc_per_node=8 hellaswag.py -m log

Two metrics that share a name and are two numbers (GPT-2 124M: 0.2955 and 0.3114):
  completion style   the raw text, context and ending tokenized apart; acc_norm divides by the ending's tokens
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
from common.distributed import DistContext, join_world
from common.files import write_atomically
from common.tokenizer import Tokenizer
from common.validation import raise_errors
from model import GPT
from ops.attention import causal_mask
from ops.loss import log_likelihoods
from variants import scoring_copy

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
    """The tasks; the default is downloaded when it is not there."""
    limit: int = 0
    """Score the first so many tasks; 0 scores all."""
    style: Literal["both", "completion", "harness"] = "both"
    """Which of the two metrics; one takes half the time."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Precision of the matrix products; the losses are in fp32 in any case."""
    batch_tokens: int = 0
    """Tokens of a forward pass, 0 for what suits the device; changes no answer."""
    out: str = ""
    """Write a line of JSON per task here: its predictions and log-probabilities."""


# ---- tasks ----


def load_tasks(path: str | Path, limit: int = 0) -> list[dict]:
    """The tasks of a file in HellaSwag's own layout. ValueError names the first line that is none."""
    path = Path(path)
    if not path.exists() and path.name == HellaSwagConfig.file:
        download(URL, path)
    raise_errors(missing(path))
    fetched = path.name == HellaSwagConfig.file
    tasks, remedy = [], "delete the file to fetch it again" if fetched else f"give HellaSwag's {HellaSwagConfig.file}"
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
    """A fault, if it is neither there nor what would be fetched."""
    there = path.is_file() or (path.name == HellaSwagConfig.file and not path.exists())
    return [] if there else [f"no file {path}: give HellaSwag's {HellaSwagConfig.file}"]


def read_task(line: bytes) -> dict | None:
    """A line's task, or None when it is none."""
    try:
        task = json.loads(line)
        texts = [task["ctx"], task["ctx_a"], task["ctx_b"], task["activity_label"], *task["endings"]]
        whole = len(task["endings"]) == 4 and 0 <= int(task["label"]) < 4 and all(isinstance(text, str) for text in texts)
        return task if whole else None
    except (ValueError, KeyError, TypeError):
        return None


def download(url: str, path: Path):
    """Fetches the validation set whole or not at all: a file with another number of rows is never kept."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            text = response.read()
    except (OSError, HTTPException) as e:
        raise ValueError(f"could not fetch {url} ({e}): check the network, or put the file at {path}") from e
    rows = text.count(b"\n")
    if rows != VAL_TASKS:
        raise ValueError(f"{url} gave {rows} rows instead of {VAL_TASKS}: try again later, or put the file at {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text))


@dataclass
class Row:
    """A context and one ending. The last `scored` of its ids are the ending; `length` is what acc_norm divides by."""

    ids: list[int]
    scored: int
    length: int


def completion_rows(task: dict, tokenizer: Tokenizer) -> list[Row]:
    context = tokenizer.encode(task["ctx"])
    endings = [tokenizer.encode(" " + ending) for ending in task["endings"]]
    return [Row(context + ending, len(ending), len(ending)) for ending in endings]


def harness_rows(task: dict, tokenizer: Tokenizer) -> list[Row]:
    """As lm-evaluation-harness 0.4 builds its requests: tokenized together, cut where the context's own tokens end."""
    query = clean(f"{task['activity_label']}: {task['ctx_a']} {task['ctx_b'].capitalize()}")
    context = len(tokenizer.encode(query.rstrip()))
    rows = []
    for ending in map(clean, task["endings"]):
        whole = tokenizer.encode(f"{query} {ending}")
        rows.append(Row(whole, len(whole) - context, len(ending)))
    return rows


def clean(text: str) -> str:
    """Takes out the marks that WikiHow's pages left in the text."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# ---- scores ----


@dataclass
class Tree:
    """A task's rows in one: the context that they share once, then each row's own rest, which sees the context and itself."""

    ids: np.ndarray  # (L,)
    positions: np.ndarray  # (L,) an id's place in its own row
    branch: np.ndarray  # (L,) 0 in the context, then the number of the row
    scored: np.ndarray  # (N,) where the endings' tokens are predicted, row after row
    targets: np.ndarray  # (N,) those tokens
    counts: list[int]  # how many of them each row has


def grow(rows: list[Row], seq_len: int) -> Tree:
    """A row longer than the model's sequence loses the start of its context; its last id predicts nothing and is left out."""
    paths = [row.ids[-(seq_len + 1) :] for row in rows]
    counts = [min(row.scored, len(path) - 1) for row, path in zip(rows, paths, strict=True)]
    shared = min(len(path) - n for path, n in zip(paths, counts, strict=True))  # contexts, and as much of them as is alike
    shared = next((i for i in range(shared) if len({path[i] for path in paths}) > 1), shared)
    ids, positions, branch, scored, targets = paths[0][:shared], list(range(shared)), [0] * shared, [], []
    for number, (path, n) in enumerate(zip(paths, counts, strict=True), 1):
        offset = len(ids) - shared  # from a place in this row's own part to its place in the tree
        scored += [i if i < shared else i + offset for i in range(len(path) - 1 - n, len(path) - 1)]
        targets += path[len(path) - n :]
        ids += path[shared:-1]
        positions += range(shared, len(path) - 1)
        branch += [number] * (len(path) - 1 - shared)
    return Tree(*(np.array(part, np.int64) for part in (ids, positions, branch, scored, targets)), counts)


def batches(trees: list[Tree], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of trees in groups of like length, longest first, each padded to at most batch_tokens."""
    order = sorted(range(len(trees)), key=lambda i: -len(trees[i].ids))
    while order:
        n = max(1, batch_tokens // len(trees[order[0]].ids))
        yield order[:n]
        order = order[n:]


@torch.no_grad()
def log_probs(
    model: GPT, tasks: list[list[Row]], batch_tokens: int, progress: bool = False, stopped: Callable[[], bool] = lambda: False
) -> list[list[float]]:
    """The log-probability in nats of each row's ending given its context; the softmax and the sum are not in bf16.
    stopped: asked before each batch whether to leave the rest."""
    model, device = scoring_copy(model), model.transformer.wte.weight.device
    # cuDNN's attention makes a plan for each new shape, and nearly every batch is of a new shape
    kernels = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if device.type == "cuda" else nullcontext()
    trees = [grow(rows, model.config.seq_len) for rows in tasks]
    result = [[] for _ in tasks]
    with kernels, cli.bar(total=len(tasks), desc="HellaSwag", unit="task", leave=False, disable=not progress) as bar:
        for batch in batches(trees, batch_tokens):
            if stopped():
                break
            B, L = len(batch), len(trees[batch[0]].ids)
            ids, positions, branch = np.zeros((3, B, L), np.int64)  # padded on the right
            for j, tree in enumerate(trees[i] for i in batch):
                n = len(tree.ids)
                ids[j, :n], positions[j, :n], branch[j, :n] = tree.ids, tree.positions, tree.branch
            scored = np.concatenate([j * L + trees[i].scored for j, i in enumerate(batch)])
            targets = np.concatenate([trees[i].targets for i in batch])
            ids, positions, branch, scored, targets = (
                torch.from_numpy(array).to(device) for array in (ids, positions, branch, scored, targets)
            )
            own = (branch[:, None, :, None] == branch[:, None, None, :]) | (branch[:, None, None, :] == 0)  # or the context
            x = model.hidden_states(ids, positions=positions, mask=own & causal_mask(L, L, device))  # (B, L, C)
            log_p = log_likelihoods(model.logits, x.flatten(0, 1)[scored], targets)  # (N,): no other position needs logits
            sums = [part.sum().item() for part in log_p.cpu().double().split([n for i in batch for n in trees[i].counts])]
            for i in batch:
                result[i], sums = sums[: len(tasks[i])], sums[len(tasks[i]) :]
            bar.update(B)
    return result


def answers(rows: list[Row], log_p: list[float]) -> dict:
    """The most likely ending by sum and by mean: the first of equals, as argmax has it."""
    mean = [p / row.length if row.length else float("-inf") for p, row in zip(log_p, rows, strict=True)]
    return {"pred": log_p.index(max(log_p)), "pred_norm": mean.index(max(mean)), "log_probs": log_p}


# style → its rows, and what its metrics are called
STYLES = {"completion": (completion_rows, ""), "harness": (harness_rows, "harness_")}


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: list[dict],
    world: DistContext,
    batch_tokens: int = 0,
    autocast=None,
    styles=tuple(STYLES),
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], list[dict]]:
    """Scores tasks over all processes. batch_tokens: 0 leaves it to the device. autocast: a context for the matrix products.
    stopped: whether to give up; when any process does, all raise Stopped.

    Returns the accuracies acc, acc_norm, harness_acc and harness_acc_norm, and each task's answers, of the styles asked for.
    """
    mine = range(world.rank, len(tasks), world.size)
    rows = {(i, style): STYLES[style][0](tasks[i], tokenizer) for i in mine for style in styles}
    batch_tokens = batch_tokens or (1024 if world.device.type == "cpu" else 32768)  # a CPU's caches hold no more
    with autocast or nullcontext():
        scores = log_probs(model, list(rows.values()), batch_tokens, world.is_main, stopped)
    given_up = stopped()
    scored = {i: {"ind": tasks[i].get("ind", i), "label": int(tasks[i]["label"])} for i in mine}
    if not given_up:
        for ((i, style), group), log_p in zip(rows.items(), scores, strict=True):
            scored[i][style] = answers(group, log_p)
    merged = {i: task for part in world.gather_unless(given_up, scored) for i, task in part.items()}
    if any(math.isnan(p) for task in merged.values() for style in styles for p in task[style]["log_probs"]):
        raise ValueError("the model's losses are not numbers: its training diverged, use an earlier checkpoint")

    accuracies = {}
    for style in styles:
        for metric, pred in (("acc", "pred"), ("acc_norm", "pred_norm")):
            right = sum(task[style][pred] == task["label"] for task in merged.values())
            accuracies[STYLES[style][1] + metric] = right / len(merged)
    return accuracies, [merged[i] for i in range(len(tasks))]


def main():
    with cli.one_line_errors():
        config = cli.parse(HellaSwagConfig)
        errors = cli.at_least(0, config, "limit", "batch_tokens")
        if config.out and (Path(config.out).is_dir() or not Path(config.out).parent.is_dir()):
            errors.append(f"--out {config.out}: give a file in a folder that exists")
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
