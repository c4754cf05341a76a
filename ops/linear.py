"""Linear layers, each faster than nn.Linear in one case, and a GELU that is faster when compiled."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops import choice

TRIAL_BYTES = 2**26  # more than a CPU's caches hold: reading the weights is all the work for one row

# ---- ways to multiply: x (…, in), weight (out, in), bias (out,) → (…, out) ----


def row_loop(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row of input, for torch.compile to turn into a loop."""
    y = (weight * x.flatten()).sum(-1)
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def mv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A matrix times a vector. x: one row."""
    y = torch.mv(weight, x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())
    return y.view(*x.shape[:-1], -1)


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product. On an AMD CPU it is 1.2 to 1.8 times as fast in fp32 as MKL's, which F.linear calls."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


MULTIPLY: dict[str, Callable] = {"library": library, "onednn": onednn, "packed": onednn, "mv": mv}


@torch.library.custom_op("gpt::row_linear", mutates_args=())
def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, way: str) -> Tensor:
    """Calls the library from compiled code, which would otherwise replace mv by its own loop."""
    return MULTIPLY[way](x, weight, bias)


@row_linear.register_fake
def _(x, weight, bias, way):
    return x.new_empty(*x.shape[:-1], weight.size(0))


def int8_loop(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """One row of input, for torch.compile to turn into a loop. It is fast with AVX-512, and not with AVX2."""
    y = (row_loop(x.float(), weight, None) * scale).to(x.dtype)
    return y if bias is None else y + bias


def int8_library(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's product with 8-bit weights, which is fast for x (…, in) in bf16 and few rows."""
    y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), weight, scale).to(x.dtype).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def gelu(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh u), u = √(2/π) (x + 0.044715 x³) (Hendrycks & Gimpel, 2016)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # x · σ(2u), the same function: compiled for a CPU it takes half the time, because exp is cheaper than tanh
    return x * torch.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3))


# ---- layers ----


class RowLinear(nn.Linear):
    """nn.Linear with a faster path for a single row of input, compiled and without gradients: the generation of a token.

    Reading the weights is all the work there. torch.compile's loop reads them 1.7 times as fast as the library on an AMD CPU, and half
    as fast on an Intel one: `way` says which to use. On a GPU, Inductor does the same by itself if there is no bias; we haven't
    measured it there.
    """

    way = "loop"
    row_ways: ClassVar[dict[str, Callable]] = {"loop": row_loop, "library": library, "mv": mv}

    def row_tensors(self):
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)  # autocast knows nn.Linear only
        if plain or x.numel() != self.in_features or not torch.compiler.is_compiling():
            return super().forward(x)
        if self.way != "loop":
            return torch.ops.gpt.row_linear(x, self.weight, self.bias, self.way)
        return row_loop(x, self.weight, self.bias)


class InferenceLinear(nn.Module):
    """A linear layer without gradients, and the GELU after it if asked for. way: a key of MULTIPLY; 'packed' copies the weights into
    the order in which oneDNN reads them, and 'mv' takes other ways for more rows than one."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, way: str, gelu: bool = False):
        super().__init__()
        self.dtype, self.way, self.gelu = dtype, way, gelu
        self.weight = linear.weight.detach().to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        if way == "packed":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.gelu and self.way in ("onednn", "packed"):  # in the same call. "tanh": GPT-2's form of GELU
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")
        several = self.way == "mv" and x.numel() != x.size(-1)
        y = MULTIPLY["library" if several else self.way](x, self.weight, self.bias)
        return gelu(y) if self.gelu else y


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights and one scale per output: y = x (scale · weight)ᵀ + bias. No gradients. A scale is the largest
    absolute weight of the output's row, divided by 127 (absmax quantization: Dettmers et al., 2022, section 2.1, for weights only).
    way: how to compute one row in torch.compile."""

    way = "loop"
    row_ways: ClassVar[dict[str, Callable]] = {"loop": int8_loop, "library": int8_library}

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        # bf16 has the range of fp32, and the fast operation takes the scale in bf16. Rows of zeros stay zero
        self.scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).bfloat16()  # (out,)
        self.weight = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)  # (out, in)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def row_tensors(self):
        return self.weight, self.scale, self.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        fits = x.size(-1) % 16 == 0  # else PyTorch's operation reads beyond the weights' end (torch 2.13)
        if x.device.type == "cpu" and rows == 1 and torch.compiler.is_compiling():
            return self.row_ways[self.way if fits else "loop"](x, *self.row_tensors())
        if x.device.type == "cpu" and rows <= 16 and fits:
            return int8_library(x, *self.row_tensors())
        y = F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None], self.bias)
        return y.to(x.dtype)  # also in autocast: few rows and many must have one dtype, that of the cache


# ---- the choice ----


def inference_ways(dtype: torch.dtype, rows: int) -> list[str]:
    """Returns the ways to compute a linear layer without gradients on this CPU, for a dtype and a number of rows. The first is the
    default. Empty if nn.Linear is the only way."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return []
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    ways = ["onednn" if dtype == torch.float32 else "packed", "library"]  # packing fp32 weights would take as much memory again
    return [*ways, "mv"] if rows == 1 else ways


def fastest_way(layers: list[nn.Linear], dtype: torch.dtype, rows: int) -> str | None:
    """Returns the fastest of inference_ways, from a trial of about 0.1 s with these layers at the first call. None: keep nn.Linear,
    because there is nothing else, or because the layers are small and the rows are few. rows: of a typical input."""
    ways, what = inference_ways(dtype, rows), "row" if rows == 1 else "rows"
    if not ways:
        return None
    if way := choice.forced(what):
        return way
    tried = trial_layers(layers, dtype, 2 if rows > 1 else len(layers))
    if not tried and rows <= 64:
        return None
    if not tried or not choice.may_try:
        return ways[0]
    key = f"{what} {str(dtype)[6:]}"
    if key not in choice.chosen:
        x = torch.ones(min(rows, 256), tried[0].in_features, dtype=dtype)
        by_way = {way: [InferenceLinear(layer, dtype, way) for layer in tried] for way in ways}
        choice.fastest(key, {way: lambda each=each: [layer(x) for layer in each] for way, each in by_way.items()})
    return choice.chosen[key]


def trial_layers(layers: list[nn.Linear], dtype: torch.dtype, most: int) -> list[nn.Linear]:
    """Returns the first layers that together have TRIAL_BYTES, at most `most`; none if all of them are too small to matter."""
    size = layers[0].weight.numel() * dtype.itemsize
    enough = min(most, -(-TRIAL_BYTES // size))
    return layers[:enough] if size * len(layers) >= TRIAL_BYTES // 4 else []


def choose_compiled_row(layers: list[nn.Module], typical: list[nn.Module]):
    """Sets how layers compute one row in torch.compile. Tries the ways with the typical ones among them, once per process: compiling the
    loop takes some seconds. All are RowLinear, or all are Int8Linear."""
    weight, ways = typical[0].weight, typical[0].row_ways
    key = f"compiled_row {str(weight.dtype)[6:]}"
    way = choice.forced("compiled_row") or choice.chosen.get(key)
    trial = [] if way else trial_layers(typical, weight.dtype, len(typical))
    if trial:
        x = torch.ones(1, weight.size(1), dtype=weight.dtype if weight.is_floating_point() else torch.float32)
        calls = {name: torch.compile(call, dynamic=False) if name == "loop" else call for name, call in ways.items()}
        way = choice.fastest(
            key, {name: lambda call=call: [call(x, *layer.row_tensors()) for layer in trial] for name, call in calls.items()}
        )
    for layer in layers:
        layer.way = way if way in ways else "loop"
