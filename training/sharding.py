"""--shard: splits weights, gradients and optimizer state over the processes (FSDP2: Zhao et al., 2023; Rajbhandari et al., 2020).

Each process keeps a slice of every parameter, along its first dimension. FSDP gathers a block's weights for its forward pass, frees
them, and gathers them again for its backward pass. It sums the gradients over the processes straight into the slices.

A checkpoint gathers the tensors one by one. Its files are the same as without --shard. torch.distributed.checkpoint can't write such
files: its state dicts have a tied head twice, and the optimizer's state by name.
"""

from contextlib import contextmanager

import torch
from torch import Tensor

from common.distributed import DistContext
from model import GPT


def reject_fp16(dtype: torch.dtype):
    if dtype == torch.float16:
        raise ValueError("--shard does not scale the loss, which fp16 needs: choose --dtype bf16 or fp32")


def shard(model: GPT, dtype: torch.dtype, world: DistContext):
    """Shards the parameters over the processes, in place. dtype: of the matrix products. On CUDA, blocks are gathered in this dtype;
    embeddings, last norm and head stay in fp32. (A CPU's norms take no weights in bf16.)"""
    # imported here: it takes a second, and only --shard needs it
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))  # FSDP's own mesh is the accelerator's, even for a run on the CPU
    cast = dtype if world.device.type == "cuda" and dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


@contextmanager
def whole(model: GPT, copy: GPT):
    """Gives copy all the weights of a sharded model while the block runs, on every process. Each process can then run copy on its
    own. A sharded model runs only on all processes at once, since they gather its weights together."""
    copy.load_state_dict(weights(model, keep=True, where=None), assign=True)
    try:
        yield
    finally:
        copy.to("meta")


def slice_like(p: Tensor, full: Tensor) -> Tensor:
    """The slice of a full tensor that this process keeps of p. All of it if p is not sharded or has another shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(p, DTensor) and p.shape == full.shape:
        return distribute_tensor(full.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return full


def gathered(thing, keep: bool, where: str | None = "cpu"):
    """Nested dicts and lists with every sharded tensor in full. Call it on all processes. where: the device to move it to, None to
    leave it. A process without keep gets None for each tensor, so it holds at most one full tensor at a time."""
    from torch.distributed.tensor import DTensor

    if isinstance(thing, DTensor):
        full = thing.full_tensor()
        return full.to(where) if keep else None
    if isinstance(thing, dict):
        return {key: gathered(value, keep, where) for key, value in thing.items()}
    return [gathered(value, keep, where) for value in thing] if isinstance(thing, list) else thing


def weights(model: GPT, keep: bool, where: str | None = "cpu") -> dict[str, Tensor | None]:
    """model.state_dict() with full tensors. A tied head shares the embedding's tensor. keep, where: see gathered."""
    once = {p: gathered(p.detach(), keep, where) for p in model.parameters()}
    return {name: once[p] for name, p in model.named_parameters(remove_duplicate=False)}


def sliced(model: GPT, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of full tensors, each cut to the slice that this process keeps."""
    own = model.state_dict()
    return {name: slice_like(own[name], full) if name in own else full for name, full in state.items()}


def sliced_state(optimizer, state: dict) -> dict:
    """sliced, for an optimizer's state dict: it has tensors by the number of their parameter. An optimizer made of several has a state
    dict for each, by name."""
    if "state" not in state:
        return {name: sliced_state(getattr(optimizer, name), part) for name, part in state.items()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    slices = {
        i: {key: slice_like(params[i], x) if isinstance(x, Tensor) else x for key, x in each.items()} for i, each in state["state"].items()
    }
    return state | {"state": slices}
