"""Writes a run's log.txt, metrics.jsonl and samples.txt, its results to stdout and its progress to stderr."""

import json
import math
import statistics
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from common import cli, device
from common.distributed import DistContext
from common.files import append, parse_json, sync_file
from common.logs import read_metrics
from common.run_folder import RunFolder
from training.config import LOWER_LR, TrainConfig
from training.failure import Hopeless
from training.tracker import Tracker
from training.trainer import Trainer, Update
from variants import flops_per_token


class Log:
    """Writes log.txt ('step stream value', build-nanogpt's format), metrics.jsonl and samples.txt, all append-only. Only rank 0 writes."""

    def __init__(self, config: TrainConfig, world: DistContext, folder: RunFolder):
        self.config, self.world, self.folder = config, world, folder
        self.lower_rate = LOWER_LR + (" and --muon-lr" if config.optimizer == "muon" else "")
        self.tracker = None
        self.recent = deque(maxlen=20)  # seconds of the last steps
        self.shown = -math.inf  # time of the last progress line
        self.bar = None  # on a terminal, progress is a bar
        self.unwritten = {"log.txt": "", "metrics.jsonl": "", "samples.txt": ""}  # text that a full disk didn't accept yet

    def track(self, run_id: str, step: int):
        if self.config.tracker != "none":
            self.tracker = Tracker(self.config.tracker, self.config.out_dir, run_id, asdict(self.config), step, self.progress)

    def value(self, step: int, stream: str, value: float, metrics: dict):
        if not self.world.is_main:
            return
        if self.tracker:
            self.tracker.log(step, metrics)
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in metrics.items()}
        self.append("log.txt", f"{step} {stream} {value:.6f}\n")
        self.append("metrics.jsonl", json.dumps({"step": step, **finite}) + "\n")

    def append(self, name: str, text: str):
        """Appends text to a file of the run. On a full disk, warns, keeps it in memory and tries again with the next text."""
        late = self.unwritten[name] != ""
        self.unwritten[name] += text
        try:
            write_pending(self.folder, self.unwritten, name)
        except OSError as e:
            if not late:
                self.progress(f"warning: {e}: its lines are kept in memory until they can be written")

    def sync(self):
        """Writes the log to the disk now, as far as possible: a full disk must not prevent a save."""
        with suppress(OSError):
            for name in self.unwritten:
                write_pending(self.folder, self.unwritten, name)
                sync_file(self.folder.path / name)

    def finish(self):
        """Raises OSError if lines remain that can't be written."""
        if self.bar:
            with suppress(OSError):  # the terminal is gone
                self.bar.close()
        if self.tracker:
            self.tracker.finish()
        for name in self.unwritten:
            write_pending(self.folder, self.unwritten, name)

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
            why = f"{what} is {number}: start again with {self.lower_rate}, in another --out-dir"
            self.progress(f"error: {why}")
            raise Hopeless(why)

    def skipped(self, step: int, why: str, in_a_row: int):
        """Reports a skipped update. After too many in a row, ends the run on all ranks without saving."""
        limit, out_dir = self.config.max_bad_steps, self.config.out_dir
        self.progress(f"warning: step {step} changes no weight ({in_a_row} in a row, {limit} end the run): {why}")
        if in_a_row >= limit:
            why = (
                f"{in_a_row} updates in a row were skipped: start again with {self.lower_rate} in another --out-dir, or look into it "
                f"with --replay-step {step} --out-dir {out_dir}; --resume with a higher --max-bad-steps continues from the last checkpoint"
            )
            self.progress(f"error: {why}")
            raise Hopeless(why)

    def train(self, trainer: Trainer, step: int, update: Update, seconds: float):
        """Logs a step: in both files, and on the screen at most once a second. Ends the run after too many skipped updates."""
        metrics, steps = step_metrics(trainer, step, update, seconds), math.ceil(trainer.budget.steps(step))
        self.value(step, "train", metrics["loss"], metrics)
        self.recent.append(seconds)
        if time.perf_counter() - self.shown > 1 or step + 1 == steps:
            self.shown = time.perf_counter()
            by_seconds = (self.config.max_seconds or math.inf) - trainer.budget.elapsed
            parts = progress_parts(step, steps, metrics, min(by_seconds, statistics.median(self.recent) * (steps - step - 1)))
            if self.world.is_main and cli.on_a_screen():
                self.bar = self.bar or cli.bar(total=steps, dynamic_ncols=True, bar_format="{bar:10}| {desc}")
                self.bar.n, self.bar.total = step + 1, steps
                self.bar.set_description_str(fitting(parts, cli.columns() - len("██████████| ")))
            else:
                self.progress(" | ".join(parts))
        if update.skipped:
            self.skipped(step, update.skipped, trainer.guard.bad_steps)


def write_pending(folder: RunFolder, pending: dict[str, str], name: str):
    if pending[name]:
        folder.check()
        append(folder.path / name, pending[name])
        pending[name] = ""


def progress_parts(step: int, steps: int, metrics: dict, seconds: float) -> list[str]:
    """Returns the parts of a step's line for the screen, the most needed first. seconds: left until the end."""
    parts = [
        f"step {step:{len(str(steps))}}/{steps}",
        f"loss {metrics['loss']:.4f}",
        f"eta {timedelta(seconds=round(seconds))}",
        f"{metrics['tokens_per_second']:,.0f} tok/s",
        f"lr {metrics['lr']:.2e}",
        f"norm {metrics['grad_norm']:.2f}",
    ]
    return parts + ([] if metrics["mfu"] is None else [f"mfu {metrics['mfu']:.1%}"])


def fitting(parts: list[str], width: int) -> str:
    """Joins as many of the first parts as fit into the width, at least one."""
    lines = [" | ".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((line for line in lines if len(line) <= width), lines[-1][:width])


def logged_loss(out_dir: Path, step: int) -> float | None:
    """Returns a step's exact loss from metrics.jsonl; nan if it was not finite, None if the step is missing."""
    loss = None
    path = out_dir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        if line.startswith(f'{{"step": {step}, "loss": ') and line.endswith("}"):
            with suppress(ValueError, KeyError, TypeError, OverflowError):  # a damaged line
                found = parse_json(line)["loss"]
                loss = math.nan if found is None else float(found)
    return loss


def logged_clock(out_dir: Path, first: int, last: int) -> dict[int, float]:
    """Returns the seconds of training before each of these steps, from metrics.jsonl. ValueError if a step is missing."""
    path = out_dir / "metrics.jsonl"
    clock = read_metrics(path, ["training_seconds"], "loss")["training_seconds"]
    if missing := [step for step in range(first, last + 1) if step not in clock]:
        raise ValueError(
            f"{path} has no training_seconds of {len(missing)} steps such as {missing[0]}: with --max-seconds, their learning rates depend "
            "on it; restore the file from a copy, or choose another --replay-step"
        )
    return clock


def resume_notice(out_dir: Path, step: int | None) -> str:
    """Says from where a run resumes, and which logged steps it repeats. step: of the checkpoint; None without one."""
    begin = "resuming without a checkpoint, from step 0" if step is None else f"resuming from the checkpoint of step {step}"
    first = step or 0
    last = max(read_metrics(out_dir / "metrics.jsonl", ["loss"], "loss")["loss"], default=-1)
    if last < first:
        return begin
    return f"{begin}; repeating {f'step {first}' if last == first else f'steps {first} to {last}'}, logged after it"


def axes(trainer: Trainer, step: int) -> dict:
    """Returns the x axes for plots, at this step."""
    tokens = step * trainer.config.total_batch_tokens
    epoch = tokens / (trainer.train_stream.sequences_per_epoch * trainer.config.model.seq_len)
    seconds = {"seconds": trainer.seconds, "training_seconds": trainer.budget.elapsed}
    return {"tokens": tokens, **seconds, "epoch": epoch, "flops": tokens * flops_per_token(trainer.model)}


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
