"""Plots loss and HellaSwag from the logs that train.py writes.

python plot_log.py log/log.txt                                               # one run
python plot_log.py log/rope/* log/plain/* --x tokens --zoom 0.3              # runs that differ only in the seed: a mean with a band
python plot_log.py a/log.txt b/log.txt --panels lr grad_norm --out ab.svg    # more panels
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from common import cli, picture
from common.logs import Curve, Group, Run, facts_beside, groups_of, read_run
from common.picture import GREY, between, label_of, look
from common.validation import has_type, raise_errors

# OpenAI's models, by GPT-2's four sizes. build-nanogpt measured GPT-2's released weights: the loss on FineWeb-Edu's val shard,
# HellaSwag as completion style acc_norm. GPT-3's HellaSwag is zero-shot, from Brown et al., 2020, table H.1, next to the
# paper's own name of the size
GPT2_LOSS = {"124M": 3.2924}
GPT2_HELLASWAG = {"124M": 0.2955, "350M": 0.3752, "774M": 0.4320, "1558M": 0.4893}
GPT3_HELLASWAG = {"124M": ("125M", 0.337), "350M": ("350M", 0.436), "774M": ("760M", 0.510), "1558M": ("1.3B", 0.547)}
CHANCE = 0.25  # HellaSwag has four endings
TASKS, HELLASWAG = 10_042, "hellaswag_val.jsonl"  # its whole validation set, and the name of that file
FORMATS = ("png", "svg", "pdf", "jpg", "webp")
UNITS = {
    "step": "steps",
    "tokens": "training tokens",
    "seconds": "time of training",
    "epoch": "epochs",
    "flops": "floating point operations (T = 10¹², P = 10¹⁵, E = 10¹⁸)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "mfu": "share of peak FLOPs",
    "memory_bytes": "peak memory, bytes",
}
FROM_ZERO = ("grad_norm", "tokens_per_second", "mfu", "memory_bytes")
DOTS = dict(marker="o", markersize=3.5, linewidth=1)  # of values with many steps between them
FEW = 4  # with more curves, each has one line in a panel: validation or training, and nothing raw behind


@dataclass
class PlotConfig:
    """Plot one or more logs."""

    logs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs or log.txt files; also logs of build-nanogpt, llm.c (main.log) and modded-nanogpt, and nanoGPT's output."""
    out: str = "plots/log_plot.png"
    """Output file. Its extension sets the format."""
    x: Literal["step", "tokens", "seconds", "epoch", "flops"] = "step"
    """The horizontal axis. All except step need the metrics.jsonl next to each log; tokens only its run.json."""
    zoom: float = 1.0
    """Show only this last part of the horizontal axis, such as 0.25, and fit the vertical axis to it."""
    mean: bool = True
    """Draw runs that differ only in their seed, by their run.json, as one mean with a band from the lowest to the highest."""
    smooth: float | None = None
    """Smooths noisy curves: each step is averaged with some on both sides, 49 with 0.98, 99 with 0.99; 0: not at all. Default: 2 percent of
    the steps. The raw curve stays faintly visible behind one or two curves."""
    panels: tuple[Literal["lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes"], ...] = ()
    """More values from metrics.jsonl to plot, each in its own panel."""
    size: Literal["auto", "124M", "350M", "774M", "1558M", "none"] = "auto"
    """Size of OpenAI's models to draw as baselines; none for other data or tokenizers. auto: the first run's size, else 124M."""
    baselines: tuple[str, ...] = ()
    """More losses to draw as lines, such as "GPT-2 on my val shard=3.12"."""
    hellaswag_tasks: int = 0
    """Number of HellaSwag tasks, for the standard error. 0: the number in metrics.jsonl, or all 10,042."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(0, self, "hellaswag_tasks")
        if not 0 <= (self.smooth or 0) < 1:
            errors.append(f"--smooth is {self.smooth}: it must be at least 0 and below 1")
        if not 0 < self.zoom <= 1:
            errors.append(f"--zoom is {self.zoom}: it must be above 0 and at most 1")
        if Path(self.out).suffix[1:] not in FORMATS:
            errors.append(f"--out {self.out} has no known extension: use one of {', '.join(FORMATS)}")
        raise_errors(errors)


def size_of(params: int) -> str:
    """OpenAI's size within 3% of this number of parameters, or 'none'."""
    return next((size for size in GPT2_HELLASWAG if abs(params / 1e6 / float(size[:-1]) - 1) < 0.03), "none")


def size_beside(log: Path) -> str:
    """The size in the run.json next to a log, else 124M."""
    size = facts_beside(log).get("size")
    return size if size in (*GPT2_HELLASWAG, "none") else "124M"


def plot(config: PlotConfig):
    """Plots config.logs into the file config.out: loss, the difference from the first if there are several, HellaSwag if there is a score,
    and the panels. ValueError if a log or a flag can't be drawn, or if matplotlib can't draw."""
    config.validate()
    logs = [Path(log, "log.txt") if Path(log).is_dir() else Path(log) for log in config.logs]
    runs, baselines = [read_run(log, config.x, (*config.panels, "hellaswag_tasks")) for log in logs], parse_baselines(config.baselines)
    for panel in config.panels:
        if not any(run.curve(panel) for run in runs):
            raise ValueError(f"--panels {panel} is in no log or metrics.jsonl: drop it")
    groups = groups_of(runs, config.mean)
    size = size_beside(logs[0]) if config.size == "auto" else config.size
    has_hella = any("hella" in run.streams for run in runs)
    names = ["loss", *(["gap"] if groups[1:] else []), *(["hella"] if has_hella else []), *dict.fromkeys(config.panels)]
    cells = ["loss"] * (len(names) % 2 and len(names) > 1) + names  # the loss may be wide: no cell stays empty
    rows = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    width = picture.WIDTH if names[1:] else picture.NARROW
    with picture.picture(Path(config.out), width, 1.2 + 3.2 * len(rows), title_of(groups)) as figure:
        axes = figure.subplot_mosaic(rows)
        streams = draw_groups(axes, groups, config)
        draw_baselines(axes, size, baselines, used=len(groups))
        if has_hella:
            draw_chance(axes["hella"], runs, config.hellaswag_tasks)
        label(axes, config.x, groups[0].name)
        picture.legend_below(figure, key_of(groups, streams, config.smooth))


def title_of(groups: list[Group]) -> str:
    """Says what is shown: names, parameters, training tokens and seeds, as far as they are known."""
    runs = [run for group in groups for run in group.runs]
    known = {"parameters": [run.facts.get("params") for run in runs], "tokens": [run.tokens for run in runs]}
    if any(group.runs[1:] for group in groups):
        known["seeds"] = [len(group.runs) for group in groups]
    parts = [f"{between(values)} {unit}" for unit, values in known.items() if all(has_type(value, float) for value in values)]
    who = " and ".join(group.name for group in groups) if len(groups) < 3 else f"{len(groups)} curves"
    return f"{who}: {', '.join(parts)}" if parts else who


# ---- the panels ----


def draw_groups(axes: dict, groups: list[Group], config: PlotConfig) -> list[str]:
    """Draws all groups into the panels. Returns the streams that the loss panel shows: of many groups, only one of train and val."""
    ends = [x for group in groups for stream in ("train", "val") for x in group.curve(stream).x]
    start = -math.inf if config.zoom == 1 or not ends else max(ends) - config.zoom * (max(ends) - min(ends))
    there = [stream for stream in ("train", "val") if any(len(group.curve(stream, start).x) for group in groups)]
    best = "val" if there == ["val"] or all(len(group.curve("val", start).x) > 2 for group in groups) else "train"
    streams = there if len(groups) <= FEW else [best]
    for i, group in enumerate(groups):
        noisy = {"loss": "train"} if "train" in streams else {}
        for panel, stream in (noisy | {panel: panel for panel in config.panels}).items():
            smooth = 0.0 if panel == "lr" else config.smooth
            if smooth != 0 and config.zoom == 1 and len(groups) <= 2:  # else raw curves would hide each other
                draw_behind(axes[panel], group.curve(stream, start), i)
            draw_curve(axes[panel], group.curve(stream, start, smooth), group, i, linewidth=1.2)
        for panel, stream in (("loss", "val"), ("hella", "hella")):
            if panel in axes and stream in (*streams, "hella"):
                draw_curve(axes[panel], group.curve(stream, start), group, i, **DOTS)
    if "gap" in axes:
        draw_gaps(axes["gap"], groups, best, start, config)
    return streams


def draw_curve(axes, curve: Curve, group: Group, i: int, **how):
    """Draws the mean and, of several runs, its band, with look i."""
    if group.runs[1:]:
        axes.fill_between(curve.x, curve.low, curve.high, color=look(i)["color"], alpha=0.2, linewidth=0)
    axes.plot(curve.x, curve.mean, **look(i), **how)


def draw_behind(axes, curve: Curve, i: int):
    """Draws the raw mean faintly. Its highest and lowest percent don't count for the axes' limits."""
    from matplotlib.lines import Line2D

    axes.add_artist(Line2D(curve.x, curve.mean, color=look(i)["color"], alpha=0.25, linewidth=0.6, zorder=1))
    if len(curve.x):
        axes.update_datalim([*zip(curve.x[[0, -1]], np.percentile(curve.mean, [1, 99]), strict=True)])


def draw_gaps(axes, groups: list[Group], stream: str, start: float, config: PlotConfig):
    """Draws the differences from the first group. Their later half fills the panel, and the first steps may leave it."""
    smooth, how = (config.smooth, dict(linewidth=1.2)) if stream == "train" else (0.0, DOTS)
    curves = [group.gap(groups[0], stream, start, smooth) for group in groups[1:]]
    for i, (group, curve) in enumerate(zip(groups[1:], curves, strict=True), 1):
        draw_curve(axes, curve, group, i, **how)
    axes.axhline(0, **look(0))
    picture.fit_late(axes, [(curve.x, curve.low, curve.high) for curve in curves], None if config.zoom == 1 else start)


def draw_baselines(axes: dict, size: str, others: dict[str, float], used: int):
    """Draws OpenAI's models of a size, and other losses by name, with the looks after those that are used."""
    known = f"OpenAI GPT-2 ({size}{'; loss: FineWeb-Edu val' * (size in GPT2_LOSS)})"
    gpt2 = dict(color=GREY, linestyle="--", linewidth=1, label=known)
    if size in GPT2_LOSS:
        axes["loss"].axhline(GPT2_LOSS[size], **gpt2)
    for number, (name, loss) in enumerate(others.items(), used):
        axes["loss"].axhline(loss, **look(number), label=label_of(name))
    if size != "none" and "hella" in axes:
        axes["hella"].axhline(GPT2_HELLASWAG[size], **gpt2)
        gpt3, accuracy = GPT3_HELLASWAG[size]
        axes["hella"].axhline(accuracy, color=GREY, linestyle="-.", linewidth=1, label=f"OpenAI GPT-3 ({gpt3})")


def draw_chance(axes, runs: list[Run], tasks: int):
    """Draws what guessing scores, and one standard error around it, if the number of tasks is known: to --hellaswag-tasks, to
    metrics.jsonl, or because the file was HellaSwag's own."""
    tasks = tasks or int(max([0, *(n for run in runs for n in run.streams.get("hellaswag_tasks", {}).values())]))
    if not tasks and all(run.facts.get("hellaswag_file", HELLASWAG) == HELLASWAG for run in runs):
        tasks = TASKS
    line = axes.axhline(CHANCE, color=GREY, linestyle=":", linewidth=1)
    if tasks:
        error = math.sqrt(CHANCE * (1 - CHANCE) / tasks)
        band = axes.axhspan(CHANCE - error, CHANCE + error, color=GREY, alpha=0.2, linewidth=0)
        band.set_label(f"guessing: 25 % ± 1 standard error ({tasks:,} tasks)")
    else:
        line.set_label("guessing: 25 %")


def label(axes: dict, x: str, first: str):
    """Gives each panel its title, its units and ticks."""
    titles = {
        "loss": ("Loss", "cross entropy, nats per token"),
        "gap": (f"Difference from {first}: below 0 is better", "nats per token"),
        "hella": ("HellaSwag, completion style: accuracy", "acc_norm: normalised by length"),
    }
    for name, panel in axes.items():
        title, unit = titles.get(name) or (UNITS[name].capitalize(), UNITS[name])
        panel.set(title=title, xlabel=UNITS[x], ylabel=unit)
        if name in FROM_ZERO:
            panel.set_ylim(0, 1.1 * panel.dataLim.y1)
        if name != "gap":
            picture.number_axis(panel.yaxis, picture.SI if name == "memory_bytes" else picture.COUNTS)
        if x == "seconds":
            picture.time_axis(panel.xaxis)
        else:
            picture.number_axis(panel.xaxis, picture.SI if x == "flops" else picture.COUNTS)
        if name in ("hella", "mfu"):
            panel.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g} %")
    axes["loss"].set_yscale("log")
    picture.log_axis(axes["loss"].yaxis)


def key_of(groups: list[Group], streams: list[str], smooth: float | None) -> list:
    """Returns the legend's entries: the groups, and what the kinds of lines are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    color = GREY if groups[1:] else look(0)["color"]
    entries = [Line2D([], [], **look(i), label=group.label) for i, group in enumerate(groups) if groups[1:]]
    if "train" in streams:
        entries.append(Line2D([], [], color=color, linewidth=1.2, label="training" if smooth == 0 else "training, smoothed"))
    if "val" in streams:
        entries.append(Line2D([], [], color=color, label="validation", **DOTS))
    if any(group.runs[1:] for group in groups):
        entries.append(Patch(color=color, alpha=0.2, linewidth=0, label="lowest to highest seed"))
    return entries


def parse_baselines(given: tuple[str, ...]) -> dict[str, float]:
    """Name → loss. ValueError if one is not NAME=LOSS."""
    pairs = [baseline.rpartition("=") for baseline in given]
    try:
        baselines = {name: float(loss) for name, _, loss in pairs}
    except ValueError:
        baselines = {"": 0.0}
    if not all(name and 0 < loss < math.inf for name, loss in baselines.items()):
        raise ValueError('--baselines needs NAME=LOSS, such as "GPT-2 on my val shard=3.12"')
    return baselines


def main():
    with cli.one_line_errors():
        config = cli.parse(PlotConfig)
        if not config.logs:
            raise ValueError("no logs: pass at least one log.txt")
        out = Path(config.out)
        if out.is_dir() or config.out.endswith("/"):
            out = out / Path(PlotConfig.out).name
        config.out = str(out if out.suffix else out.with_suffix(".png"))
        plot(config)
        print(config.out)


if __name__ == "__main__":
    main()
