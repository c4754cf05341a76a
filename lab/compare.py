"""Compares ideas at equal tokens: trains each variant with several seeds, in turns, and prints one table.

python -m lab.compare "plain=" "rope=--pos rope" --flags="--preset quickstart"
python -m lab.compare --suite modern --data-dir webdocs_bytes    # preset modern against gpt2, each with its own learning rates
"""

import json
import math
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common import cli
from common.picture import draw_or_warn
from common.validation import raise_errors
from lab.judge import tokens_to_the_same_loss
from lab.length import extrapolate, plot_curves, show_curves
from lab.measure import measure, speeds_in_turns
from lab.origins import machine_notes
from lab.runs import Run, folder_of, run_all, split
from lab.suites import SMALL, SUITES
from train import find_data


@dataclass
class CompareConfig:
    """Train variants and compare them."""

    variants: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """NAME=FLAGS of train.py, each in quotes. The others are compared with the first."""
    flags: str = ""
    """Flags of train.py for all variants. Write --flags="…", with the equals sign."""
    suite: Literal["none", "switches", "without", "modern", "rates", "experts", "teacher", "length"] = "none"
    """A ready-made comparison of small models. Two CPU cores train each in minutes."""
    data_dir: str = "webdocs_bytes"
    """Byte shards for a suite."""
    out_dir: str = "log/compare"
    """Gets a folder for each run. Finished runs in it are kept, stopped runs resume."""
    seeds: int = 3
    """Runs of each variant, with seeds 1, 2, …"""
    workers: int = 1
    """Runs at a time. With several GPUs, each run gets one. More than 1 disturbs the logged speeds: measure them with --time-steps."""
    time_steps: int = 0
    """At the end, time this many steps of each variant, in turns, with all models in memory. 0: take the speeds from the logs."""
    mixed: bool = False
    """Also use finished and stopped runs of other code or other data. The table names them. Without it, they are refused."""
    json: bool = False
    """Print JSON instead of a table."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(1, self, "seeds", "workers") + cli.at_least(0, self, "time_steps")
        if (self.suite == "none") == (not self.variants):
            errors.append('give either variants, such as "plain=" "rope=--pos rope" --flags="--preset quickstart", or --suite')
        folders = [folder_of("", variant.split("=")[0], 1) for variant in self.variants]
        errors += [f"{variant!r} is not NAME=FLAGS" for variant in self.variants if "=" not in variant or not variant.split("=")[0]]
        if len(set(folders)) < len(folders):
            errors.append(f"two variants would share a folder, rename one: {', '.join(str(folder.parent) for folder in folders)}")
        if self.suite == "teacher" and self.workers > 1:
            errors.append("the teacher must finish before its students start: leave out --workers")
        raise_errors(errors)


# ---- the runs ----


def variants_of(config: CompareConfig) -> dict[str, list[str]]:
    """Returns name → flags of train.py. The flags may contain {out_dir} and {seed}."""
    common, variants = config.flags, dict(variant.split("=", 1) for variant in config.variants)
    if config.suite != "none":
        common, variants = f"{SMALL} --data-dir {shlex.quote(config.data_dir)} {common}", SUITES[config.suite]
    words = {name: split(f"{common} {flags}") for name, flags in variants.items()}  # a variant's own flags come last and win
    reserved = ("--seed", "--out-dir", "--out_dir")
    wrong = [name for name, flags in words.items() if any(word.split("=")[0] in reserved for word in flags)]
    raise_errors([f"{name}: lab.compare sets --seed and --out-dir for each run: leave them out" for name in wrong])
    return words


def run_of(config: CompareConfig, name: str, flags: list[str], seed: int) -> Run:
    flags = [word.replace("{out_dir}", config.out_dir).replace("{seed}", str(seed)) for word in flags]
    return Run(name, [*flags, "--seed", str(seed)], folder_of(config.out_dir, name, seed))


# ---- the results ----


def summary(runs: dict[str, list[dict]]) -> list[dict]:
    """Returns a row per variant: means over its seeds, and its speed relative to the first variant (median over seeds)."""
    first = next(iter(runs.values()))
    rows = []
    for name, seeds in runs.items():
        losses = [one["val_loss"] for one in seeds]
        rows.append(
            {
                "variant": name,
                **{key: seeds[0][key] for key in ("tokens", "params", "active_params", "cache_bytes")},
                "val_loss": statistics.fmean(losses),
                "spread": max(losses) - min(losses),
                "perplexity": math.exp(statistics.fmean(losses)),
                "difference": statistics.fmean(losses) - statistics.fmean(one["val_loss"] for one in first),
                "speed": statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(seeds, first, strict=True)),
                **{key: statistics.median(one[key] for one in seeds) for key in ("seconds", "tokens_per_second", "memory_bytes")},
            }
        )
    return rows


def show(rows: list[dict], seeds: int) -> str:
    lines = [
        f"| variant | parameters (active) | tokens | val loss, mean of {seeds} | spread | to the first | perplexity "
        "| tok/s | × first | memory | KV cache |",
        "| --- " * 11 + "|",
    ]
    for r in rows:
        active = f" ({r['active_params']:,})" if r["active_params"] < r["params"] else ""
        lines.append(
            f"| {r['variant']} | {r['params']:,}{active} | {r['tokens']:,} | {r['val_loss']:.4f} | {r['spread']:.4f} "
            f"| {r['difference']:+.4f} | {r['perplexity']:.3f} | {r['tokens_per_second']:,.0f} | {r['speed']:.2f} "
            f"| {r['memory_bytes'] / 1e6:,.0f} MB | {r['cache_bytes'] / 1e3:,.0f} kB |"
        )
    return "\n".join(lines)


def main():
    with cli.one_line_errors(cli.AGAIN):
        config = cli.parse(CompareConfig)
        config.validate()
        variants, seeds = variants_of(config), range(1, config.seeds + 1)
        # every variant with seed 1, then with seed 2, …: a machine whose speed drifts treats them alike
        jobs = [run_of(config, name, flags, seed) for seed in seeds for name, flags in variants.items()]
        for run in jobs[: len(variants)]:
            find_data(run.config())  # make missing shards now: two runs must not make them at once
        notes = run_all(jobs, config.workers, config.mixed) + machine_notes([run.folder for run in jobs])
        runs = {name: [measure(run.folder) for run in jobs if run.name == name] for name in variants}
        if config.time_steps:
            speeds = speeds_in_turns([run.folder for run in jobs[: len(variants)]], config.time_steps)
            for seed_runs, speed in zip(runs.values(), speeds, strict=True):
                seed_runs[:] = [one | {"tokens_per_second": speed} for one in seed_runs]
        found = {"variants": summary(runs), "notes": notes}
        text = [show(found["variants"], config.seeds), *notes]
        if config.suite == "modern":
            found["to_the_same_loss"] = tokens_to_the_same_loss(runs)
            text.append(found["to_the_same_loss"])
        if config.suite == "length":
            found["by_position"] = extrapolate(config.out_dir, config.data_dir, [*seeds])
            text.append(show_curves(found["by_position"]))
            draw_or_warn(plot_curves, found["by_position"], len(found["by_position"][0]["loss"]) // 4, Path(config.out_dir, "length.png"))
        print(json.dumps(found, indent=2) if config.json else "\n".join(text))


if __name__ == "__main__":
    main()
