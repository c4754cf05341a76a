"""One training step: the model, its data and its updates."""

import math
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common import device
from common.distributed import DistContext
from common.shards import Shards
from dataloader import TokenStream, mix, rank_positions
from model import GPT
from training import optimizer, sharding
from training.budget import Budget
from training.compiling import compile_blocks, noticed_compilations, recompute_activations, undo_compile
from training.config import TrainConfig
from training.distillation import distillation_loss
from training.guard import Guard, locate_nonfinite
from variants import build_on_meta


class Update(NamedTuple):
    """What an update did; the same on every process."""

    loss: float  # of the whole batch
    losses: list[float]  # of each rank's part
    norm: float  # of the gradient, before clipping
    skipped: str  # why no weight changed, or ''
    stop: bool  # whether any rank asks to stop
    save: bool  # whether rank 0 asks to save
    compiled: bool  # whether any rank compiled something
    elapsed: float  # seconds of training after this step, as rank 0 expects


class Trainer:
    """Owns the model, the streams of data and the optimizer, and updates the weights."""

    def __init__(self, config: TrainConfig, world: DistContext, model: GPT, shards: Shards, compiled: bool, teachers: Sequence[GPT] = ()):
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA
        self.config, self.world, self.device = config, world, world.device
        self.shards = shards
        self.train_stream = TokenStream(shards, "train", config.model.seq_len, config.shuffle, config.seed)
        self.val_stream = TokenStream(shards, "val", config.model.seq_len, shuffle=False)
        self.feed = Feed(self.train_stream, world.device)
        self.dtype = device.pick_dtype(config.dtype, world.device)
        self.model = model.to(world.device).eval()  # without dropout, except in an update
        self.teachers = [teacher.to(world.device).eval() for teacher in teachers]
        self.compiled = compiled
        self.place_model()
        self.optimizer = self.make_optimizer()
        self.clear_gradients = partial(self.optimizer.zero_grad, set_to_none=not self.in_buckets)
        self.largest_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.average = optimizer.AverageWeights(self.model, config.ema) if config.ema else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        self.guard = Guard(config.skip_spikes, self.scaler)
        self.seconds = 0.0  # spent in updates and compiling, over all launches of the run
        self.budget = Budget(config)

    def place_model(self):
        """Compiles or recomputes, and shards or replicates, as the flags say."""
        config, world = self.config, self.world
        if self.compiled:
            device.mend_compile_cache()
            device.set_malloc(world.device, sparing=config.activation_memory < 1)
            for part in (self.model, *self.teachers):
                compile_blocks(part, config.activation_memory)
        elif config.activation_memory == 0:
            recompute_activations(self.model)
        self.sharded, self.evaluated = config.shard and world.size > 1, self.model
        if self.sharded:
            self.evaluated = build_on_meta(config.model).eval()  # gets all weights while it is evaluated
            if self.compiled:
                compile_blocks(self.evaluated, config.activation_memory, world.device)
            sharding.shard(self.model, self.dtype, world)
        replicated = world.size > 1 and not self.sharded
        # gradients that accumulate lie in DDP's buckets from the start. Otherwise DDP would copy them there, and both would take memory
        self.in_buckets = replicated and config.grad_accum_steps(world.size) > 1
        if self.in_buckets:
            for p in self.model.parameters():
                p.grad = optimizer.without_storage(p)
        self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True) if replicated else self.model

    def make_optimizer(self):
        config = self.config
        if config.optimizer == "muon":
            rates = config.max_lr, config.muon_lr, config.muon_momentum, config.weight_decay
            return optimizer.MuonAndAdamW(self.model, *rates, self.world, self.sharded, self.dtype, config.muon_beta2)
        return optimizer.adamw(optimizer.decay_groups(self.model, config.weight_decay), config.max_lr)

    def stop_compiling(self):
        """Trains eagerly from now on. Eager code keeps all activations, or recomputes all: the latter below 1."""
        for part in {self.model, self.evaluated, *self.teachers}:
            undo_compile(part)
        self.compiled = False
        if self.config.activation_memory < 1:
            recompute_activations(self.model)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def positions(self, step: int, rank: int) -> list[range]:
        """Returns the stream positions that a rank trains on in a step, one range per micro step."""
        config = self.config
        return rank_positions(step, config.total_batch_tokens // config.model.seq_len, config.micro_batch_size, rank, self.world.size)

    def update(self, step: int, stop: bool = False, save: bool = False) -> Update:
        """Does one optimizer step, or skips it if any rank's loss or gradient is bad. stop, save: whether this rank asks for it."""
        mine = self.positions(step, self.world.rank)
        loss = torch.zeros((), device=self.device)
        with noticed_compilations() as compiled:
            for positions in mine:
                last = positions == mine[-1]
                # DDP sums gradients in the last micro step. FSDP sums them in each: whole gradients may not fit
                sums = nullcontext() if last or self.parallel is self.model else self.parallel.no_sync()
                with sums, dropout(self.model, mix(self.config.seed, positions.start)):  # a resumed run draws the same
                    part = self.loss(self.parallel, positions) / len(mine)
                    self.scaler.scale(part).backward()
                loss += part.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        norm = norm.full_tensor() if self.sharded else norm
        if step + 1 < self.config.max_steps:
            self.feed.prefetch(self.positions(step + 1, self.world.rank)[0])
        # the only sync of a step: every rank's numbers, so that all ranks decide alike
        numbers = stop, save, bool(compiled), self.budget.after_this_step()
        row = torch.stack([loss, norm, *(torch.full_like(loss, number) for number in numbers)])
        losses, norms, stops, saves, compiles, clocks = zip(*self.world.rows(row), strict=True)
        norm = next((n for n in norms if not math.isfinite(n)), norms[0])  # all equal, unless one is not finite
        mean = sum(losses) / len(losses)
        skipped = self.guard.judge(losses, mean, norm)
        if not skipped:
            self.step_optimizer(step)
        elif not math.isfinite(mean + norm):
            self.clear_gradients()
            skipped += locate_nonfinite(self, step, losses)
        self.clear_gradients()
        self.scaler.update()
        return Update(mean, list(losses), norm, skipped, any(stops), bool(saves[0]), any(compiles), clocks[0])

    def step_optimizer(self, step: int):
        for group, lr in zip(self.optimizer.param_groups, self.largest_lrs, strict=True):
            group["lr"] = lr * self.schedule(step)
            if "momentum" in group:  # Muon's
                group["momentum"] = self.config.muon_momentum or optimizer.momentum_for(self.budget.steps(step))
        self.scaler.step(self.optimizer)
        if self.average:
            self.average.update()

    def schedule(self, step: int) -> float:
        """Returns a step's learning rate, as a fraction of the largest."""
        c = self.config
        return optimizer.schedule(c.schedule, step, self.budget.steps(step), c.warmup_steps, c.min_lr_ratio, c.decay_ratio)

    def loss(self, model, positions) -> Tensor:
        """Returns the loss of one micro batch. model: self.model, or self.parallel, which wraps it."""
        x, y = self.feed.batch(positions)
        taught = distillation_loss(self.model, self.teachers, x, self.config.teacher_weight) if self.teachers else nullcontext()
        with self.autocast(), taught:
            return model(x, y)[1]

    def validation_loss(self, batch) -> Tensor:
        """Returns the cross entropy of self.evaluated on a batch, without the teachers."""
        x, y = to_device(batch, self.device)
        with self.autocast():
            return self.evaluated(x, y)[1]

    @contextmanager
    def evaluated_weights(self):
        """Inside this block, self.evaluated has the weights to validate and save, complete on every process."""
        averaged = self.average.in_place() if self.average else nullcontext()
        with averaged, sharding.whole(self.model, self.evaluated) if self.sharded else nullcontext():
            yield


@contextmanager
def dropout(model: GPT, seed: int):
    """Inside this block, forward and backward passes of a model with --dropout use it."""
    if not getattr(model.config, "dropout", 0):
        yield
        return
    torch.manual_seed(seed)
    model.train()
    try:
        yield
    finally:
        model.eval()


class Feed:
    """Brings a stream's batches to the device."""

    def __init__(self, stream: TokenStream, device: torch.device):
        self.stream, self.device = stream, device
        self.ahead = None, None  # positions and tensors of the next batch

    def batch(self, positions) -> list[Tensor]:
        """Returns inputs and targets, each (B, T), at B positions."""
        ahead, tensors = self.ahead
        return tensors if positions == ahead else to_device(self.stream.batch(positions), self.device)

    def prefetch(self, positions):
        """Reads a batch ahead, while the GPU works. If that fails, batch raises the error once the batch is needed."""
        with suppress(ValueError, OSError):
            self.ahead = positions, to_device(self.stream.batch(positions), self.device)


def to_device(arrays, device: torch.device) -> list[Tensor]:
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        tensors = [t.pin_memory() for t in tensors]
    return [t.to(device, non_blocking=True) for t in tensors]
