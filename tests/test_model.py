"""Compares model.py with Hugging Face's GPT2LMHeadModel, a NumPy forward pass, published parameter counts and plain formulas."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import REPO, Trap, ids_for
from hub import serve
from reference import gpt2_logits
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from formats.huggingface import SIZES, gpt2_state
from model import GPT, GPTConfig, flash_attention, manual_attention
from ops.attention import BlockwiseAttention
from ops.kv_cache import KVCache
from ops.loss import chunk_loss, chunked_cross_entropy, loss_chunks
from training.optimizer import decay_groups
from variants import adapt, build, flops_per_token, inference_copy, set_attention

# vocabulary, positions, layers, heads, channels; with and without padding, with odd head sizes, one layer, one head
SHAPES = [(97, 24, 2, 2, 16), (128, 16, 1, 1, 8), (257, 40, 3, 4, 64), (1000, 33, 2, 3, 33)]


def random_hf(vocab_size, n_positions, n_layer, n_head, n_embd, seed=0) -> GPT2LMHeadModel:
    """Builds a model with large random weights everywhere, so that every term shows, and so does the kind of GELU."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_positions=n_positions, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture
def hf_folder(tmp_path):
    random_hf(*SHAPES[0]).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


# ---- against Hugging Face and NumPy ----


@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_equal_hugging_face(tmp_path, shape, attention):
    hf = random_hf(*shape)
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    model.config.attention = attention
    set_attention(model)
    idx = ids_for(model.config)

    logits, none = model(idx)
    assert none is None and logits.shape == (*idx.shape, shape[0])
    assert (logits - hf(idx).logits).abs().max() <= 1e-5

    loss = model(idx[:, :-1], idx[:, 1:])[1]
    hf_loss = hf(idx, labels=idx).loss
    assert abs(loss.item() - hf_loss.item()) <= 1e-5
    loss.backward()
    hf_loss.backward()
    theirs = {name: p.grad for name, p in hf.named_parameters()}
    for name, p in model.named_parameters():
        ours = p.grad[: shape[0]] if name == "transformer.wte.weight" else p.grad
        expected = theirs[name].t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else theirs[name]
        assert (ours - expected).abs().max() <= 1e-5, name


@pytest.mark.parametrize("attention", ["flash", "manual"])
def test_logits_equal_numpy(attention):
    torch.manual_seed(0)
    model = GPT(GPTConfig(61, 12, 2, 2, 24, attention))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    idx = ids_for(model.config, batch=1)
    expected = gpt2_logits(
        {name: p.detach() for name, p in gpt2_state(vars(model.config), model.state_dict()).items()}, idx[0].tolist(), 2, 2
    )
    assert abs(model(idx)[0][0].detach().numpy() - expected).max() <= 1e-4


def test_manual_attention_equals_flash_and_formula():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 5, dtype=torch.float64).unbind()
    scores = (q @ k.transpose(2, 3) / 5**0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -1e30)
    expected = scores.softmax(-1) @ v
    assert (manual_attention(q, k, v) - expected).abs().max() < 1e-12
    assert (flash_attention(q, k, v) - expected).abs().max() < 1e-12
    mask = torch.ones(3, 7).tril(4).bool()  # the queries are the last three positions, as with a cache
    assert (manual_attention(q[:, :, 4:], k, v, mask) - expected[:, :, 4:]).abs().max() < 1e-12
    assert (flash_attention(q[:, :, 4:], k, v, mask) - expected[:, :, 4:]).abs().max() < 1e-12


@pytest.mark.parametrize("T", [1, 64, 65, 200, 513, 1024])  # one block, a short last block, blocks of 64, of T / 2, of 256
def test_blockwise_attention_equals_formula(T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, 8, requires_grad=True) for _ in range(3))
    dy = torch.randn(2, 3, T, 8)
    plain, ours = manual_attention(q, k, v), BlockwiseAttention.apply(q, k, v, None)
    assert (ours - plain).abs().max() <= 1e-5
    for expected, grad in zip(torch.autograd.grad(plain, (q, k, v), dy), torch.autograd.grad(ours, (q, k, v), dy), strict=True):
        assert (grad - expected).abs().max() <= 1e-5


# ---- the loss in chunks ----


@pytest.mark.parametrize("chunk", [1, 7, 20, 100])
def test_chunked_loss_equals_plain_loss(chunk):
    torch.manual_seed(0)
    x, weight = torch.randn(50, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    targets = torch.randint(60, (50,)).index_fill(0, torch.tensor([0, 3, 8, 49]), -100)
    plain = torch.nn.functional.cross_entropy((x @ weight.t())[:, :60], targets)
    ours = chunked_cross_entropy(x, weight, targets, 60, chunk, chunk_loss)
    assert abs(plain - ours) <= 1e-6
    for expected, grad in zip(torch.autograd.grad(3 * plain, (x, weight)), torch.autograd.grad(3 * ours, (x, weight)), strict=True):
        assert (grad - expected).abs().max() <= 1e-6
    with torch.no_grad():
        assert chunked_cross_entropy(x, weight, targets, 60, chunk, chunk_loss) == ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_loss_keeps_small_gradients_in_low_precision(dtype):
    """softmax / 4096 positions is too small for fp16. The plain loss needs a gradient scaler for it; the chunked loss does not."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(4096, 8), torch.randn(500, 8), torch.randint(500, (4096,))
    grads = []
    for enabled in (False, True):
        w = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            chunked_cross_entropy(x, w, targets, 500, 1024, chunk_loss).backward()
        assert w.grad.dtype == torch.float32
        grads.append(w.grad)
    assert 0 < (grads[1] - grads[0]).norm() / grads[0].norm() < 0.02


def test_chunked_loss_does_not_overflow_in_fp16():
    """A token's gradient is a sum over all positions, and fp16 ends at 65,504."""
    x, w = torch.full((4096, 8), 50.0), torch.zeros(64, 8, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        chunked_cross_entropy(x, w, torch.zeros(4096, dtype=torch.long), 64, 2048, chunk_loss).backward()
    assert (w.grad[0] - -50 * 63 / 64).abs().max() < 0.1


def test_logits_are_materialized_in_chunks(monkeypatch):
    monkeypatch.setattr("ops.loss.MAX_LOGITS", 1024 * 30)
    torch.manual_seed(0)
    model = build(GPTConfig(1024, 40, 1, 1, 8))
    idx = ids_for(model.config, batch=4)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    with Largest() as largest:
        loss = model(idx, idx)[1]
        loss.backward()
    assert largest.elements <= 1024 * 30 < 4 * 40 * 1024
    monkeypatch.undo()
    assert abs(model(idx, idx)[1] - loss) <= 1e-6


@pytest.mark.parametrize("batch", [1, 16, 24, 32, 48, 64, 96, 128])
def test_loss_chunks_have_one_length(batch):
    n, most = batch * 1024, 2**29
    parts = loss_chunks(n, 50304, "cuda")
    assert n % parts == 0 and n // parts * 50304 <= most
    assert parts <= 2 * -(-n * 50304 // most)  # not smaller than necessary
    assert loss_chunks(65537, 50304, "cuda") == 7  # a prime: six equal chunks and the rest


@pytest.mark.parametrize("attention", ["flash", "manual"])
def test_no_logit_depends_on_later_inputs(attention):
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 10, 2, 2, 16, attention))
    embedded = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: embedded.append(out.requires_grad_()) or out)
    logits = model(ids_for(model.config, batch=1))[0]
    for t in range(10):
        (grad,) = torch.autograd.grad(logits[0, t].sum(), embedded[0], retain_graph=True)
        assert (grad[0, t + 1 :] == 0).all()
        assert grad[0, : t + 1].abs().sum(-1).min() > 0  # it depends on all earlier ones


# ---- size, initial weights, vocabulary ----


@pytest.mark.parametrize(
    ("name", "published"), [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)]
)
def test_parameter_counts_equal_published_ones(name, published):
    with torch.device("meta"):
        model = GPT(GPTConfig(**SIZES[name]))
        assert model.num_params() == published == GPT2LMHeadModel(GPT2Config(**SIZES[name])).num_parameters()
    assert GPTConfig().padded_vocab_size == 50304


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(500, 64, 8, 4, 128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            expected = 0.02 / 16**0.5 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < expected / 20, name


def test_new_model_has_the_loss_of_guessing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 32, 2, 2, 32))
    idx = ids_for(model.config, 8)
    assert model(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(torch.tensor(257.0).log().item(), abs=0.1)


def test_padding_ids_get_no_logit_and_no_gradient():
    model = GPT(GPTConfig(97, 8, 1, 1, 8))
    with torch.no_grad():
        model.transformer.wte.weight[97:] = 100.0  # would win every argmax
    idx = ids_for(model.config)
    assert model(idx)[0].shape[-1] == 97
    model(idx, idx)[1].backward()
    assert (model.transformer.wte.weight.grad[97:] == 0).all()
    assert model.transformer.wte.weight.shape[0] == 128


def test_ignored_targets_do_not_count():
    torch.manual_seed(0)
    model = GPT(GPTConfig(97, 8, 1, 1, 8))
    idx, targets = ids_for(model.config), ids_for(model.config)
    alone = model(idx[:1], targets[:1])[1]
    targets[1:] = -100
    assert model(idx, targets)[1].item() == pytest.approx(alone.item(), abs=1e-6)


def test_weight_decay_only_on_matrices():
    model = GPT(GPTConfig(97, 8, 2, 2, 8))
    decayed, others = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in others["params"]} == {n for n in names.values() if n.endswith("bias") or "ln_" in n}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_flops_are_six_per_weight_plus_attention():
    config = GPTConfig(97, 32, 2, 2, 16)
    per_block = 16 * 48 + 48 + 16 * 16 + 16 + 2 * (4 * 16 * 16) + 64 + 16 + 4 * 16
    weights = 2 * per_block + 2 * 16 + 128 * 16
    assert flops_per_token(GPT(config)) == 6 * weights + 12 * 2 * 16 * 32


@pytest.mark.parametrize("shape", SHAPES)
def test_inference_copy_equals_model(shape):
    """In fp32 and in autocast's bf16."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(*shape)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    idx = ids_for(model.config)
    with torch.no_grad():
        assert (inference_copy(model)(idx)[0] - model(idx)[0]).abs().max() <= 1e-4
        with torch.autocast("cpu", torch.bfloat16):
            expected, scored = model(idx)[0], inference_copy(model)(idx)[0]
    assert scored.dtype == torch.bfloat16 and (scored - expected).float().norm() / expected.float().norm() < 0.02


def test_inference_copy_uses_current_weights(monkeypatch):
    """An fp32 copy shares the weights. A copy after a training step has the new weights and leaves the model as it was."""
    model = GPT(GPTConfig(*SHAPES[0])).train()
    idx = ids_for(model.config)
    copy = inference_copy(model)
    assert copy is not model and copy.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    model(idx, idx)[1].backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, scored = model(idx)[0], inference_copy(model)(idx)[0]
    assert (scored - expected).float().norm() / expected.float().norm() < 0.02
    assert model.training and all(p.requires_grad for p in model.parameters())

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # PyTorch for a Mac has no oneDNN
    assert inference_copy(model) is model


def test_too_long_input_is_refused():
    with pytest.raises(ValueError, match="9 positions, but the model sees at most 8"):
        GPT(GPTConfig(97, 8, 1, 1, 8))(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="5 positions, but the cache holds at most 4"):
        GPT(GPTConfig(97, 8, 1, 1, 8))(torch.zeros(1, 5, dtype=torch.long), cache=KVCache(4))


@pytest.mark.parametrize("wrong", [{"n_embd": 10, "n_head": 3}, {"n_layer": 0}, {"attention": "fast"}])
def test_invalid_shape_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPT(GPTConfig(**wrong))


# ---- KV cache ----


@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [12], [3, 9]])
def test_cached_positions_equal_full_forward_pass(attention, pieces):
    torch.manual_seed(0)
    model = GPT(GPTConfig(97, 12, 2, 2, 16, attention))
    idx = ids_for(model.config)
    cache, parts = KVCache(12), []
    for piece in idx.split(pieces, dim=1):
        parts.append(model(piece, cache=cache)[0])
    assert cache.length == 12
    assert (torch.cat(parts, 1) - model(idx)[0]).abs().max() < 1e-5


# ---- Hugging Face's files ----


def test_saved_model_loads_in_transformers(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(97, 24, 2, 2, 16))
    model.save_pretrained(tmp_path)
    hf, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    idx = ids_for(model.config)
    assert (model(idx)[0] - hf.eval()(idx).logits).abs().max() <= 1e-5
    again = GPT.from_pretrained(str(tmp_path))
    assert (again(idx)[0] - model(idx)[0]).abs().max() == 0


def test_openai_layout_of_the_hub_loads(hf_folder):
    """OpenAI's release on the hub has names without 'transformer.', and stores the masks."""
    hf = GPT.from_pretrained(str(hf_folder))
    state = load_file(hf_folder / "model.safetensors")
    state = {name.removeprefix("transformer."): p for name, p in state.items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    save_file(state, hf_folder / "model.safetensors")
    idx = ids_for(hf.config)
    assert (GPT.from_pretrained(str(hf_folder))(idx)[0] == hf(idx)[0]).all()


def test_weights_in_several_files_load(tmp_path, hf_folder):
    random_hf(*SHAPES[0]).save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    one, parts = (GPT.from_pretrained(str(folder)) for folder in (hf_folder, tmp_path / "parts"))
    assert all((p == q).all() for p, q in zip(one.parameters(), parts.parameters(), strict=True))


def test_gpt2_is_fetched_from_the_hub(tmp_path, hf_folder):
    """Loads GPT.from_pretrained("gpt2") from a hub on localhost, which serves a smaller model under that name."""
    files = {path.name: path.read_bytes() for path in hf_folder.iterdir()}
    code = "import sys; sys.path.insert(0, sys.argv[1]); from model import GPT; print(GPT.from_pretrained('gpt2').num_params())"
    with serve({"openai-community/gpt2": files}) as (url, requests):
        env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        result = subprocess.run([sys.executable, "-c", code, str(REPO)], env=env, capture_output=True, text=True)
    assert result.stdout.strip() == str(GPT.from_pretrained(str(hf_folder)).num_params()), result.stderr
    assert not any("bin" in request for request in requests)


def test_pickled_weights_are_refused(hf_folder, monkeypatch):
    monkeypatch.chdir(hf_folder)
    torch.save({"x": Trap()}, hf_folder / "pytorch_model.bin")
    (hf_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights can't be loaded"):
        GPT.from_pretrained(str(hf_folder))
    assert not (hf_folder / "fired").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("activation_function", "relu", "activation_function is 'relu'"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True"),
        ("n_inner", 7, "n_inner is 7"),
        ("model_type", "llama", "'llama' model"),
        ("n_embd", 32, "config.json says"),
        ("n_layer", 3, "only in its config.json: give a complete GPT-2"),
        ("n_layer", 1, "only in its config.json: give a complete GPT-2"),
        ("n_layer", "2", "n_layer is '2'"),
        ("n_layer", 2_000_000, "n_layer is 2000000: it must be at most 1000"),
        ("vocab_size", 90, "config.json says"),
        ("vocab_size", 110, "config.json says"),
    ],
)
def test_folder_with_another_model_is_refused(hf_folder, key, value, message):
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(hf_folder))


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_damaged_index_is_refused(hf_folder, index):
    (hf_folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index.json is not an index of weight files"):
        GPT.from_pretrained(str(hf_folder))


def test_quantized_weights_are_refused(hf_folder):
    state = load_file(hf_folder / "model.safetensors")
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"].to(torch.int8)
    save_file(state, hf_folder / "model.safetensors")
    with pytest.raises(ValueError, match="torch.int8, and quantized weights can't be loaded"):
        GPT.from_pretrained(str(hf_folder))


def test_damaged_safetensors_are_refused(hf_folder):
    path = hf_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        GPT.from_pretrained(str(hf_folder))


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no model named 'gpt5'"):
        GPT.from_pretrained("gpt5")


def test_shortened_model_equals_original_on_short_sequences():
    torch.manual_seed(0)
    model = GPT(GPTConfig(97, 24, 2, 2, 16))
    idx = ids_for(model.config, length=8)
    before = model(idx)[0]
    model = adapt(model, replace(model.config, seq_len=8))
    assert (model(idx)[0] == before).all() and model.transformer.wpe.weight.shape == (8, 16)
    with pytest.raises(ValueError, match="longer than the 8 positions of the model: lower it"):
        adapt(model, replace(model.config, seq_len=9))
