"""GPT-2 (Radford et al., 2019) from scratch, to be read from top to bottom.

Letters in the shapes: B sequences, T positions, C = n_embd channels, H = n_head heads of D = C / H channels,
V ids of the vocabulary, S = T + the positions a KV cache already holds.
"""

import json
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
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: Press & Wolf, 2017
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
        logits = self.logits(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # float(): the softmax over V must not be summed in bf16
        return None, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def hidden(self, idx: Tensor, cache: "KVCache | None" = None, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Ids (B, T) → the residual stream after the last norm (B, T, C).

        positions (B, T) and mask (B, 1, T, T), True where a query may look, are for what is not one sequence from left
        to right; by default position t follows t - 1 and sees all before it.
        """
        if positions is None:
            start = cache.length if cache is not None else 0
            end = start + idx.size(1)
            if end > self.config.seq_len:
                raise ValueError(f"{end} positions, but the model sees at most {self.config.seq_len}: shorten the input")
            positions = torch.arange(start, end, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x, cache, mask)
        if cache is not None:
            cache.length = end
        return self.transformer.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) → (..., V). The ids that only pad the table are cut off: they can't be predicted or sampled."""
        return self.lm_head(x)[..., : self.config.vocab_size]

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

    def forward(self, x: Tensor, cache: "KVCache | None" = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before (Vaswani et al., 2017, section 3.2)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: "KVCache | None" = None, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        H = self.config.n_head
        q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        attend = flash_attention if self.config.attention == "flash" else manual_attention
        y = attend(q, k, v, mask)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def causal_mask(T: int, S: int, device) -> Tensor:
    """(T, S), True where the query may look: the T queries are the last of S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def manual_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v with the future, or what the mask hides, left out. q: (B, H, T, D); k, v: (B, H, S, D)."""
    T, S, D = q.size(2), k.size(2), q.size(3)
    scores = q @ k.transpose(2, 3) / D**0.5  # (B, H, T, S)
    visible = causal_mask(T, S, q.device) if mask is None else mask
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = F.softmax(scores, dim=-1)
    return weights @ v


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same in one fused kernel that never stores the (T, S) scores (Dao et al., 2022)."""
    T, S = q.size(2), k.size(2)
    if mask is None and T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if mask is None and T > 1:  # one query, the last, sees everything
        mask = causal_mask(T, S, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class MLP(nn.Module):
    """Four times as wide inside, with the tanh form of GELU that GPT-2 was trained with."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class KVCache:
    """Keys and values of the positions seen so far, so that generating a token costs one position, not all.

    Room for max_len positions is taken at a layer's first use, when its shape and dtype are known.
    """

    def __init__(self, max_len: int):
        self.max_len = max_len
        self.length = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v of the T new positions, (B, H, T, D) → of all S so far, (B, H, S, D). GPT.hidden moves `length` on."""
        if layer not in self.layers:
            B, H, _, D = k.shape
            self.layers[layer] = (k.new_empty(B, H, self.max_len, D), v.new_empty(B, H, self.max_len, D))
        end = self.length + k.size(2)
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


# ---- Hugging Face's files ----


def is_conv1d(name: str) -> bool:
    """GPT-2 was released with its linear layers as Conv1D, whose weights are transposed."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def hf_folder(name_or_dir: str, revision: str | None = None) -> Path:
    """A local folder as it is, or one of OpenAI's four sizes, downloaded once into the hub's cache."""
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
