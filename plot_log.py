"""Pictures of a run: loss and HellaSwag, side by side, from the log that train.py writes.

python plot_log.py log/log.txt                               # one run
python plot_log.py a/log.txt b/log.txt --x tokens --out ab.png    # two, over each other
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import cli

# OpenAI's models, by the parameters of GPT-2's four sizes. GPT-2's HellaSwag is completion style acc_norm and its loss that
# of FineWeb-Edu's val shard, as build-nanogpt measured both on the released weights; GPT-3's HellaSwag is zero-shot, from
# Brown et al., 2020, table H.1, under the size that the paper gives it
GPT2_LOSS = {"124M": 3.2924}
GPT2_HELLASWAG = {"124M": 0.2955, "350M": 0.3752, "774M": 0.4320, "1558M": 0.4893}
GPT3_HELLASWAG = {"124M": ("125M", 0.337), "350M": ("350M", 0.436), "774M": ("760M", 0.510), "1558M": ("1.3B", 0.547)}
FORMATS = ("png", "svg", "pdf", "jpg", "webp")
UNITS = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training", "epoch": "epochs"}


@dataclass
class PlotConfig:
    """Draw one or more logs."""

    logs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """log.txt files."""
    out: str = "plots/log_plot.png"
    """The picture; its ending chooses the format."""
    x: Literal["step", "tokens", "seconds", "epoch"] = "step"
    """The horizontal axis; all but step are read from the metrics.jsonl beside each log."""
    size: Literal["124M", "350M", "774M", "1558M", "none"] = "124M"
    """Which of OpenAI's models to draw as baselines; 'none' for other data or tokenizers."""


def size_of(params: int) -> str:
    """Which of OpenAI's sizes a model of so many parameters is, within 3%; 'none' for any other."""
    return next((size for size in GPT2_HELLASWAG if abs(params / 1e6 / float(size[:-1]) - 1) < 0.03), "none")


def read_log(path: Path) -> dict[str, dict[int, float]]:
    """Stream → step → value. A later line of the same step counts; a line that is no 'step stream value' is left out."""
    if not path.is_file():
        raise ValueError(f"no log {path}: give the log.txt in a run's folder")
    streams = {}
    bad = 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            step, stream, value = line.split()
            streams.setdefault(stream, {})[int(step)] = float(value)
        except ValueError:
            bad += bool(line.strip())
    if bad:
        print(f"warning: {path}: {bad} lines are not 'step stream value' and are left out", file=sys.stderr)
    if not streams:
        raise ValueError(f"{path} has no line 'step stream value': is it a log.txt?")
    return streams


def read_axis(path: Path, x: str) -> dict[int, float]:
    """Step → tokens, seconds or epoch, from the metrics beside a log."""
    metrics = path.with_name("metrics.jsonl")
    if not metrics.is_file():
        raise ValueError(f"--x {x} needs {metrics}, which is not there: use --x step")
    axis = {}
    for line in metrics.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            axis[row["step"]] = row[x]
        except (ValueError, KeyError, TypeError):
            pass  # the line that a killed run was writing
    return axis


def points(values: dict[int, float], axis: dict[int, float] | None) -> tuple[list[float], list[float]]:
    """Step → value as two lists in the order of steps, without what is not finite or has no place on the axis."""
    steps = [step for step in sorted(values) if math.isfinite(values[step]) and (axis is None or step in axis)]
    return [axis[step] if axis else step for step in steps], [values[step] for step in steps]


def plot(logs: list[str], out: str, x: str = "step", size: str = "124M"):
    """Draws the logs into the file `out`: loss, and beside it HellaSwag where there is a score or a baseline of it."""
    from matplotlib.figure import Figure  # not pyplot: no window system is touched

    runs = [read_log(Path(log)) for log in logs]
    if Path(out).suffix[1:] not in FORMATS:
        raise ValueError(f"--out {out}: its ending chooses the format, one of {', '.join(FORMATS)}")
    panels = 2 if size != "none" or any("hella" in streams for streams in runs) else 1
    figure = Figure(figsize=(7 * panels, 5.5), layout="constrained")
    loss, *hella = figure.subplots(1, panels, squeeze=False)[0]
    for number, (log, streams) in enumerate(zip(logs, runs, strict=True)):
        axis = read_axis(Path(log), x) if x != "step" else None
        name = (log if len({Path(path).parent.name for path in logs}) < len(logs) else Path(log).parent.name or log).replace("$", r"\$")
        color = f"C{number}"
        if "train" in streams:
            loss.plot(*points(streams["train"], axis), color=color, alpha=0.35, linewidth=0.8, label=f"{name}: train")
        if "val" in streams:
            loss.plot(*points(streams["val"], axis), color=color, marker=".", label=f"{name}: val")
        if "hella" in streams:
            hella[0].plot(*points(streams["hella"], axis), color=color, marker=".", label=name)
    if size in GPT2_LOSS:
        loss.axhline(GPT2_LOSS[size], color="r", linestyle="--", label=f"OpenAI GPT-2 ({size}), FineWeb-Edu val")
    if size != "none":
        hella[0].axhline(GPT2_HELLASWAG[size], color="r", linestyle="--", label=f"OpenAI GPT-2 ({size})")
        gpt3, accuracy = GPT3_HELLASWAG[size]
        hella[0].axhline(accuracy, color="g", linestyle="--", label=f"OpenAI GPT-3 ({gpt3})")
    loss.set(title="Loss", xlabel=UNITS[x], ylabel="cross entropy, nats a token", yscale="log")
    loss.yaxis.set_major_formatter("{x:.2f}")
    loss.yaxis.set_minor_formatter("{x:.2f}")
    for panel in hella:
        panel.set(title="HellaSwag, completion style", xlabel=UNITS[x], ylabel="acc_norm")
    for panel in (loss, *hella):
        panel.grid(alpha=0.3, which="both")
        if panel.get_lines():
            panel.legend()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main():
    with cli.one_line_errors():
        config = cli.parse(PlotConfig)
        if not config.logs:
            raise ValueError("give at least one log.txt")
        out = Path(config.out)
        if out.is_dir() or config.out.endswith("/"):
            out = out / Path(PlotConfig.out).name
        out = str(out if out.suffix else out.with_suffix(".png"))
        plot(list(config.logs), out, config.x, config.size)
        print(out)


if __name__ == "__main__":
    main()
