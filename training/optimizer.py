"""What changes the weights: AdamW, or Muon for the matrices; the learning rate's schedule; the average of the weights."""

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
    """Two groups for an optimizer: tensors of 2 or more dimensions decay; biases and norms do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


class MuonInFull(torch.optim.Muon):
    """torch.optim.Muon without its rounding to bfloat16, for runs that are not in it: hardware that lacks it takes many
    times as long for such products (results/README.md), and a step's last bits would hang on how many processes share the work."""

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
    """U V^T of a matrix's singular value decomposition U S V^T, its singular values not 1 but near it: each step of the
    Newton-Schulz iteration makes a s + b s^3 + c s^5 of every one, s (Jordan et al., 2024). (rows, columns) → the same."""
    a, b, c = coefficients
    x = matrix if matrix.size(0) <= matrix.size(1) else matrix.T  # the smaller square
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if matrix.size(0) <= matrix.size(1) else x.T


class MuonAndAdamW:
    """Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for embeddings, head, routers, norms and scales.

    Muon's update is the gradient's momentum made orthogonal, which costs more than all else in an optimizer's step, so that
    each process does it for its share of the matrices, of which it alone has the momentum, and sends the others the result.
    Where the matrices are divided over the processes, each puts those of its share together first. Behaves as one optimizer,
    also for a GradScaler.
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
        matrices.sort(key=lambda p: -p.numel())  # dealt out in turns, so that all shares cost about the same
        self.matrices, taken = matrices, set(matrices)
        rest = [group | {"params": [p for p in group["params"] if p not in taken]} for group in decay_groups(model, weight_decay)]
        self.whole = [nn.Parameter(without_storage(p)) for p in matrices] if sharded else matrices
        muon = torch.optim.Muon if dtype == torch.bfloat16 else MuonInFull
        self.muon = muon(self.whole, lr=muon_lr, momentum=momentum, weight_decay=weight_decay)
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
        for i, (p, whole) in enumerate(zip(self.matrices, self.whole, strict=True)):
            if self.sharded:
                weight, grad = p.full_tensor(), p.grad.full_tensor()
                if self.is_mine(i):
                    whole.data, whole.grad = weight, grad
            elif not self.is_mine(i):
                p.grad = None  # torch.optim.Muon passes over it
        self.muon.step()
        if self.sharded:
            for i, (p, whole) in enumerate(zip(self.matrices, self.whole, strict=True)):
                weight = whole.data if self.is_mine(i) else torch.empty(p.shape, device=p.device)
                self.world.broadcast([weight], lambda _, i=i: self.owner(i))
                p.copy_(sharding.slice_like(p, weight))
                whole.data, whole.grad = without_storage(p), None
        else:
            self.world.broadcast([p.data for p in self.matrices], self.owner)

    def zero_grad(self, set_to_none: bool = True):
        for p in self.matrices:
            p.grad = None
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """Of all processes' shares; to be called on all of them."""
        momenta = [self.muon.state[p].get("momentum_buffer", torch.zeros(p.shape, device=p.device)) for p in self.whole]
        self.world.broadcast(momenta, self.owner)
        state = {i: {"momentum_buffer": momentum} for i, momentum in enumerate(momenta)}
        return {"muon": self.muon.state_dict() | {"state": state}, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict):
        mine = {i: its for i, its in state["muon"]["state"].items() if self.is_mine(i)}
        self.muon.load_state_dict(state["muon"] | {"state": mine})
        self.adamw.load_state_dict(state["adamw"])


def without_storage(p: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape on the same device that takes no memory."""
    return torch.zeros((), device=p.device).expand(p.shape)


def schedule(name: str, step: int, max_steps: int, warmup_steps: int, min_ratio: float, decay_ratio: float) -> float:
    """The learning rate at a step, as a share of the largest: linear warmup, then 'cosine': half a wave down to min_ratio at
    max_steps; or 'wsd': all of it until the last decay_ratio of the steps, in which it falls in a line (Hu et al., 2024)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "wsd":
        fall = max(1, min(round(max_steps * decay_ratio), max_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * min(1.0, (max_steps - step) / fall)
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class AverageWeights:
    """The exponential moving average of a model's weights over its updates (Polyak & Juditsky, 1992): decay · average + (1 - decay) ·
    weights, with a smaller decay at first, so that a short run forgets its initial weights too (as TensorFlow has it)."""

    def __init__(self, model: GPT, decay: float):
        self.weights, self.decay = list(model.parameters()), decay
        self.restart(0)

    def restart(self, updates: int):
        """The average after so many updates is what the model's weights are now."""
        self.updates, self.average = updates, [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def update(self):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, self.weights, 1 - decay)

    @contextmanager
    def in_place(self):
        """The model has the average as its weights."""
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
