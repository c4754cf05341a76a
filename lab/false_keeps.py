"""Measures how often the judge is wrong, and what it finds, on real training: hundreds of tiny models in one process.

    python -m lab.false_keeps --trials 100

A trial of the first kind compares a model with itself, only with other seeds: any "better" is false. A trial of the second kind gives it
ReLU² instead of GELU. Losses are kept in losses.json, so the same command with more --trials continues. It refuses losses of other code or
data.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from common import cli
from common.bucket_shards import open_shards
from common.distributed import DistContext
from common.files import read_json, write_json
from common.locks import lock_folder
from common.validation import raise_errors
from lab.judge import FIRST_LOOK, judge, looks_until, power, scipy_stats, seeds_needed
from lab.runs import split
from train import find_data
from training.config import LOWER_LR, TrainConfig
from training.evaluation import validate
from training.flags import parse_flags
from training.run_json import code_now
from training.trainer import Trainer
from variants import build

# 35,000 parameters, one to two seconds on an idle core; ReLU² gains 0.04 nats per byte
TINY = (
    "--preset quickstart --n-layer 2 --n-head 2 --n-embd 32 --pos rope --seq-len 64 --total-batch-tokens 512 --micro-batch-size 8 "
    "--max-lr 1e-2 --warmup-steps 20 --max-steps 200 --val-tokens 16384 --device cpu --dtype fp32"
)
OTHER_SEEDS = 10**6  # added to a seed for the run that differs in nothing else


@dataclass
class FalseKeepsConfig:
    """Count the judge's false verdicts, and the seeds that a real gain takes."""

    trials: int = 100
    """Comparisons that differ only in seed."""
    seeds: int = 5
    """Seeds of each comparison with one look."""
    limit: int = 8
    """Most seeds of each comparison with --until-decided."""
    pairs: int = 50
    """Seeds of the real gain, ReLU² against GELU."""
    out_dir: str = "log/false_keeps"
    """Gets losses.json: the loss of each run so far."""
    flags: str = TINY
    """Flags of train.py for all runs. Write --flags="…", with the equals sign."""
    json: bool = False
    """Print JSON."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(1, self, "trials") + cli.at_least(2, self, "seeds", "pairs") + cli.at_least(FIRST_LOOK, self, "limit")
        raise_errors(errors)


def train_once(config: TrainConfig) -> float:
    """Trains a model as train.py does, without a log or a folder. Returns its validation loss, in nats per token."""
    torch.manual_seed(config.seed)
    shards = open_shards(config.data_dir)
    config.model.vocab_size = shards.vocab_size
    trainer = Trainer(config, DistContext(torch.device("cpu")), build(config.model), shards, compiled=False)
    for step in range(config.max_steps):
        trainer.update(step)
    with trainer.evaluated_weights():
        loss = validate(trainer)
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} with seed {config.seed}: {LOWER_LR}")
    return loss


class Losses:
    """Trains runs on demand, and keeps their losses in a file. ValueError if it has losses of other flags, other code or other data."""

    def __init__(self, config: FalseKeepsConfig):
        self.path, self.flags = Path(config.out_dir, "losses.json"), config.flags
        data = find_data(parse_flags(split(config.flags))).contents()
        of_now = json.loads(json.dumps({"flags": config.flags, "code": code_now()["code"], "data": data}))  # tuples become lists
        self.kept = read_json(self.path, "delete it, or choose another --out-dir") if self.path.exists() else of_now
        other = ", ".join(name for name in of_now if self.kept.get(name) != of_now[name])
        if other:
            raise ValueError(f"{self.path} has the losses of other {other}: choose another --out-dir")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, flags: str, seeds: list[int]) -> list[float]:
        """Returns the losses of these runs, each of the common flags and its own."""
        losses = []
        for seed in seeds:
            if (key := f"{flags} --seed {seed}".strip()) not in self.kept:
                self.kept[key] = train_once(parse_flags([*split(self.flags), *split(key)]))
            losses.append(self.kept[key])
        return losses

    def differences(self, idea: str, first: list[int], second: list[int]) -> list[float]:
        """Returns the idea's loss with the second seeds minus the plain loss with the first ones."""
        found = [b - a for a, b in zip(self.get("", first), self.get(idea, second), strict=True)]
        write_json(self.path, self.kept)
        return found


def rate(hits: int, n: int) -> dict:
    """Returns a rate with its exact 95 % interval (Clopper & Pearson, 1934)."""
    beta = scipy_stats().beta
    low = float(beta.ppf(0.025, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, n - hits)) if hits < n else 1.0
    return {"hits": hits, "of": n, "rate": hits / n, "low": low, "high": high}


def false_keeps(config: FalseKeepsConfig, losses: Losses) -> dict:
    """Counts "better" among pairs that differ only in seed, with one look and with several."""
    most, counts = max(config.seeds, config.limit), {"one look": 0, "until decided": 0}
    for trial in cli.bar(range(config.trials), desc="pairs that differ only in seed", unit="pair"):
        seeds = [trial * most + i for i in range(1, most + 1)]
        differences = losses.differences("", seeds, [seed + OTHER_SEEDS for seed in seeds])
        counts["one look"] += judge(differences[: config.seeds], [config.seeds]).verdict == "better"
        counts["until decided"] += judge(differences, looks_until(config.limit)).verdict == "better"
    return {name: rate(hits, config.trials) for name, hits in counts.items()}


def real_gain(config: FalseKeepsConfig, losses: Losses) -> dict:
    """Measures ReLU² against GELU, paired by seed, and how often groups of seeds find it."""
    seeds = [*range(1, config.pairs + 1)]
    bar = cli.bar(seeds, desc="ReLU² against GELU", unit="seed")
    differences = [losses.differences("--mlp relu2", [seed], [seed])[0] for seed in bar]
    mean, deviation, n = statistics.fmean(differences), statistics.stdev(differences), config.seeds
    groups = [differences[i : i + n] for i in range(0, config.pairs - n + 1, n)]
    effect = mean / deviation if deviation else math.inf
    return {
        "difference": mean,
        "deviation": deviation,
        "found": rate(sum(judge(group, [n]).verdict == "better" for group in groups), len(groups)) if groups else None,
        "power": power(n, effect) if mean < 0 and math.isfinite(effect) else None,
        "seeds_for_80_percent": seeds_needed(effect) if mean < 0 and math.isfinite(effect) else None,
    }


def describe(config: FalseKeepsConfig, found: dict) -> str:
    def shown(r: dict) -> str:
        return f"{r['hits']} of {r['of']}, {100 * r['rate']:.1f} % ({100 * r['low']:.1f} to {100 * r['high']:.1f} %)"

    gain, kinds = found["gain"], found["false"]
    lines = [
        f"false keeps, {config.seeds} seeds: {shown(kinds['one look'])}",
        f"false keeps, --until-decided --seeds {config.limit}: {shown(kinds['until decided'])}",
        f"ReLU² against GELU, {config.pairs} seeds: {gain['difference']:+.4f} nats per token, "
        f"one seed's difference deviates by {gain['deviation']:.4f}",
    ]
    if gain["power"] is not None:
        lines.append(
            f"{config.seeds} seeds find it with probability {gain['power']:.2f}; groups of {config.seeds} did in {shown(gain['found'])}; "
            f"{gain['seeds_for_80_percent']} seeds find it in 80 %"
        )
    return "\n".join(lines)


def main():
    with cli.one_line_errors(cli.AGAIN):
        config = cli.parse(FalseKeepsConfig)
        config.validate()
        scipy_stats()
        torch.set_num_threads(1)  # faster for tiny matrices
        with lock_folder(Path(config.out_dir)):
            losses = Losses(config)
            found = {"false": false_keeps(config, losses), "gain": real_gain(config, losses)}
        print(json.dumps(found, indent=2) if config.json else describe(config, found))


if __name__ == "__main__":
    main()
