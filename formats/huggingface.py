"""Loads GPT-2 from Hugging Face's files, config.json and model.safetensors. Saves any variant as the architecture of transformers
that computes the same.

Here a model is a shape and a state. shape: the fields of its config by name; missing switches are off. state: its state dict.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import cli
from common.files import read_json, replace, write_json
from common.tokenizer import ROWS, VOCAB_SIZES
from ops.attention import layer_windows

SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}


def load_state(folder: Path, shape: dict) -> dict[str, Tensor]:
    """Returns the state of the GPT-2 in a local folder. ValueError if its weights are missing, damaged or don't fit the shape."""
    return state_from_hf(load_safetensors(folder), shape, folder)


@torch.no_grad()
def save(shape: dict, state: dict[str, Tensor], folder: str | Path, special_ids: dict | None = None):
    """Saves a model as the first architecture of transformers that computes the same. ValueError if none does.
    special_ids: bos_token_id and so on, for config.json; None: those of the tokenizer that the number of ids suggests."""
    from safetensors.torch import save_file

    kind = architecture(shape)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    theirs = {"GPT2": gpt2_state, "GPTNeoX": neox_state}.get(kind, llama_state)(shape, state)
    theirs = {name: p.detach().cpu().clone(memory_format=torch.contiguous_format) for name, p in theirs.items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(theirs, temporary, metadata={"format": "pt"})
    replace(temporary, folder / "model.safetensors")
    write_json(folder / "config.json", config_to_hf(shape, state, kind) | (special_ids or {}))


def pad_tables(model, state: dict, prefix: str = "", *_):
    """Adds the padding rows to tables that lack them, such as Hugging Face's. A load_state_dict pre-hook: changes state in place."""
    config = model.config
    missing = config.padded_vocab_size - config.vocab_size
    for name in (f"{prefix}transformer.wte.weight", f"{prefix}lm_head.weight"):
        if missing and name in state and state[name].shape == (config.vocab_size, config.n_embd):
            state[name] = F.pad(state[name], (0, 0, 0, missing))


# ---- which architecture of transformers computes the same ----

# mlp → activation_function
ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu2": "relu2"}


class Anything:
    def __contains__(self, value):
        return True


# the switches of each architecture, with the values it can compute; all other switches must be off
ANY, EITHER = Anything(), (True, False)
# the last three matter in training only
ALL = dict(tied_head=EITHER, share_layers=ANY, load_balance=ANY, dropout=ANY, mimetic_init=ANY)
ROPE = ALL | dict(pos=("rope",), rope_base=ANY, rope_scaling=("none", "linear", "yarn"), rope_factor=ANY)
LLAMA = ROPE | dict(n_kv_head=ANY, norm=("rmsnorm",), mlp=("swiglu",), bias=(False,))
ARCHITECTURES = {
    "GPT2": ALL | dict(mlp=ACTIVATIONS, bias=EITHER),
    "GPTNeoX": ROPE | dict(mlp=ACTIVATIONS, bias=EITHER),
    "Mixtral": LLAMA | dict(window=ANY, n_expert=range(2, 1025), n_expert_active=range(2, 1025)),  # drops the weight of a single one
    "Llama": LLAMA,
    "Mistral": LLAMA | dict(window=ANY),
    "Qwen3": LLAMA | dict(qk_norm=(True,), window=ANY, window_pattern=ANY),
}
# every switch's value in GPT-2; it repeats VariantConfig's defaults, because this file may not import variants.py
OFF = dict(
    pos="learned", rope_base=10000.0, rope_scaling="none", rope_factor=1.0, n_kv_head=None, window=None, window_pattern="S", doc_mask=False,
    qk_norm=False, norm="layernorm", mlp="gelu", bias=True, tied_head=True, value_residual=False, short_conv=None, key_offset=False,
    head_gate=False, mimetic_init=False, bigram=None, dropout=0.0, share_layers=1, n_expert=1, n_expert_active=1, load_balance=0.01,
)  # fmt: skip


def architecture(shape: dict) -> str:
    """Returns the first architecture that computes the same. ValueError names the nearest one and its differences."""
    differences = {kind: unsupported(shape, switches) for kind, switches in ARCHITECTURES.items()}
    nearest = min(differences, key=lambda kind: len(differences[kind]))
    if differences[nearest]:
        problem = f"transformers has no such model (the nearest, {nearest}, differs in {', '.join(differences[nearest])})"
        raise ValueError(f"{problem}: keep it as a checkpoint of this project")
    return nearest


def unsupported(shape: dict, switches: dict) -> list[str]:
    """Lists the switches whose values an architecture can't compute, except those that change nothing in this shape."""
    sizes = ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd", "attention")
    values = OFF | {name: value for name, value in shape.items() if name not in sizes}
    if values["n_kv_head"] == shape["n_head"]:
        values["n_kv_head"] = None
    if not any(windows_of(shape)):
        values |= dict(window=None, window_pattern="S")
    return [f"{name} {value}" for name, value in values.items() if value not in switches.get(name, (OFF.get(name, Anything),))]


def windows_of(shape: dict) -> list[int | None]:
    shape = OFF | shape
    return layer_windows(shape["window"], shape["window_pattern"], shape["n_layer"], shape["seq_len"])


def config_to_hf(shape: dict, state: dict[str, Tensor], kind: str) -> dict:
    """Returns the contents of config.json."""
    shape = OFF | shape
    tokenizer = ROWS.get(shape["vocab_size"])
    end = VOCAB_SIZES[tokenizer] - 1 if tokenizer else None  # transformers would stop at a wrong id
    both = {
        "architectures": ["GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"],
        "model_type": "gpt_neox" if kind == "GPTNeoX" else kind.lower(),
        "vocab_size": shape["vocab_size"],
        "bos_token_id": end,
        "eos_token_id": end,
        "tie_word_embeddings": shape["tied_head"],
    }
    if kind == "GPT2":
        return both | gpt2_config(shape)
    rope = rope_config(shape)
    both |= {
        "max_position_embeddings": shape["seq_len"],
        "num_hidden_layers": shape["n_layer"],
        "num_attention_heads": shape["n_head"],
        "hidden_size": shape["n_embd"],
        "intermediate_size": next(p for name, p in state.items() if ".mlp.c_proj." in name and p.dim() == 2).size(1),
        "rope_parameters": rope,
        # transformers 4 and llama.cpp read these two instead
        "rope_theta": shape["rope_base"],
        "rope_scaling": None if shape["rope_scaling"] == "none" else rope,
    }
    return both | (neox_config(shape, rope) if kind == "GPTNeoX" else llama_config(shape, kind))


def gpt2_config(shape: dict) -> dict:
    return {
        "n_positions": shape["seq_len"],
        "n_ctx": shape["seq_len"],  # llama.cpp reads it
        "n_layer": shape["n_layer"],
        "n_head": shape["n_head"],
        "n_embd": shape["n_embd"],
        "activation_function": ACTIVATIONS[shape["mlp"]],
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def rope_config(shape: dict) -> dict:
    scaling = shape["rope_scaling"]
    rope = {"rope_type": "default" if scaling == "none" else scaling, "rope_theta": shape["rope_base"]}
    if scaling != "none":
        rope["factor"] = shape["rope_factor"]
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = round(shape["seq_len"] / shape["rope_factor"])
    return rope


def neox_config(shape: dict, rope: dict) -> dict:
    return {
        "rope_parameters": rope | {"partial_rotary_factor": 1.0},
        "rotary_pct": 1.0,
        "rotary_emb_base": shape["rope_base"],
        "use_parallel_residual": False,
        "hidden_act": ACTIVATIONS[shape["mlp"]],
        "layer_norm_eps": 1e-5,
    }


def llama_config(shape: dict, kind: str) -> dict:
    config = {
        "num_key_value_heads": shape["n_kv_head"] or shape["n_head"],
        "head_dim": shape["n_embd"] // shape["n_head"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "sliding_window": shape["window"],
        "use_sliding_window": shape["window"] is not None,
    }
    if kind == "Qwen3":
        config["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows_of(shape)]
    if kind == "Mixtral":
        config |= {"num_local_experts": shape["n_expert"], "num_experts_per_tok": shape["n_expert_active"]}
    return config


# ---- weights under each architecture's names, without padding rows ----


def ends_of(shape: dict, state: dict[str, Tensor], table: str, head: str) -> dict[str, Tensor]:
    """Returns the embedding table and, if untied, the head."""
    rows = shape["vocab_size"]
    ends = {table: state["transformer.wte.weight"][:rows]}
    return ends if shape.get("tied_head", True) else ends | {head: state["lm_head.weight"][:rows]}


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the parameters whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): p for name, p in state.items() if name.startswith(prefix)}


def blocks_of(shape: dict, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns each layer's parameters. Layers that share a block get the same ones."""
    return [part_of(state, f"transformer.h.{layer // shape.get('share_layers', 1)}.") for layer in range(shape["n_layer"])]


def renamed(params: dict[str, Tensor], names: dict[str, str], at: str) -> dict[str, Tensor]:
    """Returns the weight and bias, if any, of the modules in names (our name → theirs), with `at` before their names."""
    return {
        f"{at}{theirs}.{end}": params[f"{ours}.{end}"]
        for ours, theirs in names.items()
        for end in ("weight", "bias")
        if f"{ours}.{end}" in params
    }


def with_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state with a bias in each linear layer and norm. A model without biases computes the same with biases of 0."""
    tables = ("wte.weight", "wpe.weight", "lm_head.weight")
    weights = {name: p for name, p in state.items() if name.endswith(".weight") and not name.endswith(tables)}
    return {name.removesuffix("weight") + "bias": p.new_zeros(len(p)) for name, p in weights.items()} | state


def gpt2_state(shape: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns GPT-2's parameters. Its linear layers are Conv1D: weights are (in, out)."""
    state = with_biases(state)
    theirs = ends_of(shape, state, "transformer.wte.weight", "lm_head.weight")
    theirs |= renamed(state, {"transformer.wpe": "transformer.wpe", "transformer.ln_f": "transformer.ln_f"}, "")
    for layer, params in enumerate(blocks_of(shape, state)):
        theirs |= {f"transformer.h.{layer}.{name}": p.t() if is_conv1d(name) else p for name, p in params.items()}
    return theirs


def neox_state(shape: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns GPT-NeoX's parameters. It stores query, key and value head by head in one matrix."""
    state = with_biases(state)
    theirs = ends_of(shape, state, "gpt_neox.embed_in.weight", "embed_out.weight")
    theirs |= renamed(state, {"transformer.ln_f": "gpt_neox.final_layer_norm"}, "")
    names = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "attention.dense",
        "mlp.c_fc": "mlp.dense_h_to_4h",
        "mlp.c_proj": "mlp.dense_4h_to_h",
    }
    for layer, params in enumerate(blocks_of(shape, state)):
        at = f"gpt_neox.layers.{layer}."
        theirs |= renamed(params, names, at)
        for name, p in renamed(params, {"attn.c_attn": "attention.query_key_value"}, at).items():
            theirs[name] = p.unflatten(0, (3, shape["n_head"], -1)).transpose(0, 1).flatten(0, 2)
    return theirs


def llama_state(shape: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns Llama's parameters. Mistral, Qwen3 and Mixtral use its names too."""
    theirs = ends_of(shape, state, "model.embed_tokens.weight", "lm_head.weight")
    theirs |= renamed(state, {"transformer.ln_f": "model.norm"}, "")
    width = shape["n_embd"]
    kv_width = width // shape["n_head"] * (shape.get("n_kv_head") or shape["n_head"])
    names = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
    }
    names |= {"mlp.router": "block_sparse_moe.gate"}
    for layer, params in enumerate(blocks_of(shape, state)):
        at = f"model.layers.{layer}."
        theirs |= renamed(params, names, at)
        q, k, v = params["attn.c_attn.weight"].split([width, kv_width, kv_width])
        o = params["attn.c_proj.weight"]
        theirs |= {f"{at}self_attn.{name}_proj.weight": p for name, p in zip("qkvo", (q, k, v, o), strict=True)}
        if "mlp.c_fc.weight" in params:
            gate, up = params["mlp.c_fc.weight"].chunk(2)
            parts = {"gate": gate, "up": up, "down": params["mlp.c_proj.weight"]}
            theirs |= {f"{at}mlp.{name}_proj.weight": p for name, p in parts.items()}
        for number in range(shape.get("n_expert", 1) if "mlp.router.weight" in params else 0):
            gate, up = params[f"mlp.c_fc.{number}"].chunk(2)
            parts = {"w1": gate, "w2": params[f"mlp.c_proj.{number}"], "w3": up}
            theirs |= {f"{at}block_sparse_moe.experts.{number}.{name}.weight": p for name, p in parts.items()}
    return theirs


# ---- loading GPT-2 ----


def is_conv1d(name: str) -> bool:
    """Whether GPT-2's release stores this weight transposed: its linear layers are Conv1D."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def hf_folder(name_or_dir: str, revision: str | None = None) -> Path:
    """Returns a local folder, or downloads one of OpenAI's four sizes once, into a folder of the hub's cache named after the commit."""
    if Path(name_or_dir).is_dir():
        return Path(name_or_dir)
    if name_or_dir not in SIZES:
        raise ValueError(f"no model named {name_or_dir!r}: give a checkpoint, a folder, or one of {', '.join(SIZES)}")
    from huggingface_hub import hf_hub_download

    repo = f"openai-community/{name_or_dir}"
    try:
        for file in ("config.json", "model.safetensors"):
            path = hf_hub_download(repo, file, revision=revision)
    except Exception as e:  # the hub's client raises a dozen types, and the remedy is always the same
        raise cli.TryAgain(f"could not fetch {repo} from the hub ({type(e).__name__}): {cli.CHECK_NETWORK}, or give a local folder") from e
    return Path(path).parent


SIZE_KEYS = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")


def shape_from_hf(folder: Path) -> dict:
    """Reads config.json. ValueError names the setting that is missing, malformed or not supported."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json: give a checkpoint, a Hugging Face GPT-2 folder, or a run's folder")
    hf = read_json(path, "fetch the folder again")
    if hf.get("model_type") != "gpt2":
        raise ValueError(f"{path} describes a {hf.get('model_type')!r} model: only gpt2 can be loaded")
    missing = [key for key in SIZE_KEYS if key not in hf]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: give a folder with a GPT-2")
    for key in SIZE_KEYS:
        if not isinstance(hf[key], int) or isinstance(hf[key], bool) or hf[key] < 1:
            raise ValueError(f"{path}: {key} is {hf[key]!r}: it must be a whole number of at least 1")
    if hf.get("activation_function") == "gelu_pytorch_tanh":
        hf["activation_function"] = "gelu_new"  # another name for the same function
    raise_unsupported(hf, path)
    return {
        "vocab_size": hf["vocab_size"],
        "seq_len": hf["n_positions"],
        "n_layer": hf["n_layer"],
        "n_head": hf["n_head"],
        "n_embd": hf["n_embd"],
        "mlp": next((ours for ours, theirs in ACTIVATIONS.items() if theirs == hf.get("activation_function")), "gelu"),
        "tied_head": hf.get("tie_word_embeddings", True) is not False,
    }


def raise_unsupported(hf: dict, path: Path):
    """Raises ValueError for a setting of config.json that this project can't compute."""
    supported = {
        "activation_function": tuple(ACTIVATIONS.values()),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * hf["n_embd"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True, False),
        "add_cross_attention": (False,),
    }
    for key, values in supported.items():
        if hf.get(key, values[0]) not in values:
            known = " or ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"{path}: {key} is {hf[key]!r}: only {known} can be loaded")


def load_safetensors(folder: Path) -> dict[str, Tensor]:
    """Loads all tensors of a Hugging Face folder, from one file or from the parts that its index lists."""
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    index = folder / "model.safetensors.index.json"
    try:
        files = set(read_json(index, "")["weight_map"].values()) if index.exists() else {"model.safetensors"}
        paths = sorted(folder / file for file in files)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{index} is not an index of weight files: fetch the folder again") from e
    state = {}
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"{folder} has no {path.name}, and pickled weights can't be loaded: save it again with save_pretrained of transformers"
            )
        try:
            is_utf8 = str(path).encode("utf-8", "replace") == os.fsencode(path)  # load_file takes no other name
            state.update(load_file(path) if is_utf8 else load(path.read_bytes()))
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged ({str(e).splitlines()[0][:200]}): fetch it again") from e
    return state


def state_from_hf(hf: dict[str, Tensor], shape: dict, source) -> dict[str, Tensor]:
    """Returns GPT-2's state under our names, without padding rows. ValueError names a parameter that is missing, extra, quantized or
    of the wrong shape."""
    # OpenAI's gpt2 on the hub has no prefix, and has masks as buffers; transformers writes the prefix and no masks
    hf = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": p for name, p in hf.items()}
    ours, tied = sizes_of(shape), {"lm_head.weight"} if shape["tied_head"] else set()
    masks = {name for name in hf if name.endswith((".attn.bias", ".attn.masked_bias"))}
    if unmatched := sorted((ours.keys() - tied) ^ (hf.keys() - masks - tied)):
        raise ValueError(f"{source}: {unmatched[0]} is only in its weights or only in its config.json: give a complete GPT-2")
    state = {}
    for name, size in ours.items():
        p = hf["transformer.wte.weight" if name in tied else name]
        if not p.is_floating_point():
            raise ValueError(f"{source}: {name} is {p.dtype}, and quantized weights can't be loaded: give the unquantized model")
        p = p.t() if is_conv1d(name) and p.dim() == 2 else p
        if tuple(p.shape) != size:
            raise ValueError(f"{source}: {name} is {tuple(p.shape)}, but config.json says {size}: fetch the folder again")
        state[name] = p
    return state


def sizes_of(shape: dict) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of GPT-2's parameters, under our names."""
    V, T, C = shape["vocab_size"], shape["seq_len"], shape["n_embd"]
    linears = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    block = {f"{name}.weight": size for name, size in linears.items()} | {f"{name}.bias": size[:1] for name, size in linears.items()}
    block |= {f"{name}.{end}": (C,) for name in ("ln_1", "ln_2") for end in ("weight", "bias")}
    sizes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C), "lm_head.weight": (V, C)}
    sizes |= {f"transformer.h.{layer}.{name}": size for layer in range(shape["n_layer"]) for name, size in block.items()}
    return sizes | {f"transformer.ln_f.{end}": (C,) for end in ("weight", "bias")}
