"""lab.false_keeps: its rates against exact intervals, and a complete count on tiny models."""

import json
import re

import pytest
from conftest import TINY, run_main, run_train
from scipy import stats

from common.files import write_json
from lab import false_keeps
from lab.false_keeps import FalseKeepsConfig, Losses, rate
from training.flags import parse_flags


@pytest.mark.parametrize(("hits", "n"), [(0, 100), (3, 100), (100, 100)])
def test_rates_have_exact_intervals(hits, n):
    interval = stats.binomtest(hits, n).proportion_ci(0.95, "exact")
    assert (rate(hits, n)["low"], rate(hits, n)["high"]) == pytest.approx((interval.low, interval.high))


@pytest.mark.slow
@pytest.mark.parametrize(("advantage", "false"), [(0.0, 0), (1.0, 4)])
def test_verdicts_are_counted_over_trials(tmp_path, monkeypatch, advantage, false):
    """The other seeds get an advantage, so that "better" is found in every trial or in none."""

    def train_once(config) -> float:
        other = config.seed > false_keeps.OTHER_SEEDS
        gain = (0.5 + 1e-6 * config.seed) * (config.model.mlp == "relu2")
        return 3.0 + 0.01 * (config.seed % 7) * (-1) ** config.seed - advantage * other - gain

    monkeypatch.setattr(false_keeps, "train_once", train_once)
    config = FalseKeepsConfig(trials=4, pairs=10, out_dir=str(tmp_path))
    losses = Losses(config)
    assert [kind["hits"] for kind in false_keeps.false_keeps(config, losses).values()] == [false, false]
    gain = false_keeps.real_gain(config, losses)
    assert gain["difference"] == pytest.approx(-0.5, abs=1e-4) and gain["found"]["hits"] == 2


@pytest.mark.slow
def test_losses_equal_train_pys_and_are_kept(shards, tmp_path, monkeypatch, capsys):
    assert run_train(shards, tmp_path / "run", "--max-steps", 4, "--seed", 3) == 0
    expected = float(re.findall(r"step 4: val loss (\S+)", capsys.readouterr().out)[-1])
    flags = " ".join([*TINY, "--max-steps", "4", "--data-dir", str(shards)])
    assert false_keeps.train_once(parse_flags([*flags.split(), "--seed", "3"])) == pytest.approx(expected, abs=5e-5)
    argv = ["--trials", 1, "--seeds", 2, "--limit", 3, "--pairs", 4, "--out-dir", tmp_path, f"--flags={flags}", "--json"]
    assert run_main(false_keeps.main, *argv) == 0
    found = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(false_keeps, "train_once", None)
    assert run_main(false_keeps.main, *argv) == 0 and json.loads(capsys.readouterr().out) == found
    assert run_main(false_keeps.main, *argv[:-2]) == 2
    assert "has the losses of other flags, data: choose another --out-dir" in capsys.readouterr().err
    kept = json.loads((tmp_path / "losses.json").read_text())
    for other in ("code", "data"):
        write_json(tmp_path / "losses.json", kept | {other: {}})
        assert run_main(false_keeps.main, *argv) == 2
        assert f"has the losses of other {other}: choose another --out-dir" in capsys.readouterr().err
