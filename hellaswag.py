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
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro

import cli
from checkpoint import load_with_tokenizer
from distributed import World, join_world
from files import write_atomically
from fineweb import Tokenizer
from model import GPT

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
    batch_tokens: int = 4096
    """Tokens of a forward pass: more is faster, takes more memory, and changes no answer."""
    out: str = ""
    """Write a line of JSON per task here: its predictions and log-probabilities."""


# ---- tasks ----


def load_tasks(path: str | Path, limit: int = 0) -> list[dict]:
    """The tasks of a file in HellaSwag's own layout. ValueError names the first line that is none."""
    path = Path(path)
    if not path.exists() and path.name == HellaSwagConfig.file:
        download(URL, path)
    if not path.is_file():
        raise ValueError(f"no file {path}: give HellaSwag's {HellaSwagConfig.file}")
    tasks = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if limit and len(tasks) == limit:
                break
            task = read_task(line)
            if task is None:
                raise ValueError(f"{path}, line {number}: not a HellaSwag task; delete the file to fetch it again")
            tasks.append(task)
    if not tasks:
        raise ValueError(f"{path} has no tasks; delete the file to fetch it again")
    return tasks


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
    context = query.rstrip()
    rows = []
    for ending in map(clean, task["endings"]):
        whole = tokenizer.encode(f"{query} {ending}")
        rows.append(Row(whole, len(whole) - len(tokenizer.encode(context)), len(ending)))
    return rows


def clean(text: str) -> str:
    """Takes out the marks that WikiHow's pages left in the text."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# ---- scores ----


def batches(rows: list[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows in groups of like length, longest first, each padded to at most batch_tokens."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    while order:
        n = max(1, batch_tokens // len(rows[order[0]].ids))
        yield order[:n]
        order = order[n:]


@torch.no_grad()
def log_probs(model: GPT, rows: list[Row], batch_tokens: int, progress: bool = False) -> list[float]:
    """The log-probability in nats of each row's ending given its context; the softmax and the sum are not in bf16.

    A row longer than the model's sequence loses the start of its context.
    """
    device = model.transformer.wte.weight.device
    result = [0.0] * len(rows)
    with cli.bar(total=len(rows), desc="HellaSwag", unit="ending", leave=False, disable=not progress) as bar:
        for batch in batches(rows, batch_tokens):
            ids = [rows[i].ids[-(model.config.seq_len + 1) :] for i in batch]
            counts = [min(rows[i].scored, len(row) - 1) for i, row in zip(batch, ids, strict=True)]
            x = torch.zeros(len(batch), max(map(len, ids)) - 1, dtype=torch.long)  # (B, T), padded on the right
            y = torch.full_like(x, -100)  # the endings' targets
            for j, (row, n) in enumerate(zip(ids, counts, strict=True)):
                x[j, : len(row) - 1] = torch.tensor(row[:-1])
                y[j, len(row) - 1 - n : len(row) - 1] = torch.tensor(row[len(row) - n :])
            scored = y != -100
            hidden = model.hidden(x.to(device))[scored.to(device)]  # (scored tokens, C): no other position needs logits
            log_p = -F.cross_entropy(model.logits(hidden).float(), y[scored].to(device), reduction="none")
            for i, part in zip(batch, log_p.cpu().double().split(counts), strict=True):
                result[i] = part.sum().item()
            bar.update(len(batch))
    return result


def answers(rows: list[Row], log_p: list[float]) -> dict:
    """The most likely ending by sum and by mean: the first of equals, as argmax has it."""
    mean = [p / row.length if row.length else float("-inf") for p, row in zip(log_p, rows, strict=True)]
    return {"pred": log_p.index(max(log_p)), "pred_norm": mean.index(max(mean)), "log_probs": log_p}


def evaluate(
    model: GPT, tokenizer: Tokenizer, tasks: list[dict], world: World, batch_tokens: int = 4096, autocast=None
) -> tuple[dict[str, float], list[dict]]:
    """Scores tasks over all processes. autocast: a context for the matrix products.

    Returns the accuracies acc, acc_norm, harness_acc and harness_acc_norm, and each task's answers in both styles.
    """
    mine = range(world.rank, len(tasks), world.size)
    styles = {"completion": completion_rows, "harness": harness_rows}
    rows = {(i, style): build(tasks[i], tokenizer) for i in mine for style, build in styles.items()}
    with autocast or nullcontext():
        scores = log_probs(model, [row for group in rows.values() for row in group], batch_tokens, world.is_main)
    scored = {i: {"ind": tasks[i].get("ind", i), "label": int(tasks[i]["label"])} for i in mine}
    for n, ((i, style), group) in enumerate(rows.items()):
        scored[i][style] = answers(group, scores[4 * n : 4 * n + 4])
    merged = {i: task for part in world.gather(scored) for i, task in part.items()}
    if any(math.isnan(p) for task in merged.values() for style in styles for p in task[style]["log_probs"]):
        raise ValueError("the model's losses are not numbers: its training diverged, use an earlier checkpoint")

    def accuracy(style, pred):
        return sum(task[style][pred] == task["label"] for task in merged.values()) / len(merged)

    accuracies = {
        "acc": accuracy("completion", "pred"),
        "acc_norm": accuracy("completion", "pred_norm"),
        "harness_acc": accuracy("harness", "pred"),
        "harness_acc_norm": accuracy("harness", "pred_norm"),
    }
    return accuracies, [merged[i] for i in range(len(tasks))]


def main():
    with cli.one_line_errors():
        config = cli.parse(HellaSwagConfig)
        faults = cli.at_least(0, config, "limit") + cli.at_least(1, config, "batch_tokens")
        if config.out and (Path(config.out).is_dir() or not Path(config.out).parent.is_dir()):
            faults.append(f"--out {config.out}: give a file in a folder that exists")
        cli.refuse(faults)
        with join_world(config.device) as world:
            tasks = world.on_main(lambda: load_tasks(config.file, config.limit))
            model, tokenizer = load_with_tokenizer(config.model, world.device)
            scores, answered = evaluate(model, tokenizer, tasks, world, config.batch_tokens)
            if not world.is_main:
                return
            if config.out:
                lines = "".join(json.dumps(task) + "\n" for task in answered)
                write_atomically(Path(config.out), lambda file: file.write(lines.encode()))
            print(f"{len(tasks)} acc: {scores['acc']:.4f} acc_norm: {scores['acc_norm']:.4f}")
            print(f"{len(tasks)} harness_acc: {scores['harness_acc']:.4f} harness_acc_norm: {scores['harness_acc_norm']:.4f}")


if __name__ == "__main__":
    main()
