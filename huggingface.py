"""Hugging Face's files: config.json and model.safetensors of a GPT2LMHeadModel, to and from a GPT."""

import json
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, SIZES, GPTConfig


def load(name_or_dir: str, revision: str | None = None) -> GPT:
    """GPT.from_pretrained."""
    folder = hf_folder(name_or_dir, revision)
    model = GPT(config_from_hf(folder))
    load_hf_state(model, load_safetensors(folder), folder)
    return model


def save(model: GPT, folder: str | Path):
    """GPT.save_pretrained."""
    from safetensors.torch import save_file

    if variants := [name for name in model.config.variants() if name != "mlp" or model.config.mlp not in ACTIVATIONS]:
        raise ValueError(f"GPT2LMHeadModel computes no {', '.join(variants)}: only the plain GPT-2 is saved as one")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config), indent=2) + "\n")
    save_file(hf_state(model), folder / "model.safetensors", metadata={"format": "pt"})


# mlp → activation_function
ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu2": "relu2"}


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
    mlp = next((ours for ours, theirs in ACTIVATIONS.items() if theirs == hf.get("activation_function")), "gelu")
    config = GPTConfig(hf["vocab_size"], hf["n_positions"], hf["n_layer"], hf["n_head"], hf["n_embd"], mlp=mlp)
    if faults := config.faults():
        raise ValueError(f"{path}: {'; '.join(faults)}")
    computed_here = {
        "activation_function": tuple(ACTIVATIONS.values()),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * config.n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
    }
    for key, values in computed_here.items():
        if hf.get(key, values[0]) not in values:
            computed = " or ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"{path}: {key} is {hf[key]!r}, this model computes {computed} only")
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
        "activation_function": ACTIVATIONS[config.mlp],
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


def hf_state(model: GPT) -> dict[str, Tensor]:
    """The state dict as Hugging Face has it: Conv1D weights are (in, out), the table unpadded, the head tied."""
    state = {name: p.detach().cpu() for name, p in model.state_dict().items() if name != "lm_head.weight"}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: model.config.vocab_size]
    return {name: (p.t() if is_conv1d(name) else p).contiguous() for name, p in state.items()}


@torch.no_grad()
def load_hf_state(model: GPT, hf: dict[str, Tensor], source):
    # the hub's own gpt2 has no prefix and carries masks as buffers; transformers writes the prefix and no masks
    hf = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": p for name, p in hf.items()}
    masks = {name for name in hf if name.endswith((".attn.bias", ".attn.masked_bias"))}
    own = {name: p for name, p in model.state_dict().items() if name != "lm_head.weight"}
    if odd := sorted(own.keys() ^ (hf.keys() - masks - {"lm_head.weight"})):
        raise ValueError(f"{source}: {odd[0]} is in its weights or its config.json alone: is it a whole GPT-2?")
    for name, p in own.items():
        if not hf[name].is_floating_point():
            raise ValueError(f"{source}: {name} is {hf[name].dtype}: quantized weights are not read")
        w = hf[name].t() if is_conv1d(name) and hf[name].dim() == 2 else hf[name]
        if name == "transformer.wte.weight":
            p[model.config.vocab_size :] = 0  # the padding rows
            p = p[: model.config.vocab_size]
        if p.shape != w.shape:
            raise ValueError(f"{source}: {name} is {tuple(w.shape)}, its config.json says {tuple(p.shape)}")
        p.copy_(w)
