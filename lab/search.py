"""Searches unattended: judges ideas one after the other, and keeps those that are better.

    python -m lab.search ideas.txt --flags="--preset quickstart" --larger="--n-embd 256 --n-head 4" --workers 2

ideas.txt has a line NAME=FLAGS for each idea. The flags of an idea that is better than the recipe so far join the recipe. At the end,
each step of the recipe is judged again, with seeds that the search has not seen, and in a larger model.
The same command continues a stopped search.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from common import cli
from common.validation import raise_errors
from lab.compare import FIRST_LOOK, CompareConfig, Comparison, compare, run_of
from lab.report import check_tools, interval, table
from lab.runs import folder_of

BASELINE = "baseline"


@dataclass
class SearchConfig:
    """Judge ideas one after the other, and keep those that are better."""

    ideas: Annotated[str, tyro.conf.Positional]
    """A text file with a line NAME=FLAGS for each idea. Empty lines and lines that begin with # don't count."""
    flags: str = ""
    """Flags of train.py for the baseline. Write --flags="…", with the equals sign."""
    larger: str = ""
    """Flags that make the model larger: what the search keeps is judged there too. "": it isn't."""
    seeds: int = 8
    """Most seeds for an idea: it gets three, then more, until it is decided."""
    fresh_seeds: int = 5
    """Seeds of the judgements at the end. The search has seen none of them."""
    out_dir: str = "log/search"
    """Gets the runs and results.tsv; fresh/ and larger/ in it get those of the end. Finished runs are kept."""
    workers: int = 1
    """Runs at a time."""
    max_minutes: float = 0.0
    """An idea with a run that takes longer by the clock has failed. 0: no limit."""
    json: bool = False
    """Print JSON at the end instead of tables."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(FIRST_LOOK, self, "seeds") + cli.at_least(2, self, "fresh_seeds")
        raise_errors(errors + cli.at_least(1, self, "workers") + cli.at_least(0, self, "max_minutes"))


class Step(NamedTuple):
    """The baseline, or the recipe after an idea joined it."""

    name: str
    flags: str


def read_ideas(path: str) -> list[Step]:
    """Returns the ideas of a file, in its order. ValueError names the wrong lines."""
    ideas, errors, taken = [], [], {folder_of("", BASELINE, 1)}
    for line in map(str.strip, Path(path).read_text(encoding="utf-8").splitlines()):
        if not line or line.startswith("#"):
            continue
        idea = Step(*map(str.strip, line.partition("=")[::2]))
        if not (idea.name and idea.flags):
            errors.append(f"{path}: {line!r} is not NAME=FLAGS")
        elif (folder := folder_of("", idea.name, 1)) in taken:
            errors.append(f"{path}: {idea.name!r} would share a folder with an earlier idea or the baseline: rename it")
        else:
            taken.add(folder)
            ideas.append(idea)
    raise_errors(errors or ([] if ideas else [f"{path} has no idea: write a line NAME=FLAGS for each"]))
    return ideas


class Search:
    """The recipe so far, and what became of each idea."""

    def __init__(self, config: SearchConfig, ideas: list[Step]):
        self.config, self.ideas = config, ideas
        self.recipe = [Step(BASELINE, "")]  # its last step is what the next idea must beat
        self.judged: list[dict] = []

    def settings(self, *steps: Step, **settings) -> CompareConfig:
        config = self.config
        common = {name: getattr(config, name) for name in ("flags", "seeds", "out_dir", "workers", "max_minutes")}
        return CompareConfig(tuple(f"{step.name}={step.flags}" for step in steps), **common | settings)

    def run(self):
        compare(self.settings(self.recipe[0]))  # fails here, not with an idea, if the baseline is wrong
        for idea in self.ideas:
            self.judged.append(row := self.judge(idea))
            cli.say(f"{idea.name}: {row['text']} {interval(row)}")

    def judge(self, idea: Step) -> dict:
        """Returns lab.compare's row for an idea on top of the recipe. If it is better, it joins the recipe."""
        best, trial = self.recipe[-1], Step(idea.name, f"{self.recipe[-1].flags} {idea.flags}".strip())
        settings = self.settings(best, trial, until_decided=True)
        if why := impossible(settings, trial.name):
            return {"variant": idea.name, "verdict": "failed", "text": f"failed: {why}"}
        row = compare(settings)["variants"][1]
        if row["verdict"] == "better":
            self.recipe.append(trial)
            compare(self.settings(trial))  # the seeds that it did without: the next idea needs them
        return row

    def confirm(self, where: str, flags: str) -> list[dict]:
        """Judges each step of the recipe against the one before, with fresh seeds."""
        settings = dict(
            flags=f"{self.config.flags} {flags}".strip(),
            seeds=self.config.fresh_seeds,
            first_seed=self.config.seeds + 1,
            out_dir=str(Path(self.config.out_dir, where)),
        )
        pairs = zip(self.recipe, self.recipe[1:], strict=False)
        return [compare(self.settings(before, after, **settings))["variants"][1] for before, after in pairs]


def impossible(settings: CompareConfig, name: str) -> str:
    """Says why train.py rejects an idea's flags; "" if it doesn't."""
    try:
        variant = Comparison(settings).variants[name]
        run_of(settings, name, variant.flags, 1).config()
    except (ValueError, SystemExit) as e:
        return str(e).removeprefix(f"{name}: ") if isinstance(e, ValueError) else "train.py rejects its flags"
    return ""


def text_of(found: dict) -> str:
    """Returns the results for people."""
    counted = [row for row in found["ideas"] if row["verdict"] != "failed"]
    parts = [table(["idea", "difference ± 95 %", "verdict"], [[r["variant"], interval(r), r["text"]] for r in found["ideas"]], [2])]
    for title, rows in (("with fresh seeds", found["fresh"]), ("in the larger model, with fresh seeds", found["larger"])):
        if rows:
            parts.append(table(["kept", "difference ± 95 %", title], [[r["variant"], interval(r), r["text"]] for r in rows], [2]))
    parts.append(
        f"kept {len(found['fresh'])} of {len(found['ideas'])} ideas; {found['held']} hold everywhere. "
        f"By luck alone, at most {0.025 * len(counted):.1f} of {len(counted)} would be kept.\nrecipe: {found['recipe']}"
    )
    return "\n\n".join(parts)


def main():
    with cli.one_line_errors(cli.AGAIN):
        config = cli.parse(SearchConfig)
        config.validate()
        check_tools()
        search = Search(config, read_ideas(config.ideas))
        search.run()
        found = {"ideas": search.judged, "recipe": f"{config.flags} {search.recipe[-1].flags}".strip()}
        found["fresh"] = search.confirm("fresh", "")
        found["larger"] = search.confirm("larger", config.larger) if config.larger else []
        tested = [found["fresh"], *([found["larger"]] if config.larger else [])]
        found["held"] = sum(all(row["verdict"] == "better" for row in rows) for rows in zip(*tested, strict=True))
        print(json.dumps(found, indent=2) if config.json else text_of(found), flush=True)


if __name__ == "__main__":
    main()
