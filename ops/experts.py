"""Products of rows with the weight of their expert. E experts; N rows, sorted by expert."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def by_expert(x: Tensor, weights: Iterable[Tensor], ends: Tensor, loop: Callable) -> Tensor:
    """Multiplies the first ends[0] rows of x (N, in) with the first weight (out, in), those up to ends[1] with the second, and so on.
    Returns (N, out). ends: (E,) int32, the last is N. loop: one_by_one, or its uncompiled version."""
    weights = list(weights)
    if is_grouped(x, weights[0]):
        return grouped(x, weights, ends)
    return loop(x, weights, ends)


def is_grouped(x: Tensor, weight: Tensor) -> bool:
    """Whether one kernel computes all products: on CUDA in bf16, with rows of whole 16 bytes. Unlike the loop, it leaves `ends` on the
    GPU, so the CPU doesn't wait for it in every layer."""
    return x.is_cuda and product_dtype(x) == torch.bfloat16 and weight.size(0) % 8 == weight.size(1) % 8 == 0


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of x's matrix products."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def grouped(x: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    dtype = product_dtype(x)
    # stacked first: the gradients of the weights are then slices of one tensor, which takes one cast
    stacked = torch.stack(weights).to(dtype)  # (E, out, in)
    return F.grouped_mm(x.to(dtype), stacked.transpose(1, 2), offs=ends)


def one_by_one(x: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    parts = zip(x.tensor_split(ends[:-1].tolist()), weights, strict=True)
    # pads with rows of zeros to a multiple of 64: the CPU's library generates code for each new shape, and keeps it
    return torch.cat([(F.pad(part, (0, 0, 0, -len(part) % 64)) @ weight.t())[: len(part)] for part, weight in parts])
