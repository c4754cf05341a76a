"""Faster equivalents of model.py's parts, and the KV cache. Tensors in, tensors out: no GPT, no config."""

from common.device import set_compiler_flags

set_compiler_flags()  # before torch.compile reads them
