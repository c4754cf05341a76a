"""Reads checkpoints of nanoGPT and build-nanogpt as data: runs no code in them."""

import re
from contextlib import AbstractContextManager

import torch


class PickledConfig:
    """Stands in for build-nanogpt's GPTConfig: its checkpoints contain one, pickled as an object of the training script."""


def allowed() -> AbstractContextManager:
    """Returns a context in which torch.load(weights_only=True) also reads that object's fields."""
    return torch.serialization.safe_globals([(PickledConfig, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2")])


def is_nanogpt(content: dict) -> bool:
    return "model_args" in content or isinstance(content.get("config"), PickledConfig)


def converted(content: dict) -> dict:
    """Returns model, config and tokenizer as in a checkpoint of this project. KeyError, TypeError, AttributeError or RuntimeError
    if the content is malformed.

    A table with GPT-2's 50,257 ids, or padded to 50,304 rows, means GPT-2's tokenizer. For any other size the tokenizer is None,
    unknown. nanoGPT uses the exact GELU.
    """
    wrapper = re.compile(r"^(_orig_mod\.|module\.)+")  # added by torch.compile and DistributedDataParallel
    # build-nanogpt and old nanoGPT store the causal mask as attn.bias
    weights = {wrapper.sub("", name): p for name, p in content["model"].items() if not name.endswith(".attn.bias")}
    shape = content["model_args"] if "model_args" in content else vars(content["config"])
    rows = shape["vocab_size"]
    is_gpt2 = rows in (50257, 50304)
    config = {
        "vocab_size": 50257 if is_gpt2 else rows,
        "seq_len": shape["block_size"],
        "n_layer": shape["n_layer"],
        "n_head": shape["n_head"],
        "n_embd": shape["n_embd"],
        "bias": shape.get("bias", True),
        "mlp": "gelu_exact" if "model_args" in content else "gelu",
        "tied_head": torch.equal(weights["transformer.wte.weight"], weights["lm_head.weight"]),
    }
    return {"model": weights, "config": config, "tokenizer": "gpt2" if is_gpt2 else None}
