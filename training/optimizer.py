"""AdamW, Muon, the learning rate's schedule and the moving average of the weights."""

import math
from contextlib import contextmanager

import torch
from torch import nn

from common.distributed import DistContext
from model import GPT
from training import sharding


def adamw(groups: list[dict], lr: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) with GPT-3's betas and eps (Brown et al., 2020, appendix B)."""
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Splits the parameters into two groups: tensors with 2 or more dimensions decay, biases and norms don't."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


class MuonInFull(torch.optim.Muon):
    """torch.optim.Muon without its rounding to bfloat16. For runs in another precision: hardware without bf16 is many times slower at
    such products (results/muon.md), and a step's last bits would depend on the world size."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                average = state["momentum_buffer"]
                average.lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(average, momentum), group["ns_coefficients"], group["ns_steps"], group["eps"])
                rows, columns = p.shape
                p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonal(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """Makes a matrix nearly orthogonal: (rows, columns) → the same. The Newton-Schulz iteration (Jordan et al., 2024) keeps U and V of the
    decomposition U S V^T. Each step maps every singular value s to a s + b s^3 + c s^5, which brings it near 1."""
    a, b, c = coefficients
    x = matrix if matrix.size(0) <= matrix.size(1) else matrix.T  # x @ x.T is then the smaller square
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if matrix.size(0) <= matrix.size(1) else x.T


class MuonAndAdamW:
    """Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for embeddings, head, routers, norms and scales.

    Muon makes the gradient's momentum orthogonal. That is the expensive part of its step, so the ranks split the work: each rank
    updates its own matrices, keeps only their momentum, and broadcasts the new weights. With --shard, a rank first gathers its
    matrices from all ranks. Has the interface of one optimizer, as a GradScaler needs.
    """

    def __init__(
        self,
        model: GPT,
        lr: float,
        muon_lr: float,
        momentum: float,
        weight_decay: float,
        world: DistContext,
        sharded: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.world, self.sharded = world, sharded
        matrices = [p for name, p in model.transformer.h.named_parameters() if p.dim() == 2 and "router" not in name]
        matrices.sort(key=lambda p: -p.numel())  # ranks take turns, largest first: all get about the same work
        self.matrices, taken = matrices, set(matrices)
        rest = [group | {"params": [p for p in group["params"] if p not in taken]} for group in decay_groups(model, weight_decay)]
        self.gathered = [nn.Parameter(without_storage(p)) for p in matrices] if sharded else matrices
        muon = torch.optim.Muon if dtype == torch.bfloat16 else MuonInFull
        self.muon = muon(self.gathered, lr=muon_lr, momentum=momentum, weight_decay=weight_decay)
        self.adamw = adamw(rest, lr)

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def owner(self, i: int) -> int:
        return i % self.world.size

    def is_mine(self, i: int) -> bool:
        return self.owner(i) == self.world.rank

    @torch.no_grad()
    def step(self):
        self.adamw.step()
        gradients = [p.grad for p in self.matrices]  # they stay where they are: in DDP's buckets
        for i, (p, gathered) in enumerate(zip(self.matrices, self.gathered, strict=True)):
            if self.sharded:
                weight, grad = p.full_tensor(), p.grad.full_tensor()
                if self.is_mine(i):
                    gathered.data, gathered.grad = weight, grad
            elif not self.is_mine(i):
                p.grad = None  # torch.optim.Muon skips it
        self.muon.step()
        if self.sharded:
            for i, (p, gathered) in enumerate(zip(self.matrices, self.gathered, strict=True)):
                weight = gathered.data if self.is_mine(i) else torch.empty(p.shape, device=p.device)
                self.world.broadcast([weight], lambda _, i=i: self.owner(i))
                p.copy_(sharding.slice_like(p, weight))
                gathered.data, gathered.grad = without_storage(p), None
        else:
            self.world.broadcast([p.data for p in self.matrices], self.owner)
            for p, grad in zip(self.matrices, gradients, strict=True):
                p.grad = grad

    def zero_grad(self, set_to_none: bool = True):
        for p in self.matrices:
            p.grad = None if set_to_none or p.grad is None else p.grad.zero_()
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """Returns the state of all ranks. To be called on all ranks."""
        momenta = [self.muon.state[p].get("momentum_buffer", torch.zeros(p.shape, device=p.device)) for p in self.gathered]
        self.world.broadcast(momenta, self.owner)
        state = {i: {"momentum_buffer": momentum} for i, momentum in enumerate(momenta)}
        return {"muon": self.muon.state_dict() | {"state": state}, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict):
        mine = {i: buffers for i, buffers in state["muon"]["state"].items() if self.is_mine(i)}
        self.muon.load_state_dict(state["muon"] | {"state": mine})
        self.adamw.load_state_dict(state["adamw"])


def without_storage(p: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with this shape and device that takes no memory."""
    return torch.zeros((), device=p.device).expand(p.shape)


def schedule(name: str, step: int, max_steps: int, warmup_steps: int, min_ratio: float, decay_ratio: float) -> float:
    """Returns a step's learning rate, as a fraction of the largest. After a linear warmup, 'cosine' falls along half a wave to min_ratio at
    max_steps. 'wsd' stays at 1 and falls linearly to min_ratio in the last decay_ratio of the steps (Hu et al., 2024)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "wsd":
        decay_steps = max(1, min(round(max_steps * decay_ratio), max_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * min(1.0, (max_steps - step) / decay_steps)
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class AverageWeights:
    """Exponential moving average of a model's weights (Polyak & Juditsky, 1992): decay · average + (1 - decay) · weights after each
    update. The decay is smaller at first, as in TensorFlow: a short run forgets its initial weights too."""

    def __init__(self, model: GPT, decay: float):
        self.weights, self.decay = list(model.parameters()), decay
        self.restart(0)

    def restart(self, updates: int):
        """Sets the average to the model's weights, as if after this many updates."""
        self.updates, self.average = updates, [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def update(self):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, self.weights, 1 - decay)

    @contextmanager
    def in_place(self):
        """Inside this block, the model's weights are the average."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        for p, average in zip(self.weights, self.average, strict=True):
            weights = p.clone()
            p.copy_(average)
            average.copy_(weights)
