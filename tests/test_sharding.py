"""--shard: the same losses and checkpoints as without it, with less memory per process."""

import ctypes
import json
from shutil import copy, copytree

import pytest
import torch
from conftest import TINY, forked, read_stream, run_train, trace_only
from test_hellaswag import make_tasks

import checkpoint
from common import device
from training.config import TrainConfig
from training.memory import Setting, memory
from variants import VariantConfig, build_on_meta

SHARED = ["--checkpoint-every", 10, "--keep", 0]


def run_sharded(shards, folder, *flags, processes=2, **how):
    run = forked(
        folder.parent, "train", *TINY, *SHARED, "--shard", "--data-dir", shards, "--out-dir", folder, *flags, processes=processes, **how
    )
    assert run.returncode == 0, run.stderr
    return run


def losses(folder, stream="train") -> list[float]:
    return [float(value) for value in read_stream(folder, stream).values()]


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory):
    """A run of one process, not sharded."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert run_train(shards, folder, *SHARED) == 0
    return folder


@pytest.fixture(scope="module")
def sharded(shards, tmp_path_factory):
    """The same run, sharded over two processes, with HellaSwag and samples."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    tasks = folder.with_name("tasks.jsonl")
    tasks.write_text("".join(json.dumps(task) + "\n" for task in make_tasks(5)))
    run = run_sharded(shards, folder, "--hellaswag-every", 20, "--hellaswag-file", tasks, "--sample-every", 20)
    assert "step 20: HellaSwag acc_norm" in run.stdout and run.stdout.count("step 20: sample:") == 4
    return folder


def test_sharded_losses_equal_those_of_one_process(plain, sharded):
    for stream in ("train", "val"):
        assert losses(sharded, stream) == pytest.approx(losses(plain, stream), abs=1e-5)
    assert len(losses(sharded)) == 20


def test_sharded_checkpoint_has_the_same_format(plain, sharded):
    (model, state), (theirs, their_state) = (checkpoint.load_training(folder, 20) for folder in (plain, sharded))
    assert list(model["model"]) == list(theirs["model"]) and model["config"] == theirs["config"]
    for name, p in model["model"].items():
        assert (p - theirs["model"][name]).abs().max() <= 1e-5, name
    assert theirs["model"]["lm_head.weight"].data_ptr() == theirs["model"]["transformer.wte.weight"].data_ptr()
    moments, their_moments = state["optimizer"]["state"], their_state["optimizer"]["state"]
    assert moments.keys() == their_moments.keys() and state["optimizer"]["param_groups"] == their_state["optimizer"]["param_groups"]
    for i, tensors in moments.items():
        assert all((tensors[key] - their_moments[i][key]).abs().max() <= 1e-5 for key in tensors)


@pytest.mark.parametrize(
    ("source", "processes", "flags"), [("sharded", 0, []), ("plain", 2, ["--shard"]), ("sharded", 4, ["--micro-batch-size", 2])]
)
def test_resume_turns_sharding_on_or_off(source, processes, flags, plain, tmp_path, request):
    for path in request.getfixturevalue(source).iterdir():
        if "20" not in path.name:
            copy(path, tmp_path)
    flags = flags or (["--no-shard"] if not processes else [])
    run = forked(
        tmp_path, "train", "--resume", "--out-dir", tmp_path, "--hellaswag-every", 0, "--sample-every", 0, *flags, processes=processes
    )
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path) == pytest.approx(losses(plain), abs=1e-5)
    assert losses(tmp_path, "val") == pytest.approx(losses(plain, "val"), abs=1e-5)


def test_sharded_run_resumes_exactly(sharded, tmp_path):
    folder = copytree(sharded, tmp_path / "run")
    for path in folder.glob("*00020*"):
        path.unlink()
    run = forked(tmp_path, "train", "--resume", "--out-dir", folder, "--hellaswag-every", 0, "--sample-every", 0, processes=2)
    assert run.returncode == 0, run.stderr
    assert read_stream(folder, "train") == read_stream(sharded, "train")
    model, theirs = (checkpoint.load_training(f, 20)[0] for f in (sharded, folder))
    assert all(torch.equal(p, theirs["model"][name]) for name, p in model["model"].items())


MANY = "--optimizer muon --pos rope --n-head 1 --norm rmsnorm --mlp swiglu --no-bias --no-tied-head --value-residual --qk-norm --ema 0.9"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (MANY, 1e-5),
        ("--n-expert 3 --n-expert-active 2", 1e-3),  # balanced by micro batch
        ("--share-layers 2 --ema 0.9 --activation-memory 0", 1e-5),
    ],
)
def test_every_part_of_a_model_can_be_sharded(flags, tolerance, shards, tmp_path):
    flags = flags.split()
    run_sharded(shards, tmp_path / "sharded", *flags)
    assert run_train(shards, tmp_path / "plain", *SHARED, *flags) == 0
    for stream in ("train", "val"):
        assert losses(tmp_path / "sharded", stream) == pytest.approx(losses(tmp_path / "plain", stream), abs=tolerance)
    for path in (tmp_path / "sharded").glob("*00020*"):
        path.unlink()
    before = losses(tmp_path / "sharded")
    run = forked(tmp_path, "train", "--resume", "--out-dir", tmp_path / "sharded", processes=2)
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "sharded") == pytest.approx(before, abs=1e-6)


def make_loss_nan():
    """Turns rank 1's loss in the fifth step into nan."""
    import os

    import train

    loss = train.Trainer.loss

    def nan_once(self, model, positions):
        value = loss(self, model, positions)
        return value * float("nan") if os.environ["RANK"] == "1" and len(self.guard.recent_losses) == 4 else value

    train.Trainer.loss = nan_once


def test_nonfinite_numbers_on_one_rank_change_no_weight(shards, tmp_path):
    run = run_sharded(shards, tmp_path / "run", "--max-bad-steps", 30, first=make_loss_nan)
    assert "step 4 changes no weight (1 in a row, 30 end the run): rank 1's loss is nan; sequences of rank 1: tiny_train_" in run.stderr
    assert torch.load(tmp_path / "run" / "model_00020.pt", weights_only=True)["model"]["transformer.wte.weight"].isfinite().all()


def test_shard_refuses_fp16(shards, tmp_path):
    run = forked(tmp_path, "train", *TINY, "--shard", "--dtype", "fp16", "--data-dir", shards, "--out-dir", tmp_path / "run", processes=2)
    assert run.returncode == 2
    assert run.stderr.count("error: --shard does not scale the loss, which fp16 needs: choose --dtype bf16 or fp32\n") == 1


@pytest.mark.slow
def test_self_check_before_a_resume_changes_no_validation(shards, tmp_path):
    """A resumed run may validate averaged weights first. The self-check must leave the weights sharded."""
    flags = ["--compile", "--ema", 0.5, "--max-lr", 0.02, "--max-steps", 6, "--val-every", 2, "--checkpoint-every", 2]
    run_sharded(shards, tmp_path / "run", *flags, first=trace_only)
    before = read_stream(tmp_path / "run", "val")
    for path in (tmp_path / "run").glob("*00006*"):
        path.unlink()
    resume = ["--resume", "--out-dir", tmp_path / "run"]
    run = forked(tmp_path, "train", *resume, processes=2, first=trace_only)
    assert run.returncode == 0 and "self-check" not in run.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["launches"][1]["compiled"]
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert sum(line.startswith("4 val ") for line in lines) == 2
    assert read_stream(tmp_path / "run", "val") == before


def damage_compiled_validation():
    """Makes compiled code that needs no gradients wrong."""
    from ops import linear

    trace_only()
    gelu = linear.gelu
    linear.gelu = lambda x: gelu(x) * (30 if torch.compiler.is_compiling() and not torch.is_grad_enabled() else 1)


@pytest.mark.slow
def test_sharded_validation_is_compiled_and_checked(shards, tmp_path):
    flags = ["--compile", "--max-steps", 3, "--val-every", 1]
    run = run_sharded(shards, tmp_path / "checked", *flags, first=damage_compiled_validation)
    assert "self-check failed: compiled validation loss differs from eager" in run.stderr
    run_sharded(shards, tmp_path / "unchecked", "--no-self-check", *flags, first=damage_compiled_validation)
    right, wrong = losses(tmp_path / "checked", "val"), losses(tmp_path / "unchecked", "val")
    assert all(abs(a - b) > 1e-5 for a, b in zip(right, wrong, strict=True))  # in each validation: none runs eagerly


@pytest.mark.slow
def test_compiled_bf16_sharded_losses_match_one_process(shards, tmp_path):
    flags = ["--dtype", "bf16", "--compile", "--max-steps", 8, "--val-every", 0]
    run_sharded(shards, tmp_path / "sharded", *flags, timeout=280)
    assert run_train(shards, tmp_path / "plain", *SHARED, *flags) == 0
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "plain"), abs=5e-3)


def free_at_once():
    """Makes malloc return freed memory, or the peak would be the allocator's."""
    ctypes.CDLL(None).mallopt(device.M_MMAP_THRESHOLD, 2**20)


@pytest.mark.slow
def test_memory_per_process_shrinks_as_planned(shards, tmp_path):
    """Runs 38 M parameters on two and four processes. Each holds all weights while it evaluates. Subtracts the memory of a process with
    almost no model."""
    flags = "--n-layer 12 --n-head 8 --micro-batch-size 1 --total-batch-tokens 128 --val-tokens 128 --max-steps 2 --val-every 1 --shard"
    peaks = {}
    for processes, width in ((4, 16), (2, 512), (4, 512)):
        argv = [*TINY, *flags.split(), "--n-embd", width, "--data-dir", shards, "--out-dir", tmp_path / f"{processes}_{width}"]
        run = forked(tmp_path, "train", *argv, processes=processes, timeout=250, first=free_at_once)
        assert run.returncode == 0, run.stderr
        rows = [json.loads(line) for line in (tmp_path / f"{processes}_{width}" / "metrics.jsonl").read_text().splitlines()]
        peaks[processes, width] = max(row.get("memory_bytes", 0) for row in rows)
    shape = VariantConfig(vocab_size=257, seq_len=32, n_layer=12, n_head=8, n_embd=512)
    config = TrainConfig(model=shape, micro_batch_size=1, total_batch_tokens=128)
    two, four = (memory(config, Setting("cpu", 4, False, n, shard=True), build_on_meta(shape)).peak for n in (2, 4))
    assert two == pytest.approx(peaks[2, 512] - peaks[4, 16], rel=0.1)
    assert four == pytest.approx(peaks[4, 512] - peaks[4, 16], rel=0.1)
    assert peaks[4, 512] < peaks[2, 512] - 0.2 * 12 * 37.8e6 / 4
