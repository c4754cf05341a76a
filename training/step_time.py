"""Estimates how long a step takes on many GPUs."""

import math
from typing import NamedTuple

import torch

from common import device
from common.device import ASSUMED_MFU
from training.config import TrainConfig
from variants import build_on_meta, flops_per_token


class Cluster(NamedTuple):
    """GPUs and their links, in bytes per second and direction. The defaults are those of a DGX H100: 8 GPUs per node, NVLink with
    900 GB/s in both directions together, one 400 Gb/s network card per GPU. Latencies, in seconds, are those of NCCL's cost model
    (src/graph/tuning.cc)."""

    n: int
    node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    hop: float = 3.4e-6  # within a node
    far_hop: float = 14e-6  # between nodes
    call: float = 8.4e-6

    @property
    def nodes(self) -> int:
        return -(-self.n // self.node)

    @property
    def ring(self) -> float:
        """Bytes per second through each GPU of a ring. Between nodes, each of a node's network cards serves its own ring."""
        inside = min(self.n, self.node)
        return self.nvlink if self.nodes == 1 else min(self.nvlink, inside * self.network)

    def gather(self, size: float) -> float:
        """Seconds for an all-gather to, or a reduce-scatter of, `size` bytes in a ring."""
        if self.n == 1:
            return 0.0
        far = self.nodes if self.nodes > 1 else 0
        return self.call + (self.n - 1 - far) * self.hop + far * self.far_hop + self.sent(size) / self.ring

    def reduce(self, size: float) -> float:
        """Seconds for an all-reduce of `size` bytes. Sends twice as much as gather, with the latency of a ring or a tree: the lower."""
        if self.n == 1:
            return 0.0
        far = 2 * self.nodes if self.nodes > 1 else 0
        ring = (2 * (self.n - 1) - far) * self.hop + far * self.far_hop
        tree = 2 * ((min(self.n, self.node) - 1) * self.hop + math.log2(self.nodes) * self.far_hop)
        return self.call + min(ring, tree) + 2 * self.sent(size) / self.ring

    def sent(self, size: float) -> float:
        """Bytes that each GPU sends in one round of the ring."""
        return (self.n - 1) / self.n * size


class Step(NamedTuple):
    """A step on one GPU: seconds of compute, of communication, and in total (they overlap); bytes sent."""

    compute: float
    communication: float
    seconds: float
    sent: float

    @property
    def efficiency(self) -> float:
        """The fraction of a step that is compute: 1 for a single GPU."""
        return self.compute / self.seconds


BUCKET = 25 * 2**20  # bytes of gradients in one of DDP's buckets


def ddp_step(compute: float, passes: int, params: int, last: int, cluster: Cluster) -> Step:
    """A step with DDP. It sums fp32 gradients over all GPUs once, during the backward part of the last pass (two thirds of its time). The
    last bucket holds the token table and overlaps with nothing. compute: seconds per step. last: parameters in the last bucket."""
    buckets = math.ceil(4 * (params - last) / BUCKET)
    overlapped = buckets * cluster.reduce(4 * (params - last) / max(1, buckets))
    end = cluster.reduce(4 * last)
    seconds = compute + max(0.0, overlapped - compute / passes * 2 / 3) + end
    return Step(compute, overlapped + end, seconds, 2 * cluster.sent(4 * params))


def fsdp_step(compute: float, passes: int, params: int, rest: int, blocks: int, cluster: Cluster, e: int = 2, e_rest: int = 4) -> Step:
    """A step with FSDP. Each pass gathers every block's weights (e bytes each) forward (a third of the time) and backward, one block ahead,
    and scatters fp32 gradients. The rest, embeddings and head (e_rest bytes each), is gathered once. The first gather and the last scatter
    overlap with nothing."""
    part = (params - rest) / blocks
    gather, scatter = cluster.gather(e * part), cluster.gather(4 * part)
    ends = cluster.gather(e_rest * rest) + cluster.gather(4 * rest)
    forward, backward = blocks * gather, blocks * (gather + scatter)
    work = compute / passes
    once = max(work / 3, forward - gather) + max(work * 2 / 3, backward - scatter) + gather + scatter + ends
    sent = cluster.sent((2 * e + 4) * (params - rest) + (e_rest + 4) * rest)
    return Step(compute, passes * (forward + backward + ends), passes * once, passes * sent)


def step_on(config: TrainConfig, n: int, shard: bool, gpu: str, weak: bool = False, dtype: torch.dtype = torch.bfloat16) -> Step:
    """A step of these settings on n GPUs at the assumed MFU. The GPUs split the batch; with weak, each takes one micro batch. dtype: of
    the matrix products."""
    model = build_on_meta(config.model)
    sequences = config.micro_batch_size if weak else config.total_batch_tokens // config.model.seq_len // n
    passes = max(1, sequences // config.micro_batch_size)
    compute = sequences * config.model.seq_len * flops_per_token(model) / (ASSUMED_MFU * device.peak_of(gpu, dtype))
    params = sum(p.numel() for p in model.parameters())
    if shard:
        rest = params - sum(p.numel() for p in model.transformer.h.parameters())
        return fsdp_step(compute, passes, params, rest, len(model.transformer.h), Cluster(n), dtype.itemsize)
    return ddp_step(compute, passes, params, model.transformer.wte.weight.numel(), Cluster(n))
