"""Cross entropy in chunks of positions, so that only one chunk's logits are materialized at once. N: the positions of all sequences
together. Other letters as in model.py."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGITS, MAX_LOGITS_CUDA = 2**26, 2**29  # most logits materialized at once


def loss_chunks(n: int, rows: int, kind: str) -> int:
    """Returns the number of chunks for n positions with `rows` logits each: as few as this kind of device allows, or up to twice as
    many if all chunks then have one length. torch.compile makes slower code for lengths that vary."""
    fewest = -(-n * rows // (MAX_LOGITS_CUDA if kind == "cuda" else MAX_LOGITS))
    return next((parts for parts in range(fewest, 2 * fewest) if n % parts == 0), fewest)


def positions_at_once(x: Tensor, rows: int) -> int:
    """Returns how many positions of x (N, C), with `rows` logits each, may be materialized at once."""
    return -(-len(x) // loss_chunks(len(x), rows, x.device.type))


def in_chunks(plain: Callable, chunk: Callable | None = None) -> Callable:
    """Returns a loss that equals plain, but computes many positions in chunks.

    plain: cross entropy of (x (N, C), weight (≥ V, C), targets (N,), V). chunk: chunk_loss, or its compiled version.
    """

    return partial(loss_in_chunks, plain, chunk or chunk_loss)


def loss_in_chunks(plain: Callable, chunk: Callable, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    size = positions_at_once(x, len(weight))
    if size >= len(x):
        return plain(x, weight, targets, vocab_size)
    return chunked_cross_entropy(x, weight, targets, vocab_size, size, chunk)


def log_likelihoods(logits: Callable[[Tensor], Tensor], x: Tensor, targets: Tensor) -> Tensor:
    """Returns the log-likelihood in nats of each target (N,), given the hidden states x (N, C). The softmax is in fp32.
    logits: (n, C) → (n, V), called with as many positions as fit into a CPU's caches, or a GPU's memory."""
    at_once = 128 if x.device.type == "cpu" else 8192
    chunks = zip(x.split(at_once), targets.split(at_once), strict=True)
    return torch.cat([-F.cross_entropy(logits(x_chunk).float(), chunk_targets, reduction="none") for x_chunk, chunk_targets in chunks])


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int, chunk_loss) -> Tensor:
    """Returns cross_entropy(x @ weight.T, targets), computed from `chunk` positions at a time.
    x: (N, C). weight: (≥ vocab_size, C), in fp32 even under autocast. targets: (N,), -100 is ignored. chunk_loss: the function
    below, or its compiled version."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return ChunkedCrossEntropy.apply(x, weight, targets, vocab_size, chunk, chunk_loss, torch.is_grad_enabled())


def chunk_loss(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int, dx: Tensor | None, dw: Tensor | None) -> Tensor:
    """Returns the summed cross entropy of n positions. Writes its gradient into dx and adds it to dw; None: no gradient.
    x: (n, C). w: all rows of the table, in x's dtype. dx: like x. dw: like the table.

    Compile this function, not the loop that calls it: torch.compile would keep every iteration's part of dw until the loop ends.
    """
    ids, counts, target = torch.arange(len(w), device=x.device), (targets != -100)[:, None], targets.clamp(min=0)[:, None]
    logits = (x @ w.t()).float().masked_fill(ids >= vocab_size, float("-inf"))
    largest = logits.amax(-1, keepdim=True)
    # spelled out, because torch.compile then finds maximum and sum in one pass over the logits on CUDA; logsumexp takes two
    log_norm = (logits - largest).exp().sum(-1, keepdim=True).log() + largest
    if dx is not None:
        # fp16: gradients divided by the number of positions would underflow, so backward() divides; the sum would overflow, hence 256
        dlogits = (((logits - log_norm).exp() - (ids == target).float()) * counts).to(x.dtype)
        dx.copy_(dlogits @ w)
        dw += (dlogits.t() @ (x / 256)).float() * 256
    return ((log_norm - logits.gather(1, target)) * counts).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient in the forward pass, while the logits are in memory: it is softmax(logits) - onehot(target).
    The backward pass only scales it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int, chunk_loss, needs_grad: bool) -> Tensor:
        w, total, n = weight.to(x.dtype), torch.zeros((), dtype=torch.float32, device=x.device), (targets != -100).sum()
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight)) if needs_grad else (None, None)
        for part in (slice(start, start + chunk) for start in range(0, len(x), chunk)):
            total += chunk_loss(x[part], w, targets[part], vocab_size, dx[part] if needs_grad else None, dw)
        if needs_grad:
            ctx.save_for_backward(dx, dw, n)
        return total / n

    @staticmethod
    def backward(ctx, dloss: Tensor):
        dx, dw, n = ctx.saved_tensors
        return dx * (dloss / n), dw * (dloss / n), None, None, None, None, None
