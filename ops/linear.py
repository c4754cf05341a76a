"""Linear layers, each faster than nn.Linear in one case, and a GELU that is faster when compiled."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowLinear(nn.Linear):
    """nn.Linear with a faster path for a single row of input, compiled and without gradients: the generation of a token.

    Reading the weights is all the work there. On a CPU, torch.compile's loop reads them 1.5 times as fast as the library's matrix
    product. On a GPU, Inductor does the same by itself if there is no bias; we haven't measured it there.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or not torch.compiler.is_compiling() or torch.is_grad_enabled():
            return super().forward(x)
        y = (self.weight * x.flatten()).sum(-1)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class OneDNNLinear(nn.Module):
    """A linear layer, and the GELU after it if asked for, in one call of oneDNN. On an AMD CPU its fp32 product is 1.2 to 1.4 times
    as fast as MKL's, which nn.Linear calls. No gradients."""

    @staticmethod
    def is_available(dtype: torch.dtype) -> bool:
        if not torch.backends.mkldnn.is_available():
            return False
        return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, gelu: bool = False):
        super().__init__()
        self.dtype, self.gelu = dtype, gelu
        self.weight = linear.weight.detach().to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        if dtype != linear.weight.dtype:  # the weights are copied anyway: store them in the order in which oneDNN reads them
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        after = "gelu" if self.gelu else "none"
        # "tanh": GPT-2's form of GELU
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, after, [], "tanh")


def gelu(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh u), u = √(2/π) (x + 0.044715 x³) (Hendrycks & Gimpel, 2016)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # x · σ(2u), the same function: compiled for a CPU it takes half the time, because exp is cheaper than tanh
    return x * torch.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3))
