"""Compares variants.py's switches with transformers' Llama, Mistral, Qwen3, Mixtral and GPT-NeoX, with copied weights, and with plain
formulas."""

import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ids_for
from torch.nn.attention.flex_attention import BlockMask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from formats.huggingface import OFF
from model import GPT, GPTConfig
from ops.attention import BlockwiseAttention, block_mask, causal_mask
from ops.kv_cache import KVCache
from ops.short_conv import Past
from training.compiling import compile_blocks, recompute_activations
from training.presets import PRESETS
from variants import (
    SWITCHES,
    MixtureOfExperts,
    VariantConfig,
    VariantGPT,
    adapt,
    build,
    flops_per_token,
    idle_params,
    inference_copy,
    offset_keys,
    rotate,
    rotation_of,
    set_attention,
)  # fmt: skip

SHAPE = dict(vocab_size=97, seq_len=24, n_layer=4, n_head=4, n_embd=32)
LLAMA = dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied_head=False)

VARIANTS = {
    "gpt2": {},
    "rope": dict(pos="rope"),
    "yarn": dict(pos="rope", rope_scaling="yarn", rope_factor=4.0, rope_base=500.0),
    "grouped": dict(n_kv_head=2),
    "multi-query": dict(n_kv_head=1, pos="rope"),
    "window": dict(window=5),
    "window of one": dict(window=1, pos="rope"),
    "pattern": dict(window=5, window_pattern="SSSL", pos="rope", n_kv_head=2),
    "documents": dict(doc_mask=True),
    "documents in windows": dict(doc_mask=True, window=5, window_pattern="SL", pos="rope"),
    "qk_norm": dict(qk_norm=True, pos="rope"),
    "rmsnorm": dict(norm="rmsnorm"),
    "relu2": dict(mlp="relu2"),
    "swiglu": dict(mlp="swiglu"),
    "exact": dict(mlp="gelu_exact"),
    "no biases": dict(bias=False),
    "untied": dict(tied_head=False),
    "value_residual": dict(value_residual=True, n_kv_head=2),
    "short_conv": dict(short_conv=3),
    "short_conv of documents": dict(short_conv=4, doc_mask=True, pos="rope", n_kv_head=2, share_layers=2),
    "key_offset": dict(key_offset=True, pos="rope", n_kv_head=2, doc_mask=True),
    "head_gate": dict(head_gate=True, n_kv_head=2),
    "mimetic_init": dict(mimetic_init=True, qk_norm=True, n_kv_head=2),
    "bigram": dict(bigram=500, doc_mask=True),
    "dropout": dict(dropout=0.2, pos="rope"),
    "every pair": dict(bigram=97 * 98, doc_mask=True, short_conv=2, pos="rope"),
    "shared": dict(share_layers=2, value_residual=True),
    "experts": dict(n_expert=4, n_expert_active=2, mlp="swiglu"),
    "one expert of three": dict(n_expert=3, n_expert_active=1, load_balance=0.1),
    "many at once": dict(
        pos="rope", n_kv_head=2, window=5, window_pattern="SSLL", doc_mask=True, share_layers=2, n_expert=3, n_expert_active=2, mlp="swiglu"
    ),
    "modern": {name: getattr(PRESETS["modern"].model, name) for name in PRESETS["modern"].model.switches_on()},
}


def randomized(seed=0, attention="flash", **switches) -> GPT:
    """Builds a model with large random weights everywhere, so that no term is too small to see."""
    torch.manual_seed(seed)
    model = build(VariantConfig(**SHAPE | dict(attention=attention) | switches))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def test_every_switch_is_in_the_table():
    """A new field of VariantConfig needs a row in VARIANTS: then every test of all variants covers it."""
    assert {f.name for f in SWITCHES} == {name for switches in VARIANTS.values() for name in switches}


def test_hugging_face_knows_every_switch():
    """A new field of VariantConfig needs its default in OFF."""
    assert {f.name: f.default for f in SWITCHES} == OFF


@pytest.mark.parametrize("attention", ["flash", "manual"])
def test_no_switch_is_gpt2_bit_for_bit(attention):
    """build's fast parts equal model.py's plain ones: keys, initial weights, logits, loss and gradients."""
    built = randomized(attention=attention)
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**SHAPE, attention=attention))
    torch.manual_seed(0)
    fresh = build(VariantConfig(**SHAPE, attention=attention))
    assert type(built) is GPT and list(plain.state_dict()) == list(fresh.state_dict())
    assert all((p == q).all() for p, q in zip(plain.parameters(), fresh.parameters(), strict=True))
    plain.load_state_dict(built.state_dict())
    idx = ids_for(plain.config)
    assert (built(idx)[0] == plain(idx)[0]).all()
    (loss, grads), (plain_loss, plain_grads) = loss_and_gradients(built, idx), loss_and_gradients(plain, idx)
    assert loss == plain_loss and all((p == q).all() for p, q in zip(grads, plain_grads, strict=True))


@pytest.mark.parametrize("attention", ["flash", "manual"])
def test_variant_classes_equal_gpt2_bit_for_bit(attention):
    """VariantGPT with no switch on equals model.py."""
    built = randomized(attention=attention)
    variant = VariantGPT(VariantConfig(**SHAPE, attention=attention))
    variant.load_state_dict(built.state_dict())
    idx = ids_for(built.config)
    (loss, grads), (variant_loss, variant_grads) = loss_and_gradients(built, idx), loss_and_gradients(variant, idx)
    assert loss == variant_loss and all((p == q).all() for p, q in zip(grads, variant_grads, strict=True))


@pytest.mark.parametrize("rows", [98, 1000, 4096, 97 * 98])
def test_token_pairs_are_spread_over_the_rows(rows):
    """Over all pairs, and over the pairs of each token, at least about as many rows are in use as with random rows."""
    model = build(VariantConfig(**SHAPE, bigram=rows))
    model.transformer.bigram.weight.data.copy_(torch.arange(rows)[:, None])
    first, second = torch.meshgrid(torch.arange(97), torch.arange(97), indexing="ij")
    used = model.pair_rows(torch.stack([first.flatten(), second.flatten()], 1), Past())[:, 1, 0]
    expected = 97**2 if rows == 97 * 98 else rows * (1 - (1 - 1 / rows) ** 97**2)
    assert used.unique().numel() >= 0.95 * expected
    assert min(used.view(97, 97)[i].unique().numel() for i in range(97)) >= 0.75 * rows * (1 - (1 - 1 / rows) ** 97)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_mimetic_tokens_look_for_what_followed_their_like(n_kv_head):
    """The attention at the start, in a text without order in which every token comes twice. With --key-offset, a token's keys are half
    its own and half the token's before."""
    switches = dict(pos="rope", qk_norm=True, key_offset=True, n_kv_head=n_kv_head)
    config = VariantConfig(**SHAPE | dict(vocab_size=500, seq_len=64, n_head=4, n_embd=256), **switches)
    torch.manual_seed(0)
    plain = build(config)
    torch.manual_seed(0)
    mimetic = build(replace(config, mimetic_init=True))
    text = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:32]
    idx, found = torch.cat([text, text])[None], {}
    for name, model in (("plain", plain), ("mimetic", mimetic)):
        attn = model.transformer.h[0].attn
        rest = {name: p for name, p in model.state_dict().items() if "c_attn" not in name}
        assert all((rest[name] == p).all() for name, p in plain.state_dict().items() if name in rest)
        attn.attend = lambda q, k, *args, name=name: found.update({name: (q, k)}) or q
        model(idx)
        q, k = found[name]
        scores = (q @ k.repeat_interleave(4 // n_kv_head, 1).mT)[0, :: 4 // n_kv_head]  # (K, T, T), of each group's first head
        best = scores[:, 40:63, :33].argmax(-1)  # without the token itself and its neighbors
        hits = (best == torch.arange(40, 63) - 31).float().mean().item()  # the token after the first copy
        assert hits > 0.9 if name == "mimetic" else hits < 0.3


def ids_with_documents(config: VariantConfig) -> torch.Tensor:
    idx = ids_for(config)
    idx[0, [0, 7, 8, 20]] = idx[1, 11] = config.vocab_size - 1
    return idx


# ---- against transformers ----


def hugging_face(kind: str, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    plain = dict(vocab_size=97, num_hidden_layers=4, num_attention_heads=4, hidden_size=32, max_position_embeddings=24)
    plain |= dict(intermediate_size=88, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    model = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**plain | settings))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def copy_llama(model: GPT, hf: torch.nn.Module):
    """Copies the weights of hf, which has Llama's names, into model."""
    theirs, ours = hf.state_dict(), {}
    for layer in range(4):
        a, b = f"model.layers.{layer}.", f"transformer.h.{layer}."
        ours[b + "attn.c_attn.weight"] = torch.cat([theirs[f"{a}self_attn.{x}_proj.weight"] for x in "qkv"])
        ours[b + "attn.c_proj.weight"] = theirs[a + "self_attn.o_proj.weight"]
        ours[b + "ln_1.weight"], ours[b + "ln_2.weight"] = (
            theirs[a + "input_layernorm.weight"],
            theirs[a + "post_attention_layernorm.weight"],
        )
        if a + "mlp.gate.weight" in theirs:
            ours[b + "mlp.router.weight"] = theirs[a + "mlp.gate.weight"]
            for e in range(4):
                ours[f"{b}mlp.c_fc.{e}"] = theirs[a + "mlp.experts.gate_up_proj"][e]
                ours[f"{b}mlp.c_proj.{e}"] = theirs[a + "mlp.experts.down_proj"][e]
        else:
            ours[b + "mlp.c_fc.weight"] = torch.cat([theirs[a + "mlp.gate_proj.weight"], theirs[a + "mlp.up_proj.weight"]])
            ours[b + "mlp.c_proj.weight"] = theirs[a + "mlp.down_proj.weight"]
        if a + "self_attn.q_norm.weight" in theirs:
            ours[b + "attn.q_norm.weight"], ours[b + "attn.k_norm.weight"] = (
                theirs[a + "self_attn.q_norm.weight"],
                theirs[a + "self_attn.k_norm.weight"],
            )
    ours["transformer.ln_f.weight"] = theirs["model.norm.weight"]
    padding = (0, 0, 0, 128 - 97)
    ours["transformer.wte.weight"] = F.pad(theirs["model.embed_tokens.weight"], padding)
    ours["lm_head.weight"] = F.pad(theirs["lm_head.weight"], padding)
    model.load_state_dict(ours)


@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize(
    ("kind", "settings", "switches"),
    [
        ("Llama", dict(num_key_value_heads=4), {}),
        ("Llama", dict(num_key_value_heads=2), dict(n_kv_head=2)),
        ("Llama", dict(num_key_value_heads=1, rope_theta=500.0), dict(n_kv_head=1, rope_base=500.0)),
        (
            "Llama",
            dict(num_key_value_heads=4, rope_scaling=dict(rope_type="linear", factor=3.0)),
            dict(rope_scaling="linear", rope_factor=3.0),
        ),
        (
            "Llama",
            dict(num_key_value_heads=4, rope_scaling=dict(rope_type="yarn", factor=3.0, original_max_position_embeddings=8)),
            dict(rope_scaling="yarn", rope_factor=3.0),
        ),
        ("Mistral", dict(num_key_value_heads=2, sliding_window=5), dict(n_kv_head=2, window=5)),
        ("Qwen3", dict(num_key_value_heads=2, head_dim=8), dict(n_kv_head=2, qk_norm=True)),
        (
            "Mixtral",
            dict(num_key_value_heads=2, intermediate_size=44, num_local_experts=4, num_experts_per_tok=2, rope_theta=10000.0),
            dict(n_kv_head=2, n_expert=4, n_expert_active=2),
        ),
    ],
)
def test_logits_loss_and_gradients_equal_transformers(kind, settings, switches, attention):
    hf = hugging_face(kind, **settings)
    model = build(VariantConfig(**SHAPE | LLAMA | switches, attention=attention))
    copy_llama(model, hf)
    idx = ids_for(model.config)
    assert (model(idx)[0] - hf(idx).logits).abs().max() <= 1e-5 * max(1, hf(idx).logits.abs().max())
    loss, hf_loss = model(idx[:, :-1], idx[:, 1:])[1], hf(idx, labels=idx).loss
    assert abs(loss.item() - hf_loss.item()) <= 1e-5
    if kind != "Mixtral":  # our gradient includes the load-balancing loss
        loss.backward()
        hf_loss.backward()
        for layer in range(4):
            ours, theirs = model.transformer.h[layer], hf.model.layers[layer]
            assert (ours.mlp.c_proj.weight.grad - theirs.mlp.down_proj.weight.grad).abs().max() <= 1e-5
            assert (ours.ln_1.weight.grad - theirs.input_layernorm.weight.grad).abs().max() <= 1e-5
            expected = torch.cat([getattr(theirs.self_attn, f"{x}_proj").weight.grad for x in "qkv"])
            assert (ours.attn.c_attn.weight.grad - expected).abs().max() <= 1e-5


def test_rope_alone_equals_gpt_neox():
    hf = hugging_face(
        "GPTNeoX", intermediate_size=128, use_parallel_residual=False, hidden_act="gelu_new", layer_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0),
    )  # fmt: skip
    model, theirs, ours = build(VariantConfig(**SHAPE, pos="rope")), hf.state_dict(), {}
    for layer in range(4):
        a, b = f"gpt_neox.layers.{layer}.", f"transformer.h.{layer}."
        for end in ("weight", "bias"):
            qkv = theirs[f"{a}attention.query_key_value.{end}"]  # a head's query, key and value, then the next head's
            ours[f"{b}attn.c_attn.{end}"] = qkv.view(4, 3, 8, -1).transpose(0, 1).reshape(qkv.shape)
            for x, y in (("attn.c_proj", "attention.dense"), ("mlp.c_fc", "mlp.dense_h_to_4h"), ("mlp.c_proj", "mlp.dense_4h_to_h"),
                         ("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm")):  # fmt: skip
                ours[f"{b}{x}.{end}"] = theirs[f"{a}{y}.{end}"]
            ours[f"transformer.ln_f.{end}"] = theirs[f"gpt_neox.final_layer_norm.{end}"]
    ours["transformer.wte.weight"] = ours["lm_head.weight"] = F.pad(theirs["gpt_neox.embed_in.weight"], (0, 0, 0, 128 - 97))
    model.load_state_dict(ours)
    idx = ids_for(model.config)
    assert (model(idx)[0] - hf(idx).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("settings", "switches"),
    [
        (dict(activation_function="relu2"), dict(mlp="relu2")),
        (dict(activation_function="gelu"), dict(mlp="gelu_exact")),
        (dict(activation_function="gelu_pytorch_tanh"), {}),  # another name for gelu_new
        (dict(tie_word_embeddings=False), dict(tied_head=False)),
        (dict(embd_pdrop=0.3, resid_pdrop=0.3), dict(dropout=0.3)),
    ],
)
def test_gpt2_with_one_change_equals_transformers(settings, switches):
    model = randomized(**switches).train()
    settings = dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0) | settings
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_positions=24, n_embd=32, n_layer=4, n_head=4, **settings)
    ).train()
    state = model.state_dict()
    state = {name: p.t() if name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and p.dim() == 2 else p for name, p in state.items()}
    state |= {name: state[name][:97] for name in ("transformer.wte.weight", "lm_head.weight")}
    hf.load_state_dict(state)
    idx = ids_for(model.config)
    torch.manual_seed(1)  # both draw the same masks
    ours = model(idx)[0]
    torch.manual_seed(1)
    assert (ours - hf(idx).logits).abs().max() <= 1e-5


# ---- against plain formulas ----


def reference(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """One sequence (T,) → logits (T, V), for the switches that transformers does not have, by the formulas of their papers."""
    p, c = model.state_dict(), model.config
    x = p["transformer.wte.weight"][idx] + p["transformer.wpe.weight"][: len(idx)]
    pairs = [int(i) * (c.vocab_size + 1) + (int(idx[t - 1]) + 1 if t else 0) for t, i in enumerate(idx)]
    first = None
    for layer in range(c.n_layer):
        w = {n.removeprefix(f"transformer.h.{layer // c.share_layers}."): q for n, q in p.items()}
        if c.bigram:
            mixed = [(h := pair * 2654435769 % 2**32) ^ h // 2**16 for pair in pairs] if c.bigram < 97 * 98 else pairs
            x = x + p["bigram_scale"][layer] * p["transformer.bigram.weight"][[pair % c.bigram for pair in mixed]]
        h = F.layer_norm(x, (c.n_embd,), w["ln_1.weight"], w["ln_1.bias"])
        q, k, v = convolved(h @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"], w.get("attn.conv.weight")).chunk(3, -1)
        if c.value_residual:
            first = v if first is None else first
            v = (1 - p["value_scale"][layer]) * v + p["value_scale"][layer] * first
        heads = [
            (a @ b.T / a.size(1) ** 0.5).masked_fill(torch.ones(len(idx), len(idx)).triu(1).bool(), -torch.inf).softmax(-1) @ d
            for a, b, d in zip(q.split(8, 1), k.split(8, 1), v.split(8, 1), strict=True)
        ]
        if c.head_gate:
            gates = 2 / (1 + (-h[:, :12] @ w["attn.gate.weight"].T).exp())  # (T, H)
            heads = [gate[:, None] * head for gate, head in zip(gates.T, heads, strict=True)]
        x = x + torch.cat(heads, 1) @ w["attn.c_proj.weight"].T + w["attn.c_proj.bias"]
        h = convolved(F.layer_norm(x, (c.n_embd,), w["ln_2.weight"], w["ln_2.bias"]), w.get("conv.weight"))
        x = (
            x
            + F.gelu(h @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"], approximate="tanh") @ w["mlp.c_proj.weight"].T
            + w["mlp.c_proj.bias"]
        )
    x = F.layer_norm(x, (c.n_embd,), p["transformer.ln_f.weight"], p["transformer.ln_f.bias"])
    return (x @ p["lm_head.weight"].T)[:, : c.vocab_size]


def convolved(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """x (T, C) plus a causal depthwise convolution of it. weight: (width, C), the weight of the same position first."""
    if weight is None:
        return x
    width, C = weight.shape
    return x + F.conv1d(F.pad(x.T, (width - 1, 0)), weight.flip(0).T[:, None], groups=C).T


@pytest.mark.parametrize(
    "switches",
    [
        {},
        dict(value_residual=True),
        dict(share_layers=2),
        dict(value_residual=True, share_layers=4, tied_head=False),
        dict(short_conv=3),
        dict(head_gate=True),
        dict(bigram=500),
        dict(bigram=97 * 98, share_layers=2),
    ],
)
def test_logits_equal_plain_formula(switches):
    model = randomized(**switches)
    idx = ids_for(model.config, batch=1)
    assert (model(idx)[0][0] - reference(model, idx[0])).abs().max() <= 1e-5


def test_offset_keys_equal_plain_formula():
    """Of 8 channels, pair i is channels i and i + 4; pairs 2 and 3 rotate slowly."""
    k = torch.randn(2, 3, 5, 8)
    shifted = offset_keys(k, Past())
    for t in range(5):
        for channel in range(8):
            is_slow = channel % 4 >= 2
            expected = k[:, :, t, channel] if not is_slow else k[:, :, t - 1, channel] if t else torch.zeros(2, 3)
            assert torch.equal(shifted[:, :, t, channel], expected)


def test_no_bias_equals_zero_bias():
    plain, without = randomized(), build(VariantConfig(**SHAPE, bias=False))
    for name, p in plain.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(p)
    without.load_state_dict({name: p for name, p in plain.state_dict().items() if not name.endswith("bias")})
    idx = ids_for(plain.config)
    assert (without(idx)[0] - plain(idx)[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("switches", [{}, dict(rope_scaling="ntk", rope_factor=4.0), dict(rope_scaling="yarn", rope_factor=4.0)])
def test_rope_depends_only_on_distance(switches):
    torch.manual_seed(0)
    config = VariantConfig(**SHAPE, pos="rope", **switches)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    positions = torch.arange(24)
    cos, sin = rotation_of(positions, config)
    turned_q, turned_k = (rotate(x.expand(1, 1, 24, 8), cos, sin)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(-23, 24):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() <= 1e-5
    model = randomized(pos="rope", **switches)
    idx = ids_for(model.config, length=12)
    shifted = torch.arange(7, 19).expand(3, 12)
    mask = causal_mask(12, 12, "cpu").expand(3, 1, 12, 12)
    assert (model.hidden_states(idx, positions=shifted, mask=mask) - model.hidden_states(idx)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("scaling", "base", "trained"), [("none", 1e4, 2048), ("linear", 1e4, 2048), ("yarn", 1e4, 2048), ("yarn", 10.0, 676)]
)
def test_rope_angles_equal_llama(scaling, base, trained):
    """With a base of 10, yarn's slow end is beyond the last pair."""
    factor = 1.0 if scaling == "none" else 4.0
    config = VariantConfig(97, 4 * trained, 1, 1, 64, pos="rope", rope_base=base, rope_scaling=scaling, rope_factor=factor)
    how = dict(rope_type=scaling, factor=4.0, original_max_position_embeddings=trained) if scaling != "none" else dict(rope_type="default")
    theirs = LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=64, num_attention_heads=1, max_position_embeddings=4 * trained, rope_parameters=dict(rope_theta=base) | how
        )
    )
    positions = torch.arange(500)
    for ours, hf in zip(rotation_of(positions, config), theirs(torch.zeros(1), positions[None]), strict=True):
        assert (ours - hf[0, :, :32]).abs().max() <= 1e-4


def test_ntk_slows_only_the_slow_pairs():
    """bloc97, 2023: the new base slows the slowest pair of channels by the whole factor, and the fastest not at all."""
    one = torch.tensor([1])
    plain, ntk = (rotation_of(one, VariantConfig(**SHAPE, pos="rope", **s)) for s in ({}, dict(rope_scaling="ntk", rope_factor=4.0)))
    angles = [torch.atan2(sin, cos)[0] for cos, sin in (plain, ntk)]
    assert angles[0][0] == angles[1][0]
    assert (angles[0][-1] / angles[1][-1]).item() == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize(("pattern", "reach"), [("S", [4, 4]), ("SL", [4, 11]), ("LS", [4, 11]), ("L", [11, 11])])
@pytest.mark.parametrize("attention", ["flash", "manual"])
def test_queries_see_exactly_their_window(pattern, reach, attention):
    """The gradient shows which positions one layer sees, and which two layers see together."""
    for n_layer, expected in ((1, 4 if pattern[0] == "S" else 11), (2, 11 if "L" in pattern else 7)):
        torch.manual_seed(0)
        model = build(VariantConfig(50, 11, n_layer, 2, 16, attention, window=4, window_pattern=pattern))
        embedded = []
        model.transformer.wte.register_forward_hook(lambda module, args, out, e=embedded: e.append(out.requires_grad_()) or out)
        logits = model(ids_for(model.config, batch=1))[0]
        for t in range(11):
            (grad,) = torch.autograd.grad(logits[0, t].sum(), embedded[0], retain_graph=True)
            seen = grad[0].abs().sum(-1) > 0
            assert seen.tolist() == [max(0, t - expected + 1) <= s <= t for s in range(11)]


@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize("switches", [{}, dict(window=5), dict(short_conv=4, key_offset=True, bigram=97 * 98)])
def test_documents_do_not_see_each_other(attention, switches):
    model = randomized(attention=attention, doc_mask=True, pos="rope", **switches)
    idx = ids_with_documents(model.config)
    logits = model(idx)[0]
    for row, bounds in ((0, [0, 7, 8, 20, 24]), (1, [0, 11, 24]), (2, [0, 24])):
        for start, end in pairwise(bounds):
            assert (logits[row, start:end] - model(idx[row : row + 1, start:end])[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("window", [1, 3, 64, 70, 200, 1000])
@pytest.mark.parametrize("T", [65, 513])
def test_blockwise_attention_with_window_equals_formula(T, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, T, 8, requires_grad=True) for _ in range(3))
    dy = torch.randn(1, 2, T, 8)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill((distance < 0) | (distance >= window), -torch.inf)
    plain, ours = scores.softmax(-1) @ v, BlockwiseAttention.apply(q, k, v, window)
    assert (ours - plain).abs().max() <= 1e-5
    for expected, grad in zip(torch.autograd.grad(plain, (q, k, v), dy), torch.autograd.grad(ours, (q, k, v), dy), strict=True):
        assert (grad - expected).abs().max() <= 1e-5


# ---- experts ----


def test_load_balancing_equals_transformers_without_changing_the_loss():
    model = randomized(n_expert=4, n_expert_active=2, n_layer=1)
    idx = ids_for(model.config)
    logits = []
    model.transformer.h[0].mlp.router.register_forward_hook(lambda module, args, out: logits.append(out))
    loss = model(idx, idx)[1]
    balance = model.hidden_states_and_balance(idx)[1]
    # transformers counts per token, we per choice, two for each token
    assert balance.item() == pytest.approx(load_balancing_loss_func((logits[0],), 4, 2).item() / 2, rel=1e-5)
    assert loss.item() == pytest.approx(F.cross_entropy(model(idx)[0].flatten(0, 1), idx.flatten()).item(), rel=1e-6)
    plain = replace(model.config, load_balance=0.0)
    (grad,) = torch.autograd.grad(loss, model.transformer.h[0].mlp.router.weight)
    model.config = plain
    (without,) = torch.autograd.grad(model(idx, idx)[1], model.transformer.h[0].mlp.router.weight)
    (of_balance,) = torch.autograd.grad(model.hidden_states_and_balance(idx)[1], model.transformer.h[0].mlp.router.weight)
    assert of_balance.abs().max() > 1e-4
    assert (grad - without - 0.01 * of_balance).abs().max() <= 1e-6


@pytest.mark.parametrize("active", [1, 2])
def test_experts_drop_no_token(active):
    """Even if the router sends most tokens to the same experts."""
    torch.manual_seed(0)
    moe = MixtureOfExperts(VariantConfig(**SHAPE, n_expert=4, n_expert_active=active))
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2)
    torch.nn.init.zeros_(moe.router.weight)
    x = torch.randn(2, 5, 32)
    moe.router.weight.data[1:3] = torch.tensor([[2.0], [1.0]]) * x.mean((0, 1))
    y, balance = moe(x)
    for row, out in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        probs = F.softmax(moe.router.weight @ row, 0)
        best = probs.argsort(descending=True)[:active].tolist()
        parts = [probs[e] * (moe.c_proj[e] @ F.gelu(moe.c_fc[e] @ row, approximate="tanh")) for e in best]
        expected = sum(parts) / (probs[best].sum() if active > 1 else 1)
        assert (out - expected).abs().sum() <= 1e-4
    assert balance >= 0.99


def test_every_parameter_has_gradient_with_one_layer():
    """Training on several processes fails if a parameter has no gradient."""
    model = randomized(n_layer=1, value_residual=True)
    idx = ids_for(model.config)
    model(idx, idx)[1].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_active_and_total_expert_parameters():
    dense, experts = build(VariantConfig(**SHAPE)), build(VariantConfig(**SHAPE, n_expert=8, n_expert_active=2))
    routers = 4 * 8 * 32
    mlps = 4 * 2 * 4 * 32 * 32
    biases = 4 * 5 * 32
    assert experts.num_params() == dense.num_params() + routers + 3 * mlps - biases
    assert experts.num_params() - idle_params(experts) == dense.num_params() + routers - biases


def test_parameters_and_flops_by_hand():
    """Counts six per active weight each time it is used, and twelve per channel and position seen (Chowdhery et al., 2022)."""
    model = build(VariantConfig(**SHAPE, pos="rope", bias=False, norm="rmsnorm", tied_head=False, share_layers=2, n_kv_head=2, window=5,
                          window_pattern="SSSL", n_expert=4, n_expert_active=2, mlp="swiglu"))  # fmt: skip
    attention, router, expert = 32 * (32 + 2 * 16) + 32 * 32, 4 * 32, 3 * 32 * 44
    block = attention + router + 4 * expert + 2 * 32
    assert model.num_params() == 2 * block + 32 + 2 * 97 * 32
    assert model.num_params() - idle_params(model) == 2 * (block - 2 * expert) + 32 + 2 * 97 * 32
    weights_used = 4 * (block - 2 * expert) + 32 + 128 * 32
    assert flops_per_token(model) == 6 * weights_used + 12 * 32 * (5 + 5 + 5 + 24)


# ---- every variant ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_positions_equal_full_forward_pass(variant):
    model = randomized(**VARIANTS[variant])
    idx = ids_with_documents(model.config)
    with torch.no_grad():
        expected = model(idx)[0]
        for pieces in ([1] * 24, [5, 1, 1, 9, 8], [24], [3, 21]):
            for slack in (0, 3):
                cache = KVCache(24, slack)
                logits = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)], 1)
                assert cache.length == 24
                assert (logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_forgets_when_its_length_is_lowered(variant):
    """Does what speculative decoding does: tries some positions, takes back the last of them, and continues with others."""
    model = randomized(**VARIANTS[variant])
    idx = ids_with_documents(model.config)
    other = idx.flip(0)
    with torch.no_grad():
        cache, parts = KVCache(24, slack=3), [0] * 24
        for start, keep in ((0, 10), (10, 2), (12, 1), (13, 4), (17, 1), (18, 4), (22, 2)):
            tried = torch.cat([idx[:, start : start + keep], other[:, start + keep : start + max(keep, 4)]], 1)
            logits = model(tried, cache=cache)[0]
            cache.length = start + keep
            parts[start : start + keep] = logits[:, :keep].unbind(1)
        assert (torch.stack(parts, 1) - model(idx)[0]).abs().max() <= 1e-5


def test_cache_size_follows_heads_and_windows():
    def size(**switches):
        model, cache = build(VariantConfig(**SHAPE, **switches)), KVCache(24)
        model(ids_for(model.config), cache=cache)
        return cache.nbytes()

    plain = 2 * 4 * 3 * 24 * 32 * 4  # keys and values, layers, batch, positions, channels, bytes
    assert size() == plain
    assert size(n_kv_head=2) == plain // 2
    assert size(n_kv_head=1) == plain // 4
    assert size(window=6) == plain // 4
    assert size(window=6, window_pattern="SSSL") == plain * (3 * 6 + 24) // (4 * 24)


def loss_and_gradients(model: GPT, idx: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(idx, idx)[1]
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_manual_attention_inference_copy_and_recomputation_equal_plain(variant):
    model = randomized(**VARIANTS[variant])
    idx = ids_with_documents(model.config)
    loss, grads = loss_and_gradients(model, idx)
    model.config.attention = "manual"
    set_attention(model)
    with torch.no_grad():
        assert (model(idx, idx)[1] - loss).abs() <= 1e-5
        assert (inference_copy(model)(idx)[0] - model(idx)[0]).abs().max() <= 1e-4
    model.config.attention = "flash"
    set_attention(model)
    recompute_activations(model)
    for again, grad in zip(loss_and_gradients(model, idx)[1], grads, strict=True):
        assert (again - grad).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["modern", "many at once"])
def test_compiled_variant_equals_eager(variant):
    model = randomized(**VARIANTS[variant])
    idx = ids_with_documents(model.config)
    loss, grads = loss_and_gradients(model, idx)
    torch._dynamo.reset()  # else the compiles of other tests count against the limit
    compile_blocks(model)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled, compiled_grads = loss_and_gradients(model, idx)
        with torch.no_grad():
            assert (model(idx, idx)[1] - loss).abs() <= 1e-5
    assert (compiled - loss).abs() <= 1e-5
    for again, grad in zip(compiled_grads, grads, strict=True):
        assert (again - grad).abs().max() <= 2e-5


@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize("variant", ["window", "pattern", "documents", "documents in windows"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same_positions(variant, attention):
    """Runs CUDA's code path on the CPU, unfused."""
    model = randomized(**VARIANTS[variant] | {"attention": attention})
    idx = ids_with_documents(model.config)
    with torch.no_grad():  # FlexAttention has no gradient on a CPU
        expected = model(idx)[0]
        model.flex = True
        masks = model.masks(idx, None, torch.arange(24), None).values()
        assert any(isinstance(mask, BlockMask) for mask in masks) == (attention == "flash")
        assert (model(idx)[0] - expected).abs().max() <= 1e-5


def test_flex_attention_skips_fully_masked_blocks():
    """Compares the block masks, in blocks of 128 positions: the CPU's results would not show which blocks it skips."""
    starts = torch.zeros(2, 512, dtype=torch.long)
    starts[0, [100, 400]] = starts[1, 256] = 1
    documents = starts.cumsum(1)
    for window, numbers in ((100, None), (None, documents), (150, documents)):
        seen = causal_mask(512, 512, "cpu", window).expand(2, 1, 512, 512)
        if numbers is not None:
            seen = seen & (numbers[:, None, :, None] == numbers[:, None, None, :])
        blocks = seen.unflatten(3, (4, 128)).unflatten(2, (4, 128)).any(5).any(3)
        assert (block_mask(512, window, numbers, "cpu").to_dense().expand(2, 1, 4, 4) == blocks.int()).all()


# ---- errors ----


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (dict(n_kv_head=3), "n_head 4 is not a multiple of n_kv_head 3"),
        (dict(n_kv_head=0), "n_kv_head is 0"),
        (dict(n_embd=20, pos="rope"), "pos rope rotates pairs of channels: n_embd 20 / n_head 4 must be even"),
        (dict(window=0), "window is 0"),
        (dict(window_pattern="SL"), "window_pattern SL needs a window, which is None"),
        (dict(rope_base=500.0), "rope_base 500.0 needs pos rope, not learned"),
        (dict(rope_base=1.0, pos="rope"), "rope_base is 1.0: it must be from 2"),
        (dict(rope_factor=1e308, pos="rope", rope_scaling="ntk"), "rope_factor is 1e\\+308: it must be from 1"),
        (dict(n_expert=10_000), "n_expert is 10000: it must be at most 1024"),
        (dict(window_pattern="SX", window=3), "window_pattern is 'SX'"),
        (dict(window_pattern=""), "window_pattern is ''"),
        (dict(n_expert=2, n_expert_active=3), "n_expert_active 3 is more than n_expert 2"),
        (dict(share_layers=3), "n_layer 4 is not a multiple of share_layers 3"),
        (dict(rope_scaling="yarn", rope_factor=2.0), "rope_scaling yarn needs pos rope, not learned"),
        (dict(rope_scaling="yarn", pos="rope"), "set both or neither"),
        (dict(rope_factor=2.0, pos="rope"), "set both or neither"),
        (dict(rope_base=0.5), "rope_base is 0.5"),
        (dict(load_balance=float("nan")), "load_balance is nan"),
        (dict(pos="alibi"), "pos is 'alibi': choose learned or rope"),
        (dict(qk_norm=1), "qk_norm is 1: it must be a bool"),
        (dict(window=2.5), "window is 2.5"),
    ],
)
def test_invalid_combination_is_refused(switches, message):
    with pytest.raises(ValueError, match=message):
        build(VariantConfig(**SHAPE | switches))


YARN, LINEAR = (dict(rope_scaling=scaling, rope_factor=3.0) for scaling in ("yarn", "linear"))


@pytest.mark.parametrize(
    ("kind", "switches"),
    [
        ("GPT2LMHeadModel", dict(tied_head=False, mlp="relu2", share_layers=2)),
        ("GPT2LMHeadModel", dict(bias=False, mlp="gelu_exact")),  # with biases of 0
        ("GPTNeoXForCausalLM", dict(pos="rope", mlp="gelu_exact")),
        ("GPTNeoXForCausalLM", dict(pos="rope", bias=False, share_layers=2)),
        ("GPTNeoXForCausalLM", dict(pos="rope", tied_head=False, rope_base=500.0, share_layers=2)),
        ("GPTNeoXForCausalLM", dict(pos="rope", mlp="relu2") | YARN),
        ("LlamaForCausalLM", LLAMA),
        ("LlamaForCausalLM", LLAMA | dict(n_kv_head=2, tied_head=True, rope_base=500.0, share_layers=2)),
        ("LlamaForCausalLM", LLAMA | dict(n_kv_head=1, rope_base=10.0) | YARN),
        ("LlamaForCausalLM", LLAMA | LINEAR),
        ("GPT2LMHeadModel", dict(n_kv_head=4, window=24, window_pattern="SL")),  # the same as GPT-2: no window is shorter than seq_len
        ("MistralForCausalLM", LLAMA | dict(window=5, n_kv_head=2)),
        ("Qwen3ForCausalLM", LLAMA | dict(qk_norm=True, n_kv_head=2, rope_base=500.0)),
        ("Qwen3ForCausalLM", LLAMA | dict(qk_norm=True, window=5, window_pattern="SSL", tied_head=True)),
        ("MixtralForCausalLM", LLAMA | dict(n_expert=4, n_expert_active=2, n_kv_head=2)),
        ("MixtralForCausalLM", LLAMA | dict(n_expert=5, n_expert_active=2, window=5)),
    ],
)
def test_saved_variant_loads_in_transformers(tmp_path, kind, switches):
    model = randomized(**switches).eval()
    model.save_pretrained(tmp_path)
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert type(hf).__name__ == kind and not any(info.values()), info
    idx = ids_for(model.config)
    expected = model(idx)[0]
    assert (hf.eval()(idx).logits - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    if kind.startswith("GPT2"):
        assert (GPT.from_pretrained(tmp_path)(idx)[0] == expected).all()


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (dict(pos="rope", n_kv_head=2), "the nearest, GPTNeoX, differs in n_kv_head 2\\): keep it"),
        (dict(qk_norm=True), "the nearest, GPT2, differs in qk_norm True"),
        (LLAMA | dict(n_expert=2, n_expert_active=1), "the nearest, Mixtral, differs in n_expert_active 1"),
        (LLAMA | dict(window=5, window_pattern="SL"), "the nearest, Mistral, differs in window_pattern SL"),
        (dict(pos="rope", rope_scaling="ntk", rope_factor=2.0), "the nearest, GPTNeoX, differs in rope_scaling ntk"),
        (dict(doc_mask=True, value_residual=True), "differs in doc_mask True, value_residual True\\): keep it"),
    ],
)
def test_unsupported_variant_is_not_saved(tmp_path, switches, message):
    with pytest.raises(ValueError, match=message):
        build(VariantConfig(**SHAPE | switches)).save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_all_errors_are_listed_at_once():
    errors = VariantConfig(
        **SHAPE | dict(n_kv_head=3, n_expert_active=3, window_pattern="", window=0, rope_factor=2.0, load_balance=torch.inf)
    ).errors()
    assert len(errors) == 6
    assert len(VariantConfig(n_layer="2", mlp="relu", bias=None).errors()) == 3


@pytest.mark.parametrize(
    "switches", [dict(window=3), dict(window=3, window_pattern="SL"), dict(doc_mask=True), dict(seq_len=12), dict(attention="manual")]
)
@pytest.mark.parametrize("variant", ["gpt2", "untied", "window"])
def test_adapted_model_computes_the_new_config(switches, variant):
    """Fine-tuning may turn on a switch that GPT does not have."""
    model = randomized(**VARIANTS[variant])
    config = replace(model.config, **switches)
    expected = build(config)
    state = model.state_dict()
    expected.load_state_dict(state | {"transformer.wpe.weight": state["transformer.wpe.weight"][: config.seq_len]})
    adapted = adapt(model, config)
    idx = ids_with_documents(model.config)[:, :12]
    assert (adapted(idx)[0] == expected(idx)[0]).all() and adapted.num_params() == expected.num_params()
    assert vars(adapted.config) == vars(config) and all(p.requires_grad for p in adapted.parameters())


def test_gpt_refuses_switches_that_it_would_ignore():
    with pytest.raises(ValueError, match=r"pos 'rope' is not in GPT-2: use variants.build"):
        GPT(VariantConfig(**SHAPE, pos="rope"))


def test_built_models_can_be_pickled():
    model = randomized(window=5)
    idx = ids_for(model.config)
    assert (pickle.loads(pickle.dumps(model))(idx)[0] == model(idx)[0]).all()
