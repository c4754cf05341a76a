"""Logs in, pictures out; what a killed run leaves behind does not stop it."""

import json
import math

import pytest
from conftest import run_main

import plot_log
from plot_log import points, read_axis, read_log


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run" / "log.txt"
    path.parent.mkdir()
    steps = range(0, 100, 10)
    path.write_text("".join(f"{s} train {4 - s / 50}\n{s} val {4 - s / 60:.4f}\n{s} hella {0.25 + s / 1000}\n" for s in steps))
    rows = [{"step": s, "tokens": s * 1000, "seconds": s / 2, "epoch": s / 200} for s in steps]
    (path.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    return path


def test_a_later_line_counts_and_a_half_line_does_not(tmp_path, capsys):
    path = tmp_path / "log.txt"
    path.write_text("0 train 5.0\n1 train 4.0\n1 train 3.5\n2 train nan\n3 tra")
    streams = read_log(path)
    assert streams["train"][1] == 3.5 and math.isnan(streams["train"][2])
    assert points(streams["train"], None) == ([0, 1], [5.0, 3.5])
    assert "1 lines are not 'step stream value'" in capsys.readouterr().err


def test_build_nanogpts_log_is_read(tmp_path):
    (tmp_path / "log.txt").write_text("0 val 10.9511\n0 hella 0.2463\n0 train 10.955029\n250 val 5.9\n")
    assert read_log(tmp_path / "log.txt") == {"val": {0: 10.9511, 250: 5.9}, "hella": {0: 0.2463}, "train": {0: 10.955029}}


@pytest.mark.parametrize(("x", "value"), [("tokens", 50_000), ("seconds", 25), ("epoch", 0.25)])
def test_axes_come_from_the_metrics(log, x, value):
    assert read_axis(log, x)[50] == value


@pytest.mark.parametrize("x", ["step", "tokens", "seconds", "epoch"])
@pytest.mark.parametrize("size", ["124M", "1558M", "none"])
def test_the_picture_is_drawn(log, tmp_path, capsys, x, size):
    out = tmp_path / "new folder" / "plot.png"
    assert run_main(plot_log.main, log, log, "--out", out, "--x", x, "--size", size) == 0
    assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size > 20_000
    assert capsys.readouterr().out.strip() == str(out)


def test_what_is_drawn_is_what_the_log_says(log, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    plot_log.plot([str(log)], str(tmp_path / "x.png"), "tokens", "124M")
    loss, hella = drawn[0].axes
    assert loss.get_yscale() == "log"
    train, val, baseline = loss.lines
    assert list(train.get_xdata())[:3] == [0, 10_000, 20_000] and list(train.get_ydata())[:2] == [4.0, 3.8]
    assert val.get_ydata()[-1] == 2.5 and baseline.get_ydata()[0] == 3.2924
    assert [line.get_ydata()[0] for line in hella.lines] == [0.25, 0.2955, 0.337]


def test_a_models_baselines_are_those_of_its_size():
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
        ("0 train 1.0\n", ["--out", "v1.5"], "--out v1.5: its ending chooses the format, one of png"),
    ],
)
def test_a_log_that_cannot_be_drawn_is_one_line(tmp_path, capsys, text, argv, message):
    if text:
        (tmp_path / "log.txt").write_text(text)
    assert run_main(plot_log.main, tmp_path / "log.txt", "--out", tmp_path / "p.png", *argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


@pytest.mark.filterwarnings("error")
def test_odd_names_and_a_log_without_losses_are_drawn(tmp_path, capsys):
    log = tmp_path / "$a^{$" / "log.txt"
    log.parent.mkdir()
    log.write_text("0 hella 0.25\n")
    assert run_main(plot_log.main, log, log, "--out", f"{tmp_path}/pictures/") == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/pictures/log_plot.png" and (tmp_path / "pictures/log_plot.png").exists()
