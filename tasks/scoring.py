"""Scores answers: how likely does a model find these tokens after those? Every task that judges a model is scored here."""

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import cli
from common.distributed import DistContext
from model import GPT
from ops.attention import causal_mask
from ops.loss import log_likelihoods
from variants import inference_copy


@dataclass
class Row:
    """A context and one answer: the last `scored` of its ids. A task may divide by `length`."""

    ids: list[int]
    scored: int
    length: int


@dataclass
class Tree:
    """A task's rows in one sequence: the shared context once, then the rest of each row, which sees the context and itself."""

    ids: np.ndarray  # (L,)
    positions: np.ndarray  # (L,) of each id in its own row
    branch: np.ndarray  # (L,) 0 in the context, then the row's number
    scored: np.ndarray  # (N,) where the answers' tokens are predicted, row by row
    targets: np.ndarray  # (N,) these tokens
    counts: list[int]  # of these tokens in each row
    lengths: list[int]  # of each row


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


class Scored(NamedTuple):
    """What a model says about a tree. Each list has one entry per row."""

    log_p: list[float]  # log-probability in nats of the answer given its context
    greedy: list[bool]  # whether each token of the answer is the model's first choice; False if nobody asked
    counts: list[int]  # tokens of the answer
    lengths: list[int]  # as the row has it


@torch.no_grad()
def score_trees(
    model: GPT,
    trees: list[Tree],
    batch_tokens: int,
    greedy: bool = False,
    advance: Callable[[int], None] = lambda n: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Scored]:
    """Scores each tree. Softmax and sum never run in bf16.
    greedy: whether to find the model's first choices too. advance: called with the number of trees of each batch. stopped: called before
    each batch; True skips the rest."""
    device = model.transformer.wte.weight.device
    # without cuDNN's attention: it plans every new shape, and nearly every batch has a new shape. Flash serves shared heads without a mask
    allowed = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    kernels = sdpa_kernel(allowed) if device.type == "cuda" else nullcontext()
    result = [Scored([], [], [], [])] * len(trees)
    with kernels:
        for batch in batches(trees, batch_tokens):
            if stopped():
                break
            counts = [n for i in batch for n in trees[i].counts]
            log_p, first_choice = score_batch(model, [trees[i] for i in batch], device, greedy)
            sums = [part.sum().item() for part in log_p.cpu().double().split(counts)]
            matches = [part.all().item() for part in first_choice.cpu().split(counts)]
            for i in batch:
                n = len(trees[i].counts)
                result[i] = Scored(sums[:n], matches[:n], trees[i].counts, trees[i].lengths)
                sums, matches = sums[n:], matches[n:]
            advance(len(batch))
    return result


def score_batch(model: GPT, trees: list[Tree], device: torch.device, greedy: bool) -> tuple[Tensor, Tensor]:
    """Returns the log-likelihood of each of the trees' targets, and whether it is the model's first choice: (N,), (N,)."""
    B, L = len(trees), max(len(tree.ids) for tree in trees)
    ids, positions, branch = np.zeros((3, B, L), np.int64)  # padded on the right
    for j, tree in enumerate(trees):
        n = len(tree.ids)
        ids[j, :n], positions[j, :n], branch[j, :n] = tree.ids, tree.positions, tree.branch
    scored = np.concatenate([j * L + tree.scored.astype(np.int64) for j, tree in enumerate(trees)])
    targets = np.concatenate([tree.targets for tree in trees]).astype(np.int64)
    ids, positions, branch, scored, targets = (torch.from_numpy(array).to(device) for array in (ids, positions, branch, scored, targets))
    if all(len(tree.counts) == 1 for tree in trees):  # no branches: plain causal attention, which is faster
        x = model.hidden_states(ids)  # (B, L, C)
    else:
        mask = (branch[:, None, :, None] == branch[:, None, None, :]) | (branch[:, None, None, :] == 0)  # own row or context
        x = model.hidden_states(ids, positions=positions, mask=mask & causal_mask(L, L, device))  # (B, L, C)
    chosen = []

    def logits(x: Tensor) -> Tensor:
        found = model.logits(x)
        chosen.append(found.argmax(-1) if greedy else found.new_full((len(x),), -1, dtype=torch.long))
        return found

    log_p = log_likelihoods(logits, x.flatten(0, 1)[scored], targets)  # (N,): only these positions need logits
    return log_p, torch.cat(chosen) == targets


class Scorer:
    """Scores trees on all processes. batch_tokens: 0 picks what suits the device. autocast: a context for the matrix products.
    stopped: whether to give up. Make a new one after an optimizer step."""

    def __init__(self, model: GPT, world: DistContext, batch_tokens: int = 0, autocast=None, stopped: Callable[[], bool] = lambda: False):
        self.world, self.autocast, self.stopped = world, autocast or nullcontext(), stopped
        self.batch_tokens = batch_tokens or (1024 if world.device.type == "cpu" else 32768)  # a CPU's caches hold about this much
        with self.autocast:
            self.model = inference_copy(model)

    def bar(self, total: int, name: str):
        """Returns a bar for the progress, which rank 0 shows."""
        return cli.bar(total=total, desc=name, unit="task", leave=False, disable=not self.world.is_main)

    def __call__(self, trees: dict[Hashable, Tree], bar, greedy: bool = False) -> dict[Hashable, Scored]:
        """Scores this process's trees. Returns the results of all processes, on each. If one gives up, all raise Stopped. ValueError if
        a log-probability is NaN."""
        with self.autocast:
            found = score_trees(self.model, list(trees.values()), self.batch_tokens, greedy, bar.update, self.stopped)
        mine = dict(zip(trees, found, strict=True))
        scored = {key: result for part in self.world.gather_unless(self.stopped(), mine) for key, result in part.items()}
        if any(math.isnan(p) for result in scored.values() for p in result.log_p):
            raise ValueError("the model's losses are NaN: its training diverged, use an earlier checkpoint")
        return scored
