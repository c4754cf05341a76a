"""Every flag of train.py, the checks of its value, and which flags may change on resume."""

import math
from dataclasses import dataclass, field
from typing import Literal

import tyro

from common import cli
from common.device import CARDS
from common.validation import raise_errors
from tasks.readers import task_errors
from variants import VariantConfig

# The remedies of a run that ends because of its own settings. lab.sweep looks for them: it then tries other settings
LOWER_LR = "a lower --max-lr"
LOWER_MEMORY = "lower --micro-batch-size, then --activation-memory"
SMALLER_MODEL = "choose a smaller --n-layer"


@dataclass
class Main:
    """The flags that most runs need."""

    preset: Literal[
        "quickstart", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt3-125m", "gpt3-350m", "gpt3-760m", "gpt3-1b", "modern"
    ] = "gpt2"
    """Sets the defaults of all other flags. A flag you pass overrides it."""
    data_dir: str = "edu_fineweb10B"
    """Folder of shards: from fineweb.py or build-nanogpt, or llm.c's .bin files. Or a URL that fineweb.py has filled: s3://bucket/shards.
    Copies go to shard_copies (or to $SHARD_COPIES) while training runs."""
    out_dir: str = "log"
    """Folder for the run's log, metrics, checkpoints and plot."""
    resume: bool = False
    """Resume the run in --out-dir from its newest complete checkpoint, with its settings. torchrun's restarts do this by themselves."""
    max_steps: int = 19073
    """Updates in the whole run; 19,073 × 524,288 tokens are 10 B. The schedule ends here too, even if a resume changes it."""
    total_batch_tokens: int = 524288
    """Tokens per update, over all processes. Gradients accumulate until it is reached."""
    micro_batch_size: int = 64
    """Sequences per forward pass of a process. Lower it if memory runs out: only rounding, experts' balance and dropout change."""
    max_lr: float = 6e-4
    """AdamW's learning rate at the end of the warmup."""
    seed: int = 1337
    """Seed for the initial weights, the order of the data and the samples."""
    plan: bool = False
    """Print the run's memory by part, hours and cost, then exit. Allocates nothing and needs no shards."""


@dataclass
class Learning:
    """What the model learns from, and how."""

    init_from: str = ""
    """Start from these weights instead of random ones: gpt2, gpt2-medium, …, a Hugging Face folder or a checkpoint."""
    init_revision: str = ""
    """Branch, tag or commit on the hub for --init-from gpt2, …. The run records the commit and resumes with it."""
    max_seconds: float = 0.0
    """Seconds of training, without compiling, evaluations and saves. 0: no limit. The run and its schedule end with these or with
    --max-steps, whichever is first. The learning rates then depend on the clock, so a run can't be repeated bit for bit."""
    min_lr_ratio: float = 0.1
    """The learning rate at the end of the schedule, as a fraction of the largest."""
    warmup_steps: int = 715
    """Steps of linear warmup. 715 × 524,288 tokens are GPT-3's 375 M (Brown et al., 2020, appendix B)."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warmup: cosine decay, or wsd, a constant rate with a linear decay at the end (Hu et al., 2024)."""
    decay_ratio: float = 0.2
    """Length of wsd's decay, as a fraction of the run."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon (Jordan et al., 2024) updates the matrices of attention and MLPs; AdamW updates the rest."""
    muon_lr: float = 0.02
    """Muon's learning rate at the end of the warmup. Works for all widths."""
    muon_momentum: float = 0.95
    """Muon's momentum. Short runs learn faster with less. 0: by the run's length, 1 - 4.6 / √steps, but at least 0.5 and at most 0.95."""
    muon_beta2: float = 0.0
    """NorMuon (Li et al., 2025): Muon's update, evened out over the neurons with a moving average of this decay, such as 0.95. 0: off."""
    weight_decay: float = 0.1
    """Decoupled weight decay (Loshchilov & Hutter, 2019), only on matrices: not on biases, norms and short convolutions."""
    grad_clip: float = 1.0
    """Clip an update's gradient to this norm. 0: no clipping."""
    max_bad_steps: int = 10
    """End the run after this many skipped updates in a row. An update with a nan or inf loss or gradient is always skipped."""
    skip_spikes: float = 0.0
    """Skip an update if its loss is this many standard deviations above the mean of the last 128. 0: never; OLMo uses 6."""
    shuffle: bool = True
    """Read an epoch's sequences in a seeded random order. --no-shuffle reads them in the shards' order."""
    ema: float = 0.0
    """Validate, score, sample and save a moving average of the weights with this decay, such as 0.999. 0: the weights themselves."""
    teacher: str = ""
    """Also learn from this model's predictions: a checkpoint, a run's folder, a Hugging Face folder, gpt2, …. With several, separated by
    commas, learn from the mean of their predictions. Their paths must not contain commas."""
    teacher_weight: float = 0.5
    """The teachers' share of the gradient. The reported loss is always that of the text alone."""


@dataclass
class Hardware:
    """Where it computes, and how."""

    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of matrix products. auto: bf16 if the hardware has it, else fp16 on CUDA and fp32 elsewhere."""
    compile: bool = True
    """torch.compile the training step and validation."""
    self_check: bool = True
    """Before the first step, compare compiled with eager loss and gradients. If they differ, train without torch.compile."""
    activation_memory: float = 1.0
    """Fraction of the activations to keep for the backward pass, which recomputes the rest. With --no-compile only 0 or 1."""
    shard: bool = False
    """Shard weights, gradients and optimizer state over the processes (FSDP2). For models too large for one GPU."""
    timeout_minutes: float = 10.0
    """If a process hangs, all exit after this many minutes. Must be longer than one process needs to verify the shards."""


@dataclass
class Evaluating:
    """What it reports during training."""

    val_every: int = 250
    """Steps between validations. 0, here and below, turns it off; the end of a run always validates and saves."""
    val_tokens: int = 10_485_760
    """Tokens per validation, spread evenly over the val split. Always the same ones for a sequence length."""
    hellaswag_every: int = 250
    """Steps between HellaSwag evaluations."""
    hellaswag_file: str = "hellaswag_val.jsonl"
    """HellaSwag's tasks. The default file is downloaded if it is missing."""
    eval_every: int = 0
    """Steps between evaluations on --eval-tasks."""
    eval_tasks: tuple[str, ...] = ()
    """As evaluate.py's --tasks: lambada=lambada_test.jsonl, core=eval_bundle.zip, blimp=FOLDER, text=FILE."""
    eval_limit: int = 500
    """Score only this many questions of each task, always the same ones; 0: all."""
    sample_every: int = 250
    """Steps between samples."""
    sample_prompt: str = "Hello, I'm a language model,"
    """Prompt that the samples continue."""
    sample_tokens: int = 64
    """Tokens to generate per sample."""
    tracker: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    """Also send the metrics there; install it first. Its errors never end the run."""


@dataclass
class Saving:
    """Checkpoints and data."""

    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    checkpoint_minutes: float = 15.0
    """Also save after this many minutes without a checkpoint. Saves take at most 1 % of the time: slow ones come less often. 0: off."""
    keep: int = 3
    """Keep this many of the newest complete checkpoints. 0: keep all. Those between two of --checkpoint-every last until the next."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """If a checkpoint can't be saved (full disk): continue training and try the next one, or stop the run."""
    remote: str = ""
    """Also keep the run in a bucket: s3://bucket/run (pip install s3fs), gs://… (gcsfs), hf://buckets/… (huggingface_hub), file:///….
    Sends checkpoints and logs while training continues. With --resume, an empty --out-dir is filled from there. '': off."""
    notice_seconds: float = 100.0
    """With --remote: after SIGTERM, send the last checkpoint for at most this long. torchrun needs
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 for it, else it kills after 30."""
    replay_step: int | None = None
    """Recompute this step of the run in --out-dir, from the checkpoint before it, and compare its loss with the log. Saves nothing."""
    verify_shards: bool = True
    """Before the start, check the shards' sha256 against the manifest and their ids against the vocabulary."""


@dataclass
class Planning:
    """For --plan. --rehearse takes --price too."""

    rehearse: bool = False
    """Try everything that the run will do, in about two minutes, and print what is wrong and what the run will cost. Start it like
    the run: with torchrun and all its flags, also --resume. Changes neither --out-dir nor the run in --remote."""
    gpu: Literal[tuple(CARDS)] = "H100"
    """The GPU, with the most memory it is sold with. With --device cpu: this machine's CPU instead."""
    gpus: int = 1
    """Number of GPUs."""
    price: float = 0.0
    """Price per GPU and hour, in $."""
    rate: float = 0.0
    """Tokens per second, all GPUs together. 0: as the run in --out-dir measured on this GPU, or else 40 % of the peak, less waiting."""


@dataclass
class TrainConfig(Planning, Saving, Evaluating, Hardware, Learning, Main):
    """Train a GPT. The defaults are GPT-2 (124M) on 10 B tokens of FineWeb-Edu."""

    model: tyro.conf.OmitArgPrefixes[VariantConfig] = field(default_factory=VariantConfig)

    @property
    def teachers(self) -> list[str]:
        return self.teacher.split(",") if self.teacher else []

    def grad_accum_steps(self, world_size: int) -> int:
        """Forward and backward passes per process and update."""
        return self.total_batch_tokens // (self.micro_batch_size * self.model.seq_len * world_size)

    def validate(self, world_size: int):
        """Raises one ValueError that lists all errors."""
        errors = self.model.errors()
        errors += cli.at_least(
            1, self, "max_steps", "total_batch_tokens", "micro_batch_size", "val_tokens", "sample_tokens", "max_bad_steps"
        )
        errors += cli.at_least(0, self, "max_lr", "muon_lr", "min_lr_ratio", "warmup_steps", "weight_decay", "grad_clip")
        errors += cli.at_least(0, self, "max_seconds", "skip_spikes", "seed")
        errors += cli.at_least(
            0, self, "val_every", "hellaswag_every", "eval_every", "eval_limit", "sample_every", "checkpoint_every", "keep"
        )
        errors += task_errors(self.eval_tasks, "--eval-tasks")
        if self.eval_every > 0 and not self.eval_tasks:
            errors.append("--eval-every needs --eval-tasks, such as lambada=lambada_test.jsonl")
        errors += cli.at_least(0, self, "price", "rate", "notice_seconds", "checkpoint_minutes") + cli.at_least(1, self, "gpus")
        errors += cli.at_least(0.01, self, "timeout_minutes")
        if self.replay_step is not None and not 0 <= self.replay_step < self.max_steps:
            errors.append(f"--replay-step is {self.replay_step}: the run's steps are 0 to {self.max_steps - 1}")
        if not 0 <= self.activation_memory <= 1:
            errors.append(f"--activation-memory is {self.activation_memory}: it must be from 0 to 1")
        elif 0 < self.activation_memory < 1 and not self.compile:
            errors.append("--activation-memory between 0 and 1 needs a compiled run: pass --compile, or use 0 or 1")
        for name in ("ema", "muon_momentum", "muon_beta2"):
            if not 0 <= getattr(self, name) < 1:
                errors.append(f"{cli.flag(name)} is {getattr(self, name)}: it must be at least 0 and below 1")
        errors += ["--teacher has an empty path, or one twice: leave that out"] * (len({*self.teachers} - {""}) < len(self.teachers))
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
        """The message for a batch that does not divide, with settings that do. A resumed run keeps its batch."""
        sequences, rest = divmod(self.total_batch_tokens, self.model.seq_len * world_size)
        if sequences and not rest:
            fits = max(b for b in divisors(sequences) if b <= self.micro_batch_size)
            remedy = f"--micro-batch-size {fits} does"
        elif self.resume:
            remedy = f"this run's batch can't change; {self.worlds_that_fit(world_size)}"
        else:
            per_pass = self.micro_batch_size * self.model.seq_len * world_size
            remedy = f"--total-batch-tokens {max(1, round(self.total_batch_tokens / per_pass)) * per_pass} can be divided"
        return (
            f"--micro-batch-size {self.micro_batch_size} × --seq-len {self.model.seq_len} × {world_size} processes does not "
            f"divide --total-batch-tokens {self.total_batch_tokens}: {remedy}"
        )

    def worlds_that_fit(self, world_size: int) -> str:
        """Names up to four numbers of processes that divide the batch, the largest just above world_size, with a micro batch for each."""
        sequences = self.total_batch_tokens // self.model.seq_len
        counts = divisors(sequences)
        by_size = {}
        for count in counts[: sum(count <= world_size for count in counts) + 1][-4:]:
            fits = max(b for b in divisors(sequences // count) if b <= self.micro_batch_size)
            by_size.setdefault(fits, []).append(str(count))
        return "use " + ", or ".join(f"{' or '.join(counts)} processes with --micro-batch-size {size}" for size, counts in by_size.items())


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


# flags that may change on resume; all others decide the model, the data or the global batch
MAY_CHANGE = {
    "replay_step", "data_dir", "max_steps", "max_seconds", "max_bad_steps", "skip_spikes", "micro_batch_size", "attention", "device",
    "dtype", "compile", "self_check", "activation_memory", "shard", "verify_shards", "val_every", "val_tokens", "hellaswag_every",
    "hellaswag_file", "eval_every", "eval_tasks", "eval_limit", "sample_every", "sample_prompt", "sample_tokens", "checkpoint_every",
    "checkpoint_minutes", "keep", "on_save_error", "tracker", "timeout_minutes", "remote", "notice_seconds", "plan", "gpu", "gpus",
    "price", "rate", "rehearse",
}  # fmt: skip
