"""training/optimizer.py matches PyTorch's optimizers, schedulers and averages."""

from shutil import copy

import pytest
import torch
from conftest import TINY, forked, ids_for, read_stream, run_train
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel

import checkpoint
from common.distributed import DistContext
from common.shards import find_shards
from dataloader import TokenStream, mix
from training.optimizer import AverageWeights, Muon, MuonAndAdamW, batches, momentum_for, schedule
from training.run_json import read_run
from variants import VariantConfig, build

ALONE = DistContext(torch.device("cpu"))


def follow_torch(make, name: str, *settings):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = make(optimizer)
    for step in range(60):
        assert schedule(name, step, *settings) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        theirs.step()


def test_cosine_schedule_matches_torch():
    follow_torch(
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, total_iters=9), CosineAnnealingLR(o, T_max=50, eta_min=0.1)], milestones=[10]),
        "cosine", 60, 10, 0.1, 0.2,
    )  # fmt: skip
    assert schedule("cosine", 60, 60, 10, 0.1, 0.2) == pytest.approx(0.1)


def test_wsd_schedule_matches_torch():
    follow_torch(
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, total_iters=9), LinearLR(o, 1.0, 0.1, total_iters=12)], milestones=[48]),
        "wsd", 60, 10, 0.1, 0.2,
    )  # fmt: skip
    assert schedule("wsd", 60, 60, 10, 0.1, 0.2) == pytest.approx(0.1)
    late = [schedule("wsd", step, 100, 90, 0.0, 0.5) for step in (89, 90, 95)]  # the decay starts after the warmup
    assert late == pytest.approx([1.0, 1.0, 0.5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("switches", [{}, dict(n_expert=3, n_expert_active=2, value_residual=True, tied_head=False, qk_norm=True)])
def test_muon_and_adamw_match_torchs(switches, dtype, monkeypatch):
    if dtype == torch.float32:  # torch's Muon without its rounding
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    models = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = build(VariantConfig(97, 16, 2, 2, 16, **switches))
        matrices = {p for name, p in model.named_parameters() if ".h." in name and p.dim() == 2 and "router" not in name}
        if ours:
            optimizers = [MuonAndAdamW(model, 1e-2, 2e-2, 0.9, 0.1, ALONE, dtype=dtype)]
            assert sum(len(group["params"]) for group in optimizers[0].param_groups) == len(list(model.parameters()))
        else:
            rest = [p for p in model.parameters() if p not in matrices]
            optimizers = [
                torch.optim.Muon(matrices, lr=2e-2, momentum=0.9, weight_decay=0.1),
                torch.optim.AdamW([p for p in rest if p.dim() > 1], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
                torch.optim.AdamW([p for p in rest if p.dim() < 2], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
            ]
        idx = ids_for(model.config)
        for _ in range(3):
            model(idx, idx)[1].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muons_update_is_nearly_orthogonal(dtype):
    """Jordan et al., 2024: singular values of about 1, times lr · √(rows / columns) if the matrix has more rows than columns."""
    torch.manual_seed(0)
    model = build(VariantConfig(97, 16, 1, 2, 16, norm="rmsnorm"))  # LayerNorm makes the mean 0, so the gradient would lose a rank
    weight = model.transformer.h[0].mlp.c_fc.weight  # (64, 16)
    before, idx = weight.detach().clone(), ids_for(model.config, batch=64)
    optimizer = MuonAndAdamW(model, 1e-2, 0.5, 0.95, 0.0, ALONE, dtype=dtype)
    model(idx, idx)[1].backward()
    optimizer.step()
    singular = torch.linalg.svdvals((before - weight.detach()) / (0.5 * 2))
    assert singular[0] < 1.4 and singular[-1] > 0.2


def test_momentum_follows_the_runs_length():
    assert [momentum_for(steps) for steps in (1, 10, 529, 2116, 8464, 10**6)] == pytest.approx([0.5, 0.5, 0.8, 0.9, 0.95, 0.95])


def normuon(p, grads, lr, momentum, beta2):
    """Li et al., 2025, algorithm 1, for one matrix in fp64. A neuron is a row of a tall matrix, a column of a wide one. The last line
    keeps the norm of Muon's update."""
    average, second = torch.zeros_like(p), torch.zeros(max(p.shape), dtype=p.dtype)
    for grad in grads:
        average = momentum * average + (1 - momentum) * grad
        x = momentum * average + (1 - momentum) * grad
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        neurons = 1 if p.size(0) > p.size(1) else 0  # the dimension that the mean is over
        second = beta2 * second + (1 - beta2) * x.square().mean(neurons)
        evened = x / second.sqrt().unsqueeze(neurons)
        p = p - lr * max(1, p.size(0) / p.size(1)) ** 0.5 * evened * x.norm() / evened.norm()
    return p


@pytest.mark.parametrize("at_once", [0, 2**20])
def test_normuon_equals_plain_formula(at_once):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(24, 8), (8, 24), (8, 8), (24, 8)]]
    grads = [torch.randn(5, *p.shape) for p in params]
    expected = [normuon(p.detach().double(), grad.double(), 2e-2, 0.9, 0.8) for p, grad in zip(params, grads, strict=True)]
    optimizer = Muon(params, torch.float32, 0.8, lr=2e-2, momentum=0.9, weight_decay=0.0)
    optimizer.at_once = at_once
    for step in range(5):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad[step].clone()
        optimizer.step()
    for p, plain in zip(params, expected, strict=True):
        assert (p - plain).abs().max() <= 1e-5


def test_normuon_leaves_a_matrix_without_gradient():
    p = torch.nn.Parameter(torch.randn(8, 4))
    before, p.grad = p.detach().clone(), torch.zeros(8, 4)
    Muon([p], torch.float32, 0.9, lr=2e-2, momentum=0.9, weight_decay=0.0).step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batched_muon_equals_one_by_one(dtype):
    """A GPU stacks matrices of one shape; a CPU takes each alone, in bf16 with the bits of torch's Muon."""
    shapes, results = [(24, 8), (8, 24), (8, 8), (24, 8), (16, 8), (8, 8)], []
    for at_once in (None, 0, 2 * 24 * 8, 2**20):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        how = dict(lr=2e-2, momentum=0.9, weight_decay=0.1)
        optimizer = torch.optim.Muon(params, **how) if at_once is None else Muon(params, dtype, **how)
        optimizer.at_once = at_once
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            params[step].grad = None
            optimizer.step()
        results.append(params + [optimizer.state[p]["momentum_buffer"] for p in params])
    theirs, alone, in_twos, together = results
    if dtype == torch.bfloat16:
        assert all(map(torch.equal, theirs, alone))
    for p, q, r in zip(alone, in_twos, together, strict=True):
        assert max((p - q).abs().max(), (p - r).abs().max()) <= (1e-3 if dtype == torch.bfloat16 else 1e-6)


def test_batches_have_one_shape_and_a_limit():
    matrices = [torch.empty(shape) for shape in [(4, 2), (2, 4), (3, 2), (4, 2), (2, 4), (3, 2)]]
    numbers = [[next(i for i, m in enumerate(matrices) if m is x) for x in batch] for batch in batches(matrices, 24)]
    assert numbers == [[0, 1, 3], [4], [2, 5]]
    assert [len(batch) for batch in batches(matrices, 0)] == [1] * 6


def test_ranks_split_muons_work_equally():
    shares = []
    for rank in range(4):
        torch.manual_seed(0)
        model = build(VariantConfig(97, 16, 4, 2, 16))
        world = DistContext(torch.device("cpu"), rank, 4)
        object.__setattr__(world, "broadcast", lambda tensors, owner: None)
        optimizer = MuonAndAdamW(model, 1e-2, 2e-2, 0.95, 0.1, world)
        before, idx = [p.detach().clone() for p in optimizer.matrices], ids_for(model.config)
        model(idx, idx)[1].backward()
        optimizer.step()
        shares.append({i for i, (p, q) in enumerate(zip(optimizer.matrices, before, strict=True)) if (p != q).any()})
        assert sum(optimizer.matrices[i].numel() for i in shares[-1]) == sum(p.numel() for p in before) / 4
    assert sorted(i for share in shares for i in share) == list(range(16))


def test_weight_average_matches_torchs():
    torch.manual_seed(0)
    model = build(VariantConfig(97, 16, 1, 2, 16))
    average = AverageWeights(model, 0.9)
    theirs = AveragedModel(model, avg_fn=lambda mean, p, n: mean + (1 - min(0.9, (1 + n) / (10 + n))) * (p - mean))
    theirs.update_parameters(model)  # its first update copies
    for _ in range(20):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        average.update()
        theirs.update_parameters(model)
    weights = [p.clone() for p in model.parameters()]
    with average.in_place():
        for p, q in zip(model.parameters(), theirs.module.parameters(), strict=True):
            assert (p - q).abs().max() <= 1e-5
    assert all((p == q).all() for p, q in zip(model.parameters(), weights, strict=True))


# ---- in a run ----

FLAGS = [
    "--optimizer", "muon", "--muon-momentum", 0, "--muon-beta2", 0.9, "--schedule", "wsd", "--ema", 0.9, "--checkpoint-every", 10,
    "--keep", 0, "--dropout", 0.1,
]  # fmt: skip


@pytest.fixture(scope="module")
def with_muon(shards, tmp_path_factory):
    """An uninterrupted run of 20 steps with Muon and averaged weights."""
    folder = tmp_path_factory.mktemp("muon") / "run"
    assert run_train(shards, folder, *FLAGS) == 0
    return folder


def test_muon_on_two_ranks_takes_the_same_steps(with_muon, shards, tmp_path):
    assert forked(tmp_path, "train", *TINY, *FLAGS, "--data-dir", shards, "--out-dir", tmp_path / "run", processes=2).returncode == 0
    losses = ([float(loss) for loss in read_stream(folder, "train").values()] for folder in (tmp_path / "run", with_muon))
    assert next(losses) == pytest.approx(next(losses), abs=1e-5)
    one, other = (checkpoint.load_training(folder, 20)[1]["optimizer"]["muon"]["state"] for folder in (with_muon, tmp_path / "run"))
    assert len(one) == len(other) == 8
    for i in one:  # the checkpoint has the averages of every matrix, from all ranks
        for name in ("momentum_buffer", "second_moment"):
            a, b = one[i][name], other[i][name]
            assert a.norm() > 0 and (a - b).norm() <= 1e-4 * a.norm()


@pytest.mark.parametrize("processes", [1, 2])
def test_resume_is_exact_with_muon_and_ema(with_muon, shards, tmp_path, processes):
    for path in with_muon.iterdir():
        if "20" not in path.name:
            copy(path, tmp_path)
    result = forked(tmp_path, "train", "--resume", "--out-dir", tmp_path, processes=processes)
    assert result.returncode == 0, result.stderr
    (model, state), (other, other_state) = (checkpoint.load_training(folder, 20) for folder in (with_muon, tmp_path))
    for weights, theirs in ((model["model"], other["model"]), (state["weights"], other_state["weights"])):
        assert all((weights[name] - theirs[name]).abs().max() <= (0 if processes == 1 else 1e-4) for name in weights)
    assert model["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)


def test_averaged_weights_stay_tied_in_a_checkpoint(with_muon):
    """A second copy of the head would make 124M's checkpoint 31 % larger."""
    content, state = checkpoint.load_training(with_muon, 20)
    for weights in (content["model"], state["weights"]):
        assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()


def test_dropout_depends_on_seed_and_position(with_muon):
    config = read_run(with_muon)
    torch.manual_seed(config.seed)
    model, losses = build(config.model).train(), []
    stream = TokenStream(find_shards(config.data_dir), "train", 32, config.shuffle, config.seed)
    for start in (0, 4):  # the micro steps of step 0
        torch.manual_seed(mix(config.seed, start))
        losses.append(model(*map(torch.from_numpy, stream.batch(range(start, start + 4))))[1].item())
    assert float(read_stream(with_muon, "train")[0]) == pytest.approx(sum(losses) / 2, abs=1e-6)
    model.eval()
    assert model(*map(torch.from_numpy, stream.batch(range(4, 8))))[1].item() != pytest.approx(losses[1], abs=1e-4)


def test_averaged_weights_are_validated_and_saved(with_muon):
    model, state = checkpoint.load_training(with_muon, 20)
    average = checkpoint.load_model(with_muon / "model_00020.pt")[0]
    weights = build(VariantConfig(**model["config"]))
    checkpoint.load_weights(weights, state["weights"], with_muon)
    assert max((p - q).abs().max() for p, q in zip(average.parameters(), weights.parameters(), strict=True)) > 1e-3
    stream = TokenStream(find_shards(read_run(with_muon).data_dir), "val", 32, shuffle=False)
    available = stream.sequences_per_epoch
    x, y = map(torch.from_numpy, stream.batch([i * available // 20 for i in range(20)]))
    with torch.no_grad():
        assert model["val_loss"] == pytest.approx(average(x, y)[1].item(), abs=1e-5)
        assert model["val_loss"] != pytest.approx(weights(x, y)[1].item(), abs=1e-4)


def test_a_run_sets_muons_momentum(with_muon):
    (group,) = checkpoint.load_training(with_muon, 20)[1]["optimizer"]["muon"]["param_groups"]
    assert group["momentum"] == 0.5
