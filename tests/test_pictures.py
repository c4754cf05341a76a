"""Pictures in common: colors and lines can be told apart, numbers read as people write them, legends cover nothing."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO, covered

from common import picture
from common.picture import COLORS, SI, log_ticks, look, short
from lab import cluster, length, scaling


@pytest.mark.parametrize(
    ("x", "how", "text"),
    [
        (0, {}, "0"),
        (1500, {}, "1,500"),
        (300_000, {}, "300 k"),
        (5e5, {"top": 4e6}, "0.5 M"),
        (0, {"top": 4e6}, "0"),
        (1.5e9, {}, "1.5 B"),
        (1e14, {}, "100 T"),
        (526e6, {"names": SI}, "526 M"),
        (8e18, {"names": SI}, "8 E"),
        (234_436, {"digits": 2}, "234 k"),
        (6e-4, {}, "0.0006"),
        (2e-5, {}, "2e-5"),
        (-2.5e6, {}, "-2.5 M"),
    ],
)
def test_numbers_read_as_people_write(x, how, text):
    assert short(x, **how) == text


@pytest.mark.parametrize("ends", [(1.2, 5.6), (3.2, 11.0), (1.36, 1.57), (2.98, 3.02), (1e-4, 1e-1), (0.2, 900.0), (3.28, 3.29)])
def test_logarithmic_axes_have_enough_round_ticks(ends):
    ticks = log_ticks(*ends)
    assert 5 <= len(ticks) <= 14 and ends[0] <= min(ticks) and max(ticks) <= ends[1]
    assert all(len(f"{tick:g}".replace("0.", "").replace(".", "").strip("0")) <= 4 for tick in ticks)


def seen_by(color: str, matrix) -> np.ndarray:
    """Returns the color as someone with this deficiency sees it: CIELAB."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(
        np.array(matrix) @ linear, 0, 1
    )
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


VISION = {  # Machado et al., 2009, severity 1
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("vision", VISION)
def test_color_blind_readers_tell_colors_apart(vision):
    seen = [seen_by(color, VISION[vision]) for color in COLORS]
    # 2.3 is just noticeable; matplotlib's own colors give 4.6
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15
    assert all(color[0] < 80 for color in seen)  # darker than the paper


def test_lines_differ_also_in_grey():
    assert len({str(look(i)) for i in range(28)}) == 28
    assert len({str(look(i)["linestyle"]) for i in range(4)}) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "ticks"),
    [
        (40, ["10 s", "20 s"]),
        (1320, ["5 min", "10 min"]),
        (40_000, ["2 h", "4 h"]),
        (200_000, ["12 h", "24 h"]),
        (2e6, ["3 days", "6 days"]),
    ],
)
def test_time_is_in_readable_units(tmp_path, drawn, seconds, ticks):
    with picture.picture(tmp_path / "x.png", 7, 4) as figure:
        axes = figure.subplots()
        axes.plot([0, seconds], [0, 1])
        picture.time_axis(axes.xaxis)
    shown = [axes.xaxis.get_major_formatter()(x, 0) for x in axes.get_xticks()]
    assert set(ticks) <= set(shown) and len(shown) <= 12


# ---- the pictures of lab ----


@pytest.mark.slow
def test_law_has_readable_axes_and_legends(tmp_path, drawn):
    scaling.plot_fit(json.loads((REPO / "results/law.json").read_text()), tmp_path / "scaling.png")
    losses, sizes = drawn[0].axes
    assert len(losses.get_yticks()) >= 5 and "100 M" in [sizes.yaxis.get_major_formatter()(y, 0) for y in sizes.get_yticks()]
    assert drawn[0].get_suptitle() == "A law fitted to 20 runs: 234 k to 10 M parameters, 201 k to 1.6 M tokens"
    assert losses.get_legend().get_texts()[0].get_text() == "234 k parameters"
    assert not covered(drawn[0])


@pytest.mark.slow
def test_presets_have_a_panel_each(tmp_path, drawn):
    names = [
        f"{preset}, {kind}, {batch}" for preset in ("gpt2", "gpt2-xl") for batch in ("524,288", "8,192 per GPU") for kind in ("DDP", "FSDP")
    ]
    curves = {name: {2**i: SimpleNamespace(efficiency=0.99 - i / (20 + n)) for i in range(13)} for n, name in enumerate(names)}
    cluster.draw(curves, "H100", tmp_path / "scale.png")
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["gpt2", "gpt2-xl"]
    for n, axes in enumerate(drawn[0].axes):
        shown = [list(line.get_ydata()) for line in axes.lines[:4]]
        assert shown == [[step.efficiency for step in curves[name].values()] for name in names[4 * n : 4 * n + 4]]
        assert [axes.yaxis.get_major_formatter()(0.2, 0), axes.get_xticklabels()[-1].get_text()] == ["20 %", "4,096"]
    assert not covered(drawn[0])


@pytest.mark.slow
def test_positions_are_means_of_16(tmp_path, drawn):
    losses = np.random.default_rng(0).normal(3, 1, 64)
    length.plot_curves([{"variant": "_rope", "loss": losses.tolist()}], 16, tmp_path / "length.png")
    (axes,) = drawn[0].axes
    assert axes.lines[0].get_ydata() == pytest.approx(losses.reshape(4, 16).mean(1)) and list(axes.lines[0].get_xdata()) == [8, 24, 40, 56]
    assert drawn[0].get_suptitle() == "Loss at each position, of models trained on 16 positions" and not covered(drawn[0])
