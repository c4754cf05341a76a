"""lab.ensemble against the plain formula and the loss that train.py logged."""

import pytest
import torch
from conftest import read_stream, run_main, run_train, write_shards

import checkpoint
from common.shards import find_shards
from dataloader import TokenStream
from lab import ensemble


@pytest.fixture(scope="module")
def variant(shards, tmp_path_factory):
    """A variant with two seeds, as lab.compare writes it."""
    folder = tmp_path_factory.mktemp("variant")
    for seed in (1, 2):
        assert run_train(shards, folder / str(seed), "--max-steps", 20, "--val-tokens", 320, "--seed", seed) == 0
    return folder


def test_mean_prediction_equals_the_plain_formula(variant, shards):
    *each, mean = ensemble.losses([variant / "1", variant / "2"], torch.device("cpu"))
    logged = [float(read_stream(variant / seed, "val")[20]) for seed in "12"]
    assert each == pytest.approx(logged, abs=1e-5)
    stream = TokenStream(find_shards(shards), "val", 32, shuffle=False)
    count = stream.sequences_per_epoch
    x, y = map(torch.from_numpy, stream.batch([i * count // 10 for i in range(10)]))
    p = sum(checkpoint.load_model(str(variant / seed))[0](x)[0].softmax(-1) for seed in "12") / 2
    assert mean == pytest.approx(-p.gather(2, y[..., None]).log().mean().item(), abs=1e-5)
    assert mean < sum(each) / 2


def test_a_folder_stands_for_its_seeds(variant, capsys):
    assert run_main(ensemble.main, variant) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:]] == [str(variant / "1"), str(variant / "2"), "mean"]
    assert out.count(f"{ensemble.losses([variant / '1', variant / '2'], torch.device('cpu'))[2]:.4f}") == 1


def test_unlike_runs_are_refused(variant, shards, tmp_path, capsys):
    assert run_train(shards, tmp_path / "run", "--max-steps", 1, "--seq-len", 16) == 0
    assert run_train(write_shards(tmp_path / "shards", [1000, 5000]), tmp_path / "far", "--max-steps", 1) == 0
    for argv, message in (
        ([variant / "1"], "at least two"),
        ([variant, tmp_path / "none"], "none is no run"),
        ([variant / "1", variant / "1"], "at least two"),
        ([variant, tmp_path / "run"], "run has --seq-len 16, "),
        ([variant, tmp_path / "far"], "far was trained on other data than"),
    ):
        assert run_main(ensemble.main, *argv) == 2
        assert message in capsys.readouterr().err
