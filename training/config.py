"""The settings of a training run: every flag of train.py, its checks, and what a resumed run may change."""

import math
from dataclasses import dataclass, field
from typing import Literal

import tyro

from common import cli
from common.device import CARDS
from common.validation import raise_errors
from variants import VariantConfig


@dataclass
class TrainConfig:
    """Train a GPT. The defaults are GPT-2 (124M) on 10 B tokens of FineWeb-Edu."""

    preset: Literal[
        "quickstart", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt3-125m", "gpt3-350m", "gpt3-760m", "gpt3-1b", "modern"
    ] = "gpt2"
    """Defaults for all other flags; a flag beside it wins."""
    data_dir: str = "edu_fineweb10B"
    """Folder of shards from fineweb.py, or build-nanogpt's, or llm.c's .bin."""
    out_dir: str = "log"
    """The run's folder: log, metrics, checkpoints, plot."""
    resume: bool = False
    """Go on from the newest whole checkpoint of --out-dir, with that run's settings. torchrun's own restarts do so unasked."""
    replay_step: int | None = None
    """Do this step of the run in --out-dir again, from the checkpoint before it, compare its loss with the log, and end."""
    init_from: str = ""
    """Start from these weights (gpt2, gpt2-medium, …, a Hugging Face folder, a checkpoint) instead of random ones."""
    init_revision: str = ""
    """Branch, tag or commit on the hub of --init-from gpt2, …; the commit it resolves to is recorded and kept."""
    model: tyro.conf.OmitArgPrefixes[VariantConfig] = field(default_factory=VariantConfig)

    max_steps: int = 19073
    """Updates in the whole run, 19,073 × 524,288 tokens being 10 B. The schedule ends here, also when a resumed run moves it."""
    total_batch_tokens: int = 524288
    """Tokens of an update, over all processes; gradients are accumulated to reach it."""
    micro_batch_size: int = 64
    """Sequences a process puts through the model at a time: lower it when memory runs out; but for experts only rounding changes."""
    max_lr: float = 6e-4
    """AdamW's learning rate at the end of the warmup."""
    min_lr_ratio: float = 0.1
    """The schedule ends at this fraction of it."""
    warmup_steps: int = 715
    """Steps of linear warmup; 715 × 524,288 tokens are GPT-3's 375 M (Brown et al., 2020, appendix B)."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """What follows the warmup: a cosine, or the whole rate until a fall in a line at the end (Hu et al., 2024)."""
    decay_ratio: float = 0.2
    """Share of --max-steps in which wsd falls."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the blocks' matrices but routers (Jordan et al., 2024), AdamW for all else."""
    muon_lr: float = 0.02
    """Muon's learning rate at the end of the warmup, the same for all widths."""
    muon_momentum: float = 0.95
    """Muon's momentum; short runs learn faster with less."""
    weight_decay: float = 0.1
    """Decoupled (Loshchilov & Hutter, 2019), on tensors of 2 or more dimensions only."""
    grad_clip: float = 1.0
    """Largest norm of an update's gradient; 0 does not clip."""
    max_bad_steps: int = 10
    """End the run when so many updates in a row were skipped; one whose loss or gradient is not finite always is."""
    skip_spikes: float = 0.0
    """Skip an update whose loss is so many standard deviations above the mean of the last 128; 0 skips none. OLMo takes 6."""
    shuffle: bool = True
    """Take the sequences of an epoch in a seeded random order; --no-shuffle takes them as they lie in the shards."""
    ema: float = 0.0
    """Validate, score, sample and save the weights' moving average with this decay, as 0.999; 0: the weights themselves."""
    teacher: str = ""
    """Learn from this model's predictions too (a checkpoint, a run's folder, a Hugging Face folder, gpt2, …)."""
    teacher_weight: float = 0.5
    """Their share in the gradient; the loss that is shown is always that of the text alone."""
    seed: int = 1337
    """Seed of the initial weights, the order of the data and the samples."""

    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the matrix products; auto is bf16 where the hardware has it, else fp16 on CUDA and fp32 elsewhere."""
    compile: bool = True
    """torch.compile the training step and validation."""
    self_check: bool = True
    """Before a compiled run's first step, compare its loss and gradients with eager code's; train without compiling if they differ."""
    activation_memory: float = 1.0
    """Share of what the backward pass needs that is kept for it; the rest is computed again. Without --compile 0 or 1."""
    shard: bool = False
    """Divide weights, gradients and optimizer over the processes (FSDP2), for models that are too large for one."""
    verify_shards: bool = True
    """Compare the shards' sha256 with the manifest's, and their ids with the vocabulary, before the start."""

    val_every: int = 250
    """Steps between validations; here and below, 0 is never. The end of a run always validates and saves."""
    val_tokens: int = 10_485_760
    """Tokens of a validation, spread evenly over the val split and the same ones each time."""
    hellaswag_every: int = 250
    """Steps between HellaSwag evaluations."""
    hellaswag_file: str = "hellaswag_val.jsonl"
    """HellaSwag's tasks; the default is downloaded when it is not there."""
    sample_every: int = 250
    """Steps between samples."""
    sample_prompt: str = "Hello, I'm a language model,"
    """Text that the samples continue."""
    sample_tokens: int = 64
    """Tokens to add to it."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Newest whole checkpoints to keep; 0 keeps all."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """When a checkpoint can't be saved, as on a full disk: train on and try the next one, or end the run."""
    tracker: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    """Show the metrics there too; it has to be installed. What goes wrong with it never ends the run."""
    plan: bool = False
    """Print what the run would take, memory by part, hours and cost, and end; nothing is allocated and no shards are needed."""
    gpu: Literal[tuple(CARDS)] = "H100"
    """For --plan: the kind of GPU, with the most memory that it is sold with; with --device cpu it is this machine's CPU."""
    gpus: int = 1
    """For --plan: how many of them."""
    price: float = 0.0
    """For --plan: of a GPU and hour, in $."""
    rate: float = 0.0
    """For --plan: tokens a second of all GPUs; 0: that of the run in --out-dir on this GPU, or else 40 % of the peak."""
    timeout_minutes: float = 10.0
    """How long the processes wait for one that hangs before all of them end; longer than one verifies the shards alone."""

    def grad_accum_steps(self, world_size: int) -> int:
        """Forward and backward passes of a process in one update."""
        return self.total_batch_tokens // (self.micro_batch_size * self.model.seq_len * world_size)

    def validate(self, world_size: int):
        """ValueError with all errors at once."""
        errors = self.model.errors()
        errors += cli.at_least(
            1, self, "max_steps", "total_batch_tokens", "micro_batch_size", "val_tokens", "sample_tokens", "max_bad_steps"
        )
        errors += cli.at_least(
            0, self, "max_lr", "muon_lr", "min_lr_ratio", "warmup_steps", "weight_decay", "grad_clip", "skip_spikes", "seed"
        )
        errors += cli.at_least(0, self, "val_every", "hellaswag_every", "sample_every", "checkpoint_every", "keep")
        errors += cli.at_least(0, self, "price", "rate") + cli.at_least(1, self, "gpus")
        errors += cli.at_least(0.01, self, "timeout_minutes")
        if self.replay_step is not None and not 0 <= self.replay_step < self.max_steps:
            errors.append(f"--replay-step is {self.replay_step}: the run's steps are 0 to {self.max_steps - 1}")
        if not 0 <= self.activation_memory <= 1:
            errors.append(f"--activation-memory is {self.activation_memory}: it must be from 0 to 1")
        elif 0 < self.activation_memory < 1 and not self.compile:
            errors.append("--activation-memory between 0 and 1 needs a compiled run: give --compile, or 0 or 1")
        for name in ("ema", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                errors.append(f"{cli.flag(name)} is {getattr(self, name)}: it must be at least 0 and below 1")
        for name in ("decay_ratio", "teacher_weight"):
            if not 0 < getattr(self, name) <= 1:
                errors.append(f"{cli.flag(name)} is {getattr(self, name)}: it must be above 0 and at most 1")
        errors += (
            cli.at_most(10**9, self, "max_steps")
            + cli.at_most(10**12, self, "total_batch_tokens")
            + cli.at_most(10**6, self, "timeout_minutes")
        )
        if self.seed >= 2**32:
            errors.append(f"--seed is {self.seed}: it must be below 2^32")
        parts = self.micro_batch_size, self.model.seq_len, world_size
        if all(isinstance(part, int) and part >= 1 for part in parts) and self.total_batch_tokens % math.prod(parts):
            errors.append(self.batch_error(world_size))
        raise_errors(errors)

    def batch_error(self, world_size: int) -> str:
        """Says that the batch does not divide, and the nearest that does."""
        sequences, rest = divmod(self.total_batch_tokens, self.model.seq_len * world_size)
        if sequences and not rest:
            fits = max(b for b in range(1, min(sequences, self.micro_batch_size) + 1) if sequences % b == 0)
            remedy = f"--micro-batch-size {fits} does"
        else:
            per_pass = self.micro_batch_size * self.model.seq_len * world_size
            remedy = f"--total-batch-tokens {max(1, round(self.total_batch_tokens / per_pass)) * per_pass} can be divided"
        return (
            f"--micro-batch-size {self.micro_batch_size} × --seq-len {self.model.seq_len} × {world_size} processes does not "
            f"divide --total-batch-tokens {self.total_batch_tokens}: {remedy}"
        )


# what a resumed run may change; all else decides the model, the data or the global batch
MAY_CHANGE = {
    "replay_step", "data_dir", "max_steps", "max_bad_steps", "skip_spikes", "micro_batch_size", "attention", "device", "dtype",
    "compile", "self_check", "activation_memory", "shard", "verify_shards", "val_every", "val_tokens", "hellaswag_every",
    "hellaswag_file", "sample_every", "sample_prompt", "sample_tokens", "checkpoint_every", "keep", "on_save_error", "tracker",
    "timeout_minutes", "plan", "gpu", "gpus", "price", "rate",
}  # fmt: skip
