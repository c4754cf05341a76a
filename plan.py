"""What a run takes, on paper: memory by part, hours and cost before anything is allocated, and how far it scales.

    python train.py --preset gpt2-xl --plan --gpu H100 --gpus 8 --price 3     # the plan of a run
    python plan.py --presets gpt2 gpt2-xl                                     # its scaling to 512 GPUs, as a table and a picture

Letters as in model.py; N tokens of a micro batch, e bytes of a number in the dtype of the matrix products.
"""

import itertools
import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import cli
import device
from attention import BlockwiseAttention
from config import TrainConfig
from device import ASSUMED_MFU
from files import read_json
from loss import loss_chunks
from model import GPT
from plot_log import read_metrics
from sharding import refuse_fp16
from training.presets import PRESETS
from training.run_json import RUN, RUN_REMEDY, last_launch
from variants import VariantConfig, build_on_meta, flops_per_token

# ---- memory ----

CUDA_ITSELF = 1e9  # bytes for the context, the libraries and what the allocator can't use: they differ by card and version


class Setting(NamedTuple):
    """What a run's memory depends on beside its flags."""

    kind: str = "cuda"  # or cpu
    e: int = 2  # bytes
    compiled: bool = True
    world_size: int = 1
    shard: bool = False  # parameters, gradients and optimizer divided among the processes


class Memory(NamedTuple):
    """Bytes of one process."""

    parts: dict[str, float]
    peak: float


def memory(config: TrainConfig, setting: Setting, model: GPT) -> Memory:
    """The parts of a training step, and what it takes at most. The gradients are there all the time when they are accumulated or lie in
    DDP's buckets, which need nothing beside them; else they take the place of the activations, block by block."""
    shape, (kind, e, compiled, world_size, shard) = config.model, setting
    tokens = config.micro_batch_size * shape.seq_len
    params = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    matrices = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)  # a router, which is not Muon's, is small
    head = model.lm_head.weight.numel()
    processes = world_size if shard else 1

    # each block that is compiled makes its own copies, also of weights that blocks share, and does not keep them when not all is
    # kept, but for experts'; autocast keeps one; divided weights come to a GPU in that dtype already
    of_each = shape.share_layers * (config.activation_memory == 1 or shape.n_expert > 1)
    cast = matrices * (of_each if compiled else 1) * (not shard or kind == "cpu")
    copies = (e * (cast + head)) if e < 4 else 0
    whole = block_bytes(shape, setting)
    kept = 4 * shape.n_embd + config.activation_memory * (whole - 4 * shape.n_embd)  # at the least a block's input
    if compiled and config.activation_memory < 1:
        kept = min(kept, whole - cheap_bytes(shape, setting))
    norm = (8 if shape.norm == "rmsnorm" else 4) * shape.n_embd  # the last one, which is never compiled
    activations = tokens * (shape.n_layer * kept + norm + e * shape.n_embd + 16)  # ids and targets are of 8 bytes
    again = tokens * (whole - kept)
    muon = config.optimizer == "muon"
    staying = {
        "weights": 4 * params / processes,
        "gradients": 4 * params / processes,
        "optimizer": (8 * (params - matrices) / processes + 4 * matrices / world_size) if muon else 8 * params / processes,
        "average of the weights": 4 * params / processes if config.ema else 0,
        # the next block comes while one is at work, and its gradient is whole until it is divided; the rest stays whole
        "whole blocks": 4 * (3 * block + params - block * len(model.transformer.h)) if shard else 0,
    }
    passing = {
        "copies for the products": copies,
        "activations": activations,
        "loss, or a block's backward pass": max(loss_bytes(shape, tokens, setting), again + backward_bytes(shape, tokens, block, setting)),
    }
    at_once = sum(passing.values())
    accumulated = config.grad_accum_steps(world_size) > 1 or (world_size > 1 and not shard)
    gradients = staying["gradients"]
    fixed = sum(staying.values()) - gradients
    peak = fixed + (gradients + at_once if accumulated else max(gradients, at_once))
    # an evaluation has all weights beside the process's share, and a block more while they are put together
    evaluation = fixed - staying["whole blocks"] + 4 * (params + block) if shard else 0
    return Memory(staying | passing, max(peak, evaluation))


def block_bytes(shape: VariantConfig, setting: Setting) -> float:
    """What the backward pass of one block keeps of a token: without torch.compile what autograd saves, with it what
    torch.compile's partition of the graph keeps, which computes norms, rotations and the like again."""
    kind, e, compiled, *_ = setting
    C, H, T = shape.n_embd, shape.n_head, shape.seq_len
    kv = C // H * shape.kv_heads
    inner = shape.n_inner * shape.n_expert_active
    hidden = e * inner * (3 if shape.mlp == "swiglu" else 2)  # before and after the activation
    manual = shape.attention == "manual"
    # the softmax under CUDA's autocast is in fp32, and without torch.compile its copy for the product is kept too
    scores = H * T * (e if kind != "cuda" or e == 4 else 4 if compiled else 4 + e)
    if compiled:
        residual = 4 * C + 4 * e * C  # the stream in fp32; out of both norms, into and out of attention's projection
        attention = 3 * e * C + (scores if manual else e * C * (kind == "cpu") + 4 * H)  # on CUDA its output is not laid out anew
        attention += e * (C + 2 * kv) * shape.qk_norm + e * kv * shape.value_residual
        experts = 4 * C - e * C + 2 * e * C * shape.n_expert_active
    else:
        residual = 8 * C + 3 * e * C + 8 * C * (shape.norm == "rmsnorm")
        unused = shape.qk_norm and shape.value_residual and e < 4  # then all of q, k and v were copied
        attention = 3 * e * C + scores if manual else e * (C + 2 * kv) * (not unused) + 4 * H
        attention += 2 * e * C * (kv < C) + e * (C + kv) * (shape.pos == "rope") + e * kv * shape.value_residual
        attention += (C + kv) * (e + (8 if e < 4 else 4)) * shape.qk_norm
        attention += e * C * (not manual and (shape.pos == "rope" or shape.qk_norm or shape.value_residual))
        hidden += e * inner * (shape.mlp == "swiglu")
        experts = 3 * e * C * shape.n_expert_active
    return residual + attention + hidden + experts * (shape.n_expert > 1)


def cheap_bytes(shape: VariantConfig, setting: Setting) -> float:
    """What torch.compile's partition of a block stops keeping of a token as soon as --activation-memory is below 1: what is
    computed again without a matrix product."""
    kind, e, *_ = setting
    C, kv = shape.n_embd, shape.n_embd // shape.n_head * shape.kv_heads
    norms = 2 * C + 2 * kv * shape.qk_norm
    if shape.n_expert > 1:  # which are not compiled
        return e * norms
    laid_out = C * (kind == "cpu" and shape.attention == "flash" and kv == C)  # attention's output
    return e * (norms + laid_out + shape.n_inner)


def backward_bytes(shape: VariantConfig, tokens: int, block: int, setting: Setting) -> float:
    """What the backward pass of a block takes for itself: the gradients of its weights, of the stream and of its widest part."""
    kind, e, compiled, *_ = setting
    inner = shape.n_inner * shape.n_expert_active
    mlp = e * inner * (3 if shape.mlp == "swiglu" else 2)
    queries = BlockwiseAttention.blocks(shape.seq_len, None)[0][0].stop if compiled and kind == "cpu" else 0
    scores = (shape.seq_len * (4 if kind == "cuda" else e) if shape.attention == "manual" else 4 * queries) * 3 * shape.n_head
    return 4 * block + tokens * (8 * shape.n_embd + max(mlp, scores))


def loss_bytes(shape: VariantConfig, tokens: int, setting: Setting) -> float:
    """What the loss takes beside its input: logits and their gradients, of a chunk where there are many, and the gradient of the head."""
    kind, e, compiled, *_ = setting
    V, C = shape.padded_vocab_size, shape.n_embd
    chunks = loss_chunks(tokens, V, kind)
    if chunks == 1:
        return tokens * V * (2 * e if compiled else 12) + 4 * V * C
    forward = -(-tokens // chunks) * V * (2 * e if compiled else 17) + (e + (4 if compiled else 8)) * V * C
    return e * tokens * C + 4 * V * C + max(forward, 4 * V * C)


def largest_micro_batch(config: TrainConfig, setting: Setting, model: GPT, available: float) -> int | None:
    """The largest that divides the batch and fits into so many bytes; None when not even 1 does."""
    sequences = config.total_batch_tokens // (config.model.seq_len * setting.world_size)
    small = [b for b in range(1, math.isqrt(sequences) + 1) if sequences % b == 0]
    divisors = sorted({*small, *(sequences // b for b in small)}, reverse=True)
    return next((b for b in divisors if memory(replace(config, micro_batch_size=b), setting, model).peak <= available), None)


# ---- time ----

# what decides how fast a model trains on a card
PACE = "model dtype compile micro_batch_size activation_memory optimizer teacher ema shard".split()


def measured_rate(config: TrainConfig, name: str) -> float | None:
    """Tokens a second and process of the run in --out-dir, when that was this model on such a card (or CPU) with the same settings;
    the median of its steps but the first, in which it is compiled."""
    path = Path(config.out_dir, RUN)
    if not path.exists():
        return None
    launch, settings = last_launch(read_json(path, RUN_REMEDY), None), asdict(config)
    cpu = device.describe(torch.device("cpu"))
    try:
        there = "cpu" if launch["device"] == cpu else device.card_of(launch["device"])
        if there != name or any(launch["config"].get(name) != settings[name] for name in PACE):
            return None
        speeds = read_metrics(path.with_name("metrics.jsonl"), ["tokens_per_second"])["tokens_per_second"]
        rates = [speed for step, speed in speeds.items() if step > launch["step"]]
        return statistics.median(rates) / launch["world_size"] if rates else None
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} has no launch as train.py writes it: {RUN_REMEDY}") from e


# ---- the plan of a run ----


def report(config: TrainConfig) -> str:
    """What train.py --plan prints. ValueError when the model does not fit at all, or nothing says how fast it is."""
    config.validate(config.gpus)
    if config.device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"--device {config.device} can't be planned for: give cuda with a --gpu, or cpu")
    if config.teacher:
        raise ValueError("--teacher can't be planned for: leave it out; its weights and its forward pass come on top")
    on_cpu = config.device == "cpu"
    name = "cpu" if on_cpu else config.gpu
    auto = config.dtype == "auto" and not on_cpu  # this machine need not have such a card
    dtype = device.pick_dtype(("fp16" if name == "V100" else "bf16") if auto else config.dtype, torch.device("cpu"))
    compiled = config.compile and (not on_cpu or device.can_compile(torch.device("cpu")))
    setting = Setting("cpu" if on_cpu else "cuda", dtype.itemsize, compiled, config.gpus, config.shard and config.gpus > 1)
    if setting.shard:
        refuse_fp16(dtype)
    # the processes share a machine's memory
    available = device.total_memory(torch.device("cpu")) / config.gpus if on_cpu else device.CARDS[name].memory - CUDA_ITSELF
    model = build_on_meta(config.model)
    need, fits = memory(config, setting, model), largest_micro_batch(config, setting, model, available)
    if fits is None:
        least = memory(replace(config, micro_batch_size=1), setting, model).peak
        raise ValueError(
            f"one sequence at a time takes {least / 1e9:.1f} GB, {name} has {available / 1e9:.1f} GB for it: choose a larger --gpu, a "
            f"smaller model or --seq-len{', or --activation-memory 0' * (config.activation_memory > 0)}"
            f", or {'--shard with ' * (not config.shard)}more --gpus"
        )
    total, flops = config.max_steps * config.total_batch_tokens, flops_per_token(model)
    rate, source = rate_of(config, name, dtype, flops)
    hours = total / rate / 3600
    lines = [f"{model.num_params():,} parameters, {config.gpus} × {name}, {str(dtype)[6:]}, {'' if compiled else 'not '}compiled", ""]
    lines += [f"{part:<34}{size / 1e9:8.2f} GB" for part, size in need.parts.items() if size]
    lines += [
        f"{f'at most, --micro-batch-size {config.micro_batch_size}':<34}{need.peak / 1e9:8.2f} GB of {available / 1e9:.1f}: "
        f"{'fits' if need.peak <= available else 'does not fit'}; the largest that does: --micro-batch-size {fits}",
        "",
        f"{rate:,.0f} tokens/s, {source}",
        f"the whole run, {config.max_steps:,} steps of {config.total_batch_tokens:,} tokens, {total * flops:.3g} floating point "
        f"operations: {hours:,.2f} hours",
    ]
    if config.price:
        lines.append(f"{hours * config.gpus * config.price:,.2f} $ at {config.price:g} $ a GPU and hour")
    if config.gpus > 1 and not on_cpu:
        step = step_on(config, config.gpus, config.shard, name, dtype=dtype)
        lines.append(
            f"of a step of {step.seconds * 1e3:.1f} ms at {ASSUMED_MFU:.0%} MFU it waits {(step.seconds - step.compute) * 1e3:.1f} ms for "
            f"the {'weights and ' if config.shard else ''}gradients of the others"
        )
    return "\n".join(lines)


def rate_of(config: TrainConfig, name: str, dtype: torch.dtype, flops: float) -> tuple[float, str]:
    """Tokens a second of all processes, and where that comes from."""
    if config.rate:
        return config.rate, "as given by --rate"
    if measured := measured_rate(config, name):
        return measured * config.gpus, f"as the run in {config.out_dir} has it, a process"
    if name == "cpu":
        raise ValueError("how fast this CPU is nobody knows: give --rate, or the --out-dir of a run of this model")
    return config.gpus * ASSUMED_MFU * device.peak_of(name, dtype) / flops, f"by an assumed MFU of {ASSUMED_MFU:.0%}: not measured"


# ---- scaling, by calculation ----


class Cluster(NamedTuple):
    """GPUs and the links between them, bytes a second in each direction: 8 to a node as in a DGX H100 (NVLink 900 GB/s both ways
    together, a network card of 400 Gb/s for each GPU). Latencies, in seconds: NCCL's own for its cost model (src/graph/tuning.cc)."""

    n: int
    node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    hop: float = 3.4e-6  # within a node
    far_hop: float = 14e-6  # between nodes
    call: float = 8.4e-6

    @property
    def nodes(self) -> int:
        return -(-self.n // self.node)

    @property
    def ring(self) -> float:
        """Bytes a second through each GPU of a ring: between nodes all network cards of a node work, each for a ring of its own."""
        inside = min(self.n, self.node)
        return self.nvlink if self.nodes == 1 else min(self.nvlink, inside * self.network)

    def gather(self, size: float) -> float:
        """Seconds of an all-gather to, or a reduce-scatter of, size bytes, in a ring."""
        if self.n == 1:
            return 0.0
        far = self.nodes if self.nodes > 1 else 0
        return self.call + (self.n - 1 - far) * self.hop + far * self.far_hop + self.sent(size) / self.ring

    def reduce(self, size: float) -> float:
        """Seconds of an all-reduce: twice the above in bytes; in a ring, or in a tree where its latency is less."""
        if self.n == 1:
            return 0.0
        far = 2 * self.nodes if self.nodes > 1 else 0
        ring = (2 * (self.n - 1) - far) * self.hop + far * self.far_hop
        tree = 2 * ((min(self.n, self.node) - 1) * self.hop + math.log2(self.nodes) * self.far_hop)
        return self.call + min(ring, tree) + 2 * self.sent(size) / self.ring

    def sent(self, size: float) -> float:
        """Bytes that each GPU sends in one turn of the ring."""
        return (self.n - 1) / self.n * size


class Step(NamedTuple):
    """A step of one GPU: seconds of its own work, of communication, and of both as far as they do not overlap; bytes it sends."""

    compute: float
    communication: float
    seconds: float
    sent: float

    @property
    def efficiency(self) -> float:
        """The share of the time in which it works, of what one GPU without others would have."""
        return self.compute / self.seconds


BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at a time


def ddp_step(compute: float, passes: int, params: int, last: int, cluster: Cluster) -> Step:
    """Gradients in fp32, summed once a step over all GPUs while the last pass goes backward, two thirds of its time; the last bucket,
    with the token table in it, is full only at the end. compute: seconds of a step's work. last: parameters of that bucket."""
    buckets = math.ceil(4 * (params - last) / BUCKET)
    overlapped = buckets * cluster.reduce(4 * (params - last) / max(1, buckets))
    end = cluster.reduce(4 * last)
    seconds = compute + max(0.0, overlapped - compute / passes * 2 / 3) + end
    return Step(compute, overlapped + end, seconds, 2 * cluster.sent(4 * params))


def fsdp_step(compute: float, passes: int, params: int, rest: int, blocks: int, cluster: Cluster, e: int = 2, e_rest: int = 4) -> Step:
    """Each pass gathers each block's weights, of e bytes, once forward (a third of the time) and once backward, while the block before is
    computed, and divides its gradients, in fp32; embeddings and head, the rest of the parameters, of e_rest bytes, are gathered once. What
    is first gathered and last divided waits."""
    part = (params - rest) / blocks
    gather, scatter = cluster.gather(e * part), cluster.gather(4 * part)
    ends = cluster.gather(e_rest * rest) + cluster.gather(4 * rest)
    forward, backward = blocks * gather, blocks * (gather + scatter)
    work = compute / passes
    once = max(work / 3, forward - gather) + max(work * 2 / 3, backward - scatter) + gather + scatter + ends
    sent = cluster.sent((2 * e + 4) * (params - rest) + (e_rest + 4) * rest)
    return Step(compute, passes * (forward + backward + ends), passes * once, passes * sent)


def step_on(config: TrainConfig, n: int, shard: bool, gpu: str, weak: bool = False, dtype: torch.dtype = torch.bfloat16) -> Step:
    """A step of a preset on n GPUs at the assumed MFU. The batch is the preset's, of which each GPU takes its share, or with weak a
    micro batch for each GPU. dtype: of the matrix products."""
    model = build_on_meta(config.model)
    sequences = config.micro_batch_size if weak else config.total_batch_tokens // config.model.seq_len // n
    passes = max(1, sequences // config.micro_batch_size)
    compute = sequences * config.model.seq_len * flops_per_token(model) / (ASSUMED_MFU * device.peak_of(gpu, dtype))
    params = sum(p.numel() for p in model.parameters())
    if shard:
        rest = params - sum(p.numel() for p in model.transformer.h.parameters())
        return fsdp_step(compute, passes, params, rest, len(model.transformer.h), Cluster(n), dtype.itemsize)
    return ddp_step(compute, passes, params, model.transformer.wte.weight.numel(), Cluster(n))


@dataclass
class ScaleConfig:
    """How presets scale over many GPUs by calculation: a table on stdout, and a picture."""

    presets: tuple[str, ...] = ("gpt2", "gpt2-xl", "gpt3-1b")
    """Presets of train.py; each keeps its batch, and has no more GPUs than sequences in it."""
    gpu: Literal[tuple(device.CARDS)] = "H100"
    """The kind of GPU; the links are those of Cluster."""
    out: str = "results/scale.png"
    """Where the picture goes."""


COUNTS = [2**i for i in range(13)]  # 1 to 4096 GPUs


def limit(steps: dict[int, Step]) -> str:
    """From how many GPUs on the efficiency is below 90 %."""
    return next((f"{n}" for n, step in steps.items() if step.efficiency < 0.9), f"not up to {max(steps)}")


def scale(config: ScaleConfig) -> tuple[str, dict[str, dict[int, Step]]]:
    """The table, and a step for each kind of scaling and number of GPUs."""
    wrong = [name for name in config.presets if name not in PRESETS]
    faults = [f"--presets {' '.join(wrong)}: choose of {', '.join(PRESETS)}"] if wrong or not config.presets else []
    if Path(config.out).suffix not in (".png", ".svg", ".pdf"):
        faults.append(f"--out {config.out}: give a .png, .svg or .pdf")
    cli.refuse(faults)
    lines = [
        "| preset | batch | | GPUs | compute, ms | communication, ms | sent by each, MB | step, ms | efficiency | below 90 % from |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    curves = {}
    for name, weak, shard in itertools.product(config.presets, (False, True), (False, True)):
        run = PRESETS[name]
        most = COUNTS[-1] if weak else run.total_batch_tokens // run.model.seq_len
        steps = {n: step_on(run, n, shard, config.gpu, weak) for n in COUNTS if n <= most}
        batch = f"{run.micro_batch_size * run.model.seq_len:,} a GPU" if weak else f"{run.total_batch_tokens:,}"
        kind = "FSDP" if shard else "DDP"
        curves[f"{name}, {kind}, {batch}"] = steps
        lines += [
            f"| {name} | {batch} | {kind} | {n} | {s.compute * 1e3:.1f} | {s.communication * 1e3:.1f} | {s.sent / 1e6:,.0f} | "
            f"{s.seconds * 1e3:.1f} | {s.efficiency:.0%} | {limit(steps)} |"
            for n, s in steps.items()
            if n in (8, 64, 512)
        ]
    return "\n".join(lines), curves


def draw(curves: dict[str, dict[int, Step]], out: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(curve.split(",")[0] for curve in curves))}
    for name, steps in curves.items():
        look = dict(ls="--" if "a GPU" in name else "-", marker="o" if "DDP" in name else "x", color=colors[name.split(",")[0]])
        axes.plot(steps.keys(), [step.efficiency for step in steps.values()], markersize=4, label=name, **look)
    axes.axhline(0.9, color="gray", lw=0.8)
    axes.set(xscale="log", xlabel="GPUs", ylabel="efficiency, calculated", xticks=COUNTS, xticklabels=COUNTS, ylim=(0, 1.02))
    axes.minorticks_off()
    axes.legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, bbox_inches="tight")


def main():
    with cli.one_line_errors():
        config = cli.parse(ScaleConfig)
        table, curves = scale(config)
        print(table)
        draw(curves, Path(config.out))


if __name__ == "__main__":
    main()
