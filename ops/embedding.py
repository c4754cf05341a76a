"""The embeddings whose sum begins the residual stream."""

import torch
from torch import Tensor, nn


class StreamEmbedding(nn.Embedding):
    """nn.Embedding that returns bf16 where the residual stream is in bf16. What the blocks add to it is in bf16 too, so it stays."""

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x.bfloat16() if is_stream_in_bf16(x.device.type) else x


def is_stream_in_bf16(kind: str) -> bool:
    """Whether a kind of device keeps the residual stream in bf16, not fp32: CUDA under autocast to bf16. It saves a quarter of a block's
    memory traffic outside of matrix products, and costs no loss (results/stream.md). Norms compute in fp32 all the same: CUDA's autocast
    sees to that, a CPU's does not."""
    return kind == "cuda" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
