"""GPT-2 (Radford et al., 2019) from scratch. Read it from top to bottom. Everything after GPT-2 is in variants.py.

Letters in the shapes: B sequences of T tokens, C = n_embd channels, H = n_head heads of D = C / H channels, V ids in the
vocabulary, S positions that have a key and a value: T, or with a KV cache more.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.validation import field_errors, raise_errors, rule
from formats import huggingface
from ops.kv_cache import KVCache, next_positions


@dataclass
class GPTConfig:
    """The shape of a model. The defaults are GPT-2 (124M)."""

    vocab_size: int = 50257
    """Number of token ids; train.py takes it from the shards."""
    seq_len: int = 1024
    """Longest sequence the model sees, in tokens."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads per block; must divide n_embd."""
    n_embd: int = 768
    """Channels of the residual stream."""
    attention: Literal["flash", "manual"] = "flash"
    """'flash': one fused operation. 'manual': every step spelled out."""

    rules = rule("n_embd {n_embd} is not a multiple of n_head {n_head}: change one of them", lambda c: c.n_embd % c.n_head == 0)

    beyond_gpt2 = ()  # errors for switches that GPT would ignore; only configs of variants.py have some

    def errors(self) -> list[str]:
        """Says what is wrong with these values, one line each."""
        return field_errors(self, self.rules)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to a multiple of 64, because aligned matrix products are faster."""
        return -(-self.vocab_size // 64) * 64


def manual_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v (Vaswani et al., 2017, equation 1). q: (B, H, T, D). k, v: (B, H, S, D). mask: (…, T, S), True where
    a query may look; without one, a position sees itself and everything before it."""
    T, S, D = q.size(2), k.size(2), q.size(3)
    scores = q @ k.transpose(2, 3) / D**0.5  # (B, H, T, S)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, dim=-1)
    return weights @ v  # (B, H, T, D)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same without storing the (T, S) scores (Dao et al., 2022)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class CausalSelfAttention(nn.Module):
    """Multi-head attention: a position sees itself and everything before it (Vaswani et al., 2017, section 3.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attend = flash_attention if config.attention == "flash" else manual_attention

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Callable | None = None) -> Tensor:
        """x: (B, T, C) → (B, T, C). cache(k, v) stores the new keys and values, and returns them with all earlier ones."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in (q, k, v))  # each (B, H, T, D)
        if cache is not None:
            k, v = cache(k, v)  # (B, H, S, D)
        y = self.attend(q, k, v, mask)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation that GPT-2 was trained with (Hendrycks & Gimpel, 2016)."""
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Two linear layers with a GELU between them, at four times the width."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.activation = gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Attention, then MLP. Each reads a layer norm of the residual stream x and adds its result to x."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Callable | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean cross entropy in nats per token. x: (N, C) hidden states. weight: (≥ V, C), the head. targets: (N,), -100 is ignored."""
    logits = F.linear(x, weight)[:, :vocab_size]  # (N, V)
    return F.cross_entropy(logits.float(), targets, ignore_index=-100)  # float(): a sum over V in bf16 would lose digits


class GPT(nn.Module):
    """A decoder-only transformer. Its parameters have the names of Hugging Face's GPT2LMHeadModel.
    variants.build replaces `loss` and each block's `attn.attend` and `mlp.activation` with faster equivalents."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        raise_errors([*config.errors(), *config.beyond_gpt2])
        self.config = config
        parts = {"wte": nn.Embedding(config.padded_vocab_size, config.n_embd)}  # tokens
        parts["wpe"] = nn.Embedding(config.seq_len, config.n_embd)  # positions
        parts["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        parts["ln_f"] = nn.LayerNorm(config.n_embd)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press & Wolf, 2017)
        self.loss = cross_entropy
        self.register_load_state_dict_pre_hook(huggingface.pad_tables)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draws weights with standard deviation 0.02 and zeroes biases (Radford et al., 2018). Scales each c_proj, whose output is
        added to the residual stream, by (2·n_layer)^-0.5: the sum of 2·n_layer has the variance of one (Radford et al., 2019)."""
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                scale = (2 * self.config.n_layer) ** -0.5 if "c_proj" in name else 1.0
                p.normal_(0.0, 0.02 * scale)
            elif name.endswith("bias"):
                p.zero_()

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None):
        """Returns (logits (B, T, V), None), or with targets (None, mean cross entropy in nats per token).
        idx: (B, T) ids. targets: (B, T), the id after each position, or -100 to ignore it. cache: holds the positions before idx.
        ValueError if cache and idx together are longer than seq_len."""
        x = self.hidden_states(idx, cache)  # (B, T, C)
        if targets is None:
            return self.logits(x), None
        return None, self.loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.vocab_size)

    def hidden_states(self, idx: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, mask: Tensor | None = None):
        """(B, T) ids → (B, T, C), which the head turns into logits. positions: (B, T) or (T,), by default those after the cache's.
        mask: (…, T, T), True where a query may look. With a cache, the cache makes the mask, and if you give positions, you advance
        cache.length."""
        if positions is None:
            positions = next_positions(idx, cache, self.config.seq_len)  # (T,)
        if cache is not None:
            mask = cache.mask(positions)  # (T, S)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, mask, None if cache is None else cache.layer(layer, positions))
        return self.transformer.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) → (..., V). Drops the padding rows of the table, so they can't be predicted or sampled."""
        return self.lm_head(x)[..., : self.config.vocab_size]

    def num_params(self) -> int:
        """Number of parameters, without the padding rows of the table."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    @classmethod
    def from_pretrained(cls, name_or_dir: str, revision: str | None = None) -> "GPT":
        """Loads OpenAI's weights from the hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or a local Hugging Face folder. Reads only
        safetensors, never a pickle. ValueError if the name, folder or shape does not fit."""
        # a folder may hold a variant; import it here and by name, because variants.py imports this file
        return importlib.import_module("variants").from_pretrained(name_or_dir, revision)

    def save_pretrained(self, folder: str, special_ids: dict | None = None):
        """Writes config.json and model.safetensors for transformers. ValueError if no architecture there computes the same."""
        huggingface.save(vars(self.config), self.state_dict(), folder, special_ids)
