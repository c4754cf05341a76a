"""Compares compiled with eager training once, before the first step of a compiled run.

Compilers have bugs. On one kind of CPU, GCC 12 turned most gradients of attention into garbage (results/compiler.md). The loss stayed
finite and nothing raised an error: training just got worse.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from model import GPT
from training.compiling import recompute_activations, run_eagerly

# largest accepted ‖compiled - eager‖ / ‖eager‖. Rounding alone reaches 1e-6 in fp32 on a CPU (1e-3 in CUDA's TF32), 0.01 in 16 bits,
# and 0.07 with experts, because it sends some tokens to another expert. The wrong kernels we saw reached 0.5.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}
EXPERTS_TOLERANCE = 0.3


def mismatches(
    model: GPT, loss: Callable[[], Tensor], validate: Callable[[], Tensor], dtype: torch.dtype, teachers: Sequence[GPT] = ()
) -> dict[str, float]:
    """Returns {name: ‖compiled - eager‖ / ‖eager‖} for each error above the dtype's tolerance (losses: above a tenth of it). Losses
    come first, then gradients from the last layer to the first. Returns {} if eager itself is not finite.

    loss: computes a micro batch's loss (scalar), with the teachers if there are any. validate: computes it as validation does. Compiles
    what the first step would compile. Layers of one kind share their code, so only the first layers run, enough to cover each kind.
    Clears all gradients.
    """
    with own_gradients(model), first_of_each_kind(model):
        with eager(model, *teachers):
            eager_loss, eager_grads = loss_and_gradients(model, loss, dtype)
        compiled_loss, compiled_grads = loss_and_gradients(model, loss, dtype)
        with torch.no_grad():
            validated = validate()
    if not all(x.isfinite().all() for x in (eager_loss, *eager_grads.values())):
        return {}
    tolerance = TOLERANCE[dtype] if model.config.n_expert == 1 else EXPERTS_TOLERANCE
    losses = {
        "training loss": relative_error([compiled_loss], [eager_loss]),
        "validation loss": relative_error([validated], [eager_loss]),
    }
    groups = defaultdict(list)  # a layer's experts are one group
    for name in reversed(eager_grads):
        groups[re.sub(r"\.\d+$", "", name)].append(name)
    total = torch.stack([g.norm() for g in eager_grads.values()]).norm().item()
    gradients = {  # a gradient near 0 is mostly rounding
        f"gradient of {group}": relative_error([compiled_grads[n] for n in names], [eager_grads[n] for n in names], 1e-3 * total)
        for group, names in groups.items()
    }
    return {name: x for name, x in losses.items() if x > tolerance / 10} | {name: x for name, x in gradients.items() if x > tolerance}


@contextmanager
def own_gradients(model: GPT):
    """Inside this block, the model gets new gradient tensors. Afterwards it has the old ones again, set to zero: they may lie in DDP's
    buckets."""
    before = {p: p.grad for p in model.parameters()}
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for p, grad in before.items():
            p.grad = grad if grad is None else grad.zero_()


@contextmanager
def first_of_each_kind(model: GPT):
    """Inside this block, the model runs only its first layers, enough to cover each kind. The first layer is its own kind."""
    config, blocks = model.config, model.transformer.h
    n_layer, kinds = config.n_layer, [(layer == 0, window) for layer, window in enumerate(config.windows)]
    config.n_layer = 1 + max(map(kinds.index, kinds))
    model.transformer.h = blocks[: config.n_layer]
    try:
        yield
    finally:
        config.n_layer, model.transformer.h = n_layer, blocks


@contextmanager
def eager(*models: GPT):
    """Inside this block, models run eagerly, and recompute activations to save memory."""
    for model in models:
        recompute_activations(model)
    try:
        with run_eagerly(*models):
            yield
    finally:
        for model in models:
            recompute_activations(model, on=False)


def loss_and_gradients(model: GPT, loss: Callable[[], Tensor], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    value = loss()
    (value * (1024 if dtype == torch.float16 else 1)).backward()  # else the smallest gradients underflow in fp16
    gradients = {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return value.detach(), gradients


def local(x: Tensor) -> Tensor:
    """Returns this rank's slice of a sharded tensor, else the tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def relative_error(found: list[Tensor], expected: list[Tensor], least: float = 0.0) -> float:
    """Returns ‖found - expected‖ / (‖expected‖ + least) over all tensors; inf if anything is not finite."""
    off = torch.stack([(x.float() - y.float()).norm() for x, y in zip(found, expected, strict=True)]).norm()
    size = torch.stack([y.float().norm() for y in expected]).norm() + least
    return (off / size.clamp(min=1e-30)).nan_to_num(nan=math.inf, posinf=math.inf).item()
