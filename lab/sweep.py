"""Searches for the flags of train.py with the lowest validation loss (Optuna).

    python -m lab.sweep max_lr=1e-4..1e-1:log n_layer=2..4 mlp=gelu,relu2 --flags="--preset quickstart --val-every 100"

Run the same command again to continue a stopped sweep. --export FILE writes the space as a Weights & Biases sweep instead.
"""

import itertools
import json
import math
import os
import shlex
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from common import cli, picture
from common.files import write_json
from common.locks import lock_folder
from common.logs import read_metrics
from common.tables import table
from common.validation import raise_errors
from lab.origins import code_notes, data_notes, origin_of, refuse_unless, unequal
from lab.runs import SCRIPT, Run, environment, last_checkpoint, settings_to_blame, split, why_it_failed
from train import find_data
from training.config import TrainConfig
from training.flags import parse_flags
from training.run_json import RUN, code_now
from variants import VariantConfig


@dataclass
class SweepConfig:
    """Search for the best flags of train.py."""

    space: Annotated[tuple[str, ...], tyro.conf.Positional]
    """FLAG=A,B,C (true,false for a switch), or FLAG=LOW..HIGH. Integer ends give integers; :log after HIGH gives a logarithmic scale."""
    flags: str = ""
    """Other flags of train.py. Write --flags="…", with the equals sign."""
    trials: int = 20
    """Runs in total, pruned ones included. A space with no more points than this runs each point once."""
    workers: int = 1
    """Runs at a time. With several GPUs, each run gets one."""
    prune: bool = True
    """Once five runs have finished, end a run that never got below their median validation loss at the same step."""
    seed: int = 1337
    """Seed of the search. The runs take --seed from --flags."""
    out_dir: str = "log/sweep"
    """Gets a folder for each run, the study (sweep.db) and the plot (sweep.png)."""
    export: str = ""
    """Write the space to this .yaml file, for wandb sweep, and run nothing."""
    mixed: bool = False
    """Also use runs of other code or other data. The output names them. Without it, they are refused."""
    markdown: bool = False
    """Print tables as Markdown."""
    json: bool = False
    """Print JSON instead of a table."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(1, self, "trials", "workers") + cli.at_least(0, self, "seed")
        raise_errors(errors if self.space else [*errors, "give at least one FLAG=VALUES, such as max_lr=1e-4..1e-2:log"])


# ---- the space ----


class Choice(NamedTuple):
    """A flag with one of these values."""

    values: list[str]

    def points(self, limit: int) -> list[str]:
        return self.values

    def suggest(self, trial, name: str):
        return trial.suggest_categorical(name, self.values)

    def wandb(self) -> dict:
        return {"values": [{"true": True, "false": False}.get(value, value) for value in self.values]}


class Range(NamedTuple):
    """A flag between two numbers. It takes integers only if both are integers."""

    low: int | float
    high: int | float
    log: bool

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def points(self, limit: int) -> range | list[float] | None:
        """Returns all values of the range. None if they are more than the limit."""
        if self.is_integer and self.high - self.low < limit:
            return range(self.low, self.high + 1)
        return [self.low] if self.low == self.high else None

    def suggest(self, trial, name: str):
        suggest = trial.suggest_int if self.is_integer else trial.suggest_float
        return suggest(name, self.low, self.high, log=self.log)

    def wandb(self) -> dict:
        names = {(True, True): "q_log_uniform_values", (True, False): "int_uniform", (False, True): "log_uniform_values"}
        return {"distribution": names.get((self.is_integer, self.log), "uniform"), "min": self.low, "max": self.high}


RESERVED = ("out_dir", "resume", "replay_step")


def parse_space(words: tuple[str, ...]) -> dict[str, Choice | Range]:
    """Parses FLAG=VALUES words. ValueError names the first invalid word."""
    space = {}
    for word in words:
        name, _, values = word.partition("=")
        name = name.replace("-", "_")
        if not name or not values or name in space or name in RESERVED:
            raise ValueError(f"{word!r} is not FLAG=VALUES, or repeats a flag, or sets one of {', '.join(map(cli.flag, RESERVED))}")
        if name not in {f.name for kind in (TrainConfig, VariantConfig) for f in fields(kind)} - {"model"}:
            raise ValueError(f"{word!r}: train.py has no flag {cli.flag(name)}")
        low, dots, rest = values.partition("..")
        is_range = dots and number(low) is not None
        space[name] = parse_range(word, low, rest) if is_range else Choice([*dict.fromkeys(values.split(","))])
    return space


def parse_range(word: str, low: str, rest: str) -> Range:
    high, _, kind = rest.partition(":")
    low, high = number(low), number(high)
    fits = high is not None and -float("inf") < low <= high < float("inf")
    if not fits or kind not in ("", "log") or (kind == "log" and low <= 0):
        raise ValueError(f"{word!r} is not FLAG=LOW..HIGH or FLAG=LOW..HIGH:log: LOW must be at most HIGH, and above 0 for :log")
    return Range(low, high, kind == "log")


def number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def all_points(space: dict[str, Choice | Range], limit: int) -> list[dict]:
    """Returns every point of the space, or [] if they are more than the limit."""
    axes = [values.points(limit) for values in space.values()]
    if None in axes or math.prod(map(len, axes)) > limit:
        return []
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*axes)]


def flags_of(params: dict) -> list[str]:
    """Returns a point of the space as flags of train.py."""
    words = []
    for name, value in params.items():
        if value in ("true", "false"):
            words.append(cli.flag(name if value == "true" else f"no_{name}"))
        else:
            words += [cli.flag(name), str(value)]
    return words


def check(config: SweepConfig, space: dict[str, Choice | Range]):
    """Checks --flags and each value of the space alone. Invalid combinations of values show up later, run by run.

    Exits 2 on an unknown flag or choice. ValueError for a flag that the sweep sets itself.
    """
    for word in split(config.flags):
        if word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") in RESERVED:
            raise ValueError(f"the sweep sets {word} itself: remove it from --flags")
    for name, values in space.items():
        for value in values.values if isinstance(values, Choice) else [values.low, values.high]:
            parse_flags([*split(config.flags), *flags_of({name: value})])


def export(config: SweepConfig, space: dict[str, Choice | Range]):
    """Writes the file for wandb sweep, as JSON, which is valid YAML. Each run's folder has W&B's run id as its name.

    W&B passes a true flag by its name and omits a false one. So the command first turns all such flags off.
    """
    off = [cli.flag(f"no_{name}") for name, values in space.items() if isinstance(values, Choice) and "false" in values.values]
    flags = shlex.join([*split(config.flags), *off])
    command = f'exec python train.py --tracker wandb --out-dir {shlex.quote(config.out_dir)}/"$WANDB_RUN_ID" {flags} "$@"'
    content = {
        "program": "train.py",
        "method": "bayes",
        "metric": {"name": "val_loss", "goal": "minimize"},
        "parameters": {name: values.wandb() for name, values in space.items()},
        "command": ["bash", "-c", command, "train.py", "${args_no_boolean_flags}"],
    }
    if config.prune:
        content["early_terminate"] = {"type": "hyperband", "min_iter": 2}
    write_json(Path(config.export), content)


# ---- the runs ----


def import_optuna():
    try:
        import optuna
    except ImportError as e:
        raise ValueError(f"lab.sweep needs Optuna ({e}): pip install optuna") from e
    return optuna


def open_study(config: SweepConfig, points: list[dict]):
    """Opens this command's study, or creates one that starts with these points. ValueError if the study has another command."""
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = Path(config.out_dir, "sweep.db")
    try:
        study = optuna.create_study(
            storage=storage(path),
            study_name="sweep",
            pruner=optuna.pruners.MedianPruner() if config.prune else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
    except Exception as e:  # from SQLite, SQLAlchemy or Optuna
        raise ValueError(f"{path} can't be used ({type(e).__name__}): restore it from a backup, or choose another --out-dir") from e
    # another seed for each launch: its first points are random and must not repeat the last launch's
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.get_trials()), constant_liar=True)
    command = shlex.join([*config.space, f"--flags={config.flags}"])
    before = study.user_attrs.get("command", command)
    if before != command:
        raise ValueError(f"{config.out_dir} has the sweep {before}: run that one, or choose another --out-dir")
    study.set_user_attr("command", command)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # stopped: a new trial resumes its run
        study.enqueue_trial(trial.params, user_attrs={"folder": folder_of(trial)})
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    for point in points:
        study.enqueue_trial(point, skip_if_exists=True)
    return study


def storage(path: Path):
    """Returns Optuna's storage in a SQLite file. In a URL, a path with ?, # or % would mean another file."""
    from optuna.storages import RDBStorage
    from sqlalchemy.pool import QueuePool

    connect = partial(sqlite3.connect, os.fsencode(path), check_same_thread=False)
    return RDBStorage("sqlite://", engine_kwargs={"creator": connect, "poolclass": QueuePool})


def folder_of(trial) -> str:
    return trial.user_attrs.get("folder", str(trial.number))


def tried(study) -> list:
    """Returns the trials that count. A stopped trial doesn't: the trial that resumes its run does."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in ("COMPLETE", "PRUNED", "RUNNING")]


@dataclass
class Running:
    """A trial whose run is training."""

    trial: object
    run: Run
    process: subprocess.Popen
    slot: int
    metrics_size: int = 0
    reported: int = 0  # last step whose loss the study has
    pruned: bool = False
    output_start: int = 0  # where this launch's output begins in the .out file


def sweep(config: SweepConfig, space: dict[str, Choice | Range], study):
    """Runs the missing trials. Only this thread uses the study: with SQLite, two threads may get the same trial."""
    running: list[Running] = []
    cli.exit_on_stop_signals()
    done, name = len(tried(study)), f"trials in {config.out_dir}"
    with cli.bar(total=max(config.trials, done), initial=done, desc=name, unit="trial") as bar:
        try:
            while running or len(tried(study)) < config.trials:
                if len(running) < config.workers and len(tried(study)) < config.trials:
                    slot = min(set(range(config.workers)) - {one.slot for one in running})
                    running += begin(config, space, study.ask(), slot)
                    continue
                time.sleep(1)
                running = [one for one in running if not follow(one, study)]
                bar.update(len(tried(study)) - len(running) - bar.n)
        finally:  # on an error or a signal, the running trials save and exit
            for one in running:
                one.process.terminate()
            for one in running:
                one.process.wait()


def begin(config: SweepConfig, space: dict[str, Choice | Range], trial, slot: int) -> list[Running]:
    """Starts or resumes a trial's run. Returns [] if its settings are invalid."""
    params = {name: values.suggest(trial, name) for name, values in space.items()}
    folder = Path(config.out_dir, folder_of(trial))
    run = Run(f"trial {trial.number}", [*split(config.flags), *flags_of(params)], folder)
    try:
        run.config()
    except ValueError as e:
        end(trial, str(e))
        return []
    with open(folder.with_suffix(".out"), "ab") as output:
        argv = run.argv(resume=run.state() != "new")
        process = subprocess.Popen([sys.executable, SCRIPT, *argv], stdout=output, stderr=output, env=environment(config.workers, slot))
        return [Running(trial, run, process, slot, output_start=output.tell())]


def follow(one: Running, study) -> bool:
    """Reports a run's new losses to the study, and returns whether the run has ended.

    ValueError if the run failed for a reason other than its settings.
    """
    ended, metrics = one.process.poll() is not None, one.run.folder / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    if size != one.metrics_size:
        one.metrics_size, losses = size, read_metrics(metrics, ["val_loss"])["val_loss"]
        for step in sorted(losses):
            if step > one.reported:  # the loss before the first step tells nothing about the settings
                one.trial.report(losses[step], step)
                one.reported = step
    if not ended and not one.pruned and one.trial.should_prune():
        one.pruned = True
        one.process.terminate()
    if ended and one.process.returncode == 0:
        study.tell(one.trial, last_checkpoint(one.run.folder)["val_loss"])
    elif ended and one.pruned:
        end(one.trial, f"pruned at step {one.reported}")
    elif ended:
        status, text = one.process.returncode, output_of(one)
        why = why_it_failed(status, text)
        if not settings_to_blame(status, text):
            raise ValueError(f"{one.run.name}, in {one.run.folder}, exited with {status}: {why}")
        end(one.trial, why)
    return ended


def output_of(one: Running) -> str:
    """Returns what a run has printed since this launch began."""
    with open(one.run.folder.with_suffix(".out"), "rb") as output:
        output.seek(one.output_start)
        return output.read().decode(errors="replace")


def end(trial, why: str):
    """Tells the search that a trial is among the worst: pruned, diverged or invalid."""
    trial.set_user_attr("why", why)
    trial.study.tell(trial, state=import_optuna().trial.TrialState.PRUNED)


# ---- the results ----


def origin_notes(config: SweepConfig, code: dict, run: str = "*") -> list[str]:
    """Names the runs in the sweep's folder (or one of them) that were made by other code, or on other data than there are now."""
    folders = sorted(path.parent for path in Path(config.out_dir).glob(f"{run}/{RUN}"))
    return code_notes(folders, code) + data_notes(folders)


def unfair_to(config: SweepConfig, best: str, run: str) -> list[str]:
    """Says how a run's data, validation or budget differ from the best one's: then their losses don't compare the settings alone."""
    folders = [Path(config.out_dir, name) for name in (run, best)]
    if not all((folder / RUN).exists() for folder in folders):  # someone has deleted it
        return []
    ours, theirs = map(origin_of, folders)
    return unequal(run, ours, best, theirs, budget=True)


def rows_of(study) -> list[dict]:
    """Returns a row per trial: finished ones first, from the best on. ValueError if none has finished."""
    rows = [
        {
            "run": folder_of(trial),
            **trial.params,
            "val_loss": trial.value if trial.state.name == "COMPLETE" else None,  # a pruned trial has a value too
            "note": trial.user_attrs.get("why", ""),
        }
        for trial in tried(study)
    ]
    if all(row["val_loss"] is None for row in rows):
        raise ValueError(f"none of {len(rows)} runs finished. The last one: {rows[-1]['note']}")
    return sorted(rows, key=lambda row: (row["val_loss"] is None, row["val_loss"] or 0.0))


def show(config: SweepConfig, space: dict[str, Choice | Range], study, code: dict):
    """Prints the trials so far and plots the finished ones. ValueError if none has finished."""
    rows = rows_of(study)
    best = rows[0]["run"]
    for row in rows:
        unfair = unfair_to(config, best, row["run"]) if row["val_loss"] is not None else []
        row["note"] = "; ".join(filter(None, [row["note"], *origin_notes(config, code, row["run"]), *unfair]))
    print(json.dumps(rows, indent=2) if config.json else show_rows(rows, space, config.markdown), flush=True)
    picture.draw_or_warn(plot, rows, space, Path(config.out_dir, "sweep.png"))


def show_rows(rows: list[dict], space: dict[str, Choice | Range], markdown: bool) -> str:
    def cell(name: str, value) -> str:
        if value is None:
            return ""
        return f"{value:.4f}" if name == "val_loss" else f"{value:.4g}" if isinstance(value, float) else str(value)

    names = ["run", *space, "val_loss", "note"]
    return table(names, [[cell(name, row[name]) for name in names] for row in rows], [len(names) - 1], markdown)


def plot(rows: list[dict], space: dict[str, Choice | Range], out: Path):
    """Plots the loss of the finished runs over each flag of the space, and where the others were. Values of a choice stand in the order
    of the command line."""
    done, others = ([row for row in rows if (row["val_loss"] is not None) == finished] for finished in (True, False))
    best = min(done, key=lambda row: row["val_loss"])
    columns = min(len(space), 3)
    lines = -(-len(space) // columns)
    title = f"{len(rows)} runs, {len(others)} of them pruned or failed; the lowest loss is {best['val_loss']:.4f}"
    with picture.picture(out, picture.WIDTH, 1.2 + 2.8 * lines, title) as figure:
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes, (name, values) in zip(grid.flat, space.items(), strict=False):
            place = {value: i for i, value in enumerate(values.values)} if isinstance(values, Choice) else {}
            at = [[place.get(row[name], row[name]) for row in some] for some in (done, [best], others)]
            axes.scatter(at[0], [row["val_loss"] for row in done], color=picture.COLORS[0], label="finished")
            axes.plot(at[1], [best["val_loss"]], "*", color=picture.COLORS[1], markersize=14, label="lowest loss")
            if others:
                top = axes.get_xaxis_transform()  # y from 0 to 1
                how = dict(color=picture.GREY, transform=top, clip_on=False, label="pruned or failed: no loss")
                axes.plot(at[2], [1.05] * len(others), "x", **how)
            label_flag(axes, name, values)
        for unused in grid.flat[len(space) :]:
            unused.remove()
        for first in grid[:, 0]:
            first.set_ylabel("validation loss, nats per token")
        picture.legend_below(figure)


def label_flag(axes, name: str, values: Choice | Range):
    """Labels the horizontal axis with a flag and its values."""
    axes.set_xlabel(cli.flag(name))
    if isinstance(values, Choice):
        labels = [picture.label_of(value, 20) for value in values.values]
        tilt = dict(rotation=30, ha="right") if len("".join(labels)) > 30 else {}
        axes.set_xticks(range(len(labels)), labels, **tilt)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif values.log:
        axes.set_xscale("log")
        picture.log_axis(axes.xaxis, least=4)
    else:
        axes.xaxis.get_major_locator().set_params(integer=values.is_integer, nbins=6)
        picture.number_axis(axes.xaxis)


def main():
    with cli.one_line_errors(cli.AGAIN):
        config = cli.parse(SweepConfig)
        config.validate()
        space = parse_space(config.space)
        check(config, space)
        if config.export:
            export(config, space)
            print(f"wrote {config.export}: run wandb sweep {config.export}, then the wandb agent command that it prints")
            return
        import_optuna()
        if not space.keys() & {"preset", "data_dir"}:
            find_data(parse_flags(split(config.flags)))  # make missing shards now: two runs must not make them at once
        code = code_now()
        with lock_folder(Path(config.out_dir)):
            refuse_unless(config.mixed, origin_notes(config, code))
            points = all_points(space, config.trials)
            study = open_study(config, points)
            if points:  # points that earlier launches ran twice count once
                done = [trial.params for trial in tried(study)]
                config.trials = len(done) + sum(point not in done for point in points)
            try:
                sweep(config, space, study)
            except BaseException:
                if any(trial.state.name == "COMPLETE" for trial in tried(study)):
                    show(config, space, study, code)
                raise
            refuse_unless(config.mixed, origin_notes(config, code))  # someone may edit the code while the trials run
            show(config, space, study, code)


if __name__ == "__main__":
    main()
