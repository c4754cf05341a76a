"""Checks a run before its first step. Each check raises a ValueError that names the remedy."""

import math
import platform
import time
from dataclasses import replace
from pathlib import Path

import checkpoint
from common import device
from common.distributed import DistContext
from common.files import read_json
from common.tokenizer import VOCAB_SIZES
from dataloader import Shards, differences, verify_shards
from training import self_check, sharding
from training.config import SMALLER_MODEL, TrainConfig
from training.log import Log
from training.memory import Setting, memory
from training.presets import PRESETS
from training.run_json import RUN, RUN_REMEDY
from training.trainer import Trainer
from variants import build_on_meta


def check_data(config: TrainConfig, shards: Shards) -> Shards:
    """Returns the shards. ValueError if one is damaged or, on resume, differs from those at the run's start."""
    if config.verify_shards:
        verify_shards(shards)
    if config.resume:
        before = read_json(Path(config.out_dir, RUN), RUN_REMEDY)["data"]
        if changed := differences(before, shards.contents()):
            more = f" and {len(changed) - 3} more" if changed[3:] else ""
            raise ValueError(
                f"--data-dir {config.data_dir} differs from the data of the run in {config.out_dir}: {', '.join(changed[:3])}{more}; "
                "restore the shards, or start a new run in another --out-dir"
            )
    return shards


def check_host(config: TrainConfig, world: DistContext, shards: Shards):
    """Checks on one process of each host, except rank 0's, that the host has the same shards as rank 0."""
    if world.is_main or not world.first_on_host:
        return
    try:
        shards.contents()
        if config.verify_shards:
            verify_shards(shards)
    except (ValueError, OSError) as e:
        raise ValueError(f"{platform.node()} needs the same shards in its --data-dir as the others: {e}") from e


def check_dtype(config: TrainConfig, world: DistContext):
    if config.shard and world.size > 1:
        sharding.reject_fp16(device.pick_dtype(config.dtype, world.device))


def check_hellaswag(config: TrainConfig):
    """ValueError if a file named by flag is missing. The default file is downloaded, so it may be missing."""
    custom = config.hellaswag_every and config.hellaswag_file != TrainConfig.hellaswag_file
    if custom and not Path(config.hellaswag_file).is_file():
        raise ValueError(
            f"--hellaswag-file {config.hellaswag_file} is not a file: pass HellaSwag's {TrainConfig.hellaswag_file}, or leave it out"
        )


def fit_vocabulary(config: TrainConfig, shards: Shards):
    """Gives a new model the shards' vocabulary. ValueError if loaded weights or --vocab-size have another one."""
    ours, theirs = config.model.vocab_size, shards.vocab_size
    given = config.resume or config.init_from or ours != PRESETS[config.preset].model.vocab_size
    if given and ours != theirs:
        remedy = "leave --vocab-size out, or make shards with the model's tokenizer"
        raise ValueError(f"the model has {ours} ids, the shards in {config.data_dir} have {theirs}: {remedy}")
    if config.model.doc_mask and shards.tokenizer not in VOCAB_SIZES:
        raise ValueError(f"--doc-mask can't tell where documents end with the tokenizer {shards.tokenizer!r}: leave it out")
    config.model = replace(config.model, vocab_size=theirs)


def check_teacher(config: TrainConfig):
    """ValueError if the teacher's vocabulary differs, or if it reads shorter sequences than the student."""
    ours, theirs = config.model, checkpoint.load_config(config.teacher)
    if theirs.vocab_size != ours.vocab_size or theirs.seq_len < ours.seq_len:
        raise ValueError(
            f"--teacher {config.teacher} has {theirs.vocab_size} ids and {theirs.seq_len} positions, the run has {ours.vocab_size} and "
            f"{ours.seq_len}: choose a teacher with the same vocabulary and at least as many positions"
        )


def check_memory(config: TrainConfig, world: DistContext):
    """ValueError if a process's weights, gradients and optimizer state don't fit into memory."""
    model, shard = build_on_meta(config.model), config.shard and world.size > 1
    parts = memory(config, Setting(world.device.type, 4, False, world.size, shard), model).parts
    need = sum(parts[name] for name in ("weights", "gradients", "optimizer", "average of the weights"))
    if shard:  # each process holds all weights before sharding and in evaluations, when it has no gradients
        need += 4 * sum(p.numel() for p in model.parameters()) - parts["gradients"]
    if need > (have := device.total_memory(world.device)):
        raise ValueError(
            f"this model's weights, gradients and optimizer need {need / 1e9:.1f} GB, {world.device.type} has {have / 1e9:.1f} GB: "
            f"{SMALLER_MODEL}{', --n-expert' if config.model.n_expert > 1 else ''} or --n-embd, or --shard it over more processes"
        )


def check_compiled(trainer: Trainer, step: int, log: Log):
    """Compares compiled and eager code on each rank's first micro batch. If any rank finds a mismatch, all ranks train eagerly."""
    config = trainer.config
    if not (trainer.compiled and config.self_check and step < config.max_steps):
        return
    began = time.perf_counter()
    positions = trainer.positions(step, trainer.world.rank)[0]
    found = self_check.mismatches(
        trainer.model,
        lambda: trainer.loss(trainer.model, positions),
        None if trainer.sharded else lambda: trainer.validation_loss(trainer.train_stream.batch(positions)),
        trainer.dtype,
        trainer.teacher,
    )
    wrong = max(trainer.world.gather(found), key=len)  # of the rank with the most mismatches
    if wrong:
        first, error = next(iter(wrong.items()))
        how = f"differs from eager by {error:.0%}" if math.isfinite(error) else "is not finite"
        more = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        log.progress(f"warning: self-check failed: compiled {first} {how}{more}; training without torch.compile, which is slower")
        trainer.stop_compiling()
    trainer.seconds += time.perf_counter() - began  # compiling counts, as it does in the first step
