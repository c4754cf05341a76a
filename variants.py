"""What came after GPT-2: switches, each beside its rule, and the model that has them. build(config) is what the scripts call.

With no switch on, build returns model.py's GPT. Letters in the shapes as in model.py; K of the H heads have keys and values.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from common.validation import raise_errors, rule
from formats import huggingface
from model import GPT, MLP, Block, CausalSelfAttention, GPTConfig, cross_entropy, gelu, manual_attention
from ops import attention, linear, loss
from ops.kv_cache import KVCache, next_positions


@dataclass
class VariantConfig(GPTConfig):
    """GPT-2's shape and the switches for what came after it."""

    rules = (
        *GPTConfig.rules,
        *rule("n_layer is {n_layer}: it must be at most 1000", lambda c: c.n_layer <= 1000),
        *rule("n_embd is {n_embd}: it must be at most 10^6", lambda c: c.n_embd <= 10**6),
    )

    pos: Literal["learned", "rope"] = "learned"
    """Positions: a learned table, or rotary embeddings (Su et al., 2021)."""
    rules += rule(
        "pos {pos} turns pairs of channels: n_embd {n_embd} / n_head {n_head} must be even",
        lambda c: c.pos != "rope" or c.n_embd // c.n_head % 2 == 0,
    )
    rope_base: float = 10000.0
    """Rotary embeddings: the longest wave is about 2π times as many positions."""
    rules += rule("rope_base {rope_base} is for pos rope, not for {pos}", lambda c: c.pos == "rope" or c.rope_base == 10000)
    rules += rule("rope_base is {rope_base}: it must be from 2 to 10^12", lambda c: 2 <= c.rope_base <= 10**12)
    rope_scaling: Literal["none", "linear", "ntk", "yarn"] = "none"
    """For sequences --rope-factor times as long as in training (Chen et al., 2023; bloc97, 2023; Peng et al., 2023)."""
    rules += rule("rope_scaling {rope_scaling} is for pos rope, not for {pos}", lambda c: c.pos == "rope" or c.rope_scaling == "none")
    rope_factor: float = 1.0
    """seq_len as a multiple of the length that the model was trained on."""
    rules += rule(
        "rope_scaling {rope_scaling} with rope_factor {rope_factor}: give both or none",
        lambda c: (c.rope_scaling == "none") == (c.rope_factor == 1),
    )
    rules += rule("rope_factor is {rope_factor}: it must be from 1 to 10^6", lambda c: 1 <= c.rope_factor <= 10**6)
    n_kv_head: int | None = None
    """Heads with keys and values, each for n_head / n_kv_head queries (Ainslie et al., 2023); by default all."""
    rules += rule("n_head {n_head} is not a multiple of n_kv_head {n_kv_head}: change one of them", lambda c: c.n_head % c.kv_heads == 0)
    window: int | None = None
    """Positions a query sees, its own included (Beltagy et al., 2020); by default all before it."""
    window_pattern: str = "S"
    """Which layers the window is for, repeated over all: S for short, L for long, without it. SSSL: three of four."""
    rules += rule(
        "window_pattern is {window_pattern!r}: it must be letters S and L",
        lambda c: c.window_pattern and not set(c.window_pattern) - set("SL"),
    )
    rules += rule(
        "window_pattern {window_pattern} is for a window, which is {window}: give one", lambda c: c.window or c.window_pattern == "S"
    )
    doc_mask: bool = False
    """A query sees its own document only, which begins at the last <|endoftext|>."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys (Henry et al., 2020)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Before attention, MLP and head (Ba et al., 2016; Zhang & Sennrich, 2019)."""
    mlp: Literal["gelu", "gelu_exact", "relu2", "swiglu"] = "gelu"
    """The MLP's activation (Hendrycks & Gimpel, 2016; So et al., 2021; Shazeer, 2020), at equal parameters. gelu_exact: nanoGPT's."""
    bias: bool = True
    """Biases in linear layers and norms."""
    tied_head: bool = True
    """The head is the embedding table (Press & Wolf, 2017)."""
    value_residual: bool = False
    """Mix a layer's values with the first layer's (Zhou et al., 2024)."""
    share_layers: int = 1
    """Consecutive layers that share weights (Lan et al., 2019); must divide n_layer."""
    rules += rule(
        "n_layer {n_layer} is not a multiple of share_layers {share_layers}: change one of them",
        lambda c: c.n_layer % c.share_layers == 0,
    )
    n_expert: int = 1
    """MLPs per block; a router chooses among them for each token (Shazeer et al., 2017)."""
    rules += rule("n_expert is {n_expert}: it must be at most 1024", lambda c: c.n_expert <= 1024)
    n_expert_active: int = 1
    """How many it chooses; together they are as wide as one MLP without a choice."""
    rules += rule("n_expert_active {n_expert_active} is more than n_expert {n_expert}: lower it", lambda c: c.n_expert_active <= c.n_expert)
    load_balance: float = 0.01
    """Weight of the loss that keeps the experts equally busy (Fedus et al., 2021)."""
    rules += rule("load_balance is {load_balance}: it must be from 0 to 10^6", lambda c: 0 <= c.load_balance <= 10**6)

    def switches_on(self) -> list[str]:
        """The switches that differ from GPT-2."""
        return [f.name for f in SWITCHES if getattr(self, f.name) != f.default]

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer, None where a query sees everything before it."""
        return attention.layer_windows(self.window, self.window_pattern, self.n_layer, self.seq_len)

    @property
    def n_inner(self) -> int:
        """Channels inside an MLP or an active expert: in all as many weights as 4 · n_embd have without a gate."""
        inner = -(-self.n_embd // 3) * 8 if self.mlp == "swiglu" else 4 * self.n_embd
        return -(-inner // self.n_expert_active)

    @property
    def n_fc(self) -> int:
        """Channels out of an MLP's first product: a gate doubles them."""
        return (2 if self.mlp == "swiglu" else 1) * self.n_inner


GPT2_FIELDS = {f.name for f in fields(GPTConfig)}
SWITCHES = [f for f in fields(VariantConfig) if f.name not in GPT2_FIELDS]

# fields that may change while the weights stay
NOT_IN_WEIGHTS = {
    "seq_len", "attention", "rope_base", "rope_scaling", "rope_factor", "window", "window_pattern", "doc_mask", "load_balance",
}  # fmt: skip


# ---- building ----


def build(config: GPTConfig) -> GPT:
    """A model with new weights: GPT-2 if no switch is on, else a VariantGPT. With the fast parts. ValueError if the config is wrong."""
    config = with_switches(config)
    model = VariantGPT(config) if config.switches_on() else GPT(config)
    use_fast_parts(model)
    return model


def with_switches(config: GPTConfig) -> VariantConfig:
    """The same shape as a VariantConfig."""
    return config if isinstance(config, VariantConfig) else VariantConfig(**asdict(config))


def build_on_meta(config: GPTConfig) -> GPT:
    """A model without memory or values: to count with, or to receive another model's weights."""
    with torch.device("meta"):
        return build(config)


def use_fast_parts(model: GPT):
    """Replaces parts of a model by equivalents from ops/. Each chooses its code by device, and whether it is being compiled."""
    set_attention(model)
    model.loss = loss.in_chunks(cross_entropy)
    for block in model.transformer.h:
        if block.mlp.activation is gelu:
            block.mlp.activation = linear.gelu
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = linear.RowLinear


def set_attention(model: GPT):
    """Gives every block the attention that config.attention names."""
    manual = windowed_attention if isinstance(model, VariantGPT) else manual_attention
    for block in model.transformer.h:
        block.attn.attend = attention.fused_attention if model.config.attention == "flash" else manual


@torch.no_grad()
def scoring_copy(model: GPT) -> GPT:
    """A copy for hidden_states() and logits() without gradients, faster on a CPU. Elsewhere, without oneDNN or in fp16: the model itself.

    Its products are in autocast's current dtype, else the weights'. Make a new copy after an optimizer step: weights in another
    dtype are those of the moment it was made.
    """
    weight = model.lm_head.weight
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    if weight.device.type != "cpu" or not linear.OneDNNLinear.is_available(dtype):
        return model
    copy = build_on_meta(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)  # the same tensors
    for block in copy.transformer.h:
        block.attn.c_attn = linear.OneDNNLinear(block.attn.c_attn, dtype)
        block.attn.c_proj = linear.OneDNNLinear(block.attn.c_proj, dtype)
        if isinstance(block.mlp, MLP):
            is_gelu = block.mlp.activation is linear.gelu
            block.mlp.c_fc = linear.OneDNNLinear(block.mlp.c_fc, dtype, is_gelu)
            block.mlp.c_proj = linear.OneDNNLinear(block.mlp.c_proj, dtype)
            block.mlp.activation = nn.Identity() if is_gelu else block.mlp.activation
    copy.lm_head = linear.OneDNNLinear(copy.lm_head, dtype)
    return copy.eval()


def from_pretrained(name_or_dir: str, revision: str | None = None) -> GPT:
    """GPT.from_pretrained, for a GPT-2 folder of any variant."""
    folder, shape, state = huggingface.load(name_or_dir, revision)
    config = VariantConfig(**shape)
    raise_errors([f"{folder / 'config.json'}: {'; '.join(errors)}"] if (errors := config.errors()) else [])
    model = build(config)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def adapt(model: GPT, config: GPTConfig):
    """Takes over the fields that don't change the weights, for fine-tuning. Cuts a learned position table to the new seq_len.
    ValueError if the table is too short, or if rope is scaled by another factor than seq_len is."""
    ours = model.config = with_switches(model.config)
    config = with_switches(config)
    if config.pos == "learned" and config.seq_len > ours.seq_len:
        raise ValueError(f"seq_len {config.seq_len} is longer than the {ours.seq_len} positions the model has: lower it")
    trained, longer = ours.seq_len / ours.rope_factor, config.seq_len / config.rope_factor
    if config.rope_scaling != "none" and longer != trained:
        why = f"rope_factor {config.rope_factor:g} is for sequences of {trained * config.rope_factor:g}, not of {config.seq_len}"
        raise ValueError(f"{why}, since the model was trained on {trained:g}: change seq_len or the factor")
    for name in NOT_IN_WEIGHTS:
        setattr(ours, name, getattr(config, name))
    set_attention(model)
    if config.pos == "learned":
        model.transformer.wpe.weight = nn.Parameter(model.transformer.wpe.weight[: config.seq_len].clone())
        model.transformer.wpe.num_embeddings = config.seq_len


# ---- counting ----


def idle_params(model: GPT) -> int:
    """Parameters of the experts that are not chosen for a token."""
    config = with_switches(model.config)
    if config.n_expert == 1:
        return 0
    experts = sum(p.numel() for block in model.transformer.h for name, p in block.mlp.named_parameters() if "router" not in name)
    return experts * (config.n_expert - config.n_expert_active) // config.n_expert


def flops_per_token(model: GPT) -> int:
    """Floating point operations per token in training, forward and backward: 6 N + 12 C · positions seen, summed over the layers
    (Chowdhery et al., 2022, appendix B). N counts active weights as often as they are used, and leaves out position tables and an
    embedding that is not also the head. Causality is not discounted."""
    config = with_switches(model.config)
    blocks = sum(p.numel() for p in model.transformer.h.parameters()) - idle_params(model)
    n = config.share_layers * blocks + model.lm_head.weight.numel() + sum(p.numel() for p in model.transformer.ln_f.parameters())
    return 6 * n + 12 * config.n_embd * sum(window or config.seq_len for window in config.windows)


# ---- the model ----


class VariantGPT(GPT):
    """GPT with any of the switches."""

    def __init__(self, config: VariantConfig):
        nn.Module.__init__(self)
        raise_errors(config.errors())
        self.config = config
        parts = {"wte": nn.Embedding(config.padded_vocab_size, config.n_embd)}
        if config.pos == "learned":
            parts["wpe"] = nn.Embedding(config.seq_len, config.n_embd)
        parts["h"] = nn.ModuleList(VariantBlock(config) for _ in range(config.n_layer // config.share_layers))
        parts["ln_f"] = make_norm(config)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.transformer.wte.weight
        if config.value_residual:
            self.value_scale = nn.Parameter(torch.full((config.n_layer,), 0.5))
        set_attention(self)
        self.loss = cross_entropy
        self.flex = False  # whether windows and documents go through FlexAttention
        self.register_load_state_dict_pre_hook(huggingface.pad_tables)
        self.init_weights()

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None):
        """As GPT.forward. With experts the gradient includes their load-balancing loss; the number doesn't, so that losses compare."""
        x, balance = self.hidden_states_and_balance(idx, cache)  # (B, T, C)
        if targets is None:
            return self.logits(x), None
        text_loss = self.loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.vocab_size)
        if self.config.n_expert == 1:
            return None, text_loss
        return None, text_loss + self.config.load_balance * (balance - balance.detach())

    def hidden_states(self, idx: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, mask: Tensor | None = None):
        return self.hidden_states_and_balance(idx, cache, positions, mask)[0]

    def hidden_states_and_balance(self, idx: Tensor, cache: KVCache | None = None, positions=None, mask=None):
        """GPT.hidden_states, and the load-balancing loss of all experts."""
        config = self.config
        if positions is None:
            positions = next_positions(idx, cache, config.seq_len)
        masks = self.masks(idx, cache, positions, mask)
        rotation = rotation_of(positions, config) if config.pos == "rope" else None
        x = self.transformer.wte(idx)
        if config.pos == "learned":
            x = x + self.transformer.wpe(positions)
        first_values, balance = None, 0.0
        for layer, window in enumerate(config.windows):
            context = Context(
                window=window,
                mask=masks[window],
                rotation=rotation,
                cache=None if cache is None else cache.layer(layer, positions, window),
                values=(first_values, self.value_scale[layer]) if config.value_residual else None,
            )
            x, values, more = self.transformer.h[layer // config.share_layers](x, context)
            first_values = values if layer == 0 else first_values
            balance = balance + more
        return self.transformer.ln_f(x), balance

    def masks(self, idx: Tensor, cache: KVCache | None, positions: Tensor, mask: Tensor | None) -> dict:
        """Window → what its queries may see: (…, T, S), True for it; None: everything before them in the window."""
        config, masks, documents = self.config, {}, None
        flex = self.flex and config.attention == "flash"
        if config.doc_mask and mask is None:
            starts = idx == config.vocab_size - 1  # <|endoftext|> is the last id in every tokenizer of this project
            documents = starts.cumsum(1) if cache is None else cache.documents(starts, positions)  # (B, T), (B, max_len)
        for window in set(config.windows):
            if cache is None and mask is None and (documents is None or flex):
                is_partial = window is not None or documents is not None
                masks[window] = attention.block_mask(idx.size(1), window, documents, idx.device) if flex and is_partial else None
                continue
            keys = positions if cache is None else cache.positions(positions, window)
            seen = attention.sees(positions[..., :, None], keys[..., None, :], window)  # (T, S) or (B, T, S)
            seen = seen if seen.dim() == 2 else seen[:, None]
            seen = seen if mask is None else seen & mask
            if documents is not None:
                of_keys = documents if cache is None else documents[:, keys.clamp(min=0)]
                of_queries = documents if cache is None else documents[:, positions]
                seen = seen & (of_queries[:, None, :, None] == of_keys[:, None, None, :])
            masks[window] = seen
        return masks

    def num_params(self) -> int:
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return super().num_params() - (0 if self.config.tied_head else padding)


class Context(NamedTuple):
    """What a layer needs besides its input."""

    window: int | None  # how far a query sees, where there is no mask
    mask: Tensor | BlockMask | None  # (…, T, S), True where a query may look
    rotation: tuple[Tensor, Tensor] | None  # cosines and sines for rope, (…, T, D/2) each
    cache: object | None  # stores new keys and values, returns all
    values: tuple[Tensor | None, Tensor] | None  # the first layer's (B, K, T, D), and how much of them this one takes


class VariantBlock(Block):
    def __init__(self, config: VariantConfig):
        nn.Module.__init__(self)
        self.ln_1 = make_norm(config)
        self.attn = VariantAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = VariantMLP(config) if config.n_expert == 1 else MixtureOfExperts(config)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """x: (B, T, C) → the same, the layer's values if later layers want them, and its load-balancing loss."""
        y, values = self.attn(self.ln_1(x), context)
        x = x + y
        y = self.mlp(self.ln_2(x))
        y, balance = y if isinstance(y, tuple) else (y, 0.0)
        return x + y, values, balance


def make_norm(config: VariantConfig) -> nn.Module:
    return RMSNorm(config.n_embd) if config.norm == "rmsnorm" else nn.LayerNorm(config.n_embd, bias=config.bias)


class RMSNorm(nn.Module):
    """x / √(mean of x² + ε) · weight (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-5).type_as(x)


class VariantAttention(CausalSelfAttention):
    def __init__(self, config: VariantConfig):
        nn.Module.__init__(self)
        self.config = config
        self.head_size = config.n_embd // config.n_head
        self.kv_size = config.kv_heads * self.head_size
        self.c_attn = nn.Linear(config.n_embd, config.n_embd + 2 * self.kv_size, config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_size), RMSNorm(self.head_size)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """x: (B, T, C) → the same, and the values (B, K, T, D) if later layers want them."""
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
            k, v = context.cache(k, v)  # (B, K, S, D)
        if k.size(1) < q.size(1):
            k, v = (y.repeat_interleave(q.size(1) // k.size(1), dim=1) for y in (k, v))  # (B, H, S, D)
        y = self.attend(q, k, v, context.mask, context.window)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), values


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """manual_attention that sees no further back than the window."""
    if mask is None and window is not None:
        mask = attention.causal_mask(q.size(2), q.size(2), q.device, window)
    return manual_attention(q, k, v, mask)


def rotation_of(positions: Tensor, config: VariantConfig) -> tuple[Tensor, Tensor]:
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


class VariantMLP(MLP):
    def __init__(self, config: VariantConfig):
        nn.Module.__init__(self)
        self.c_fc = nn.Linear(config.n_embd, config.n_fc, config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, config.bias)
        self.activation = ACTIVATIONS[config.mlp]


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

    def __init__(self, config: VariantConfig):
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
