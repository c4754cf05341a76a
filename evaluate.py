"""Scores a base model on LAMBADA, BLiMP, the CORE tasks of DCLM and any text.

    python evaluate.py -m gpt2 --tasks lambada=lambada_test.jsonl core=eval_bundle.zip blimp=blimp text=README.md
    torchrun --standalone --nproc_per_node=8 evaluate.py -m log --tasks core=eval_bundle.zip --limit 500

Each task prints its number of questions, its accuracy and the bits per byte of the right answers, with standard errors. The bits per
byte are less noisy: they see a small model learn long before it gets an answer right. hellaswag.py scores HellaSwag.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from checkpoint import load_with_tokenizer
from common import cli
from common.device import pick_dtype
from common.distributed import exit_without_others, join_world
from common.files import write_atomically
from common.validation import raise_errors
from tasks.judging import group_figures, judge
from tasks.readers import missing_files, read_tasks, task_errors
from tasks.scoring import Scorer


@dataclass
class EvaluateConfig:
    """Score a model on tasks that judge base models."""

    tasks: tuple[str, ...] = ()
    """What to score: lambada=lambada_test.jsonl, core=eval_bundle.zip, blimp=FOLDER, text=FILE. A missing file's error says what to
    fetch."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "gpt2"
    """A checkpoint.pt, a run's folder, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    device: Annotated[str, tyro.conf.arg(aliases=["-d"])] = "auto"
    """auto, cpu, cuda or mps."""
    limit: int = 0
    """Score only this many questions of each task, with the same prompts; 0: all."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Precision of the matrix products. Losses are always in fp32."""
    batch_tokens: int = 0
    """Tokens per forward pass; 0: what suits the device. Changes only the rounding."""
    out: str = ""
    """Write each question's points and log-probabilities to this file, one line of JSON per question."""
    json: bool = False
    """Print JSON."""

    def validate(self):
        """ValueError with all errors at once."""
        errors = cli.at_least(0, self, "limit", "batch_tokens") + task_errors(self.tasks)
        errors += [] if self.tasks else ["no --tasks: pass at least one, such as lambada=lambada_test.jsonl"]
        raise_errors(errors + cli.writable(self.out, "out"))


# ---- the table ----

NAME = 30  # characters of a task's name in the table


def line(name: str, result: dict[str, float]) -> str:
    """One line of the table, at most 100 characters."""
    short = name if len(name) <= NAME else f"{name[: NAME // 2]}…{name[1 - NAME // 2 :]}"
    notes = [f"{key} {with_error(result, key)}" for key in ("centered", "perplexity") if key in result]
    cells = [f"{short:<{NAME}}", f"{result['n']:>7,}", f"{with_error(result, 'acc'):<15}", f"{with_error(result, 'bits_per_byte'):<15}"]
    return "  ".join([" ".join(cells[:2]), *cells[2:], *notes]).rstrip()


def with_error(result: dict[str, float], key: str) -> str:
    """A figure and its standard error, such as 0.3256 ± 0.0065."""
    if key not in result:
        return "–"
    how = ".4f" if key != "perplexity" else ".2f" if result[key] < 1000 else ".1g"
    return f"{result[key]:{how}} ± {result[f'{key}_stderr']:{how}}"


def print_groups(results: dict[str, dict[str, float]]):
    """Prints the means over each group of several tasks."""
    for name, result in group_figures(results).items():
        if name not in results and sum(task.startswith(f"{name}/") for task in results) > 1:
            print(line(f"{name}, mean", result), flush=True)


def finite(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """JSON has no nan and no inf."""
    return {name: {key: x if math.isfinite(x) else None for key, x in result.items()} for name, result in results.items()}


def show(judged: Iterator, config: EvaluateConfig, is_main: bool) -> None:
    """Runs the tasks. Prints each result as soon as it is there, and writes the answers to --out."""
    results, lines = {}, []
    if is_main and not config.json:
        print(f"{'task':<{NAME}} {'n':>7}  {'accuracy':<15}  bits per byte")
    for name, result, answered in judged:
        results[name] = result
        lines += [json.dumps(entry) + "\n" for entry in answered] if config.out else []
        if is_main and not config.json:
            print(line(name, result), flush=True)
    if is_main and config.json:
        print(json.dumps({"tasks": finite(results), "groups": finite(group_figures(results))}, indent=2), flush=True)
    elif is_main:
        print_groups(results)
    if is_main and config.out:  # last: a full disk must not cost the results
        write_atomically(Path(config.out), lambda file: file.write("".join(lines).encode()))


def main():
    with exit_without_others(), cli.one_line_errors(if_memory_runs_out="lower --batch-tokens, or use a smaller model"):
        config = cli.parse(EvaluateConfig)
        config.validate()
        with join_world(config.device) as world:
            world.on_main(lambda: raise_errors(missing_files(config.tasks)))
            model, tokenizer = load_with_tokenizer(config.model, world.device)
            seq_len = model.config.seq_len
            tasks = world.on_main(lambda: read_tasks(config.tasks, tokenizer, seq_len, config.limit))
            dtype = pick_dtype(config.dtype, world.device)
            autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
            scorer = Scorer(model, world, config.batch_tokens, autocast)
            show(judge(scorer, tasks, tokenizer, seq_len), config, world.is_main)


if __name__ == "__main__":
    main()
