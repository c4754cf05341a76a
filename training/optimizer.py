"""AdamW, Muon, the learning rate's schedule and the moving average of the weights."""

import math
from collections import defaultdict
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
    """Splits the parameters into two groups: tensors with 2 or more dimensions decay; biases, norms and short convolutions don't."""
    params = [(p.dim() >= 2 and "conv." not in name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for decays, p in params if decays], "weight_decay": weight_decay},
        {"params": [p for decays, p in params if not decays], "weight_decay": 0.0},
    ]


def is_matrix(name: str, p: torch.Tensor) -> bool:
    """Whether Muon updates this parameter of the blocks: a matrix that maps vectors to vectors."""
    return p.dim() == 2 and not any(part in name for part in ("router", "conv.", "gate."))


class Muon(torch.optim.Muon):
    """torch.optim.Muon with a choice of the products' dtype, with fewer, larger products on CUDA, and with NorMuon's second step.

    beta2: after NorMuon (Li et al., 2025), divides each neuron's update by the root of a moving average of its mean square. A neuron is a
    row of a tall matrix or, as in modded-nanogpt, a column of a wide one. A square matrix counts as wide here, and as tall in
    modded-nanogpt. A matrix's update keeps its norm. 0: off.

    dtype: bf16, as in torch.optim.Muon, or fp32. Hardware without bf16 is many times slower at products in bf16 (results/muon.md), and
    they would make a step's result depend on the world size.
    """

    def __init__(self, params: list[torch.Tensor], dtype: torch.dtype, beta2: float = 0.0, **settings):
        super().__init__(params, **settings)
        self.dtype, self.beta2 = dtype, beta2
        # the largest batch of matrices, in numbers. 0 means one matrix at a time: a CPU gains nothing from batches, and its results would
        # depend on the batch, so on the world size
        self.at_once = 2**26 if params[0].is_cuda else 0

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for batch in batches([p for p in group["params"] if p.grad is not None], self.at_once):
                self.update(batch, group)

    def update(self, batch: list[torch.Tensor], group: dict):
        """Updates matrices that have the same shape, or the same transposed."""
        lr, momentum, grads = group["lr"], group["momentum"], [p.grad for p in batch]
        averages = [self.average("momentum_buffer", p, p.shape) for p in batch]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        directions = [wide(x.to(self.dtype)) for x in torch._foreach_lerp(grads, averages, momentum)]
        stacked = directions[0] if len(batch) == 1 else torch.stack(directions)
        updates = orthogonal(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"]).view(-1, *stacked.shape[-2:])
        if self.beta2:
            updates = self.evened(batch, updates)
        for p, update in zip(batch, updates, strict=True):
            rows, columns = p.shape
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(update if rows <= columns else update.T, alpha=-lr * math.sqrt(max(1, rows / columns)))

    def evened(self, batch: list[torch.Tensor], updates: torch.Tensor) -> torch.Tensor:
        """Gives all neurons about equally large updates, and keeps each matrix's norm. updates: (n, rows, columns), rows ≤ columns."""
        updates = updates.float()
        squares = updates.square().mean(-2)  # (n, columns)
        averages = [self.average("second_moment", p, (max(p.shape),)) for p in batch]
        torch._foreach_lerp_(averages, list(squares), 1 - self.beta2)
        evened = updates / (torch.stack(averages)[:, None].sqrt() + 1e-8)
        norms, new = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (updates, evened))
        return evened * (norms / new.clamp(min=1e-8))  # a matrix without a gradient has no update

    def average(self, name: str, p: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns a moving average that belongs to a matrix; at first zeros."""
        if name not in self.state[p]:
            self.state[p][name] = torch.zeros(shape, dtype=p.grad.dtype, device=p.grad.device)
        return self.state[p][name]


def batches(matrices: list[torch.Tensor], at_once: int) -> list[list[torch.Tensor]]:
    """Groups matrices that have the same shape, or the same transposed, with up to at_once numbers in a batch."""
    by_shape = defaultdict(list)
    for matrix in matrices:
        by_shape[tuple(sorted(matrix.shape))].append(matrix)
    sizes = {shape: max(1, at_once // math.prod(shape)) for shape in by_shape}
    return [same[i : i + sizes[shape]] for shape, same in by_shape.items() for i in range(0, len(same), sizes[shape])]


def wide(matrix: torch.Tensor) -> torch.Tensor:
    """Returns a matrix with rows ≤ columns, transposed if need be: its Newton-Schulz products are smaller."""
    return matrix if matrix.size(0) <= matrix.size(1) else matrix.T


def orthogonal(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """Makes matrices nearly orthogonal: (rows, columns) or (batch, rows, columns) → the same, rows ≤ columns. The Newton-Schulz iteration
    (Jordan et al., 2024) keeps U and V of the decomposition U S V^T. Each step maps every singular value s to a s + b s^3 + c s^5, which
    brings it near 1."""
    a, b, c = coefficients
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        square = x @ x.mT
        x = add_product(x, add_product(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


class MuonAndAdamW:
    """Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for the rest: embeddings, head, norms, scales, routers, gates and
    short convolutions.

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
        beta2: float = 0.0,
    ):
        self.world, self.sharded = world, sharded
        matrices = [p for name, p in model.transformer.h.named_parameters() if is_matrix(name, p)]
        matrices.sort(key=lambda p: -p.numel())  # ranks take turns, largest first: all get about the same work
        self.matrices, taken = matrices, set(matrices)
        rest = [group | {"params": [p for p in group["params"] if p not in taken]} for group in decay_groups(model, weight_decay)]
        self.gathered = [nn.Parameter(without_storage(p)) for p in matrices] if sharded else matrices
        products = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.muon = Muon(self.gathered, products, beta2, lr=muon_lr, momentum=momentum, weight_decay=weight_decay)
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
        gradients = [p.grad for p in self.matrices]  # put back at the end: they may lie in DDP's buckets
        for i, (p, gathered) in enumerate(zip(self.matrices, self.gathered, strict=True)):
            if self.sharded:
                weight, grad = p.full_tensor(), p.grad.full_tensor()
                if self.is_mine(i):
                    gathered.data, gathered.grad = weight, grad
            elif not self.is_mine(i):
                p.grad = None  # Muon skips it
        self.muon.step()
        if self.sharded:
            for i, (p, gathered) in enumerate(zip(self.matrices, self.gathered, strict=True)):
                weight = gathered.data if self.is_mine(i) else torch.empty(p.shape, device=p.device)
                self.world.broadcast([weight], lambda _, i=i: self.owner(i))
                p.copy_(sharding.slice_like(p, weight))
                gathered.data, gathered.grad = without_storage(p), None
        else:
            self.broadcast([p.data for p in self.matrices])
            for p, grad in zip(self.matrices, gradients, strict=True):
                p.grad = grad

    def broadcast(self, tensors: list[torch.Tensor]):
        """Sends each matrix's tensor from its owner to all others, in place. Joins an owner's tensors: one large transfer is faster
        than many small ones."""
        for rank in range(self.world.size):
            owned = [x for i, x in enumerate(tensors) if self.owner(i) == rank]
            if not owned or self.world.size == 1:
                return
            joined = torch.cat([x.flatten() for x in owned])
            self.world.broadcast([joined], lambda _, rank=rank: rank)
            if rank != self.world.rank:
                parts = joined.split([x.numel() for x in owned])
                torch._foreach_copy_(owned, [part.view_as(x) for part, x in zip(parts, owned, strict=True)])

    def zero_grad(self, set_to_none: bool = True):
        for p in self.matrices:
            p.grad = None if set_to_none or p.grad is None else p.grad.zero_()
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """Returns the state of all ranks. To be called on all ranks."""
        shapes = {"momentum_buffer": lambda p: p.shape}
        if self.muon.beta2:
            shapes["second_moment"] = lambda p: (max(p.shape),)
        state = {i: {} for i in range(len(self.gathered))}
        for name, shape in shapes.items():
            averages = [self.muon.state[p].get(name, torch.zeros(shape(p), device=p.device)) for p in self.gathered]
            self.broadcast(averages)
            for i, average in enumerate(averages):
                state[i][name] = average
        return {"muon": self.muon.state_dict() | {"state": state}, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict):
        mine = {i: buffers for i, buffers in state["muon"]["state"].items() if self.is_mine(i)}
        self.muon.load_state_dict(state["muon"] | {"state": mine})
        self.adamw.load_state_dict(state["adamw"])


def without_storage(p: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with this shape and device that takes no memory."""
    return torch.zeros((), device=p.device).expand(p.shape)


def schedule(name: str, step: int, max_steps: float, warmup_steps: int, min_ratio: float, decay_ratio: float) -> float:
    """Returns a step's learning rate, as a fraction of the largest. After a linear warmup, 'cosine' falls along half a wave to min_ratio at
    max_steps. 'wsd' stays at 1 and falls linearly to min_ratio in the last decay_ratio of the steps (Hu et al., 2024)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "wsd":
        decay_steps = max(1, min(round(max_steps * decay_ratio), max_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * min(1.0, (max_steps - step) / decay_steps)
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def momentum_for(steps: float) -> float:
    """Returns Muon's momentum for a run of this many steps: 0.8 for 534, 0.9 for 2,000 (the best of a few, with one seed of a small model),
    0.95 from 8,464 on."""
    return min(0.95, max(0.5, 1 - 4.6 / math.sqrt(max(1, steps))))


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
