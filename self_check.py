"""Does compiled training compute what eager training computes? Asked once, before the first step of a compiled run.

Compilers have bugs. GCC 12 made most of the gradients of attention garbage on one kind of CPU (results/compiler.md): the loss was
finite, nothing raised an error, and training was only worse.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from model import GPT

# ‖compiled - eager‖ / ‖eager‖ at most. Rounding alone comes to 1e-6 in fp32 on a CPU (1e-3 in CUDA's TF32) and 0.01 in 16 bits. With
# experts it comes to 0.07, where rounding sends a token elsewhere. A wrong kernel comes to 0.5 and more.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}
EXPERTS_TOLERANCE = 0.3


def differences(model: GPT, loss: Callable[[], Tensor], dtype: torch.dtype) -> dict[str, float]:
    """What compiled and eager code disagree on, in the order in which it is computed: the losses of training and validation, then
    gradients from the last layer to the first, each with ‖compiled - eager‖ / ‖eager‖. {} where all is within the dtype's
    tolerance (a loss within a tenth of it), or where eager itself is not finite.

    loss: computes a micro batch's loss with the model (scalar). Compiles what the first step would compile. Layers of one kind share
    their code, so only the first layers run, until there was one of each kind. Gradients that the parameters have are lost.
    """
    with first_of_each_kind(model):
        expected, gradients = loss_and_gradients(model, loss, dtype, eager=True)
        compiled, theirs = loss_and_gradients(model, loss, dtype)
        with torch.no_grad():
            validated = loss()
    if not all(x.isfinite().all() for x in (expected, *gradients.values())):
        return {}
    tolerance = TOLERANCE[dtype] if model.config.n_expert == 1 else EXPERTS_TOLERANCE
    total = torch.stack([g.norm() for g in gradients.values()]).norm()  # a gradient that is nearly 0 is mostly rounding
    losses = {"the training loss": relative(compiled, expected), "the validation loss": relative(validated, expected)}
    others = {f"the gradient of {name}": relative(theirs[name], g, 1e-3 * total) for name, g in reversed(gradients.items())}
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


def loss_and_gradients(model: GPT, loss: Callable[[], Tensor], dtype: torch.dtype, eager: bool = False) -> tuple[Tensor, dict]:
    flex, model.flex = model.flex, model.flex and not eager  # FlexAttention without torch.compile needs memory for all scores
    with torch.compiler.set_stance("force_eager" if eager else "default"):
        value = loss()
        (value * (1024 if dtype == torch.float16 else 1)).backward()  # or the smallest gradients would be 0 in fp16
    model.flex = flex
    gradients = {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return value.detach(), gradients


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor that --shard divides."""
    return x.to_local() if hasattr(x, "to_local") else x


def relative(x: Tensor, expected: Tensor, least: Tensor | float = 0.0) -> float:
    share = (x.float() - expected.float()).norm() / (expected.float().norm() + least)
    return share.nan_to_num(nan=math.inf).item()
