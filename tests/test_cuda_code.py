"""Code that only CUDA runs, checked on the CPU against the code that a CPU runs."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_variants import ids_with_documents, loss_and_gradients, randomized
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask

from ops import attention, embedding, experts
from ops.attention import block_mask, causal_mask, fused_attention
from ops.loss import chunk_loss
from variants import MixtureOfExperts, VariantConfig, build

BF16 = torch.bfloat16


# ---- attention ----


def queries_keys_values(heads: int, kv_heads: int, T: int = 24, **how) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, h, T, 16, requires_grad=True, **how) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_heads_equal_repeated_ones(monkeypatch, kv_heads):
    results = []
    for shared in (False, True):
        monkeypatch.setattr(attention, "shares_heads", lambda *given, shared=shared: shared)
        q, k, v = queries_keys_values(4, kv_heads)
        y = fused_attention(q, k, v)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for shared, repeated in zip(*results, strict=True):
        assert shared.shape == repeated.shape and (shared - repeated).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("shares", "differs"),
    [
        (True, {}),
        (False, dict(is_cuda=False)),
        (False, dict(dtype=torch.float32)),
        (False, dict(dtype=torch.float16)),
        (False, dict(D=512)),
    ],
)
def test_heads_are_shared_where_flash_attention_runs(shares, differs):
    q = SimpleNamespace(**dict(is_cuda=True, dtype=BF16) | differs, size=lambda dim: differs.get("D", 64))
    assert attention.shares_heads(q, None, None) == shares
    assert not attention.shares_heads(q, causal_mask(4, 4, "cpu"), None) and not attention.shares_heads(q, None, 3)


@pytest.mark.parametrize(("heads", "seen_by_kernel"), [(4, 2), (6, 6), (2, 2)])
def test_flex_attention_shares_powers_of_two(monkeypatch, heads, seen_by_kernel):
    given = []
    monkeypatch.setattr(attention, "flex_attention", lambda q, k, v, **how: given.extend([k.size(1), v.size(1), how["enable_gqa"]]))
    q, k, v = queries_keys_values(heads, 2)
    fused_attention(q, k, v, block_mask(24, 5, None, "cpu"))
    assert given == [seen_by_kernel, seen_by_kernel, seen_by_kernel < heads]


def test_compiled_token_avoids_fused_kernels(monkeypatch):
    """On every device: "meta" is not the CPU."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    q, k, v = queries_keys_values(4, 2, device="meta")
    assert fused_attention(q[:, :, :1], k, v, causal_mask(1, 24, "meta")).shape == (2, 4, 1, 16)


def test_mask_of_a_window_is_made_once():
    assert block_mask(256, 100, None, "cpu") is block_mask(256, 100, None, "cpu")
    assert block_mask(256, 100, None, "cpu") is not block_mask(256, 101, None, "cpu")


@pytest.mark.slow
def test_compiled_mask_of_documents_equals_eager(monkeypatch):
    for seed, window in ((0, None), (1, None), (1, 150)):
        documents = (torch.rand(3, 512, generator=torch.Generator().manual_seed(seed)) < 0.01).cumsum(1)
        eager = block_mask(512, window, documents, "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(attention, "create_block_mask", torch.compile(create_block_mask, backend="aot_eager"))
            compiled = block_mask(512, window, documents, "cpu")
        assert (eager.to_dense() == compiled.to_dense()).all()
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks"):
            assert torch.equal(getattr(eager, name), getattr(compiled, name)), name


# ---- experts ----


def products(product, counts: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns the result and all gradients, for counts[i] rows that go to expert i."""
    torch.manual_seed(0)
    weights = [torch.randn(24, 16, requires_grad=True) for _ in counts]
    x = torch.randn(sum(counts), 16, requires_grad=True)
    with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
        y = product(x, weights, torch.tensor(counts).cumsum(0).int())
    return [y, *torch.autograd.grad(y.float().square().sum(), (x, *weights))]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("counts", [[5, 3, 8], [0, 16, 0], [16], [1, 0, 70, 0, 2]])
def test_grouped_products_equal_the_loop(counts, dtype):
    for grouped, looped in zip(products(experts.grouped, counts, dtype), products(experts.one_by_one, counts, dtype), strict=True):
        assert grouped.dtype == looped.dtype and (grouped - looped).norm() <= (1e-6 if dtype == torch.float32 else 0.01) * looped.norm()


@pytest.mark.parametrize("active", [1, 2])
def test_grouped_experts_have_the_loops_gradients(monkeypatch, active):
    model = randomized(n_expert=4, n_expert_active=active, n_layer=2)
    idx = ids_with_documents(model.config)
    loss, grads = loss_and_gradients(model, idx)
    monkeypatch.setattr(experts, "is_grouped", lambda x, weight: True)
    for block in model.transformer.h:
        block.mlp.loop = None
    grouped_loss, grouped_grads = loss_and_gradients(model, idx)
    assert grouped_loss == pytest.approx(loss.item(), abs=1e-5)
    for grouped, looped in zip(grouped_grads, grads, strict=True):
        assert (grouped - looped).norm() <= 1e-4 * (looped.norm() + 1e-3)


@pytest.mark.parametrize(
    ("grouped", "differs"),
    [(True, {}), (False, dict(is_cuda=False)), (False, dict(dtype=torch.float16)), (False, dict(dtype=torch.float32))],
)
def test_products_are_grouped_in_bf16_on_cuda(grouped, differs):
    x = SimpleNamespace(**dict(is_cuda=True, dtype=BF16, device=torch.device("cuda")) | differs)
    assert experts.is_grouped(x, torch.empty(24, 16)) == grouped
    assert not experts.is_grouped(x, torch.empty(20, 16)) and not experts.is_grouped(x, torch.empty(24, 12))


def test_grouped_experts_wait_for_nothing(monkeypatch):
    """Fake tensors have no values: an operation that needs one on the CPU, to know a size, is an error."""
    monkeypatch.setattr(experts, "is_grouped", lambda x, weight: True)
    with FakeTensorMode(), torch.autocast("cpu", BF16):
        moe = MixtureOfExperts(VariantConfig(97, 24, 1, 2, 32, n_expert=4, n_expert_active=2))
        y, balance = moe(torch.empty(2, 24, 32, requires_grad=True))
        (y.sum() + balance).backward()
    assert y.shape == (2, 24, 32)


@pytest.mark.slow
def test_grouped_experts_compile_into_one_graph(monkeypatch):
    monkeypatch.setattr(experts, "is_grouped", lambda x, weight: True)
    moe = MixtureOfExperts(VariantConfig(97, 24, 1, 2, 32, n_expert=4, n_expert_active=2))
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 24, 32)
    with torch.autocast("cpu", BF16):
        y, balance = torch.compile(moe, backend="aot_eager", fullgraph=True)(x)
        expected, expected_balance = moe(x)
    assert (y - expected).norm() <= 0.01 * expected.norm() and (balance - expected_balance).abs() <= 1e-5


# ---- loss ----


def test_loss_has_the_form_that_inductor_fuses():
    """Inductor's pass for a softmax in one read looks for these four operations (prepare_softmax_pattern)."""
    x, w, targets = torch.randn(4, 8), torch.randn(64, 8), torch.arange(4)
    graph = make_fx(lambda *given: chunk_loss(*given, 60, None, None))(x, w, targets).graph
    (largest,) = (node for node in graph.nodes if node.target == torch.ops.aten.amax.default)
    logits = largest.args[0]
    (less,) = (node for node in largest.users if node.target == torch.ops.aten.sub.Tensor)
    assert less.args == (logits, largest)
    (power,) = less.users
    (total,) = power.users
    assert (power.target, total.target) == (torch.ops.aten.exp.default, torch.ops.aten.sum.dim_IntList)
    assert largest.args[1:] == total.args[1:] == ([-1], True)


# ---- residual stream ----


def test_stream_stays_in_bf16(monkeypatch):
    """In every block and in its gradient; the weights' gradients stay near those with a stream in fp32."""
    model = build(VariantConfig(97, 24, 2, 2, 32, pos="rope", norm="rmsnorm", bias=False))  # a CPU's LayerNorm sums gradients in bf16
    idx = ids_with_documents(model.config)
    grads, results = [], []

    def watch(block, given, returned):
        returned[0].register_hook(grads.append)

    for block in model.transformer.h:
        block.register_forward_hook(watch)
    for in_bf16 in (False, True):
        monkeypatch.setattr(embedding, "is_stream_in_bf16", lambda kind, in_bf16=in_bf16: in_bf16)
        with torch.autocast("cpu", BF16):
            results.append(loss_and_gradients(model, idx))
        assert {g.dtype for g in grads} == {BF16 if in_bf16 else torch.float32}
        grads.clear()
    (loss, plain), (rounded_loss, rounded) = results
    assert rounded_loss == pytest.approx(loss.item(), rel=1e-3)
    for p, q in zip(plain, rounded, strict=True):
        assert p.dtype == q.dtype == torch.float32 and (p - q).norm() <= 0.03 * p.norm()


@pytest.mark.parametrize(("kind", "dtype", "in_bf16"), [("cuda", BF16, True), ("cuda", torch.float16, False), ("cpu", BF16, False)])
def test_stream_is_in_bf16_on_cuda(monkeypatch, kind, dtype, in_bf16):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: dtype)
    assert embedding.is_stream_in_bf16(kind) == in_bf16
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    assert not embedding.is_stream_in_bf16(kind)
