"""Linear layers that are faster in one case each; the tests hold each against nn.Linear."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowLinear(nn.Linear):
    """nn.Linear, but for one row of input, as when a token is generated: there reading the weights is all of the work, and on
    a CPU the loop that torch.compile makes reads them 1.5 times as fast as the matrix product of the library. On a GPU, where
    that has not been measured, Inductor does the same of its own accord, but not where there is a bias."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or not torch.compiler.is_compiling() or torch.is_grad_enabled():
            return super().forward(x)
        y = (self.weight * x.flatten()).sum(-1)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class OneDNNLinear(nn.Module):
    """A linear layer, and the GELU after it, as one call of oneDNN. On an AMD CPU its product in fp32 is 1.2 to
    1.4 times as fast as MKL's, which nn.Linear calls. No gradients."""

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
        if dtype != linear.weight.dtype:  # a second set of weights it is in any case: in the order in which they are read, then
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        after = "gelu" if self.gelu else "none"
        # "tanh" is the form of GELU
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, after, [], "tanh")


def gelu(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh u), u = √(2/π) (x + 0.044715 x³) (Hendrycks & Gimpel, 2016)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # equal to x · σ(2u); on a CPU the compiled loop takes half the time, since exp is cheaper than tanh
    return x * torch.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3))
