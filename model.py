"""GPT-2 (Radford et al., 2019) from scratch, to be read from top to bottom.

Letters in the shapes: B sequences, T positions, C = n_embd channels, H = n_head heads of D = C / H channels,
V ids of the vocabulary, S positions to look at: T, or all that a KV cache has room for.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 (124M)."""

    vocab_size: int = 50257
    """Ids the tokenizer has; train.py takes it from the shards."""
    seq_len: int = 1024
    """Longest sequence the model sees, in tokens."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads of a block; must divide n_embd."""
    n_embd: int = 768
    """Channels of the residual stream."""
    attention: Literal["flash", "manual"] = "flash"
    """'flash': PyTorch's fused kernel. 'manual': the same, every step spelled out."""

    def faults(self) -> list[str]:
        """What is wrong with the shape, a line each."""
        sizes = ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd")
        wrong = [name for name in sizes if not isinstance(getattr(self, name), int) or getattr(self, name) < 1]
        faults = [f"{name} is {getattr(self, name)!r}: it must be a whole number of at least 1" for name in wrong]
        if not faults and self.n_embd % self.n_head:
            faults.append(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: change one of them")
        if self.attention not in ("flash", "manual"):
            faults.append(f"attention is {self.attention!r}: choose flash or manual")
        return faults

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: a multiple of 64 keeps the largest matrix product on aligned tiles."""
        return -(-self.vocab_size // 64) * 64


SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}

MAX_LOGITS, MAX_LOGITS_CUDA = 2**26, 2**29  # more than so many never stand in memory at a time while the loss is computed


class GPT(nn.Module):
    """A decoder-only transformer with parameters named as in Hugging Face's GPT2LMHeadModel."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if faults := config.faults():
            raise ValueError("; ".join(faults))
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),  # tokens
                "wpe": nn.Embedding(config.seq_len, config.n_embd),  # positions
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: Press & Wolf, 2017
        self.chunk_loss = chunk_loss  # compile_blocks puts a compiled one here
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Weights from N(0, 0.02) as in GPT-1 (Radford et al., 2018), biases 0. What writes into the residual stream is
        scaled by (2·n_layer)^-0.5, so that 2·n_layer contributions add up to the variance of one (Radford et al., 2019)."""
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                p.normal_(0.0, 0.02 * scale)
            elif name.endswith("bias"):
                p.zero_()

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: "KVCache | None" = None):
        """Next-token logits, or with targets the loss.

        idx: (B, T) ids. targets: (B, T) ids, -100 where a position does not count. cache: the positions before idx.
        Returns (logits (B, T, V), None), or (None, mean cross entropy in nats a token) when targets are given.
        ValueError when idx and the cache together are longer than seq_len.
        """
        x = self.hidden(idx, cache)  # (B, T, C)
        if targets is None:
            return self.logits(x), None  # (B, T, V)
        return None, self.loss(x.flatten(0, 1), targets.flatten())

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats a token. x: (N, C). targets: (N,), -100 where a position does not count."""
        chunks = -(-len(x) * self.config.padded_vocab_size // (MAX_LOGITS_CUDA if x.device.type == "cuda" else MAX_LOGITS))
        if chunks > 1:
            chunk, vocab_size = -(-len(x) // chunks), self.config.vocab_size
            return chunked_cross_entropy(x, self.lm_head.weight, targets, vocab_size, chunk, self.chunk_loss)
        return self.whole_loss(x, targets)

    def whole_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        # float(): the softmax over V must not be summed in bf16
        return F.cross_entropy(self.logits(x).float(), targets, ignore_index=-100)

    def hidden(self, idx: Tensor, cache: "KVCache | None" = None, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Ids (B, T) → the residual stream after the last norm (B, T, C).

        positions (B, T) and mask (B, 1, T, T), True where a query may look, are for what is not one sequence from left to
        right; by default position t follows t - 1, or what the cache holds, and sees all before it. With a cache there is no
        mask to give, and positions (T,) are for compiled code, in which cache.length can't change: the caller moves it on.
        """
        if positions is None:
            start = cache.length if cache is not None else 0
            end = start + idx.size(1)
            if end > self.config.seq_len:
                raise ValueError(f"{end} positions, but the model sees at most {self.config.seq_len}: shorten the input")
            positions = torch.arange(start, end, device=idx.device)
            if cache is not None:
                cache.length = end
        if cache is not None:
            mask = positions[:, None] >= torch.arange(cache.max_len, device=idx.device)  # (T, S)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x, mask, cache, positions)
        return self.transformer.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) → (..., V). The ids that only pad the table are cut off: they can't be predicted or sampled."""
        return self.lm_head(x)[..., : self.config.vocab_size]

    def compile_blocks(self, activation_memory: float = 1.0):
        """torch.compile, for training and validation: a graph for all blocks, which are alike, and one for the loss, made in
        less than half the time that the whole model's would take. activation_memory: the share of the activations that is kept
        for the backward pass, in this process; what is computed again instead is chosen by cost."""
        from torch._functorch import config

        config.activation_memory_budget = activation_memory
        for block in self.transformer.h:
            block.compile()
        self.whole_loss, self.chunk_loss = torch.compile(self.whole_loss), torch.compile(self.chunk_loss)

    def for_scoring(self) -> "GPT":
        """A copy for hidden() and logits() without gradients, faster on a CPU; elsewhere, without oneDNN, or in fp16 this model
        itself. Its matrix products are in autocast's dtype of now, or else the weights'. Take another one after a step of the
        optimizer: weights in another dtype are of the moment the copy was made."""
        weight = self.lm_head.weight
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        if weight.device.type != "cpu" or not OneDNNLinear.is_available(dtype):
            return self
        with torch.device("meta"):
            copy = GPT(self.config)
        copy.load_state_dict(self.state_dict(), assign=True)  # the same tensors
        for block in copy.transformer.h:
            block.attn.c_attn = OneDNNLinear(block.attn.c_attn, dtype)
            block.attn.c_proj = OneDNNLinear(block.attn.c_proj, dtype)
            block.mlp = nn.Sequential(OneDNNLinear(block.mlp.c_fc, dtype, gelu=True), OneDNNLinear(block.mlp.c_proj, dtype))
        copy.lm_head = OneDNNLinear(copy.lm_head, dtype)
        return copy.eval()

    def num_params(self) -> int:
        """Parameters, the rows that only pad the vocabulary left out."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self) -> int:
        """Floating point operations a token costs in training, forward and backward: 6 N + 12 L C T
        (Chowdhery et al., 2022, appendix B), N without the position table; causality is not discounted."""
        n = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * self.config.seq_len

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Two groups for the optimizer: tensors of 2 or more dimensions decay; biases and norms do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def shorten(self, seq_len: int):
        """Cuts the position table to seq_len, to fine-tune a model on shorter sequences than it was trained on."""
        if seq_len > self.config.seq_len:
            raise ValueError(f"seq_len {seq_len} is longer than the {self.config.seq_len} positions the model has")
        self.config.seq_len = seq_len
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:seq_len].clone())
        self.transformer.wpe.num_embeddings = seq_len

    @classmethod
    def from_pretrained(cls, name_or_dir: str, revision: str | None = None) -> "GPT":
        """OpenAI's weights from the hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or a local Hugging Face folder.

        Only safetensors are read, never a pickle. Raises ValueError when the name, folder or shape does not fit.
        """
        folder = hf_folder(name_or_dir, revision)
        model = cls(config_from_hf(folder))
        model.load_hf_state(load_safetensors(folder), folder)
        return model

    def save_pretrained(self, folder: str):
        """Writes config.json and model.safetensors that GPT2LMHeadModel.from_pretrained loads."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config_to_hf(self.config), indent=2) + "\n")
        save_file(self.hf_state(), folder / "model.safetensors", metadata={"format": "pt"})

    def hf_state(self) -> dict[str, Tensor]:
        """The state dict as Hugging Face has it: Conv1D weights are (in, out), the table unpadded, the head tied."""
        state = {name: p.detach().cpu() for name, p in self.state_dict().items() if name != "lm_head.weight"}
        state["transformer.wte.weight"] = state["transformer.wte.weight"][: self.config.vocab_size]
        return {name: (p.t() if is_conv1d(name) else p).contiguous() for name, p in state.items()}

    @torch.no_grad()
    def load_hf_state(self, hf: dict[str, Tensor], source):
        # the hub's own gpt2 has no prefix and carries masks as buffers; transformers writes the prefix and no masks
        hf = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": p for name, p in hf.items()}
        masks = {name for name in hf if name.endswith((".attn.bias", ".attn.masked_bias"))}
        own = {name: p for name, p in self.state_dict().items() if name != "lm_head.weight"}
        if odd := sorted(own.keys() ^ (hf.keys() - masks - {"lm_head.weight"})):
            raise ValueError(f"{source}: {odd[0]} is in its weights or its config.json alone: is it a whole GPT-2?")
        for name, p in own.items():
            if not hf[name].is_floating_point():
                raise ValueError(f"{source}: {name} is {hf[name].dtype}: quantized weights are not read")
            w = hf[name].t() if is_conv1d(name) and hf[name].dim() == 2 else hf[name]
            if name == "transformer.wte.weight":
                p[self.config.vocab_size :] = 0  # the padding rows
                p = p[: self.config.vocab_size]
            if p.shape != w.shape:
                raise ValueError(f"{source}: {name} is {tuple(w.shape)}, its config.json says {tuple(p.shape)}")
            p.copy_(w)


class Block(nn.Module):
    """Pre-norm: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: "KVCache | None", positions: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache, positions)
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before (Vaswani et al., 2017, section 3.2)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None, cache: "KVCache | None", positions: Tensor) -> Tensor:
        B, T, C = x.shape
        H = self.config.n_head
        q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, positions)  # (B, H, S, D)
        attend = flash_attention if self.config.attention == "flash" else manual_attention
        y = attend(q, k, v, mask)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def causal_mask(T: int, S: int, device) -> Tensor:
    """(T, S), True where the query may look: the T queries are the last of S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def manual_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v with the future left out, or what the mask hides. q: (B, H, T, D); k, v: (B, H, S, D), S = T
    without a mask."""
    T, D = q.size(2), q.size(3)
    scores = q @ k.transpose(2, 3) / D**0.5  # (B, H, T, S)
    visible = causal_mask(T, T, q.device) if mask is None else mask
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = F.softmax(scores, dim=-1)
    return weights @ v


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same without storing the (T, S) scores (Dao et al., 2022), in one fused kernel where that is the fastest."""
    if q.device.type == "cpu" and torch.compiler.is_compiling():
        if mask is None:
            return BlockwiseAttention.apply(q, k, v)
        if q.size(2) == 1:  # too little work for the kernel
            return manual_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class MLP(nn.Module):
    """Four times as wide inside, with the tanh form of GELU that GPT-2 was trained with."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(x)))


def gelu(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh u), u = √(2/π) (x + 0.044715 x³) (Hendrycks & Gimpel, 2016)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # the same as x · σ(2u); on a CPU torch.compile makes loops of it that take half the time, since exp is easier than tanh
    return x * torch.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3))


class KVCache:
    """Keys and values of the positions seen so far, so that generating a token costs one position, not all.

    Room for max_len positions is taken at a layer's first use, when its shape and dtype are known, and attention is over
    all of it under a mask: shapes that never change are what torch.compile and CUDA graphs ask for.
    """

    def __init__(self, max_len: int):
        self.max_len = max_len
        self.length = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """k, v of the new positions (T,): (B, H, T, D) → of all, (B, H, S, D), zeros where there is none yet."""
        if layer not in self.layers:
            B, H, _, D = k.shape
            self.layers[layer] = (k.new_zeros(B, H, self.max_len, D), v.new_zeros(B, H, self.max_len, D))
        keys, values = self.layers[layer]
        return keys.index_copy_(2, positions, k), values.index_copy_(2, positions, v)


# ---- the same again, for speed and memory; the tests hold it against the above ----


class Linear(nn.Linear):
    """nn.Linear, but for one row of input, as when a token is generated: there reading the weights is all of the work, and on
    a CPU the loop that torch.compile makes reads them 1.5 times as fast as the matrix product of the library."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or x.device.type != "cpu" or not torch.compiler.is_compiling() or torch.is_grad_enabled():
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


class BlockwiseAttention(torch.autograd.Function):
    """Causal attention, a block of queries at a time against the keys up to the block's end: what lies behind it is
    never computed. As in FlashAttention-2 (Dao, 2023, algorithms 1 and 2) the softmax weights are not kept for the
    backward pass but computed again from the log of their normalizer. On a CPU, compiled, it takes 0.5 to 0.8 of the
    fused kernel's time."""

    @staticmethod
    def blocks(T: int) -> list[slice]:
        size = min(256, max(64, T // 2))  # smaller blocks compute less in vain, larger ones make faster products
        return [slice(start, min(start + size, T)) for start in range(0, T, size)]

    @staticmethod
    def future(block: slice, device) -> Tensor:
        """(block, block.stop), True where the key lies behind the query."""
        return ~causal_mask(block.stop - block.start, block.stop, device)

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (B, H, T, D) → (B, H, T, D)."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # or each product of a block would copy its part
        blocks, y, log_norm = BlockwiseAttention.blocks(q.size(2)), [], []
        for block in blocks:
            scores = (q[:, :, block] @ k[:, :, : block.stop].transpose(2, 3)).float() / q.size(3) ** 0.5
            scores = scores.masked_fill(BlockwiseAttention.future(block, q.device), float("-inf"))
            log_norm.append(scores.logsumexp(-1))  # (B, H, block)
            y.append((scores - log_norm[-1][..., None]).exp().to(v.dtype) @ v[:, :, : block.stop])
        y = torch.cat(y, dim=2)
        ctx.save_for_backward(q, k, v, y, torch.cat(log_norm, dim=2))
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, y, log_norm = ctx.saved_tensors
        blocks, dq, dk, dv = BlockwiseAttention.blocks(q.size(2)), [], [], []
        row_sum = (dy.float() * y.float()).sum(-1)[:, :, None]  # Σ of weight · its gradient over a row: (B, H, 1, T)
        for block in blocks:
            # transposed, (B, H, keys, queries), so that torch.compile does not see the forward pass's scores and keep them
            q_block, k_seen, v_seen, dy_block = q[:, :, block], k[:, :, : block.stop], v[:, :, : block.stop], dy[:, :, block]
            scores = (k_seen @ q_block.transpose(2, 3)).float() / q.size(3) ** 0.5
            weights = (scores - log_norm[:, :, None, block]).exp().masked_fill(BlockwiseAttention.future(block, q.device).t(), 0)
            dweights = (v_seen @ dy_block.transpose(2, 3)).float()
            dscores = (weights * (dweights - row_sum[..., block]) / q.size(3) ** 0.5).to(q.dtype)
            dq.append(dscores.transpose(2, 3) @ k_seen)
            dk.append(dscores @ q_block)
            dv.append(weights.to(v.dtype) @ dy_block)

        def over_queries(parts: list[Tensor]) -> Tensor:
            """A block of keys is seen by its own queries and by those of all later blocks."""
            sums = [sum(part[:, :, block].float() for part in parts[i:]) for i, block in enumerate(blocks)]
            return torch.cat(sums, dim=2).to(q.dtype)

        return torch.cat(dq, dim=2), over_queries(dk), over_queries(dv)


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int, chunk_loss) -> Tensor:
    """cross_entropy(x @ weight.T, targets), a chunk of positions at a time, so that the logits never stand in memory
    together. x: (N, C); weight: (≥ vocab_size, C), in fp32 also under autocast; targets: (N,), -100 does not count.
    chunk_loss: the function below, or what torch.compile makes of it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return ChunkedCrossEntropy.apply(x, weight, targets, vocab_size, chunk, chunk_loss, torch.is_grad_enabled())


def chunk_loss(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int, dx: Tensor | None, dw: Tensor | None) -> Tensor:
    """The sum of the cross entropies of n positions, x (n, C), w all rows of the table in x's dtype. Its gradients are written
    into dx, like x, and added to dw, like the table; None for none. This is compiled, and not the loop that calls it: of a
    loop torch.compile keeps each turn's part of dw until the end."""
    ids, counts, target = torch.arange(len(w), device=x.device), (targets != -100)[:, None], targets.clamp(min=0)[:, None]
    logits = (x @ w.t()).float().masked_fill(ids >= vocab_size, float("-inf"))  # (n, V)
    log_norm = logits.logsumexp(-1, keepdim=True)
    if dx is not None:
        # not divided by the number of positions yet, which fp16 could not hold, and the sum over them by 256, so that it can
        dlogits = (((logits - log_norm).exp() - (ids == target).float()) * counts).to(x.dtype)
        dx.copy_(dlogits @ w)
        dw += (dlogits.t() @ (x / 256)).float() * 256
    return ((log_norm - logits.gather(1, target)) * counts).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk's loss is softmax(logits) - onehot(target), so it is computed in the forward pass, while the
    logits are there, and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int, chunk_loss, needs_grad: bool) -> Tensor:
        w, total, n = weight.to(x.dtype), torch.zeros((), dtype=torch.float32, device=x.device), (targets != -100).sum()
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight)) if needs_grad else (None, None)
        for part in (slice(start, start + chunk) for start in range(0, len(x), chunk)):
            total += chunk_loss(x[part], w, targets[part], vocab_size, dx[part] if needs_grad else None, dw)
        if needs_grad:
            ctx.save_for_backward(dx, dw, n)
        return total / n

    @staticmethod
    def backward(ctx, dloss: Tensor):
        dx, dw, n = ctx.saved_tensors
        return dx * (dloss / n), dw * (dloss / n), None, None, None, None, None


# ---- Hugging Face's files ----


def is_conv1d(name: str) -> bool:
    """GPT-2 was released with its linear layers as Conv1D, whose weights are transposed."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def hf_folder(name_or_dir: str, revision: str | None = None) -> Path:
    """A local folder as it is, or one of OpenAI's four sizes, downloaded once into the hub's cache, in a folder that has the
    commit as its name."""
    if Path(name_or_dir).is_dir():
        return Path(name_or_dir)
    if name_or_dir not in SIZES:
        raise ValueError(f"no model named {name_or_dir!r}: give a checkpoint, a folder, or one of {', '.join(SIZES)}")
    from huggingface_hub import hf_hub_download

    repo = f"openai-community/{name_or_dir}"
    try:
        for file in ("config.json", "model.safetensors"):
            path = hf_hub_download(repo, file, revision=revision)
    except Exception as e:  # the hub's client raises a dozen kinds; each means the same to the user
        raise ValueError(f"could not fetch {repo} from the hub ({type(e).__name__}): check the network, or give a local folder") from e
    return Path(path).parent


def config_from_hf(folder: Path) -> GPTConfig:
    """Reads config.json and refuses, by name, what this model does not compute."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json: give a checkpoint, a Hugging Face GPT-2 folder, or a run's folder")
    try:
        hf = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is not a JSON object ({e}): fetch the folder again") from e
    if hf.get("model_type") != "gpt2":
        raise ValueError(f"{path} describes a {hf.get('model_type')!r} model: only gpt2 can be loaded")
    missing = [key for key in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd") if key not in hf]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it does not describe a GPT-2")
    config = GPTConfig(hf["vocab_size"], hf["n_positions"], hf["n_layer"], hf["n_head"], hf["n_embd"])
    if faults := config.faults():
        raise ValueError(f"{path}: {'; '.join(faults)}")
    computed_here = {
        "activation_function": ("gelu_new",),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * config.n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
    }
    for key, values in computed_here.items():
        if hf.get(key, values[0]) not in values:
            raise ValueError(f"{path}: {key} is {hf[key]!r}, this model computes {values[-1]!r} only")
    return config


def config_to_hf(config: GPTConfig) -> dict:
    """config.json for GPT2LMHeadModel. <|endoftext|> is the last id in every tokenizer of this project, as in GPT-2's."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.seq_len,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
        "tie_word_embeddings": True,
    }


def load_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, from one file or from the parts that its index lists."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    try:
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        paths = sorted(folder / file for file in files)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{index} is not an index of weights: fetch the folder again") from e
    state = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{folder} has no {path.name}: pickled weights are not read; save it with safe_serialization=True")
        try:
            state.update(load_file(path))
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged ({e}): fetch it again") from e
    return state
