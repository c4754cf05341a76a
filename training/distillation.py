"""--teacher: also learns from the predictions of one or several teachers (Hinton et al., 2015)."""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import GPT
from ops.loss import positions_at_once


@contextmanager
def distillation_loss(student: GPT, teachers: Sequence[GPT], x: Tensor, weight: float):
    """Inside this block, the gradient of the student's loss on ids x (B, T) also pulls it towards the teachers.

    The gradient is (1 - weight) · that of the text's cross entropy + weight · that of the divergence from the mean of the teachers'
    predictions. The loss's value stays the cross entropy. If there are many logits, they are computed part by part, and recomputed in the
    backward pass.
    """
    with torch.no_grad():
        from_teachers = [teacher.hidden_states(x).flatten(0, 1) for teacher in teachers]  # (N, C') each

    def loss(mine: Tensor, head: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        def part_losses(mine, targets, *theirs):
            with uncached_autocast(mine.device.type):
                logits = student.logits(mine).float()
            expected = mean_prediction([teacher.logits(hidden).float() for teacher, hidden in zip(teachers, theirs, strict=True)])
            return torch.stack([F.cross_entropy(logits, targets, reduction="sum"), divergence(logits, expected)])

        at_once = positions_at_once(mine, len(head))
        parts = zip(*(x.split(at_once) for x in (mine, targets, *from_teachers)), strict=True)
        compute = partial(checkpoint, part_losses, use_reentrant=False) if at_once < len(mine) else part_losses
        text, distance = sum(compute(*part) for part in parts) / len(mine)
        return text + weight * gradient_only(distance - text)

    text_loss, student.loss = student.loss, loss
    try:
        yield
    finally:
        student.loss = text_loss


def uncached_autocast(device: str) -> torch.autocast:
    """Autocast as it is now, but each product casts the weights again. With one cast for all parts, autograd would sum the parts'
    gradients in bf16."""
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False)


def mean_prediction(logits: Sequence[Tensor]) -> Tensor:
    """Returns the log of the models' mean probabilities, (N, V), from the logits (N, V) of each."""
    return reduce(torch.logaddexp, (F.log_softmax(x, dim=-1) for x in logits)) - math.log(len(logits))


def divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """Returns KL(teacher ‖ student) at temperature 1, in nats, summed over N. logits, expected: the student's logits and the teachers'
    log probabilities, (N, V) both."""
    return F.kl_div(F.log_softmax(logits, dim=-1), expected, reduction="sum", log_target=True)


def gradient_only(x: Tensor) -> Tensor:
    """Returns 0, with the gradient of x."""
    return x - x.detach()
