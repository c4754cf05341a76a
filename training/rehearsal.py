"""train.py --rehearse: tries everything that a run will do, as briefly as possible, and prints what is wrong and what the run will cost.

Each check prints one line. After a failure the others go on, as far as they can. Trainer, evaluations and saves are the run's own.
What they write goes into a temporary folder beside --out-dir, and under --remote below a name that no run uses. Both are deleted at the
end.
"""

import errno
import math
import os
import platform
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import files_of
from common import cli, device
from common.device import ASSUMED_MFU
from common.distributed import DistContext, PeerLost, join_world, launched, rendezvous
from common.remote import Remote
from common.run_folder import RUN, RunFolder, run_id
from common.shards import Shards
from dataloader import TokenStream
from training import checks, cost, flags, run_json
from training.bucket import Bucket
from training.config import SMALLER_MODEL, TrainConfig, divisors
from training.evaluation import Evaluation
from training.failure import Hopeless
from training.measuring import QuietLog, Steps, all_reduce_seconds, product_rate, time_evaluations, timed
from training.memory import CUDA_ITSELF, Setting, memory
from training.mirror import check_owner
from training.saving import Checkpoints
from training.trainer import Trainer
from variants import build_on_meta

COME = 1.0  # minutes for all ranks to come
LEFT = 3.0  # seconds for ranks that lost another one to say that they are there
SLOW = {True: 0.8, False: 0.5}  # a GPU below this part of the median speed is slow; a CPU, which other programs use too
PRODUCTS_TAKE = 0.5  # seconds of matrix products
SENT = 200_000_000  # bytes to send to the bucket and back, at most


def rehearse(given: TrainConfig, find_data, set_up) -> int:
    """Rehearses the run that these flags start. Returns the exit status: 2 on rank 0 if something is wrong, else 0. Other ranks return 0
    even then: torchrun stops all once one fails, and rank 0 may still be printing. find_data, set_up: train.py's."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        sys.exit(2)  # torchrun --max-restarts: once is enough
    cli.exit_on_stop_signals()
    minutes = min(given.timeout_minutes, COME)
    try:
        config, store = rendezvous(lambda: settings(given), minutes)
    except PeerLost as e:
        raise ValueError(f"not all ranks came within {60 * minutes:.0f} s: {e}") from None
    report = Report(config, store)
    try:
        with join_world(config.device, config.timeout_minutes, store) as world:
            Rehearsal(config, world, report, find_data, set_up).run()
    except Hopeless as e:
        report.fail_alone("steps", e.reason)
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        if cli.out_of_memory(e):
            report.fail_alone("memory", f"out of memory ({cli.first_line(e)}): {lower_memory(config)}")
        elif isinstance(e, ValueError | OSError):
            report.fail_alone("run", cli.with_remedy(e))
        else:
            raise
    except (PeerLost, SystemExit) as e:
        report.find_missing(e)
    report.print_page()
    return 2 if report.wrong and report.rank == 0 else 0


def settings(given: TrainConfig) -> TrainConfig:
    """Returns the run's settings. ValueError if they are wrong, or if the run to resume is only in the bucket."""
    if given.replay_step is not None:
        raise ValueError("--rehearse and --replay-step don't work together: drop one")
    elsewhere = given.resume and given.remote and not Path(given.out_dir, RUN).exists()
    if elsewhere and Bucket(Remote(given.remote)).runs:
        raise ValueError(
            f"the run in {given.remote} is not in {given.out_dir}, and --rehearse does not download it: rehearse with the flags that "
            "started it, without --resume and with another --remote"
        )
    config = flags.parse_config()
    launch = launched()
    config.validate(launch.size if launch else 1)
    if config.remote:
        Remote(config.remote)  # a wrong URL or a missing package
    return config


# ---- the report ----


class Report:
    """What was found. Rank 0 prints each line as it comes, and at the end one page."""

    def __init__(self, config: TrainConfig, store):
        launch = launched()
        self.config, self.store, self.rank, self.size = config, store, launch.rank if launch else 0, launch.size if launch else 1
        self.wrong: list[str] = []
        self.notes: list[str] = []
        self.parts: list[cost.Part] = []
        self.facts: dict[str, str] = {}

    def show(self, text: str = ""):
        if self.rank == 0:
            print(text, flush=True)

    def ok(self, name: str, text: str):
        self.show(f"{name:<13}ok     {text}")

    def fail(self, name: str, text: str):
        if f"{name}: {text}" not in self.wrong:
            self.wrong.append(f"{name}: {text}")
            self.show(f"{name:<13}WRONG  {text}")

    @contextmanager
    def check(self, name: str):
        """Reports an error of the block, which all ranks share, and continues after it."""
        try:
            yield
        except (ValueError, OSError) as e:
            self.fail(name, cli.with_remedy(e))

    def note(self, name: str, lines: list[str]):
        """Reports what is probably not intended."""
        for line in lines:
            self.notes.append(f"{name}: {line}")
            self.show(f"{name:<13}note   {line}")

    def fail_alone(self, name: str, text: str):
        """Reports an error that the other ranks don't share: they wait for this one, until it leaves them."""
        if self.rank == 0:
            self.fail(name, text)
            self.missing()
            return
        with suppress(RuntimeError):  # rank 0 has ended, and the store with it
            self.store.set("trouble", f"{name}\n{text}, on rank {self.rank}")
            self.missing()
        raise SystemExit  # rank 0 says it

    def missing(self) -> set[int]:
        """Says that this rank is there, and returns the ranks that don't say so."""
        others, end = set(range(self.size)) - {self.rank}, time.monotonic() + LEFT
        if self.store:
            self.store.set(f"{self.rank} is left", "")
        while others and time.monotonic() < end:
            others = {rank for rank in others if not self.store.check([f"{rank} is left"])}
            time.sleep(0.02)
        return others

    def find_missing(self, e: PeerLost | SystemExit):
        """Reports which rank this one lost, if one is lost."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: it now stops all
        try:
            gone = self.missing() if self.store else set()
            trouble = self.store.get("trouble").decode() if self.store and self.store.check(["trouble"]) else ""
        except RuntimeError:  # rank 0 has ended, and the store with it
            raise e from None
        if self.rank and 0 not in gone and (gone or trouble):
            raise SystemExit  # rank 0 says it
        if trouble:
            self.fail(*trouble.split("\n"))
        elif gone:
            names = f"rank {', '.join(map(str, sorted(gone)))}"
            self.fail("ranks", f"{names} died or hangs, see its own messages: look at that machine's memory and at nvidia-smi")
        else:
            raise e

    def print_page(self):
        """Prints the page: cost, needs, and once more what is wrong."""
        if self.parts:
            self.show("\n" + "\n".join(cost.table(self.parts, self.config.price * self.size)))
        self.show()
        for name, text in self.facts.items():
            self.show(f"{name:<13}{text}")
        for kind, lines in (("note", self.notes), ("wrong", self.wrong)):
            for line in lines:
                self.show(f"{kind:<13}{line}")
        if not self.wrong:
            self.show(f"{'wrong':<13}nothing")


# ---- the checks, in order ----


class Rehearsal:
    """One rank's part of a rehearsal."""

    def __init__(self, config: TrainConfig, world: DistContext, report: Report, find_data, set_up):
        self.config, self.world, self.report, self.find_data, self.set_up = config, world, report, find_data, set_up
        self.tried = replace(config, verify_shards=False, checkpoint_minutes=0)  # checked once is enough
        self.shards, self.has_tasks, self.scratch, self.files = None, False, None, []
        self.extra, self.upload = 0.0, 0.0  # seconds: of what no run does, of the last upload

    def run(self):
        check_ranks(self.world, self.report)
        self.check_speed()
        reduce = self.check_links()
        self.check_files()
        with ExitStack() as stack:
            with self.report.check("folder"):
                self.scratch = self.world.on_main(lambda: stack.enter_context(scratch(Path(self.config.out_dir))))
            if self.scratch and self.shards and self.start():
                stack.callback(self.checkpoints.saver.wait)  # its thread must not write into a folder that is gone
                self.train(reduce)
                self.evaluate()
                self.save()
            if self.scratch and self.config.remote:
                self.send()
            if self.files:
                self.calculate()

    def check_speed(self):
        """Compares each process's matrix products with the median and with the card's data sheet."""
        world, report = self.world, self.report
        dtype = device.pick_dtype(self.config.dtype, world.device)
        world.gather(None)
        found = world.gather((product_rate(world.device, dtype, PRODUCTS_TAKE), device.describe(world.device), platform.node()))
        self.extra += PRODUCTS_TAKE
        for line in (slow := slow_ranks(found, dtype, world.device.type)):
            report.fail("speed", line)
        if not slow:
            rates = f"{min(found)[0] / 1e12:.3g} to {max(found)[0] / 1e12:.3g} TFLOP/s in {str(dtype)[6:]}"
            report.ok("speed", f"{rates}; {cli.some(sorted({name for _, name, _ in found}), 2)}")

    def check_links(self) -> float:
        """Returns the seconds of an all-reduce of the gradients."""
        numbers, n = sum(p.numel() for p in build_on_meta(self.config.model).parameters()), self.world.size
        if n == 1:
            self.report.ok("links", "one process needs none")
            return 0.0
        began = time.perf_counter()
        seconds = all_reduce_seconds(self.world, numbers)
        self.extra += time.perf_counter() - began
        size = 4 * numbers
        rate = 2 * (n - 1) / n * size / seconds  # bytes that each process sends
        self.report.ok(
            "links", f"{rate / 1e9:.3g} GB/s; an all-reduce of the gradients, {size / 1e6:,.1f} MB, takes {seconds * 1e3:,.4g} ms"
        )
        return seconds

    def check_files(self):
        """Checks shards and files of tasks. A damaged shard is good enough for the rest."""
        config, world = self.config, self.world
        with self.report.check("shards"):
            self.shards = world.on_main(lambda: self.find_data(config))
            world.on_main(lambda: checks.check_data(config, self.shards) and None)
            world.on_all(lambda: checks.check_host(config, world, self.shards))
            self.report.ok("shards", world.on_main(lambda: amount(config, self.shards)))
        with self.report.check("tasks"):
            world.on_main(lambda: checks.check_tasks(config))
            self.has_tasks = True
        if not self.has_tasks:
            self.tried.hellaswag_every, self.tried.eval_every, self.tried.eval_tasks = 0, 0, ()

    def start(self) -> bool:
        """Builds or loads the model, as the run does. Returns whether that worked."""
        report, world, config = self.report, self.world, self.config
        with report.check("start"):
            log, trainer, _, first = self.set_up(self.tried, world, RunFolder(Path(config.out_dir)), QuietLog)
            about = log.said[-1:]
            report.note("start", log.warnings())
            if limits := trainer.budget.limits_reached(first):
                raise ValueError(f"the run in {config.out_dir} is finished, at step {first}: raise {' and '.join(limits)}")
            config.model = self.tried.model  # with the shards' vocabulary
            folder = RunFolder(self.scratch)
            self.trainer, self.first, self.log = trainer, first, QuietLog(self.tried, world, folder)
            self.checkpoints = Checkpoints(trainer, folder, self.log)
            self.evaluation = Evaluation(trainer, self.log, stopped=lambda: False)
            run_json.code_now()  # the run records it
            self.starting = max(0.0, seconds_since_start() - self.extra)
            self.compiling = -time.perf_counter()
            checks.check_compiled(trainer, first, self.log)
            self.compiling += time.perf_counter()
            report.ok("start", f"{self.starting:.1f} s until the first step; {''.join(about).partition(';')[0]}")
            if self.report_warnings("tasks") and self.has_tasks:
                report.ok("tasks", described(self.evaluation))
            return True
        return False

    def report_warnings(self, name: str) -> bool:
        """Reports what the run would only warn about. Returns whether there was nothing."""
        found = self.world.copy(self.log.warnings)
        for text in found:
            self.report.fail(name, text)
        return not found

    def train(self, reduce: float):
        """Measures steps. reduce: seconds of the gradients' all-reduce."""
        world, config, report = self.world, self.config, self.report
        steps = Steps(self.trainer, self.log, self.checkpoints, self.first)
        self.step = steps.measure(config.total_batch_tokens)
        self.compiling += world.copy(lambda: steps.compiling)
        self.last, self.next = cost.steps_of(config, self.step, self.first, self.trainer.budget.elapsed), steps.next
        rate = config.total_batch_tokens / self.step
        if self.report_warnings("steps"):
            report.ok("steps", f"{steps.next - self.first} done, {self.step:.4g} s each, {rate:,.0f} tokens/s")
        if world.copy(self.shards.missing_bytes):
            report.note("steps", ["measured while shards arrive from the bucket: later steps are faster, and cost less"])
        if world.device.type == "cuda" and reduce > 0.5 * self.step:
            report.fail("links", f"the gradients' all-reduce takes {reduce / self.step:.0%} of a step: rent GPUs with faster links")

    def evaluate(self):
        """Measures each kind of evaluation that the run does, and the memory of all until then."""
        self.each, once = {}, 0.0
        for name, seconds in time_evaluations(self.evaluation):
            if self.report_warnings(name):
                self.each[name] = seconds.each
                once += seconds.once
                self.report.ok(name, f"{seconds.each:.4g} s each")
        self.compiling += self.world.copy(lambda: once)
        self.plotting = timed(self.world, self.evaluation.plot)
        self.report_warnings("plot")
        self.report.facts["memory"] = memory_used(self.world)
        self.report.ok("memory", self.report.facts["memory"])

    def save(self):
        """Measures saves, and checks that a run which resumes one has the same loss."""
        checkpoints, world, report, folder = self.checkpoints, self.world, self.report, Path(self.scratch)
        waits, wholes = [], []
        with report.check("save"):
            while len(waits) < 3 and sum(wholes) < 2:
                waits.append(timed(world, lambda: checkpoints.save(self.next, None)))
                wholes.append(waits[-1] + timed(world, lambda: world.on_main(checkpoints.saver.finish)))
            self.files = files_of(folder, self.next)[:2]
        self.waits, self.whole = statistics.median(waits), statistics.median(wholes or waits)
        if not self.files:
            return
        self.size = world.on_main(lambda: sum(path.stat().st_size for path in self.files))
        self.parts = cost.parts_of(self.config, self.first, self.last, self.step, self.each, self.waits)
        self.need = cost.disk_bytes(self.config, self.size, self.first, self.last, self.parts[-1].times)
        report.ok("save", f"{self.size / 1e6:,.1f} MB; training waits {self.waits:.3g} s, {self.whole:.3g} s until it is on the disk")
        with report.check("disk"):
            report.facts["disk"] = world.on_main(lambda: check_disk(self.config, folder, self.need, self.shards))
            report.ok("disk", report.facts["disk"])
        with report.check("resume"):
            report.ok("resume", check_resume(self.trainer, self.checkpoints, self.next))

    def send(self):
        """Sends a part of the checkpoint to the bucket and back; if there is none, other bytes."""
        config, report = self.config, self.report
        with report.check("remote"):
            up, down, left = self.world.on_main(lambda: exchange(config, self.files[0] if self.files else None))
            if self.files:
                self.upload = self.size / up
                report.facts["bucket"] = (
                    f"{self.need / 1e6:,.1f} MB at most; a checkpoint of {self.size / 1e6:,.1f} MB takes {self.upload:,.1f} s"
                )
            report.ok("remote", f"{up / 1e6:,.1f} MB/s to it, {down / 1e6:,.1f} MB/s from it")
            if self.upload > config.notice_seconds:
                long = f"a checkpoint takes {self.upload:,.0f} s, longer than --notice-seconds: one saved on SIGTERM would be lost"
                report.note("remote", [long])
            if left:
                raise ValueError(left)

    def calculate(self):
        """Puts the run's cost together."""
        config, facts, steps, tokens = self.config, self.report.facts, self.last - self.first, self.config.total_batch_tokens
        parts = [cost.Part("start", 1, self.starting), cost.Part("compiling, first times", 1, max(0.0, self.compiling))]
        parts += self.parts
        parts.append(cost.Part("last save and plot", 1, self.whole - self.waits + self.plotting))
        if config.remote:
            parts.append(cost.Part("last upload", 1, self.upload))
        seconds = sum(part.seconds for part in parts)
        self.report.parts = parts
        first = {"run": f"{steps:,} steps of {tokens:,} tokens, {steps * tokens:,} in all, on {self.world.size} × {self.world.device.type}"}
        first["tokens/s"] = f"{tokens / self.step:,.0f} in a step, {steps * tokens / seconds:,.0f} over the whole run"
        money = f", {seconds / 3600 * self.world.size * config.price:,.2f} $ at {config.price:g} $ per GPU and hour" if config.price else ""
        first["in all"] = f"{cost.duration(seconds)}{money}"
        self.report.facts = first | facts


# ---- parts of the checks ----


@contextmanager
def scratch(out_dir: Path):
    """Yields a new folder beside --out-dir, on the same disk; in it, if it is a disk of its own. Deletes it at the end."""
    out_dir = out_dir.resolve()
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"--out-dir {out_dir} is a file: choose another one")
    if out_dir.exists() and not os.access(out_dir, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out_dir))
    parent = next(path for path in out_dir.parents if path.is_dir())
    if out_dir.is_dir() and (not os.access(parent, os.W_OK) or parent.stat().st_dev != out_dir.stat().st_dev):
        parent = out_dir
    folder = Path(tempfile.mkdtemp(prefix=f"{out_dir.name}-rehearsal-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def seconds_since_start() -> float:
    """Returns the seconds since this process or its torchrun began; 0.0 if the system doesn't tell."""
    pid = os.getppid() if run_json.torchrun_id() else os.getpid()
    try:
        began = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def check_ranks(world: DistContext, report: Report):
    hosts = world.gather(platform.node())
    where = cli.some([f"{hosts.count(host)} on {host}" for host in dict.fromkeys(hosts)])
    report.ok("ranks", f"{world.size} of {world.size}: {where}")
    gpus = torch.cuda.device_count() if world.device.type == "cuda" else 0
    if gpus > processes_here():
        report.note("ranks", [f"this machine has {gpus} GPUs: torchrun --standalone --nproc_per_node={gpus} uses them all"])


def described(evaluation: Evaluation) -> str:
    """Names what the evaluations of a run use."""
    tokenizer = f"tokenizer {evaluation.trainer.shards.tokenizer}"
    hellaswag = [f"{len(evaluation.tasks):,} tasks of HellaSwag"] if evaluation.tasks else []
    others = [f"{sum(len(task.gold) for task in evaluation.eval_tasks):,} questions of --eval-tasks"] if evaluation.eval_tasks else []
    return ", ".join([tokenizer, *hellaswag, *others])


def slow_ranks(found: list[tuple[float, str, str]], dtype: torch.dtype, kind: str) -> list[str]:
    """Names the ranks that are far below the median speed, or whose card can't train at the speed that --plan assumes. found: FLOP/s,
    hardware and host of each. kind: cuda or another type of device."""
    lines, median = [], statistics.median(rate for rate, _, _ in found)
    for rank, (rate, name, host) in enumerate(found):
        card = device.card_of(name) if kind == "cuda" else None
        peak = device.peak_of(card, dtype) if card else 0.0
        expected = f"the median is {median / 1e12:.3g}" if rate < SLOW[kind == "cuda"] * median else ""
        if not expected and rate < ASSUMED_MFU * peak:
            expected = f"{rate / peak:.0%} of the {card}'s peak"
        if expected:
            remedy = "look for other programs, heat and power limits (nvidia-smi -q -d PERFORMANCE)" if card else "close other programs"
            lines.append(f"rank {rank}, {name} on {host}, reaches {rate / 1e12:.3g} TFLOP/s, {expected}: {remedy}, or change the machine")
    return lines


def amount(config: TrainConfig, shards: Shards) -> str:
    """Says how many tokens there are, and how often the run reads them. ValueError if there are too few for one sequence."""
    stream = TokenStream(shards, "train", config.model.seq_len)
    TokenStream(shards, "val", config.model.seq_len)
    wanted = config.max_steps * config.total_batch_tokens
    epochs = wanted / (stream.sequences_per_epoch * config.model.seq_len)
    return f"{len(shards.entries):,} shards, {int(stream.ends[-1]):,} tokens to train on; the run reads them {epochs:,.2f} times"


def processes_here() -> int:
    """Returns how many processes share this host's memory."""
    launch = launched()
    return (launch.local_size or 1) if launch else 1


def memory_used(world: DistContext) -> str:
    """Says how much memory the process that needs most has used, and by how much it fits."""
    sharing = 1 if world.device.type == "cuda" else processes_here()
    found = world.gather((device.peak_memory(world.device), device.total_memory(world.device) / sharing))
    peak, total = max(found, key=lambda each: each[0] / each[1])
    return f"at most {peak / 1e9:,.2f} of {total / 1e9:,.1f} GB per process: {(total - peak) / 1e9:,.2f} GB to spare"


def lower_memory(config: TrainConfig) -> str:
    """Names the largest smaller micro batch that fits by --plan's calculation."""
    here = device.pick_device(config.device, warn=False)
    dtype, size = device.pick_dtype(config.dtype, here), launched().size if launched() else 1
    compiled, shard = config.compile and device.can_compile(here), config.shard and size > 1
    setting = Setting(here.type, dtype.itemsize, compiled, size, shard, dtype == torch.float16)
    available = device.total_memory(here) - CUDA_ITSELF if here.type == "cuda" else device.total_memory(here) / processes_here()
    model, sequences = build_on_meta(config.model), config.total_batch_tokens // (config.model.seq_len * size)
    for batch in (b for b in divisors(sequences)[::-1] if b < config.micro_batch_size):
        if memory(replace(config, micro_batch_size=batch), setting, model).peak <= available:
            return f"--micro-batch-size {batch} fits by calculation"
    return "lower --activation-memory" if config.activation_memory > 0 else f"{SMALLER_MODEL}, or --shard it over more processes"


def check_disk(config: TrainConfig, folder: Path, need: int, shards: Shards) -> str:
    """Says how much space checkpoints need, and how much there is beside the shards that are still to come. The rehearsal's own checkpoints
    count as free, and so do those that the resumed run will delete. ValueError if it is too little."""
    out_dir = Path(config.out_dir)
    old = [path for place in ([out_dir] * (config.keep > 0) + [folder]) for path in place.glob("*.pt")]
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in old)
    if (coming := shards.missing_bytes()) and shards.folder.stat().st_dev == folder.stat().st_dev:
        free -= coming
    if need > free:
        raise ValueError(f"checkpoints need up to {need / 1e6:,.1f} MB, {out_dir} has {free / 1e6:,.1f} MB: {cli.FULL}, or lower --keep")
    return f"{need / 1e6:,.1f} MB at most for checkpoints, {free / 1e6:,.1f} MB there"


def check_resume(trainer: Trainer, checkpoints: Checkpoints, step: int) -> str:
    """Repeats two steps from a checkpoint, on weights that were wiped before. ValueError if the losses differ. On a GPU, the second one
    may differ a little: it sums gradients in any order."""
    config = trainer.config
    config.total_batch_tokens = config.micro_batch_size * config.model.seq_len * trainer.world.size
    before = [trainer.update(step + i).losses for i in range(2)]
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.zero_()
    checkpoints.load(step)
    after = [trainer.update(step + i).losses for i in range(2)]
    tolerance = 0.0 if trainer.device.type == "cpu" else 0.01
    near = all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(before[1], after[1], strict=True))
    if before[0] != after[0] or not near:
        raise ValueError(
            f"the losses of two steps are {before}, and after a resume {after}: look for hardware errors, and try --no-compile"
        )
    return f"the same loss after a save and a load: {sum(after[0]) / len(after[0]):.6f}"


def exchange(config: TrainConfig, file: Path | None) -> tuple[float, float, str]:
    """Sends bytes to --remote and reads them back. Returns the bytes per second in both directions, and what could not be deleted."""
    remote, out_dir, name = Remote(config.remote), Path(config.out_dir), f"rehearsal-{secrets.token_hex(8)}"
    check_owner(Bucket(remote), run_id(out_dir), out_dir, config.resume)
    data, new = first_bytes(file), not remote.exists()
    try:
        began = time.perf_counter()
        remote.put(data, f"{name}/bytes")
        middle = time.perf_counter()
        same = remote.read(f"{name}/bytes") == data
        end = time.perf_counter()
        if not same:
            raise ValueError(f"{remote.url} returned other bytes than were sent: check the store, or choose another --remote")
    finally:
        left = clean(remote, name, new)
    return len(data) / (middle - began), len(data) / (end - middle), left


def first_bytes(file: Path | None) -> bytes:
    if file is None:
        return os.urandom(2**20)
    with open(file, "rb") as opened:
        return opened.read(SENT)


def clean(remote: Remote, name: str, new: bool) -> str:
    """Deletes what exchange has sent. Says so if that fails. new: whether the remote folder was not there before."""
    try:
        for each in ("bytes", f"bytes{remote.temporary}"):
            remote.delete(f"{name}/{each}")
    except ValueError as e:
        return f"{e}; it still has {name}: delete it"
    remote.delete_folder(name)
    if new:
        remote.delete_folder()
    return ""
