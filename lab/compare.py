"""Judges ideas: trains each variant with several seeds, in turns, and says which are better than the first.

    python -m lab.compare "plain=" "rope=--pos rope" --flags="--preset quickstart"
    python -m lab.compare log/baseline log/idea                  # runs that have finished, from one GPU or eight
    python -m lab.compare --suite modern --data-dir webdocs_bytes    # preset modern against gpt2, each with its own learning rates

lab/judge.py has the statistics, docs/experiments.md the loop for programs that search for ideas.
"""

import json
import math
import re
import shlex
import statistics
from dataclasses import dataclass
from os.path import isdir
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from common import cli
from common.files import read_json, write_json
from common.locks import lock_folder
from common.picture import draw_or_warn
from common.validation import raise_errors
from lab.finished import common_seeds, variants_in
from lab.judge import Judgement, judge, looks_until
from lab.length import extrapolate, plot_curves, show_curves
from lab.measure import measure, speeds_in_turns
from lab.origins import (
    LEAVE_OUT,
    MAKE_EQUAL,
    Origin,
    code_change,
    commit_of,
    forbidden,
    last_of,
    machine_notes,
    mixtures,
    origin_of,
    refuse_unless,
    unequal,
    weights_now,
)  # fmt: skip
from lab.report import check_tools, draw, record, show, summary
from lab.runs import FAILED, IdeaFailed, Run, Trial, earlier_failure, folder_of, run_all, share_hardware, split
from lab.sooner import tokens_to_the_same_loss
from lab.suites import SMALL, SUITES
from train import find_data
from training.flags import parse_flags
from training.run_json import code_now, other_code

LOOKS, RESULTS, PICTURE = "judge.json", "results.tsv", "compare.png"  # in --out-dir


@dataclass
class CompareConfig:
    """Train variants and judge them, or judge runs that have finished."""

    variants: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """NAME=FLAGS of train.py, each in quotes, or folders of finished runs. The others are compared with the first."""
    flags: str = ""
    """Flags of train.py for all variants. Write --flags="…", with the equals sign."""
    suite: Literal["none", "switches", "without", "modern", "tables", "rates", "experts", "teacher", "little-data", "length"] = "none"
    """A ready-made comparison of small models. Two CPU cores train each in minutes; little-data takes nine hours per seed on one core."""
    data_dir: str = "webdocs_bytes"
    """Byte shards for a suite."""
    out_dir: str = "log/compare"
    """Gets a folder for each run, results.tsv and compare.png. Finished runs in it are kept, stopped runs resume."""
    seeds: int = 5
    """Runs of each variant; with --until-decided, at most. In 80 % of cases, five find a true difference of 1.7 times the standard
    deviation of the differences."""
    first_seed: int = 1
    """Seeds start here. Confirm an idea with seeds that no search has seen. If a folder is given, its seeds count instead."""
    until_decided: bool = False
    """Train three seeds, then more, up to --seeds, until each variant is decided. Its stricter test allows for the repeated looks."""
    complete_better: bool = False
    """With --until-decided: then train the other seeds of each better variant, too. The next idea can be compared with it."""
    max_seconds: float = 0.0
    """Train each run for this long instead of a number of steps: adds train.py's flag to all variants. 0: equal steps."""
    max_minutes: float = 0.0
    """End a run that takes longer than this by the clock. Its variant has failed; if it is the first, the command stops. 0: no limit."""
    may_change: tuple[str, ...] = ()
    """Refuse a variant whose code differs from the first's in other files than these, such as variants.py. Without it, all may differ."""
    workers: int = 1
    """Runs at a time. Pass the number of GPUs: each run gets one. More than 1 disturbs the logged speeds: use --time-steps for them."""
    time_steps: int = 0
    """At the end, time this many steps of each variant, in turns, with all models in memory. 0: take the speeds from the logs."""
    mixed: bool = False
    """Also use runs of other code, and compare variants with other data, another validation or unequal tokens. The output names them.
    Without it, they are refused."""
    markdown: bool = False
    """Print tables as Markdown."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(1, self, "seeds", "workers") + cli.at_least(0, self, "time_steps", "first_seed", "max_seconds", "max_minutes")
        if (self.suite == "none") == (not self.variants):
            errors.append('give either variants, such as "plain=" "rope=--pos rope" --flags="--preset quickstart", or --suite')
        words = [word for word in self.variants if not isdir(word)]
        folders = [folder_of("", word.split("=")[0], 1) for word in words]
        errors += [f"{word!r} is neither NAME=FLAGS nor a folder" for word in words if "=" not in word or not word.split("=")[0]]
        if len(set(folders)) < len(folders):
            errors.append(f"two variants would share a folder, rename one: {', '.join(str(folder.parent) for folder in folders)}")
        if self.until_decided and self.variants and not words:
            errors.append("all of these runs have finished, so --until-decided has nothing to train: leave it out")
        flags = [self.flags, *words, *SUITES.get(self.suite, {}).values()]
        if (self.workers > 1 or self.until_decided) and any(re.search(r"--(teacher|init[-_]from)[ =]\S*{out_dir}", each) for each in flags):
            errors.append("a run learns from another one in {out_dir}, which must have finished: leave out --workers and --until-decided")
        raise_errors(errors)


class Variant(NamedTuple):
    """A variant that is trained by its flags, or whose runs are finished."""

    name: str
    flags: list[str] | None  # of train.py; None: the runs are given
    given: dict[int, Path]  # seed → folder


def variants_of(config: CompareConfig) -> list[Variant]:
    """Returns the variants in the order of the command line. Flags may contain {out_dir} and {seed}. IdeaFailed if some are wrong."""
    if has_reserved(split(config.flags)):
        raise ValueError(f"--flags: {RESERVED}")
    common, words = config.flags, config.variants
    if config.suite != "none":
        common = f"{SMALL} --data-dir {shlex.quote(config.data_dir)} {common}"
        words = [f"{name}={flags}" for name, flags in SUITES[config.suite].items()]
    if config.max_seconds:
        common += f" --max-seconds {config.max_seconds:g}"
    names, given = variants_in([word for word in words if isdir(word)])
    found = {}
    for word in words:
        if word in names:
            found[names[word]] = Variant(names[word], None, given[names[word]])
        else:
            name, flags = word.split("=", 1)
            if name in given:
                raise ValueError(f"{name} is also the name of a folder's variant: rename it")
            try:
                found[name] = Variant(name, split(f"{common} {flags}"), {})  # a variant's own flags come last and win
            except ValueError as e:
                raise IdeaFailed(name, str(e)) from e
    for variant in found.values():
        if has_reserved(variant.flags or []):
            raise IdeaFailed(variant.name, RESERVED)
        if folder_of("", variant.name, 1).parent.name in (LOOKS, RESULTS, PICTURE):
            raise ValueError(f"{variant.name} is a file of lab.compare: rename the variant")
    return [*found.values()]


def raise_if_wrong(flags: str):
    """ValueError if the common flags are wrong by themselves: no idea is to blame."""
    try:
        parse_flags(split(flags)).validate(1)
    except (SystemExit, ValueError) as e:
        raise ValueError(f"train.py rejects --flags={shlex.quote(flags)}, correct them") from e


RESERVED = "lab.compare sets --seed and --out-dir for each run: leave them out"


def has_reserved(flags: list[str]) -> bool:
    return any(word.split("=")[0] in ("--seed", "--out-dir", "--out_dir") for word in flags)


def run_of(config: CompareConfig, name: str, flags: list[str], seed: int) -> Run:
    flags = [word.replace("{out_dir}", config.out_dir).replace("{seed}", str(seed)) for word in flags]
    return Run(name, [*flags, "--seed", str(seed)], folder_of(config.out_dir, name, seed))


# ---- train and judge ----


class Comparison:
    """The variants, their runs so far, and the verdicts. ValueError before a run starts if they can't be compared."""

    def __init__(self, config: CompareConfig):
        self.config, self.variants = config, {variant.name: variant for variant in variants_of(config)}
        self.first = next(iter(self.variants.values()))
        given = {name: variant.given for name, variant in self.variants.items() if variant.flags is None}
        self.seeds = self.seeds_to_train(given)
        self.looks = looks_until(config.seeds) if config.until_decided else ()  # (): one, when all seeds are trained
        if self.looks and len(self.seeds) < self.looks[0]:
            few = f"--until-decided looks first after {self.looks[0]} seeds, and the given runs have {len(self.seeds)} in common"
            raise ValueError(f"{few}: train more, or leave it out")
        self.folders: dict[str, dict[int, Path]] = {name: given.get(name, {}) for name in self.variants}  # of the runs so far
        self.failures: dict[str, str] = {}
        self.measured: dict[Path, dict] = {}
        self.origins: dict[str, Origin] = {}
        self.notes = self.prepare()

    def seeds_to_train(self, given: dict[str, dict[int, Path]]) -> list[int]:
        """Returns the seeds of the variants that are trained: those of the given runs, if there are some. ValueError if a given variant
        has no seed of the first."""
        config = self.config
        for name in given if self.first.name in given else ():
            common_seeds({self.first.name: self.first.given, name: given[name]})
        if given and self.trained():
            return common_seeds(given)[: config.seeds]
        return [*range(config.first_seed, config.first_seed + config.seeds)]

    def looked_at(self, name: str) -> list[int]:
        """Returns the seeds that a verdict about this variant is based on, if none is decided earlier."""
        variants = self.variants[name], self.first
        seeds = [variant.given.keys() if variant.flags is None else self.seeds for variant in variants]
        return sorted(set(seeds[0]) & set(seeds[1]))

    def trained(self) -> list[Variant]:
        return [variant for variant in self.variants.values() if variant.flags is not None]

    def others(self) -> list[str]:
        return [name for name in self.variants if name != self.first.name]

    def prepare(self) -> list[str]:
        """Checks the variants, and makes missing shards. Returns notes about what differs. ValueError if it must not be compared;
        IdeaFailed if a variant's flags are at fault."""
        config, code, notes = self.config, code_now(), []
        for variant in self.variants.values():
            notes += refuse_unless(config.mixed, mixtures(variant.name, [*variant.given.values()]), LEAVE_OUT)
            self.origins[variant.name] = self.origin(variant, code)
        theirs = self.origins[self.first.name]
        for name in self.others():
            ours = self.origins[name]
            if wrong := forbidden(ours, theirs, config.may_change):
                raise IdeaFailed(name, wrong, f"{name} {wrong}")
            unfair = unequal(name, ours, self.first.name, theirs, budget=config.suite == "none")  # some suites compare lengths
            if unfair and not config.mixed:
                raise IdeaFailed(name, cli.some(unfair, 3), f"{cli.some(unfair, 3)}: {MAKE_EQUAL}")
            notes += unfair + code_change(name, ours, self.first.name, theirs)
        if self.trained() and theirs.config.max_seconds and share_hardware(config.workers):
            notes.append("the runs slow each other, so --max-seconds is no fair limit: leave out --workers, or pass the number of GPUs")
        return notes + self.recall_failures(code)

    def origin(self, variant: Variant, code: dict) -> Origin:
        if variant.flags is None:
            return origin_of(next(iter(variant.given.values())))
        try:
            train = run_of(self.config, variant.name, variant.flags, self.seeds[0]).config()
        except IdeaFailed:
            if self.first.flags is None:
                raise_if_wrong(self.config.flags)
            raise
        try:
            data = find_data(train).contents()  # makes missing shards now, not twice
            return Origin(train, data, code, {}, weights_now(train, self.origins))
        except cli.TryAgain:
            raise
        except ValueError as e:
            if variant is self.first or train.data_dir == self.origins[self.first.name].config.data_dir:  # no idea is to blame
                raise
            raise IdeaFailed(variant.name, str(e)) from e

    def recall_failures(self, code: dict) -> list[str]:
        """Doesn't try again what an earlier command found to fail. Returns notes about that. ValueError if it is the first."""
        notes = []
        for variant in self.trained():
            runs = [run_of(self.config, variant.name, variant.flags, seed) for seed in self.seeds]
            if reason := earlier_failure(runs, code):
                self.failures[variant.name] = reason
                notes.append(f"{variant.name} failed before ({reason}): delete {runs[0].folder.parent / FAILED} to try it again")
                if variant is self.first:
                    raise IdeaFailed(variant.name, reason, notes[-1])
        return notes

    def run(self) -> list[str]:
        """Trains the seeds of all variants; with --until-decided, more seeds until all are decided. Returns notes about all runs."""
        active = self.trained()
        for n in self.looks or (len(self.seeds),):
            notes = self.train(active, self.seeds[:n])
            undecided = [name for name in self.others() if not self.judgement(name).decided]
            active = [v for v in self.trained() if v.name in undecided or v is self.first]
            if not undecided:
                break
        if self.config.complete_better:
            better = [v for v in self.trained() if v.name in self.others() and self.judgement(v.name).verdict == "better"]
            notes = self.train(better, self.seeds)
        return notes

    def train(self, variants: list[Variant], seeds: list[int]) -> list[str]:
        """Trains these variants with these seeds, unless they have been: every variant with the first seed, then with the second, …: a
        machine whose speed drifts treats them alike. Returns notes about all runs so far."""
        config, first = self.config, self.first.name
        for variant in variants:
            self.folders[variant.name] = {seed: folder_of(config.out_dir, variant.name, seed) for seed in seeds}
        jobs = [v for v in self.trained() if v.name not in self.failures]
        runs = [run_of(config, v.name, v.flags, s) for s in self.seeds for v in jobs if s in self.folders[v.name]]
        trial = Trial(self.failures, first, next(iter(self.folders[first].values()), None), config.max_minutes)
        notes = run_all(runs, config.workers, config.mixed, trial) if runs else []
        for name in self.failures:
            self.folders[name] = {}
        if reason := no_result(self.results()[first]):
            why = f"{first} is no measure for others ({reason}): compare with another variant"
            raise ValueError(why) if self.first.flags is None else IdeaFailed(first, reason, why)
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
        if reason := no_result(ours):
            return Judgement("failed", reason=reason)
        differences = [one["val_loss"] - theirs[seed]["val_loss"] for seed, one in ours.items() if seed in theirs]
        if differences and all(self.origins[each].ignores_seed for each in (name, self.first.name)):
            differences = [statistics.fmean(differences)] * len(differences)  # what differs is rounding
        return judge(differences, self.looks)


def no_result(runs: dict[int, dict]) -> str:
    """Returns why a variant's losses mean nothing: one is not finite, or its model is no language model. "" if they are fine."""
    for seed, one in runs.items():
        why = one["not_a_language_model"] if math.isfinite(one["val_loss"]) else "the loss is not finite"
        if why:
            return f"seed {seed}: {why}"
    return ""


def unused_seconds(comparison: Comparison) -> list[str]:
    """Names the variants that --max-steps ended before --max-seconds did."""
    notes = []
    for name, runs in comparison.results().items():
        wanted, used = comparison.origins[name].config.max_seconds, min((one["seconds"] for one in runs.values()), default=math.inf)
        if used < 0.9 * wanted:
            notes.append(f"{name} trained for {used:.0f} of {wanted:g} seconds, until --max-steps: raise that, or the times are unequal")
    return notes


def remember_looks(path: Path, pairs: dict[str, list[int]], limit: int) -> list[str]:
    """Records in judge.json how these pairs are judged, before anyone looks. Returns notes about pairs that were judged with other seeds.
    ValueError if --until-decided had another limit.

    pairs: its name → its seeds, at most these with a limit. limit: --seeds, if --until-decided looks several times, else 0."""
    kept, notes = read_json(path, "delete it, and train all runs again in another --out-dir") if path.exists() else {}, []
    for pair, seeds in pairs.items():
        before = kept.get(pair, {})
        began, looks, until = before.get("limit"), before.get("looks", []), before.get("until", [])
        if limit and began not in (None, limit):
            raise ValueError(
                f"{pair} began with --until-decided --seeds {began}, and that limit can't change afterwards: pass --seeds {began}, "
                "or train all runs again in another --out-dir"
            )
        earlier = [of_seeds(look) for look in looks if limit or look != seeds]
        earlier += [f"--until-decided and {of_seeds(look)}" for look in until if not limit or look[: len(seeds)] != seeds[: len(look)]]
        if (old := before.get("judged")) and (limit or old != len(seeds)):  # of an older version
            earlier.append(f"{old} seeds")
        if earlier:
            notes.append(
                f"{pair} was judged with {'; '.join(earlier[:3])} before, and looking again adds false verdicts: "
                "confirm with fresh seeds, or begin with --until-decided in another --out-dir"
            )
        name, before_that = ("until", until) if limit else ("looks", looks)
        kept[pair] = before | ({"limit": limit} if limit else {}) | {name: before_that + [seeds] * (seeds not in before_that)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept)
    return notes


def of_seeds(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {cli.some(seeds, 8)}"


def rows_of(comparison: Comparison, results: dict[str, dict[int, dict]]) -> list[dict]:
    """Returns the table's rows: numbers, verdict, commit, and which code differs from the first's."""
    rows, origins = summary(results, {name: comparison.judgement(name) for name in comparison.others()}), comparison.origins
    folders = {name: next(iter(runs.values()), None) for name, runs in comparison.folders.items()}
    launches = {name: last_of(folder) if folder else origins[name].launch for name, folder in folders.items()}
    for row in rows:
        launch = launches[row["variant"]]
        row |= {"commit": commit_of(launch), "changed": other_code(launch, launches[comparison.first.name])}
    return rows


def report_results(comparison: Comparison, notes: list[str]) -> dict:
    """Measures, records and draws. Returns the results."""
    config, results = comparison.config, comparison.results()
    out_dir = Path(config.out_dir)
    if config.time_steps:
        timed = [runs for runs in results.values() if runs]
        speeds = speeds_in_turns([next(iter(runs.values())) for runs in comparison.folders.values() if runs], config.time_steps)
        for runs, speed in zip(timed, speeds, strict=True):
            runs |= {seed: one | {"tokens_per_second": speed} for seed, one in runs.items()}
    rows = rows_of(comparison, results)
    looks = comparison.looks or (max(len(row.get("differences", ())) for row in rows),)
    record(rows, out_dir / RESULTS, comparison.first.name)
    counted = {row["variant"]: row.get("paired_seeds", row["seeds"]) for row in rows}
    drawn = {name: {seed: results[name][seed] for seed in seeds} for name, seeds in counted.items()}
    draw_or_warn(draw, drawn, looks, out_dir / PICTURE)
    more = AFTER[config.suite](config, results) if config.suite in AFTER else {}
    return {"variants": rows, "looks": looks, "notes": notes, **more}


# ---- what some suites ask ----


def how_much_sooner(config: CompareConfig, results: dict[str, dict[int, dict]]) -> dict:
    return {"to_the_same_loss": tokens_to_the_same_loss(results)}


def longer_sequences(config: CompareConfig, results: dict[str, dict[int, dict]]) -> dict:
    seeds = sorted(set.intersection(*map(set, results.values())))
    if not seeds:
        return {}
    curves = extrapolate(config.out_dir, config.data_dir, seeds)
    draw_or_warn(plot_curves, curves, len(curves[0]["loss"]) // 4, Path(config.out_dir, "length.png"))
    return {"by_position": curves}


AFTER = {"modern": how_much_sooner, "tables": how_much_sooner, "length": longer_sequences}  # suite → what else its results say


def text_of(found: dict, markdown: bool = False) -> str:
    """Returns the results for people. The last lines are the verdicts, one for each variant, for scripts."""
    parts = [show(found["variants"], found["looks"], markdown), "\n".join(found["notes"])]
    parts += [found["to_the_same_loss"]] if "to_the_same_loss" in found else []
    parts += [show_curves(found["by_position"], markdown)] if "by_position" in found else []
    parts += ["\n".join(f"verdict {' '.join(row['variant'].split())}: {row['verdict']}" for row in found["variants"] if "verdict" in row)]
    return "\n\n".join(filter(None, parts))


def compare(comparison: Comparison) -> dict:
    """Trains and judges. Returns what --json prints."""
    config, first, looks = comparison.config, comparison.first.name, comparison.looks
    seeds = {name: comparison.seeds[: looks[-1]] if looks else comparison.looked_at(name) for name in comparison.others()}
    pairs = {f"{name} against {first}": found for name, found in seeds.items()}
    with lock_folder(Path(config.out_dir), wait=True):  # other commands may judge other ideas there
        notes = comparison.notes + remember_looks(Path(config.out_dir, LOOKS), pairs, looks[-1] if looks else 0)
    notes += comparison.run() + unused_seconds(comparison)
    notes += machine_notes([folder for runs in comparison.folders.values() for folder in runs.values()])
    return report_results(comparison, notes)


def first_name(config: CompareConfig) -> str:
    """Returns the name of the first variant if it is to be trained, else ""."""
    words = [*SUITES[config.suite]] if config.suite != "none" else config.variants
    return "" if isdir(words[0]) else words[0].split("=")[0]


def main():
    with cli.one_line_errors(cli.AGAIN):
        config = cli.parse(CompareConfig)
        config.validate()
        check_tools()
        try:
            found = compare(Comparison(config))
        except IdeaFailed as e:
            if e.name != first_name(config):
                e.status = 3  # a program that tries ideas may continue with the next one
            raise
        print(json.dumps(found, indent=2) if config.json else text_of(found, config.markdown), flush=True)


if __name__ == "__main__":
    main()
