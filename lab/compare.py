"""Compares ideas at equal tokens: trains each variant with several seeds, in turns, and prints one table.

python -m lab.compare "plain=" "rope=--pos rope" --flags="--preset quickstart"
python -m lab.compare --suite modern --data-dir webdocs_bytes    # preset modern against gpt2, each with its own learning rates
"""

import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro

import checkpoint
from common import cli
from common.device import can_compile, pick_device
from common.distributed import DistContext
from common.picture import draw_or_warn, picture
from common.shards import find_shards
from common.validation import raise_errors
from dataloader import TokenStream
from lab.runs import code_notes, data_notes, environment, machine_notes, refuse_unless, shortened
from model import GPT
from ops.kv_cache import KVCache
from plot_log import read_metrics
from train import find_data, load_teacher
from training.config import TrainConfig
from training.flags import parse_flags, raise_if_changed, recorded_teacher
from training.run_json import RUN, code_now, read_run
from training.trainer import Trainer
from variants import VariantConfig, adapt, build, build_on_meta, idle_params


@dataclass
class CompareConfig:
    """Train variants and compare them."""

    variants: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """NAME=FLAGS of train.py, each in quotes. The others are compared with the first."""
    flags: str = ""
    """Flags of train.py for all variants. Write --flags="…", with the equals sign."""
    suite: Literal["none", "switches", "without", "modern", "rates", "experts", "teacher", "length"] = "none"
    """A ready-made comparison of small models. Two CPU cores train each in minutes."""
    data_dir: str = "webdocs_bytes"
    """Byte shards for a suite."""
    out_dir: str = "log/compare"
    """Gets a folder for each run. Finished runs in it are kept, stopped runs resume."""
    seeds: int = 3
    """Runs of each variant, with seeds 1, 2, …"""
    workers: int = 1
    """Runs at a time. With several GPUs, each run gets one. More than 1 disturbs the logged speeds: measure them with --time-steps."""
    time_steps: int = 0
    """At the end, time this many steps of each variant, in turns, with all models in memory. 0: take the speeds from the logs."""
    mixed: bool = False
    """Also use finished and stopped runs of other code or other data. The table names them. Without it, they are refused."""
    json: bool = False
    """Print JSON instead of a table."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(1, self, "seeds", "workers") + cli.at_least(0, self, "time_steps")
        if (self.suite == "none") == (not self.variants):
            errors.append('give either variants, such as "plain=" "rope=--pos rope" --flags="--preset quickstart", or --suite')
        folders = [folder_of("", variant.split("=")[0], 1) for variant in self.variants]
        errors += [f"{variant!r} is not NAME=FLAGS" for variant in self.variants if "=" not in variant or not variant.split("=")[0]]
        if len(set(folders)) < len(folders):
            errors.append(f"two variants would share a folder, rename one: {', '.join(str(folder.parent) for folder in folders)}")
        if self.suite == "teacher" and self.workers > 1:
            errors.append("the teacher must finish before its students start: leave out --workers")
        raise_errors(errors)


# 0.9 M parameters, 1.6 M bytes in 800 steps
SMALL = (
    "--n-layer 4 --n-head 4 --n-embd 128 --seq-len 256 --vocab-size 257 --total-batch-tokens 2048 --micro-batch-size 8 --warmup-steps 40 "
    "--max-steps 800 --val-every 0 --val-tokens 262144 --hellaswag-every 0 --sample-every 0 --checkpoint-every 0 --keep 1"
)
# --suite rates searches for these learning rates and momenta
ADAMW = "--preset gpt2 --max-lr 4e-3 --min-lr-ratio 0.02"
MODERN = "--preset modern --muon-momentum 0.85"
ROPE = f"{ADAMW} --pos rope"  # GPT-2's learned positions have hardly begun to work by step 800
# a name always means the same run: suites with the same --out-dir share it
SUITES = {
    "switches": {  # each switch alone, on top of rope
        "gpt2": ADAMW,
        "rope": ROPE,
        "rope, 2 KV heads": f"{ROPE} --n-kv-head 2",
        "rope, 1 KV head": f"{ROPE} --n-kv-head 1",
        "rope, window 64": f"{ROPE} --window 64",
        "rope, window 64 in 3 of 4": f"{ROPE} --window 64 --window-pattern SSSL",
        "rope, 4 experts, 1 at work": f"{ROPE} --n-expert 4",
        "rope, QK-norm": f"{ROPE} --qk-norm",
        "rope, RMSNorm": f"{ROPE} --norm rmsnorm",
        "rope, ReLU²": f"{ROPE} --mlp relu2",
        "rope, SwiGLU": f"{ROPE} --mlp swiglu",
        "rope, no biases": f"{ROPE} --no-bias",
        "rope, untied head": f"{ROPE} --no-tied-head",
        "rope, value residual": f"{ROPE} --value-residual",
        "rope, documents apart": f"{ROPE} --doc-mask",
        "rope, layers shared by twos": f"{ROPE} --share-layers 2",
        "rope, 2 layers": f"{ROPE} --n-layer 2",
        "rope, wsd": f"{ROPE} --schedule wsd",
        "rope, average": f"{ROPE} --ema 0.99",
        "rope, muon": f"{ROPE} --optimizer muon",
        "modern": MODERN,
    },
    "without": {  # modern with one part left out or replaced
        "modern, 400 steps": f"{MODERN} --max-steps 400",
        **{
            f"modern, 400 steps, {name}": f"{MODERN} --max-steps 400 {flags}"
            for name, flags in {
                "learned positions": "--pos learned",
                "no QK-norm": "--no-qk-norm",
                "LayerNorm": "--norm layernorm",
                "GELU": "--mlp gelu",
                "ReLU²": "--mlp relu2",
                "biases": "--bias",
                "tied head": "--tied-head",
                "no value residual": "--no-value-residual",
                "cosine": "--schedule cosine",
                "AdamW": "--optimizer adamw --max-lr 4e-3",
            }.items()
        },
    },
    "rates": {
        **{f"gpt2, {lr}": f"{ADAMW} --max-lr {lr} --max-steps 4000" for lr in ("2e-3", "4e-3", "8e-3")},
        **{f"modern, {lr}": f"{MODERN} --muon-lr {lr}" for lr in ("0.01", "0.02", "0.04")},
        **{f"modern, AdamW's {lr}": f"{MODERN} --max-lr {lr}" for lr in ("5e-3", "2e-2")},
        **{f"modern, momentum {m}": f"{MODERN} --muon-momentum {m}" for m in ("0.8", "0.9", "0.95")},
    },
    "modern": {
        "gpt2, 4000 steps": f"{ADAMW} --max-steps 4000 --warmup-steps 100",
        **{f"modern, {steps} steps": f"{MODERN} --max-steps {steps}" for steps in (400, 500, 640)},
    },
    "experts": {  # all have the same number of active parameters, the router aside
        "rope": ROPE,
        "rope, 4 experts, 1 at work": f"{ROPE} --n-expert 4",
        "rope, 4 experts, 2 at work": f"{ROPE} --n-expert 4 --n-expert-active 2",
        "rope, 8 experts, 2 at work": f"{ROPE} --n-expert 8 --n-expert-active 2",
    },
    "teacher": {
        "alone": f"{MODERN} --n-layer 2 --n-embd 64 --n-head 2",
        "teacher": f"{MODERN} --max-steps 1200",
        "taught": f"{MODERN} --n-layer 2 --n-embd 64 --n-head 2 --teacher {{out_dir}}/teacher/{{seed}}",
    },
    "length": {
        "learned, 1200 steps": f"{ADAMW} --max-steps 1200",
        "rope, 1200 steps": f"{ROPE} --max-steps 1200",
    },
}


# ---- the runs ----

# settings that change no result
MAY_DIFFER = {"verify_shards", "timeout_minutes", "tracker", "keep", "checkpoint_every", "on_save_error"}
SCRIPT = Path(__file__).parent.parent / "train.py"


def variants_of(config: CompareConfig) -> dict[str, list[str]]:
    """Returns name → flags of train.py. The flags may contain {out_dir} and {seed}."""
    common, variants = config.flags, dict(variant.split("=", 1) for variant in config.variants)
    if config.suite != "none":
        common, variants = f"{SMALL} --data-dir {shlex.quote(config.data_dir)} {common}", SUITES[config.suite]
    words = {name: split(f"{common} {flags}") for name, flags in variants.items()}  # a variant's own flags come last and win
    reserved = ("--seed", "--out-dir", "--out_dir")
    wrong = [name for name, flags in words.items() if any(word.split("=")[0] in reserved for word in flags)]
    raise_errors([f"{name}: lab.compare sets --seed and --out-dir for each run: leave them out" for name in wrong])
    return words


def split(flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as e:
        raise ValueError(f"{e}: check the quotes and backslashes in the flags") from e


def folder_of(out_dir: str, name: str, seed: int) -> Path:
    return Path(out_dir, re.sub(r"[^\w.-]|^\.", "_", name), str(seed))


def run_of(config: CompareConfig, name: str, flags: list[str], seed: int) -> "Run":
    flags = [word.replace("{out_dir}", config.out_dir).replace("{seed}", str(seed)) for word in flags]
    return Run(name, [*flags, "--seed", str(seed)], folder_of(config.out_dir, name, seed))


class Run(NamedTuple):
    """A run of train.py in a folder of its own."""

    name: str
    flags: list[str]
    folder: Path

    def config(self) -> TrainConfig:
        """Parses and checks the flags. Exits 2 on an unknown flag. ValueError names the variant if its settings are invalid."""
        try:
            config = parse_flags(self.argv())
        except SystemExit:
            cli.say(f"error: train.py rejects the flags of {self.name!r}: correct them")
            raise
        if config.init_from:  # its weights decide the shape
            config = parse_flags(self.argv(), checkpoint.load_config(config.init_from, config.init_revision))
        try:
            config.validate(1)
            if config.plan or config.replay_step is not None or "--resume" in self.flags:
                raise ValueError("--plan, --replay-step and --resume start no new run: leave them out")
        except ValueError as e:
            raise ValueError(f"{self.name}: {e}") from e
        return config

    def argv(self, resume: bool = False) -> list[str]:
        """Returns train.py's command line, to start the run or to resume it."""
        return [*(["--resume"] if resume else self.flags), "--out-dir", str(self.folder)]

    def state(self) -> Literal["new", "begun", "finished"]:
        """Says how far the run got. ValueError if its folder has a run with other flags."""
        if not (self.folder / RUN).exists():
            return "new"
        wanted, recorded = self.config(), read_run(self.folder)
        # the shards and the hub decide these, not the flags
        wanted.model.vocab_size, wanted.init_revision = recorded.model.vocab_size, recorded.init_revision
        wanted.teacher = recorded_teacher(wanted.teacher, recorded.teacher)
        try:
            raise_if_changed(recorded, wanted, MAY_DIFFER, str(self.folder))
        except ValueError as e:
            raise ValueError(f"{self.name}: {e}, or choose another --out-dir") from e
        return "finished" if last_checkpoint(self.folder).get("step") == recorded.max_steps else "begun"


def last_checkpoint(folder: Path) -> dict:
    """Loads the newest checkpoint. Returns {} if there is none, or if it has no validation loss yet."""
    file = checkpoint.checkpoint_file(str(folder))
    content = checkpoint.load_torch(file) if file else {}
    return content if content.get("val_loss") is not None else {}


def run_all(runs: list[Run], workers: int, mixed: bool) -> list[str]:
    """Trains or resumes the runs that have not finished yet. ValueError if some are of other code or data, before and after it trains;
    with mixed, returns a note about each."""
    code, folders = code_now(), [run.folder for run in runs]
    missing, running, free = [run for run in runs if run.state() != "finished"], [], SimpleQueue()
    refuse_unless(mixed, code_notes(folders, code) + data_notes(folders))
    if stuck := data_notes([run.folder for run in missing]):
        raise ValueError(f"{shortened(stuck)}, so it can't resume: restore the data, or train all runs again in another --out-dir")
    for slot in range(workers):
        free.put(environment(workers, slot))
    pool = ThreadPoolExecutor(workers)
    cli.exit_on_stop_signals()
    try:
        done, name = pool.map(lambda run: train_one(run, running, free), missing), f"runs in {os.path.commonpath(folders)}"
        for _ in cli.bar(done, total=len(missing), desc=name, unit="run", disable=not missing):
            pass
    finally:  # on an error or a signal, start no more runs; the running ones save and exit
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()
        pool.shutdown()
    return refuse_unless(mixed, code_notes(folders, code) + data_notes(folders))  # someone may edit the code while the runs train


def train_one(run: Run, running: list[subprocess.Popen], free: SimpleQueue):
    """Trains or resumes one run in a free worker's environment. ValueError with train.py's last message if it fails."""
    argv, env = run.argv(resume=run.state() == "begun"), free.get()
    process = launch(argv, {"WANDB_RUN_GROUP": run.name} | env)  # trackers then show the seeds of a variant together
    running.append(process)
    messages = [line for line in process.communicate()[1].splitlines() if line.strip()] or ["no message"]
    running.remove(process)
    free.put(env)
    if process.returncode:
        raise ValueError(f"{run.name}: train.py {shlex.join(argv)} exited with {process.returncode}: {messages[-1]}")


def launch(argv: list[str], env: dict) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    return subprocess.Popen([sys.executable, SCRIPT, *argv], env=env, **pipes)


# ---- the results ----


def measure(folder: Path) -> dict:
    """Returns the numbers of a finished run. Loss in nats per token, memory and cache in bytes."""
    config = read_run(folder)
    metrics = read_metrics(folder / "metrics.jsonl", ["tokens_per_second", "memory_bytes", "seconds"])
    rates = list(metrics["tokens_per_second"].values())
    model = build_on_meta(config.model)
    return {
        "tokens": config.max_steps * config.total_batch_tokens,
        "val_loss": last_checkpoint(folder)["val_loss"],
        "seconds": max(metrics["seconds"].values()),
        "tokens_per_second": statistics.median(rates[len(rates) // 2 :]),  # it has compiled by then
        "memory_bytes": max(metrics["memory_bytes"].values()),
        "params": model.num_params(),
        "active_params": model.num_params() - idle_params(model),
        "cache_bytes": cache_bytes(config.model),
    }


def speeds_in_turns(folders: list[Path], steps: int, turn: int = 5) -> list[float]:
    """Measures the training speed of each run: tokens per second, from its median step.

    All runs take turns of a few steps in this process, so a machine whose speed drifts treats them alike. The last compiled run's
    device.set_malloc applies to all. That matters if variants differ in --compile or --activation-memory.
    """
    trainers, seconds = [], [[] for _ in folders]
    for folder in folders:
        config = read_run(folder)
        device = pick_device(config.device)
        compiled, teacher = config.compile and can_compile(device), load_teacher(config) if config.teacher else None
        trainers.append(Trainer(config, DistContext(device), build(config.model), find_shards(config.data_dir), compiled, teacher))
    torch._dynamo.config.recompile_limit = 10**6  # every variant compiles its own code
    turns = range(0, turn + steps, turn)  # the first turn compiles and does not count
    for start in cli.bar(turns, desc="steps in turns", unit="turn"):
        for trainer, times in zip(trainers, seconds, strict=True):
            for step in range(start, start + turn):
                began = time.perf_counter()
                trainer.update(step % trainer.config.max_steps)  # the schedule ends at max_steps
                times.append(time.perf_counter() - began)
    medians = [statistics.median(times[turn : turn + steps]) for times in seconds]
    return [trainer.config.total_batch_tokens / median for trainer, median in zip(trainers, medians, strict=True)]


def cache_bytes(config: VariantConfig) -> int:
    """Returns the bytes of the KV cache for one sequence of seq_len positions in fp32."""
    cache = KVCache(config.seq_len)
    return sum(2 * config.kv_heads * config.n_embd // config.n_head * cache.room(window) * 4 for window in config.windows)


def summary(runs: dict[str, list[dict]]) -> list[dict]:
    """Returns a row per variant: means over its seeds, and its speed relative to the first variant (median over seeds)."""
    first = next(iter(runs.values()))
    rows = []
    for name, seeds in runs.items():
        losses = [one["val_loss"] for one in seeds]
        rows.append(
            {
                "variant": name,
                **{key: seeds[0][key] for key in ("tokens", "params", "active_params", "cache_bytes")},
                "val_loss": statistics.fmean(losses),
                "spread": max(losses) - min(losses),
                "perplexity": math.exp(statistics.fmean(losses)),
                "difference": statistics.fmean(losses) - statistics.fmean(one["val_loss"] for one in first),
                "speed": statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(seeds, first, strict=True)),
                **{key: statistics.median(one[key] for one in seeds) for key in ("seconds", "tokens_per_second", "memory_bytes")},
            }
        )
    return rows


def show(rows: list[dict], seeds: int) -> str:
    lines = [
        f"| variant | parameters (active) | tokens | val loss, mean of {seeds} | spread | to the first | perplexity "
        "| tok/s | × first | memory | KV cache |",
        "| --- " * 11 + "|",
    ]
    for r in rows:
        active = f" ({r['active_params']:,})" if r["active_params"] < r["params"] else ""
        lines.append(
            f"| {r['variant']} | {r['params']:,}{active} | {r['tokens']:,} | {r['val_loss']:.4f} | {r['spread']:.4f} "
            f"| {r['difference']:+.4f} | {r['perplexity']:.3f} | {r['tokens_per_second']:,.0f} | {r['speed']:.2f} "
            f"| {r['memory_bytes'] / 1e6:,.0f} MB | {r['cache_bytes'] / 1e3:,.0f} kB |"
        )
    return "\n".join(lines)


def amount_for(loss: float, amounts: list[float], losses: list[float]) -> float | None:
    """Interpolates the tokens (or seconds) that a series of runs needs to reach a loss.

    Linear in the loss and in log(amount), between the two runs around that loss. None if no two runs are around it.
    """
    for i in range(1, len(amounts)):
        if losses[i - 1] > loss >= losses[i]:
            fraction = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
            return math.exp((1 - fraction) * math.log(amounts[i - 1]) + fraction * math.log(amounts[i]))
    return None


def tokens_to_the_same_loss(runs: dict[str, list[dict]]) -> str:
    """Says how many times fewer tokens and seconds the other variants need to reach the first variant's loss.

    The other variants are one recipe at growing lengths.
    """
    first, *series = runs.values()
    lines = []
    for unit in ("tokens", "seconds"):
        ratios = []
        for seed, one in enumerate(first):
            amount = amount_for(one["val_loss"], [runs[seed][unit] for runs in series], [runs[seed]["val_loss"] for runs in series])
            if amount is None:
                return "the series does not reach the first variant's loss, or its shortest run already beats it: choose other lengths"
            ratios.append(one[unit] / amount)
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"× fewer {unit} to the first variant's loss, seed by seed: {each}; mean {statistics.fmean(ratios):.2f}")
    return "\n".join(lines)


# ---- sequences longer than in training ----


@torch.no_grad()
def loss_by_position(model: GPT, stream: TokenStream, sequences: int) -> torch.Tensor:
    """Returns the mean loss at each position (T,), in nats per token, over sequences spread evenly over the stream."""
    available, total = stream.sequences_per_epoch, 0.0
    for i in range(sequences):
        x, y = map(torch.from_numpy, stream.batch([i * available // sequences]))
        total = total + F.cross_entropy(model(x)[0][0].float(), y[0], reduction="none")
    return total / sequences


def stretched(folder: Path, times: int, scaling: str) -> GPT:
    """Returns a run's model for sequences `times` as long as in training.

    New rows of a learned position table keep their random initialization.
    """
    model = checkpoint.load_model(str(folder))[0]
    c = model.config
    longer = replace(c, seq_len=times * c.seq_len, rope_scaling=scaling, rope_factor=float(times) if scaling != "none" else 1.0)
    if c.pos == "rope":
        model = adapt(model, longer)
        return model
    other = build(longer).eval()
    table = other.state_dict()["transformer.wpe.weight"].clone()
    table[: c.seq_len] = model.transformer.wpe.weight
    other.load_state_dict(model.state_dict() | {"transformer.wpe.weight": table})
    return other


def extrapolate(config: CompareConfig, times: int = 4, sequences: int = 64) -> list[dict]:
    """Measures loss by position up to `times` the training length: learned positions, plain rope, scaled rope."""
    curves = []
    learned, rope = SUITES["length"]
    for name, scaling in ((learned, "none"), (rope, "none"), (rope, "linear"), (rope, "ntk"), (rope, "yarn")):
        losses = []
        for seed in range(1, config.seeds + 1):
            model = stretched(folder_of(config.out_dir, name, seed), times, scaling)
            stream = TokenStream(find_shards(config.data_dir), "val", model.config.seq_len, shuffle=False)
            losses.append(loss_by_position(model, stream, sequences))
        curves.append({"variant": name if scaling == "none" else f"{name}, {scaling}", "loss": torch.stack(losses).mean(0).tolist()})
    return curves


def show_curves(curves: list[dict], parts: int = 4) -> str:
    """Returns a Markdown table: the mean loss in each of `parts` equal parts of the sequence."""
    length = len(curves[0]["loss"]) // parts
    head = " | ".join(f"{i * length} to {(i + 1) * length - 1}" for i in range(parts))
    lines = [f"| positions | {head} |", "| --- " * (parts + 1) + "|"]
    for curve in curves:
        means = [statistics.fmean(curve["loss"][i * length : (i + 1) * length]) for i in range(parts)]
        lines.append(f"| {curve['variant']} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
    return "\n".join(lines)


def plot_curves(curves: list[dict], trained: int, out: Path):
    with picture(out, 8, 5) as figure:
        axes = figure.subplots()
        for curve in curves:
            bins = torch.tensor(curve["loss"]).view(-1, 16).mean(1)
            axes.plot([16 * i + 8 for i in range(len(bins))], bins, label=curve["variant"])
        axes.axvline(trained, color="gray", linestyle="--", label="length in training")
        axes.set(xlabel="position", ylabel="cross entropy, nats per token, mean of 16 positions", title="Longer than in training")
        axes.grid(alpha=0.3)
        axes.legend()


def main():
    with cli.one_line_errors(cli.AGAIN):
        config = cli.parse(CompareConfig)
        config.validate()
        variants, seeds = variants_of(config), range(1, config.seeds + 1)
        # every variant with seed 1, then with seed 2, …: a machine whose speed drifts treats them alike
        jobs = [run_of(config, name, flags, seed) for seed in seeds for name, flags in variants.items()]
        for run in jobs[: len(variants)]:
            find_data(run.config())  # make missing shards now: two runs must not make them at once
        notes = run_all(jobs, config.workers, config.mixed) + machine_notes([run.folder for run in jobs])
        runs = {name: [measure(run.folder) for run in jobs if run.name == name] for name in variants}
        if config.time_steps:
            speeds = speeds_in_turns([run.folder for run in jobs[: len(variants)]], config.time_steps)
            for seed_runs, speed in zip(runs.values(), speeds, strict=True):
                seed_runs[:] = [one | {"tokens_per_second": speed} for one in seed_runs]
        found = {"variants": summary(runs), "notes": notes}
        text = [show(found["variants"], config.seeds), *notes]
        if config.suite == "modern":
            found["to_the_same_loss"] = tokens_to_the_same_loss(runs)
            text.append(found["to_the_same_loss"])
        if config.suite == "length":
            found["by_position"] = extrapolate(config)
            text.append(show_curves(found["by_position"]))
            draw_or_warn(plot_curves, found["by_position"], len(found["by_position"][0]["loss"]) // 4, Path(config.out_dir, "length.png"))
        print(json.dumps(found, indent=2) if config.json else "\n".join(text))


if __name__ == "__main__":
    main()
