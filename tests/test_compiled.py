"""The self-check that every compiled run begins with."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ids_for, read_stream, run_train

import model as model_module
import self_check
from model import GPT, GPTConfig

FP32 = torch.float32


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile traces, and no C++ is compiled."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend="aot_eager", **how))
    torch._dynamo.reset()


def damage_compiled_gelu(monkeypatch, factor: float):
    monkeypatch.setitem(
        model_module.ACTIVATIONS, "gelu", lambda x: F.gelu(x, approximate="tanh") * (factor if torch.compiler.is_compiling() else 1)
    )


@pytest.mark.parametrize("factor", [1.3, float("nan")])
def test_failed_self_check_trains_eagerly(quick_compile, monkeypatch, shards, tmp_path, capsys, factor):
    damage_compiled_gelu(monkeypatch, factor)
    assert run_train(shards, tmp_path / "compiled", "--compile") == 0
    err = capsys.readouterr().err
    assert err.count("self-check failed") == 1 and "trains without torch.compile" in err
    assert run_train(shards, tmp_path / "eager") == 0
    assert read_stream(tmp_path / "compiled", "train") == read_stream(tmp_path / "eager", "train")


def test_self_check_of_right_code_changes_nothing(quick_compile, shards, tmp_path, capsys):
    for name, flag in (("checked", "--self-check"), ("unchecked", "--no-self-check")):
        assert run_train(shards, tmp_path / name, "--compile", flag, "--max-steps", 3) == 0
    assert "self-check" not in capsys.readouterr().err
    assert read_stream(tmp_path / "checked", "train") == read_stream(tmp_path / "unchecked", "train")


def test_no_self_check_skips_it(quick_compile, monkeypatch, shards, tmp_path, capsys):
    damage_compiled_gelu(monkeypatch, 1.3)
    assert run_train(shards, tmp_path / "run", "--compile", "--no-self-check", "--max-steps", 1) == 0
    assert "self-check" not in capsys.readouterr().err


def test_self_check_names_what_went_wrong_first(quick_compile):
    """A gradient that is wrong in one place is wrong in all that comes after it, going backward."""
    model = GPT(GPTConfig(97, 32, 3, 2, 32))
    model.compile_blocks()
    idx = ids_for(model.config)
    assert self_check.differences(model, lambda: model(idx, idx)[1], FP32) == {}

    def wrong(x):
        return F.gelu(x, approximate="tanh") + (x - x.detach() if torch.compiler.is_compiling() else 0)

    model.transformer.h[1].mlp.activation = wrong
    found = self_check.differences(model, lambda: model(idx, idx)[1], FP32)
    assert next(iter(found)) == "the gradient of transformer.h.1.mlp.c_fc.bias"
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("switches", "layers"),
    [({}, 2), (dict(window=8), 2), (dict(window=8, window_pattern="SSSL"), 4), (dict(window=8, window_pattern="LS"), 2)],
)
def test_self_check_runs_a_layer_of_each_kind(switches, layers):
    model = GPT.on_meta(GPTConfig(97, 32, 12, 2, 32, **switches))
    with self_check.first_of_each_kind(model):
        assert len(model.config.windows) == layers
    assert model.config.n_layer == 12
