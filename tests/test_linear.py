"""Linear layers: every way to compute one gives nn.Linear's result, and the choice between them."""

import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import run_main, run_train, save_checkpoint
from test_variants import SHAPE, VARIANTS
from torch import nn

import sample
from ops import choice, linear
from ops.attention import fused_attention
from sample import generate
from variants import VariantConfig, build, inference_copy, prepare_compiled_token, set_precision

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.setattr(choice, "chosen", {})
    monkeypatch.delenv(choice.FORCE, raising=False)


def random_linear(n_in: int, n_out: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(n_in, n_out, bias)


# ---- every way ----


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("dtype", "way"), [(d, w) for d in (FP32, BF16) for w in linear.MULTIPLY])
def test_every_way_equals_linear(dtype, way, rows, bias, gelu):
    layer, x = random_linear(48, 80, bias), torch.randn(1, rows, 48)
    expected = layer.double()(x.double())
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    with torch.no_grad():
        y = linear.InferenceLinear(layer.float(), dtype, way, gelu)(x)
    assert y.shape == (1, rows, 80) and y.dtype == dtype
    assert (y - expected).norm() / expected.norm() < (1e-6 if dtype == FP32 else 6e-3)


@pytest.mark.parametrize("inputs", [64, 80, 88])
@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_int8_linear_equals_its_formula(rows, dtype, inputs):
    layer, x = random_linear(inputs, 97).to(dtype), torch.randn(1, rows, inputs).to(dtype)
    layer.weight.data[5] = 0
    eight = linear.Int8Linear(layer)
    weight = eight.scale.double()[:, None] * eight.weight.double()
    with torch.no_grad():
        y, expected = eight(x), x.double() @ weight.t() + layer.bias.double()
    assert (y - expected).norm() / expected.norm() < 6e-3 and y.dtype == dtype
    largest = layer.weight.double().abs().amax(1, keepdim=True)
    assert ((weight - layer.weight.double()).abs() <= 0.505 * largest / 127 + 1e-9).all()  # half a step, and the scale's rounding
    assert eight.weight.abs().amax(1).ne(127).sum() <= 1 and not weight[5].any()  # only the row of zeros doesn't use all of the range


@pytest.mark.parametrize("way", ["loop", "library", "mv"])
def test_compiled_row_traces_every_way(way):
    layer, x = random_linear(48, 80), torch.randn(1, 1, 48)
    layer.__class__, layer.way = linear.RowLinear, way
    with torch.no_grad():
        y = torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)(x)
        assert torch.allclose(y, nn.Linear.forward(layer, x), atol=1e-6)


@pytest.mark.parametrize("way", ["loop", "library", "mv"])
def test_compiled_row_obeys_autocast(way):
    """A text's first pass isn't compiled: the cache has its dtype."""
    layer, x = random_linear(48, 80), torch.randn(1, 1, 48)
    layer.__class__, layer.way = linear.RowLinear, way
    with torch.no_grad(), torch.autocast("cpu", BF16):
        y = torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)(x)
        assert torch.equal(y, layer(x)) and y.dtype == BF16


@pytest.mark.parametrize("rows", [1, 17])
def test_int8_keeps_the_dtype_in_autocast(rows):
    with torch.no_grad(), torch.autocast("cpu", BF16):
        assert linear.Int8Linear(random_linear(48, 80))(torch.randn(rows, 48)).dtype == FP32


@pytest.mark.parametrize(("way", "inputs"), [("loop", 48), ("library", 48), ("library", 40)])
def test_compiled_int8_row_traces_every_way(way, inputs):
    layer, x = linear.Int8Linear(random_linear(inputs, 80)), torch.randn(1, 1, inputs)
    layer.way = way
    with torch.no_grad():
        y = torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)(x)
        expected = F.linear(x, layer.weight * layer.scale[:, None].float(), layer.bias)
    assert (y - expected).norm() / expected.norm() < (1e-6 if way == "loop" else 6e-3)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_one_query_equals_many(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 16).to(dtype) for _ in "qkv")
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    with torch.no_grad():
        found = torch.cat([fused_attention(q[:, :, i : i + 1], k, v, mask[i : i + 1]) for i in range(9)], dim=2)
    assert found.dtype == dtype and (found - expected).abs().max() < (1e-6 if dtype == FP32 else 0.01)


# ---- the choice ----


def sleep_ways(**seconds):
    return {name: partial(time.sleep, each) for name, each in seconds.items()}


def test_fastest_way_wins_by_a_margin():
    assert choice.fastest("x", sleep_ways(first=0.004, second=0.001)) == "second" and choice.chosen == {"x": "second"}
    assert choice.fastest("x", sleep_ways(first=0.00105, second=0.001), passes=1) == "first"


def test_trial_happens_once_for_large_layers(monkeypatch):
    tried = []
    monkeypatch.setattr(choice, "fastest", lambda what, ways: tried.append((what, list(ways))) or choice.chosen.update({what: "library"}))
    layers = [random_linear(32, 64) for _ in range(3)]
    assert linear.fastest_way(layers, FP32, 1) is None and linear.fastest_way(layers, FP32, 1024) == "onednn" and not tried
    monkeypatch.setattr(linear, "TRIAL_BYTES", 4 * 32 * 64)
    for _ in range(2):
        assert linear.fastest_way(layers, FP32, 1) == "library"
    assert tried == [("row float32", ["onednn", "library", "mv"])]
    assert linear.fastest_way(layers, BF16, 8) == "library" and tried[1] == ("rows bfloat16", ["packed", "library"])
    assert linear.fastest_way(layers, torch.float16, 1) is None


def test_run_never_tries(monkeypatch):
    monkeypatch.setattr(linear, "TRIAL_BYTES", 1)
    monkeypatch.setattr(choice, "fastest", None)
    with choice.defaults():
        assert linear.fastest_way([random_linear(32, 64)], FP32, 1) == "onednn"
        assert linear.fastest_way([random_linear(32, 64)], BF16, 8) == "packed"
    assert choice.may_try and not choice.chosen


def test_samples_during_training_never_try(monkeypatch, capsys, shards, tmp_path):
    monkeypatch.setattr(linear, "TRIAL_BYTES", 1)
    monkeypatch.setattr(choice, "fastest", None)
    assert run_train(shards, tmp_path, "--max-steps", 1, "--sample-every", 1, "--sample-tokens", 2) == 0
    assert "step 1: sample:" in (printed := capsys.readouterr()).out and "no samples" not in printed.err


def test_environment_forces_a_way(monkeypatch):
    monkeypatch.setenv(choice.FORCE, "row=mv rows=library compiled_row=library")
    model = build(VariantConfig(**SHAPE))
    assert inference_copy(model, rows=1).lm_head.way == "mv" and inference_copy(model).lm_head.way == "library"
    prepare_compiled_token(model)
    assert model.lm_head.way == "library"


def test_unknown_forced_way_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(choice.FORCE, "row=fast")
    path = save_checkpoint(tmp_path, 1, build(VariantConfig(**SHAPE | {"vocab_size": 257})), "bytes", None, {})
    assert run_main(sample.main, "-m", path) == 2
    assert capsys.readouterr().err.strip() == "error: " + (
        f"{choice.FORCE} has row=fast: use row=library|onednn|packed|mv, rows=library|onednn|packed, compiled_row=loop|library|mv, "
        "attention=blockwise|fused"
    )


def test_training_names_an_unknown_way(monkeypatch, capsys, shards, tmp_path):
    """torch.compile would swallow the error, and leave each block eager."""
    monkeypatch.setenv(choice.FORCE, "attention=fast")
    assert run_train(shards, tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {choice.FORCE} has attention=fast: use ")


# ---- models ----


@pytest.mark.parametrize("way", ["library", "onednn", "packed", "mv"])
@pytest.mark.parametrize("variant", ["gpt2", "modern", "experts"])
def test_every_way_generates_the_same_ids(monkeypatch, variant, way):
    torch.manual_seed(0)
    model = build(VariantConfig(**SHAPE | VARIANTS[variant])).eval()
    idx = torch.arange(8).view(2, 4)[: 1 if way == "mv" else 2]
    expected = generate(model, idx, 12, temperature=0)
    monkeypatch.setenv(choice.FORCE, f"row={way} rows={'library' if way == 'mv' else way}")
    assert inference_copy(model, 1) is not model
    assert torch.equal(generate(model, idx, 12, temperature=0), expected)


@pytest.mark.parametrize("variant", ["gpt2", "modern", "experts"])
def test_quantized_model_stays_close(variant):
    torch.manual_seed(0)
    model = build(VariantConfig(**SHAPE | VARIANTS[variant])).eval()
    idx = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model(idx)[0]
        set_precision(model, "int8")
        found = model(idx)[0]
    kept = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(kept) == (SHAPE["n_layer"] if variant == "experts" else 0)  # routers
    assert inference_copy(model) is model and 0 < (found - expected).norm() / expected.norm() < 0.02
    assert generate(model, idx, 4, temperature=0).shape == (2, 16)
