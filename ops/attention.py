"""Attention that is faster than model.py's and takes more kinds of mask. Shapes as in model.py; K heads have keys and values, and
each serves H / K heads of queries."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ops import choice


def sees(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether a query position may look at a key position: not ahead, not beyond the window. A negative key position is an empty slot."""
    seen = (key <= query) & (key >= 0)
    return seen if window is None else seen & (query - key < window)


def causal_mask(T: int, S: int, device, window: int | None = None) -> Tensor:
    """Returns (T, S), True where a query may look. The T queries are the last of the S positions."""
    return sees(torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device), window)


def layer_windows(window: int | None, pattern: str, n_layer: int, seq_len: int) -> list[int | None]:
    """Returns each layer's window, None for a layer without one. pattern: S (short) and L (long), repeated over the layers."""
    window = window if window is not None and window < seq_len else None
    return [window if pattern[layer % len(pattern)] == "S" else None for layer in range(n_layer)]


def block_mask(T: int, window: int | None, documents: Tensor | None, device) -> BlockMask:
    """Returns a mask for FlexAttention, which skips fully masked blocks (Dong et al., 2024). documents: (B, T), the number of each
    position's document. Caches masks without documents. On CUDA, compiles the code that makes one with documents: eager code would store
    all (B, T, T) bits."""
    if documents is None:
        return window_mask(T, window, device)

    def seen(batch, head, query, key):
        return sees(query, key, window) & (documents[batch, query] == documents[batch, key])

    create = compiled_create_block_mask() if documents.is_cuda else create_block_mask
    return create(seen, len(documents), None, T, T, device=device)


@functools.lru_cache(maxsize=16)
def window_mask(T: int, window: int | None, device) -> BlockMask:
    return create_block_mask(lambda batch, head, query, key: sees(query, key, window), None, None, T, T, device=device)


@functools.cache
def compiled_create_block_mask():
    return torch.compile(create_block_mask)


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns k and v (B, H, S, D), with each head repeated for the queries that it serves."""
    group = q.size(1) // k.size(1)
    return (k, v) if group == 1 else (k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None, window: int | None = None) -> Tensor:
    """Returns softmax(q kᵀ / √D) v, (B, H, T, D), from the fastest code for this device and mask. Stores no (T, S) scores if T > 1.

    q: (B, H, T, D). k, v: (B, K, S, D). mask: (…, T, S), True where a query may look. Without a mask, a query sees itself and
    everything before it, within the window. Only this function chooses attention code by device.
    """
    compiled, on_cpu, group = torch.compiler.is_compiling(), q.device.type == "cpu", q.size(1) // k.size(1)
    if isinstance(mask, BlockMask):
        if group & (group - 1):  # FlexAttention's kernel for short sequences takes only powers of 2
            k, v = repeat_heads(q, k, v)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=k.size(1) < q.size(1))
    if group > 1 and shares_heads(q, mask, window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k, v = repeat_heads(q, k, v)
    if compiled and on_cpu and mask is None and choice.forced("attention") != "fused":
        return BlockwiseAttention.apply(q, k, v, window)
    if mask is not None and q.size(2) == 1:
        if compiled:  # too little work for a fused kernel. On CUDA, a mask also rules out FlashAttention, and the kernel that takes one
            return one_query(q, k, v, mask)  # would read all keys of a head in a single block of threads
        if on_cpu and q.dtype == torch.bfloat16:  # the fused kernel takes up to 5 times as long
            return one_query(q.float(), k.float(), v.float(), mask).to(q.dtype)
    if window is not None and mask is None:
        mask = causal_mask(q.size(2), q.size(2), q.device, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """fused_attention for one query, with all scores in memory."""
    scores = q @ k.transpose(2, 3) / q.size(3) ** 0.5  # (B, H, 1, S)
    return F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v


def shares_heads(q: Tensor, mask: Tensor | None, window: int | None) -> bool:
    """Whether the fused kernel lets several heads of q read one head of keys. On CUDA only FlashAttention and cuDNN do so in every
    supported PyTorch, and they need 16 bits. The plain code that PyTorch falls back to would store all scores."""
    return q.is_cuda and q.dtype == torch.bfloat16 and q.size(3) <= 256 and mask is None and window is None


class BlockwiseAttention(torch.autograd.Function):
    """Causal attention, one block of queries at a time. Skips the blocks of keys that a block of queries can't see: those after it,
    and those too far back for the window.

    As in FlashAttention-2 (Dao, 2023, algorithms 1 and 2), the backward pass recomputes the softmax weights from the log of their
    normalizer. On a CPU, compiled, this takes 0.5 to 0.8 times as long as the fused kernel.
    """

    @staticmethod
    def blocks(T: int, window: int | None) -> list[tuple[slice, slice]]:
        """Returns each block of queries with the keys to multiply it with, which begin where a block begins."""
        size = min(256, max(64, T // 2))  # smaller blocks waste less work on masked scores, larger ones multiply faster
        starts = range(0, T, size)
        first = [0 if window is None else max(0, start - window + 1) // size * size for start in starts]
        ends = [min(start + size, T) for start in starts]
        return [(slice(start, end), slice(f, end)) for start, f, end in zip(starts, first, ends, strict=True)]

    @staticmethod
    def unseen(block: slice, keys: slice, window: int | None, device) -> Tensor:
        """Returns (block, keys), True where a query may not look."""
        ones = torch.ones(block.stop - block.start, keys.stop - keys.start, dtype=torch.bool, device=device)
        back = block.start - keys.start
        return ones.triu(back + 1) if window is None else ones.triu(back + 1) | ones.tril(back - window)

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q, k, v: (B, H, T, D) → (B, H, T, D)."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # else every product copies its block
        y, log_norm = [], []
        for block, keys in BlockwiseAttention.blocks(q.size(2), window):
            scores = (q[:, :, block] @ k[:, :, keys].transpose(2, 3)).float() / q.size(3) ** 0.5
            scores = scores.masked_fill(BlockwiseAttention.unseen(block, keys, window, q.device), float("-inf"))
            log_norm.append(scores.logsumexp(-1))  # (B, H, block)
            y.append((scores - log_norm[-1][..., None]).exp().to(v.dtype) @ v[:, :, keys])
        y = torch.cat(y, dim=2)
        ctx.window = window
        ctx.save_for_backward(q, k, v, y, torch.cat(log_norm, dim=2))
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, y, log_norm = ctx.saved_tensors
        blocks, dq, dk, dv = BlockwiseAttention.blocks(q.size(2), ctx.window), [], [], []
        row_sum = (dy.float() * y.float()).sum(-1)[:, :, None]  # Σ over keys of weight · its gradient: (B, H, 1, T)
        for block, keys in blocks:
            # transposed, (B, H, keys, queries): torch.compile would recognize the forward pass's scores and store them
            q_block, k_seen, v_seen, dy_block = q[:, :, block], k[:, :, keys], v[:, :, keys], dy[:, :, block]
            scores = (k_seen @ q_block.transpose(2, 3)).float() / q.size(3) ** 0.5
            unseen = BlockwiseAttention.unseen(block, keys, ctx.window, q.device).t()
            weights = (scores - log_norm[:, :, None, block]).exp().masked_fill(unseen, 0)
            dweights = (v_seen @ dy_block.transpose(2, 3)).float()
            dscores = (weights * (dweights - row_sum[..., block]) / q.size(3) ** 0.5).to(q.dtype)
            dq.append(dscores.transpose(2, 3) @ k_seen)
            dk.append(dscores @ q_block)
            dv.append(weights.to(v.dtype) @ dy_block)

        def over_queries(parts: list[Tensor]) -> Tensor:
            """Sums the gradients of each block of keys over the blocks of queries that see it: its own and later ones."""
            sums = []
            for own, _ in blocks:
                seen_by = [
                    part[:, :, own.start - keys.start : own.stop - keys.start].float()
                    for part, (_, keys) in zip(parts, blocks, strict=True)
                    if keys.start <= own.start and own.stop <= keys.stop
                ]
                sums.append(sum(seen_by))
            return torch.cat(sums, dim=2).to(q.dtype)

        return torch.cat(dq, dim=2), over_queries(dk), over_queries(dv), None
