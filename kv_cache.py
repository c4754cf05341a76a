"""Keys and values of what was read before, for generating; shapes as in model.py."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the positions seen so far, so that generating a token costs one position, not all.

    Room for max_len positions, or as many as the layer's window and slack, is taken at a layer's first use, when its shape and
    dtype are known, and attention is over all of it under a mask: shapes that never change are what torch.compile and CUDA
    graphs ask for. length may be set back by up to slack positions, to forget the last ones.
    """

    def __init__(self, max_len: int, slack: int = 0):
        self.max_len, self.slack = max_len, slack
        self.length = 0
        self.layers: dict[int, LayerCache] = {}
        self.document_of: Tensor | None = None  # (B, max_len), of each position

    def layer(self, number: int, window: int | None) -> "LayerCache":
        if number not in self.layers:
            self.layers[number] = LayerCache(self.room(window), self.is_ring(window), self.slack)
        return self.layers[number]

    def room(self, window: int | None) -> int:
        return self.max_len if window is None else min(self.max_len, window + self.slack)

    def is_ring(self, window: int | None) -> bool:
        return self.room(window) < self.max_len

    def positions(self, window: int | None, new: Tensor) -> Tensor:
        """(S,): which position each key that LayerCache.append returns is of, negative where there is none yet."""
        room = self.room(window)
        slots = torch.arange(room, device=new.device)
        if self.is_ring(window) and len(new) > self.slack + 1:
            last = new[0] - 1
            return torch.cat([last - (last - slots) % room, new])
        return new[-1] - (new[-1] - slots) % room

    def documents(self, starts: Tensor, positions: Tensor) -> Tensor:
        """starts (B, T): where among the new positions (T,) a document begins → (B, max_len), the documents of all."""
        if self.document_of is None:
            self.document_of = starts.new_zeros(len(starts), self.max_len, dtype=torch.long)
        before = self.document_of[:, (positions[:1] - 1).clamp(min=0)] * (positions[0] > 0)  # (B, 1)
        return self.document_of.index_copy_(1, positions, before + starts.cumsum(1))

    def stay(self):
        """Tells torch.compile, once all layers have room, that it stays where it is: a CUDA graph may change in place only what
        is said to."""
        for layer in self.layers.values():
            for x in (layer.keys, layer.values):
                torch._dynamo.mark_static_address(x)
        if self.document_of is not None:
            torch._dynamo.mark_static_address(self.document_of)

    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers.values())


class LayerCache:
    """The part of one layer: position p lies in slot p modulo room."""

    def __init__(self, room: int, is_ring: bool, slack: int):
        self.room, self.is_ring, self.slack = room, is_ring, slack
        self.keys: Tensor | None = None  # (B, K, room, D)
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """k, v of the new positions (T,): (B, K, T, D) → of all that they may see, (B, K, S, D), zeros where there is none yet."""
        if self.keys is None:
            B, K, _, D = k.shape
            self.keys, self.values = k.new_zeros(B, K, self.room, D), v.new_zeros(B, K, self.room, D)
        seen = self.keys, self.values
        if self.is_ring and len(positions) > self.slack + 1:  # the last of them take the slots of what the first still see
            seen = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
            k, v, positions = k[:, :, -self.room :], v[:, :, -self.room :], positions[-self.room :]
        slots = positions % self.room
        self.keys.index_copy_(2, slots, k)
        self.values.index_copy_(2, slots, v)
        return seen
