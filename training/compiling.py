"""torch.compile for a model's blocks and loss, and activation checkpointing without it."""

from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from model import GPT, cross_entropy
from ops import experts
from ops.loss import chunk_loss, in_chunks
from variants import MixtureOfExperts, VariantGPT


def compile_blocks(model: GPT, activation_memory: float = 1.0, device: torch.device | None = None):
    """Compiles a model for training and validation: one graph that all blocks use, and one for the loss. This takes less than half the
    time of compiling the whole model.

    activation_memory: the fraction of the activations to keep for the backward pass. torch.compile recomputes the cheapest. device: where
    a model on meta will run; None: where it is.
    """
    from torch._functorch import config

    config.activation_memory_budget = activation_memory
    torch._dynamo.config.recompile_limit = 64  # blocks differ: first or not, with a window or not, of model or teacher
    torch._dynamo.config.optimize_ddp = False  # it splits graphs where DDP's buckets end, to overlap with sums: blocks do that already
    for block in model.transformer.h:
        if isinstance(block.mlp, MixtureOfExperts):  # the loop's shapes vary from step to step
            block.mlp.loop = torch.compiler.disable(experts.one_by_one)
        block.compile()
    model.loss = in_chunks(torch.compile(cross_entropy), torch.compile(chunk_loss))
    if isinstance(model, VariantGPT):  # FlexAttention needs heads with at least 16 channels
        device = device or model.lm_head.weight.device
        model.flex = device.type == "cuda" and model.config.n_embd // model.config.n_head >= 16


@contextmanager
def noticed_compilations():
    """Inside this block, the list that it yields grows whenever torch.compile compiles something, also in a backward pass."""
    import torch._dynamo  # takes a second, so --help must not import it

    found, handler = [], torch._dynamo.callback_handler
    callback = handler.register_start_callback(lambda *about: found.append(about))
    try:
        yield found
    finally:
        if callback in handler.start_callbacks:  # torch._dynamo.reset() removes all
            handler.remove_start_callback(callback)


def undo_compile(model: GPT):
    """Makes blocks and loss eager again."""
    for block in model.transformer.h:
        block._compiled_call_impl = None  # PyTorch has no public way to undo Module.compile
    model.loss = in_chunks(cross_entropy)
    if isinstance(model, VariantGPT):
        model.flex = False


@contextmanager
def run_eagerly(*models: GPT):
    """Inside this block, compiled models run eagerly. They don't use FlexAttention, which stores all scores if it isn't compiled."""
    flex = [model for model in models if getattr(model, "flex", False)]
    for model in flex:
        model.flex = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for model in flex:
            model.flex = True


def recompute_activations(model: GPT, on: bool = True):
    """Keeps only each block's input for the backward pass, which recomputes the block (Chen et al., 2016). For eager training."""
    for block in model.transformer.h:
        if on:
            block.forward = partial(recomputed, type(block).forward.__get__(block))
        else:
            block.__dict__.pop("forward", None)


def recomputed(forward, *inputs):
    return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)
