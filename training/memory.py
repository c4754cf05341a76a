"""How much memory a training step takes, by calculation.

Letters as in model.py; N tokens of a micro batch, e bytes of a number in the dtype of the matrix products.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from model import GPT
from ops.attention import BlockwiseAttention
from ops.loss import loss_chunks
from training.config import TrainConfig
from variants import VariantConfig

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
    """The parts of a training step, and its peak. Gradients are there all the time if they are accumulated or in DDP's buckets, which need
    nothing besides; else they replace the activations, block by block."""
    staying, passing = staying_bytes(config, setting, model), passing_bytes(config, setting, model)
    accumulated = config.grad_accum_steps(setting.world_size) > 1 or (setting.world_size > 1 and not setting.shard)
    gradients, at_once = staying["gradients"], sum(passing.values())
    fixed = sum(staying.values()) - gradients
    peak = fixed + (gradients + at_once if accumulated else max(gradients, at_once))
    # an evaluation has all weights besides the process's part, and one more block while they are put together
    params, block = count(model), count(model.transformer.h[0])
    evaluation = fixed - staying["whole blocks"] + 4 * (params + block) if setting.shard else 0
    return Memory(staying | passing, max(peak, evaluation))


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def staying_bytes(config: TrainConfig, setting: Setting, model: GPT) -> dict[str, float]:
    """What is there from step to step."""
    params, matrices = count(model), matrix_params(model)
    processes = setting.world_size if setting.shard else 1
    muon = config.optimizer == "muon"
    return {
        "weights": 4 * params / processes,
        "gradients": 4 * params / processes,
        "optimizer": (8 * (params - matrices) / processes + 4 * matrices / setting.world_size) if muon else 8 * params / processes,
        "average of the weights": 4 * params / processes if config.ema else 0,
        # the next block arrives while one is computed, whose gradient is whole until it is divided; the rest stays whole
        "whole blocks": 4 * (3 * count(model.transformer.h[0]) + params - count(model.transformer.h)) if setting.shard else 0,
    }


def matrix_params(model: GPT) -> int:
    return sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)  # a router, which is not Muon's, is small


def passing_bytes(config: TrainConfig, setting: Setting, model: GPT) -> dict[str, float]:
    """What a forward and backward pass takes and gives back."""
    shape, (kind, e, compiled, _, shard) = config.model, setting
    tokens = config.micro_batch_size * shape.seq_len
    # every compiled block makes its own copies, also of shared weights, and drops them unless all activations are kept (experts' it
    # keeps); autocast keeps one; sharded weights reach a GPU in that dtype already
    of_each = shape.share_layers * (config.activation_memory == 1 or shape.n_expert > 1)
    cast = matrix_params(model) * (of_each if compiled else 1) * (not shard or kind == "cpu")
    copies = (e * (cast + model.lm_head.weight.numel())) if e < 4 else 0
    whole = block_bytes(shape, setting)
    kept = 4 * shape.n_embd + config.activation_memory * (whole - 4 * shape.n_embd)  # at least a block's input
    if compiled and config.activation_memory < 1:
        kept = min(kept, whole - cheap_bytes(shape, setting))
    norm = (8 if shape.norm == "rmsnorm" else 4) * shape.n_embd  # the last one, which is never compiled
    again = tokens * (whole - kept)
    block = count(model.transformer.h[0])
    return {
        "copies for the products": copies,
        "activations": tokens * (shape.n_layer * kept + norm + e * shape.n_embd + 16),  # ids and targets have 8 bytes
        "loss, or a block's backward pass": max(loss_bytes(shape, tokens, setting), again + backward_bytes(shape, tokens, block, setting)),
    }


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
