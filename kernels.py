"""What model.py computes, once more, for speed and memory; the tests hold each part against the plain one.

Letters in the shapes as in model.py; N positions of all sequences together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device import set_compiler_flags

set_compiler_flags()  # before anything is compiled


class Linear(nn.Linear):
    """nn.Linear, but for one row of input, as when a token is generated: there reading the weights is all of the work, and on
    a CPU the loop that torch.compile makes reads them 1.5 times as fast as the matrix product of the library. On a GPU, where
    that has not been measured, Inductor does the same of its own accord, but not where there is a bias."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or not torch.compiler.is_compiling() or torch.is_grad_enabled():
            return super().forward(x)
        y = (self.weight * x.flatten()).sum(-1)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class OneDNNLinear(nn.Module):
    """A linear layer, and the GELU after it, as one call of oneDNN. On an AMD CPU its product in fp32 is 1.2 to
    1.4 times as fast as MKL's, which nn.Linear calls. No gradients."""

    @staticmethod
    def is_available(dtype: torch.dtype) -> bool:
        if not torch.backends.mkldnn.is_available():
            return False
        return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, gelu: bool = False):
        super().__init__()
        self.dtype, self.gelu = dtype, gelu
        self.weight = linear.weight.detach().to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        if dtype != linear.weight.dtype:  # a second set of weights it is in any case: in the order in which they are read, then
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        after = "gelu" if self.gelu else "none"
        # "tanh" is the form of GELU
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, after, [], "tanh")


@torch.no_grad()
def for_scoring(model):
    """A copy of a GPT for hidden() and logits() without gradients, faster on a CPU; elsewhere, without oneDNN, or in fp16 the
    model itself. Its matrix products are in autocast's dtype of now, or else the weights'. Take another one after a step of the
    optimizer: weights in another dtype are of the moment the copy was made."""
    weight = model.lm_head.weight
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    if weight.device.type != "cpu" or not OneDNNLinear.is_available(dtype):
        return model
    copy = type(model).on_meta(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)  # the same tensors
    for block in copy.transformer.h:
        block.attn.c_attn = OneDNNLinear(block.attn.c_attn, dtype)
        block.attn.c_proj = OneDNNLinear(block.attn.c_proj, dtype)
        if model.config.n_expert == 1:
            gelu = model.config.mlp == "gelu"
            block.mlp.c_fc = OneDNNLinear(block.mlp.c_fc, dtype, gelu)
            block.mlp.c_proj = OneDNNLinear(block.mlp.c_proj, dtype)
            block.mlp.activation = nn.Identity() if gelu else block.mlp.activation
    copy.lm_head = OneDNNLinear(copy.lm_head, dtype)
    return copy.eval()


def log_likelihoods(model, x: Tensor, targets: Tensor) -> Tensor:
    """Of the targets (N,), in nats, given what hidden() returned for the positions before them, (N, C); the softmax is in fp32.
    As many positions at a time as have logits that fit into a CPU's caches, or a GPU's memory."""
    at_once = 128 if x.device.type == "cpu" else 8192
    chunks = zip(x.split(at_once), targets.split(at_once), strict=True)
    return torch.cat([-F.cross_entropy(model.logits(some).float(), theirs, reduction="none") for some, theirs in chunks])


class BlockwiseAttention(torch.autograd.Function):
    """Causal attention, a block of queries at a time against the keys from the first that its window holds up to the block's
    end: what lies behind it, or too far back, is never computed. As in FlashAttention-2 (Dao, 2023, algorithms 1 and 2) the
    softmax weights are not kept for the backward pass but computed again from the log of their normalizer. On a CPU,
    compiled, it takes 0.5 to 0.8 of the fused kernel's time."""

    @staticmethod
    def blocks(T: int, window: int | None) -> list[tuple[slice, slice]]:
        """Of queries, and of the keys that they see, from the beginning of a block."""
        size = min(256, max(64, T // 2))  # smaller blocks compute less in vain, larger ones make faster products
        starts = range(0, T, size)
        first = [0 if window is None else max(0, start - window + 1) // size * size for start in starts]
        ends = [min(start + size, T) for start in starts]
        return [(slice(start, end), slice(f, end)) for start, f, end in zip(starts, first, ends, strict=True)]

    @staticmethod
    def unseen(block: slice, keys: slice, window: int | None, device) -> Tensor:
        """(block, keys), True where the query may not look."""
        ones = torch.ones(block.stop - block.start, keys.stop - keys.start, dtype=torch.bool, device=device)
        back = block.start - keys.start
        return ones.triu(back + 1) if window is None else ones.triu(back + 1) | ones.tril(back - window)

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q, k, v: (B, H, T, D) → (B, H, T, D)."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # or each product of a block would copy its part
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
        row_sum = (dy.float() * y.float()).sum(-1)[:, :, None]  # Σ of weight · its gradient over a row: (B, H, 1, T)
        for block, keys in blocks:
            # transposed, (B, H, keys, queries), so that torch.compile does not see the forward pass's scores and keep them
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
            """A block of keys is seen by its own queries and by those of later blocks, as far as the window goes."""
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


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int, chunk_loss) -> Tensor:
    """cross_entropy(x @ weight.T, targets), a chunk of positions at a time, so that the logits never stand in memory
    together. x: (N, C); weight: (≥ vocab_size, C), in fp32 also under autocast; targets: (N,), -100 does not count.
    chunk_loss: the function below, or what torch.compile makes of it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return ChunkedCrossEntropy.apply(x, weight, targets, vocab_size, chunk, chunk_loss, torch.is_grad_enabled())


def chunk_loss(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int, dx: Tensor | None, dw: Tensor | None) -> Tensor:
    """The sum of the cross entropies of n positions, x (n, C), w all rows of the table in x's dtype. Its gradients are written
    into dx, like x, and added to dw, like the table; None for none. This is compiled, and not the loop that calls it: of a
    loop torch.compile keeps each turn's part of dw until the end."""
    ids, counts, target = torch.arange(len(w), device=x.device), (targets != -100)[:, None], targets.clamp(min=0)[:, None]
    logits = (x @ w.t()).float().masked_fill(ids >= vocab_size, float("-inf"))
    log_norm = logits.logsumexp(-1, keepdim=True)
    if dx is not None:
        # not divided by the number of positions yet, which fp16 could not hold, and the sum over them by 256, so that it can
        dlogits = (((logits - log_norm).exp() - (ids == target).float()) * counts).to(x.dtype)
        dx.copy_(dlogits @ w)
        dw += (dlogits.t() @ (x / 256)).float() * 256
    return ((log_norm - logits.gather(1, target)) * counts).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk's loss is softmax(logits) - onehot(target), so it is computed in the forward pass, while the
    logits are there, and only scaled in the backward pass."""

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
