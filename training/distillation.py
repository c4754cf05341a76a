"""Learning from a teacher's predictions too (Hinton et al., 2015)."""

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
    """Inside this block, the student's loss on ids x (B, T) has a gradient that pulls it towards the teacher, too.

    The value stays the cross entropy of the text alone. The share `weight` of the gradient is that of the divergence from the
    teacher's predictions. If there are many logits, they are computed part by part and again in the backward pass.
    """
    with torch.no_grad():
        taught = teacher.hidden_states(x).flatten(0, 1)  # (N, C')

    def loss(mine: Tensor, head: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        def of_part(mine, taught, targets):
            logits, expected = student.logits(mine).float(), teacher.logits(taught).float()
            return torch.stack([F.cross_entropy(logits, targets, reduction="sum"), divergence(logits, expected)])

        at_once = positions_at_once(mine, len(head))
        parts = zip(*(x.split(at_once) for x in (mine, taught, targets)), strict=True)
        compute = partial(checkpoint, of_part, use_reentrant=False) if at_once < len(mine) else of_part
        text, from_teacher = sum(compute(*part) for part in parts) / len(mine)
        return text + weight * gradient_only(from_teacher - text)

    text_loss, student.loss = student.loss, loss
    try:
        yield
    finally:
        student.loss = text_loss


def divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a student's predictions (N, V) from its teacher's, at temperature 1, in nats, summed over N."""
    return F.kl_div(F.log_softmax(logits, dim=-1), F.log_softmax(expected, dim=-1), reduction="sum", log_target=True)


def gradient_only(x: Tensor) -> Tensor:
    """0, with the gradient of x."""
    return x - x.detach()
