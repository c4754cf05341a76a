"""Hugging Face's files, config.json and model.safetensors: of a GPT2LMHeadModel to and from a GPT, of its variants as the
architecture of transformers that computes the same."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from files import replace, write_json
from model import GPT, SIZES, SWITCHES, GPTConfig


def load(name_or_dir: str, revision: str | None = None) -> GPT:
    """GPT.from_pretrained."""
    folder = hf_folder(name_or_dir, revision)
    model = GPT(config_from_hf(folder))
    load_hf_state(model, load_safetensors(folder), folder)
    return model


def save(model: GPT, folder: str | Path):
    """GPT.save_pretrained."""
    from safetensors.torch import save_file

    kind = architecture(model.config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {"GPT2": gpt2_state, "GPTNeoX": neox_state}.get(kind, llama_state)(model)
    state = {name: p.detach().cpu().clone(memory_format=torch.contiguous_format) for name, p in state.items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    replace(temporary, folder / "model.safetensors")
    write_json(folder / "config.json", config_to_hf(model.config, kind))


# ---- which architecture of transformers computes the same ----

# mlp → activation_function
ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu2": "relu2"}


class Anything:
    def __contains__(self, value):
        return True


# the switches that an architecture has, and what they may be; all others are as in GPT-2
ANY, EITHER = Anything(), (True, False)
ALL = dict(tied_head=EITHER, share_layers=ANY, load_balance=ANY)  # the last tells in training alone
ROPE = ALL | dict(pos=("rope",), rope_base=ANY, rope_scaling=("none", "linear", "yarn"), rope_factor=ANY)
LLAMA = ROPE | dict(n_kv_head=ANY, norm=("rmsnorm",), mlp=("swiglu",), bias=(False,))
ARCHITECTURES = {
    "GPT2": ALL | dict(mlp=ACTIVATIONS),
    "GPTNeoX": ROPE | dict(mlp=ACTIVATIONS),
    "Mixtral": LLAMA | dict(window=ANY, n_expert=range(2, 1025), n_expert_active=range(2, 1025)),  # of one alone it drops the weight
    "Llama": LLAMA,
    "Mistral": LLAMA | dict(window=ANY),
    "Qwen3": LLAMA | dict(qk_norm=(True,), window=ANY, window_pattern=ANY),
}


def architecture(config: GPTConfig) -> str:
    """The first that computes the same. ValueError names the nearest, and where it differs."""
    odd = {kind: misfits(config, switches) for kind, switches in ARCHITECTURES.items()}
    nearest = min(odd, key=lambda kind: len(odd[kind]))
    if odd[nearest]:
        why = f"no architecture of transformers computes this model: {nearest}, the nearest, differs in {', '.join(odd[nearest])}"
        raise ValueError(f"{why}; keep it as a checkpoint of this project")
    return nearest


def misfits(config: GPTConfig, switches: dict) -> list[str]:
    """The switches that stand otherwise in a config than an architecture has them, but for those that change nothing."""
    if config.kv_heads == config.n_head:
        config = dataclasses.replace(config, n_kv_head=None)
    if not any(config.windows):
        config = dataclasses.replace(config, window=None, window_pattern="S")
    values = [(f, getattr(config, f.name)) for f in SWITCHES]
    return [f"{f.name} {value}" for f, value in values if value not in switches.get(f.name, (f.default,))]


def config_to_hf(config: GPTConfig, kind: str) -> dict:
    """config.json. <|endoftext|> is the last id in every tokenizer of this project, as in GPT-2's."""
    both = {
        "architectures": ["GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"],
        "model_type": "gpt_neox" if kind == "GPTNeoX" else kind.lower(),
        "vocab_size": config.vocab_size,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
        "tie_word_embeddings": config.tied_head,
    }
    if kind == "GPT2":
        return both | {
            "n_positions": config.seq_len,
            "n_ctx": config.seq_len,  # llama.cpp asks for it
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "activation_function": ACTIVATIONS[config.mlp],
            "layer_norm_epsilon": 1e-5,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    rope = {"rope_type": "default" if config.rope_scaling == "none" else config.rope_scaling, "rope_theta": config.rope_base}
    if config.rope_scaling != "none":
        rope["factor"] = config.rope_factor
    if config.rope_scaling == "yarn":
        rope["original_max_position_embeddings"] = round(config.seq_len / config.rope_factor)
    both |= {
        "max_position_embeddings": config.seq_len,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "rope_parameters": rope,
        # and as transformers 4 and llama.cpp look for it
        "rope_theta": config.rope_base,
        "rope_scaling": None if config.rope_scaling == "none" else rope,
    }
    if kind == "GPTNeoX":
        return both | {
            "rope_parameters": rope | {"partial_rotary_factor": 1.0},
            "rotary_pct": 1.0,
            "rotary_emb_base": config.rope_base,
            "use_parallel_residual": False,
            "hidden_act": ACTIVATIONS[config.mlp],
            "layer_norm_eps": 1e-5,
        }
    return both | {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.n_embd // config.n_head,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "sliding_window": config.window,
        "use_sliding_window": config.window is not None,
        **({"layer_types": ["sliding_attention" if w else "full_attention" for w in config.windows]} if kind == "Qwen3" else {}),
        **({"num_local_experts": config.n_expert, "num_experts_per_tok": config.n_expert_active} if kind == "Mixtral" else {}),
    }


# ---- the weights, by their names there; the rows that only pad the vocabulary are left out ----


def layers_of(model: GPT) -> list[nn.Module]:
    """A block for each layer; layers that share one have the same."""
    return [model.transformer.h[layer // model.config.share_layers] for layer in range(model.config.n_layer)]


def ends_of(model: GPT, table: str, head: str) -> dict[str, Tensor]:
    """The embedding table and, where it is not the same, the head."""
    rows = model.config.vocab_size
    ends = {table: model.transformer.wte.weight[:rows]}
    return ends if model.config.tied_head else ends | {head: model.lm_head.weight[:rows]}


def both_of(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Weight and, where there is one, bias."""
    return {f"{name}.{end}": p for end, p in module.named_parameters()}


def gpt2_state(model: GPT) -> dict[str, Tensor]:
    """Conv1D weights are (in, out)."""
    state = ends_of(model, "transformer.wte.weight", "lm_head.weight")
    state |= both_of("transformer.wpe", model.transformer.wpe) | both_of("transformer.ln_f", model.transformer.ln_f)
    for layer, block in enumerate(layers_of(model)):
        for name, p in block.named_parameters():
            state[f"transformer.h.{layer}.{name}"] = p.t() if is_conv1d(name) else p
    return state


def neox_state(model: GPT) -> dict[str, Tensor]:
    """Query, key and value stand head by head in one product."""
    heads = model.config.n_head
    state = ends_of(model, "gpt_neox.embed_in.weight", "embed_out.weight") | both_of("gpt_neox.final_layer_norm", model.transformer.ln_f)
    for layer, block in enumerate(layers_of(model)):
        at = f"gpt_neox.layers.{layer}."
        state |= both_of(at + "input_layernorm", block.ln_1) | both_of(at + "post_attention_layernorm", block.ln_2)
        state |= both_of(at + "attention.dense", block.attn.c_proj)
        state |= both_of(at + "mlp.dense_h_to_4h", block.mlp.c_fc) | both_of(at + "mlp.dense_4h_to_h", block.mlp.c_proj)
        for name, p in both_of(at + "attention.query_key_value", block.attn.c_attn).items():
            state[name] = p.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
    return state


def llama_state(model: GPT) -> dict[str, Tensor]:
    """Llama's names, which Mistral, Qwen3 and Mixtral have too."""
    state = ends_of(model, "model.embed_tokens.weight", "lm_head.weight") | both_of("model.norm", model.transformer.ln_f)
    for layer, block in enumerate(layers_of(model)):
        at, attn = f"model.layers.{layer}.", block.attn
        q, k, v = attn.c_attn.weight.split([model.config.n_embd, attn.kv_size, attn.kv_size])
        state |= {at + f"self_attn.{name}_proj.weight": p for name, p in zip("qkvo", (q, k, v, attn.c_proj.weight), strict=True)}
        if model.config.qk_norm:
            state |= both_of(at + "self_attn.q_norm", attn.q_norm) | both_of(at + "self_attn.k_norm", attn.k_norm)
        state |= both_of(at + "input_layernorm", block.ln_1) | both_of(at + "post_attention_layernorm", block.ln_2)
        if model.config.n_expert == 1:
            gate, up = block.mlp.c_fc.weight.chunk(2)
            parts = {"gate": gate, "up": up, "down": block.mlp.c_proj.weight}
            state |= {at + f"mlp.{name}_proj.weight": p for name, p in parts.items()}
            continue
        state[at + "block_sparse_moe.gate.weight"] = block.mlp.router.weight
        for number, (c_fc, c_proj) in enumerate(zip(block.mlp.c_fc, block.mlp.c_proj, strict=True)):
            gate, up = c_fc.chunk(2)
            parts = {"w1": gate, "w2": c_proj, "w3": up}
            state |= {at + f"block_sparse_moe.experts.{number}.{name}.weight": p for name, p in parts.items()}
    return state


# ---- GPT-2's files into a GPT ----


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
    if hf.get("activation_function") == "gelu_pytorch_tanh":
        hf["activation_function"] = "gelu_new"  # the same by another name
    mlp = next((ours for ours, theirs in ACTIVATIONS.items() if theirs == hf.get("activation_function")), "gelu")
    tied = hf.get("tie_word_embeddings", True) is not False
    config = GPTConfig(hf["vocab_size"], hf["n_positions"], hf["n_layer"], hf["n_head"], hf["n_embd"], mlp=mlp, tied_head=tied)
    if faults := config.faults():
        raise ValueError(f"{path}: {'; '.join(faults)}")
    computed_here = {
        "activation_function": tuple(ACTIVATIONS.values()),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * config.n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True, False),
        "add_cross_attention": (False,),
    }
    for key, values in computed_here.items():
        if hf.get(key, values[0]) not in values:
            computed = " or ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"{path}: {key} is {hf[key]!r}, this model computes {computed} only")
    return config


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
            raise ValueError(
                f"{folder} has no {path.name}; pickled weights are not read: load it in transformers and save_pretrained it again"
            )
        try:
            state.update(load_file(path))
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged ({e}): fetch it again") from e
    return state


@torch.no_grad()
def load_hf_state(model: GPT, hf: dict[str, Tensor], source):
    # the hub's own gpt2 has no prefix and carries masks as buffers; transformers writes the prefix and no masks
    hf = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": p for name, p in hf.items()}
    masks = {name for name in hf if name.endswith((".attn.bias", ".attn.masked_bias"))}
    tables = {"transformer.wte.weight", "lm_head.weight"}
    tied = {"lm_head.weight"} if model.config.tied_head else set()
    own = {name: p for name, p in model.state_dict().items() if name not in tied}
    if odd := sorted(own.keys() ^ (hf.keys() - masks - tied)):
        raise ValueError(f"{source}: {odd[0]} is in its weights or its config.json alone: is it a whole GPT-2?")
    for name, p in own.items():
        if not hf[name].is_floating_point():
            raise ValueError(f"{source}: {name} is {hf[name].dtype}: quantized weights are not read")
        w = hf[name].t() if is_conv1d(name) and hf[name].dim() == 2 else hf[name]
        if name in tables:
            p[model.config.vocab_size :] = 0  # the padding rows
            p = p[: model.config.vocab_size]
        if p.shape != w.shape:
            raise ValueError(f"{source}: {name} is {tuple(w.shape)}, its config.json says {tuple(p.shape)}")
        p.copy_(w)
