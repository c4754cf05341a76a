"""Serves training sequences from shards of tokens, in an endless stream. common/shards.py reads the shards."""

from collections.abc import Iterator

import numpy as np

from common.shards import Shard, Shards, check_id


class TokenStream:
    """Joins a split's shards into one row of tokens, cuts it into fixed sequences and serves them in an endless, seeded order.

    Sequence i is tokens [i·T, i·T + T]: T inputs and, shifted by one, T targets. It may cross the end of a shard. So every token
    is a target exactly once per epoch, except the row's first token and the last (N - 1) mod T, too few for a sequence.
    The sequence at a position is a pure function of (seed, position). So there is no state to save, and world size and micro
    batch change nothing.
    """

    def __init__(self, shards: Shards, split: str, seq_len: int, shuffle: bool = True, seed: int = 1337):
        self.source, self.shards = shards, shards.open(split)
        self.ends = np.cumsum([shard.tokens for shard in self.shards])  # of each shard, in the row
        self.vocab_size = shards.vocab_size
        self.seq_len = seq_len
        self.shuffle = shuffle
        self.seed = seed
        self.sequences_per_epoch = (int(self.ends[-1]) - 1) // seq_len
        if self.sequences_per_epoch < 1:
            raise ValueError(
                f"{shards.folder} has {self.ends[-1]:,} {split} tokens, fewer than one sequence of {seq_len} + 1: "
                "choose a smaller --seq-len or more data"
            )

    def batch(self, positions) -> tuple[np.ndarray, np.ndarray]:
        """Returns inputs and targets, each int64 (B, T), at B positions of the stream. ValueError if an id is not in the
        vocabulary."""
        T = self.seq_len
        rows = self.rows([self.sequence_at(p) * T for p in positions], T + 1)  # (B, T + 1)
        return rows[:, :-1].copy(), rows[:, 1:].copy()  # two copies: validation writes into its targets

    def sequence_at(self, position: int) -> int:
        epoch, place = divmod(int(position), self.sequences_per_epoch)
        return permute(place, self.sequences_per_epoch, mix(self.seed, epoch)) if self.shuffle else place

    def place(self, position: int) -> str:
        """Names the shard and token where the sequence at a position begins, for messages."""
        shard, offset = self.locate(self.sequence_at(position) * self.seq_len)
        return f"{self.shards[shard].path.name} from token {offset:,}"

    def locate(self, start: int) -> tuple[int, int]:
        """Returns the shard of the row's token `start`, and the token's offset in it."""
        shard = int(np.searchsorted(self.ends, start, side="right"))
        return shard, start - int(self.ends[shard]) + self.shards[shard].tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns tokens [start, start + count) of the row as int64, across shards."""
        return self.rows([start], count)[0]

    def rows(self, starts: list[int], count: int) -> np.ndarray:
        """Returns `count` tokens of the row from each start, int64 (len(starts), count). Reads all at once: shards may be in a bucket."""
        spans = [span for start in starts for span in self.spans(start, count)]
        parts = self.source.read(spans)
        for (shard, _, _), part in zip(spans, parts, strict=True):
            check_id(int(part.max()), self.vocab_size, shard.path)  # a shard may be unverified, or change later
        return np.concatenate(parts).astype(np.int64).reshape(len(starts), count)

    def spans(self, start: int, count: int) -> Iterator[tuple[Shard, int, int]]:
        """Yields where tokens [start, start + count) of the row are: shard, first token in it, number of tokens."""
        while count > 0:
            index, offset = self.locate(start)
            n = min(count, self.shards[index].tokens - offset)
            yield self.shards[index], offset, n
            start, count = start + n, count - n

    def needed(self, first: int, end: int) -> list[int]:
        """Returns the indices of the shards that positions [first, end) read, in the order in which they are needed."""
        n, everything = self.sequences_per_epoch, list(range(len(self.shards)))
        place = first % n
        if self.shuffle or end <= first:
            return everything if end > first else []
        begin = self.locate(place * self.seq_len)[0]
        if place + end - first > n:  # into another epoch
            return everything[begin:] + everything[:begin]
        return everything[begin : self.locate((place + end - first) * self.seq_len)[0] + 1]


def rank_positions(step: int, batch: int, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """Returns a rank's positions in a step, one range per micro step. batch and micro_batch are in sequences.

    A step takes positions [step·batch, (step + 1)·batch) for any world size. They go to micro steps in order, and within a
    micro step to ranks in order.
    """
    starts = range(step * batch + rank * micro_batch, (step + 1) * batch, world_size * micro_batch)
    return [range(start, start + micro_batch) for start in starts]


def mix(a: int, b: int) -> int:
    """Hashes two integers into 64 bits (splitmix64: Steele, Lea & Flood, 2014)."""
    x = (a * 0x9E3779B97F4A7C15 + b + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def permute(i: int, n: int, key: int) -> int:
    """Returns the image of i under a pseudorandom permutation of range(n), chosen by key, without a table.

    A Feistel network permutes 2^(2·half) ≥ n numbers; apply it until the result is below n (Black & Rogaway, 2002).
    NumPy's shuffle may change its order from release to release; this order never changes.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for round in range(4):
            left, right = right, left ^ (mix(key + round, right) & mask)
        i = left << half | right
        if i < n:
            return i
