"""Plots match their logs, also a log that a killed run left unfinished."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, covered, run_main, run_train, script, seconds_of

import plot_log
from common import picture
from common.logs import Run, facts_beside, groups_of, read_log, read_metrics, smoothed
from plot_log import PlotConfig


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run" / "log.txt"
    path.parent.mkdir()
    steps = range(0, 100, 10)
    path.write_text("".join(f"{s} train {4 - s / 50}\n{s} val {4 - s / 60:.4f}\n{s} hella {0.25 + s / 1000}\n" for s in steps))
    rows = []
    for s in steps:
        at = {"tokens": s * 1000, "epoch": s / 200, "flops": s * 1e6}
        before, after = at | {"seconds": s / 2 - 0.5}, at | {"seconds": s / 2}  # the update
        rows += [{"step": s, "val_loss": 1.0, **before}, {"step": s, "hellaswag_acc_norm": 0.3, **before}]
        rows += [{"step": s, "loss": 1.0, "lr": 1 / (s + 1), **after}]
    (path.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    return path


def panels_of(figure) -> dict:
    """Title → axes."""
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def write_run(folder: Path, losses, seed: int = 1, stream: str = "val", **settings) -> str:
    """Writes the log and run.json of a run with these losses, 10 steps apart, and returns its folder."""
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("".join(f"{10 * i} {stream} {loss}\n" for i, loss in enumerate(losses)))
    config = {"seed": seed, "model": {"n_layer": 2}, "total_batch_tokens": 1000, "out_dir": str(folder), **settings}
    run = {"size": "none", "params": 446_080, "config": config, "data": {}, "launches": [{"code": {"model.py": "a"}}]}
    (folder / "run.json").write_text(json.dumps(run))
    return str(folder)


def test_later_line_wins_and_half_line_is_skipped(tmp_path, capsys):
    path = tmp_path / "log.txt"
    path.write_text("0 train 5.0\n1 train 4.0\n1 train 3.5\n2 train nan\n3 tra")
    streams = read_log(path)
    assert streams["train"][1] == 3.5 and math.isnan(streams["train"][2])
    assert Run(path, streams).curve("train") == {0: (0, 5.0), 1: (1, 3.5)}
    assert "skipped 1 lines that are not 'step stream value'" in capsys.readouterr().err


def test_reads_build_nanogpt_log(tmp_path):
    (tmp_path / "log.txt").write_text("0 val 10.9511\n0 hella 0.2463\n0 train 10.955029\n250 val 5.9\n")
    assert read_log(tmp_path / "log.txt") == {"val": {0: 10.9511, 250: 5.9}, "hella": {0: 0.2463}, "train": {0: 10.955029}}


@pytest.mark.parametrize(
    ("text", "streams"),
    [
        (
            "number of parameters: 10.65M\nstep 0: train loss 4.2874, val loss 4.2823\niter 0: loss 4.2664, time 26523.50ms, mfu -100.00%\n"
            "iter 10: loss 3.1436, time 21.17ms, mfu 17.60%\nsaving checkpoint to out\n",  # nanoGPT
            {"val": {0: 4.2823}, "train": {0: 4.2664, 10: 3.1436}},
        ),
        (
            "s:0 tel:11.0128\ns:0 eval:0.2501\ns:0 trl:11.0113 lr:0.000001 norm:15.20\n",  # llm.c
            {"val": {0: 11.0128}, "hella": {0: 0.2501}, "train": {0: 11.0113}, "lr": {0: 0.000001}, "grad_norm": {0: 15.2}},
        ),
        (
            "step:0/5100 val_loss:10.8258 train_time:0ms step_avg:nanms\nstep:1/5100 train_loss:10.8251 train_time:30006ms step_avg:nanms\n"
            "step:2/5100 train_time:32006ms step_avg:nanms\n",  # modded-nanogpt
            {"val": {0: 10.8258}, "train": {1: 10.8251}},
        ),
    ],
)
def test_reads_logs_of_other_projects(tmp_path, text, streams):
    (tmp_path / "x.log").write_text(text)
    assert read_log(tmp_path / "x.log") == streams


@pytest.mark.parametrize(("name", "value"), [("tokens", 50_000), ("seconds", 25), ("epoch", 0.25), ("flops", 5e7), ("lr", 1 / 51)])
def test_axes_and_panels_read_metrics_jsonl(log, name, value):
    assert read_metrics(log.with_name("metrics.jsonl"), [name])[name][50] == value


def test_smoothing_is_a_centered_mean():
    values = np.random.default_rng(0).normal(size=50)
    for half in (0, 1, 5):
        left = [min(half, i // 4) for i in range(50)]  # narrow at the start
        plain = [np.mean(values[i - n : i + n + 1]) for i, n in enumerate(left)]
        assert smoothed(values, half) == pytest.approx(plain, abs=1e-12)
    assert len(smoothed(np.array([]), 3)) == 0


@pytest.mark.parametrize(("x", "size"), [("step", "124M"), ("tokens", "1558M"), ("seconds", "none"), ("epoch", "124M"), ("flops", "none")])
def test_plot_is_written_for_each_axis(log, tmp_path, capsys, x, size):
    out = tmp_path / "new folder" / "plot.png"
    assert run_main(plot_log.main, log, log, "--out", out, "--x", x, "--size", size) == 0
    assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size > 20_000
    assert capsys.readouterr().out.strip() == str(out)


def test_curves_match_the_log(log, tmp_path, drawn):
    plain = PlotConfig((str(log),), str(tmp_path / "x.png"), x="tokens", smooth=0.0)
    plot_log.plot(plain)
    plot_log.plot(replace(plain, x="flops", size="none", smooth=0.5, panels=("lr", "lr"), baselines=("mine=3.5",)))
    loss, hella = drawn[0].axes
    assert loss.get_yscale() == "log"
    train, val, baseline = loss.lines
    assert list(train.get_xdata())[:3] == [0, 10_000, 20_000] and list(train.get_ydata())[:2] == [4.0, 3.8]
    assert val.get_ydata()[-1] == 2.5 and baseline.get_ydata()[0] == 3.2924
    assert [line.get_ydata()[0] for line in hella.lines] == [0.25, 0.2955, 0.337, 0.25]
    loss, hella, lr = drawn[1].axes
    faint, smooth, val, mine = loss.lines
    assert list(faint.get_ydata()) == list(train.get_ydata()) and faint.get_alpha() < 0.5
    assert smooth.get_ydata()[5] == pytest.approx((3.2 + 3.0 + 2.8) / 3) and mine.get_ydata()[0] == 3.5
    assert list(lr.lines[0].get_xdata())[:2] == [0, 1e7] and lr.lines[0].get_ydata()[1] == 1 / 11 and len(hella.lines) == 2
    assert len(lr.lines) == 1
    plot_log.plot(replace(plain, logs=(str(log.parent),), x="seconds"))
    train, val = drawn[2].axes[0].lines[:2]
    assert train.get_xdata()[5] == 25 and val.get_xdata()[5] == 24.5 == drawn[2].axes[1].lines[0].get_xdata()[5]  # before the update


@pytest.mark.slow
def test_train_curve_is_smooth_by_default(tmp_path, drawn):
    losses = 3 + np.random.default_rng(0).normal(size=1000)
    run = write_run(tmp_path / "run", losses, stream="train")
    plot_log.plot(PlotConfig((run,), str(tmp_path / "x.png")))
    raw, smooth = drawn[0].axes[0].lines
    assert list(raw.get_ydata()) == pytest.approx(losses) and list(smooth.get_ydata()) == pytest.approx(smoothed(losses, 20))
    assert raw.get_zorder() < smooth.get_zorder() and legend_of(drawn[0]) == ["training, smoothed"]


# ---- seeds, differences, zoom ----


@pytest.mark.slow
def test_seeds_are_a_mean_with_a_band(tmp_path, drawn):
    losses = {1: [3.0, 2.0, 1.5], 2: [3.2, 2.4, 1.6], 3: [3.1, 2.2, 1.4]}
    logs = [write_run(tmp_path / "rope" / str(seed), values, seed, sample_every=seed) for seed, values in losses.items()]
    logs += [write_run(tmp_path / "plain" / str(seed), [x + 0.02 for x in losses[seed]], seed, max_lr=1.0) for seed in (2, 3)]
    plot_log.plot(PlotConfig(tuple(logs), str(tmp_path / "x.png")))
    loss, gap = drawn[0].axes
    means, low, high = (np.array([how(v) for v in zip(*losses.values(), strict=True)]) for how in (np.mean, min, max))
    assert loss.lines[0].get_ydata() == pytest.approx(means) and len(loss.lines) == 2
    corners = loss.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in corners.round(9)} == {*zip((0.0, 10.0, 20.0), low, strict=True), *zip((0.0, 10.0, 20.0), high, strict=True)}
    assert legend_of(drawn[0])[:2] == ["rope, 3 seeds", "plain, 2 seeds"] and "lowest to highest seed" in legend_of(drawn[0])
    assert gap.lines[0].get_ydata() == pytest.approx([0.02] * 3)  # seed by seed
    assert drawn[0].get_suptitle() == "rope and plain: 446 k parameters, 20 k tokens, 2 to 3 seeds"
    plot_log.plot(PlotConfig(tuple(logs[:3]), str(tmp_path / "x.png"), mean=False))
    assert len(legend_of(drawn[1])[:3]) == 3 and not drawn[1].axes[0].collections


def test_only_the_seed_may_differ(tmp_path):
    def run(name, **settings):
        write_run(tmp_path / name, [3.0], **settings)
        return Run(tmp_path / name / "log.txt", {}, facts=facts_beside(tmp_path / name / "log.txt"))

    first, seed, again = run("a", seed=1), run("b", seed=2), run("c", seed=2)
    other, unknown = run("d", seed=3, model={"n_layer": 3}), Run(tmp_path / "e" / "log.txt", {})
    assert [[r.log.parent.name for r in g.runs] for g in groups_of([first, seed, again, other, unknown])] == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e"],
    ]
    other_code = tmp_path / "b" / "run.json"
    other_code.write_text(other_code.read_text().replace('"model.py": "a"', '"model.py": "b"'))
    seed.facts = facts_beside(other_code)
    assert len(groups_of([first, seed])) == 2


@pytest.mark.slow
def test_small_differences_fill_their_panel(tmp_path, drawn):
    losses = np.geomspace(10, 3, 40)
    logs = write_run(tmp_path / "a", losses), write_run(tmp_path / "b", losses + 0.02, max_lr=1.0)
    late = write_run(tmp_path / "c", losses + np.where(np.arange(40) < 10, 1, -0.01), max_lr=2.0)
    plot_log.plot(PlotConfig((*logs, late), str(tmp_path / "x.png")))
    gap = panels_of(drawn[0])["Difference from a: below 0 is better"]
    assert gap.lines[0].get_ydata() == pytest.approx([0.02] * 40) and gap.get_ylim() == pytest.approx((-0.013, 0.023))
    assert {"+0.01", "+0.02", "0"} <= {gap.yaxis.get_major_formatter()(y, 0) for y in gap.get_yticks()}


@pytest.mark.slow
def test_zoom_shows_the_last_part(tmp_path, drawn):
    logs = [write_run(tmp_path / name, np.geomspace(10, 3, 101) + shift, max_lr=shift) for name, shift in (("a", 0.0), ("b", 0.02))]
    plot_log.plot(PlotConfig(tuple(logs), str(tmp_path / "x.png"), zoom=0.25))
    loss, gap = drawn[0].axes
    assert loss.lines[0].get_xdata()[0] == gap.lines[0].get_xdata()[0] == 750 and loss.get_ylim()[1] < 4.2
    assert len(loss.get_yticks()) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("validations", [50, 1])
def test_ten_runs_stay_readable(tmp_path, drawn, validations):
    """No raw curves, one line and one entry for each run, no two alike, and the legend covers no panel."""
    names = [f"a run with a long name, number {i}" for i in range(10)]
    losses = np.geomspace(9, 3, validations)
    logs = [write_run(tmp_path / name, losses + i / 100, max_lr=i / 10) for i, name in enumerate(names)]
    plot_log.plot(PlotConfig(tuple(logs), str(tmp_path / "x.png")))
    (figure,) = drawn
    looks = {(line.get_color(), str(line._dash_pattern)) for line in figure.axes[0].lines}
    assert len(looks) == len(figure.axes[0].lines) == 10 and legend_of(figure) == [*names, "validation"]
    assert not covered(figure)


# ---- baselines and units ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "file", "error"), [(201, "own.jsonl", 0.0305), (0, "own.jsonl", None), (0, "hellaswag_val.jsonl", 0.00432)]
)
def test_hellaswag_shows_chance_and_its_error(tmp_path, drawn, tasks, file, error):
    run = write_run(tmp_path / "run", [0.25, 0.27], stream="hella", hellaswag_file=file)
    if tasks:
        row = {"step": 10, "hellaswag_acc_norm": 0.27, "hellaswag_tasks": tasks}
        (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    plot_log.plot(PlotConfig((run,), str(tmp_path / "x.png"), size="124M"))
    hella = panels_of(drawn[0])["HellaSwag, completion style: accuracy"]
    assert hella.lines[-1].get_ydata() == [0.25, 0.25]
    bands = [(box.get_y(), box.get_y() + box.get_height()) for box in hella.patches]
    assert bands == ([pytest.approx((0.25 - error, 0.25 + error), abs=1e-4)] if error else [])
    shown = f"guessing: 25 % ± 1 standard error ({tasks or 10_042:,} tasks)" if error else "guessing: 25 %"
    assert shown in legend_of(drawn[0])
    assert hella.yaxis.get_major_formatter()(0.25, 0) == "25 %"


@pytest.mark.slow
def test_axes_read_as_people_write(log, tmp_path, drawn):
    for x, last in (("tokens", "80 k"), ("seconds", "40 s"), ("flops", "80 M"), ("step", "80")):
        plot_log.plot(PlotConfig((str(log),), str(tmp_path / "x.png"), x=x, panels=("lr",), size="none"))
        axes = drawn[-1].axes[0]
        drawn[-1].draw_without_rendering()
        texts = [label.get_text() for label in axes.get_xticklabels()]
        assert last in texts and axes.xaxis.get_offset_text().get_text() == "" == drawn[-1].axes[2].yaxis.get_offset_text().get_text()


@pytest.mark.slow
def test_tokens_need_only_run_json(tmp_path, drawn):
    run = write_run(tmp_path / "run", [3.0, 2.0])
    plot_log.plot(PlotConfig((run,), str(tmp_path / "x.png"), x="tokens"))
    assert list(drawn[0].axes[0].lines[-1].get_xdata()) == [0, 10_000]


@pytest.mark.parametrize(
    ("run", "lines"),
    [({"size": "none"}, 2), ({"size": "1558M"}, 2), ({"size": "124M"}, 3), ({}, 3), ({"size": "x"}, 3), ([], 3), (None, 3)],
)
def test_baselines_follow_the_runs_size(log, tmp_path, drawn, run, lines):
    if run is not None:
        (log.parent / "run.json").write_text(json.dumps(run))
    plot_log.plot(PlotConfig((str(log),), str(tmp_path / "x.png"), smooth=0.0))
    loss, hella = drawn[0].axes
    assert len(loss.lines) == lines  # only 124M has a published loss
    assert len(hella.lines) == (2 if run == {"size": "none"} else 4)


def test_no_score_means_no_hellaswag_panel(tmp_path, drawn):
    (tmp_path / "log.txt").write_text("0 val 10.9\n10 val 9.9\n")
    plot_log.plot(PlotConfig((str(tmp_path),), str(tmp_path / "x.png"), size="124M"))
    assert len(drawn[0].axes) == 1


def test_plots_19073_steps_in_three_seconds(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("".join(f"{s} train {10 / (s + 1) + 3 + (s * 7919 % 101) / 500}\n" for s in range(19073)))
    rows = ({"step": s, "loss": 3.0, "tokens": s * 524288, "lr": 6e-4, "grad_norm": 0.3} for s in range(19073))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--x", "tokens", "--smooth", "0.99", "--panels", "lr", "grad_norm", "--out", tmp_path / "plot.svg"]
    matplotlib = "from matplotlib.figure import Figure; Figure().savefig('/dev/null', format='svg')"

    def plots_in_time() -> bool:
        seconds = seconds_of(REPO / "plot_log.py", log, *flags)
        return seconds < 3 or seconds < 3 * seconds_of("-c", matplotlib)  # a busy machine is slow at this too

    assert any(plots_in_time() for _ in range(3))


def test_size_of_finds_openai_sizes():
    published = {
        124_439_808: "124M",
        354_823_168: "350M",
        774_030_080: "774M",
        1_557_611_200: "1558M",
        446_080: "none",
        200_000_000: "none",
    }
    assert {params: plot_log.size_of(params) for params in published} == published


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        (None, [], "no log"),
        ("hello\n", [], "no line 'step stream value'"),
        ("0 train 1.0\n", ["--x", "tokens"], "use --x step"),
        ("0 train 1.0\n", ["--panels", "mfu"], "--panels mfu is in no log or metrics.jsonl: drop it"),
        ("12 monkeys 3\n", [], "no line 'step stream value'"),
        ("0 train 1.0\n", ["--smooth", "1"], "--smooth is 1.0: it must be at least 0 and below 1"),
        ("0 train 1.0\n", ["--zoom", "0"], "--zoom is 0.0: it must be above 0 and at most 1"),
        ("0 train 1.0\n", ["--baselines", "mine=3", "none"], "--baselines needs NAME=LOSS"),
        ("0 train 1.0\n", ["--baselines", "mine=-3"], "--baselines needs NAME=LOSS"),
        ("0 train 1.0\n", ["--out", "v1.5"], "--out v1.5 has no known extension: use one of png"),
    ],
)
def test_wrong_log_or_flag_is_one_line(tmp_path, capsys, text, argv, message):
    if text:
        (tmp_path / "log.txt").write_text(text)
    assert run_main(plot_log.main, tmp_path / "log.txt", "--out", tmp_path / "p.png", *argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


def no_latex(self, *args, **kwargs):
    raise RuntimeError("Failed to process string with tex\nbecause latex could not be found")


@pytest.mark.parametrize("fault", ["missing", "latex", "full disk"])
def test_matplotlib_error_is_one_line(log, tmp_path, capsys, monkeypatch, fault):
    out = tmp_path / "plot.png"
    out.write_text("before")
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    elif fault == "latex":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", no_latex)
    else:
        monkeypatch.setattr(picture, "write_atomically", partial(raise_full, out))
    assert run_main(plot_log.main, log, "--out", out) == (1 if fault == "full disk" else 2)
    (error,) = capsys.readouterr().err.strip().splitlines()
    message = {
        "missing": f"error: can't draw {out} (import of matplotlib.figure halted; None in sys.modules): pip install matplotlib",
        "latex": f"error: can't draw {out} (Failed to process string with tex because latex could not be found): look at MPLBACKEND and",
        "full disk": f"error: [Errno 28] No space left on device: '{out}': free some space and run the command again",
    }[fault]
    assert error.startswith(message) and out.read_text() == "before"


def raise_full(out, *args):
    raise OSError(28, "No space left on device", str(out))


def test_unknown_backend_is_one_line(log, tmp_path):
    result = script("plot_log.py", log, "--out", tmp_path / "p.png", MPLBACKEND="nonsense")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "'nonsense' is not a valid value" in result.stderr
    assert result.stderr.startswith(f"error: can't draw {tmp_path}/p.png (") and "look at MPLBACKEND" in result.stderr


@pytest.mark.parametrize("error", [RuntimeError("no\nfont"), OSError(28, "No space left on device")])
def test_failed_plot_does_not_fail_a_run(shards, tmp_path, capsys, monkeypatch, error):
    def fail(self, *args, **kwargs):
        raise error

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    assert run_train(shards, tmp_path / "run", "--max-steps", 2) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning: no plot" in line]
    assert warning.startswith(f"warning: no plot: can't draw {tmp_path}/run/log_plot.png (") and "python plot_log.py" in warning
    assert (tmp_path / "run" / "model_00002.pt").exists()


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["_a", "$b"], [" _a", r"\$b"]),
        (["a/1", "b/1"], ["a", "b"]),
        (["_a/1", "_a/2"], ["1/log.txt", "2/log.txt"]),
        (["a/x", "b/x"], ["a/x/log.txt", "b/x/log.txt"]),
        (["x" * 99, "b"], ["x" * 29 + "…" + "x" * 30, "b"]),
        (["x" * 40 + "a" + "x" * 40, "x" * 40 + "b" + "x" * 40], ["1: " + "x" * 29 + "…" + "x" * 30, "2: " + "x" * 29 + "…" + "x" * 30]),
        (["a\udcff", "b"], ["a?", "b"]),
    ],
)
def test_legend_tells_all_runs_apart(tmp_path, drawn, folders, labels):
    logs = [tmp_path / folder / "log.txt" for folder in folders]
    for path in logs:
        path.parent.mkdir(parents=True)
        path.write_text("0 val 2.5\n")
    plot_log.plot(PlotConfig(tuple(map(str, logs)), str(tmp_path / "x.png"), size="none", baselines=("_mine=3",)))
    assert legend_of(drawn[0]) == [*labels, "validation", " _mine"]


@pytest.mark.filterwarnings("error")
def test_plots_odd_names_and_log_without_losses(tmp_path, capsys):
    log = tmp_path / "$a^{$" / "log.txt"
    log.parent.mkdir()
    log.write_text("0 hella 0.25\n")
    assert run_main(plot_log.main, log, log, "--out", f"{tmp_path}/pictures/") == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/pictures/log_plot.png" and (tmp_path / "pictures/log_plot.png").exists()
