"""Everything after GPT-2: a config with switches, each next to its rule, and the model that they change. Scripts call build(config).

With no switch on, build returns model.py's GPT. Letters in the shapes as in model.py; K of the H heads have keys and values.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from common.device import pick_dtype
from common.validation import raise_errors, rule
from formats import huggingface
from model import GPT, MLP, Block, CausalSelfAttention, GPTConfig, cross_entropy, gelu, manual_attention
from ops import attention, embedding, experts, linear, loss
from ops.kv_cache import KVCache, next_positions
from ops.short_conv import Past, ShortConv, parents_of


@dataclass
class VariantConfig(GPTConfig):
    """GPT-2's shape, and one switch for each later idea. By default all are off."""

    rules = (
        *GPTConfig.rules,
        *rule("n_layer is {n_layer}: it must be at most 1000", lambda c: c.n_layer <= 1000),
        *rule("n_embd is {n_embd}: it must be at most 10^6", lambda c: c.n_embd <= 10**6),
        *rule("vocab_size is {vocab_size}: it must be at most 10^9", lambda c: c.vocab_size <= 10**9),
        *rule("seq_len is {seq_len}: it must be at most 10^9", lambda c: c.seq_len <= 10**9),
    )

    pos: Literal["learned", "rope"] = "learned"
    """How the model knows positions: a learned table, or rotary embeddings (Su et al., 2021)."""
    rules += rule(
        "pos {pos} rotates pairs of channels: n_embd {n_embd} / n_head {n_head} must be even",
        lambda c: c.pos != "rope" or c.n_embd // c.n_head % 2 == 0,
    )
    rope_base: float = 10000.0
    """Base of the rotary wavelengths: the longest is about 2π · rope_base positions."""
    rules += rule("rope_base {rope_base} needs pos rope, not {pos}: set pos to rope", lambda c: c.pos == "rope" or c.rope_base == 10000)
    rules += rule("rope_base is {rope_base}: it must be from 2 to 10^12", lambda c: 2 <= c.rope_base <= 10**12)
    rope_scaling: Literal["none", "linear", "ntk", "yarn"] = "none"
    """Scale rotary embeddings to sequences longer than in training (Chen et al., 2023; bloc97, 2023; Peng et al., 2023)."""
    rules += rule(
        "rope_scaling {rope_scaling} needs pos rope, not {pos}: set pos to rope", lambda c: c.pos == "rope" or c.rope_scaling == "none"
    )
    rope_factor: float = 1.0
    """seq_len divided by the sequence length in training."""
    rules += rule(
        "rope_scaling {rope_scaling} with rope_factor {rope_factor}: set both or neither",
        lambda c: (c.rope_scaling == "none") == (c.rope_factor == 1),
    )
    rules += rule("rope_factor is {rope_factor}: it must be from 1 to 10^6", lambda c: 1 <= c.rope_factor <= 10**6)
    n_kv_head: int | None = None
    """Key-value heads; each serves n_head / n_kv_head query heads (Ainslie et al., 2023). Default: n_head."""
    rules += rule("n_head {n_head} is not a multiple of n_kv_head {n_kv_head}: change one of them", lambda c: c.n_head % c.kv_heads == 0)
    window: int | None = None
    """Positions a query sees, including its own (Beltagy et al., 2020). Default: all before it."""
    window_pattern: str = "S"
    """S: a layer with the window, L: a layer without. Repeats over the layers: SSSL gives three of four the window."""
    rules += rule(
        "window_pattern is {window_pattern!r}: use the letters S and L",
        lambda c: c.window_pattern and not set(c.window_pattern) - set("SL"),
    )
    rules += rule(
        "window_pattern {window_pattern} needs a window, which is {window}: set window", lambda c: c.window or c.window_pattern == "S"
    )
    doc_mask: bool = False
    """A query sees only its own document. Each <|endoftext|> begins a document."""
    qk_norm: bool = False
    """Apply RMSNorm to each head's queries and keys (Henry et al., 2020)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """The norm before attention, MLP and head (Ba et al., 2016; Zhang & Sennrich, 2019)."""
    mlp: Literal["gelu", "gelu_exact", "relu2", "swiglu"] = "gelu"
    """MLP activation, at about equal parameters (Hendrycks & Gimpel, 2016; So et al., 2021; Shazeer, 2020). gelu_exact: nanoGPT's."""
    bias: bool = True
    """Linear layers and norms have biases."""
    tied_head: bool = True
    """The head uses the embedding table as its weights (Press & Wolf, 2017)."""
    value_residual: bool = False
    """Mix each layer's values with the first layer's (Zhou et al., 2024)."""
    short_conv: int | None = None
    """Width of a causal convolution over the queries, keys and values, and over the MLP's input (So et al., 2021; Allen-Zhu, 2025)."""
    rules += rule("short_conv is {short_conv}: it must be from 2 to 64", lambda c: c.short_conv is None or 2 <= c.short_conv <= 64)
    key_offset: bool = False
    """Keys take their slowly rotating half of the channels from the position before, so that one layer can find what followed a token
    earlier (modded-nanogpt, 2025)."""
    rules += rule(
        "key_offset needs pos rope, not {pos}, and n_embd {n_embd} / n_head {n_head} a multiple of 4: change them or turn key_offset off",
        lambda c: not c.key_offset or (c.pos == "rope" and c.n_embd // c.n_head % 4 == 0),
    )
    head_gate: bool = False
    """Multiply each head's output by a gate from 0 to 2, which depends on 12 channels of the layer's input (Qiu et al., 2025;
    modded-nanogpt, 2025)."""
    mimetic_init: bool = False
    """Keys begin with the queries' weights, so that tokens first look for their like (after Trockman & Kolter, 2023)."""
    rules += rule("mimetic_init needs qk_norm: turn it on", lambda c: c.qk_norm or not c.mimetic_init)
    bigram: int | None = None
    """Rows of a table of token pairs; each layer adds a pair's row to its input (Svenstrup et al., 2017). vocab_size · (vocab_size + 1)
    rows hold every pair. With fewer, some pairs share a row."""
    rules += rule("bigram is {bigram}: it must be at most 10^9", lambda c: c.bigram is None or c.bigram <= 10**9)
    dropout: float = 0.0
    """In training, zero this share of the embeddings and of each layer's outputs, and scale up the rest (Srivastava et al., 2014)."""
    rules += rule("dropout is {dropout}: it must be at least 0 and below 1", lambda c: 0 <= c.dropout < 1)
    share_layers: int = 1
    """Consecutive layers that share weights (Lan et al., 2019); must divide n_layer. 1: none."""
    rules += rule(
        "n_layer {n_layer} is not a multiple of share_layers {share_layers}: change one of them",
        lambda c: c.n_layer % c.share_layers == 0,
    )
    n_expert: int = 1
    """MLPs per block; a router picks some for each token (Shazeer et al., 2017). 1: no router."""
    rules += rule("n_expert is {n_expert}: it must be at most 1024", lambda c: c.n_expert <= 1024)
    n_expert_active: int = 1
    """MLPs the router picks for a token. Together they are as wide as the MLP of a block without experts."""
    rules += rule("n_expert_active {n_expert_active} is more than n_expert {n_expert}: lower it", lambda c: c.n_expert_active <= c.n_expert)
    load_balance: float = 0.01
    """Weight of the loss that keeps the experts equally busy (Fedus et al., 2021). 0: off."""
    rules += rule("load_balance is {load_balance}: it must be from 0 to 10^6", lambda c: 0 <= c.load_balance <= 10**6)

    def switches_on(self) -> list[str]:
        """The switches that differ from GPT-2."""
        return [f.name for f in SWITCHES if getattr(self, f.name) != f.default]

    @property
    def beyond_gpt2(self) -> list[str]:
        """One error for each switch that is on: model.py's GPT would ignore it."""
        return [f"{name} {getattr(self, name)!r} is not in GPT-2: use variants.build(config)" for name in self.switches_on()]

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def needs_past(self) -> bool:
        """Whether a layer reads inputs of earlier positions, outside of attention."""
        return bool(self.short_conv or self.key_offset or self.bigram)

    @property
    def windows(self) -> list[int | None]:
        """Each layer's window, None for a layer without one."""
        return attention.layer_windows(self.window, self.window_pattern, self.n_layer, self.seq_len)

    @property
    def n_inner(self) -> int:
        """Width of an MLP, or of one active expert. The active ones together have about as many weights as GPT-2's MLP."""
        inner = -(-self.n_embd // 3) * 8 if self.mlp == "swiglu" else 4 * self.n_embd
        return -(-inner // self.n_expert_active)

    @property
    def n_fc(self) -> int:
        """Outputs of an MLP's first layer. A gate doubles them."""
        return (2 if self.mlp == "swiglu" else 1) * self.n_inner


GPT2_FIELDS = {f.name for f in fields(GPTConfig)}
SWITCHES = [f for f in fields(VariantConfig) if f.name not in GPT2_FIELDS]

# adapt() changes these: no weight depends on them, except that seq_len cuts the table of learned positions
NOT_IN_WEIGHTS = {
    "seq_len", "attention", "rope_base", "rope_scaling", "rope_factor", "window", "window_pattern", "doc_mask", "dropout",
    "load_balance",
}  # fmt: skip


# ---- building ----


def build(config: GPTConfig) -> GPT:
    """Returns a model with new weights and the fast parts: GPT-2, or VariantGPT if a switch is on. ValueError if the config is wrong."""
    config = with_switches(config)
    model = VariantGPT(config) if config.switches_on() else GPT(config)
    use_fast_parts(model)
    return model


def with_switches(config: GPTConfig) -> VariantConfig:
    """Returns the same shape as a VariantConfig."""
    return config if isinstance(config, VariantConfig) else VariantConfig(**asdict(config))


def build_on_meta(config: GPTConfig) -> GPT:
    """Returns a model whose parameters have shapes but no memory: to count them, or to load other weights into it."""
    with torch.device("meta"):
        return build(config)


def use_fast_parts(model: GPT):
    """Replaces parts of a model with equivalents from ops/. They pick their code by device and by whether torch.compile runs."""
    set_attention(model)
    model.loss = loss.in_chunks(cross_entropy)
    for block in model.transformer.h:
        if block.mlp.activation is gelu:
            block.mlp.activation = linear.gelu
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = linear.RowLinear
        if type(module) is nn.Embedding:
            module.__class__ = embedding.StreamEmbedding


def set_attention(model: GPT):
    """Sets every block's attention to the one that config.attention names."""
    manual = windowed_attention if isinstance(model, VariantGPT) else manual_attention
    for block in model.transformer.h:
        block.attn.attend = attention.fused_attention if model.config.attention == "flash" else manual


@torch.no_grad()
def inference_copy(model: GPT, rows: int = 1024) -> GPT:
    """Returns a copy that computes hidden_states() and logits() faster on a CPU, without gradients. Returns the model itself if nothing
    is faster: on other devices, and in dtypes such as fp16. rows: B times the number of positions in a typical call.

    Its matrix products use autocast's current dtype, or else the weights'. Copy again after an optimizer step: a copy in another
    order or dtype keeps the old weights.
    """
    weight = model.lm_head.weight
    if weight.device.type != "cpu" or isinstance(model.lm_head, linear.Int8Linear):
        return model
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    way = linear.fastest_way(wide_layers(model), dtype, rows)
    if way is None:
        return model
    copy = build_on_meta(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)  # the same tensors
    for block in copy.transformer.h:
        block.attn.c_attn = linear.InferenceLinear(block.attn.c_attn, dtype, way)
        block.attn.c_proj = linear.InferenceLinear(block.attn.c_proj, dtype, way)
        if isinstance(block.mlp, MLP):
            is_gelu = block.mlp.activation is linear.gelu
            block.mlp.c_fc = linear.InferenceLinear(block.mlp.c_fc, dtype, way, is_gelu)
            block.mlp.c_proj = linear.InferenceLinear(block.mlp.c_proj, dtype, way)
            block.mlp.activation = nn.Identity() if is_gelu else block.mlp.activation
    copy.lm_head = linear.InferenceLinear(copy.lm_head, dtype, way)
    return copy.eval()


def wide_layers(model: GPT) -> list[nn.Linear]:
    """Returns the linear layers that stand for all in a trial of ways: each block's c_fc, or c_attn with experts."""
    return [block.mlp.c_fc if isinstance(block.mlp, MLP) else block.attn.c_attn for block in model.transformer.h]


def prepare_compiled_token(model: GPT):
    """Chooses how torch.compile computes the linear layers of a step that adds a token. Call it before compiling the step."""
    layers = [module for module in model.modules() if isinstance(module, linear.RowLinear | linear.Int8Linear)]
    if layers and model.lm_head.weight.device.type == "cpu":
        linear.choose_compiled_row(layers, wide_layers(model))


def set_precision(model: GPT, name: str):
    """Converts the weights in place. name: as in pick_dtype; 'int8' quantizes too."""
    model.to(pick_dtype(name, model.lm_head.weight.device))
    if name == "int8":
        quantize(model)


@torch.no_grad()
def quantize(model: GPT):
    """Gives the linear layers 8-bit weights, the head too, in place. Embedding tables, experts and routers stay as they are."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.Linear) and name != "router":
                setattr(parent, name, linear.Int8Linear(module))


def from_pretrained(name_or_dir: str, revision: str | None = None) -> GPT:
    """Loads a GPT-2 as GPT.from_pretrained does. Its config.json may turn on a switch, such as another activation."""
    folder = huggingface.hf_folder(name_or_dir, revision)
    config = hf_config(folder)
    state = huggingface.load_state(folder, vars(config))  # fails before a damaged config allocates a model
    model = build(config)
    model.load_state_dict(state)
    return model


def hf_config(folder: Path) -> VariantConfig:
    """Returns the config of the GPT-2 in a Hugging Face folder. ValueError if its config.json can't be read or is not valid."""
    config = VariantConfig(**huggingface.shape_from_hf(folder))
    raise_errors([f"{folder / 'config.json'}: {error}" for error in config.errors()])
    return config


@torch.no_grad()
def adapt(model: GPT, config: GPTConfig) -> GPT:
    """Returns a model for fine-tuning, with the same weights: takes the fields in NOT_IN_WEIGHTS from config, and cuts a learned position
    table to the new seq_len. ValueError if the table is too short, or if rope_factor does not fit the new seq_len."""
    ours, config = with_switches(model.config), with_switches(config)
    if config.pos == "learned" and config.seq_len > ours.seq_len:
        raise ValueError(f"seq_len {config.seq_len} is longer than the {ours.seq_len} positions of the model: lower it")
    trained, longer = ours.seq_len / ours.rope_factor, config.seq_len / config.rope_factor
    if config.rope_scaling != "none" and longer != trained:
        needed = f"rope_factor {config.rope_factor:g} needs seq_len {trained * config.rope_factor:g}, not {config.seq_len}"
        raise ValueError(f"{needed}, for a model trained on {trained:g}: change one of them")
    state = model.state_dict()
    if config.pos == "learned":
        state["transformer.wpe.weight"] = state["transformer.wpe.weight"][: config.seq_len].clone()
    adapted = build_on_meta(replace(ours, **{name: getattr(config, name) for name in NOT_IN_WEIGHTS}))
    adapted.load_state_dict(state, assign=True)  # the same tensors, without a copy
    if ours.tied_head:
        adapted.lm_head.weight = adapted.transformer.wte.weight
    return adapted


# ---- counting ----


def idle_params(model: GPT) -> int:
    """Counts the parameters of the experts that a token does not use."""
    config = with_switches(model.config)
    if config.n_expert == 1:
        return 0
    experts = sum(p.numel() for block in model.transformer.h for name, p in block.mlp.named_parameters() if "router" not in name)
    return experts * (config.n_expert - config.n_expert_active) // config.n_expert


def flops_per_token(model: GPT) -> int:
    """Counts the floating point operations per token in training, forward and backward: 6 N + 12 C · positions seen, summed over
    the layers (Chowdhery et al., 2022, appendix B).

    N is the number of active weights, each counted as often as it is used. It excludes the position table, and the embedding table
    if untied. Each query counts as if it saw its whole window, or all of seq_len.
    """
    config = with_switches(model.config)
    blocks = sum(p.numel() for p in model.transformer.h.parameters()) - idle_params(model)
    n = config.share_layers * blocks + model.lm_head.weight.numel() + sum(p.numel() for p in model.transformer.ln_f.parameters())
    return 6 * n + 12 * config.n_embd * sum(window or config.seq_len for window in config.windows)


# ---- the model ----


class VariantGPT(GPT):
    """GPT with any switches on."""

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
        if config.bigram:
            self.transformer["bigram"] = nn.Embedding(config.bigram, config.n_embd)
            self.bigram_scale = nn.Parameter(torch.full((config.n_layer,), 0.1))
        set_attention(self)
        self.loss = cross_entropy
        self.flex = False  # True: windows and documents use FlexAttention
        self.register_load_state_dict_pre_hook(huggingface.pad_tables)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        super().init_weights()
        for module in self.modules():
            if isinstance(module, ShortConv | HeadGate):
                module.weight.zero_()
        if self.config.bigram:
            self.transformer.bigram.weight.zero_()
        if self.config.mimetic_init:
            for block in self.transformer.h:
                block.attn.begin_alike()

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None):
        """Computes what GPT.forward does. With experts, the gradient includes the load-balancing loss, but the returned loss does not:
        it stays comparable with that of a model without experts."""
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
        """Returns what GPT.hidden_states does, and the load-balancing loss summed over the layers."""
        config = self.config
        if positions is None:
            positions = next_positions(idx, cache, config.seq_len)
        masks = self.masks(idx, cache, positions, mask)
        past = self.past(idx, cache, positions, mask) if config.needs_past else None
        rotation = rotation_of(positions, config) if config.pos == "rope" else None
        x = self.transformer.wte(idx)
        if config.pos == "learned":
            x = x + self.transformer.wpe(positions)
        x = dropped(x, self)
        pairs = None
        first_values, balance = None, 0.0
        for layer, window in enumerate(config.windows):
            if past is not None and cache is not None:
                past = past._replace(recall=partial(cache.recall, layer, positions))
            if config.bigram:
                pairs = self.pair_rows(idx, past) if layer == 0 else pairs
                x = x + self.bigram_scale[layer].type_as(x) * pairs
            context = Context(
                window=window,
                mask=masks[window],
                rotation=rotation,
                cache=None if cache is None else cache.layer(layer, positions, window),
                past=past,
                values=(first_values, self.value_scale[layer]) if config.value_residual else None,
            )
            x, values, layer_balance = self.transformer.h[layer // config.share_layers](x, context)
            first_values = values if layer == 0 else first_values
            balance = balance + layer_balance
        return self.transformer.ln_f(x), balance

    def masks(self, idx: Tensor, cache: KVCache | None, positions: Tensor, mask: Tensor | None) -> dict:
        """Returns a mask for each window: (…, T, S), True where a query may look, or a BlockMask. None: everything before it that
        the window holds."""
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

    def past(self, idx: Tensor, cache: KVCache | None, positions: Tensor, mask: Tensor | None) -> Past:
        """Says where the inputs of earlier positions are, for hidden_states' arguments."""
        if mask is not None:
            return Past(parents_of(positions, mask))
        if not self.config.doc_mask:
            return Past()
        starts = idx == self.config.vocab_size - 1
        if cache is None:
            rows = torch.arange(idx.size(1), device=idx.device)
            return Past(age=rows - torch.where(starts, rows, 0).cummax(1).values)
        of = cache.document_of  # masks() has just updated it
        return Past(age=sum((of[:, positions] == of[:, (positions - i).clamp(min=0)]).int() for i in range(1, self.config.short_conv or 2)))

    def pair_rows(self, idx: Tensor, past: Past) -> Tensor:
        """Returns the table's row for each id and the one before it: (B, T) → (B, T, C)."""
        before = past.lags(idx[..., None] + 1, 2, "ids")[1][..., 0]  # 0: none
        pairs = idx * (self.config.vocab_size + 1) + before
        if self.config.bigram < self.config.vocab_size * (self.config.vocab_size + 1):
            pairs = pairs * 2654435769 & 0xFFFFFFFF  # multiplicative hashing (Knuth, 1973, 6.4); the high bits are well mixed
            pairs = pairs ^ pairs >> 16
        return self.transformer.bigram(pairs % self.config.bigram)

    def num_params(self) -> int:
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return super().num_params() - (0 if self.config.tied_head else padding)


class Context(NamedTuple):
    """What a layer needs besides its input."""

    window: int | None  # how far back a query sees, if mask is None
    mask: Tensor | BlockMask | None  # (…, T, S), True where a query may look
    rotation: tuple[Tensor, Tensor] | None  # cosines and sines for rope, (…, T, D/2) each
    cache: object | None  # stores new keys and values, returns all
    past: Past | None  # where a short convolution or an offset key finds earlier inputs
    values: tuple[Tensor | None, Tensor] | None  # the first layer's values (B, K, T, D), None in that layer; their share in the mix


class VariantBlock(Block):
    def __init__(self, config: VariantConfig):
        nn.Module.__init__(self)
        self.config = config
        self.ln_1 = make_norm(config)
        self.attn = VariantAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = VariantMLP(config) if config.n_expert == 1 else MixtureOfExperts(config)
        self.conv = ShortConv(config.n_embd, config.short_conv) if config.short_conv else None

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """x: (B, T, C). Returns the new x, the layer's values with value_residual, and its load-balancing loss."""
        y, values = self.attn(self.ln_1(x), context)
        x = x + dropped(y, self)
        y = self.ln_2(x)
        if self.conv is not None:
            y = self.conv(y, context.past, "mlp")
        y = self.mlp(y)
        y, balance = y if isinstance(y, tuple) else (y, 0.0)
        return x + dropped(y, self), values, balance


def dropped(x: Tensor, module: nn.Module) -> Tensor:
    """Applies config.dropout in training mode."""
    return F.dropout(x, module.config.dropout, module.training) if module.config.dropout else x


def make_norm(config: VariantConfig) -> nn.Module:
    return RMSNorm(config.n_embd) if config.norm == "rmsnorm" else nn.LayerNorm(config.n_embd, bias=config.bias)


class RMSNorm(nn.Module):
    """x / √(mean of x² + ε) · weight (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-5).type_as(x)


class HeadGate(nn.Module):
    """A factor from 0 to 2 for each head, from 12 channels of the layer's input. At first 1."""

    def __init__(self, config: VariantConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_head, min(12, config.n_embd)))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, H, 1)."""
        return 2 * F.linear(x[..., : self.weight.size(1)], self.weight).sigmoid()[..., None]


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
        if config.short_conv:
            self.conv = ShortConv(config.n_embd + 2 * self.kv_size, config.short_conv)
        if config.head_gate:
            self.gate = HeadGate(config)

    def begin_alike(self):
        """Gives each key head the weights of its group's first query head. Queries and keys begin larger than usual: QK-norm hides their
        size, but updates turn large weights less, so that the likeness lasts until it is of use."""
        queries, keys, _ = self.c_attn.weight.split([self.config.n_embd, self.kv_size, self.kv_size])
        queries.mul_(3)
        firsts = queries.unflatten(0, (self.config.kv_heads, -1, self.head_size))[:, 0]  # (K, D, C)
        keys.copy_(firsts.flatten(0, 1))

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """x: (B, T, C) → the same shape. Also returns the values (B, K, T, D) with value_residual."""
        B, T, C = x.shape
        qkv = self.c_attn(x)
        if self.config.short_conv:
            qkv = self.conv(qkv, context.past, "attn")
        q, k, v = qkv.split([C, self.kv_size, self.kv_size], dim=2)
        q, k, v = (y.view(B, T, -1, self.head_size).transpose(1, 2) for y in (q, k, v))  # (B, H, T, D), twice (B, K, T, D)
        values = None
        if context.values is not None:
            first, scale = context.values
            values = v = v + scale * ((v if first is None else first) - v)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotation is not None:
            q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)
        if self.config.key_offset:
            k = offset_keys(k, context.past)
        if context.cache is not None:
            k, v = context.cache(k, v)  # (B, K, S, D)
        y = self.attend(q, k, v, context.mask, context.window)  # (B, H, T, D)
        y = y.transpose(1, 2)  # (B, T, H, D)
        if self.config.head_gate:
            y = y * self.gate(x)
        return self.c_proj(y.reshape(B, T, C)), values


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """Computes manual_attention, in which a query sees at most `window` positions back, including its own. k, v: (B, K, S, D)."""
    k, v = attention.repeat_heads(q, k, v)
    if mask is None and window is not None:
        mask = attention.causal_mask(q.size(2), q.size(2), q.device, window)
    return manual_attention(q, k, v, mask)


def rotation_of(positions: Tensor, config: VariantConfig) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines (…, T, D/2) of the angles by which RoPE rotates positions (…, T). Pair i of a head's channels rotates
    by position · base^(-2i/D) (Su et al., 2021, equation 15).

    rope_scaling, for sequences s times as long as in training: 'linear' divides all angles by s. 'ntk' makes the base larger.
    'yarn' divides the angles of slow pairs and keeps those of fast ones.
    """
    D, base, s = config.n_embd // config.n_head, config.rope_base, config.rope_factor
    pair = torch.arange(D // 2, device=positions.device)
    if config.rope_scaling == "ntk":
        base = base * s ** (D / max(1, D - 2))
    speed = base ** (-2 * pair / D)  # radians per position
    scale = 1.0
    if config.rope_scaling == "linear":
        speed = speed / s
    if config.rope_scaling == "yarn":  # Peng et al., 2023, equations 17 to 23: pairs that turn 32 times or more keep their speed
        trained = config.seq_len / s
        fast, slow = (D * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
        fast, slow = max(math.floor(fast), 0), min(math.ceil(slow), D - 1)
        divided = ((pair - fast) / max(slow - fast, 0.001)).clamp(0, 1)  # 0: keeps its speed, 1: divided by s
        speed = speed * (1 - divided) + speed / s * divided
        scale = 0.1 * math.log(s) + 1  # sharpens the attention, which spreads out over longer sequences
    angles = positions[..., None] * speed
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of channels i and i + D/2 of x (B, H, T, D). cos, sin: (…, T, D/2)."""
    cos, sin = (y[..., None, :, :].type_as(x) for y in (cos, sin))  # (…, 1, T, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def offset_keys(k: Tensor, past: Past) -> Tensor:
    """Replaces the slower half of the rotating pairs of channels with those of the position before: (B, K, T, D) → (B, K, T, D)."""
    fast, slow = k.transpose(1, 2).unflatten(3, (2, 2, -1)).unbind(4)  # each (B, T, K, 2, D/4): the first and the second of each pair
    slow = past.lags(slow.flatten(2), 2, "keys")[1].view_as(slow)
    return torch.stack([fast, slow], 4).flatten(3).transpose(1, 2)


class VariantMLP(MLP):
    def __init__(self, config: VariantConfig):
        nn.Module.__init__(self)
        self.c_fc = nn.Linear(config.n_embd, config.n_fc, config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, config.bias)
        self.activation = ACTIVATIONS[config.mlp]


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """(…, 2 n) → (…, n). The first half, through SiLU, gates the second (Shazeer, 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS = {"gelu": gelu, "gelu_exact": F.gelu, "relu2": relu2, "swiglu": swiglu}


class MixtureOfExperts(nn.Module):
    """Several MLPs, the experts. A router sends each token to the n_expert_active most probable ones, and adds up their outputs,
    weighted by probability (Shazeer et al., 2017; Jiang et al., 2024). It never drops a token, even if all choose the same expert.
    The experts have no biases."""

    def __init__(self, config: VariantConfig):
        super().__init__()
        self.n_active = config.n_expert_active
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.c_fc = nn.ParameterList(torch.empty(config.n_fc, config.n_embd) for _ in range(config.n_expert))
        self.c_proj = nn.ParameterList(torch.empty(config.n_embd, config.n_inner) for _ in range(config.n_expert))
        self.activation, self.loop = ACTIVATIONS[config.mlp], experts.one_by_one

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, T, C). Returns the output (B, T, C) and the load-balancing loss: n_expert · Σ over experts of (fraction of the tokens
        · mean probability). It is 1 if both are equal for all experts (Fedus et al., 2021, equation 4)."""
        tokens = x.flatten(0, 1)  # (N, C)
        probs = self.router(tokens).float().softmax(-1)  # (N, experts)
        weights, chosen = probs.topk(self.n_active)  # (N, active)
        if self.n_active > 1:  # a single weight would always be 1, and the router would get no gradient
            weights = weights / weights.sum(-1, keepdim=True)
        chosen, order = chosen.flatten().sort(stable=True)  # the choices, n_active per token, by expert
        ends = torch.searchsorted(chosen, torch.arange(probs.size(1), device=x.device), right=True, out_int32=True)
        rows = order // self.n_active
        y = self.activation(experts.by_expert(tokens[rows], self.c_fc, ends, self.loop))
        y = experts.by_expert(y, self.c_proj, ends, self.loop)
        y = y * weights.flatten()[order, None].type_as(y)
        out = torch.zeros_like(tokens, dtype=y.dtype).index_add(0, rows, y)
        counts = ends.diff(prepend=ends.new_zeros(1))
        balance = probs.size(1) * (counts / len(order) * probs.mean(0)).sum()
        return out.view_as(x), balance
