"""Decides whether an update may reach the weights, and finds the sequences that made a loss or gradient not finite."""

import math
import statistics
from collections import deque

import torch

from training.compiling import run_eagerly

SPIKE_WINDOW = 128  # number of recent losses that --skip-spikes uses; it starts once it has half of them (as in OLMo-core)


class Guard:
    """Judges every update. Remembers recent losses and how many updates in a row were skipped."""

    def __init__(self, skip_spikes: float, scaler: torch.amp.GradScaler):
        self.skip_spikes, self.scaler = skip_spikes, scaler
        self.bad_steps = 0
        self.recent_losses = deque(maxlen=SPIKE_WINDOW)

    def judge(self, losses, mean: float, norm: float) -> str:
        """Returns why an update must be skipped, or '', and remembers the verdict."""
        reason = self.skip_reason(losses, mean, norm)
        self.bad_steps = self.bad_steps + 1 if reason else 0
        if not reason:
            self.recent_losses.append(mean)
        return reason

    def skip_reason(self, losses, mean: float, norm: float) -> str:
        bad = [f"rank {rank}'s loss is {loss}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        # in fp16 the scaler itself skips a gradient that overflows, as long as it can lower its scale
        if not bad and not math.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            bad = [f"the gradient's norm is {norm}"]
        if not bad and self.skip_spikes and len(self.recent_losses) >= SPIKE_WINDOW // 2:
            z = (mean - statistics.fmean(self.recent_losses)) / max(statistics.stdev(self.recent_losses), 1e-12)
            if z > self.skip_spikes:
                bad = [f"the loss {mean:.4f} is {z:.1f} standard deviations above that of the last {len(self.recent_losses)} steps"]
        return ", ".join(bad)


def locate_nonfinite(trainer, step: int, losses) -> str:
    """Names the sequences that make a step's loss or gradient not finite. Each rank repeats its part of the step and names its own."""
    can_repeat = not trainer.sharded  # a rank without all weights can't repeat its part alone
    by_rank = trainer.world.gather(nonfinite_positions(trainer, step) if can_repeat else [])
    reproduced = any(by_rank)
    if not reproduced:  # name all sequences of the ranks with a bad loss, or of all ranks if only the gradient was bad
        bad = [not math.isfinite(loss) for loss in losses]
        by_rank = [[p for part in trainer.positions(step, r) for p in part] if bad[r] or not any(bad) else [] for r in range(len(losses))]
    text = ""
    for rank, positions in enumerate(by_rank):
        if positions:
            more = f" and {len(positions) - 4} more" if positions[4:] else ""
            text += f"; sequences of rank {rank}: {', '.join(map(trainer.train_stream.place, positions[:4]))}{more}"
    return text if reproduced or not can_repeat else f"{text}; recomputed, everything is finite: the hardware may be at fault"


def nonfinite_positions(trainer, step: int) -> list[int]:
    """Returns this rank's positions whose loss is not finite, else those of the first micro batch whose gradient is not."""
    for positions in trainer.positions(step, trainer.world.rank):
        loss = trainer.loss(trainer.model, positions)
        if not math.isfinite(loss.item()):
            with torch.no_grad(), run_eagerly(trainer.model):
                return [p for p in positions if not math.isfinite(trainer.loss(trainer.model, [p]).item())] or list(positions)
        loss.backward()
        finite = all(p.grad.isfinite().all() for p in trainer.model.parameters())
        trainer.clear_gradients()
        if not finite:
            return list(positions)
    return []


def largest_weight(trainer) -> float:
    """Returns the largest absolute weight over all processes; nan or inf if any weight is."""
    mine = [p.to_local() if trainer.sharded else p for p in trainer.model.parameters()]
    largest = torch.stack([p.detach().abs().max() for p in mine if p.numel()]).max()
    return torch.tensor(trainer.world.rows(largest[None])).max().item()
