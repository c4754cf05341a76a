"""A short causal convolution, and the earlier inputs that it reads: in a sequence, in a tree of texts, or from a KV cache."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Past(NamedTuple):
    """How to find the inputs of earlier positions. By default they are the rows before, and zeros before the first row."""

    parents: Tensor | None = None  # (B, T), for each row the row of the position before it, -1 for none
    age: Tensor | None = None  # (B, T), how many earlier positions belong to the same document. None: all
    recall: Callable[[str, Tensor, int], Tensor] | None = None  # a layer's memory: see KVCache.recall

    def lags(self, x: Tensor, count: int, place: str) -> list[Tensor]:
        """Returns x (B, T, C) as it was 0, …, count - 1 positions earlier, with zeros where there was none. place: this x's name in the
        layer's memory."""
        T = x.size(1)
        if self.parents is not None:
            found = [x]
            while len(found) < count:
                rows = self.parents.clamp(min=0)[..., None].expand_as(x)
                found.append(found[-1].gather(1, rows) * (self.parents >= 0)[..., None])
        else:
            before = x.new_zeros(x.size(0), count - 1, x.size(2)) if self.recall is None else self.recall(place, x, count - 1)
            joined = torch.cat([before, x], dim=1)
            found = [joined[:, count - 1 - i : count - 1 - i + T] for i in range(count)]
        if self.age is not None:
            found = [y * (self.age >= i)[..., None] for i, y in enumerate(found)]
        return found


def parents_of(positions: Tensor, mask: Tensor) -> Tensor:
    """Returns for each row the row that it sees one position earlier, or -1: (B, T). positions: (B, T) or (T,). mask: (B, 1, T, T) or
    (T, T), True where a row may look."""
    is_parent = mask & (positions[..., None, None, :] == positions[..., None, :, None] - 1)
    return torch.where(is_parent.any(-1), is_parent.int().argmax(-1), -1).flatten(0, -2)


class ShortConv(nn.Module):
    """x[t] + Σ over i < width of weight[i] · x[t - i], for each channel (So et al., 2021; Allen-Zhu, 2025). At first this is x."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, channels))

    def forward(self, x: Tensor, past: Past, place: str) -> Tensor:
        """x: (B, T, C) → (B, T, C). place: as in Past.lags."""
        lags = past.lags(x, len(self.weight), place)
        return x + sum(weight * lag for weight, lag in zip(self.weight.type_as(x), lags, strict=True))
