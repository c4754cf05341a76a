"""What --rehearse measures: matrix products, links between processes, steps, evaluations. Each as briefly as a steady figure allows."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

import hellaswag
from common.distributed import DistContext
from tasks.judging import build_trees
from training.cost import HELLASWAG, SAMPLES, TASKS, VALIDATION
from training.evaluation import Evaluation
from training.log import Log, step_metrics
from training.saving import Checkpoints
from training.trainer import Trainer, Update

STEPS_TAKE, EVALUATION_TAKES = 8.0, 2.0  # seconds to measure for
LONGEST_STEP = 15.0  # seconds; a longer one is measured with fewer passes


class QuietLog(Log):
    """A log that shows nothing, and keeps what it would have shown."""

    def __init__(self, *args):
        super().__init__(*args)
        self.said: list[str] = []

    def show(self, text: str, stream):
        self.said.append(text)

    def warnings(self) -> list[str]:
        """Returns the warnings so far, and forgets them."""
        found = [text.removeprefix("warning: ") for text in self.said if text.startswith("warning: ")]
        self.said = []
        return found

    def train(self, trainer: Trainer, step: int, update: Update, seconds: float):
        metrics = step_metrics(trainer, step, update, seconds)
        self.value(step, "train", metrics["loss"], metrics)
        if trainer.guard.bad_steps >= self.config.max_bad_steps:
            self.skipped(step, update.skipped, trainer.guard.bad_steps)


def timed(world: DistContext, work: Callable[[], object]) -> float:
    """Returns rank 0's seconds for work, which all ranks begin together."""
    world.gather(None)
    began = time.perf_counter()
    work()
    return world.copy(lambda: time.perf_counter() - began)


# ---- hardware ----


def product_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Returns FLOP/s of this process's matrix products: the best of many, so that other programs count less."""
    torch.set_float32_matmul_precision("high")  # as in Trainer
    n = 8192 if device.type == "cuda" else 512
    x, best = torch.randn(n, n, device=device).to(dtype), math.inf
    x @ x  # starts threads and libraries
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def all_reduce_seconds(world: DistContext, numbers: int, largest: int = 2**28) -> float:
    """Returns the seconds of an all-reduce of `numbers` fp32 numbers: the best of three, measured with at most `largest` of them."""
    x = torch.zeros(min(numbers, largest), device=world.device)

    def reduce():
        dist.all_reduce(x)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)

    reduce()  # connects
    return min(timed(world, reduce) for _ in range(3)) * numbers / len(x)


# ---- steps ----


class Steps:
    """Trains a few steps as train.py does. compiling: seconds that steps took longer than usual because they compiled."""

    def __init__(self, trainer: Trainer, log: Log, checkpoints: Checkpoints, first: int):
        self.trainer, self.log, self.checkpoints, self.next = trainer, log, checkpoints, first
        self.compiling = 0.0

    def one(self, stop: bool = False) -> tuple[Update, float]:
        """Does the next step. Returns it and its seconds, with the log's."""
        began, trainer = time.perf_counter(), self.trainer
        update = trainer.update(self.next, stop=self.checkpoints.must_stop() or stop, save=self.checkpoints.due())
        seconds = time.perf_counter() - began
        trainer.seconds += seconds
        self.log.train(trainer, self.next, update, seconds)
        trainer.budget.count(seconds, update.compiled, update.elapsed)
        self.next += 1
        return update, time.perf_counter() - began

    def warm_up(self) -> float:
        """Does steps of one pass until none compiles. Returns the seconds of the last."""
        config, seconds = self.trainer.config, []
        config.total_batch_tokens = config.micro_batch_size * config.model.seq_len * self.trainer.world.size
        while len(seconds) < 10:
            update, took = self.one()
            seconds.append(took)
            if not update.compiled and len(seconds) > 1:
                break
        self.compiling += sum(seconds) - len(seconds) * seconds[-1]
        return seconds[-1]

    def measure(self, total_batch_tokens: int) -> float:
        """Returns the seconds of a step of total_batch_tokens."""
        config, single = self.trainer.config, self.warm_up()
        single = self.trainer.world.copy(lambda: single)
        passes, tokens = total_batch_tokens // config.total_batch_tokens, config.total_batch_tokens
        tried = passes if passes * single <= LONGEST_STEP else min(passes, max(2, int(LONGEST_STEP / single)))
        config.total_batch_tokens = tried * tokens
        seconds, stop, first = [], False, self.next
        while not stop:
            enough = len(seconds) >= 2 and sum(seconds) + seconds[-1] >= STEPS_TAKE
            enough = enough or self.next - first - len(seconds) >= 10  # one that compiles each step would go on forever
            update, took = self.one(enough)  # all stop once one has enough
            stop = update.stop
            if update.compiled:
                self.compiling += max(0.0, took - tried * single)
            else:
                seconds.append(took)
        usual = statistics.mean(seconds or [took])
        each = min(usual / tried, max(0.0, usual - single) / max(1, tried - 1))  # of a pass; the rest is the optimizer's
        return self.trainer.world.copy(lambda: usual + (passes - tried) * each)


# ---- evaluations ----


class Measured(NamedTuple):
    """Seconds of an evaluation: of each one, and once in a run."""

    each: float
    once: float


class Timing:
    """Runs one kind of evaluation on parts of its work, until a part takes long enough to tell how long all of it would take."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.trainer, self.world, self.config = evaluation, evaluation.trainer, evaluation.world, evaluation.config
        self.tasks, self.eval_tasks = evaluation.tasks, evaluation.eval_tasks
        self.small = self.world.size * (1 if self.world.device.type == "cpu" else 25)  # a GPU scores more questions at once

    def validation(self) -> Measured:
        config, stream = self.trainer.config, self.trainer.val_stream
        wanted, batch = config.val_tokens, config.micro_batch_size * config.model.seq_len * self.world.size
        available = stream.sequences_per_epoch * config.model.seq_len

        def prepare(n: int) -> int:
            config.val_tokens = min(wanted, n * batch)
            return n

        try:
            return self.measure("val_every", max(1, -(-min(wanted, available) // batch)), 1, prepare)
        finally:
            config.val_tokens = wanted

    def hellaswag(self) -> Measured:
        evaluation, tasks = self.evaluation, self.tasks

        def prepare(n: int) -> int:
            evaluation.tasks = tasks[:: math.ceil(len(tasks) / n)]  # from everywhere: the later ones are longer
            evaluation.trees = hellaswag.build_trees(evaluation.tasks, evaluation.tokenizer, self.config.model.seq_len, self.world)
            return len(evaluation.tasks)

        return self.measure("hellaswag_every", len(tasks), 4 * self.small, prepare)

    def own_tasks(self) -> Measured:
        evaluation, tasks, total = self.evaluation, self.eval_tasks, sum(len(task.gold) for task in self.eval_tasks)

        def prepare(n: int) -> int:
            made = [replace(task, gold=task.gold[: max(2, math.ceil(len(task.gold) * n / total))]) for task in tasks]
            seq_len = self.config.model.seq_len
            evaluation.eval_tasks = made
            evaluation.eval_trees = {task.name: build_trees(task, evaluation.tokenizer, seq_len, self.world) for task in made}
            return sum(len(task.gold) for task in made)

        return self.measure("eval_every", total, self.small * len(tasks), prepare)

    def samples(self) -> Measured:
        return self.measure("sample_every", 1, 1, lambda n: n)

    def measure(self, flag: str, total: int, n: int, prepare: Callable[[int], int]) -> Measured:
        """Returns the seconds of the evaluation that this flag turns on. prepare: makes about n of `total` parts ready and returns their
        number."""
        off = dict.fromkeys(("val_every", "hellaswag_every", "eval_every", "sample_every"), 0)
        self.evaluation.config, first = replace(self.config, **off | {flag: 1}), None

        def run():
            with self.trainer.evaluated_weights():
                self.evaluation.run(0)

        while True:
            began = time.perf_counter()
            made = prepare(min(n, total))
            building = time.perf_counter() - began
            cold = timed(self.world, run) if first is None else 0.0
            seconds = timed(self.world, run)
            first = first if first is not None else max(0.0, cold - seconds)
            if made >= total or seconds >= EVALUATION_TAKES or self.failed():
                return Measured(seconds * total / made, first + building * total / made)
            n = max(2 * made, int(1.2 * made * EVALUATION_TAKES / max(seconds, 1e-3)))

    def failed(self) -> bool:
        """Whether an evaluation had to be skipped: then there is nothing to measure."""
        return self.world.copy(lambda: any(text.startswith("warning: ") for text in self.evaluation.log.said))


def time_evaluations(evaluation: Evaluation) -> Iterator[tuple[str, Measured]]:
    """Yields the name and the seconds of each kind of evaluation that this run does."""
    timing, config = Timing(evaluation), evaluation.config
    wanted = {
        VALIDATION: (True, timing.validation),
        HELLASWAG: (bool(evaluation.tasks), timing.hellaswag),
        TASKS: (bool(evaluation.eval_tasks), timing.own_tasks),
        SAMPLES: (bool(evaluation.tokenizer and config.sample_every), timing.samples),
    }
    for name, (due, measure) in wanted.items():
        if due:
            yield name, measure()
