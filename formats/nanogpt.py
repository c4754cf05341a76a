"""Checkpoints of nanoGPT and build-nanogpt, read as data: no code in them is run."""

import re
from contextlib import AbstractContextManager

import torch


class PickledConfig:
    """Stands in for build-nanogpt's GPTConfig, which lies in its checkpoints as an object of the script that was run."""


def allowed() -> AbstractContextManager:
    """Within it torch.load(weights_only=True) reads that object too, as its fields alone."""
    return torch.serialization.safe_globals([(PickledConfig, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2")])


def is_nanogpt(content: dict) -> bool:
    return "model_args" in content or isinstance(content.get("config"), PickledConfig)


def converted(content: dict) -> dict:
    """Model, config and tokenizer as in a checkpoint of this project. KeyError, TypeError, AttributeError or RuntimeError when it
    is not what it seems.

    Where the table has GPT-2's 50,257 ids, or the 50,304 rows that they are padded to, the tokenizer is GPT-2's; of any other it
    is not known. nanoGPT's GELU is the exact one.
    """
    wrapped = re.compile(r"^(_orig_mod\.|module\.)+")  # by torch.compile, by DistributedDataParallel
    weights = {wrapped.sub("", name): p for name, p in content["model"].items() if not name.endswith(".attn.bias")}  # masks
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
