"""train.py --plan: estimates a run's memory by part, hours and cost. Allocates nothing."""

import statistics
from dataclasses import asdict, replace
from pathlib import Path

import torch

from common import device
from common.device import ASSUMED_MFU
from common.distributed import DistContext
from common.logs import read_metrics
from common.shards import MANIFEST, read_manifest
from common.tokenizer import ROWS, get_tokenizer
from tasks.judging import build_trees
from tasks.readers import read_tasks
from training.config import TrainConfig
from training.cost import HELLASWAG, TASKS, VALIDATION, parts_of, steps_of, table
from training.memory import CUDA_ITSELF, Setting, largest_micro_batch, memory
from training.presets import PRESETS
from training.run_json import RUN, RUN_REMEDY, last_launch, read_run_json
from training.sharding import reject_fp16
from training.step_time import step_on
from variants import build_on_meta, flops_per_token

# the settings that decide how fast a card trains
PACE = "model dtype compile micro_batch_size activation_memory optimizer teacher ema shard".split()


def measured_rate(config: TrainConfig, name: str) -> float | None:
    """Returns the run's tokens per second and process, if the run in --out-dir trained this model on such a card (or CPU) with the
    same settings, else None. The median over all steps except the first, which compiles."""
    path = Path(config.out_dir, RUN)
    if not path.exists():
        return None
    launch, settings = last_launch(read_run_json(path), None), asdict(config)
    cpu = device.describe(torch.device("cpu"))
    try:
        card = "cpu" if launch["device"] == cpu else device.card_of(launch["device"])
        if card != name or any(launch["config"].get(name) != settings[name] for name in PACE):
            return None
        speeds = read_metrics(path.with_name("metrics.jsonl"), ["tokens_per_second"])["tokens_per_second"]
        rates = [speed for step, speed in speeds.items() if step > launch["step"]]
        return statistics.median(rates) / launch["world_size"] if rates else None
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged: {RUN_REMEDY}") from e


def report(config: TrainConfig) -> str:
    """Returns what train.py --plan prints. ValueError if the model can't fit, or its speed is unknown."""
    config = replace(config, model=replace(config.model, vocab_size=ids_of(config)))
    name, dtype, setting, available = hardware(config)
    model = build_on_meta(config.model)
    need, fits = memory(config, setting, model), largest_micro_batch(config, setting, model, available)
    if fits is None:
        least = memory(replace(config, micro_batch_size=1), setting, model).peak
        raise ValueError(
            f"a micro batch of 1 needs {least / 1e9:.1f} GB, but {name} has only {available / 1e9:.1f} GB: choose a larger --gpu, a "
            f"smaller model or --seq-len{', or --activation-memory 0' * (config.activation_memory > 0)}"
            f", or {'--shard with ' * (not config.shard)}more --gpus"
        )
    compiled = "" if setting.compiled else "not "
    lines = [f"{model.num_params():,} parameters, {config.gpus} × {name}, {str(dtype)[6:]}, {compiled}compiled", ""]
    lines += [f"{part:<34}{size / 1e9:8.2f} GB" for part, size in need.parts.items() if size]
    lines += [
        f"{f'peak, --micro-batch-size {config.micro_batch_size}':<34}{need.peak / 1e9:8.2f} GB of {available / 1e9:.1f}: "
        f"{'fits' if need.peak <= available else 'does not fit'}; the largest that fits: --micro-batch-size {fits}",
        "",
    ]
    lines += cost(config, name, dtype, flops_per_token(model))
    if config.gpus > 1 and setting.kind == "cuda":
        step = step_on(config, config.gpus, config.shard, name, dtype=dtype)
        what = "weights and gradients" if config.shard else "gradients"
        lines.append(
            f"a step takes {step.seconds * 1e3:.1f} ms at {ASSUMED_MFU:.0%} MFU, of which "
            f"{(step.seconds - step.compute) * 1e3:.1f} ms wait for other GPUs' {what}"
        )
    return "\n".join(lines)


def ids_of(config: TrainConfig) -> int:
    """Returns the vocabulary that the run would have: that of the shards, if they are there and the flags name no other."""
    ours, manifest = config.model.vocab_size, Path(config.data_dir, MANIFEST)
    fits = not (config.resume or config.init_from) and ours == PRESETS[config.preset].model.vocab_size
    return read_manifest(manifest.parent).get("vocab_size", ours) if fits and manifest.exists() else ours


def hardware(config: TrainConfig) -> tuple[str, torch.dtype, Setting, float]:
    """Returns the card's name or 'cpu', the dtype, the setting for memory(), and the bytes available to a process."""
    config.validate(config.gpus)
    if config.device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"--plan does not support --device {config.device}: use cuda with a --gpu, or cpu")
    if config.teacher:
        raise ValueError("--plan does not support --teacher: leave it out, and allow for its weights and forward pass")
    cpu, on_cpu = torch.device("cpu"), config.device == "cpu"
    name = "cpu" if on_cpu else config.gpu
    auto = config.dtype == "auto" and not on_cpu  # this machine may not have such a card
    dtype = device.pick_dtype(("fp16" if name == "V100" else "bf16") if auto else config.dtype, cpu)
    compiled = config.compile and (not on_cpu or device.can_compile(cpu))
    shard, fp16 = config.shard and config.gpus > 1, dtype == torch.float16
    setting = Setting("cpu" if on_cpu else "cuda", dtype.itemsize, compiled, config.gpus, shard, fp16)
    if setting.shard:
        reject_fp16(dtype)
    # processes on a CPU share the machine's memory
    available = device.total_memory(cpu) / config.gpus if on_cpu else device.CARDS[name].memory - CUDA_ITSELF
    return name, dtype, setting, available


def cost(config: TrainConfig, name: str, dtype: torch.dtype, flops: float) -> list[str]:
    """The plan's lines about time and money."""
    rate, alone, source = rate_of(config, name, dtype, flops)
    step = config.total_batch_tokens / rate
    steps = steps_of(config, step)
    limit = f", {'--max-steps' if steps == config.max_steps else f'--max-seconds {config.max_seconds:,.10g}'} ends it"
    total = steps * config.total_batch_tokens
    each, unknown = evaluation_seconds(config, alone)
    parts = parts_of(config, 0, steps, step, each, save_seconds(config, name))
    lines = [
        f"{rate:,.0f} tokens/s, {source}",
        f"the whole run, {steps:,} steps of {config.total_batch_tokens:,} tokens, {total:,} in all, {total * flops:.3g} floating point "
        f"operations: {total / rate / 3600:,.2f} hours{limit if config.max_seconds else ''}",
        "",
        *table(parts, config.gpus * config.price),
        f"not counted: {'; '.join([*unknown, 'compiling and samples'])}. On the rented machine, --rehearse measures everything",
        "",
    ]
    if config.price:
        hours = sum(part.seconds for part in parts) / 3600
        lines.append(f"{hours * config.gpus * config.price:,.2f} $ at {config.price:g} $ per GPU and hour")
    return lines


# tokens of HellaSwag's 10,042 validation tasks in both styles: 5 times those of tests' 2,009 (contexts are read once)
HELLASWAG_TOKENS = {"gpt2": 3_224_000, "bytes": 15_210_000}
# bytes per second: --plan's guess of a copy to main memory, which training waits for, and of a whole save on a CPU (results/checkpoints.md)
COPIED, SAVED = 7e9, 0.3e9


def evaluation_seconds(config: TrainConfig, rate: float) -> tuple[dict[str, float], list[str]]:
    """Returns the seconds of one evaluation of each kind, and what is unknown. A forward pass costs a third of a training step's
    operations per token. rate: tokens per second of training."""
    tokens, unknown = {VALIDATION: config.val_tokens}, []
    if config.hellaswag_every and (known := HELLASWAG_TOKENS.get(ROWS.get(config.model.vocab_size))):
        tokens[HELLASWAG] = known
    elif config.hellaswag_every:
        unknown.append(f"{HELLASWAG}: no known tokenizer has {config.model.vocab_size} ids")
    if config.eval_every:
        try:
            tokens[TASKS] = evaluation_tokens(config)
        except (ValueError, OSError) as e:
            unknown.append(f"{TASKS}: {e}")
    return {kind: n / rate / 3 for kind, n in tokens.items()}, unknown


def save_seconds(config: TrainConfig, name: str) -> float:
    """Estimates for how many seconds a save makes training wait."""
    params = build_on_meta(config.model).num_params()
    size = params * (12 + 4 * (config.ema > 0))  # weights and AdamW's two moments in fp32; Muon has less
    return size / (SAVED if name == "cpu" else COPIED)


def evaluation_tokens(config: TrainConfig, sample: int = 16) -> int:
    """Estimates the tokens of one evaluation from the first questions of each task. ValueError if a file or the tokenizer is missing."""
    rows, seq_len, world = config.model.vocab_size, config.model.seq_len, DistContext(torch.device("cpu"))
    if rows not in ROWS:
        raise ValueError(f"no known tokenizer has {rows} ids")
    tokenizer, total = get_tokenizer(ROWS[rows]), 0.0
    for task in read_tasks(config.eval_tasks, tokenizer, seq_len, config.eval_limit):
        trees = build_trees(replace(task, gold=task.gold[:sample]), tokenizer, seq_len, world)
        total += sum(len(tree.ids) for tree in trees.values()) * len(task.gold) / len(task.gold[:sample])
    return round(total)


def rate_of(config: TrainConfig, name: str, dtype: torch.dtype, flops: float) -> tuple[float, float, str]:
    """Returns tokens per second of all processes, those of evaluations, where no GPU waits for another, and the source of both."""
    if config.rate:
        return config.rate, config.rate, "from --rate"
    if measured := measured_rate(config, name):
        return measured * config.gpus, measured * config.gpus, f"measured by the run in {config.out_dir}"
    if name == "cpu":
        raise ValueError("unknown CPU throughput: pass --rate, or the --out-dir of a run of this model")
    alone, source = config.gpus * ASSUMED_MFU * device.peak_of(name, dtype) / flops, f"from an assumed MFU of {ASSUMED_MFU:.0%}"
    if config.gpus == 1:
        return alone, alone, f"{source}, not measured"
    step = step_on(config, config.gpus, config.shard, name, dtype=dtype)
    return config.total_batch_tokens / step.seconds, alone, f"{source} and the waiting for other GPUs, not measured"
