"""A cache of keys and values, so that generating a token computes one position only. It also remembers the inputs of short
convolutions. Shapes as in model.py; K heads have keys and values."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ops.attention import sees


def next_positions(idx: Tensor, cache: "KVCache | None", seq_len: int) -> Tensor:
    """Returns the positions (T,) of idx (B, T), which follow those in the cache. Advances cache.length.
    ValueError if they go beyond seq_len, or if the cache has no room for them."""
    start = 0 if cache is None else cache.length
    end = start + idx.size(1)
    limit = seq_len if cache is None else min(seq_len, cache.max_len)
    if end > limit:
        whose = "model sees" if limit == seq_len else "cache holds"
        raise ValueError(f"{end} positions, but the {whose} at most {limit}: shorten the input")
    if cache is not None:
        cache.length = end
    return torch.arange(start, end, device=idx.device)


class KVCache:
    """Keys and values of the positions so far.

    A layer allocates room for max_len positions (or its window + slack) at its first use, when its shape and dtype are known.
    Attention runs over all of it under a mask: torch.compile and CUDA graphs need shapes that never change. You may lower
    length by up to slack positions, to forget the last ones.
    """

    def __init__(self, max_len: int, slack: int = 0):
        self.max_len, self.slack = max_len, slack
        self.length = 0
        self.layers: dict[int, LayerCache] = {}
        self.inputs: dict[tuple[int, str], Tensor] = {}  # (layer, place) → the latest inputs, (B, room, C), position p at p modulo room
        self.document_of: Tensor | None = None  # (B, max_len), each position's document number
        self.made_for: tuple | None = None  # sample.py's note: for which texts it can be used again

    def layer(self, number: int, positions: Tensor, window: int | None = None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Returns a function that stores a layer's new keys and values at positions (T,), and returns all that they may see."""
        if number not in self.layers:
            self.layers[number] = LayerCache(self.room(window), self.is_ring(window), self.slack)
        return partial(self.layers[number].append, positions)

    def recall(self, layer: int, positions: Tensor, place: str, x: Tensor, count: int) -> Tensor:
        """Stores a layer's inputs x (B, T, C) of the new positions (T,). Returns those of the `count` positions before, (B, count, C),
        with zeros before the first."""
        B, T, C = x.shape
        if (layer, place) not in self.inputs:
            self.inputs[layer, place] = x.new_zeros(B, count + self.slack, C)
        stored = self.inputs[layer, place]
        before = positions[0] - torch.arange(count, 0, -1, device=x.device)
        found = stored[:, before % stored.size(1)] * (before >= 0)[:, None]
        kept = min(T, stored.size(1))
        stored.index_copy_(1, positions[T - kept :] % stored.size(1), x[:, T - kept :])
        return found

    def room(self, window: int | None) -> int:
        return self.max_len if window is None else min(self.max_len, window + self.slack)

    def is_ring(self, window: int | None) -> bool:
        return self.room(window) < self.max_len

    def mask(self, positions: Tensor, window: int | None = None) -> Tensor:
        """Returns (T, S), True where a query at the new positions (T,) may look."""
        return sees(positions[:, None], self.positions(positions, window)[None, :], window)

    def positions(self, new: Tensor, window: int | None = None) -> Tensor:
        """Returns the position (S,) of each key that LayerCache.append returns, negative for an empty slot."""
        room = self.room(window)
        slots = torch.arange(room, device=new.device)
        if self.is_ring(window) and len(new) > self.slack + 1:
            last = new[0] - 1
            return torch.cat([last - (last - slots) % room, new])
        return new[-1] - (new[-1] - slots) % room

    def documents(self, starts: Tensor, positions: Tensor) -> Tensor:
        """Returns each position's document number, (B, max_len). starts: (B, T), True where one of the new positions begins a document."""
        if self.document_of is None:
            self.document_of = starts.new_zeros(len(starts), self.max_len, dtype=torch.long)
        before = self.document_of[:, (positions[:1] - 1).clamp(min=0)] * (positions[0] > 0)  # (B, 1)
        return self.document_of.index_copy_(1, positions, before + starts.cumsum(1))

    def mark_static(self):
        """Tells torch.compile that the cache never moves. Call it when every layer has its memory: a CUDA graph may only write in
        place to tensors marked like this."""
        for x in self.tensors():
            torch._dynamo.mark_static_address(x)

    def reset(self):
        """Forgets everything, but keeps its memory."""
        self.length = 0
        for x in self.tensors():
            x.zero_()  # the mask hides old values, but 0 · NaN would show one

    def tensors(self) -> list[Tensor]:
        kept = [*(x for layer in self.layers.values() for x in (layer.keys, layer.values)), *self.inputs.values()]
        return kept if self.document_of is None else [*kept, self.document_of]

    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors() if x is not self.document_of)


class LayerCache:
    """One layer's keys and values. Position p is in slot p modulo room."""

    def __init__(self, room: int, is_ring: bool, slack: int):
        self.room, self.is_ring, self.slack = room, is_ring, slack
        self.keys: Tensor | None = None  # (B, K, room, D)
        self.values: Tensor | None = None

    def append(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, K, T, D) of the new positions (T,). Returns all keys and values that they may see, (B, K, S, D), with
        zeros in empty slots."""
        if self.keys is None:
            B, K, _, D = k.shape
            self.keys, self.values = k.new_zeros(B, K, self.room, D), v.new_zeros(B, K, self.room, D)
        seen = self.keys, self.values
        if self.is_ring and len(positions) > self.slack + 1:  # the last new keys overwrite slots that the first new queries still see
            seen = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
            k, v, positions = k[:, :, -self.room :], v[:, :, -self.room :], positions[-self.room :]
        slots = positions % self.room
        self.keys.index_copy_(2, slots, k)
        self.values.index_copy_(2, slots, v)
        return seen
