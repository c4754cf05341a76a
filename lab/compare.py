"""Judges ideas: trains each variant with several seeds, in turns, and says which are better than the first.

    python -m lab.compare "plain=" "rope=--pos rope" --flags="--preset quickstart"
    python -m lab.compare log/baseline log/idea                  # runs that have finished, from one GPU or eight
    python -m lab.compare --suite modern --data-dir webdocs_bytes    # preset modern against gpt2, each with its own learning rates

lab/judge.py has the statistics, docs/experiments.md the loop for programs that search for ideas.
"""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from common import cli
from common.files import read_json, write_json
from common.picture import draw_or_warn
from common.validation import raise_errors
from lab.finished import common_seeds, variants_in
from lab.judge import Judgement, judge, tokens_to_the_same_loss
from lab.length import extrapolate, plot_curves, show_curves
from lab.measure import measure, speeds_in_turns
from lab.origins import LEAVE_OUT, Origin, code_change, forbidden, machine_notes, mixtures, origin_of, refuse_unless, short, unequal
from lab.report import check_tools, draw, record, show, summary
from lab.runs import Run, folder_of, run_all, split
from lab.suites import SMALL, SUITES
from train import find_data
from training.run_json import code_now, other_code

FIRST_LOOK = 3  # seeds; with two, only huge differences can be seen


@dataclass
class CompareConfig:
    """Train variants and judge them, or judge runs that have finished."""

    variants: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """NAME=FLAGS of train.py, each in quotes, or folders of finished runs. The others are compared with the first."""
    flags: str = ""
    """Flags of train.py for all variants. Write --flags="…", with the equals sign."""
    suite: Literal["none", "switches", "without", "modern", "rates", "experts", "teacher", "length"] = "none"
    """A ready-made comparison of small models. Two CPU cores train each in minutes."""
    data_dir: str = "webdocs_bytes"
    """Byte shards for a suite."""
    out_dir: str = "log/compare"
    """Gets a folder for each run, results.tsv and compare.png. Finished runs in it are kept, stopped runs resume."""
    seeds: int = 5
    """Runs of each variant. Five find a difference of 1.7 standard deviations of one seed's with probability 80 %."""
    first_seed: int = 1
    """The first of these seeds. Confirm an idea with seeds that no search has seen."""
    until_decided: bool = False
    """Train three seeds, then more, up to --seeds, until each variant is decided. Its stricter test allows for the repeated looks."""
    max_seconds: float = 0.0
    """Train each run for this long instead of a number of steps: adds train.py's flag to all variants. 0: equal steps."""
    max_minutes: float = 0.0
    """End a run that takes longer than this by the clock: its variant has failed, unless it is the first. 0: no limit."""
    may_change: tuple[str, ...] = ()
    """Refuse a variant whose code differs from the first's in other files than these, such as variants.py. Without it, all may differ."""
    workers: int = 1
    """Runs at a time. With several GPUs, each run gets one. More than 1 disturbs the logged speeds: measure them with --time-steps."""
    time_steps: int = 0
    """At the end, time this many steps of each variant, in turns, with all models in memory. 0: take the speeds from the logs."""
    mixed: bool = False
    """Also use runs of other code, other data or unequal budgets. The table names them. Without it, they are refused."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(1, self, "seeds", "workers") + cli.at_least(0, self, "time_steps", "first_seed", "max_seconds", "max_minutes")
        if (self.suite == "none") == (not self.variants):
            errors.append('give either variants, such as "plain=" "rope=--pos rope" --flags="--preset quickstart", or --suite')
        words = [word for word in self.variants if not Path(word).is_dir()]
        folders = [folder_of("", word.split("=")[0], 1) for word in words]
        errors += [f"{word!r} is neither NAME=FLAGS nor a folder" for word in words if "=" not in word or not word.split("=")[0]]
        if len(set(folders)) < len(folders):
            errors.append(f"two variants would share a folder, rename one: {', '.join(str(folder.parent) for folder in folders)}")
        if self.suite == "teacher" and self.workers > 1:
            errors.append("the teacher must finish before its students start: leave out --workers")
        raise_errors(errors)


class Variant(NamedTuple):
    """A variant that is trained by its flags, or whose runs are finished."""

    name: str
    flags: list[str] | None  # of train.py; None: the runs are given
    given: dict[int, Path]  # seed → folder


def variants_of(config: CompareConfig) -> list[Variant]:
    """Returns the variants in the order of the command line. Flags may contain {out_dir} and {seed}."""
    common, words = config.flags, config.variants
    if config.suite != "none":
        common = f"{SMALL} --data-dir {shlex.quote(config.data_dir)} {common}"
        words = [f"{name}={flags}" for name, flags in SUITES[config.suite].items()]
    if config.max_seconds:
        common += f" --max-seconds {config.max_seconds:g}"
    finished, found = variants_in([word for word in words if Path(word).is_dir()]), {}
    for word in words:
        if Path(word).is_dir():
            found |= {name: Variant(name, None, given) for name, given in finished.items() if is_of(Path(word), given)}
        else:
            name, flags = word.split("=", 1)
            raise_errors([f"{name} is also the name of a folder's variant: rename it"] if name in finished else [])
            found[name] = Variant(name, split(f"{common} {flags}"), {})  # a variant's own flags come last and win
    reserved = ("--seed", "--out-dir", "--out_dir")
    wrong = [v.name for v in found.values() if any(word.split("=")[0] in reserved for word in v.flags or [])]
    raise_errors([f"{name}: lab.compare sets --seed and --out-dir for each run: leave them out" for name in wrong])
    return [*found.values()]


def is_of(folder: Path, given: dict[int, Path]) -> bool:
    return folder in given.values() or folder in {path.parent for path in given.values()}


def run_of(config: CompareConfig, name: str, flags: list[str], seed: int) -> Run:
    flags = [word.replace("{out_dir}", config.out_dir).replace("{seed}", str(seed)) for word in flags]
    return Run(name, [*flags, "--seed", str(seed)], folder_of(config.out_dir, name, seed))


# ---- train and judge ----


class Comparison:
    """The variants, their runs so far, and the verdicts."""

    def __init__(self, config: CompareConfig):
        self.config, self.variants = config, {variant.name: variant for variant in variants_of(config)}
        self.first = next(iter(self.variants.values()))
        given = {name: variant.given for name, variant in self.variants.items() if variant.flags is None}
        first, n = config.first_seed, config.seeds
        both = 0 < len(given) < len(self.variants)
        self.seeds = common_seeds(given)[:n] if both else [*range(first, first + n)]  # of the variants that are trained
        self.looks = tuple(range(min(FIRST_LOOK, n), n + 1)) if config.until_decided else (len(self.seeds),)
        self.folders: dict[str, dict[int, Path]] = {name: given.get(name, {}) for name in self.variants}  # of the runs so far
        self.failures: dict[str, str] = {}
        self.measured: dict[Path, dict] = {}
        self.origins: dict[str, Origin] = {}

    def trained(self) -> list[Variant]:
        return [variant for variant in self.variants.values() if variant.flags is not None]

    def others(self) -> list[str]:
        return [name for name in self.variants if name != self.first.name]

    def check(self) -> list[str]:
        """Checks everything before a run starts. Returns notes about what differs. ValueError if it must not be compared."""
        code = code_now()
        for variant in self.variants.values():
            if variant.flags is None:
                refuse_unless(self.config.mixed, mixtures(variant.name, [*variant.given.values()]), LEAVE_OUT)
                self.origins[variant.name] = origin_of(next(iter(variant.given.values())))
            else:
                train = run_of(self.config, variant.name, variant.flags, self.seeds[0]).config()
                self.origins[variant.name] = Origin(train, find_data(train).contents(), code)  # makes missing shards now, not twice
        theirs, some_given, notes = self.origins[self.first.name], len(self.trained()) < len(self.variants), []
        for name in self.others():
            ours = self.origins[name]
            raise_errors(forbidden(name, ours, theirs, self.config.may_change))
            unfair = unequal(name, ours, self.first.name, theirs, budget=some_given)
            notes += refuse_unless(self.config.mixed or not some_given, unfair, LEAVE_OUT)
            notes += code_change(name, ours, self.first.name, theirs)
        return notes

    def run(self) -> list[str]:
        """Trains the seeds of all variants; with --until-decided, more seeds until all are decided. Returns notes."""
        notes, active = [], self.trained()
        for n in self.looks:
            for variant in active:  # the folders of seeds that exist by now
                self.folders[variant.name] = {seed: folder_of(self.config.out_dir, variant.name, seed) for seed in self.seeds[:n]}
            jobs = [v for v in self.trained() if v.name not in self.failures]
            notes = self.train(jobs)
            if wrong := [seed for seed, one in self.results()[self.first.name].items() if not math.isfinite(one["val_loss"])]:
                raise ValueError(f"{self.first.name}'s loss is not finite with seed {wrong[0]}: compare with another variant")
            undecided = [name for name in self.others() if not self.judgement(name).decided and name not in self.failures]
            active = [v for v in self.trained() if v.name in undecided or v is self.first]
            if not undecided:
                break
        return notes

    def train(self, variants: list[Variant]) -> list[str]:
        """Trains what is missing: every variant with the first seed, then with the second, …: a machine whose speed drifts treats them
        alike."""
        config = self.config
        runs = [run_of(config, v.name, v.flags, s) for s in self.seeds for v in variants if s in self.folders[v.name]]
        notes = run_all(runs, config.workers, config.mixed, self.failures, self.first.name, config.max_minutes) if runs else []
        for name in self.failures:
            self.folders[name] = {}
        return notes

    def results(self) -> dict[str, dict[int, dict]]:
        """Returns name → seed → the numbers of that run."""
        for folder in (folder for runs in self.folders.values() for folder in runs.values()):
            if folder not in self.measured:
                self.measured[folder] = measure(folder)
        return {name: {seed: self.measured[folder] for seed, folder in runs.items()} for name, runs in self.folders.items()}

    def judgement(self, name: str) -> Judgement:
        """Judges a variant by the seeds that it shares with the first."""
        if name in self.failures:
            return Judgement("failed", reason=self.failures[name])
        results = self.results()
        ours, theirs = results[name], results[self.first.name]
        differences = [one["val_loss"] - theirs[seed]["val_loss"] for seed, one in ours.items() if seed in theirs]
        return judge(differences, self.looks if self.config.until_decided else (len(differences) or 1,))

    def rows(self, results: dict[str, dict[int, dict]]) -> list[dict]:
        """Returns the table's rows: numbers, verdict, commit, and which code differs from the first's."""
        rows = summary(results, {name: self.judgement(name) for name in self.others()})
        for row in rows:
            launch = self.origins[row["variant"]].launch
            row |= {"commit": short(launch), "changed": other_code(launch, self.origins[self.first.name].launch)}
        return rows


def remember_looks(path: Path, pairs: list[str], seeds: int, until_decided: bool) -> list[str]:
    """Records in judge.json how these pairs are judged, before anyone looks. Returns notes about pairs that were judged with fewer seeds.
    ValueError if --until-decided had another limit."""
    record, notes = read_json(path, "delete it, and train all runs again in another --out-dir") if path.exists() else {}, []
    for pair in pairs:
        before = record.get(pair, {})
        limit, most = before.get("limit"), before.get("seeds")
        if until_decided and limit not in (None, seeds):
            raise ValueError(
                f"{pair} was judged with --until-decided --seeds {limit}, and that limit can't change afterwards: pass --seeds {limit}, "
                "or train all runs again in another --out-dir"
            )
        if (most and (until_decided or most < seeds)) or (limit and not until_decided):
            earlier = f"--seeds {most}" if most else f"--until-decided --seeds {limit}"
            notes.append(
                f"{pair} was judged with {earlier} before, and looking again adds false verdicts: "
                "begin with --until-decided, in another --out-dir"
            )
        record[pair] = before | ({"limit": seeds} if until_decided else {"seeds": max(seeds, most or 0)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return notes


def finish(comparison: Comparison, notes: list[str]) -> dict:
    """Measures, records and draws. Returns the results."""
    config, results = comparison.config, comparison.results()
    out_dir = Path(config.out_dir)
    if config.time_steps:
        timed = [runs for runs in results.values() if runs]
        speeds = speeds_in_turns([next(iter(runs.values())) for runs in comparison.folders.values() if runs], config.time_steps)
        for runs, speed in zip(timed, speeds, strict=True):
            runs |= {seed: one | {"tokens_per_second": speed} for seed, one in runs.items()}
    found = {"variants": comparison.rows(results), "looks": comparison.looks, "notes": notes}
    record(found["variants"], out_dir / "results.tsv")
    draw_or_warn(draw, results, comparison.looks, out_dir / "compare.png")
    common = sorted(set.intersection(*map(set, results.values())))
    if config.suite == "modern":
        found["to_the_same_loss"] = tokens_to_the_same_loss({name: [runs[seed] for seed in common] for name, runs in results.items()})
    if config.suite == "length":
        found["by_position"] = extrapolate(config.out_dir, config.data_dir, common)
        draw_or_warn(plot_curves, found["by_position"], len(found["by_position"][0]["loss"]) // 4, out_dir / "length.png")
    return found


def text_of(found: dict) -> str:
    """Returns the results for people. The last lines are the verdicts, one for each variant, for scripts."""
    parts = [show(found["variants"], found["looks"]), "\n".join(found["notes"])]
    parts += [found["to_the_same_loss"]] if "to_the_same_loss" in found else []
    parts += [show_curves(found["by_position"])] if "by_position" in found else []
    parts += ["\n".join(f"verdict {row['variant']}: {row['verdict']}" for row in found["variants"] if "verdict" in row)]
    return "\n\n".join(filter(None, parts))


def compare(config: CompareConfig) -> dict:
    """Trains and judges. Returns what --json prints."""
    comparison = Comparison(config)
    notes = comparison.check()
    pairs = [f"{name} against {comparison.first.name}" for name in comparison.others()]
    notes += remember_looks(Path(config.out_dir, "judge.json"), pairs, config.seeds, config.until_decided)
    notes += comparison.run()
    notes += machine_notes([folder for runs in comparison.folders.values() for folder in runs.values()])
    return finish(comparison, notes)


def main():
    with cli.one_line_errors(cli.AGAIN):
        config = cli.parse(CompareConfig)
        config.validate()
        check_tools()
        found = compare(config)
        print(json.dumps(found, indent=2) if config.json else text_of(found), flush=True)


if __name__ == "__main__":
    main()
