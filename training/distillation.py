"""--teacher: also learns from a teacher's predictions (Hinton et al., 2015)."""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import GPT
from ops.loss import positions_at_once


@contextmanager
def distillation_loss(student: GPT, teacher: GPT, x: Tensor, weight: float):
    """Inside this block, the gradient of the student's loss on ids x (B, T) also pulls it towards the teacher.

    The gradient is (1 - weight) · that of the text's cross entropy + weight · that of the divergence from the teacher's predictions. The
    loss's value stays the cross entropy. If there are many logits, they are computed part by part, and recomputed in the backward pass.
    """
    with torch.no_grad():
        from_teacher = teacher.hidden_states(x).flatten(0, 1)  # (N, C')

    def loss(mine: Tensor, head: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        def part_losses(mine, theirs, targets):
            logits, expected = student.logits(mine).float(), teacher.logits(theirs).float()
            return torch.stack([F.cross_entropy(logits, targets, reduction="sum"), divergence(logits, expected)])

        at_once = positions_at_once(mine, len(head))
        parts = zip(*(x.split(at_once) for x in (mine, from_teacher, targets)), strict=True)
        compute = partial(checkpoint, part_losses, use_reentrant=False) if at_once < len(mine) else part_losses
        text, distance = sum(compute(*part) for part in parts) / len(mine)
        return text + weight * gradient_only(distance - text)

    text_loss, student.loss = student.loss, loss
    try:
        yield
    finally:
        student.loss = text_loss


def divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """Returns KL(teacher ‖ student) of logits (N, V) at temperature 1, in nats, summed over N."""
    return F.kl_div(F.log_softmax(logits, dim=-1), F.log_softmax(expected, dim=-1), reduction="sum", log_target=True)


def gradient_only(x: Tensor) -> Tensor:
    """Returns 0, with the gradient of x."""
    return x - x.detach()
