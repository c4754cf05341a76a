"""Does compiled training compute what eager training computes? Asked once, before the first step of a compiled run.

Compilers have bugs. GCC 12 made most of the gradients of attention garbage on one kind of CPU (results/compiler.md): the loss was
finite, nothing raised an error, and training was only worse.
"""

import math
import re
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from model import GPT

# ‖compiled - eager‖ / ‖eager‖ at most. Rounding alone comes to 1e-6 in fp32 on a CPU (1e-3 in CUDA's TF32) and 0.01 in 16 bits. With
# experts it comes to 0.07, where rounding sends a token elsewhere. A wrong kernel comes to 0.5 and more.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}
EXPERTS_TOLERANCE = 0.3


def differences(
    model: GPT, loss: Callable[[], Tensor], validate: Callable[[], Tensor] | None, dtype: torch.dtype, teacher: GPT | None = None
) -> dict[str, float]:
    """What compiled and eager code disagree on, in the order in which it is computed: the losses of training and validation, then
    gradients from the last layer to the first, each with ‖compiled - eager‖ / ‖eager‖. {} where all is within the dtype's
    tolerance (a loss within a tenth of it), or where eager itself is not finite.

    loss: a micro batch's loss with the model, and its teacher if it has one (scalar). validate: the same as validation computes
    it; None where validation isn't compiled. Compiles what the first step would compile. Layers of one kind share their code, so
    only the first layers run, until there was one of each kind. Gradients that the parameters have are lost.
    """
    with first_of_each_kind(model):
        with eager(*filter(None, (model, teacher))):
            expected, gradients = loss_and_gradients(model, loss, dtype)
        compiled, theirs = loss_and_gradients(model, loss, dtype)
        with torch.no_grad():
            validated = validate() if validate else expected
    if not all(x.isfinite().all() for x in (expected, *gradients.values())):
        return {}
    tolerance = TOLERANCE[dtype] if model.config.n_expert == 1 else EXPERTS_TOLERANCE
    losses = {"the training loss": relative([compiled], [expected]), "the validation loss": relative([validated], [expected])}
    total = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    others = {}
    for group in reversed({re.sub(r"\.\d+$", "", name): None for name in gradients}):  # a layer's experts are one group
        names = [name for name in gradients if re.sub(r"\.\d+$", "", name) == group]
        # a gradient that is nearly 0 is mostly rounding
        off = relative([theirs[name] for name in names], [gradients[name] for name in names], 1e-3 * total)
        others[f"the gradient of {group}"] = off
    return {name: x for name, x in losses.items() if x > tolerance / 10} | {name: x for name, x in others.items() if x > tolerance}


@contextmanager
def first_of_each_kind(model: GPT):
    """For as long as the block lasts the model has its first layers only: at least two, and one of each kind."""
    config = model.config
    n_layer, windows = config.n_layer, config.windows
    config.n_layer = min(n_layer, 1 + max(1, *(windows.index(window) for window in windows)))
    try:
        yield
    finally:
        config.n_layer = n_layer


@contextmanager
def eager(*models: GPT):
    """For as long as the block lasts the models run eagerly and in little memory: without FlexAttention, which keeps all scores when it
    isn't compiled, and recomputing each block's activations in the backward pass."""
    before = [(model, model.flex, model.recompute) for model in models]
    for model in models:
        model.flex, model.recompute = False, True
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for model, flex, recompute in before:
            model.flex, model.recompute = flex, recompute


def loss_and_gradients(model: GPT, loss: Callable[[], Tensor], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    value = loss()
    (value * (1024 if dtype == torch.float16 else 1)).backward()  # or the smallest gradients would be 0 in fp16
    gradients = {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return value.detach(), gradients


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor that --shard divides."""
    return x.to_local() if hasattr(x, "to_local") else x


def relative(found: list[Tensor], expected: list[Tensor], least: float = 0.0) -> float:
    """‖found - expected‖ / (‖expected‖ + least), of all tensors together; inf where something is not finite."""
    off = torch.stack([(x.float() - y.float()).norm() for x, y in zip(found, expected, strict=True)]).norm()
    size = torch.stack([y.float().norm() for y in expected]).norm() + least
    return (off / size.clamp(min=1e-30)).nan_to_num(nan=math.inf).item()
