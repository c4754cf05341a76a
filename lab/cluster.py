"""Calculates how presets scale to many GPUs: prints a table and draws a plot.

python -m lab.cluster --presets gpt2 gpt2-xl
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli, device, picture
from common.tables import table
from common.validation import raise_errors
from training.presets import PRESETS
from training.step_time import Step, step_on


@dataclass
class ScaleConfig:
    """Calculate how presets scale to many GPUs. Prints a table and draws a plot."""

    presets: tuple[str, ...] = ("gpt2", "gpt2-xl", "gpt3-1b")
    """Presets of train.py. A batch of fixed size gets at most one GPU per sequence."""
    gpu: Literal[tuple(device.CARDS)] = "H100"
    """The kind of GPU. The links between them are fixed: see Cluster in training/step_time.py."""
    markdown: bool = False
    """Print the table as Markdown."""
    out: str = "results/scale.png"
    """File of the plot: .png, .svg or .pdf."""


COUNTS = [2**i for i in range(13)]  # 1 to 4096 GPUs


def limit(steps: dict[int, Step]) -> str:
    """Returns the number of GPUs from which the efficiency is below 90 %."""
    return next((f"{n}" for n, step in steps.items() if step.efficiency < 0.9), f"not up to {max(steps)}")


def scale(config: ScaleConfig) -> tuple[str, dict[str, dict[int, Step]]]:
    """Returns the table, and the curves: name → number of GPUs → step. ValueError for an unknown preset or file type."""
    wrong = [name for name in config.presets if name not in PRESETS]
    errors = [f"--presets {' '.join(wrong)}: choose from {', '.join(PRESETS)}"] if wrong or not config.presets else []
    if Path(config.out).suffix not in (".png", ".svg", ".pdf"):
        errors.append(f"--out {config.out}: give a .png, .svg or .pdf file")
    raise_errors(errors)
    lines, curves = [], {}
    for name, weak, shard in itertools.product(config.presets, (False, True), (False, True)):
        run = PRESETS[name]
        most = COUNTS[-1] if weak else run.total_batch_tokens // run.model.seq_len
        steps = {n: step_on(run, n, shard, config.gpu, weak) for n in COUNTS if n <= most}
        batch = f"{run.micro_batch_size * run.model.seq_len:,} per GPU" if weak else f"{run.total_batch_tokens:,}"
        kind = "FSDP" if shard else "DDP"
        curves[f"{name}, {kind}, {batch}"] = steps
        for n in (n for n in (8, 64, 512) if n in steps):
            s = steps[n]
            times = (f"{1e3 * seconds:,.1f}" for seconds in (s.compute, s.communication, s.seconds))
            lines.append([name, batch, kind, str(n), *times, f"{s.sent / 1e6:,.0f}", f"{s.efficiency:.0%}", limit(steps)])
    head = ["preset", "batch", "", "GPUs", "compute, ms", "sending, ms", "step, ms", "sent, MB", "efficiency", "< 90 % from"]
    return table(head, lines, [1, 2], config.markdown), curves


def draw(curves: dict[str, dict[int, Step]], gpu: str, out: Path):
    """Draws a panel for each preset: efficiency over GPUs."""
    presets = [*dict.fromkeys(curve.split(",")[0] for curve in curves)]
    columns = min(len(presets), 3)
    rows = -(-len(presets) // columns)
    title = f"Calculated: how much of each {gpu}'s time goes into training"
    with picture.picture(out, picture.WIDTH, 1.2 + 2.8 * rows, title) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for first in grid[:, 0]:
            first.set_ylabel("share of the time")
        for axes, preset in zip(grid.flat, presets, strict=False):
            for name, steps in curves.items():
                if name.split(",")[0] == preset:
                    weak, shard = "per GPU" in name, "FSDP" in name
                    how = picture.look(shard) | {"linestyle": "--" if weak else "-", "marker": "s" if shard else "o", "markersize": 3.5}
                    label = f"{'FSDP' if shard else 'DDP'}, {'batch grows with the GPUs' if weak else 'batch of fixed size'}"
                    axes.plot(steps.keys(), [step.efficiency for step in steps.values()], label=label, **how)
            axes.axhline(0.9, color=picture.GREY, linewidth=1, linestyle=":", label="90 % of the time")
            axes.set(title=preset, xscale="log", xlabel="GPUs", ylim=(0, 1.02))
            axes.set_xticks(COUNTS[::3], [f"{count:,}" for count in COUNTS[::3]])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g} %")
        for unused in grid.flat[len(presets) :]:
            unused.remove()
        picture.legend_below(figure)


def main():
    with cli.one_line_errors():
        config = cli.parse(ScaleConfig)
        text, curves = scale(config)
        print(text)
        draw(curves, config.gpu, Path(config.out))


if __name__ == "__main__":
    main()
