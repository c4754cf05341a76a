"""lab.scaling: fits against known and published laws, plans against a search, and one complete ladder."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, TINY, Finished, forked, rewrite_run, run_main, run_train
from scipy.optimize import approx_fprime, minimize_scalar

from common import cli
from lab import runs, scaling
from lab.scaling import PUBLISHED, Law, Point, bootstrap, fit, objective
from training.config import TrainConfig
from variants import build_on_meta

LAWS = [PUBLISHED["besiroglu"], PUBLISHED["hoffmann"], Law(0.6, 30.0, 200.0, 0.3, 0.4)]


def points_on(law: Law, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """5 sizes on 4 amounts of tokens each, with a relative error in the loss."""
    rng = np.random.default_rng(seed)
    grid = [(n, d) for n in (2e5, 6e5, 2e6, 6e6, 2e7) for d in (1e6, 4e6, 16e6, 64e6)]
    return [Point("", n, d, law.loss(n, d) * math.exp(noise * rng.standard_normal())) for n, d in grid]


@pytest.mark.parametrize("law", LAWS)
def test_fit_recovers_the_law(law):
    found, _ = fit(points_on(law))
    assert [*vars(found).values()] == pytest.approx([*vars(law).values()], rel=1e-4)
    found, _ = fit(points_on(law, noise=1e-4))
    assert [*vars(found).values()] == pytest.approx([*vars(law).values()], rel=0.05)


def test_an_outlier_changes_the_fit_little():
    points = points_on(LAWS[0], noise=1e-4)
    points[7] = points[7]._replace(loss=points[7].loss * 1.2)
    assert fit(points)[0].loss(1e8, 1e9) == pytest.approx(LAWS[0].loss(1e8, 1e9), rel=0.01)


def test_gradient_matches_the_objective():
    rng = np.random.default_rng(0)
    log_n, log_d, log_loss = np.log([[p.params, p.tokens, p.loss] for p in points_on(LAWS[0])]).T
    for _ in range(5):
        theta = np.array([5.0, 6.0, 0.5, 0.3, 0.3]) * rng.uniform(0.8, 1.2, 5)
        value, gradient = objective(theta, log_n, log_d, log_loss)
        assert gradient == pytest.approx(approx_fprime(theta, lambda t: objective(t, log_n, log_d, log_loss)[0]), rel=1e-3, abs=1e-6)
        a, b, e, alpha, beta = theta  # the plain formula
        error = np.log(np.exp(e) + np.exp(a) / np.exp(log_n) ** alpha + np.exp(b) / np.exp(log_d) ** beta) - log_loss
        huber = [0.5 * r * r if abs(r) < 1e-3 else 1e-3 * (abs(r) - 5e-4) for r in error]
        assert value == pytest.approx(sum(huber))


def test_intervals_cover_the_truth():
    law, inside = LAWS[2], 0
    for seed in range(4):
        points = points_on(law, 2e-3, seed)
        laws = bootstrap(points, fit(points)[1], 25, seed)
        for name, value in vars(law).items():
            low, high = scaling.interval([getattr(each, name) for each in laws])
            inside += low <= value <= high
    assert 0.5 * 20 < inside < 20


@pytest.mark.parametrize("law", LAWS)
def test_best_size_matches_a_search(law):
    for flops in (1e15, 1e19, 1e23):
        n, d = law.best(flops)
        assert 6 * n * d == pytest.approx(flops)
        searched = minimize_scalar(lambda x, c=flops: law.loss(math.exp(x), c / 6 / math.exp(x)), bounds=(5, 40), method="bounded")
        assert math.log(n) == pytest.approx(searched.x, abs=0.01)
    low, high = (law.loss(*law.best(c)) - law.E for c in (1e18, 1e20))
    assert math.log(low / high) / math.log(100) == pytest.approx(law.exponent)


def test_published_laws_give_published_sizes():
    n, d = PUBLISHED["besiroglu"].best(5.76e23)  # Besiroglu et al., 2024: Chinchilla (70 B parameters, 1.4 T tokens) is about optimal
    assert n == pytest.approx(70e9, rel=0.1) and d == pytest.approx(1.4e12, rel=0.1)
    low, high = (PUBLISHED["hoffmann"].best(c)[0] for c in (1e20, 1e22))
    assert math.log(high / low) / math.log(100) == pytest.approx(0.46, abs=0.01)  # Hoffmann et al., 2022, table 2, approach 3
    kaplan = PUBLISHED["kaplan"]
    assert kaplan.best(1e3 * 8.64e19)[0] / kaplan.best(8.64e19)[0] == pytest.approx(1000**0.73)
    assert kaplan.loss(1.5e9, 1e30) == pytest.approx((8.8e13 / 1.5e9) ** 0.076, rel=0.05)  # equation 1.1 has other constants


# ---- plans ----


def plan_of(capsys, *flags) -> dict:
    assert run_main(scaling.main, "plan", *flags, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_plan_spends_the_budget(capsys, tmp_path):
    found = plan_of(capsys, "--dollars", 30, "--price", 3, "--gpu", "H100", "--mfu", 0.5)
    assert found["flops"] == pytest.approx(10 * 3600 * 0.5 * 989e12) and found["gpu_hours"] == pytest.approx(10) and found["dollars"] == 30
    assert all(6 * row["params"] * row["tokens"] == pytest.approx(found["flops"]) for row in found["rows"])
    assert min(found["rows"], key=lambda row: row["loss"]) == found["rows"][1]
    assert plan_of(capsys, "--gpu-hours", 10, "--mfu", 0.5)["rows"] == found["rows"]
    assert plan_of(capsys, "--flops", found["flops"], "--mfu", 0.5)["rows"] == found["rows"]
    (tmp_path / "law.json").write_text(json.dumps({"law": vars(PUBLISHED["besiroglu"])}))
    assert plan_of(capsys, "--gpu-hours", 10, "--mfu", 0.5, "--law", tmp_path / "law.json")["rows"] == found["rows"]


def test_plan_flags_have_about_its_size(capsys):
    """Builds the model that train.py would. Kaplan et al. count only the blocks."""
    for law, flops in itertools.product(("besiroglu", "kaplan"), (1e17, 1e18, 1e20, 1e21)):
        assert run_main(scaling.main, "plan", "--law", law, "--flops", flops, "--json") == 0
        for row in json.loads(capsys.readouterr().out)["rows"]:
            model = build_on_meta(cli.parse(TrainConfig, row["shape"].split()).model)
            assert model.num_params() == row["its_params"]
            counted = sum(p.numel() for p in model.transformer.h.parameters()) if law == "kaplan" else model.num_params()
            assert counted == pytest.approx(row["params"], rel=0.15)
            assert 40 <= model.config.n_embd / model.config.n_layer <= 100 or row["params"] < 3e7


def test_plan_counts_the_tables_of_byte_shards(capsys):
    """GPT-2's vocabulary would leave no room for layers."""
    flags = ("--law", REPO / "results" / "law.json", "--flops", 3e14, "--vocab-size", 257, "--seq-len", 256)
    for row in plan_of(capsys, *flags)["rows"]:
        model = build_on_meta(cli.parse(TrainConfig, [*row["shape"].split(), "--vocab-size", "257", "--seq-len", "256"]).model)
        assert model.num_params() == row["its_params"] == pytest.approx(row["params"], rel=0.15)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan", "give one budget: --flops 1e19"),
        ("plan --flops 1e19 --gpu-hours 3", "give one budget"),
        ("plan --dollars 3 --mfu 2", "--dollars needs --price: dollars per hour of one --gpu; --mfu is 2.0: it must be above 0"),
        ("plan --flops 1e19 --law nowhere.json", "nowhere.json is not a law: give besiroglu, hoffmann, kaplan or a law.json"),
        ("plan --flops inf", "--flops is inf: it must be a finite number of at least 0"),
        ("plan --flops 1e19 --law {tmp}/empty.json", "is not a law: give besiroglu, hoffmann, kaplan or a law.json"),
        (
            "fit --out-dir {tmp}/nowhere",
            "no finished run in {tmp}/nowhere: train some with python -m lab.scaling ladder --data-dir SHARDS --out-dir {tmp}/nowhere",
        ),
        ("fit --points {tmp}/few.csv", "1 points are too few to fit: give at least 6, with 3 sizes and 3 token counts"),
        ("fit --points {tmp}/few.csv --hold-out 2", "--hold-out 2 leaves none of 1 runs to fit: lower it"),
        ("fit --points {tmp}/flat.csv", "no law fits these runs, their losses do not fall with size: train"),
        ("plan --flops 1e19 --law {tmp}/nan.json", "nan.json is not a law"),
        ("fit --points {tmp}/odd.csv", "odd.csv, line 3: params and tokens must be from 1 to 1e30, loss above 0"),
        ("fit --points {tmp}/huge.csv", "huge.csv, line 2: params and tokens must be from 1 to 1e30"),
        ("fit --points {tmp}/header.csv", "header.csv needs a first line of column names, with commas: params,tokens,loss"),
        ("fit --points {tmp}/empty.json", "empty.json needs a first line of column names"),
        ("fit --points {tmp}/none.csv", "none.csv has no points: add lines with params,tokens,loss"),
        ("fit --points {tmp}/nowhere.csv", "nowhere.csv"),
        (
            "ladder --data-dir {tmp} --sizes 3x33 --tokens 0 --workers 0",
            "--workers is 0: it must be at least 1; --sizes 3x33: give LAYERSxWIDTH",
        ),
        ("ladder --data-dir {tmp}/nowhere", "no shards: the folder {tmp}/nowhere does not exist"),
        ("ladder --data-dir {tmp} --flags=--seq-len=0", "--flags: seq_len is 0"),
        (
            "ladder --data-dir {tmp} --flags=--plan",
            "--flags: --plan, --rehearse, --replay-step and --resume start no new run: leave them out",
        ),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, capsys):
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "few.csv").write_text("params,tokens,loss\n1e6,1e6,3.0\n")
    (tmp_path / "flat.csv").write_text("params,tokens,loss\n" + "".join(f"{n}e6,{d}e6,{n + d}\n" for n in (1, 2, 4) for d in (1, 2, 4)))
    (tmp_path / "nan.json").write_text(json.dumps({"law": vars(LAWS[0]) | {"beta": 0}}))
    (tmp_path / "huge.csv").write_text("params,tokens,loss\n1e200,1e6,3.0\n")
    (tmp_path / "header.csv").write_text("params;tokens;loss\n1e6;1e6;3.0\n")
    (tmp_path / "none.csv").write_text("params,tokens,loss\n")
    (tmp_path / "odd.csv").write_text("\ufeffparams,tokens,loss\n1e6,1e6,3.0\n1e6,,3.0\n")
    assert run_main(scaling.main, *words.format(tmp=tmp_path).split()) == 2
    err = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in err and err.count("\n") == 1


# ---- the ladder ----


def test_runs_of_another_ladder_are_named(shards, tmp_path, capsys):
    assert (
        run_train(shards, tmp_path / "a", "--max-steps", 2) == 0
        and run_train(shards, tmp_path / "b", "--max-steps", 5, "--n-layer", 1) == 0
    )
    assert [(p.name, p.tokens) for p in scaling.points_of(scaling.finished_in(tmp_path))] == [("a", 2 * 256), ("b", 5 * 256)]
    assert run_train(shards, tmp_path / "c", "--max-steps", 2, "--max-lr", 1e-3) == 0
    assert run_main(scaling.main, "fit", "--out-dir", tmp_path) == 2
    assert f"max_lr 0.001 does not fit {tmp_path}/a, which has 0.003: move {tmp_path}/c elsewhere, it belongs to" in capsys.readouterr().err
    ladder = ["ladder", "--data-dir", shards, "--out-dir", tmp_path, "--sizes", "1x32", "--tokens", 512, "--warmup-ratio", 0]
    assert run_main(scaling.main, *ladder, f"--flags={' '.join(map(str, TINY))}") == 2  # before it trains anything
    assert f"max_lr 0.001 does not fit this ladder, which has 0.003: move {tmp_path}/c elsewhere, it belongs to" in capsys.readouterr().err
    assert run_main(scaling.main, "fit", "--out-dir", tmp_path, "--points", "some.csv") == 2
    assert f"--out-dir {tmp_path} has a ladder, and --points would overwrite its law: choose another --out-dir" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_fit_refuses_mixed_code(shards, tmp_path, capsys):
    for name, steps in (("a", 2), ("b", 5)):
        assert run_train(shards, tmp_path / name, "--max-steps", steps) == 0
    rewrite_run(tmp_path / "b", lambda launch: launch["code"].update({"model.py": "older"}))
    assert run_main(scaling.main, "fit", "--out-dir", tmp_path, "--bootstraps", 0) == 2
    assert "too few to fit" in capsys.readouterr().err
    points = [["x", n, d, LAWS[0].loss(n, d)] for n in (1e6, 2e6, 4e6) for d in (1e6, 2e6, 4e6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "points_of", lambda finished: [Point(*point) for point in points])
        assert run_main(scaling.main, "fit", "--out-dir", tmp_path, "--bootstraps", 0) == 2
        assert f"error: {tmp_path}/b was trained by other code (model.py): train all runs again" in capsys.readouterr().err
        assert not (tmp_path / "law.json").exists()
        assert run_main(scaling.main, "fit", "--out-dir", tmp_path, "--bootstraps", 0, "--mixed") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/b was trained by other code (model.py)"


def test_ladder_refuses_runs_of_other_code(shards, tmp_path, capsys):
    ladder = ["ladder", "--data-dir", shards, "--out-dir", tmp_path, "--sizes", "1x32", "--tokens", 512, "--warmup-ratio", 0]
    assert run_train(shards, tmp_path / "a", "--max-steps", 2) == 0
    rewrite_run(tmp_path / "a", lambda launch: launch["code"].update({"ops/loss.py": "older"}))
    assert run_main(scaling.main, *ladder, f"--flags={' '.join(map(str, TINY))}") == 2
    assert f"error: {tmp_path}/a was trained by other code (ops/loss.py): " in capsys.readouterr().err


@pytest.mark.slow
def test_ladder_trains_once_and_fits(shards, tmp_path, tmp_path_factory, capsys, monkeypatch):
    monkeypatch.setattr(runs, "launch", lambda argv, env: Finished(forked(tmp_path_factory.mktemp("output"), "train", *argv)))
    flags = " ".join(TINY).replace("--max-steps 20", "").replace("--warmup-steps 3", "")
    words = ["ladder", "--data-dir", shards, "--out-dir", tmp_path, f"--flags={flags}", "--workers", 2]
    grid = ["--sizes", "1x32", "2x32", "2x64", "--tokens", 2560, 5120, 10240]
    assert run_main(scaling.main, *words, *grid) == 0
    folders = {path.name: path.stat().st_mtime for path in Path(tmp_path).iterdir()}
    assert len(folders) == 9 and "2x64_10240" in folders
    capsys.readouterr()
    assert run_main(scaling.main, *words, *grid) == 0
    assert folders == {path.name: path.stat().st_mtime for path in Path(tmp_path).iterdir()}
    assert run_main(scaling.main, "fit", "--out-dir", tmp_path, "--hold-out", 1, "--bootstraps", 5, "--markdown") == 0
    out = capsys.readouterr().out
    assert out.count("| 1x32_") == 3 and "| 2x64_10240 (held out) |" in out
    found = json.loads((tmp_path / "law.json").read_text())
    last = json.loads((tmp_path / "2x64_10240" / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["held_out"][0][3] == last["val_loss"] and found["error"] < 0.1
    assert (tmp_path / "scaling.png").stat().st_size > 20_000
