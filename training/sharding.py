"""--shard: weights, gradients and the optimizer's state divided over the processes (FSDP2: Zhao et al., 2023; Rajbhandari et al., 2020).

Each process keeps a slice of every parameter along its first dimension. A block's are gathered when it is computed, forward and
again backward, and given up after it; its gradients are summed over the processes straight into the slices.

For a checkpoint the tensors are put together one by one, so that its files are those of a run that is not divided.
torch.distributed.checkpoint's state dicts have a tied head twice and the optimizer's state by names, which those files do not.
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
    """Divides the parameters over the processes, in place. dtype: of the matrix products, in which a block's weights then travel too
    on CUDA; embeddings, last norm and head, and with them the residual stream, stay in fp32. (A CPU's norms take no weights in
    bf16.)"""
    # imported here, since it takes a second, which a run that does not shard need not wait
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))  # the default is the accelerator's, also for a run on the CPU beside one
    cast = dtype if world.device.type == "cuda" and dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


@contextmanager
def whole(model: GPT, copy: GPT):
    """For as long as the block lasts, copy has all the weights of a divided model on every process, each of which may compute with it
    alone and in its own time: what the processes gather for the divided model they must gather together."""
    copy.load_state_dict(weights(model, keep=True, where=None), assign=True)
    try:
        yield
    finally:
        copy.to("meta")


def slice_like(p: Tensor, full: Tensor) -> Tensor:
    """The part of a whole tensor that p's process has of p; all of it where p is not divided, or not of its shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(p, DTensor) and p.shape == full.shape:
        return distribute_tensor(full.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return full


def gathered(thing, keep: bool, where: str | None = "cpu"):
    """Nested dicts and lists with every divided tensor whole, in main memory or where it is (None); to be called by all processes, of
    which those that do not keep it get None in each place, so that one tensor at a time stands there."""
    from torch.distributed.tensor import DTensor

    if isinstance(thing, DTensor):
        full = thing.full_tensor()
        return full.to(where) if keep else None
    if isinstance(thing, dict):
        return {key: gathered(value, keep, where) for key, value in thing.items()}
    return [gathered(value, keep, where) for value in thing] if isinstance(thing, list) else thing


def weights(model: GPT, keep: bool, where: str | None = "cpu") -> dict[str, Tensor | None]:
    """model.state_dict() of whole tensors, see gathered; the tied head's is the embedding's."""
    once = {p: gathered(p.detach(), keep, where) for p in model.parameters()}
    return {name: once[p] for name, p in model.named_parameters(remove_duplicate=False)}


def sliced(model: GPT, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of whole tensors, each cut to what this process has of it."""
    own = model.state_dict()
    return {name: slice_like(own[name], full) if name in own else full for name, full in state.items()}


def sliced_state(optimizer, state: dict) -> dict:
    """The same of an optimizer's state dict, whose tensors lie by the number of their parameter; one that is made of several has
    a dict of theirs by name."""
    if "state" not in state:
        return {name: sliced_state(getattr(optimizer, name), its) for name, its in state.items()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    its = {
        i: {key: slice_like(params[i], x) if isinstance(x, Tensor) else x for key, x in each.items()} for i, each in state["state"].items()
    }
    return state | {"state": its}
