"""Compares a compiled training step with the same step run eagerly. Tests the self-check that begins every compiled run."""

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, THOROUGH, TINY, forked, ids_for, read_stream, run_train, trace_only
from test_variants import VARIANTS
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from common import device
from model import GPT
from ops import linear
from ops.kv_cache import KVCache
from sample import compiled_step
from training import self_check
from training.compiling import compile_blocks
from variants import SWITCHES, VariantConfig, build, build_on_meta

BF16, FP32 = torch.bfloat16, torch.float32
LARGEST = {BF16: 0.03, FP32: 2e-5}  # largest ‖compiled - eager‖ / ‖eager‖ of a gradient: three times the rounding we measured
M_PERTURB, ALL_ONES = -6, 0x100  # for mallopt: malloc fills new memory with 0xff bytes, a NaN in every float format


@pytest.fixture
def poisoned_memory():
    """Fills new memory with NaN, so that a read before a write shows."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc's malloc can fill memory")
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_PERTURB, ALL_ONES)
    assert torch.empty(1000).isnan().all() and torch.empty(10**6, dtype=BF16).isnan().all()
    yield
    mallopt(M_PERTURB, 0)


# ---- gradients ----


def check_parity(shape: VariantConfig, dtype: torch.dtype, batch: int, activation_memory: float = 1.0):
    """Compares the loss and every parameter's gradient, compiled and eager."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # else the compiles of other tests count against the limit
    model = build(shape)
    idx = ids_for(shape, batch)
    idx[:, ::70] = shape.vocab_size - 1  # documents begin here, longer than a window
    with (
        self_check.first_of_each_kind(model),
        functorch_config.patch(activation_memory_budget=1.0),  # restores the budget afterwards
        inductor_config.patch(fallback_random=True),  # the same dropout as eager
    ):
        loss, expected = gradients(model, idx, dtype)
        compile_blocks(model, activation_memory)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            compiled, found = gradients(model, idx, dtype)
    assert compiled == pytest.approx(loss, rel=1e-4 if dtype == BF16 else 1e-6)
    total = sum(g.square().sum() for g in expected.values()).sqrt()
    off = {name: ((found[name] - g).norm() / (g.norm() + 1e-3 * total)).item() for name, g in expected.items()}
    largest = LARGEST[dtype] if shape.n_expert == 1 else 0.2  # rounding may send a token to another expert
    assert {name: x for name, x in off.items() if not x <= largest} == {}


def gradients(model: GPT, idx: torch.Tensor, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype) if dtype != FP32 else nullcontext():
        loss = model(idx, idx.roll(-1, 1))[1]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


BATCHES, LENGTHS, HEAD_SIZES = (1, 2, 8), (128, 256, 1024), (16, 32, 64)
SQUARE = [(BATCHES[i], LENGTHS[j], HEAD_SIZES[(i + j) % 3]) for i in range(3) for j in range(3)]  # a Latin square: each pair of values once
DIAGONAL = SQUARE[::4]  # each value once
STEPS = [
    *((BF16, "flash", *row) for row in (SQUARE if THOROUGH else DIAGONAL)),
    *((FP32, "flash", *row) for row in DIAGONAL),
    *((dtype, "manual", *row) for dtype, row in zip((BF16, FP32, BF16), DIAGONAL, strict=True)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "attention", "batch", "length", "head_size"), STEPS)
def test_compiled_step_has_eager_gradients(poisoned_memory, dtype, attention, batch, length, head_size):
    check_parity(VariantConfig(97, length, 1, 4, 4 * head_size, attention), dtype, batch)


# Compiling takes 20 s, so each row turns on several switches. Switches that can share a kernel meet with all four of their pairs of
# values: those around the attention with each other and with the bias, the MLP's with the bias. test_rows_cover_every_pair checks it.
NO_BIAS, ROPE, QK, RMS, VALUES = dict(bias=False), dict(pos="rope"), dict(qk_norm=True), dict(norm="rmsnorm"), dict(value_residual=True)
DOCUMENTS, NEAR = dict(doc_mask=True), dict(window=50, window_pattern="SL")  # S and L compile separately
ROWS = [
    dict(mlp="gelu", **NEAR, tied_head=False, dropout=0.2),
    dict(mlp="gelu", **NEAR, **NO_BIAS, **VALUES, **QK, **ROPE, share_layers=2, rope_base=500.0, short_conv=4, head_gate=True),
    dict(mlp="relu2", **DOCUMENTS, **QK, **ROPE, n_kv_head=2, rope_scaling="yarn", rope_factor=4.0),
    dict(mlp="relu2", **DOCUMENTS, **NO_BIAS, **VALUES, **ROPE, n_kv_head=1, window=50, key_offset=True, bigram=500),
    dict(mlp="swiglu", **RMS, **DOCUMENTS, **VALUES, **ROPE, short_conv=3, key_offset=True, head_gate=True),
    dict(mlp="swiglu", **RMS, **DOCUMENTS, **NO_BIAS, **QK),
    dict(mlp="gelu_exact", **RMS, **NEAR, **VALUES, **QK, n_kv_head=1),
    dict(mlp="gelu_exact", **RMS, **NEAR | dict(window=1), **NO_BIAS, **ROPE, n_kv_head=2),
    dict(n_expert=4, n_expert_active=2, mlp="swiglu", **RMS),
    dict(n_expert=3, load_balance=0.1, **NO_BIAS, **QK, mimetic_init=True),
]


def test_rows_cover_every_pair():
    shapes = [VariantConfig(n_layer=4, n_head=4, n_embd=64, **row) for row in ROWS]
    assert {f.name for f in SWITCHES} == {name for shape in shapes for name in shape.switches_on()}
    around = ("bias", "value_residual", "qk_norm", "pos", "doc_mask", "norm")
    values = [{name: getattr(shape, name) for name in around} | {"grouped": shape.kv_heads < 4} for shape in shapes]
    for a, b in combinations(values[0], 2):
        if {a, b} != {"norm", "grouped"}:  # a matrix product lies between them
            assert len({(each[a], each[b]) for each in values}) == 4, (a, b)
    assert len({(shape.mlp, shape.bias) for shape in shapes if shape.n_expert == 1}) == 8


@pytest.mark.slow
@pytest.mark.parametrize("switches", ROWS + (list(VARIANTS.values())[1:] if THOROUGH else []), ids=str)
def test_compiled_variant_has_eager_gradients(poisoned_memory, switches):
    if switches.get("window", 1) > 1:
        switches = switches | dict(window=50)
    check_parity(VariantConfig(**dict(vocab_size=97, seq_len=128, n_layer=4, n_head=4, n_embd=64) | switches), BF16, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "activation_memory"), [(BF16, 0.5), (FP32, 0.0)])
def test_compiled_recomputation_and_chunked_loss_have_eager_gradients(poisoned_memory, monkeypatch, dtype, activation_memory):
    monkeypatch.setattr("ops.loss.MAX_LOGITS", 128 * 150)  # two chunks
    check_parity(VariantConfig(97, 128, 2, 2, 64), dtype, 2, activation_memory)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gpt2", "modern", "pattern"])
def test_compiled_token_has_eager_logits_in_bf16(poisoned_memory, variant):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = build(VariantConfig(**dict(vocab_size=97, seq_len=128, n_layer=4, n_head=4, n_embd=64) | VARIANTS[variant])).to(BF16)
    idx = ids_for(model.config, 2)
    with torch.no_grad():
        expected = model(idx)[0][:, 100]
        cache = KVCache(128)
        model(idx[:, :100], cache=cache)
        found = compiled_step("cpu")(model, idx[:, 100:101], cache, torch.tensor([100]))
    assert (found - expected).norm() <= 0.03 * expected.norm()


# ---- the compiler ----


def transposed_twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes two copies, which Inductor puts into one kernel. With a single copy, GCC inlines the transpose and compiles it right."""
    x = x.view(2, 256, 4, 32).transpose(1, 2)
    return x[:, :, :128].transpose(2, 3).contiguous(), x[:, :, 128:].transpose(2, 3).contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_transposes_are_right(dtype):
    x = torch.randn(2, 256, 128).to(dtype)
    for found, expected in zip(torch.compile(transposed_twice)(x), transposed_twice(x), strict=True):
        assert torch.equal(found, expected)


VERSION = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout if shutil.which("c++") else ""
ON_X86 = pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="the flags are for Linux on x86-64")
CALL = " -mstringop-strategy=libcall"


@ON_X86
@pytest.mark.parametrize(
    ("compiler", "before", "after"),
    [
        ("g++", None, f"off -DCPU_IS_AVX2{CALL}"),
        ("/usr/bin/x86_64-linux-gnu-g++-13", "fast", f"fast -DCPU_IS_AVX2{CALL}"),
        ("g++", f"off -DCPU_IS_AVX512{CALL}", f"off -DCPU_IS_AVX2{CALL}"),  # inherited from a process on another CPU
        ("clang++", None, "off -DCPU_IS_AVX2"),
        ("clang++-16", f"off{CALL}", "off -DCPU_IS_AVX2"),
        (sys.executable, "off", "off -DCPU_IS_AVX2"),  # no compiler
        ("c++", "off", f"off -DCPU_IS_AVX2{CALL if 'Free Software' in VERSION else ''}"),
    ],
)
def test_compiler_flags(monkeypatch, compiler, before, after):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv(device.FP_CONTRACT, before or "")
    if before is None:
        monkeypatch.delenv(device.FP_CONTRACT)  # after setenv above, so that monkeypatch restores it
    monkeypatch.delitem(sys.modules, "torch._inductor.config", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    device.set_compiler_flags()
    assert os.environ[device.FP_CONTRACT] == after


@ON_X86
def test_inductor_has_the_flags_if_imported_first():
    code = (
        "import torch._inductor.config, ops.attention\nfrom torch._inductor.cpp_builder import CppTorchOptions\n"
        "print(any('-DCPU_IS_' in flag for flag in CppTorchOptions().get_cflags()))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", device.FP_CONTRACT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPO, capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr


@ON_X86
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512" or not shutil.which("g++"), reason="needs AVX-512 and g++")
def test_case_in_compiler_md_passes_with_flag(tmp_path):
    (code,) = re.findall(r"```cpp\n(.*?)```", (REPO / "results" / "compiler.md").read_text(), re.DOTALL)
    (tmp_path / "case.cpp").write_text(code)
    command = ["g++", "-O3", "-march=x86-64-v4", device.COPY_BY_CALL, "case.cpp", "-o", "case"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert subprocess.run(["./case"], cwd=tmp_path, capture_output=True, text=True).stdout == "0 of 1024 values wrong\n"


@pytest.mark.slow
@ON_X86
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a CPU with two vector lengths")
def test_one_cache_serves_two_vector_lengths(tmp_path):
    """The compile cache may be on a shared disk, and serve machines with different CPUs."""
    code = (
        "import torch, ops; from test_compiled import transposed_twice; x = torch.randn(2, 256, 128).bfloat16()\n"
        "print(all(map(torch.equal, torch.compile(transposed_twice)(x), transposed_twice(x))))"
    )
    for capability in ("avx512", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        environment["PYTHONPATH"] = f"{REPO}:{REPO / 'tests'}"
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout == "True\n", result.stderr


# ---- the self-check ----


@pytest.fixture
def quick_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", torch.compile)  # so that monkeypatch restores it
    trace_only()
    torch._dynamo.reset()


def damage_compiled_gelu(monkeypatch, factor: float):
    gelu = linear.gelu
    monkeypatch.setattr(linear, "gelu", lambda x: gelu(x) * (factor if torch.compiler.is_compiling() else 1))


@pytest.mark.parametrize("factor", [1.3, float("nan")])
def test_failed_self_check_trains_eagerly(quick_compile, monkeypatch, shards, tmp_path, capsys, factor):
    damage_compiled_gelu(monkeypatch, factor)
    assert run_train(shards, tmp_path / "compiled", "--compile") == 0
    err = capsys.readouterr().err
    assert err.count("self-check failed") == 1 and "training without torch.compile" in err
    assert run_train(shards, tmp_path / "eager") == 0
    assert read_stream(tmp_path / "compiled", "train") == read_stream(tmp_path / "eager", "train")


def damage_rank_1():
    trace_only()
    if os.environ["RANK"] == "1":
        damage_compiled_gelu(pytest.MonkeyPatch(), 1.3)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_one_failing_rank_makes_all_train_eagerly(shards, tmp_path, shard):
    flags = [*TINY, "--compile", *shard, "--max-steps", 3, "--data-dir", shards, "--out-dir", tmp_path / "run"]
    run = forked(tmp_path, "train", *flags, processes=2, first=damage_rank_1)
    assert run.returncode == 0 and run.stderr.count("self-check failed") == 1
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["launches"][0]["compiled"]
    assert run_train(shards, tmp_path / "plain", "--max-steps", 3) == 0
    found, expected = (read_stream(tmp_path / name, "train") for name in ("run", "plain"))
    assert [float(x) for x in found.values()] == pytest.approx([float(x) for x in expected.values()], abs=1e-5)


def test_passed_self_check_changes_nothing(quick_compile, shards, tmp_path, capsys):
    for name, flag in (("checked", "--self-check"), ("unchecked", "--no-self-check")):
        assert run_train(shards, tmp_path / name, "--compile", flag, "--max-steps", 3) == 0
    assert "self-check" not in capsys.readouterr().err
    assert json.loads((tmp_path / "checked" / "run.json").read_text())["launches"][0]["compiled"]
    assert read_stream(tmp_path / "checked", "train") == read_stream(tmp_path / "unchecked", "train")


def test_no_self_check_flag_skips_it(quick_compile, monkeypatch, shards, tmp_path, capsys):
    damage_compiled_gelu(monkeypatch, 1.3)
    assert run_train(shards, tmp_path / "run", "--compile", "--no-self-check", "--max-steps", 1) == 0
    assert "self-check" not in capsys.readouterr().err


def test_self_check_names_the_first_wrong_value(quick_compile):
    """A wrong gradient makes all later ones of the backward pass wrong too."""
    model = build(VariantConfig(97, 32, 3, 2, 32))
    compile_blocks(model)
    idx = ids_for(model.config)

    def loss():
        return model(idx, idx)[1]

    loss().backward()  # the check must ignore earlier gradients
    before = [p.grad for p in model.parameters()]
    assert self_check.mismatches(model, loss, loss, FP32) == {}

    def wrong(x):
        return F.gelu(x, approximate="tanh") + (x - x.detach() if torch.compiler.is_compiling() else 0)

    model.transformer.h[1].mlp.activation = wrong
    found = self_check.mismatches(model, loss, loss, FP32)
    assert next(iter(found)) == "gradient of transformer.h.1.mlp.c_fc.bias"
    assert all(p.grad is grad and not grad.any() for p, grad in zip(model.parameters(), before, strict=True))  # may be DDP's


@pytest.mark.parametrize(
    ("switches", "layers"),
    [({}, 2), (dict(window=8), 2), (dict(window=8, window_pattern="SSSL"), 4), (dict(window=8, window_pattern="LS"), 3)],
)
def test_self_check_runs_a_layer_of_each_kind(switches, layers):
    model = build_on_meta(VariantConfig(97, 32, 12, 2, 32, **switches))
    with self_check.first_of_each_kind(model):
        assert len(model.config.windows) == layers
    assert model.config.n_layer == 12
