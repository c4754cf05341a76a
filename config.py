"""The settings of a training run: what train.py's flags mean, the presets, and what a run that goes on may change."""

import math
import os
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

import checkpoint
import cli
import hellaswag
from device import CARDS
from files import read_json
from huggingface import SIZES
from variants import NOT_IN_WEIGHTS, VariantConfig


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
    hellaswag_file: str = hellaswag.HellaSwagConfig.file
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
        """ValueError with every fault at once."""
        faults = self.model.errors()
        faults += cli.at_least(
            1, self, "max_steps", "total_batch_tokens", "micro_batch_size", "val_tokens", "sample_tokens", "max_bad_steps"
        )
        faults += cli.at_least(
            0, self, "max_lr", "muon_lr", "min_lr_ratio", "warmup_steps", "weight_decay", "grad_clip", "skip_spikes", "seed"
        )
        faults += cli.at_least(0, self, "val_every", "hellaswag_every", "sample_every", "checkpoint_every", "keep")
        faults += cli.at_least(0, self, "price", "rate") + cli.at_least(1, self, "gpus")
        faults += cli.at_least(0.01, self, "timeout_minutes")
        if self.replay_step is not None and not 0 <= self.replay_step < self.max_steps:
            faults.append(f"--replay-step is {self.replay_step}: the run's steps are 0 to {self.max_steps - 1}")
        if not 0 <= self.activation_memory <= 1:
            faults.append(f"--activation-memory is {self.activation_memory}: it must be from 0 to 1")
        elif 0 < self.activation_memory < 1 and not self.compile:
            faults.append("--activation-memory between 0 and 1 needs a compiled run: give --compile, or 0 or 1")
        for name in ("ema", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{cli.flag(name)} is {getattr(self, name)}: it must be at least 0 and below 1")
        for name in ("decay_ratio", "teacher_weight"):
            if not 0 < getattr(self, name) <= 1:
                faults.append(f"{cli.flag(name)} is {getattr(self, name)}: it must be above 0 and at most 1")
        faults += (
            cli.at_most(10**9, self, "max_steps")
            + cli.at_most(10**12, self, "total_batch_tokens")
            + cli.at_most(10**6, self, "timeout_minutes")
        )
        if self.seed >= 2**32:
            faults.append(f"--seed is {self.seed}: it must be below 2^32")
        parts = self.micro_batch_size, self.model.seq_len, world_size
        if all(isinstance(part, int) and part >= 1 for part in parts) and self.total_batch_tokens % math.prod(parts):
            faults.append(self.batch_fault(world_size))
        cli.refuse(faults)

    def warnings(self) -> list[str]:
        """What can be run but is hardly meant: flags that do nothing beside the others, a line each."""
        lines = []
        if self.warmup_steps >= self.max_steps:
            lines.append(f"--warmup-steps {self.warmup_steps} is not below --max-steps: the learning rate never comes to --max-lr")
        if self.min_lr_ratio > 1:
            lines.append(f"--min-lr-ratio {self.min_lr_ratio} is above 1: the learning rate rises to the end")
        if self.init_revision and not self.init_from:
            lines.append("--init-revision does nothing without --init-from")
        usual = PRESETS[self.preset]
        ours, theirs = ({**vars(config), **vars(config.model)} for config in (self, usual))
        differ = [name for name in ours if ours[name] != theirs[name]]
        idle = {
            "--optimizer muon": [] if self.optimizer == "muon" else ["muon_lr", "muon_momentum"],
            "--schedule wsd": [] if self.schedule == "wsd" else ["decay_ratio"],
            "--teacher": [] if self.teacher else ["teacher_weight"],
            "--n-expert": [] if self.model.n_expert > 1 or self.init_from else ["load_balance"],  # it may have come with the weights
            "--plan": ["gpu", "gpus", "price", "rate"],  # in which nothing is trained
        }
        for other, names in idle.items():
            lines += [f"{cli.flag(name)} does nothing without {other}" for name in names if name in differ]
        return lines

    def given_way(self, shape: VariantConfig) -> list[str]:
        """A line that says what of the preset's model gives way to that of --init-from, if anything does; what a flag says is neither's."""
        usual = vars(PRESETS[self.preset].model)
        names = [name for name, kept in vars(shape).items() if usual[name] != kept == getattr(self.model, name) and name != "vocab_size"]
        if not names or self.preset == TrainConfig.preset:
            return []
        return [f"of --init-from {self.init_from}, and not of --preset {self.preset}, the run has {', '.join(map(cli.flag, names))}"]

    def batch_fault(self, world_size: int) -> str:
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


def gpt3(name: str, n_layer: int, n_head: int, n_embd: int, total_batch_tokens: int = 2**19, **settings) -> TrainConfig:
    """A size of Brown et al., 2020, table 2.1, with dense attention in all layers and, as the other presets, 10 B tokens of their
    300 B; the warmup is their 375 M (appendix B)."""
    return TrainConfig(
        preset=name,
        model=VariantConfig(seq_len=2048, n_layer=n_layer, n_head=n_head, n_embd=n_embd),
        total_batch_tokens=total_batch_tokens,
        max_steps=round(10e9 / total_batch_tokens),
        warmup_steps=round(375e6 / total_batch_tokens),
        **settings,
    )


PRESETS = {
    "gpt2": TrainConfig(),
    "quickstart": TrainConfig(
        preset="quickstart",
        data_dir="stdlib_bytes",
        out_dir="log/quickstart",
        # on two CPU cores PyTorch's fused attention is slower backward than the plain products
        model=VariantConfig(vocab_size=257, seq_len=128, n_layer=2, n_head=2, n_embd=128, attention="manual"),
        max_steps=1500,
        total_batch_tokens=2048,
        micro_batch_size=16,
        max_lr=6e-3,
        min_lr_ratio=0.02,
        warmup_steps=100,
        compile=False,
        val_every=500,
        val_tokens=131072,
        hellaswag_every=0,
        sample_every=750,
        sample_prompt="def ",
        sample_tokens=200,
        checkpoint_every=750,
        keep=1,
    ),
    # learning rates of the sizes: Brown et al., 2020, table 2.1
    "gpt2-medium": TrainConfig(preset="gpt2-medium", model=VariantConfig(**SIZES["gpt2-medium"]), max_lr=3e-4, micro_batch_size=32),
    "gpt2-large": TrainConfig(preset="gpt2-large", model=VariantConfig(**SIZES["gpt2-large"]), max_lr=2.5e-4, micro_batch_size=16),
    "gpt2-xl": TrainConfig(preset="gpt2-xl", model=VariantConfig(**SIZES["gpt2-xl"]), max_lr=2e-4, micro_batch_size=8),
    "gpt3-125m": gpt3("gpt3-125m", n_layer=12, n_head=12, n_embd=768, max_lr=6e-4, micro_batch_size=32),
    "gpt3-350m": gpt3("gpt3-350m", n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4, micro_batch_size=16),
    "gpt3-760m": gpt3("gpt3-760m", n_layer=24, n_head=16, n_embd=1536, max_lr=2.5e-4, micro_batch_size=8),
    # the table has 24 heads of 128 for a width of 2048, which do not multiply: 16 do
    "gpt3-1b": gpt3("gpt3-1b", n_layer=24, n_head=16, n_embd=2048, max_lr=2e-4, micro_batch_size=4, total_batch_tokens=2**20),
    # GPT-2's layers and width with what makes it learn from fewer tokens; compare.py --suite without measures each part's share
    "modern": TrainConfig(
        preset="modern",
        model=VariantConfig(
            pos="rope",
            qk_norm=True,
            norm="rmsnorm",
            mlp="swiglu",
            bias=False,
            tied_head=False,
            value_residual=True,
        ),
        optimizer="muon",
        schedule="wsd",
        decay_ratio=0.5,
        max_lr=1e-2,
        min_lr_ratio=0.0,
        warmup_steps=250,
        weight_decay=0.0,
    ),
}


# ---- flags over what they are laid over ----


@dataclass
class PresetFlag:
    """The one flag that decides the defaults of the others."""

    preset: str = TrainConfig.preset


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """Flags over the defaults of a preset, of the weights to start from, or of the run to go on with. ValueError when
    they do not fit it, or would overwrite a run."""
    config = parse_flags(argv)
    out_dir = Path(config.out_dir)
    if config.plan and not (config.resume or config.init_from):
        return config
    if config.resume or config.replay_step is not None or is_restart(out_dir):
        previous = replace(read_run(out_dir, config.replay_step), out_dir=config.out_dir, resume=True)
        config = replace(cli.parse(TrainConfig, argv, previous), init_revision=previous.init_revision)
        config.teacher = settled_teacher(config.teacher, previous.teacher)
        refuse_changes(previous, config, MAY_CHANGE, f"the run in {out_dir}")
    elif not config.plan and holds_a_run(out_dir):
        raise ValueError(f"{out_dir} holds a run or a model already: add --resume to go on with it, or choose another --out-dir")
    elif config.init_from:
        shape = checkpoint.load_config(config.init_from, config.init_revision)
        config = parse_flags(argv, shape)
        config.init_revision = checkpoint.hub_commit(config.init_from, config.init_revision)
        refuse_changes(shape, config.model, NOT_IN_WEIGHTS, config.init_from)
    if config.teacher and not config.resume:  # a folder's newest checkpoint may be another one when the run goes on
        config.teacher = str(checkpoint.checkpoint_file(config.teacher) or config.teacher)
    return config


def holds_a_run(out_dir: Path) -> bool:
    """Whether a run, or a model, would be overwritten there."""
    return any((out_dir / name).exists() for name in ("run.json", "log.txt", "config.json")) or any(out_dir.glob("model*"))


def parse_flags(argv: list[str] | None = None, model: VariantConfig | None = None) -> TrainConfig:
    """Flags over the defaults of a preset, and over a model's shape where one is given."""
    first, _ = tyro.cli(PresetFlag, args=argv, return_unknown_args=True, add_help=False)
    preset = PRESETS.get(first.preset, PRESETS["gpt2"])  # a wrong name is for the full parser to refuse
    return cli.parse(TrainConfig, argv, replace(preset, model=model or preset.model), "train.py")


def is_restart(out_dir: Path) -> bool:
    """Whether torchrun starts this process again, to go on with what it began here itself. Its own count of restarts leaves out
    those for a host that came back."""
    if torchrun_id() == "" or not (out_dir / RUN).exists():
        return False
    return torchrun_id() in last_launch(read_json(out_dir / RUN, RUN_REMEDY), None).get("torchrun", [])


def torchrun_id() -> str:
    """What tells one torchrun from another and is the same for all that it restarts, its own temporary folder; '' without torchrun."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")  # folder/attempt_0/0/error.json
    return f"{platform.node()} {Path(error_file).parents[2]}" if error_file else ""


RUN = "run.json"
RUN_REMEDY = "bring it back from a copy, or choose another --out-dir"


def read_run(out_dir: Path, step: int | None = None) -> TrainConfig:
    """The settings of the run in a folder: of its last launch, or of the one that a step was last done by."""
    path = out_dir / RUN
    if not path.exists():
        raise ValueError(f"there is no run in {out_dir}; check --out-dir, or start one without --resume")
    run = read_json(path, RUN_REMEDY)
    try:
        settings = run["config"] if step is None else last_launch(run, step)["config"]
        if not isinstance(run["data"], dict) or not isinstance(run["launches"], list):
            raise TypeError("data or launches")
        return TrainConfig(**settings | {"model": VariantConfig(**settings["model"])})
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path} was written by another version of train.py ({e}): resume with that one") from e


def last_launch(run: dict, step: int | None) -> dict:
    """run.json's last launch, or the last that did a step; {} where there is none."""
    launches = run.get("launches")
    launches = [launch for launch in launches if isinstance(launch, dict)] if isinstance(launches, list) else []
    return ([launch for launch in launches if step is None or launch.get("step", 0) <= step] or [{}])[-1]


def settled_teacher(given: str, recorded: str) -> str:
    """The teacher that a run began with, where the same one is given: a folder stands for the checkpoint in it that it had then."""
    return recorded if given and recorded and Path(given) in (Path(recorded), Path(recorded).parent) else given


def refuse_changes(before, now, allowed: set[str], source: str, remedy: str = "leave its flag out"):
    """ValueError for all fields that differ and may not."""
    old, new = ({**vars(config), **vars(getattr(config, "model", config))} for config in (before, now))
    changed = [name for name in old if name not in allowed | {"model"} and old[name] != new[name]]
    cli.refuse([f"{name} {new[name]!r} does not fit {source}, which has {old[name]!r}: {remedy}" for name in changed])
