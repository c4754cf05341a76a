"""Reads the logs of runs, and the files beside them, as curves."""

import itertools
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import cli
from common.files import parse_json, read_json
from common.picture import label_of
from common.run_folder import RUN, without_seed
from common.validation import has_type

# log lines with a value
LINES = [
    re.compile(pattern)
    for pattern in (
        r"(?P<step>\d+) (?P<stream>train|val|hella|lambada|core|blimp|text) (?P<value>\S+)$",  # train.py's, build-nanogpt's
        r"step (?P<step>\d+): train loss \S+, val loss (?P<val>\S+)$",  # nanoGPT
        r"iter (?P<step>\d+): loss (?P<train>\S+), ",
        r"s:(?P<step>\d+) (tel:(?P<val>\S+)|eval:(?P<hella>\S+)|trl:(?P<train>\S+)( lr:(?P<lr>\S+) norm:(?P<grad_norm>\S+))?)$",  # llm.c
        r"step:(?P<step>\d+)/\d+ (val_loss:(?P<val>\S+)|train_loss:(?P<train>\S+))",  # modded-nanogpt
    )
]
MARKS = {"train": "loss", "val": "val_loss", "hella": "hellaswag_acc_norm"}  # a key that only this stream's lines have


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


# what run.json says about a run, at its top or among its settings
FACTS = {"size": str, "params": int, "seed": int, "total_batch_tokens": int, "hellaswag_file": str}


def facts_beside(log: Path) -> dict:
    """Returns those of FACTS that the run.json next to a log has, of this version or an older one; and kind: what runs that differ only in
    their seed have in common, which is settings, data and code."""
    try:
        run = read_json(log.with_name(RUN), "")
        config = run.get("config") if isinstance(run.get("config"), dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}
    facts = {name: value for name, kind in FACTS.items() if has_type(value := run.get(name, config.get(name)), kind)}
    launches, model = run.get("launches"), config.get("model")
    if "seed" in facts and isinstance(model, dict):
        last = launches[-1] if isinstance(launches, list) and launches and isinstance(launches[-1], dict) else {}
        settings = without_seed({**config, **model}, facts["seed"])
        facts["kind"] = json.dumps([settings, run.get("data"), last.get("code") or last.get("commit")], sort_keys=True)
    return facts


@dataclass
class Run:
    """A log, and what the files beside it say about the run."""

    log: Path
    streams: dict[str, dict[int, float]]  # with lr, …: stream → step → value
    x: dict[str, dict[int, float]] | None = None  # stream → step → x; None: x is the step
    facts: dict = field(default_factory=dict)  # from facts_beside

    @property
    def seed(self) -> int | None:
        return self.facts.get("seed")

    @property
    def tokens(self) -> int | None:
        """Training tokens up to the last line of the log; None if they are unknown."""
        steps = [step + (stream == "train") for stream in MARKS for step in self.streams.get(stream, ())]
        return self.facts["total_batch_tokens"] * max(steps) if steps and "total_batch_tokens" in self.facts else None

    def curve(self, stream: str, smooth: float | None = 0.0) -> dict[int, tuple[float, float]]:
        """Step → (x, y), in the order of steps, where y is finite and there is an x. smooth: the weight of --smooth."""
        values, at = self.streams.get(stream, {}), self.x and self.x.get(stream, self.x["train"])
        steps = [step for step in sorted(values) if math.isfinite(values[step]) and (at is None or step in at)]
        half = round(0.02 * len(steps) if smooth is None else smooth / (1 - smooth))
        y = smoothed(np.array([values[step] for step in steps]), half)
        return {step: (at[step] if at else step, value) for step, value in zip(steps, y.tolist(), strict=True)}


def read_run(log: Path, x: str = "step", names: tuple[str, ...] = ()) -> Run:
    """Reads a log, and these values and the x axis from the metrics.jsonl beside it. ValueError if there is no such x axis."""
    streams, path, facts = read_log(log), log.with_name("metrics.jsonl"), facts_beside(log)
    found = read_metrics(path, list(names))
    streams |= {name: values for name, values in found.items() if values}
    if x == "step":
        return Run(log, streams, None, facts)
    # per stream, because a step is validated before its update
    axes = {stream: read_metrics(path, [x], mark)[x] for stream, mark in MARKS.items()}
    run = Run(log, streams, axes, facts)
    if x == "tokens" and not any(axes.values()) and (batch := facts.get("total_batch_tokens")):
        run.x = {stream: {step: step * batch for step in streams.get(stream, ())} for stream in MARKS}
    if not any(run.x.values()):
        raise ValueError(f"{path} is missing or has no {x}: use --x step")
    return run


# ---- curves ----


class Curve(NamedTuple):
    """Several runs as one curve: their mean, the lowest and the highest at each x. Arrays of equal length."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def since(self, start: float) -> "Curve":
        """Returns the part of the curve from this x on."""
        return Curve(*(part[self.x >= start] for part in self))


def mean_of(curves: list[dict[int, tuple[float, float]]]) -> Curve:
    """Returns the mean of curves (step → (x, y)) at the steps that all have."""
    if not curves:
        return Curve(*np.empty((4, 0)))
    steps = sorted(set.intersection(*map(set, curves)))
    x, y = np.array([[curve[step] for step in steps] for curve in curves], float).reshape(len(curves), len(steps), 2).transpose(2, 0, 1)
    return Curve(x.mean(0), y.mean(0), y.min(0), y.max(0))


def smoothed(values: np.ndarray, half: int) -> np.ndarray:
    """Returns the mean of each value and `half` neighbors on both sides: it lags behind nothing. Fewer on both sides near the beginning, so
    that it follows a steep start; near the end, those that there are."""
    if half == 0:
        return values
    at, sums = np.arange(len(values)), np.concatenate([[0.0], np.cumsum(values)])
    left = np.minimum(half, at // 4)
    first, last = at - left, np.minimum(at + left + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def gap(ours: dict[int, tuple[float, float]], theirs: dict[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """Returns ours minus theirs at each of our x within their range. Interpolates theirs."""
    if not theirs:
        return {}
    x, y = zip(*theirs.values(), strict=True)
    return {step: (at, value - float(np.interp(at, x, y))) for step, (at, value) in ours.items() if x[0] <= at <= x[-1]}


# ---- seeds ----


class Group(NamedTuple):
    """Runs that differ only in their seed, drawn as one curve."""

    name: str
    runs: list[Run]

    @property
    def label(self) -> str:
        return self.name + (f", {len(self.runs)} seeds" if self.runs[1:] else "")

    def curve(self, stream: str, start: float = -math.inf, smooth: float | None = 0.0) -> Curve:
        """Returns the mean of the runs that have this stream, from start on."""
        return mean_of([curve for run in self.runs if (curve := run.curve(stream, smooth))]).since(start)

    def gap(self, first: "Group", stream: str, start: float, smooth: float | None) -> Curve:
        """Returns the mean difference from the first group, seed by seed if they have seeds in common."""
        pairs = list(itertools.product(self.runs, first.runs))
        pairs = [(ours, theirs) for ours, theirs in pairs if ours.seed == theirs.seed] or pairs
        return mean_of([found for pair in pairs if (found := gap(*(run.curve(stream, smooth) for run in pair)))]).since(start)


def groups_of(runs: list[Run], mean: bool = True) -> list[Group]:
    """Puts runs that differ only in their seed together, if mean, and names the groups by their folders, or by their paths if folders have
    the same name. Groups are in the order of their first runs. A seed that comes again begins another group."""
    groups, times = {}, {}
    for run in runs:
        kind = run.facts.get("kind", str(run.log))
        times[kind, run.seed] = times.get((kind, run.seed), 0) + 1
        groups.setdefault((kind, times[kind, run.seed]) if mean else len(groups), []).append(run)
    logs = [group[0].log for group in groups.values()]
    names = [folder_of([run.log for run in group]) for group in groups.values()]
    if len(set(names)) < len(set(logs)):
        above = os.path.commonpath([log.parent.absolute() for log in logs])
        names = [os.path.relpath(log, above) for log in logs]
    names = [label_of(name) for name in names]
    if len(set(names)) < len(set(logs)):  # shortened alike
        names = [f"{number}: {name}" for number, name in enumerate(names, 1)]
    return [Group(name, group) for name, group in zip(names, groups.values(), strict=True)]


def folder_of(logs: list[Path]) -> str:
    """Returns what the names of the logs' folders have in common. A numbered run has the name of the folder above it."""
    folders = [log.parent.parent if log.parent.name.isdecimal() else log.parent for log in logs]
    names = [folder.name or str(log) for folder, log in zip(folders, logs, strict=True)]
    common = os.path.commonprefix(names).rstrip("-_. ")  # noqa: RUF071 (names, not paths)
    return common if names[1:] and common else names[0]
