"""GPT-2 (Radford et al., 2019) from scratch, to be read from top to bottom; what came after it are switches of GPTConfig.

Letters in the shapes: B sequences, T positions, C = n_embd channels, H = n_head heads of D = C / H channels, of which
K = n_kv_head have keys and values, V ids of the vocabulary, S positions to look at: T, or all that a KV cache has room for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from string import Formatter
from typing import Literal, NamedTuple, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from kernels import BlockwiseAttention, Linear, chunk_loss, chunked_cross_entropy
from kv_cache import KVCache, LayerCache


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
    """'flash': in one fused kernel. 'manual': the same, every step spelled out."""

    # what came after GPT-2
    pos: Literal["learned", "rope"] = "learned"
    """Positions: a learned table, or rotary embeddings (Su et al., 2021)."""
    rope_base: float = 10000.0
    """Rotary embeddings: the longest wave is about 2π times as many positions."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn"] = "none"
    """For sequences --rope-factor times as long as those of training (Chen et al., 2023; bloc97, 2023; Peng et al., 2023)."""
    rope_factor: float = 1.0
    """seq_len as a multiple of the length that the model was trained on."""
    n_kv_head: int | None = None
    """Heads that have keys and values, each for n_head / n_kv_head queries (Ainslie et al., 2023); by default all."""
    window: int | None = None
    """Positions a query sees, its own included (Beltagy et al., 2020); by default all before it."""
    window_pattern: str = "S"
    """Which layers the window is for, repeated over all: S for short, L for long, without it. SSSL: three of four."""
    doc_mask: bool = False
    """A query sees its own document only, which begins at the last <|endoftext|>."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys (Henry et al., 2020)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Of what goes into attention, MLP and head (Ba et al., 2016; Zhang & Sennrich, 2019)."""
    mlp: Literal["gelu", "gelu_exact", "relu2", "swiglu"] = "gelu"
    """The MLP's activation (Hendrycks & Gimpel, 2016; So et al., 2021; Shazeer, 2020), at equal parameters. gelu_exact: nanoGPT's."""
    bias: bool = True
    """Biases in linear layers and norms."""
    tied_head: bool = True
    """The head is the embedding table (Press & Wolf, 2017)."""
    value_residual: bool = False
    """A layer's values are mixed with the first layer's (Zhou et al., 2024)."""
    share_layers: int = 1
    """Layers in a row that have the same weights (Lan et al., 2019); must divide n_layer."""
    n_expert: int = 1
    """MLPs of a block, of which a router chooses for each token (Shazeer et al., 2017)."""
    n_expert_active: int = 1
    """How many it chooses; the chosen ones together are as wide as one MLP without a choice."""
    load_balance: float = 0.01
    """Weight of the loss that keeps the experts equally busy (Fedus et al., 2021)."""

    def faults(self) -> list[str]:
        """What is wrong with the shape, a line each."""
        odd = {
            f.name: f"{f.name} is {getattr(self, f.name)!r}: {needs(f.type)}"
            for f in fields(self)
            if not fits(getattr(self, f.name), f.type)
        }
        judged = [(rule, holds) for rule, holds in RULES if not odd.keys() & {name for _, name, _, _ in Formatter().parse(rule)}]
        return [*odd.values(), *(rule.format(**vars(self)) for rule, holds in judged if not holds(self))]

    def variants(self) -> list[str]:
        """The switches that are not as in GPT-2."""
        return [f.name for f in SWITCHES if getattr(self, f.name) != f.default]

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: a multiple of 64 keeps the largest matrix product on aligned tiles."""
        return -(-self.vocab_size // 64) * 64

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer, None where there is none or it holds all."""
        window = self.window if self.window is not None and self.window < self.seq_len else None
        return [window if self.window_pattern[layer % len(self.window_pattern)] == "S" else None for layer in range(self.n_layer)]

    @property
    def n_inner(self) -> int:
        """Channels inside an MLP, or in one of the experts that are at work: in all as many weights as 4 · n_embd have without
        a gate."""
        inner = -(-self.n_embd // 3) * 8 if self.mlp == "swiglu" else 4 * self.n_embd
        return -(-inner // self.n_expert_active)

    @property
    def n_fc(self) -> int:
        """Channels that an MLP's first product makes: with a gate twice as many as are left after it."""
        return (2 if self.mlp == "swiglu" else 1) * self.n_inner


SWITCHES = fields(GPTConfig)[6:]  # what came after GPT-2

SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}

# fields that may change while the weights stay
NOT_IN_WEIGHTS = {
    "seq_len", "attention", "rope_base", "rope_scaling", "rope_factor", "window", "window_pattern", "doc_mask", "load_balance",
}  # fmt: skip

MAX_LOGITS, MAX_LOGITS_CUDA = 2**26, 2**29  # more than so many never stand in memory at a time while the loss is computed


class GPT(nn.Module):
    """A decoder-only transformer with parameters named as in Hugging Face's GPT2LMHeadModel."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if faults := config.faults():
            raise ValueError("; ".join(faults))
        self.config = config
        parts = {"wte": nn.Embedding(config.padded_vocab_size, config.n_embd)}  # tokens
        if config.pos == "learned":
            parts["wpe"] = nn.Embedding(config.seq_len, config.n_embd)  # positions
        parts["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer // config.share_layers))
        parts["ln_f"] = make_norm(config)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.transformer.wte.weight
        if config.value_residual:
            self.value_scale = nn.Parameter(torch.full((config.n_layer,), 0.5))
        self.chunk_loss = chunk_loss  # compile_blocks puts a compiled one here
        self.flex, self.recompute = False, False  # FlexAttention for windows and documents; activation checkpointing
        self.register_load_state_dict_pre_hook(pad_tables)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Weights from N(0, 0.02) as in GPT-1 (Radford et al., 2018), biases 0. What writes into the residual stream is
        scaled by (2·n_layer)^-0.5, so that 2·n_layer contributions add up to the variance of one (Radford et al., 2019)."""
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                scale = (2 * self.config.n_layer) ** -0.5 if "c_proj" in name else 1.0
                p.normal_(0.0, 0.02 * scale)
            elif name.endswith("bias"):
                p.zero_()

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None, criterion: Callable | None = None):
        """Next-token logits, or with targets the loss.

        idx: (B, T) ids. targets: (B, T) ids, -100 where a position does not count. cache: the positions before idx.
        criterion: makes a loss of hidden states (N, C) and targets (N,), where it is not to be the model's own.
        Returns (logits (B, T, V), None), or when targets are given (None, mean cross entropy in nats a token).
        ValueError when idx and the cache together are longer than seq_len.
        """
        x, balance = self.trunk(idx, cache)  # (B, T, C)
        if targets is None:
            return self.logits(x), None  # (B, T, V)
        loss = (criterion or self.loss)(x.flatten(0, 1), targets.flatten())
        if self.config.n_expert > 1:  # in the gradient, but not in the number, which is to be compared with other models'
            loss = loss + self.config.load_balance * (balance - balance.detach())
        return None, loss

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats a token. x: (N, C). targets: (N,), -100 where a position does not count."""
        chunk = self.positions_at_once(x)
        if chunk < len(x):
            return chunked_cross_entropy(x, self.lm_head.weight, targets, self.config.vocab_size, chunk, self.chunk_loss)
        return self.whole_loss(x, targets)

    def positions_at_once(self, x: Tensor) -> int:
        """How many of x (N, C) may have their logits in memory together."""
        return -(-len(x) // loss_chunks(len(x), self.config.padded_vocab_size, x.device.type))

    def whole_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        # float(): the softmax over V must not be summed in bf16
        return F.cross_entropy(self.logits(x).float(), targets, ignore_index=-100)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) → (..., V). The ids that only pad the table are cut off: they can't be predicted or sampled."""
        return self.lm_head(x)[..., : self.config.vocab_size]

    def hidden(self, idx: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Ids (B, T) → the residual stream after the last norm (B, T, C).

        positions (B, T) and mask (B, 1, T, T), True where a query may look, are for what is not one sequence from left to
        right; by default position t follows t - 1, or what the cache holds, and sees all before it, within its document where
        that is asked for. With a cache there is no mask to give, and positions (T,) are for compiled code, in which
        cache.length can't change: the caller moves it on.
        """
        return self.trunk(idx, cache, positions, mask)[0]

    def trunk(self, idx: Tensor, cache: KVCache | None = None, positions=None, mask=None) -> tuple[Tensor, Tensor | float]:
        """As hidden, and the load-balancing loss of all experts."""
        config = self.config
        if positions is None:
            start = cache.length if cache is not None else 0
            end = start + idx.size(1)
            most = min(config.seq_len, cache.max_len) if cache is not None else config.seq_len
            if end > most:
                whose = "model sees" if most == config.seq_len else "cache holds"
                raise ValueError(f"{end} positions, but the {whose} at most {most}: shorten the input")
            positions = torch.arange(start, end, device=idx.device)
            if cache is not None:
                cache.length = end
        masks = self.masks(idx, cache, positions, mask)
        rotation = rotation_of(positions, config) if config.pos == "rope" else None
        x = self.transformer.wte(idx)
        if config.pos == "learned":
            x = x + self.transformer.wpe(positions)
        first_values, balance = None, 0.0
        for layer, window in enumerate(config.windows):
            block = self.transformer.h[layer // config.share_layers]
            context = Context(
                window=window,
                mask=masks[window],
                rotation=rotation,
                positions=positions,
                cache=None if cache is None else cache.layer(layer, window),
                values=(first_values, self.value_scale[layer]) if config.value_residual else None,
            )
            if self.recompute and torch.is_grad_enabled():
                x, values, more = checkpoint(block, x, context, use_reentrant=False)
            else:
                x, values, more = block(x, context)
            first_values = values if layer == 0 else first_values
            balance = balance + more
        return self.transformer.ln_f(x), balance

    def masks(self, idx: Tensor, cache: KVCache | None, positions: Tensor, mask: Tensor | None) -> dict:
        """For each window of a layer, what its queries may see: (…, T, S), True for it; None: all before them in the window."""
        config, masks, documents = self.config, {}, None
        flex = self.flex and config.attention == "flash"
        if config.doc_mask and mask is None:
            starts = idx == config.vocab_size - 1  # <|endoftext|> is the last id in every tokenizer of this project
            documents = starts.cumsum(1) if cache is None else cache.documents(starts, positions)  # (B, T), (B, max_len)
        for window in set(config.windows):
            if cache is None and mask is None and (documents is None or flex):
                is_partial = window is not None or documents is not None
                masks[window] = block_mask(idx.size(1), window, documents, idx.device) if flex and is_partial else None
                continue
            keys = positions if cache is None else cache.positions(window, positions)
            seen = sees(positions[..., :, None], keys[..., None, :], window)  # (T, S) or (B, T, S)
            seen = seen if seen.dim() == 2 else seen[:, None]
            seen = seen if mask is None else seen & mask
            if documents is not None:
                of_keys = documents if cache is None else documents[:, keys.clamp(min=0)]
                of_queries = documents if cache is None else documents[:, positions]
                seen = seen & (of_queries[:, None, :, None] == of_keys[:, None, None, :])
            masks[window] = seen
        return masks

    def compile_blocks(self, activation_memory: float = 1.0):
        """torch.compile, for training and validation: a graph for all blocks, which are alike, and one for the loss, made in
        less than half the time that the whole model's would take. activation_memory: the share of the activations that is kept
        for the backward pass, in this process; what is computed again instead is chosen by cost."""
        from torch._functorch import config

        config.activation_memory_budget = activation_memory
        torch._dynamo.config.recompile_limit = 64  # blocks are alike in kinds: first or not, with a window or not, of model or teacher
        for block in self.transformer.h:
            if isinstance(block.mlp, MixtureOfExperts):  # there the sizes are others each time
                block.mlp.by_expert = torch.compiler.disable(by_expert)
            block.compile()
        self.whole_loss, self.chunk_loss = torch.compile(self.whole_loss), torch.compile(self.chunk_loss)
        # its kernels are for heads of at least 16 channels
        self.flex = self.lm_head.weight.device.type == "cuda" and self.config.n_embd // self.config.n_head >= 16

    def undo_compile(self):
        """Makes blocks and loss eager again."""
        for block in self.transformer.h:
            block._compiled_call_impl = None  # PyTorch has no public way to undo Module.compile
        del self.whole_loss  # the method is there again
        self.chunk_loss, self.flex = chunk_loss, False

    @classmethod
    def on_meta(cls, config: GPTConfig) -> "GPT":
        """A model whose weights take no memory and have no values: to count with, or to be given those of another."""
        with torch.device("meta"):
            return cls(config)

    def num_params(self, active: bool = False) -> int:
        """Parameters, the rows that only pad the vocabulary left out; active: those that are at work for one token."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        padding *= 1 if self.config.tied_head else 2
        return sum(p.numel() for p in self.parameters()) - padding - (self.idle_params() if active else 0)

    def idle_params(self) -> int:
        """Those of the experts that are not chosen for a token."""
        experts = sum(p.numel() for block in self.transformer.h for p in block.mlp.parameters()) if self.config.n_expert > 1 else 0
        routers = self.config.n_expert * self.config.n_embd * len(self.transformer.h) if experts else 0
        return (experts - routers) * (self.config.n_expert - self.config.n_expert_active) // self.config.n_expert

    def flops_per_token(self) -> int:
        """Floating point operations a token costs in training, forward and backward: 6 N + 12 C · positions seen, summed over
        the layers (Chowdhery et al., 2022, appendix B). N: the weights at work, as often as they are, without position tables
        and an embedding that is not the head too; causality is not discounted."""
        config = self.config
        blocks = sum(p.numel() for p in self.transformer.h.parameters()) - self.idle_params()
        n = config.share_layers * blocks + self.lm_head.weight.numel() + sum(p.numel() for p in self.transformer.ln_f.parameters())
        return 6 * n + 12 * config.n_embd * sum(window or config.seq_len for window in config.windows)

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Two groups for the optimizer: tensors of 2 or more dimensions decay; biases and norms do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def adapt(self, config: GPTConfig):
        """Takes over what the weights do not depend on, to fine-tune them; a learned position table is cut to the new seq_len.
        ValueError when it is too short for it, or when rope is scaled by another factor than seq_len is."""
        if config.pos == "learned" and config.seq_len > self.config.seq_len:
            raise ValueError(f"seq_len {config.seq_len} is longer than the {self.config.seq_len} positions the model has: lower it")
        trained, longer = self.config.seq_len / self.config.rope_factor, config.seq_len / config.rope_factor
        if config.rope_scaling != "none" and longer != trained:
            why = f"rope_factor {config.rope_factor:g} is for sequences of {trained * config.rope_factor:g}, not of {config.seq_len}"
            raise ValueError(f"{why}, since the model was trained on {trained:g}: change seq_len or the factor")
        for name in NOT_IN_WEIGHTS:
            setattr(self.config, name, getattr(config, name))
        if config.pos == "learned":
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[: config.seq_len].clone())
            self.transformer.wpe.num_embeddings = config.seq_len

    @classmethod
    def from_pretrained(cls, name_or_dir: str, revision: str | None = None) -> "GPT":
        """OpenAI's weights from the hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or a local Hugging Face folder.

        Only safetensors are read, never a pickle. Raises ValueError when the name, folder or shape does not fit.
        """
        import huggingface

        return huggingface.load(name_or_dir, revision)

    def save_pretrained(self, folder: str):
        """Writes config.json and model.safetensors for transformers. ValueError where none of its architectures computes the same."""
        import huggingface

        huggingface.save(self, folder)


def pad_tables(model: GPT, state: dict, prefix: str = "", *_):
    """Tables of a state dict that end with the vocabulary, as Hugging Face's do, get the rows that only pad it; in place."""
    config = model.config
    missing = config.padded_vocab_size - config.vocab_size
    for name in (f"{prefix}transformer.wte.weight", f"{prefix}lm_head.weight"):
        if missing and name in state and state[name].shape == (config.vocab_size, config.n_embd):
            state[name] = F.pad(state[name], (0, 0, 0, missing))


def loss_chunks(n: int, rows: int, kind: str) -> int:
    """Into how many parts n positions go, with a logit for each row of the table and position: as few as may be on this kind of
    device, or up to twice as many if then all have one length; for lengths that change torch.compile makes slower code."""
    fewest = -(-n * rows // (MAX_LOGITS_CUDA if kind == "cuda" else MAX_LOGITS))
    return next((parts for parts in range(fewest, 2 * fewest) if n % parts == 0), fewest)


class Context(NamedTuple):
    """What a block is told beside its input; for GPT-2 in training all is None but the positions, which only a cache needs."""

    positions: Tensor  # (T,) or (B, T)
    window: int | None  # how far a query sees, where there is no mask
    mask: Tensor | BlockMask | None  # (…, T, S), True where a query may look
    rotation: tuple[Tensor, Tensor] | None  # cosines and sines for rope, (…, T, D/2) each
    cache: LayerCache | None
    values: tuple[Tensor | None, Tensor] | None  # of the first layer (B, K, T, D), and their share in this one's


class Block(nn.Module):
    """Pre-norm: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config) if config.n_expert == 1 else MixtureOfExperts(config)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """x: (B, T, C) → the same, the layer's values where later layers want them, and its load-balancing loss."""
        y, values = self.attn(self.ln_1(x), context)
        x = x + y
        y, balance = self.mlp(self.ln_2(x))
        return x + y, values, balance


def make_norm(config: GPTConfig) -> nn.Module:
    return RMSNorm(config.n_embd) if config.norm == "rmsnorm" else nn.LayerNorm(config.n_embd, bias=config.bias)


class RMSNorm(nn.Module):
    """x / √(mean of x² + ε) · weight (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-5).type_as(x)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before (Vaswani et al., 2017, section 3.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.head_size = config.n_embd // config.n_head
        self.kv_size = config.kv_heads * self.head_size
        self.c_attn = Linear(config.n_embd, config.n_embd + 2 * self.kv_size, config.bias)  # query, key and value in one product
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_size), RMSNorm(self.head_size)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """x: (B, T, C) → the same, and the values (B, K, T, D) where later layers want them."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split([C, self.kv_size, self.kv_size], dim=2)
        q, k, v = (y.view(B, T, -1, self.head_size).transpose(1, 2) for y in (q, k, v))  # (B, H, T, D), twice (B, K, T, D)
        values = None
        if context.values is not None:
            first, share = context.values
            values = v = v + share * ((v if first is None else first) - v)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotation is not None:
            q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)
        if context.cache is not None:
            k, v = context.cache.append(k, v, context.positions)  # (B, K, S, D)
        if k.size(1) < q.size(1):
            k, v = (y.repeat_interleave(q.size(1) // k.size(1), dim=1) for y in (k, v))  # (B, H, S, D)
        attend = flash_attention if self.config.attention == "flash" else manual_attention
        y = attend(q, k, v, context.mask, context.window)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), values


def causal_mask(T: int, S: int, device, window: int | None = None) -> Tensor:
    """(T, S), True where the query may look: the T queries are the last of S positions."""
    return sees(torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device), window)


def sees(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Positions → whether the query may look: not ahead, and no further back than the window; a negative position is none."""
    seen = (key <= query) & (key >= 0)
    return seen if window is None else seen & (query - key < window)


def block_mask(T: int, window: int | None, documents: Tensor | None, device) -> BlockMask:
    """For FlexAttention, which skips the blocks in which nothing is seen (Dong et al., 2024)."""

    def seen(batch, head, query, key):
        near = sees(query, key, window)
        return near if documents is None else near & (documents[batch, query] == documents[batch, key])

    return create_block_mask(seen, None if documents is None else len(documents), None, T, T, device=device)


def manual_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v with the future left out, or what the mask hides. q: (B, H, T, D); k, v: (B, H, S, D), S = T
    without a mask."""
    T, D = q.size(2), q.size(3)
    scores = q @ k.transpose(2, 3) / D**0.5  # (B, H, T, S)
    visible = causal_mask(T, T, q.device, window) if mask is None else mask
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = F.softmax(scores, dim=-1)
    return weights @ v


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """The same without storing the (T, S) scores (Dao et al., 2022), in one fused kernel where that is the fastest."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    if q.device.type == "cpu" and torch.compiler.is_compiling():
        if mask is None:
            return BlockwiseAttention.apply(q, k, v, window)
        if q.size(2) == 1:  # too little work for the kernel
            return manual_attention(q, k, v, mask)
    if window is not None and mask is None:
        mask = causal_mask(q.size(2), q.size(2), q.device, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def rotation_of(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Positions (…, T) → cosines and sines (…, T, D/2) of the angles that rope turns them by: pair i of a head's channels by
    position · base^(-2i/D) (Su et al., 2021, equation 15). Scaled, for sequences s times as long as in training: 'linear'
    divides all angles by s, 'ntk' makes the base larger, 'yarn' divides the angles of the slow pairs and leaves the fast."""
    D, base, s = config.n_embd // config.n_head, config.rope_base, config.rope_factor
    pair = torch.arange(D // 2, device=positions.device)
    if config.rope_scaling == "ntk":
        base = base * s ** (D / max(1, D - 2))
    speed = base ** (-2 * pair / D)  # radians a position
    scale = 1.0
    if config.rope_scaling == "linear":
        speed = speed / s
    if config.rope_scaling == "yarn":  # Peng et al., 2023, equations 17 to 23: pairs that turn 32 times and more stay
        trained = config.seq_len / s
        fast, slow = (D * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
        fast, slow = max(math.floor(fast), 0), min(math.ceil(slow), D - 1)
        divided = ((pair - fast) / max(slow - fast, 0.001)).clamp(0, 1)  # 0: left as it is, 1: divided by s
        speed = speed * (1 - divided) + speed / s * divided
        scale = 0.1 * math.log(s) + 1  # longer sequences spread the attention: sharper
    angles = positions[..., None] * speed
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, T, D), channels i and i + D/2 being a pair."""
    cos, sin = (y[..., None, :, :].type_as(x) for y in (cos, sin))  # (…, 1, T, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class MLP(nn.Module):
    """Four times as wide inside, with the tanh form of GELU that GPT-2 was trained with."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.n_fc, config.bias)
        self.c_proj = Linear(config.n_inner, config.n_embd, config.bias)
        self.activation = ACTIVATIONS[config.mlp]

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return self.c_proj(self.activation(self.c_fc(x))), 0.0


def gelu(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh u), u = √(2/π) (x + 0.044715 x³) (Hendrycks & Gimpel, 2016)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # the same as x · σ(2u); on a CPU torch.compile makes loops of it that take half the time, since exp is easier than tanh
    return x * torch.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3))


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """(…, 2 n) → (…, n): the first half, through SiLU, is the gate of the second."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS = {"gelu": gelu, "gelu_exact": F.gelu, "relu2": relu2, "swiglu": swiglu}


class MixtureOfExperts(nn.Module):
    """Several MLPs, of which a token goes through those that a router gives the highest probability, weighted by it (Shazeer et
    al., 2017; Jiang et al., 2024). No token is dropped, however many choose the same expert. The experts have no biases."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_active = config.n_expert_active
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.c_fc = nn.ParameterList(torch.empty(config.n_fc, config.n_embd) for _ in range(config.n_expert))
        self.c_proj = nn.ParameterList(torch.empty(config.n_embd, config.n_inner) for _ in range(config.n_expert))
        self.activation, self.by_expert = ACTIVATIONS[config.mlp], by_expert

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, T, C) → the same, and the load-balancing loss: n_expert · Σ (share of the tokens · mean probability), 1
        where both are equal for all experts (Fedus et al., 2021, equation 4)."""
        tokens = x.flatten(0, 1)  # (N, C)
        probs = self.router(tokens).float().softmax(-1)  # (N, experts)
        weights, chosen = probs.topk(self.n_active)  # (N, active)
        if self.n_active > 1:  # of one alone the probability is what the router learns by
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # tokens in the order of their experts, each as often as it chose
        counts = chosen.flatten().bincount(minlength=probs.size(1))
        rows = order // self.n_active
        y = self.by_expert(self.activation(self.by_expert(tokens[rows], self.c_fc, counts)), self.c_proj, counts)
        y = y * weights.flatten()[order, None].type_as(y)
        out = torch.zeros_like(tokens, dtype=y.dtype).index_add(0, rows, y)
        balance = probs.size(1) * (counts / len(order) * probs.mean(0)).sum()
        return out.view_as(x), balance


def by_expert(x: Tensor, weights: nn.ParameterList, counts: Tensor) -> Tensor:
    """The first counts[0] rows of x (N, in) times the first weight (out, in), the next counts[1] times the second, …: (N, out)."""
    parts = zip(x.split(counts.tolist()), weights, strict=True)
    # rows of zeros up to a multiple of 64: for each new shape a CPU's library makes code, and keeps it
    return torch.cat([(F.pad(part, (0, 0, 0, -len(part) % 64)) @ weight.t())[: len(part)] for part, weight in parts])


# ---- what a field of GPTConfig may be ----


def fits(value, kind) -> bool:
    """Whether a value, perhaps from a file, is of a field's type; whole numbers are counts, of at least 1."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float if kind is float else kind) and not (isinstance(value, int) and kind is not float and value < 1)


def needs(kind) -> str:
    if get_origin(kind) is Literal:
        return f"choose {' or '.join(get_args(kind))}"
    return f"it must be {'a whole number of at least 1' if kind in (int, int | None) else f'a {kind.__name__}'}"


RULES = (  # with the fields that each speaks of
    ("n_embd {n_embd} is not a multiple of n_head {n_head}: change one of them", lambda c: c.n_embd % c.n_head == 0),
    ("n_head {n_head} is not a multiple of n_kv_head {n_kv_head}: change one of them", lambda c: c.n_head % c.kv_heads == 0),
    ("n_layer {n_layer} is not a multiple of share_layers {share_layers}: change one of them", lambda c: c.n_layer % c.share_layers == 0),
    ("n_expert_active {n_expert_active} is more than n_expert {n_expert}: lower it", lambda c: c.n_expert_active <= c.n_expert),
    ("n_expert is {n_expert}: it must be at most 1024", lambda c: c.n_expert <= 1024),
    ("n_layer is {n_layer}: it must be at most 1000", lambda c: c.n_layer <= 1000),
    ("n_embd is {n_embd}: it must be at most 10^6", lambda c: c.n_embd <= 10**6),
    (
        "window_pattern is {window_pattern!r}: it must be letters S and L",
        lambda c: c.window_pattern and not set(c.window_pattern) - set("SL"),
    ),
    ("window_pattern {window_pattern} is for a window, which is {window}: give one", lambda c: c.window or c.window_pattern == "S"),
    (
        "pos {pos} turns pairs of channels: n_embd {n_embd} / n_head {n_head} must be even",
        lambda c: c.pos != "rope" or c.n_embd // c.n_head % 2 == 0,
    ),
    ("rope_base {rope_base} is for pos rope, not for {pos}", lambda c: c.pos == "rope" or c.rope_base == 10000),
    ("rope_scaling {rope_scaling} is for pos rope, not for {pos}", lambda c: c.pos == "rope" or c.rope_scaling == "none"),
    (
        "rope_scaling {rope_scaling} with rope_factor {rope_factor}: give both or none",
        lambda c: (c.rope_scaling == "none") == (c.rope_factor == 1),
    ),
    ("rope_base is {rope_base}: it must be from 2 to 10^12", lambda c: 2 <= c.rope_base <= 10**12),
    ("rope_factor is {rope_factor}: it must be from 1 to 10^6", lambda c: 1 <= c.rope_factor <= 10**6),
    ("load_balance is {load_balance}: it must be from 0 to 10^6", lambda c: 0 <= c.load_balance <= 10**6),
)
