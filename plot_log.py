"""Plots loss and HellaSwag from the logs that train.py writes.

python plot_log.py log/log.txt                               # one run
python plot_log.py a/log.txt b/log.txt --x tokens --smooth 0.98 --panels lr grad_norm --out ab.svg    # two runs in one plot
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common import cli
from common.files import parse_json, read_json
from common.picture import label_of, picture
from common.validation import has_type, raise_errors

# OpenAI's models, by GPT-2's four sizes. build-nanogpt measured GPT-2's released weights: the loss on FineWeb-Edu's val shard,
# HellaSwag as completion style acc_norm. GPT-3's HellaSwag is zero-shot, from Brown et al., 2020, table H.1, next to the
# paper's own name of the size
GPT2_LOSS = {"124M": 3.2924}
GPT2_HELLASWAG = {"124M": 0.2955, "350M": 0.3752, "774M": 0.4320, "1558M": 0.4893}
GPT3_HELLASWAG = {"124M": ("125M", 0.337), "350M": ("350M", 0.436), "774M": ("760M", 0.510), "1558M": ("1.3B", 0.547)}
FORMATS = ("png", "svg", "pdf", "jpg", "webp")
UNITS = {
    "step": "steps",
    "tokens": "tokens",
    "seconds": "seconds of training",
    "epoch": "epochs",
    "flops": "floating point operations",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "mfu": "share of peak FLOPs",
    "memory_bytes": "peak memory, bytes",
}
TITLES = {"loss": ("Loss", "cross entropy, nats per token"), "hella": ("HellaSwag, completion style", "acc_norm")}

MARKS = {"train": "loss", "val": "val_loss", "hella": "hellaswag_acc_norm"}  # a key that only this stream's lines have

# log lines with a value
LINES = [
    re.compile(pattern)
    for pattern in (
        r"(?P<step>\d+) (?P<stream>train|val|hella) (?P<value>\S+)$",  # train.py's, build-nanogpt's
        r"step (?P<step>\d+): train loss \S+, val loss (?P<val>\S+)$",  # nanoGPT
        r"iter (?P<step>\d+): loss (?P<train>\S+), ",
        r"s:(?P<step>\d+) (tel:(?P<val>\S+)|eval:(?P<hella>\S+)|trl:(?P<train>\S+)( lr:(?P<lr>\S+) norm:(?P<grad_norm>\S+))?)$",  # llm.c
        r"step:(?P<step>\d+)/\d+ (val_loss:(?P<val>\S+)|train_loss:(?P<train>\S+))",  # modded-nanogpt
    )
]


@dataclass
class PlotConfig:
    """Plot one or more logs."""

    logs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs or log.txt files; also logs of build-nanogpt, llm.c (main.log) and modded-nanogpt, and nanoGPT's output."""
    out: str = "plots/log_plot.png"
    """Output file. Its extension sets the format."""
    x: Literal["step", "tokens", "seconds", "epoch", "flops"] = "step"
    """The horizontal axis. All except step need the metrics.jsonl next to each log."""
    smooth: float = 0.0
    """Weight of earlier values in a moving average of noisy curves, such as 0.99; 0: no average. The raw curve stays faintly visible."""
    panels: tuple[Literal["lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes"], ...] = ()
    """More values from metrics.jsonl to plot, each in its own panel."""
    size: Literal["auto", "124M", "350M", "774M", "1558M", "none"] = "auto"
    """Size of OpenAI's models to draw as baselines; none for other data or tokenizers. auto: the first run's size, else 124M."""
    baselines: tuple[str, ...] = ()
    """More losses to draw as lines, such as "GPT-2 on my val shard=3.12"."""


def size_of(params: int) -> str:
    """OpenAI's size within 3% of this number of parameters, or 'none'."""
    return next((size for size in GPT2_HELLASWAG if abs(params / 1e6 / float(size[:-1]) - 1) < 0.03), "none")


def read_log(path: Path) -> dict[str, dict[int, float]]:
    """Stream → step → value. If a step appears twice, the later line wins. Warns about lines that it skips.
    ValueError if no line has a value."""
    if not path.is_file():
        raise ValueError(f"no log {path}: pass the log.txt in a run's folder")
    streams, skipped = {}, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = next((match for pattern in LINES if (match := pattern.match(line.strip()))), None)
        try:
            found = match.groupdict()
            step = int(found.pop("step"))
            named = {found["stream"]: found["value"]} if "stream" in found else found
            for stream, value in named.items():
                if value is not None:
                    streams.setdefault(stream, {})[step] = float(value)
        except (AttributeError, ValueError):
            skipped += bool(line.strip())
    if not streams:
        raise ValueError(f"{path} has no line 'step stream value': pass a log.txt")
    if skipped:
        cli.say(f"warning: {path}: skipped {skipped} lines that are not 'step stream value'")
    return streams


def size_beside(log: Path) -> str:
    """The size in the run.json next to a log, else 124M."""
    try:
        size = read_json(log.with_name("run.json"), "")["size"]
    except (OSError, ValueError, KeyError):
        size = None
    return size if size in (*GPT2_HELLASWAG, "none") else "124M"


def read_metrics(path: Path, names: list[str], having: str = "") -> dict[str, dict[int, float]]:
    """Name → step → number, from a metrics.jsonl; nothing if the file is missing. having: reads only lines with this key.
    If a step appears twice, the later line wins."""
    found = {name: {} for name in names}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if names and path.is_file() else ():
        if having not in line:  # skips most lines without parsing JSON
            continue
        try:
            row = parse_json(line)
            for name in names if has_type(row["step"], int) and (not having or having in row) else ():
                if has_type(row.get(name), float):
                    found[name][row["step"]] = row[name]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # a killed run leaves half a line
    return found


def points(values: dict[int, float], axis: dict[int, float] | None) -> tuple[list[float], list[float]]:
    """Step → value as two lists (x, y) in the order of steps. Skips values that are not finite or have no x on the axis."""
    steps = [step for step in sorted(values) if math.isfinite(values[step]) and (axis is None or step in axis)]
    return [axis[step] if axis else step for step in steps], [values[step] for step in steps]


def smoothed(values: list[float], weight: float) -> list[float]:
    """The exponential moving average, divided by the sum of its weights so far, as in Adam (Kingma & Ba, 2014)."""
    average, total, out = 0.0, 0.0, []
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        out.append(average / total)
    return out


def plot(config: PlotConfig):
    """Plots config.logs into the file config.out: loss, HellaSwag if there is a score or a baseline, and the panels.
    ValueError if a log or a flag can't be drawn, or if matplotlib can't draw."""
    errors = [] if 0 <= config.smooth < 1 else [f"--smooth is {config.smooth}: it must be at least 0 and below 1"]
    if Path(config.out).suffix[1:] not in FORMATS:
        errors.append(f"--out {config.out} has no known extension: use one of {', '.join(FORMATS)}")
    raise_errors(errors)
    logs = [Path(log, "log.txt") if Path(log).is_dir() else Path(log) for log in config.logs]
    runs, baselines = [read_log(log) for log in logs], parse_baselines(config.baselines)
    beside = [metrics_beside(log, config) for log in logs]
    for panel in config.panels:
        if not any(noisy_points(panel, streams, *each)[1] for streams, each in zip(runs, beside, strict=True)):
            raise ValueError(f"--panels {panel} is in no log or metrics.jsonl: drop it")
    size = size_beside(logs[0]) if config.size == "auto" else config.size
    has_hella = size != "none" or any("hella" in streams for streams in runs)
    names = list(dict.fromkeys(["loss", *(["hella"] if has_hella else []), *config.panels]))
    columns = 2 if len(names) == 4 else min(len(names), 3)
    rows = -(-len(names) // columns)
    with picture(Path(config.out), 7 * columns, 5.5 * rows) as figure:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for unused in grid[len(names) :]:
            unused.remove()
        axes = dict(zip(names, grid, strict=False))
        for number, (name, streams, each) in enumerate(zip(names_of(logs), runs, beside, strict=True)):
            draw_run(axes, name, f"C{number}", streams, *each, config)
        draw_baselines(axes, size, {name: (loss, f"C{len(logs) + i}") for i, (name, loss) in enumerate(baselines.items())})
        label(axes, UNITS[config.x])


def names_of(logs: list[Path]) -> list[str]:
    """Names each log in the legend: by its folder, or by as much of its path as tells the logs apart."""
    names = [log.parent.name or str(log) for log in logs]
    if len(set(names)) < len(set(logs)):
        folder = os.path.commonpath([log.parent.absolute() for log in logs])
        names = [os.path.relpath(log, folder) for log in logs]
    names = [label_of(name) for name in names]
    repeated = len(set(names)) < len(set(logs))  # shortened alike
    return [f"{number}: {name}" for number, name in enumerate(names, 1)] if repeated else names


def metrics_beside(log: Path, config: PlotConfig) -> tuple[dict, dict | None]:
    """Values for the panels from the metrics.jsonl next to a log, and stream → step → x (None: x is the step)."""
    path = log.with_name("metrics.jsonl")
    metrics, x_axes = read_metrics(path, list(config.panels)), None
    if config.x != "step":  # per stream, because a step is validated before its update
        x_axes = {stream: read_metrics(path, [config.x], having)[config.x] for stream, having in MARKS.items()}
    if x_axes and not x_axes["train"]:
        raise ValueError(f"{path} is missing or has no {config.x}: use --x step")
    return metrics, x_axes


def label(axes: dict, x_unit: str):
    for name, panel in axes.items():
        title, unit = TITLES.get(name) or (UNITS[name][0].upper() + UNITS[name][1:], UNITS[name])
        panel.set(title=title, xlabel=x_unit, ylabel=unit)
        panel.grid(alpha=0.3, which="both")
        if panel.get_lines():
            panel.legend(loc="lower right" if name == "hella" else "upper right")  # loc="best" takes seconds
    axes["loss"].set_yscale("log")
    axes["loss"].yaxis.set_major_formatter("{x:.2f}")
    axes["loss"].yaxis.set_minor_formatter("{x:.2f}")


def noisy_points(stream: str, streams: dict, metrics: dict, x_axes: dict | None) -> tuple[list[float], list[float]]:
    """The (x, y) of a curve that has a value at every step."""
    return points(metrics.get(stream) or streams.get(stream, {}), x_axes and x_axes["train"])


def draw_run(axes: dict, name: str, color: str, streams: dict, metrics: dict, x_axes: dict | None, config: PlotConfig):
    """Draws one run's curves into the panels. x_axes: stream → step → x; None: x is the step."""
    noisy = {"loss": ("train", f"{name}: train"), **{panel: (panel, name) for panel in config.panels}}
    for panel, (stream, label) in noisy.items():
        at, values = noisy_points(stream, streams, metrics, x_axes)
        smooth = config.smooth if stream != "lr" else 0.0
        if values and smooth:
            axes[panel].plot(at, values, color=color, alpha=0.15, linewidth=0.8)
            values = smoothed(values, smooth)
        if values:
            axes[panel].plot(at, values, color=color, alpha=1.0 if smooth else 0.5, linewidth=0.8, label=label)
    for panel, stream, label in (("loss", "val", f"{name}: val"), ("hella", "hella", name)):
        if stream in streams:
            axes[panel].plot(*points(streams[stream], x_axes and x_axes[stream]), color=color, marker=".", label=label)


def draw_baselines(axes: dict, size: str, others: dict[str, tuple[float, str]]):
    """Draws OpenAI's models of a size, and other losses by name, each with its color."""
    if size in GPT2_LOSS:
        axes["loss"].axhline(GPT2_LOSS[size], color="r", linestyle="--", label=f"OpenAI GPT-2 ({size}), FineWeb-Edu val")
    for name, (loss, color) in others.items():
        axes["loss"].axhline(loss, color=color, linestyle=":", label=label_of(name))
    if size != "none":
        axes["hella"].axhline(GPT2_HELLASWAG[size], color="r", linestyle="--", label=f"OpenAI GPT-2 ({size})")
        gpt3, accuracy = GPT3_HELLASWAG[size]
        axes["hella"].axhline(accuracy, color="g", linestyle="--", label=f"OpenAI GPT-3 ({gpt3})")


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
