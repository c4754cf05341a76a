"""Judges a model's answers: points, accuracies, bits per byte and their standard errors."""

import math
from collections.abc import Iterator
from itertools import chain

from common.distributed import DistContext
from common.tokenizer import Tokenizer
from tasks.readers import Choice, Task
from tasks.scoring import Row, Scored, Scorer, Tree, merge_rows

Trees = dict[tuple[int, int], Tree]  # by question and part


def build_trees(task: Task, tokenizer: Tokenizer, seq_len: int, world: DistContext) -> Trees:
    """Tokenizes the questions that this process scores."""
    trees = {}
    for i in range(world.rank, len(task.gold), world.size):
        parts = trees_of(task.choices(i, tokenizer), tokenizer, seq_len - task.spare)
        trees |= {(i, part): tree for part, tree in enumerate(parts)}
    return trees


def trees_of(choices: list[Choice], tokenizer: Tokenizer, seq_len: int) -> list[Tree]:
    """Merges a question's choices, which the model reads up to their last seq_len + 1 ids. A row's length is its answer's bytes.
    If the choices lose different amounts of their start, they share nothing: then each has its own tree."""
    kept = [ids[-(seq_len + 1) :] for ids, _ in choices]
    scored = [max(1, min(n, len(ids) - 1)) for ids, (_, n) in zip(kept, choices, strict=True)]
    rows = [Row(ids, n, answer_bytes(ids[len(ids) - n :], tokenizer)) for ids, n in zip(kept, scored, strict=True)]
    lost = {len(ids) - len(rest) for (ids, _), rest in zip(choices, kept, strict=True)}
    return [merge_rows(group, seq_len) for group in ([rows] if len(lost) == 1 else [[row] for row in rows])]


def answer_bytes(ids: list[int], tokenizer: Tokenizer) -> int:
    return len(tokenizer.decode_bytes([i for i in ids if i != tokenizer.eot]))


def answers(scorer: Scorer, task: Task, trees: Trees, bar) -> list[dict]:
    """Scores a task on all processes. Returns each question's log_probs, tokens and bytes by choice, its right choice, and its points
    (None for a text)."""
    scored = scorer(trees, bar, greedy=task.rule == "greedy")
    parts = [[] for _ in task.gold]
    for i, part in sorted(scored):
        parts[i].append(scored[i, part])
    answered = []
    for i, gold in enumerate(task.gold):
        found = Scored(*(list(chain(*lists)) for lists in zip(*parts[i], strict=True)))
        entry = {"task": task.name, "ind": i, "label": gold, "points": points(task.rule, gold, found)}
        answered.append(entry | {"log_probs": found.log_p, "tokens": found.counts, "bytes": found.lengths})
    return answered


def points(rule: str, gold: int, found: Scored) -> float | None:
    """The points for a question, from 0 to 1. Choices that tie share a point.

    greedy: each token of the answer must be the model's first choice. sum, mean: the right choice must have the highest
    log-probability, in all or per token. text: none.
    """
    if rule == "text":
        return None
    if rule == "greedy":
        return float(found.greedy[0])
    values = found.log_p if rule == "sum" else [p / n for p, n in zip(found.log_p, found.counts, strict=True)]
    best = max(values)
    return float(values[gold] == best) / values.count(best)


def figures(task: Task, answered: list[dict]) -> dict[str, float]:
    """A task's n and figures, each with its standard error: acc, centered (the accuracy above chance, for CORE), perplexity (per
    answer, for LAMBADA), bits_per_byte (of the right answers)."""
    right = [(entry["log_probs"][entry["label"]], entry["bytes"][entry["label"]]) for entry in answered]
    result = {"n": len(answered)}
    if task.rule != "text":
        acc, error = mean_of([entry["points"] for entry in answered])
        result |= {"acc": acc, "acc_stderr": error}
        if task.name.startswith("core/"):
            span = 1 - task.chance
            result |= {"centered": (acc - task.chance) / span, "centered_stderr": error / span}
    if task.name == "lambada":
        nats, error = mean_of([-log_p for log_p, _ in right])
        perplexity = perplexity_of(nats)
        result |= {"perplexity": perplexity, "perplexity_stderr": perplexity * error}
    bits, error = ratio_of([-log_p / math.log(2) for log_p, _ in right], [size for _, size in right])
    return result | {"bits_per_byte": bits, "bits_per_byte_stderr": error}


def perplexity_of(nats: float) -> float:
    """Returns the perplexity of a mean loss in nats; inf if it is too large for a float."""
    return math.exp(nats) if nats < 700 else math.inf


def mean_of(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error; nan from a single value."""
    n, mean = len(values), math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n) if n > 1 else math.nan


def ratio_of(above: list[float], below: list[float]) -> tuple[float, float]:
    """The ratio of two sums and its standard error, by linearization (Cochran, 1977, 6.3); inf if the second sum is 0."""
    total = math.fsum(below)
    if not total:
        return math.inf, math.nan
    ratio, n = math.fsum(above) / total, len(above)
    _, error = mean_of([x - ratio * y for x, y in zip(above, below, strict=True)])
    return ratio, error * n / total


def group_figures(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The figures of each group, such as core for core/copa: n in all, and the means over its tasks, with standard errors as if no
    two tasks shared questions."""
    groups = {}
    for name, result in results.items():
        groups.setdefault(name.partition("/")[0], []).append(result)
    return {name: mean_figures(members) for name, members in groups.items()}


def mean_figures(results: list[dict[str, float]]) -> dict[str, float]:
    mean = {"n": sum(result["n"] for result in results)}
    for key in results[0]:
        if key != "n":
            values = [result[key] for result in results]
            total = math.sqrt(sum(x * x for x in values)) if key.endswith("_stderr") else math.fsum(values)
            mean[key] = total / len(values)
    return mean


def main_figure(group: str) -> str:
    """The figure that stands for a group of tasks."""
    return {"core": "centered", "text": "bits_per_byte"}.get(group, "acc")


def judge(
    scorer: Scorer, tasks: list[Task], tokenizer: Tokenizer, seq_len: int, trees: dict[str, Trees] | None = None
) -> Iterator[tuple[str, dict[str, float], list[dict]]]:
    """Scores one task after the other on all processes. Yields its name, its figures and its answers.
    trees: keeps the tokenized questions by task, to judge again. Stopped if a process gives up."""
    with scorer.bar(sum(len(range(scorer.world.rank, len(task.gold), scorer.world.size)) for task in tasks), "") as bar:
        for task in tasks:
            bar.set_description_str(task.name)
            kept = (trees or {}).get(task.name) or build_trees(task, tokenizer, seq_len, scorer.world)
            if trees is not None:
                trees[task.name] = kept
            answered = answers(scorer, task, kept, bar)
            bar.clear()  # the caller may print
            yield task.name, figures(task, answered), answered
