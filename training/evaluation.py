"""Validation, HellaSwag, other tasks and samples during a run."""

import shlex
from collections.abc import Callable

import torch

import hellaswag
import plot_log
from common import cli
from common import tokenizer as tokenizers
from common.distributed import Stopped
from ops import choice
from sample import sample_texts
from tasks.judging import group_figures, judge, main_figure
from tasks.readers import Task, read_tasks
from tasks.scoring import Scorer
from training.compiling import run_eagerly
from training.log import Log, axes
from training.trainer import Trainer


class Evaluation:
    """Runs evaluations when they are due. Skips tasks or samples with a warning if their files are missing or damaged."""

    def __init__(self, trainer: Trainer, log: Log, stopped: Callable[[], bool]):
        self.trainer, self.log, self.stopped = trainer, log, stopped
        self.config, self.world = trainer.config, trainer.world
        self.tokenizer = self.or_warn("samples or HellaSwag in this run", self.get_tokenizer)
        wanted = self.tokenizer and self.config.hellaswag_every
        self.tasks = self.or_warn("HellaSwag in this run", self.get_tasks) if wanted else None
        self.trees = None  # of these tasks, once HellaSwag runs
        wanted = self.tokenizer and self.config.eval_every
        self.eval_tasks = self.or_warn("--eval-tasks in this run", self.get_eval_tasks) if wanted else None
        self.eval_trees = {}  # of these tasks, once they run

    def get_tokenizer(self) -> tokenizers.Tokenizer:
        name, rows = self.trainer.shards.tokenizer, self.config.model.vocab_size
        if name in tokenizers.VOCAB_SIZES and (why := tokenizers.misfit(name, rows)):
            raise ValueError(f"{self.trainer.shards.folder}: {why}")
        self.world.on_main(lambda: tokenizers.get_tokenizer(name) and None)  # downloads it once
        self.world.on_all(lambda: tokenizers.get_tokenizer(name) and None)
        return tokenizers.get_tokenizer(name)

    def get_tasks(self) -> list[dict]:
        return self.world.on_main(lambda: hellaswag.load_tasks(self.config.hellaswag_file))

    def get_eval_tasks(self) -> list[Task]:
        given, limit, seq_len = self.config.eval_tasks, self.config.eval_limit, self.config.model.seq_len
        return self.world.on_main(lambda: read_tasks(given, self.tokenizer, seq_len, limit))

    def or_warn(self, what: str, get, alone: bool = False):
        """Returns get(). If it fails, warns and returns None: the run continues without it. alone: no other rank takes part, or would
        wait for this one, so that any error may be skipped."""
        try:
            return get()
        except Stopped:
            raise
        except Exception as e:
            expected = isinstance(e, ValueError | OSError)  # the ranks raise these together
            if not (expected or alone):
                raise
            self.log.progress(f"warning: no {what}: {e if expected else f'{type(e).__name__}: {e}'}")
            return None

    def due(self, step: int) -> bool:
        """Whether run() has anything to do at this step."""
        every = self.config.val_every, self.config.hellaswag_every, self.config.eval_every, self.config.sample_every
        return bool(self.trainer.budget.limits_reached(step)) or any(is_due(each, step) for each in every)

    def run(self, step: int) -> float | None:
        """Runs the evaluations that are due; at the end of the run, all that are on. Returns the validation loss, or None if it was not
        due. Raises Stopped on all processes if a signal comes."""
        config, end, val_loss = self.config, bool(self.trainer.budget.limits_reached(step)), None
        if end or is_due(config.val_every, step):
            val_loss = validate(self.trainer, self.stopped)
            self.log.stop_if_diverged(f"the validation loss of step {step}", val_loss)
            self.log.value(step, "val", val_loss, {"val_loss": val_loss, **axes(self.trainer, step)})
            self.log.result(f"step {step}: val loss {val_loss:.4f}")
        # shapes vary: compiling each would take too long. And a resumed run must give the same answers
        with run_eagerly(self.trainer.evaluated), choice.defaults():
            if self.tasks and (end or is_due(config.hellaswag_every, step)):
                self.or_warn(f"HellaSwag at step {step}", lambda: self.hellaswag(step), alone=self.world.size == 1)
            if self.eval_tasks and (end or is_due(config.eval_every, step)):
                self.or_warn(f"evaluation on --eval-tasks at step {step}", lambda: self.evaluate(step), alone=self.world.size == 1)
            if self.tokenizer and config.sample_every and (end or is_due(config.sample_every, step)):
                self.or_warn(f"samples at step {step}", lambda: self.sample(step), alone=True)
        return val_loss

    def hellaswag(self, step: int):
        trainer, tasks, tokenizer = self.trainer, self.tasks, self.tokenizer
        if self.trees is None:
            self.trees = hellaswag.build_trees(tasks, tokenizer, self.config.model.seq_len, self.world)
        how = dict(autocast=trainer.autocast(), stopped=self.stopped, trees=self.trees)
        scores, _ = hellaswag.evaluate(trainer.evaluated, tokenizer, tasks, self.world, **how)
        named = {f"hellaswag_{name}": score for name, score in scores.items()}
        self.log.value(step, "hella", scores["acc_norm"], {**named, "hellaswag_tasks": len(tasks), **axes(trainer, step)})
        self.log.result(f"step {step}: HellaSwag acc_norm {scores['acc_norm']:.4f}, harness style {scores['harness_acc_norm']:.4f}")

    def evaluate(self, step: int):
        """Scores --eval-tasks. Logs a line for each group of them: a group's main figure in log.txt, all figures in metrics.jsonl."""
        trainer, scorer = self.trainer, Scorer(self.trainer.evaluated, self.world, 0, self.trainer.autocast(), self.stopped)
        judged = judge(scorer, self.eval_tasks, self.tokenizer, self.config.model.seq_len, self.eval_trees)
        results = {name: result for name, result, _ in judged}
        for group, mean in group_figures(results).items():
            members = {name: result for name, result in results.items() if name.partition("/")[0] == group} | {group: mean}
            named = {f"{name}_{key}": value for name, result in members.items() for key, value in result.items()}
            main = main_figure(group)
            self.log.value(step, group, mean[main], {**named, **axes(trainer, step)})
            bits = f", {mean['bits_per_byte']:.4f} bits per byte of the right answers" if main != "bits_per_byte" else ""
            self.log.result(f"step {step}: {group} {main} {mean[main]:.4f} ± {mean[f'{main}_stderr']:.4f}{bits}")

    def sample(self, step: int):
        if not self.world.is_main or self.stopped():
            return
        prompt, length, seed = self.config.sample_prompt, self.config.sample_tokens, self.config.seed + step
        with self.trainer.autocast():
            texts = sample_texts(self.trainer.evaluated, self.tokenizer, prompt, 4, length, seed)
        texts = list(map(cli.printable, texts))
        untrained = step == 0 and not self.config.init_from  # it writes noise: a glimpse is enough
        for text in [f"{' '.join(texts[0].split())[:60]} …"] if untrained else texts:
            self.log.result(f"step {step}: sample: {text}")
        titles = (f"---- step {step}, sample {number} of {len(texts)} ----" for number in range(1, len(texts) + 1))
        shown = "".join(f"{title}\n{text}\n\n" for title, text in zip(titles, texts, strict=True))
        self.log.append("samples.txt", shown)
        if self.log.tracker:
            self.log.tracker.text(step, "samples", shown)

    def plot(self):
        """Draws the log. The run is finished and saved: no error in a picture may fail it."""
        if self.world.is_main:
            log = self.log.folder.path / "log.txt"
            try:
                plot_log.plot(plot_log.PlotConfig((str(log),), str(log.with_name("log_plot.png"))))
            except Exception as e:
                self.log.progress(f"warning: no plot: {e}; try again: python plot_log.py {shlex.quote(str(log.parent))}")


def is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


@torch.no_grad()
def validate(trainer: Trainer, stopped: Callable[[], bool] = lambda: False) -> float:
    """Returns the mean loss over val_tokens, spread evenly over the val split. The same tokens for any world size and micro batch.
    stopped: called before each batch; if it returns True on any process, all raise Stopped."""
    config, world, stream = trainer.config, trainer.world, trainer.val_stream
    B, T, available = config.micro_batch_size, config.model.seq_len, stream.sequences_per_epoch
    count = max(1, min(available, config.val_tokens // T))
    mine = [i * available // count for i in range(world.rank, count, world.size)]
    losses = []  # (loss, number of sequences). item() comes last because it waits for the GPU, which works while the next batch is read
    for start in range(0, len(mine), B):
        if stopped():
            break
        positions = mine[start : start + B]
        x, y = stream.batch(positions + [0] * (B - len(positions)))  # always (B, T), so that nothing recompiles
        y[len(positions) :] = -100
        losses.append((trainer.validation_loss((x, y)), len(positions)))
    total = 0.0
    for loss, size in losses:
        total += loss.item() * size
    return sum(world.gather_unless(stopped(), total)) / count
