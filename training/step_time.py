"""How long a step takes on many GPUs, by calculation."""

import math
from typing import NamedTuple

import torch

from common import device
from common.device import ASSUMED_MFU
from training.config import TrainConfig
from variants import build_on_meta, flops_per_token


class Cluster(NamedTuple):
    """GPUs and the links between them, bytes a second in each direction: 8 to a node as in a DGX H100 (NVLink 900 GB/s both ways
    together, a network card of 400 Gb/s for each GPU). Latencies, in seconds: NCCL's own for its cost model (src/graph/tuning.cc)."""

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
        """Bytes a second through each GPU of a ring: between nodes all network cards of a node work, each for a ring of its own."""
        inside = min(self.n, self.node)
        return self.nvlink if self.nodes == 1 else min(self.nvlink, inside * self.network)

    def gather(self, size: float) -> float:
        """Seconds of an all-gather to, or a reduce-scatter of, size bytes, in a ring."""
        if self.n == 1:
            return 0.0
        far = self.nodes if self.nodes > 1 else 0
        return self.call + (self.n - 1 - far) * self.hop + far * self.far_hop + self.sent(size) / self.ring

    def reduce(self, size: float) -> float:
        """Seconds of an all-reduce: twice the above in bytes; in a ring, or in a tree where its latency is less."""
        if self.n == 1:
            return 0.0
        far = 2 * self.nodes if self.nodes > 1 else 0
        ring = (2 * (self.n - 1) - far) * self.hop + far * self.far_hop
        tree = 2 * ((min(self.n, self.node) - 1) * self.hop + math.log2(self.nodes) * self.far_hop)
        return self.call + min(ring, tree) + 2 * self.sent(size) / self.ring

    def sent(self, size: float) -> float:
        """Bytes that each GPU sends in one turn of the ring."""
        return (self.n - 1) / self.n * size


class Step(NamedTuple):
    """A step of one GPU: seconds of its own work, of communication, and of both as far as they do not overlap; bytes it sends."""

    compute: float
    communication: float
    seconds: float
    sent: float

    @property
    def efficiency(self) -> float:
        """The share of the time in which it works, of what one GPU without others would have."""
        return self.compute / self.seconds


BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at a time


def ddp_step(compute: float, passes: int, params: int, last: int, cluster: Cluster) -> Step:
    """Gradients in fp32, summed once a step over all GPUs while the last pass goes backward, two thirds of its time; the last bucket,
    with the token table in it, is full only at the end. compute: seconds of a step's work. last: parameters of that bucket."""
    buckets = math.ceil(4 * (params - last) / BUCKET)
    overlapped = buckets * cluster.reduce(4 * (params - last) / max(1, buckets))
    end = cluster.reduce(4 * last)
    seconds = compute + max(0.0, overlapped - compute / passes * 2 / 3) + end
    return Step(compute, overlapped + end, seconds, 2 * cluster.sent(4 * params))


def fsdp_step(compute: float, passes: int, params: int, rest: int, blocks: int, cluster: Cluster, e: int = 2, e_rest: int = 4) -> Step:
    """Each pass gathers each block's weights, of e bytes, once forward (a third of the time) and once backward, while the block before is
    computed, and divides its gradients, in fp32; embeddings and head, the rest of the parameters, of e_rest bytes, are gathered once. What
    is first gathered and last divided waits."""
    part = (params - rest) / blocks
    gather, scatter = cluster.gather(e * part), cluster.gather(4 * part)
    ends = cluster.gather(e_rest * rest) + cluster.gather(4 * rest)
    forward, backward = blocks * gather, blocks * (gather + scatter)
    work = compute / passes
    once = max(work / 3, forward - gather) + max(work * 2 / 3, backward - scatter) + gather + scatter + ends
    sent = cluster.sent((2 * e + 4) * (params - rest) + (e_rest + 4) * rest)
    return Step(compute, passes * (forward + backward + ends), passes * once, passes * sent)


def step_on(config: TrainConfig, n: int, shard: bool, gpu: str, weak: bool = False, dtype: torch.dtype = torch.bfloat16) -> Step:
    """A step of a preset on n GPUs at the assumed MFU. The batch is the preset's, of which each GPU takes its share, or with weak a
    micro batch for each GPU. dtype: of the matrix products."""
    model = build_on_meta(config.model)
    sequences = config.micro_batch_size if weak else config.total_batch_tokens // config.model.seq_len // n
    passes = max(1, sequences // config.micro_batch_size)
    compute = sequences * config.model.seq_len * flops_per_token(model) / (ASSUMED_MFU * device.peak_of(gpu, dtype))
    params = sum(p.numel() for p in model.parameters())
    if shard:
        rest = params - sum(p.numel() for p in model.transformer.h.parameters())
        return fsdp_step(compute, passes, params, rest, len(model.transformer.h), Cluster(n), dtype.itemsize)
    return ddp_step(compute, passes, params, model.transformer.wte.weight.numel(), Cluster(n))
