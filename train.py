"""Trains a GPT.

    python train.py --preset quickstart                           # a laptop, 3 minutes, no download
    torchrun --standalone --nproc_per_node=8 train.py             # GPT-2 (124M) on the shards that fineweb.py made
    torchrun --standalone --nproc_per_node=8 train.py --resume    # from the newest checkpoint, with the run's settings

Step s begins after s updates. Its evaluations, its checkpoint and its train loss come before its own update. The end of the run
evaluates and saves once more.
"""

import math
import shlex
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import checkpoint
import fineweb
import variants
from common import cli, device
from common.bucket_shards import open_shards
from common.distributed import DistContext, Stopped, exit_without_others, join_world, launched, rendezvous
from common.locks import lock_folder
from common.run_folder import RunFolder
from common.shards import MANIFEST, Shards
from common.validation import raise_errors
from model import GPT
from training import checks, failure, flags, mirror, run_json
from training.config import LOWER_MEMORY, TrainConfig
from training.evaluation import Evaluation, is_due
from training.guard import largest_weight
from training.log import Log, logged_clock, logged_loss, resume_notice
from training.plan import report
from training.presets import PRESETS
from training.rehearsal import rehearse
from training.saving import Checkpoints
from training.stop import StopSignal
from training.trainer import Trainer


def train(config: TrainConfig, world: DistContext, folder: RunFolder):
    """Runs the training: evaluate, save, update, until the budget is used up or a signal comes."""
    log, trainer, checkpoints, start = set_up(config, world, folder)
    limits = trainer.budget.limits_reached(start)
    if limits and (start > config.max_steps or checkpoints.val_loss is not None):
        log.progress(f"{config.out_dir} finished already, at step {start}: raise {' and '.join(limits)} to continue")
        return
    stop = StopSignal()
    checks.check_compiled(trainer, start, log)
    torchruns = world.gather(run_json.torchrun_id())
    world.on_main(lambda: log.track(run_json.record_launch(config, world, trainer, folder, start, torchruns), start))
    evaluation = Evaluation(trainer, log, stopped=lambda: stop.received > 0)
    step, stopping, asked = start, False, False
    while True:
        finished, val_loss = bool(trainer.budget.limits_reached(step)), None
        if not stopping and evaluation.due(step):
            try:
                with trainer.evaluated_weights():
                    val_loss = evaluation.run(step)
            except Stopped:  # the next launch evaluates this step
                stopping = True
        if (due := finished or (step > start and (stopping or is_due(config.checkpoint_every, step)))) or asked:
            log.stop_if_diverged(f"a weight after {step} steps", largest_weight(trainer))
            checkpoints.save(step, val_loss, timed=config.checkpoint_every > 0 and not due)
        if finished or stopping:
            break
        began = time.perf_counter()
        update = trainer.update(step, stop=stop.received > 0 or checkpoints.must_stop(), save=checkpoints.due())
        seconds, stop.unsaved = time.perf_counter() - began, True
        trainer.seconds += seconds  # only updates count
        log.train(trainer, step, update, seconds)
        trainer.budget.count(seconds, update.compiled, update.elapsed)
        step, stopping, asked = step + 1, update.stop, update.save
    world.on_main(checkpoints.saver.finish)
    world.on_main(log.finish)
    evaluation.plot()
    if stopping or folder.lost:
        log.progress(f"stopped after {step} steps, all saved; to continue: --resume --out-dir {shlex.quote(str(folder.path))}")
        raise failure.Hopeless(folder.lost) if folder.lost else SystemExit(128 + (stop.received or signal.SIGTERM))
    log.progress(f"finished: everything is in {folder.path}{trainer.budget.note(step)}")


def replay(config: TrainConfig, world: DistContext, folder: RunFolder):
    """Recomputes the steps from the last checkpoint before --replay-step up to that step. Changes nothing on disk."""
    logged = world.on_main(lambda: logged_loss(folder.path, config.replay_step))
    log, trainer, _, start = set_up(config, world, folder)
    checks.check_compiled(trainer, start, log)
    last = config.replay_step
    clock = world.on_main(lambda: logged_clock(folder.path, start, last)) if config.max_seconds else {}
    log.progress(f"recomputing steps {start} to {last} from {f'the checkpoint of step {start}' if start else 'the start'}")
    for step in range(start, last + 1):
        trainer.budget.elapsed = clock.get(step, 0.0)
        update = trainer.update(step)
    for rank, loss in enumerate(update.losses):
        first = trainer.train_stream.place(trainer.positions(step, rank)[0][0])
        log.result(f"step {step}, rank {rank}: loss {loss!r}, first sequence {first}")
    log.result(f"step {step}: loss {update.loss!r}, gradient norm {update.norm!r}{', skipped: ' if update.skipped else ''}{update.skipped}")
    if logged is None:
        log.result("the log has no such step")
    elif logged == update.loss or not (math.isfinite(logged) or math.isfinite(update.loss)):
        log.result("the same as in the log")
    else:
        same = f"equal bits need the same world size, micro batch, hardware, code and torch: see {run_json.RUN}"
        log.result(f"in the log: {logged!r}; {same}")
        sys.exit(1)


def find_data(config: TrainConfig) -> Shards:
    """Returns the shards of --data-dir. The quickstart's first start makes its own."""
    own = config.preset == "quickstart" and config.data_dir == PRESETS["quickstart"].data_dir
    if own and not Path(config.data_dir, MANIFEST).exists():
        fineweb.prepare(fineweb.PrepareConfig(dataset=("stdlib",), tokenizer="bytes", out_dir=config.data_dir, workers=1))
    return open_shards(config.data_dir)


def set_up(config: TrainConfig, world: DistContext, folder: RunFolder, log=Log) -> tuple[Log, Trainer, Checkpoints, int]:
    """Checks everything, then builds or loads the model. Returns log, trainer, checkpoints and the first step. log: the class to use."""
    log, out_dir = log(config, world, folder), Path(config.out_dir)
    if config.replay_step is None and not config.rehearse:
        world.on_main(lambda: checkpoint.recover_interrupted_save(out_dir))
    shards = world.on_main(lambda: checks.check_data(config, find_data(config)))
    world.on_all(lambda: checks.check_host(config, world, shards))
    world.on_main(lambda: checks.check_dtype(config, world))
    world.on_main(lambda: checks.check_tasks(config))
    config.model = world.on_main(lambda: checks.fit_vocabulary(config, shards))
    world.on_main(lambda: checks.check_memory(config, world))
    if config.teacher:
        checks.check_teachers(config, world, shards)
    step = world.on_main(lambda: checkpoint.newest_step(out_dir, config.replay_step)) if config.resume else None
    world.on_main(lambda: checks.check_checkpoint(config, step))

    torch.manual_seed(config.seed)
    lines = flags.warnings(config) + checks.thread_warnings(world.device)
    if config.init_from and step is None:
        model, _ = checkpoint.load_gpt(config.init_from, config.init_revision)
        lines += flags.overridden_preset(config, model.config)
        model = variants.adapt(model, config.model)
    else:
        model = variants.build(config.model)
    problem = device.compile_problem(world.device) if config.compile else ""
    if problem:
        without = "without torch.compile" + (", keeping all activations" if 0 < config.activation_memory < 1 else "")
        log.progress(f"warning: running {without}, which is slower: {problem}")
    trainer = Trainer(config, world, model, shards, config.compile and not problem, load_teachers(config))
    checkpoints = Checkpoints(trainer, folder, log)
    if step is not None:
        checkpoints.load(step)
    world.on_all(lambda: fetch_ahead(trainer, step or 0))
    if config.resume:
        log.progress(world.on_main(lambda: resume_notice(out_dir, step)))
    for line in lines:
        log.progress(f"warning: {line}")
    log.progress(describe(trainer))
    return log, trainer, checkpoints, step or 0


def fetch_ahead(trainer: Trainer, step: int):
    """Begins to copy what the run reads from a step on, if the shards are in a bucket. One process of each host does it."""
    batch = trainer.config.total_batch_tokens // trainer.config.model.seq_len
    if trainer.world.first_on_host:
        trainer.shards.fetch_ahead(trainer.train_stream.needed(step * batch, trainer.config.max_steps * batch))


def load_teachers(config: TrainConfig) -> list[GPT]:
    return [checkpoint.load_gpt(path)[0].requires_grad_(False) for path in config.teachers]


def describe(trainer: Trainer) -> str:
    """Describes the run in one line, before its first step."""
    config, world, model = trainer.config, trainer.world, trainer.model
    active = f" ({model.num_params() - variants.idle_params(model):,} of them active)" if config.model.n_expert > 1 else ""
    return (
        f"{model.num_params():,} parameters{active}, {str(trainer.dtype)[6:]} on {world.size} × {world.device.type}; a step is "
        f"{config.total_batch_tokens:,} tokens, {config.grad_accum_steps(world.size)} passes of {config.micro_batch_size} × "
        f"{config.model.seq_len} per process; an epoch is {trainer.train_stream.sequences_per_epoch * config.model.seq_len:,} tokens"
    )


def claim_folder(folder: RunFolder, given: TrainConfig, stack: ExitStack) -> TrainConfig:
    """Locks --out-dir until the stack closes. Only then reads the settings, since another launch may have changed the folder before."""
    if given.replay_step is None:
        folder.held = stack.enter_context(lock_folder(folder.path))
        stack.enter_context(mirror.opened(folder, given))
    config = flags.parse_config()
    launch = launched()
    config.validate(launch.size if launch else 1)
    if given.replay_step is None:
        failure.count_launch(folder.path)
    return config


def main():
    try:
        with exit_without_others():
            launch()
    finally:
        if StopSignal.hard_exit:
            StopSignal.hard_exit.cancel()


def launch():
    with cli.one_line_errors(if_memory_runs_out=LOWER_MEMORY), failure.recorded():
        given = flags.parse_flags()  # an unknown flag ends every process here
        if given.plan:
            print(report(flags.parse_config()))
            return
        raise_errors(cli.at_least(0.01, given, "timeout_minutes") + cli.at_most(10**6, given, "timeout_minutes"))
        if given.rehearse:
            sys.exit(rehearse(given, find_data, set_up))
        try:
            with ExitStack() as stack:
                folder = RunFolder(Path(given.out_dir))
                config, store = rendezvous(lambda: claim_folder(folder, given, stack), given.timeout_minutes)
                folder.path = Path(config.out_dir)  # rank 0's flags count
                with join_world(config.device, config.timeout_minutes, store) as world:
                    run = replay if config.replay_step is not None else train
                    run(config, world, folder)
        except checkpoint.SaveError as e:
            if not getattr(e, "is_shared", False):
                remedy = "free some space" if cli.REMEDIES.get(e.errno) == cli.FULL else cli.REMEDIES.get(e.errno, "check the folder")
                cli.say(f"error: {e}: {remedy}, then --resume --out-dir {shlex.quote(str(folder.path))}")
            sys.exit(1)


if __name__ == "__main__":
    main()
