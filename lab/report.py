"""Shows a comparison: a table for people, results.tsv for programs, and a picture."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common import picture
from common.files import append
from common.picture import COLORS, GREY, between, fit_late, label_of, legend_below, look, number_axis
from common.tables import WIDTH, check_rich, table
from lab.judge import LEVEL, Judgement, nominal_level, scipy_stats
from tasks.judging import perplexity_of

COSTS = ("variant", "parameters (active)", "tokens", "FLOPs ×", "tokens/s", "× first", "memory", "KV cache")
TSV = ("commit", "name", "against", "seeds", "loss", "difference", "interval", "p", "memory", "seconds", "verdict")


def summary(runs: dict[str, dict[int, dict]], judgements: dict[str, Judgement]) -> list[dict]:
    """Returns a row per variant: losses as means over its seeds, tokens, costs and speeds as medians, and its verdict.

    runs: name → seed → measured numbers. A failed variant may have none."""
    first = next(iter(runs.values()))
    rows = []
    for name, seeds in runs.items():
        row, judgement = {"variant": name, "seeds": [*seeds]}, judgements.get(name)
        if seeds:
            some, losses = next(iter(seeds.values())), [one["val_loss"] for one in seeds.values()]
            bits = [one["bits_per_byte"] for one in seeds.values()]
            ratios = [one["tokens_per_second"] / first[seed]["tokens_per_second"] for seed, one in seeds.items() if seed in first]
            row |= {
                **{key: some[key] for key in ("params", "active_params", "flops_per_token", "cache_bytes")},
                "tokens": round(statistics.median(one["tokens"] for one in seeds.values())),
                "work": ratio_of_work(some, next(iter(first.values()), {})),
                "val_loss": statistics.fmean(losses),
                "spread": max(losses) - min(losses),
                "perplexity": finite(perplexity_of(statistics.fmean(losses))),
                "bits_per_byte": None if None in bits else statistics.fmean(bits),
                "speed": statistics.median(ratios) if ratios else None,
                **{key: statistics.median(one[key] for one in seeds.values()) for key in ("seconds", "tokens_per_second", "memory_bytes")},
            }
        if judgement:
            shared = [seed for seed in seeds if seed in first][: len(judgement.differences)]
            row |= asdict(judgement) | {"text": judgement.text, "paired_seeds": shared}
        rows.append(row)
    return rows


def ratio_of_work(ours: dict, theirs: dict) -> float | None:
    mine, other = ours.get("flops_per_token"), theirs.get("flops_per_token")
    return mine / other if mine and other else None


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


# ---- the table ----


def check_tools():
    """ValueError in one line if a package is missing: it should come before hours of training."""
    scipy_stats()
    check_rich()


def show(rows: list[dict], looks: Sequence[int], markdown: bool = False) -> str:
    """Returns the verdicts, the cost of each variant, and the differences seed by seed, in three tables."""
    verdicts = [
        [
            row["variant"],
            shown_as(row.get("val_loss"), ".4f"),
            shown_as(row.get("bits_per_byte"), ".4f"),
            str(len(row["seeds"])),
            interval(row),
            shown_p(row.get("p")),
            textwrap.shorten(row.get("text", "the first"), 100, placeholder=" …"),
        ]
        for row in rows
    ]
    costs = [
        [
            row["variant"],
            millions(row["params"]) + (f" ({millions(row['active_params'])})" if row["active_params"] < row["params"] else ""),
            f"{row['tokens']:,}",
            shown_as(row["work"], ".2f"),
            f"{row['tokens_per_second']:,.0f}",
            shown_as(row["speed"], ".2f"),
            f"{row['memory_bytes'] / 1e6:,.0f} MB",
            "" if row["cache_bytes"] is None else f"{row['cache_bytes'] / 1e3:,.0f} kB",
        ]
        for row in rows
        if "params" in row
    ]
    parts = [
        table(["variant", "loss", "bits/byte", "seeds", "difference ± 95 %", "p", "verdict"], verdicts, [6], markdown),
        table(COSTS, costs, markdown=markdown),
    ]
    each = [[row["variant"], by_seed(row)] for row in rows if row.get("differences")]
    parts += [table(["variant", "difference, seed by seed"], each, [1], markdown)] if each else []
    return "\n\n".join([*parts, meaning(looks)])


def millions(n: int) -> str:
    return f"{n / 1e6:,.{3 if n < 1e7 else 1}f} M"


def shown_p(p: float | None) -> str:
    return "<.0001" if p is not None and p < 0.0001 else shown_as(p, ".4f")


def shown_as(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def interval(row: dict) -> str:
    if row.get("difference") is None:
        return ""
    return f"{row['difference']:+.4f}" + ("" if row["low"] is None else f" ± {(row['high'] - row['low']) / 2:.4f}")


def by_seed(row: dict) -> str:
    return ", ".join(f"{seed}: {difference:+.4f}" for seed, difference in zip(row["paired_seeds"], row["differences"], strict=True))


def meaning(looks: Sequence[int]) -> str:
    """Names the test, and says what its verdicts mean."""
    rate = f"{100 * LEVEL:g} %"
    anywhere = ", at any planned look" if len(looks) > 1 else ""
    lines = [
        "FLOPs ×: the work of a token against the first's.",
        "Student's paired t-test over the seeds that both have.",
        f"Of variants that are no better and no worse, {rate} are called better, {rate} worse.",
        "No difference shown: more seeds might show one. What these could detect is an estimate.",
        f"p: how often luck alone gives evidence this strong for better{anywhere}. One-sided: near 1, it is for worse.",
    ]
    if len(looks) > 1:
        level = f"{100 * nominal_level(tuple(looks)):.2g} %"
        lines += [f"Looks after {looks[0]} to {looks[-1]} seeds, each at {level}, keep these rates; p and ± allow for them."]
    return textwrap.fill(" ".join(lines), WIDTH)


# ---- results.tsv ----


def record(rows: list[dict], path: Path, first: str):
    """Appends a line per variant to results.tsv, unless the file says it already. memory in bytes, loss in nats per token."""
    lines = [*filter(None, path.read_text(encoding="utf-8", errors="replace").splitlines())] if path.exists() else []
    head = lines[0].split("\t") if lines else [*TSV]  # an older file keeps its columns
    new = [] if lines else ["\t".join(head)]
    for row in rows:
        cells = {
            "commit": row.get("commit", ""),
            "name": " ".join(row["variant"].split()),
            "against": " ".join(first.split()) if "verdict" in row else "",
            "seeds": " ".join(map(str, row["seeds"])),
            "loss": shown_as(row.get("val_loss"), ".6f"),
            "difference": shown_as(row.get("difference"), ".6f"),
            "interval": "" if row.get("low") is None else f"{row['low']:.6f} {row['high']:.6f}",
            "p": shown_as(row.get("p"), ".3g"),
            "memory": shown_as(row.get("memory_bytes"), ".0f"),
            "seconds": shown_as(row.get("seconds"), ".1f"),
            "verdict": " ".join(row.get("text", "the first").split()),
        }
        line = "\t".join(cells.get(name, "") for name in head)
        known = line in lines or ("verdict" not in row and has_seeds(lines, head, cells))
        new += [] if known else [line]
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, "\n".join(new) + "\n")


def has_seeds(lines: list[str], head: list[str], cells: dict[str, str]) -> bool:
    """Whether a line has all of these seeds of the same variant and commit."""
    for line in lines[1:]:
        there = dict(zip(head, line.split("\t"), strict=False))
        same = all(there.get(key) == cells[key] for key in ("commit", "name"))
        if same and {*cells["seeds"].split()} <= {*there.get("seeds", "").split()}:
            return True
    return False


# ---- the picture ----


def band(series: list[list[float]], level: float) -> tuple[list[float], list[float]]:
    """Returns mean and half interval at each point of several series of equal length."""
    means, halves = [], []
    for values in zip(*series, strict=True):
        n = len(values)
        means.append(statistics.fmean(values))
        halves.append(scipy_stats().t.isf(level, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0)
    return means, halves


def draw(runs: dict[str, dict[int, dict]], looks: Sequence[int], out: Path):
    """Draws how each variant's loss differs from the first's: a dot for each seed, their mean and its 95 % interval. Above, with several
    validations, the mean curves and their differences; without, the losses."""
    level = nominal_level(tuple(looks))
    first_name, first = next(iter(runs.items()))
    against = {name: {seed: one for seed, one in seeds.items() if seed in first} for name, seeds in runs.items()}
    final = {name: [one["val_loss"] - first[seed]["val_loss"] for seed, one in seeds.items()] for name, seeds in against.items()}
    rows, several = 0.5 + 0.28 * len(runs), any(len(one["curve"]) > 1 for seeds in runs.values() for one in seeds.values())
    panels = [["losses", "gaps"], ["final", "final"]] if several else [["each", "final"]]
    with picture.picture(out, picture.WIDTH, rows + (5.4 if several else 1.2), title_of(runs)) as figure:
        axes = figure.subplot_mosaic(panels, height_ratios=[3.6, rows] if several else [1])
        draw_forest(axes["final"], final, level)
        axes["final"].axvline(0, color=GREY, linewidth=1)
        title = f"Difference from {label_of(first_name, 24)}, 95 % interval{' of the mean, at the end; dots are seeds' * several}"
        axes["final"].set(title=title, xlabel="nats per token; left of 0 is better")
        if several:
            draw_curves(axes, runs, against, level)
            legend_below(figure)
            return
        draw_forest(axes["each"], {name: [one["val_loss"] for one in seeds.values()] for name, seeds in runs.items()}, LEVEL)
        axes["each"].set_title("Validation loss, 95 % interval")
        axes["final"].set_yticklabels([])
        for panel in axes.values():
            panel.locator_params("x", nbins=6)


def draw_curves(axes: dict, runs: dict[str, dict[int, dict]], against: dict[str, dict[int, dict]], level: float):
    """Draws the mean validation losses, and the mean differences of those runs whose seed the first variant has, too, with bands."""
    first_name, first = next(iter(runs.items()))
    gaps = []
    for i, (name, seeds) in enumerate(runs.items()):
        draw_band(axes["losses"], [one["curve"] for one in seeds.values()], LEVEL, i, label_of(name, 40))
        pairs = [(one["curve"], first[seed]["curve"]) for seed, one in against[name].items()]
        differences = [{at: loss - theirs[at] for at, loss in ours.items() if at in theirs} for ours, theirs in pairs]
        gaps.append(draw_band(axes["gaps"], differences, level, i))
    fit_late(axes["gaps"], gaps)
    titles = {
        "losses": "Validation loss, mean over seeds, 95 % band",
        "gaps": f"Difference from {label_of(first_name, 24)}, 95 % band: below 0 is better",
    }
    for name, title in titles.items():
        axes[name].set(title=title, xlabel="training tokens", ylabel="nats per token")
        number_axis(axes[name].xaxis)


def title_of(runs: dict[str, dict[int, dict]]) -> str:
    """Says what is compared, and of what size."""
    names, every = [label_of(name, 40) for name in runs], [one for seeds in runs.values() for one in seeds.values()]
    who = f"{names[1]} against {names[0]}" if len(names) == 2 else f"{len(names)} variants, the first is {names[0]}"
    known = {unit: [one[key] for one in every if key in one] for unit, key in (("parameters", "params"), ("tokens", "tokens"))}
    known["seeds"] = [len(seeds) for seeds in runs.values() if seeds]
    return f"{who}: " + ", ".join(f"{between(values)} {unit}" for unit, values in known.items() if values)


def draw_forest(axes, values: dict[str, list[float]], level: float):
    """Draws a row for each name, from the top down: its values as faint dots, and their mean with its interval."""
    for i, each in enumerate(values.values()):
        axes.plot(each, [-i] * len(each), "o", color=COLORS[i % len(COLORS)], alpha=0.6, markersize=5)
        if each:
            mean, half = band([[value] for value in each], level)
            axes.errorbar(mean, [-i], xerr=half, color=COLORS[i % len(COLORS)], fmt="D", markersize=5, capsize=3)
    axes.set_yticks(
        [-i for i in range(len(values))], [label_of(name, 34) + ("" if each else ": no result") for name, each in values.items()]
    )
    axes.set_ylim(-len(values) + 0.4, 0.6)
    axes.set_xlabel("nats per token")


def draw_band(axes, curves: list[dict], level: float, i: int, name: str = "") -> tuple:
    """Draws the mean of curves (x → y) with its band, where all of them have a point. Returns x and the band's ends."""
    at = sorted(set.intersection(*map(set, curves))) if curves else []
    means, halves = map(np.array, band([[curve[x] for x in at] for curve in curves], level))
    axes.plot(at, means, **look(i), marker="o", markersize=3.5, label=name)
    axes.fill_between(at, means - halves, means + halves, color=look(i)["color"], alpha=0.2, linewidth=0)
    return at, means - halves, means + halves
