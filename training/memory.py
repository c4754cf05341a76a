"""Estimates the memory of a training step, before anything is allocated.

Letters as in model.py. e: bytes per number in the dtype of the matrix products.
"""

from dataclasses import replace
from typing import NamedTuple

from model import GPT
from ops.attention import BlockwiseAttention
from ops.loss import loss_chunks
from training.config import TrainConfig, divisors
from variants import VariantConfig

CUDA_ITSELF = 1e9  # bytes of context, libraries and fragmentation; the real number differs by card and version


class Setting(NamedTuple):
    """The hardware and world size that a run's memory depends on."""

    kind: str = "cuda"  # or cpu
    e: int = 2  # bytes
    compiled: bool = True
    world_size: int = 1
    shard: bool = False  # --shard: parameters, gradients and optimizer state are sharded
    fp16: bool = False  # of the two dtypes with e = 2

    @property
    def stream(self) -> int:
        """Bytes per number of the residual stream (ops/embedding.py)."""
        return 2 if self.kind == "cuda" and self.e == 2 and not self.fp16 else 4


class Memory(NamedTuple):
    """Bytes per process."""

    parts: dict[str, float]
    peak: float


def memory(config: TrainConfig, setting: Setting, model: GPT) -> Memory:
    """Returns the parts of a training step and its peak. Accumulated gradients, and those in DDP's buckets, are there all the time. Others
    replace the activations, block by block. Gradients lie in DDP's buckets, so these need no extra memory: see Trainer.in_buckets."""
    persistent, temporary = persistent_bytes(config, setting, model), temporary_bytes(config, setting, model)
    accumulated = config.grad_accum_steps(setting.world_size) > 1 or (setting.world_size > 1 and not setting.shard)
    gradients, per_pass = persistent["gradients"], sum(temporary.values())
    fixed = sum(persistent.values()) - gradients
    peak = fixed + (gradients + per_pass if accumulated else max(gradients, per_pass))
    # with --shard, an evaluation also needs all weights, and one more block while they are gathered
    params, block = count(model), count(model.transformer.h[0])
    evaluation = fixed - persistent["gathered blocks"] + 4 * (params + block) if setting.shard else 0
    return Memory(persistent | temporary, max(peak, evaluation))


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def persistent_bytes(config: TrainConfig, setting: Setting, model: GPT) -> dict[str, float]:
    """Bytes that stay allocated from step to step."""
    params, matrices = count(model), matrix_params(model)
    processes = setting.world_size if setting.shard else 1
    muon = config.optimizer == "muon"
    return {
        "weights": 4 * params / processes,
        "gradients": 4 * params / processes,
        "optimizer": (8 * (params - matrices) / processes + 4 * matrices / setting.world_size) if muon else 8 * params / processes,
        "average of the weights": 4 * params / processes if config.ema else 0,
        # one block is computed and has its whole gradient, the next one is prefetched; embeddings and head stay gathered
        "gathered blocks": 4 * (3 * count(model.transformer.h[0]) + params - count(model.transformer.h)) if setting.shard else 0,
    }


def matrix_params(model: GPT) -> int:
    return sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)  # with the routers, which are small


def temporary_bytes(config: TrainConfig, setting: Setting, model: GPT) -> dict[str, float]:
    """Bytes that a forward and backward pass allocates and frees again."""
    shape, (kind, e, compiled, _, shard, _) = config.model, setting
    tokens = config.micro_batch_size * shape.seq_len
    # a compiled block copies its weights, also shared ones. It keeps the copies only if it keeps all activations or has experts.
    # Autocast keeps one copy. On a GPU, sharded weights arrive in this dtype.
    compiled_copies = shape.share_layers * (config.activation_memory == 1 or shape.n_expert > 1)
    cast = matrix_params(model) * (compiled_copies if compiled else 1) * (not shard or kind == "cpu")
    copies = (e * (cast + model.lm_head.weight.numel())) if e < 4 else 0
    per_token = block_bytes(shape, setting)
    least = setting.stream * shape.n_embd  # a block's input
    kept = least + config.activation_memory * (per_token - least)
    if compiled and config.activation_memory < 1:
        kept = min(kept, per_token - cheap_bytes(shape, setting))
    norm = (8 if shape.norm == "rmsnorm" else 4) * shape.n_embd  # the final norm is never compiled
    backward = backward_bytes(shape, tokens, count(model.transformer.h[0]), setting)
    recomputed = tokens * (per_token - kept)
    return {
        "copies in 16 bits": copies,
        # ids and targets, and with a table of pairs their rows: 8 bytes each
        "activations": tokens * (shape.n_layer * kept + norm + e * shape.n_embd + 16 + (4 * shape.n_embd + 8) * bool(shape.bigram)),
        "loss, or a block's backward pass": max(loss_bytes(shape, tokens, setting), recomputed + backward),
    }


def block_bytes(shape: VariantConfig, setting: Setting) -> float:
    """Bytes per token that one block keeps for its backward pass. Eager: what autograd saves. Compiled: what torch.compile's partition
    keeps; it recomputes norms, rotations and the like."""
    kind, e, compiled, *_ = setting
    C, H, T = shape.n_embd, shape.n_head, shape.seq_len
    kv = C // H * shape.kv_heads
    inner = shape.n_inner * shape.n_expert_active
    hidden = e * inner * (3 if shape.mlp == "swiglu" else 2)  # before and after the activation
    manual = shape.attention == "manual"
    # CUDA's autocast runs softmax in fp32; eager code also keeps its copy for the matrix product
    scores = H * T * (e if kind != "cuda" or e == 4 else 4 if compiled else 4 + e)
    if compiled:
        residual = setting.stream * C + 4 * e * C  # the stream; outputs of both norms, input and output of attention's projection
        attention = 3 * e * C + (scores if manual else e * C * (kind == "cpu") + 4 * H)  # on CUDA, attention's output needs no new layout
        attention += e * (C + 2 * kv) * shape.qk_norm + e * kv * shape.value_residual
        experts = setting.stream * C - e * C + 2 * e * C * shape.n_expert_active
    else:
        residual = 8 * C + 3 * e * C + 8 * C * (shape.norm == "rmsnorm")
        unused = shape.value_residual and (e < 4 if shape.qk_norm else shape.pos == "rope")  # q, k and v are all copied then
        attention = 3 * e * C + scores if manual else e * (C + 2 * kv) * (not unused) + 4 * H
        attention += 2 * e * C * (kv < C) + e * (C + kv) * (shape.pos == "rope") + 2 * e * kv * shape.value_residual
        attention += (C + kv) * (e * (shape.pos != "rope") + (8 if e < 4 else 4)) * shape.qk_norm
        attention += e * C * (not manual and (shape.pos == "rope" or shape.qk_norm or shape.value_residual))
        hidden += e * inner * (shape.mlp == "swiglu")
        experts = 3 * e * C * shape.n_expert_active
    convolutions = (e * (C + 2 * kv) + setting.stream * C) * bool(shape.short_conv)  # their inputs
    gates = 2 * e * H * shape.head_gate
    masks = 2 * C * bool(shape.dropout)
    return residual + attention + hidden + convolutions + gates + masks + experts * (shape.n_expert > 1)


def cheap_bytes(shape: VariantConfig, setting: Setting) -> float:
    """Bytes per token that a compiled block stops keeping as soon as --activation-memory is below 1: what it can recompute without a
    matrix product."""
    kind, e, *_ = setting
    C, kv = shape.n_embd, shape.n_embd // shape.n_head * shape.kv_heads
    norms = 2 * C + 2 * kv * shape.qk_norm
    if shape.n_expert > 1:  # the loop over experts is not compiled. With CUDA's single kernel they are, which may save more
        return e * norms
    laid_out = C * (kind == "cpu" and shape.attention == "flash" and kv == C)  # attention's output
    return e * (norms + laid_out + shape.n_inner)


def backward_bytes(shape: VariantConfig, tokens: int, block: int, setting: Setting) -> float:
    """Bytes that a block's backward pass allocates: gradients of its weights, of the stream and of its widest activations."""
    kind, e, compiled, *_ = setting
    inner = shape.n_inner * shape.n_expert_active
    mlp = e * inner * (3 if shape.mlp == "swiglu" else 2)
    queries = BlockwiseAttention.blocks(shape.seq_len, None)[0][0].stop if compiled and kind == "cpu" else 0
    scores = (shape.seq_len * (4 if kind == "cuda" else e) if shape.attention == "manual" else 4 * queries) * 3 * shape.n_head
    return 4 * block + tokens * (2 * setting.stream * shape.n_embd + max(mlp, scores))


def loss_bytes(shape: VariantConfig, tokens: int, setting: Setting) -> float:
    """Bytes that the loss adds to its input: the head's gradient, and logits with their gradients (of one chunk if there are many)."""
    kind, e, compiled, *_ = setting
    V, C = shape.padded_vocab_size, shape.n_embd
    chunks = loss_chunks(tokens, V, kind)
    if chunks == 1:
        return tokens * V * (2 * e if compiled else 12) + 4 * V * C
    forward = -(-tokens // chunks) * V * (2 * e if compiled else 17) + (e + (4 if compiled else 8)) * V * C
    return e * tokens * C + 4 * V * C + max(forward, 4 * V * C)


def largest_micro_batch(config: TrainConfig, setting: Setting, model: GPT, available: float) -> int | None:
    """Returns the largest micro batch that divides the batch and fits into `available` bytes; None if not even 1 fits."""
    sequences = config.total_batch_tokens // (config.model.seq_len * setting.world_size)
    fits = (b for b in divisors(sequences)[::-1] if memory(replace(config, micro_batch_size=b), setting, model).peak <= available)
    return next(fits, None)
