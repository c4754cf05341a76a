"""What a run spends its time on: how often it does what, and the seconds of each time. For --plan, which estimates these seconds, and
for --rehearse, which measures them."""

import math
from typing import NamedTuple

from training.config import TrainConfig
from training.saving import save_limits

VALIDATION, HELLASWAG, TASKS, SAMPLES = "validation", "HellaSwag", "--eval-tasks", "samples"


class Part(NamedTuple):
    """Something that a run does."""

    name: str
    times: int
    each: float  # seconds

    @property
    def seconds(self) -> float:
        return self.times * self.each


def steps_of(config: TrainConfig, step: float, first: int = 0, elapsed: float = 0.0) -> int:
    """Returns at which step a run ends. step: seconds of a usual one. first, elapsed: where the run resumes, and its seconds of training
    until then."""
    if not config.max_seconds:
        return config.max_steps
    return max(first + 1, math.ceil(min(config.max_steps, first + (config.max_seconds - elapsed) / step)))


def evaluations(config: TrainConfig, first: int, last: int) -> dict[str, int]:
    """Returns how often a run from step first to its end at step last does each evaluation: when it is due, and at the end."""

    def times(every: int) -> int:
        return len(range(-(-first // every) * every, last, every)) + 1 if every else 0

    c = config
    every = {VALIDATION: c.val_every, HELLASWAG: c.hellaswag_every, TASKS: c.eval_every, SAMPLES: c.sample_every}
    return {name: times(n) for name, n in every.items()} | {VALIDATION: max(1, times(c.val_every))}


def saves(config: TrainConfig, first: int, last: int, pace: float, step: float, save: float) -> int:
    """Returns how many checkpoints a run saves. pace: seconds per step, evaluations included. step, save: seconds of a usual step, and
    for which a save makes training wait."""
    every = config.checkpoint_every
    marks = range((first // every + 1) * every, last, every) if every else range(0)
    between = [(marks[0] - first, 1), (every, len(marks) - 1), (last - marks[-1], 1)] if marks else [(last - first, 1)]
    timed = 0
    if config.checkpoint_minutes:
        pause = max(save_limits(60 * config.checkpoint_minutes, save, step)) + step
        timed = sum(n * max(0, math.ceil(steps * pace / pause) - 1) for steps, n in between)
    return len(marks) + 1 + timed


def parts_of(config: TrainConfig, first: int, last: int, step: float, each: dict[str, float], save: float) -> list[Part]:
    """Returns what a run does from step first to step last. step, save: see saves. each: seconds of each evaluation; one that is missing
    is left out."""
    training = Part("training steps", last - first, step)
    evaluating = [Part(name, n, each[name]) for name, n in evaluations(config, first, last).items() if n and name in each]
    pace = sum(part.seconds for part in [training, *evaluating]) / max(1, last - first)
    return [training, *evaluating, Part("saves", saves(config, first, last, pace, step, save), save)]


def duration(seconds: float) -> str:
    """Returns a time as people read it: 7.7 s, 4.5 min, 12.25 hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.2f} hours"


def table(parts: list[Part], dollars: float) -> list[str]:
    """Returns a table as lines. dollars: per hour, of all GPUs; 0: unknown."""
    total = sum(part.seconds for part in parts)
    money = f"{'$':>12}" if dollars else ""
    lines = [f"{'':<28}{'times':>10}{'seconds each':>16}{'time':>14}{'share':>9}{money}"]
    for part in [*parts, Part("in all", 0, 0.0)]:
        seconds = part.seconds if part.times else total
        counts = f"{part.times:>10,}{part.each:>16,.4g}" if part.times else " " * 26
        money = f"{seconds / 3600 * dollars:>12,.2f}" if dollars else ""
        lines.append(f"{part.name:<28}{counts}{duration(seconds):>14}{seconds / max(total, 1e-9):>9.1%}{money}")
    return lines


def disk_bytes(config: TrainConfig, checkpoint: int, first: int, last: int, saves: int) -> int:
    """Returns the bytes that a run's checkpoints need at most: those that --keep counts, one of --checkpoint-minutes, and one that is
    being written before older ones are deleted. checkpoint: bytes of one. saves: how many the run makes."""
    every = config.checkpoint_every
    counted = (last - 1) // every - first // every + 1 if every else saves
    kept = min(counted, config.keep) if config.keep else counted
    return checkpoint * (kept + 1 + (every > 0 and config.checkpoint_minutes > 0))
