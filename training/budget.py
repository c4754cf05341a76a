"""How far a run is: which part of --max-steps or --max-seconds it has used, and whether one of them has ended it."""

import statistics
from collections import deque

from training.config import TrainConfig


def ended_by(config: TrainConfig, step: int, seconds: float) -> list[str]:
    """Returns the flags that end a run after this many steps and seconds of training; [] if it continues."""
    return ["--max-steps"] * (step >= config.max_steps) + ["--max-seconds"] * (0 < config.max_seconds <= seconds)


def seconds_in(state: dict) -> float:
    """Returns the seconds of training in a checkpoint's state. Older versions counted only those that include compiling."""
    return state.get("training_seconds", state["seconds"])


class Budget:
    """Counts a run's seconds of training: its updates, but not compiling, evaluations and saves.

    All ranks must decide alike, so only rank 0's clock counts. The ranks exchange it with a step's losses, before that step ends. So they
    agree on what the clock is expected to show after the step: the seconds so far and one step of the usual length.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.elapsed = 0.0  # seconds of training before this step; the same on every rank
        self.counted = 0.0  # by this process's clock
        self.recent = deque(maxlen=20)  # seconds of the last steps that compiled nothing; a usual step takes their median
        self.uncounted = 0  # steps that compiled before a usual step was known

    def resume(self, seconds: float):
        self.elapsed = self.counted = seconds

    def after_this_step(self) -> float:
        """Returns what this process's clock will probably show after the step that is running."""
        return self.counted + self.usual_step()

    def usual_step(self) -> float:
        """Returns the seconds of a usual step, by this process's clock; 0.0 as long as none is known."""
        return statistics.median(self.recent) if self.recent else 0.0

    def count(self, seconds: float, compiled: bool, elapsed: float):
        """Counts a step that has ended. One in which any rank compiled counts as a usual step. Until one is known, it waits in uncounted.
        elapsed: rank 0's after_this_step."""
        self.elapsed = elapsed
        if compiled:
            self.uncounted += 1
        else:
            self.recent.append(seconds)
            self.counted += seconds
        if self.recent:
            self.counted += self.uncounted * self.usual_step()
            self.uncounted = 0

    def limits_reached(self, step: int) -> list[str]:
        """Returns the flags that end the run before this step; [] if it continues."""
        return ended_by(self.config, step, self.elapsed)

    def steps(self, step: int) -> float:
        """Returns how many steps the run will have: --max-steps, or fewer if at its pace so far --max-seconds ends it before. The
        schedules of this step use it."""
        c = self.config
        if not (c.max_seconds and self.elapsed):
            return c.max_steps
        return min(c.max_steps, step * c.max_seconds / self.elapsed)

    def note(self, step: int) -> str:
        """Says what a run with --max-seconds lacked, if it ends at this step: steps to use its seconds, or seconds to end its warmup."""
        c = self.config
        if c.max_seconds and "--max-seconds" not in self.limits_reached(step):
            return f"; --max-steps ended the run after {self.elapsed:,.1f} of {c.max_seconds:,.1f} seconds: raise it to use them all"
        if c.max_seconds and step < c.warmup_steps:
            return f"; after {step} steps the learning rate had not reached --max-lr: lower --warmup-steps"
        return ""
