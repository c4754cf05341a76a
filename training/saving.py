"""A run's checkpoints: saves and loads everything that an exact resume needs."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from torch import Tensor

import checkpoint
from common.run_folder import RunFolder
from training import sharding
from training.budget import seconds_in
from training.log import Log
from training.trainer import Trainer

COST = 0.01  # of the time, for --checkpoint-minutes


def save_limits(seconds: float, cost: float, step: float) -> tuple[float, float]:
    """Returns how long after a save a step must begin so that the next save follows it: for COST of the time, and for at most `seconds`
    of work at stake. The longer one counts. cost, step: seconds of a save and of a usual step."""
    # a save one step later would be too late: it must be complete before the time is over
    return cost / COST - step, seconds - cost - 2 * step


class Interval:
    """When the next checkpoint is due by --checkpoint-minutes. Each process has one; only rank 0's counts."""

    def __init__(self, minutes: float, warn: Callable[[str], None]):
        self.seconds, self.warn = 60 * minutes, warn
        self.last = time.monotonic()  # when the state was taken that is safe now
        self.costs = deque(maxlen=3)  # seconds that training waited for the last saves: a single slow one doesn't count

    def due(self, step: float) -> bool:
        """Whether to save after the step that begins now. step: seconds of a usual one."""
        if not self.seconds:
            return False
        cost = statistics.median(self.costs) if self.costs else 0.0
        least, most = save_limits(self.seconds, cost, step)
        if least > most and self.warn:
            self.warn(
                f"warning: a save takes {cost:,.1f} s; for at most {COST:.0%} of the time, they come every {cost / COST / 60:,.1f} minutes"
            )
            self.warn = None
        return time.monotonic() - self.last > max(least, most)

    def saved(self, began: float):
        """Notes a save that began at this time.monotonic() and has returned."""
        self.last = began
        self.costs.append(time.monotonic() - began)


class Checkpoints:
    """Saves and loads a trainer. The order of the data needs no state: it is a function of the step."""

    def __init__(self, trainer: Trainer, folder: RunFolder, log: Log):
        config = trainer.config
        self.trainer, self.folder, self.log, self.stop_on_error = trainer, folder, log, config.on_save_error == "stop"
        # a background save needs a copy in main memory; on a CPU, training needs that memory itself
        self.saver = checkpoint.Saver(folder, config.keep, trainer.device.type != "cpu", log.progress)
        if folder.mirror:
            folder.mirror.health.warn = log.progress
        self.val_loss = None  # of the checkpoint that this launch resumes, if it was validated
        self.interval = Interval(config.checkpoint_minutes, log.progress)

    def due(self) -> bool:
        """Whether this process would save after the step that begins now, by --checkpoint-minutes."""
        return self.interval.due(self.trainer.budget.usual_step())

    def save(self, step: int, val_loss: float | None, timed: bool = False):
        """Saves a checkpoint. Call it on all ranks; rank 0 writes. timed: only --checkpoint-minutes asks for it."""
        trainer, began = self.trainer, time.monotonic()
        optimizer_state = trainer.optimizer.state_dict()  # Muon gathers its parts from all ranks
        state = {
            "optimizer": sharding.gathered(optimizer_state, trainer.world.is_main) if trainer.sharded else optimizer_state,
            "scaler": trainer.scaler.state_dict(),
            "seconds": trainer.seconds,
            "training_seconds": trainer.budget.elapsed,
            "bad_steps": trainer.guard.bad_steps,
            "recent_losses": list(trainer.guard.recent_losses),
        }
        weights = self.weights()
        if trainer.average:
            state |= {"weights": weights, "averaged": trainer.average.updates}
            with trainer.average.in_place():
                weights = {name: p for name, p in self.weights().items() if p is not None}
                copies = {key: p.clone() for key, p in checkpoint.tensors_in(weights).items()}  # a tied head stays tied
                weights = checkpoint.with_tensors(weights, copies)
        if trainer.world.is_main:
            self.saver.wait()
            self.saver.follow_folder()
            self.log.sync()  # after a power cut, the log must reach as far as the checkpoint
            self.saver.save(step, checkpoint.content_of(step, trainer.model, trainer.shards.tokenizer, val_loss, weights), state, timed)
        self.interval.saved(began)

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, with full tensors on rank 0. Call it on all ranks."""
        model = self.trainer.model
        return sharding.weights(model, self.trainer.world.is_main) if self.trainer.sharded else model.state_dict()

    def must_stop(self) -> bool:
        """Warns if the last save failed. Returns whether the run must stop: for that, because its folder is no longer its own, or because
        another launch took over."""
        error = self.saver.failure()
        if error:
            then = "the run ends" if self.stop_on_error else "training continues, the next save tries again"
            self.log.progress(f"warning: {error}; {then}")
        if self.folder.problem():
            self.saver.wait()  # its thread may find the new folder
            self.saver.follow_folder()
        taken = self.folder.mirror and self.folder.mirror.lost
        return bool(self.folder.lost or taken) or (error is not None and self.stop_on_error)

    def load(self, step: int):
        """Loads a checkpoint. If a host lacks it, rank 0 sends it to all."""
        trainer, folder = self.trainer, self.folder.path
        damaged = trainer.world.several_hosts and checkpoint.find_problem(folder, step)  # another host's copy may be
        everywhere = len(set(trainer.world.gather("" if damaged else checkpoint.seal_of(folder, step)))) == 1
        read = partial(checkpoint.load_training, folder, step)
        content, state = read() if everywhere else trainer.world.copy(read)
        self.load_weights(content["model"])
        if trainer.average:
            trainer.average.restart(state["averaged"])
            self.load_weights(state["weights"])
        optimizer_state = state["optimizer"]
        trainer.optimizer.load_state_dict(sharding.sliced_state(trainer.optimizer, optimizer_state) if trainer.sharded else optimizer_state)
        if state["scaler"]:  # empty if the run did not use fp16 so far
            trainer.scaler.load_state_dict(state["scaler"])
        trainer.seconds, self.val_loss = state["seconds"], content["val_loss"]
        trainer.budget.resume(seconds_in(state))
        trainer.guard.bad_steps = state["bad_steps"]
        trainer.guard.recent_losses.extend(state["recent_losses"])

    def load_weights(self, full: dict[str, Tensor]):
        model = self.trainer.model
        checkpoint.load_weights(model, sharding.sliced(model, full) if self.trainer.sharded else full, self.folder.path)
