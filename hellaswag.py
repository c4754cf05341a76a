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
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from checkpoint import load_with_tokenizer
from common import cli
from common.device import pick_dtype
from common.distributed import DistContext, exit_without_others, join_world
from common.files import parse_json, write_atomically
from common.tokenizer import Tokenizer
from common.validation import raise_errors
from model import GPT
from tasks.scoring import Row, Scorer, Tree, merge_rows

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
    scorer = Scorer(model, world, batch_tokens, autocast, stopped)
    with scorer.bar(len(trees), "HellaSwag") as bar:
        scored = scorer(trees, bar)
    answered = [{"ind": task.get("ind", i), "label": int(task["label"])} for i, task in enumerate(tasks)]
    for i, task in enumerate(answered):
        task |= {style: answers(scored[i, style].lengths, scored[i, style].log_p) for style in styles}

    accuracies = {}
    for style in styles:
        for metric, pred in (("acc", "pred"), ("acc_norm", "pred_norm")):
            right = sum(task[style][pred] == task["label"] for task in answered)
            accuracies[STYLES[style][1] + metric] = right / len(answered)
    return accuracies, answered


def error_of(scores: dict[str, float], n: int) -> float:
    """Returns the largest standard error of these accuracies on n tasks; nan for one task."""
    return max(math.sqrt(p * (1 - p) / (n - 1)) for p in scores.values()) if n > 1 else math.nan


def main():
    with exit_without_others(), cli.one_line_errors(if_memory_runs_out="lower --batch-tokens, or use a smaller model"):
        config = cli.parse(HellaSwagConfig)
        raise_errors(cli.at_least(0, config, "limit", "batch_tokens") + cli.writable(config.out, "out"))
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
            print(f"HellaSwag's validation set: {len(tasks):,} tasks, standard error of a score about {error_of(scores, len(tasks)):.4f}")
            for prefix in (STYLES[style][1] for style in styles):
                acc, acc_norm = scores[f"{prefix}acc"], scores[f"{prefix}acc_norm"]
                print(f"{len(tasks)} {prefix}acc: {acc:.4f} {prefix}acc_norm: {acc_norm:.4f}", flush=True)
            if config.out:  # last: a full disk must not cost the scores
                lines = "".join(json.dumps(task) + "\n" for task in answered)
                write_atomically(Path(config.out), lambda file: file.write(lines.encode()))


if __name__ == "__main__":
    main()
