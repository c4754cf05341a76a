"""Trains a GPT.

    python train.py --preset quickstart                    # a laptop, 3 minutes, no data to fetch
    torchrun --standalone --nproc_per_node=8 train.py      # GPT-2 (124M) on the shards that fineweb.py made
    torchrun --standalone --nproc_per_node=8 train.py --resume    # on from the newest checkpoint, with the run's settings

Steps count updates: at step s, s updates are done. The train loss of a line is that of the batch of step s, before
its update; validation, HellaSwag, samples and checkpoints of step s come before it too, and once more at the end.
"""

import json
import math
import os
import platform
import secrets
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as computed_again

import checkpoint
import cli
import device
import fineweb
import hellaswag
import optimizer
import plan
import plot_log
import self_check
import sharding
import tokenizer as tokenizers
from compiling import compile_blocks, recompute_activations, undo_compile
from config import PRESETS, RUN, RUN_REMEDY, TrainConfig, parse_config, parse_flags, torchrun_id
from dataloader import MANIFEST, Shards, TokenStream, differences, find_shards, share, verify_shards
from distributed import PeerLost, Stopped, World, join_world, meet
from files import append, hold, read_json, write_json
from loss import positions_at_once
from model import GPT
from sample import sample_texts
from tokenizer import VOCAB_SIZES, Tokenizer
from tracker import Tracker
from variants import adapt, build_on_meta, flops_per_token, idle_params
from variants import build as build_model

# ---- the run ----


def train(config: TrainConfig, world: World):
    log = Log(config, world)
    world.on_main(lambda: checkpoint.settle(Path(config.out_dir)))
    trainer, start = build(config, world, log)
    if start > config.max_steps or (start == config.max_steps and trainer.val_loss is not None):
        log.progress(f"{config.out_dir} finished already, at step {start}: raise --max-steps to go on")
        return
    stop = StopSignal()
    check_compiled(trainer, start, log)
    torchruns = world.gather(torchrun_id())
    world.on_main(lambda: log.track(record_launch(config, world, trainer, start, torchruns), start))
    evaluation = Evaluation(trainer, log, stop)
    step, stopping = start, False
    while True:
        finished, val_loss = step == config.max_steps, None
        if not stopping and evaluation.due(step):
            try:
                with trainer.evaluated_weights():
                    val_loss = evaluation.run(step)
            except Stopped:  # the next launch evaluates this step
                stopping = True
        if finished or (step > start and (stopping or due(config.checkpoint_every, step))):
            log.refuse_divergence(f"a weight after {step} steps", trainer.largest_weight())
            trainer.save(step, val_loss)
        if finished or stopping:
            break

        began = time.perf_counter()
        update = trainer.update(step, stop=stop.received > 0 or trainer.save_failed(log))
        seconds, stop.unsaved = time.perf_counter() - began, True
        trainer.seconds += seconds  # the run's clock stands still for all but its updates
        log.train(step, trainer.metrics(step, update, seconds), seconds)
        if update.skipped:
            log.skipped(step, update.skipped, trainer.bad_steps)
        step, stopping = step + 1, update.stop
    world.on_main(trainer.saver.finish)
    world.on_main(log.finish)
    evaluation.plot()
    if stopping:
        log.progress(f"stopped after {step} steps, all saved; go on: --resume --out-dir {config.out_dir}")
        sys.exit(128 + (stop.received or signal.SIGTERM))
    log.progress(f"finished: log, plot and checkpoints are in {config.out_dir}")


def replay(config: TrainConfig, world: World):
    """Does the steps from the last checkpoint before --replay-step again, up to that one, and changes nothing on disk."""
    log = Log(config, world)
    logged = world.on_main(lambda: logged_loss(Path(config.out_dir), config.replay_step))
    trainer, start = build(config, world, log)
    check_compiled(trainer, start, log)
    log.progress(f"steps {start} to {config.replay_step}, from {f'the checkpoint of step {start}' if start else 'the beginning'}")
    for step in range(start, config.replay_step + 1):
        update = trainer.update(step)
    for rank, loss in enumerate(update.losses):
        log.result(f"step {step}, rank {rank}: loss {loss!r}, first sequence {trainer.train_stream.place(trainer.share(step, rank)[0][0])}")
    log.result(f"step {step}: loss {update.loss!r}, gradient norm {update.norm!r}{', skipped: ' if update.skipped else ''}{update.skipped}")
    if logged is None:
        log.result("the log has no such step")
    elif logged == update.loss or not (math.isfinite(logged) or math.isfinite(update.loss)):
        log.result("the same as in the log")
    else:
        log.result(f"in the log: {logged!r}; the same bits need the processes, micro batch, hardware, code and torch of then: see {RUN}")
        sys.exit(1)


def logged_loss(out_dir: Path, step: int) -> float | None:
    """What metrics.jsonl has as the loss of a step, every bit of it; nan for what was not finite, None for no such step."""
    loss = None
    path = out_dir / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        if line.startswith(f'{{"step": {step}, "loss": ') and line.endswith("}"):
            loss = json.loads(line)["loss"]
            loss = math.nan if loss is None else loss
    return loss


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


class StopSignal:
    """SIGTERM and Ctrl-C ask for an orderly end: the step is finished, an evaluation given up, and all saved. The end comes
    at once while there is nothing to save, as in the first step's compilation, and on a second signal, unless that one comes
    within a second: torchrun passes on a signal that the scheduler sent to its processes too."""

    def __init__(self):
        self.received, self.at, self.unsaved = 0, 0.0, False
        signal.signal(signal.SIGTERM, self.handle)
        signal.signal(signal.SIGINT, self.handle)

    def handle(self, number, frame):
        if not self.received:
            self.received, self.at = number, time.monotonic()
            if not self.unsaved:
                os.write(2, b"stopped by a signal before the first step: nothing to save\n")  # print is not for signal handlers
                sys.exit(128 + number)
        elif time.monotonic() - self.at > 1:
            raise KeyboardInterrupt


def build(config: TrainConfig, world: World, log: "Log") -> tuple["Trainer", int]:
    """All that the loop needs, and the step to begin at. Every fault of a run that can be seen beforehand is seen here."""
    out_dir = Path(config.out_dir)
    shards = world.on_main(lambda: check_data(config, find_data(config)))
    world.on_all(lambda: check_host(config, world, shards))
    world.on_main(lambda: check_dtype(config, world))
    world.on_main(lambda: check_hellaswag(config))
    world.on_all(lambda: fit_vocabulary(config, shards))
    world.on_main(lambda: refuse_too_large(config, world))
    if config.teacher:
        world.on_all(lambda: check_teacher(config))
    resumed = world.on_main(lambda: checkpoint.newest_step(out_dir, config.replay_step)) if config.resume else None

    torch.manual_seed(config.seed)
    warnings = config.warnings()
    if config.init_from and resumed is None:
        model, _ = checkpoint.load_gpt(config.init_from, config.init_revision)
        warnings += config.given_way(model.config)
        adapt(model, config.model)
    else:
        model = build_model(config.model)
    compiled = config.compile and device.can_compile(world.device)
    if config.compile and not compiled:
        without = "without torch.compile" + (" and with all activations kept" if 0 < config.activation_memory < 1 else "")
        log.progress(f"warning: running {without}: it can't be used here on {world.device.type} (CPU: install g++)")
    trainer = Trainer(config, world, model, shards, compiled, load_teacher(config) if config.teacher else None)
    if resumed is not None:
        trainer.load(resumed)
    for line in warnings:
        log.progress(f"warning: {line}")
    active = f" ({model.num_params() - idle_params(model):,} of them active)" if config.model.n_expert > 1 else ""
    log.progress(
        f"{model.num_params():,} parameters{active}, {str(trainer.dtype)[6:]} on {world.size} × {world.device.type}; a step is "
        f"{config.total_batch_tokens:,} tokens, {config.grad_accum_steps(world.size)} passes of {config.micro_batch_size} × "
        f"{config.model.seq_len} a process; an epoch is {trainer.train_stream.sequences_per_epoch * config.model.seq_len:,} tokens"
    )
    return trainer, resumed or 0


def check_compiled(trainer: "Trainer", step: int, log: "Log"):
    """Compares compiled and eager code on each rank's first micro batch. If any rank finds a mismatch, all ranks train eagerly."""
    config = trainer.config
    if not (trainer.compiled and config.self_check and step < config.max_steps):
        return
    began = time.perf_counter()
    positions = trainer.share(step, trainer.world.rank)[0]
    found = self_check.mismatches(
        trainer.model,
        lambda: trainer.loss(trainer.model, positions),
        None if trainer.sharded else lambda: trainer.validation_loss(trainer.train_stream.batch(positions)),
        trainer.dtype,
        trainer.teacher,
    )
    wrong = max(trainer.world.gather(found), key=len)  # of the rank with the most
    if wrong:
        first, error = next(iter(wrong.items()))
        how = f"differs from eager by {error:.0%}" if math.isfinite(error) else "is not finite"
        more = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        log.progress(f"warning: self-check failed: compiled {first} {how}{more}; training without torch.compile, which is slower")
        trainer.stop_compiling()
    trainer.seconds += time.perf_counter() - began  # compiling counts, as it does in the first step


def find_data(config: TrainConfig) -> Shards:
    """The shards of --data-dir; the quickstart makes its own at the first start."""
    own = config.preset == "quickstart" and config.data_dir == PRESETS["quickstart"].data_dir
    if own and not Path(config.data_dir, MANIFEST).exists():
        fineweb.prepare(fineweb.PrepareConfig(dataset=("stdlib",), tokenizer="bytes", out_dir=config.data_dir, workers=1))
    return find_shards(config.data_dir)


def fit_vocabulary(config: TrainConfig, shards: Shards):
    """A new model takes the shards' vocabulary; one that has weights, or a vocabulary by flag, must have it already."""
    ours, theirs = config.model.vocab_size, shards.vocab_size
    given = config.resume or config.init_from or ours != PRESETS[config.preset].model.vocab_size
    if given and ours != theirs:
        remedy = "leave --vocab-size out, or make shards with the tokenizer that the model has"
        raise ValueError(f"the model's vocabulary is {ours}, that of the shards in {config.data_dir} {theirs}: {remedy}")
    if config.model.doc_mask and shards.tokenizer not in VOCAB_SIZES:
        raise ValueError(f"--doc-mask: where a document ends in shards of the tokenizer {shards.tokenizer!r} nobody knows: leave it out")
    config.model = replace(config.model, vocab_size=theirs)


def load_teacher(config: TrainConfig) -> GPT:
    return checkpoint.load_gpt(config.teacher)[0].requires_grad_(False)


def check_teacher(config: TrainConfig):
    """ValueError when it is not there, or does not read what the student reads."""
    ours, theirs = config.model, checkpoint.load_config(config.teacher)
    if theirs.vocab_size != ours.vocab_size or theirs.seq_len < ours.seq_len:
        raise ValueError(
            f"--teacher {config.teacher} has a vocabulary of {theirs.vocab_size} and {theirs.seq_len} positions, the run {ours.vocab_size} "
            f"and {ours.seq_len}: choose one with the same vocabulary and as many positions"
        )


def refuse_too_large(config: TrainConfig, world: World):
    """ValueError when weights, gradients and optimizer of a process can't fit."""
    model, shard = build_on_meta(config.model), config.shard and world.size > 1
    parts = plan.memory(config, plan.Setting(world.device.type, 4, False, world.size, shard), model).parts
    need = sum(parts[name] for name in ("weights", "gradients", "optimizer", "average of the weights"))
    if shard:  # each has all weights before they are divided, and at every evaluation, when there are no gradients
        need += 4 * sum(p.numel() for p in model.parameters()) - parts["gradients"]
    if need > (have := device.total_memory(world.device)):
        raise ValueError(
            f"weights, gradients and optimizer of this model need {need / 1e9:.1f} GB, {world.device.type} has {have / 1e9:.1f} GB: choose "
            f"a smaller --n-layer{', --n-expert' if config.model.n_expert > 1 else ''} or --n-embd, or --shard it over more processes"
        )


SPIKE_WINDOW = 128  # losses that --skip-spikes judges one by, and half of them before it judges (as OLMo-core does)


class Update(NamedTuple):
    """How an update went, on every process the same."""

    loss: float  # of the whole batch
    losses: list[float]  # of each rank's part of it
    norm: float  # of the gradient, before it is clipped
    skipped: str  # why no weight was changed, or ''
    stop: bool  # whether any rank asks for the end


class Trainer:
    """The model, what feeds it and what updates it."""

    def __init__(self, config: TrainConfig, world: World, model: GPT, shards: Shards, compiled: bool, teacher: GPT | None = None):
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA
        self.config, self.world, self.device = config, world, world.device
        self.shards, self.tokenizer_name = shards, shards.tokenizer
        self.train_stream = TokenStream(shards, "train", config.model.seq_len, config.shuffle, config.seed)
        self.val_stream = TokenStream(shards, "val", config.model.seq_len, shuffle=False)
        self.dtype = device.pick_dtype(config.dtype, world.device)
        self.peak_flops = device.peak_flops(world.device, self.dtype)
        self.model = model.to(world.device)
        self.teacher = teacher and teacher.to(world.device)
        self.compiled = compiled
        if compiled:
            device.mend_compile_cache()
            device.set_malloc(world.device, sparing=config.activation_memory < 1)
            for part in filter(None, (self.model, self.teacher)):
                compile_blocks(part, config.activation_memory)
        elif config.activation_memory == 0:
            recompute_activations(self.model)
        self.sharded, self.evaluated = config.shard and world.size > 1, self.model
        if self.sharded:
            self.evaluated = build_on_meta(config.model)
            sharding.shard(self.model, self.dtype, world)
        replicated = world.size > 1 and not self.sharded
        self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True) if replicated else self.model
        if config.optimizer == "muon":
            rates = config.max_lr, config.muon_lr, config.muon_momentum, config.weight_decay
            self.optimizer = optimizer.MuonAndAdamW(self.model, *rates, world, self.sharded, self.dtype)
        else:
            self.optimizer = optimizer.adamw(optimizer.decay_groups(self.model, config.weight_decay), config.max_lr)
        self.largest_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.average = optimizer.AverageWeights(self.model, config.ema) if config.ema else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        self.seconds = 0.0  # spent in updates and compiling, over all launches of the run
        self.val_loss = None  # of the checkpoint that the run goes on from, if it was validated
        self.bad_steps = 0  # updates skipped in a row
        self.recent_losses = deque(maxlen=SPIKE_WINDOW)
        # a copy would cost a CPU's training the memory that it needs
        self.saver = checkpoint.Saver(Path(config.out_dir), config.keep, background=self.device.type != "cpu")

    def stop_compiling(self):
        """Trains eagerly from now on. Eager code keeps all activations, or recomputes all: that is what it does below 1."""
        for part in filter(None, (self.model, self.teacher)):
            undo_compile(part)
        self.compiled = False
        if self.config.activation_memory < 1:
            recompute_activations(self.model)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def share(self, step: int, rank: int) -> list[range]:
        """Positions of the stream that a rank takes in a step, a range for each micro step."""
        config = self.config
        return share(step, config.total_batch_tokens // config.model.seq_len, config.micro_batch_size, rank, self.world.size)

    def update(self, step: int, stop: bool = False) -> Update:
        """One optimizer step, or none where the loss or the gradient of any rank forbids it. stop: this rank asks for the end."""
        mine = self.share(step, self.world.rank)
        loss = torch.zeros((), device=self.device)
        for positions in mine:
            last = positions == mine[-1]
            # the last one sums the gradients over the ranks; slices of them are summed each time, since whole ones may not fit
            with nullcontext() if last or self.parallel is self.model else self.parallel.no_sync():
                part = self.loss(self.parallel, positions) / len(mine)
                self.scaler.scale(part).backward()
            loss += part.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        norm = norm.full_tensor() if self.sharded else norm
        # the one sync of a step: a row of each rank's numbers, on which all ranks decide alike
        losses, norms, stops = zip(*self.world.rows(torch.stack([loss, norm, loss.new_tensor(float(stop))])), strict=True)
        norm = next((n for n in norms if not math.isfinite(n)), norms[0])  # as a rule they are the same
        mean = sum(losses) / len(losses)
        if skipped := self.forbids(losses, mean, norm):
            self.optimizer.zero_grad(set_to_none=True)
            skipped += self.where(step, losses) if not math.isfinite(mean + norm) else ""
        else:
            for group, lr in zip(self.optimizer.param_groups, self.largest_lrs, strict=True):
                group["lr"] = lr * self.schedule(step)
            self.scaler.step(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)
            if self.average:
                self.average.update()
        self.scaler.update()
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        if not skipped:
            self.recent_losses.append(mean)
        return Update(mean, list(losses), norm, skipped, any(stops))

    def schedule(self, step: int) -> float:
        """The learning rate of a step as a share of the largest."""
        c = self.config
        return optimizer.schedule(c.schedule, step, c.max_steps, c.warmup_steps, c.min_lr_ratio, c.decay_ratio)

    def loss(self, model, positions) -> Tensor:
        x, y = self.to_device(self.train_stream.batch(positions))
        with self.autocast():
            if self.teacher is None:
                return model(x, y)[1]
            with torch.no_grad():
                taught = self.teacher.hidden_states(x).flatten(0, 1)
            text_loss, self.model.loss = self.model.loss, lambda mine, weight, targets, vocab_size: self.distilled(mine, taught, targets)
            try:
                return model(x, y)[1]
            finally:
                self.model.loss = text_loss

    def distilled(self, mine: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
        """The cross entropy of the text, with a gradient that is in part that of the divergence from the teacher. mine (N, C),
        taught (N, C'): the hidden states of student and teacher, whose logits, as far as they are many, never stand in memory together."""

        def of_part(mine, taught, targets):
            logits, expected = self.model.logits(mine).float(), self.teacher.logits(taught).float()
            return torch.stack([F.cross_entropy(logits, targets, reduction="sum"), divergence(logits, expected)])

        at_once = positions_at_once(mine, self.config.model.padded_vocab_size)
        parts = zip(*(x.split(at_once) for x in (mine, taught, targets)), strict=True)
        if at_once < len(mine):  # then the backward pass makes them once more, a part at a time
            of_part = partial(computed_again, of_part, use_reentrant=False)
        text, from_teacher = sum(of_part(*part) for part in parts) / len(mine)
        return text + self.config.teacher_weight * changes_gradient_only(from_teacher - text)

    def forbids(self, losses, mean: float, norm: float) -> str:
        """Why this update must not reach the weights, or ''."""
        wrong = [f"rank {rank}'s loss is {loss}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        # in fp16 a gradient out of range is for the scaler to skip, as long as it can go lower
        if not wrong and not math.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            wrong = [f"the gradient's norm is {norm}"]
        if not wrong and self.config.skip_spikes and len(self.recent_losses) >= SPIKE_WINDOW // 2:
            z = (mean - statistics.fmean(self.recent_losses)) / max(statistics.stdev(self.recent_losses), 1e-12)
            if z > self.config.skip_spikes:
                wrong = [f"the loss {mean:.4f} is {z:.1f} standard deviations above that of the last {len(self.recent_losses)} steps"]
        return ", ".join(wrong)

    def where(self, step: int, losses) -> str:
        """The sequences that make a step's loss or gradient not finite: each rank does its share again and names its own."""
        alone = not self.sharded  # a rank that has all weights can do its share without the others
        by_rank = self.world.gather(self.not_finite(step) if alone else [])
        again = any(by_rank)
        if not again:  # then all that the ranks with such a loss took, or all ranks where only the gradient was such
            wrong = [not math.isfinite(loss) for loss in losses]
            by_rank = [[p for part in self.share(step, r) for p in part] if wrong[r] or not any(wrong) else [] for r in range(len(losses))]
        text = ""
        for rank, positions in enumerate(by_rank):
            if positions:
                more = f" and {len(positions) - 4} more" if positions[4:] else ""
                text += f"; sequences of rank {rank}: {', '.join(map(self.train_stream.place, positions[:4]))}{more}"
        return text if again or not alone else f"{text}; done again all is finite, so that the hardware may be at fault"

    def not_finite(self, step: int) -> list[int]:
        """The positions of this rank's share of a step that give a loss, or else the first micro batch that gives a gradient,
        which is not finite."""
        for positions in self.share(step, self.world.rank):
            loss = self.loss(self.model, positions)
            if not math.isfinite(loss.item()):
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    return [p for p in positions if not math.isfinite(self.loss(self.model, [p]).item())] or list(positions)
            loss.backward()
            finite = all(p.grad.isfinite().all() for p in self.model.parameters())
            self.optimizer.zero_grad(set_to_none=True)
            if not finite:
                return list(positions)
        return []

    @torch.no_grad()
    def validate(self, stopped: Callable[[], bool] = lambda: False) -> float:
        """Mean loss over val_tokens spread evenly over the val split, whatever the number of processes and the micro batch.
        stopped: asked before each batch whether to give up; when any process does, all raise Stopped."""
        world, B, T = self.world, self.config.micro_batch_size, self.config.model.seq_len
        there = self.val_stream.sequences_per_epoch
        count = max(1, min(there, self.config.val_tokens // T))
        mine = [i * there // count for i in range(world.rank, count, world.size)]
        total = 0.0
        for start in range(0, len(mine), B):
            if stopped():
                break
            positions = mine[start : start + B]
            x, y = self.val_stream.batch(positions + [0] * (B - len(positions)))  # always (B, T): nothing is compiled anew
            y[len(positions) :] = -100
            total += self.validation_loss((x, y)).item() * len(positions)
        return sum(world.gather_unless(stopped(), total)) / count

    def validation_loss(self, batch) -> Tensor:
        """Validation's loss: cross entropy of the text, without the teacher, using self.evaluated."""
        x, y = self.to_device(batch)
        with self.autocast():
            return self.evaluated(x, y)[1]

    def to_device(self, arrays) -> list[Tensor]:
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.device.type == "cuda":
            tensors = [t.pin_memory() for t in tensors]
        return [t.to(self.device, non_blocking=True) for t in tensors]

    def axes(self, step: int) -> dict:
        """What a value of this step can be drawn over."""
        tokens = step * self.config.total_batch_tokens
        epoch = tokens / (self.train_stream.sequences_per_epoch * self.config.model.seq_len)
        return {"tokens": tokens, "seconds": self.seconds, "epoch": epoch, "flops": tokens * flops_per_token(self.model)}

    def metrics(self, step: int, update: Update, seconds: float) -> dict:
        """A step's line of metrics.jsonl. mfu: the share of the cards' peak, None where that is not known."""
        rate = self.config.total_batch_tokens / seconds
        peak = self.peak_flops and self.peak_flops * self.world.size
        return {
            "loss": update.loss,
            "lr": self.config.max_lr * self.schedule(step),
            "grad_norm": update.norm,
            "tokens_per_second": rate,
            "mfu": rate * flops_per_token(self.model) / peak if peak else None,
            "memory_bytes": device.peak_memory(self.device),
            **({"skipped": update.skipped} if update.skipped else {}),
            **self.axes(step),
        }

    def largest_weight(self) -> float:
        """The largest absolute value of any weight on any process; nan or inf when one is."""
        mine = [p.to_local() if self.sharded else p for p in self.model.parameters()]
        largest = torch.stack([p.detach().abs().max() for p in mine if p.numel()]).max()
        return torch.tensor(self.world.rows(largest[None])).max().item()

    def save(self, step: int, val_loss: float | None):
        """A checkpoint. An exact resume needs no more than this: the data's order is a function of the step."""
        optimizer_state = self.optimizer.state_dict()  # of which each process may have a part
        state = {
            "optimizer": sharding.gathered(optimizer_state, self.world.is_main) if self.sharded else optimizer_state,
            "scaler": self.scaler.state_dict(),
            "seconds": self.seconds,
            "bad_steps": self.bad_steps,
            "recent_losses": list(self.recent_losses),
        }
        weights = self.weights()
        if self.average:
            state |= {"weights": weights, "averaged": self.average.updates}
            with self.average.in_place():
                weights = {name: p.clone() for name, p in self.weights().items() if p is not None}
        if self.world.is_main:
            content = checkpoint.content_of(step, self.model, self.tokenizer_name, val_loss, weights)
            self.saver.save(step, content, state)

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, of whole tensors on rank 0; to be called by all."""
        return sharding.weights(self.model, self.world.is_main) if self.sharded else self.model.state_dict()

    @contextmanager
    def evaluated_weights(self):
        """For as long as the block lasts, self.evaluated has the weights that are validated and saved, all of them on every process."""
        averaged = self.average.in_place() if self.average else nullcontext()
        with averaged, sharding.whole(self.model, self.evaluated) if self.sharded else nullcontext():
            yield

    def save_failed(self, log: "Log") -> bool:
        """Warns when the last save failed; whether the run is to end for that."""
        if error := self.saver.failure():
            then = "the run ends" if self.config.on_save_error == "stop" else "training goes on, the next one is tried when it is due"
            log.progress(f"warning: {error}; {then}")
        return error is not None and self.config.on_save_error == "stop"

    def load(self, step: int):
        """Where a host lacks the checkpoint, rank 0 sends it to all."""
        out_dir = Path(self.config.out_dir)
        several_hosts = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
        damaged = several_hosts and checkpoint.fault(out_dir, step)  # as a copy on another host may be
        everywhere = len(set(self.world.gather("" if damaged else checkpoint.seal_of(out_dir, step)))) == 1
        read = partial(checkpoint.load_training, out_dir, step)
        content, state = read() if everywhere else self.world.copy(read)
        self.load_weights(content["model"])
        if self.average:
            self.average.restart(state["averaged"])
            self.load_weights(state["weights"])
        self.optimizer.load_state_dict(sharding.sliced_state(self.optimizer, state["optimizer"]) if self.sharded else state["optimizer"])
        if state["scaler"]:  # empty when the run was not in fp16 until now
            self.scaler.load_state_dict(state["scaler"])
        self.seconds, self.val_loss, self.bad_steps = state["seconds"], content["val_loss"], state["bad_steps"]
        self.recent_losses.extend(state["recent_losses"])

    def load_weights(self, whole: dict[str, Tensor]):
        checkpoint.load_weights(self.model, sharding.sliced(self.model, whole) if self.sharded else whole, self.config.out_dir)


def divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """Kullback-Leibler divergence, in nats over all N tokens, of what a student's logits (N, V) say from what its teacher's do (Hinton
    et al., 2015, at temperature 1)."""
    return F.kl_div(F.log_softmax(logits, dim=-1), F.log_softmax(expected, dim=-1), reduction="sum", log_target=True)


def changes_gradient_only(x: Tensor) -> Tensor:
    """0, with the gradient of x."""
    return x - x.detach()


class Evaluation:
    """What a run measures and shows beside training. Validation always; what HellaSwag and samples need may be missing."""

    def __init__(self, trainer: Trainer, log: "Log", stop: StopSignal):
        self.trainer, self.log, self.stopped = trainer, log, lambda: stop.received > 0
        self.config, self.world = trainer.config, trainer.world
        self.tokenizer = self.or_warn("samples and HellaSwag in this run", self.get_tokenizer)
        wanted = self.tokenizer and self.config.hellaswag_every
        self.tasks = self.or_warn("HellaSwag in this run", self.get_tasks) if wanted else None

    def get_tokenizer(self) -> Tokenizer:
        name = self.trainer.tokenizer_name
        self.world.on_main(lambda: tokenizers.get_tokenizer(name) and None)  # fetched once, then there for all
        self.world.on_all(lambda: tokenizers.get_tokenizer(name) and None)
        return tokenizers.get_tokenizer(name)

    def get_tasks(self) -> list[dict]:
        return self.world.on_main(lambda: hellaswag.load_tasks(self.config.hellaswag_file))

    def or_warn(self, what: str, get):
        """What get returns, or None and a warning: a run does not end for want of it."""
        try:
            return get()
        except (ValueError, OSError) as e:
            self.log.progress(f"warning: no {what}: {e}")
            return None

    def due(self, step: int) -> bool:
        """Whether run would do anything at this step."""
        every = self.config.val_every, self.config.hellaswag_every, self.config.sample_every
        return step == self.config.max_steps or any(due(each, step) for each in every)

    def run(self, step: int) -> float | None:
        """Whatever is due at this step, at the end of the run all that is not switched off. Returns the validation loss,
        which the end always has, or None when it was not due. Stopped, on all processes, when a signal comes."""
        config, end, val_loss = self.config, step == self.config.max_steps, None
        if end or due(config.val_every, step):
            val_loss = self.trainer.validate(self.stopped)
            self.log.refuse_divergence(f"the validation loss of step {step}", val_loss)
            self.log.value(step, "val", val_loss, {"val_loss": val_loss, **self.trainer.axes(step)})
            self.log.result(f"step {step}: val loss {val_loss:.4f}")
        with torch.compiler.set_stance("force_eager"):  # their shapes change all the time
            if self.tasks and (end or due(config.hellaswag_every, step)):
                self.or_warn(f"HellaSwag at step {step}", lambda: self.hellaswag(step))
            if self.tokenizer and config.sample_every and (end or due(config.sample_every, step)):
                self.or_warn(f"samples at step {step}", lambda: self.sample(step))
        return val_loss

    def hellaswag(self, step: int):
        trainer = self.trainer
        scores, _ = hellaswag.evaluate(
            trainer.evaluated, self.tokenizer, self.tasks, self.world, autocast=trainer.autocast(), stopped=self.stopped
        )
        named = {f"hellaswag_{name}": score for name, score in scores.items()}
        self.log.value(step, "hella", scores["acc_norm"], {**named, **trainer.axes(step)})
        self.log.result(f"step {step}: HellaSwag acc_norm {scores['acc_norm']:.4f}, harness style {scores['harness_acc_norm']:.4f}")

    def sample(self, step: int):
        if not self.world.is_main or self.stopped():
            return
        prompt, length, seed = self.config.sample_prompt, self.config.sample_tokens, self.config.seed + step
        with self.trainer.autocast():
            texts = sample_texts(self.trainer.evaluated, self.tokenizer, prompt, 4, length, seed)
        for text in texts:
            self.log.result(f"step {step}: sample: {cli.printable(text)}")

    def plot(self):
        if self.world.is_main:
            log = Path(self.config.out_dir, "log.txt")
            plot_log.plot(plot_log.PlotConfig((str(log),), str(log.with_name("log_plot.png"))))


# ---- what a run leaves behind and shows ----


class Log:
    """log.txt ('step stream value', as build-nanogpt writes it), metrics.jsonl beside it, results on stdout and
    progress on stderr. The files are only ever appended to. Rank 0 alone writes."""

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world = config, world
        self.tracker = None
        self.recent = deque(maxlen=20)  # seconds of the last steps
        self.shown = -math.inf  # when the last progress line was
        self.bar = None  # on a terminal the progress line stays in its place
        self.unwritten = {"log.txt": "", "metrics.jsonl": ""}  # what a full disk did not take yet

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
        """Raises OSError when lines are left that can't be written."""
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
        except OSError:  # the reader has gone, or the disk is full: the run goes on, and its log has the results
            cli.drop(stream)

    def refuse_divergence(self, what: str, number: float):
        """Ends the run, on all ranks alike and with nothing saved, when a loss or a weight is not finite."""
        if not math.isfinite(number):
            self.progress(f"error: {what} is {number}: begin again with a lower --max-lr, in another --out-dir")
            sys.exit(1)

    def skipped(self, step: int, why: str, in_a_row: int):
        """Says that an update was skipped, and ends the run, on all ranks alike and with nothing saved, after too many."""
        limit, out_dir = self.config.max_bad_steps, self.config.out_dir
        self.progress(f"warning: step {step} changes no weight ({in_a_row} in a row, {limit} end the run): {why}")
        if in_a_row >= limit:
            self.progress(
                f"error: {in_a_row} updates in a row were skipped: begin again with a lower --max-lr in another --out-dir, or see what "
                f"--replay-step {step} --out-dir {out_dir} shows; --resume with a higher --max-bad-steps goes on from the last checkpoint"
            )
            sys.exit(1)

    def train(self, step: int, metrics: dict, seconds: float):
        """A step's line in both files, and on the screen at most once a second."""
        self.value(step, "train", metrics["loss"], metrics)
        self.recent.append(seconds)
        max_steps = self.config.max_steps
        if time.perf_counter() - self.shown > 1 or step + 1 == max_steps:
            self.shown = time.perf_counter()
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


def check_hellaswag(config: TrainConfig):
    """ValueError when tasks that were asked for by name are not there; the default's are fetched, and may be missing."""
    named = config.hellaswag_every and config.hellaswag_file != TrainConfig.hellaswag_file
    if named and not Path(config.hellaswag_file).is_file():
        raise ValueError(
            f"--hellaswag-file {config.hellaswag_file} is no file: give HellaSwag's {TrainConfig.hellaswag_file}, or leave it out"
        )


def check_data(config: TrainConfig, shards: Shards) -> Shards:
    """The same shards. ValueError when one is damaged, or when they are not those that the run in --out-dir began with."""
    if config.verify_shards:
        verify_shards(shards)
    if config.resume:
        before = read_json(Path(config.out_dir, RUN), RUN_REMEDY)["data"]
        if changed := differences(before, shards.contents()):
            more = f" and {len(changed) - 3} more" if changed[3:] else ""
            raise ValueError(
                f"--data-dir {config.data_dir} is not what the run in {config.out_dir} began with: {', '.join(changed[:3])}{more}; "
                "bring the shards back as they were, or begin a new run in another --out-dir"
            )
    return shards


def check_dtype(config: TrainConfig, world: World):
    """ValueError for a dtype, maybe what 'auto' came to, that the run can't have."""
    if config.shard and world.size > 1:
        sharding.refuse_fp16(device.pick_dtype(config.dtype, world.device))


def check_host(config: TrainConfig, world: World, shards: Shards):
    """ValueError, from one process on each host but rank 0's, when it lacks the shards that rank 0 has, or has others."""
    if world.is_main or os.environ.get("LOCAL_RANK") != "0":
        return
    try:
        shards.contents()
        if config.verify_shards:
            verify_shards(shards)
    except (ValueError, OSError) as e:
        raise ValueError(f"{platform.node()} needs the same shards in its --data-dir as the others: {e}") from e


def record_launch(config: TrainConfig, world: World, trainer: Trainer, step: int, torchruns: list[str]) -> str:
    """run.json: settings, data, and what each launch of the run ran on. Returns the run's id."""
    path = Path(config.out_dir, RUN)
    size = plot_log.size_of(trainer.model.num_params()) if trainer.tokenizer_name == "gpt2" else "none"
    before = {"id": secrets.token_hex(4), "size": size, "data": trainer.shards.contents(), "launches": []}
    if path.exists():
        before |= read_json(path, RUN_REMEDY)
    settings = asdict(config) | {"resume": False, "replay_step": None}
    launch = {
        "step": step,
        "config": settings,
        "command": sys.argv,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.describe(world.device),
        "compiled": trainer.compiled,
        "world_size": world.size,
        "torchrun": torchruns,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, before | {"config": settings, "launches": [*before["launches"], launch]})
    return before["id"]


def git_commit() -> str:
    """The commit that train.py is at, '+' where files differ from it, '' without git."""

    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def settle() -> TrainConfig:
    config = parse_config()
    config.validate(int(os.environ.get("WORLD_SIZE", 1)))
    return config


def main():
    with cli.one_line_errors():
        flags = parse_flags()  # one that does not exist ends every process here
        if flags.plan:
            print(plan.report(parse_config()))
            return
        cli.refuse(cli.at_least(0.01, flags, "timeout_minutes") + cli.at_most(10**6, flags, "timeout_minutes"))
        try:
            config, store = meet(settle, flags.timeout_minutes)
            with join_world(config.device, config.timeout_minutes, store) as world, ExitStack() as stack:
                if config.replay_step is not None:
                    replay(config, world)
                    return
                world.on_main(lambda: stack.enter_context(hold(Path(config.out_dir))))
                train(config, world)
        except PeerLost as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(1)
        except checkpoint.SaveError as e:
            if not getattr(e, "is_shared", False):
                print(f"error: {e}: free some space and go on with --resume --out-dir {config.out_dir}", file=sys.stderr)
            sys.exit(1)
        except torch.OutOfMemoryError as e:
            print(f"error: out of memory ({e}): lower --micro-batch-size", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
