"""Writes a run's log.txt and metrics.jsonl, its results to stdout and its progress to stderr."""

import json
import math
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from common import cli, device
from common.distributed import DistContext
from common.files import append
from training.config import LOWER_LR, TrainConfig
from training.tracker import Tracker
from training.trainer import Trainer, Update
from variants import flops_per_token


class Log:
    """Writes log.txt ('step stream value', build-nanogpt's format) and metrics.jsonl, both append-only. Only rank 0 writes."""

    def __init__(self, config: TrainConfig, world: DistContext):
        self.config, self.world = config, world
        self.tracker = None
        self.recent = deque(maxlen=20)  # seconds of the last steps
        self.shown = -math.inf  # time of the last progress line
        self.bar = None  # on a terminal, progress is a bar
        self.unwritten = {"log.txt": "", "metrics.jsonl": ""}  # lines that a full disk didn't accept yet

    def track(self, run_id: str, step: int):
        if self.config.tracker != "none":
            self.tracker = Tracker(self.config.tracker, self.config.out_dir, run_id, asdict(self.config), step, self.progress)

    def value(self, step: int, stream: str, value: float, metrics: dict):
        if not self.world.is_main:
            return
        if self.tracker:
            self.tracker.log(step, metrics)
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in metrics.items()}
        lines = {"log.txt": f"{step} {stream} {value:.6f}\n", "metrics.jsonl": json.dumps({"step": step, **finite}) + "\n"}
        for name, line in lines.items():
            late = self.unwritten[name] != ""
            self.unwritten[name] += line
            try:
                self.write(name)
            except OSError as e:
                if not late:
                    self.progress(f"warning: {e}: its lines are kept in memory until they can be written")

    def write(self, name: str):
        append(Path(self.config.out_dir, name), self.unwritten[name])
        self.unwritten[name] = ""

    def finish(self):
        """Raises OSError if lines remain that can't be written."""
        if self.bar:
            self.bar.close()
        if self.tracker:
            self.tracker.finish()
        for name in self.unwritten:
            self.write(name)

    def result(self, text: str):
        if self.world.is_main:
            self.show(text, sys.stdout)

    def progress(self, text: str):
        if self.world.is_main:
            self.show(text, sys.stderr)

    def show(self, text: str, stream):
        try:
            if self.bar:
                self.bar.write(text, file=stream)  # above the bar
            else:
                print(text, file=stream, flush=True)
        except OSError:  # the reader is gone or the disk is full: the log files have the results
            cli.drop(stream)

    def stop_if_diverged(self, what: str, number: float):
        """Ends the run on all ranks without saving, if a loss or a weight is not finite."""
        if not math.isfinite(number):
            self.progress(f"error: {what} is {number}: start again with {LOWER_LR}, in another --out-dir")
            sys.exit(1)

    def skipped(self, step: int, why: str, in_a_row: int):
        """Reports a skipped update. After too many in a row, ends the run on all ranks without saving."""
        limit, out_dir = self.config.max_bad_steps, self.config.out_dir
        self.progress(f"warning: step {step} changes no weight ({in_a_row} in a row, {limit} end the run): {why}")
        if in_a_row >= limit:
            self.progress(
                f"error: {in_a_row} updates in a row were skipped: start again with {LOWER_LR} in another --out-dir, or look into it "
                f"with --replay-step {step} --out-dir {out_dir}; --resume with a higher --max-bad-steps continues from the last checkpoint"
            )
            sys.exit(1)

    def train(self, step: int, metrics: dict, seconds: float):
        """Logs a step: in both files, and on the screen at most once a second."""
        self.value(step, "train", metrics["loss"], metrics)
        self.recent.append(seconds)
        if time.perf_counter() - self.shown > 1 or step + 1 == self.config.max_steps:
            self.shown = time.perf_counter()
            self.show_progress(step, metrics)

    def show_progress(self, step: int, metrics: dict):
        max_steps = self.config.max_steps
        eta = timedelta(seconds=round(statistics.median(self.recent) * (max_steps - step - 1)))
        mfu = "n/a" if metrics["mfu"] is None else f"{metrics['mfu']:.1%}"
        line = (
            f"step {step:{len(str(max_steps))}}/{max_steps} | loss {metrics['loss']:.4f} | lr {metrics['lr']:.2e} | "
            f"norm {metrics['grad_norm']:.2f} | {metrics['tokens_per_second']:,.0f} tok/s | mfu {mfu} | eta {eta}"
        )
        if self.world.is_main and cli.on_a_screen():
            self.bar = self.bar or cli.bar(total=max_steps, dynamic_ncols=True, bar_format="{percentage:3.0f}%|{bar:10}| {desc}")
            self.bar.n = step + 1
            self.bar.set_description_str(line)
        else:
            self.progress(line)


def axes(trainer: Trainer, step: int) -> dict:
    """Returns the x axes for plots, at this step."""
    tokens = step * trainer.config.total_batch_tokens
    epoch = tokens / (trainer.train_stream.sequences_per_epoch * trainer.config.model.seq_len)
    return {"tokens": tokens, "seconds": trainer.seconds, "epoch": epoch, "flops": tokens * flops_per_token(trainer.model)}


def step_metrics(trainer: Trainer, step: int, update: Update, seconds: float) -> dict:
    """Returns a step's line of metrics.jsonl. mfu: fraction of the cards' peak, None if the peak is unknown."""
    rate = trainer.config.total_batch_tokens / seconds
    peak = device.peak_flops(trainer.device, trainer.dtype)
    return {
        "loss": update.loss,
        "lr": trainer.config.max_lr * trainer.schedule(step),
        "grad_norm": update.norm,
        "tokens_per_second": rate,
        "mfu": rate * flops_per_token(trainer.model) / (peak * trainer.world.size) if peak else None,
        "memory_bytes": device.peak_memory(trainer.device),
        **({"skipped": update.skipped} if update.skipped else {}),
        **axes(trainer, step),
    }
