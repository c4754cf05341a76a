"""GPT-2's forward pass in plain NumPy and float64, written from the paper and the layout of the released weights."""

import numpy as np


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gpt2_logits(weights: dict, ids: list[int], n_layer: int, n_head: int) -> np.ndarray:
    """ids (T,) → logits (T, V), one head and one query at a time. weights: as Hugging Face stores them, Conv1D (in, out)."""
    w = {name.removeprefix("transformer."): np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    x = np.stack([w["wte.weight"][token] + w["wpe.weight"][position] for position, token in enumerate(ids)])
    size = x.shape[1] // n_head
    for layer in range(n_layer):
        p = f"h.{layer}."
        h = layer_norm(x, w[p + "ln_1.weight"], w[p + "ln_1.bias"])
        q, k, v = np.split(h @ w[p + "attn.c_attn.weight"] + w[p + "attn.c_attn.bias"], 3, axis=1)
        mixed = np.zeros_like(x)
        for head in range(n_head):
            part = slice(head * size, (head + 1) * size)
            for t in range(len(ids)):
                weight = softmax(k[: t + 1, part] @ q[t, part] / np.sqrt(size))
                mixed[t, part] = weight @ v[: t + 1, part]
        x = x + mixed @ w[p + "attn.c_proj.weight"] + w[p + "attn.c_proj.bias"]
        h = layer_norm(x, w[p + "ln_2.weight"], w[p + "ln_2.bias"])
        h = gelu(h @ w[p + "mlp.c_fc.weight"] + w[p + "mlp.c_fc.bias"])
        x = x + h @ w[p + "mlp.c_proj.weight"] + w[p + "mlp.c_proj.bias"]
    return layer_norm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T
