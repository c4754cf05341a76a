"""Checks a run before its first step. Each check raises a ValueError that names the remedy."""

import math
import platform
import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import checkpoint
from common import cli, device
from common.distributed import DistContext
from common.shards import Shards, differences
from common.tokenizer import VOCAB_SIZES
from common.validation import from_dict, raise_errors
from ops import choice
from tasks.readers import missing_files
from training import self_check, sharding
from training.config import MAY_CHANGE, SMALLER_MODEL, TrainConfig
from training.log import Log
from training.memory import Setting, memory
from training.presets import PRESETS
from training.run_json import RUN, read_run_json, teachers_fingerprint
from training.trainer import Trainer
from variants import VariantConfig, build_on_meta


def check_data(config: TrainConfig, shards: Shards) -> Shards:
    """Returns the shards. ValueError if one is damaged or, on resume, differs from those at the run's start."""
    shards.prepare(config.verify_shards)
    if config.resume:
        before = read_run_json(Path(config.out_dir, RUN))["data"]
        if changed := differences(before, shards.contents()):
            more = f" and {len(changed) - 3} more" if changed[3:] else ""
            raise ValueError(
                f"--data-dir {config.data_dir} differs from the data of the run in {config.out_dir}: {', '.join(changed[:3])}{more}; "
                "restore the shards, or start a new run in another --out-dir"
            )
    return shards


def check_host(config: TrainConfig, world: DistContext, shards: Shards):
    """Checks the environment, and on one process of each host, except rank 0's, that the host has the same shards as rank 0."""
    choice.forced("attention")  # torch.compile would hide its ValueError, and leave the blocks eager
    if world.is_main or not world.first_on_host:
        return
    try:
        shards.contents()
        shards.prepare(config.verify_shards)
    except cli.TryAgain:
        raise
    except (ValueError, FileNotFoundError) as e:
        raise ValueError(f"{platform.node()} needs the same shards in its --data-dir as the others: {e}") from e
    except OSError as e:
        raise OSError(e.errno, f"{e.strerror} on {platform.node()}", e.filename) from e


def thread_warnings(device: torch.device) -> list[str]:
    """Says so if several threads compute slower than one, as on a laptop whose cores are busy: each product waits for its last thread."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return []
    pairs = [(product_seconds(1), product_seconds(threads)) for _ in range(5)]  # in turns
    one, several = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    if several < 1.25 * one:
        return []
    return [
        f"{threads} threads compute {several / one:.1f} × slower than one, because other programs use the cores: close those, or start "
        "again with OMP_NUM_THREADS=1 before the command"
    ]


def product_seconds(threads: int) -> float:
    """Times matrix products of a small model with this many threads."""
    before, x, w = torch.get_num_threads(), torch.ones(512, 256), torch.ones(256, 256)
    torch.set_num_threads(threads)
    try:
        x @ w  # starts the threads
        began = time.perf_counter()
        for _ in range(5):
            x @ w
        return time.perf_counter() - began
    finally:
        torch.set_num_threads(before)


def check_dtype(config: TrainConfig, world: DistContext):
    if config.shard and world.size > 1:
        sharding.reject_fp16(device.pick_dtype(config.dtype, world.device))


def check_tasks(config: TrainConfig):
    """ValueError if a file of tasks is missing. HellaSwag's default file is downloaded, so it may be missing."""
    raise_errors(missing_files(config.eval_tasks) if config.eval_every else [])
    custom = config.hellaswag_every and config.hellaswag_file != TrainConfig.hellaswag_file
    if custom and not Path(config.hellaswag_file).is_file():
        raise ValueError(
            f"--hellaswag-file {config.hellaswag_file} is not a file: pass HellaSwag's {TrainConfig.hellaswag_file}, or leave it out"
        )


def fit_vocabulary(config: TrainConfig, shards: Shards) -> VariantConfig:
    """Returns the model's config with the shards' vocabulary. Loaded weights keep their extra rows, if they have the shards' tokenizer.
    ValueError if loaded weights or --vocab-size have another vocabulary."""
    ours, theirs = config.model.vocab_size, shards.vocab_size
    loaded = config.resume or config.init_from
    opened = checkpoint.open_checkpoint(config.init_from, config.init_revision) if config.init_from and not config.resume else None
    same = config.resume or (opened and opened.tokenizer == shards.tokenizer)  # a resumed run was checked when it began
    if (loaded or ours != PRESETS[config.preset].model.vocab_size) and not (ours == theirs or (same and ours > theirs)):
        remedy = "make shards with the model's tokenizer" if loaded else "leave --vocab-size out"
        raise ValueError(f"the model has {ours} ids, the shards in {config.data_dir} have {theirs}: {remedy}")
    if opened:
        check_tokenizer(f"--init-from {config.init_from}", opened, shards)
    fitted = replace(config.model, vocab_size=ours if loaded else theirs)
    if fitted.doc_mask and VOCAB_SIZES.get(shards.tokenizer) != fitted.vocab_size:
        extra = f" in a model with {fitted.vocab_size} ids" if shards.tokenizer in VOCAB_SIZES else ""
        raise ValueError(f"--doc-mask can't tell where documents end with the tokenizer {shards.tokenizer!r}{extra}: leave it out")
    return fitted


def check_tokenizer(source: str, opened: checkpoint.Opened, shards: Shards):
    """ValueError if the ids of a model mean something else than those of the shards. source: for the message."""
    if shards.tokenizer in VOCAB_SIZES and opened.tokenizer not in (None, shards.tokenizer):
        why = opened.no_tokenizer or f"its tokenizer is {opened.tokenizer}"
        raise ValueError(f"{source}: {why}; {shards.folder} has {shards.tokenizer} tokens: use shards of the model's tokenizer")


def check_teachers(config: TrainConfig, world: DistContext, shards: Shards):
    """ValueError if a teacher doesn't fit, or if this run began with other teachers, on every host."""
    world.on_all(lambda: [check_teacher_fits(path, config, shards) for path in config.teachers])
    expected = world.on_main(lambda: teachers_of_run(config) or teachers_fingerprint(config))

    def check_same():
        if world.first_on_host and teachers_fingerprint(config) != expected:
            raise ValueError(
                f"--teacher {config.teacher} on {platform.node()} is not what this run began with: restore the files, or pass "
                "--teacher with their new paths"
            )

    world.on_all(check_same)


def check_teacher_fits(path: str, config: TrainConfig, shards: Shards):
    """ValueError if the teacher at this path is missing, has another vocabulary or reads shorter sequences than the student."""
    try:
        opened = checkpoint.open_checkpoint(path)
    except cli.TryAgain:
        raise
    except ValueError as e:
        raise ValueError(f"--teacher: {e}" + ("; did it move? pass --teacher with its new path" if config.resume else "")) from e
    ours, theirs = config.model, opened.config
    if theirs.vocab_size != ours.vocab_size or theirs.seq_len < ours.seq_len:
        raise ValueError(
            f"--teacher {path} has {theirs.vocab_size} ids and {theirs.seq_len} positions, the run has {ours.vocab_size} and "
            f"{ours.seq_len}: choose a teacher with the same vocabulary and at least as many positions"
        )
    check_tokenizer(f"--teacher {path}", opened, shards)


def teachers_of_run(config: TrainConfig) -> str | None:
    """Returns the teachers' fingerprints in run.json; None for a new run, or if an older version began the run with this path."""
    run = read_run_json(Path(config.out_dir, RUN)) if config.resume else {"config": {"teacher": config.teacher}}
    if "teacher_sha256" not in run and run["config"]["teacher"] != config.teacher:
        raise ValueError(f"--teacher {config.teacher}: this run began with {run['config']['teacher']}: put it back there")
    return run.get("teacher_sha256")


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


def check_checkpoint(config: TrainConfig, step: int | None):
    """ValueError if run.json describes another model than the checkpoint to resume. It may be damaged and ask for terabytes."""
    if step is None:
        return
    file = checkpoint.files_of(Path(config.out_dir), step).model
    theirs = from_dict(VariantConfig, checkpoint.load_torch(file)["config"], file)
    for name, value in vars(theirs).items():
        if name not in MAY_CHANGE and value != getattr(config.model, name):
            ours = f"{Path(config.out_dir, RUN)} has {name} {getattr(config.model, name)}"
            raise ValueError(f"{ours}, {file.name} has {value}: restore {RUN} from a copy")


def check_compiled(trainer: Trainer, step: int, log: Log):
    """Compares compiled and eager code on each rank's first micro batch. If any rank finds a mismatch, all ranks train eagerly."""
    config = trainer.config
    if not (trainer.compiled and config.self_check and not trainer.budget.limits_reached(step)):
        return
    began = time.perf_counter()
    positions = trainer.positions(step, trainer.world.rank)[0]

    def validate():
        copy = trainer.evaluated  # a copy if sharded: cut to the layers that mismatches leaves in the model
        whole = sharding.whole(trainer.model, copy) if trainer.sharded else nullcontext()
        with self_check.first_of_each_kind(copy), whole:
            return trainer.validation_loss(trainer.train_stream.batch(positions))

    loss = partial(trainer.loss, trainer.model, positions)
    found = self_check.mismatches(trainer.model, loss, validate, trainer.dtype, trainer.teachers)
    wrong = max(trainer.world.gather(found), key=len)  # of the rank with the most mismatches
    if wrong:
        first, error = next(iter(wrong.items()))
        how = f"differs from eager by {error:.0%}" if math.isfinite(error) else "is not finite"
        more = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        log.progress(f"warning: self-check failed: compiled {first} {how}{more}; training without torch.compile, which is slower")
        trainer.stop_compiling()
    trainer.seconds += time.perf_counter() - began  # compiling counts, as it does in the first step
