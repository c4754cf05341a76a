"""Searches unattended: judges ideas one after the other, and keeps those that are better.

    python -m lab.search ideas.txt --flags="--preset quickstart" --larger="--n-embd 256 --n-head 4" --workers 2

ideas.txt has a line NAME=FLAGS for each idea. The flags of an idea that is better than the recipe so far join the recipe. At the end,
each step of the recipe is judged again, with seeds that the search has not seen, and in a larger model.
The same command continues a stopped search.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from common import cli
from common.tables import table
from common.validation import raise_errors
from lab.compare import CompareConfig, Comparison, compare
from lab.judge import FIRST_LOOK, LEVEL
from lab.report import check_tools, interval, record
from lab.runs import IdeaFailed, OtherFlags, folder_of

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
    """Runs at a time. Pass the number of GPUs: each run gets one."""
    max_minutes: float = 0.0
    """An idea with a run that takes longer by the clock has failed. If it is the baseline, the search stops. 0: no limit."""
    markdown: bool = False
    """Print tables as Markdown."""
    json: bool = False
    """Print JSON at the end instead of tables."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(FIRST_LOOK, self, "seeds") + cli.at_least(2, self, "fresh_seeds")
        raise_errors(errors + cli.at_least(1, self, "workers") + cli.at_least(0, self, "max_minutes"))


class Recipe(NamedTuple):
    """The flags of the baseline and of the ideas kept so far. Has the name of the latest."""

    name: str
    flags: str


def read_ideas(path: str) -> dict[str, str]:
    """Returns name → flags, in the file's order. ValueError names the wrong lines."""
    ideas, errors, taken = {}, [], {folder_of("", BASELINE, 1)}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows editors begin a file with a mark
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 ({e}): save it as UTF-8") from e
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        name, flags = map(str.strip, line.partition("=")[::2])
        if not (name and flags):
            errors.append(f"{path}: {line!r} is not NAME=FLAGS")
        elif (folder := folder_of("", name, 1)) in taken:
            errors.append(f"{path}: {name!r} would share a folder with an earlier idea or the baseline: rename it")
        else:
            taken.add(folder)
            ideas[name] = flags
    raise_errors(errors or ([] if ideas else [f"{path} has no idea: write a line NAME=FLAGS for each"]))
    return ideas


class Search:
    """The recipes so far: the baseline, then one for each idea that was kept. The next idea must beat the last one."""

    def __init__(self, config: SearchConfig):
        self.config, self.recipes = config, [Recipe(BASELINE, "")]
        self.notes: list[str] = []  # of all comparisons

    def try_ideas(self, ideas: dict[str, str]) -> list[dict]:
        """Judges each idea on top of the last recipe, and keeps it if it is better. Returns a row for each idea."""
        if self.config.larger:
            Comparison(self.settings(self.recipes[0], **self.at_the_end("larger")))  # wrong flags end the search now, not after a night
        compare(Comparison(self.settings(self.recipes[0])))
        rows = []
        for name, flags in ideas.items():
            recipe = Recipe(name, f"{self.recipes[-1].flags} {flags}".strip())
            row = self.judge(self.recipes[-1], recipe, until_decided=True, complete_better=True)
            cli.say(f"{name}: {row['text']} {interval(row)}")
            if row["verdict"] == "better":
                self.recipes.append(recipe)
            rows.append(row)
        return rows

    def confirm(self, where: str) -> list[dict]:
        """Judges each recipe against the one before, with fresh seeds. where: fresh, or larger for the larger model."""
        return [self.judge(before, after, **self.at_the_end(where)) for before, after in pairwise(self.recipes)]

    def judge(self, before: Recipe, after: Recipe, **how) -> dict:
        """Returns lab.compare's row for the second recipe: a failed one if it can't be compared, or if a run fails."""
        config = self.settings(before, after, **how)
        try:
            found = compare(Comparison(config))
        except IdeaFailed as e:
            reason = e.reason if e.name == after.name else f"{e.name} failed here: {e.reason}"
            row = {"variant": after.name, "seeds": [], "verdict": "failed", "text": f"failed: {reason}"}
            record([row], Path(config.out_dir, "results.tsv"), before.name)
            return row
        except OtherFlags as e:
            raise ValueError(f"{e}. Did an idea before it change? Leave those as they were, and add new ideas at the end") from e
        for note in found["notes"]:
            if note not in self.notes:
                self.notes.append(note)
                cli.say(note)
        return found["variants"][1]

    def settings(self, *recipes: Recipe, **how) -> CompareConfig:
        """Returns lab.compare's settings to compare these recipes."""
        config = self.config
        common = {name: getattr(config, name) for name in ("flags", "seeds", "out_dir", "workers", "max_minutes")}
        return CompareConfig(tuple(f"{recipe.name}={recipe.flags}" for recipe in recipes), **common | how)

    def at_the_end(self, where: str) -> dict:
        """Returns how the judgements at the end differ."""
        config = self.config
        flags = f"{config.flags} {config.larger}" if where == "larger" else config.flags
        return dict(flags=flags, seeds=config.fresh_seeds, first_seed=config.seeds + 1, out_dir=str(Path(config.out_dir, where)))


# ---- what it prints ----


def verdicts(rows: list[dict], first: str, last: str, markdown: bool) -> str:
    """Returns a table with these titles of its first and last column."""
    return table([first, "difference ± 95 %", last], [[r["variant"], interval(r), r["text"]] for r in rows], [2], markdown)


def end_of(found: dict, markdown: bool) -> str:
    """Returns the judgements at the end and the recipe, for people."""
    parts = []
    for title, rows in (("verdict with fresh seeds", found["fresh"]), ("verdict in the larger model", found["larger"])):
        if rows:
            parts.append(verdicts(rows, "kept", title, markdown))
    judged = sum(row["verdict"] != "failed" for row in found["ideas"])
    again = "with fresh seeds" + " and in the larger model" * bool(found["larger"])
    parts.append(
        f"kept {len(found['fresh'])} of {len(found['ideas'])} ideas; better again {again}: {found['held']}\n"
        f"If none of them helped, luck alone would keep at most {LEVEL * judged:.1f} of {judged} on average.\nrecipe: {found['recipe']}"
    )
    return "\n\n".join(parts)


def main():
    with cli.one_line_errors(cli.AGAIN):
        config = cli.parse(SearchConfig)
        config.validate()
        check_tools()
        ideas, search = read_ideas(config.ideas), Search(config)
        found = {"ideas": search.try_ideas(ideas), "recipe": f"{config.flags} {search.recipes[-1].flags}".strip()}
        if not config.json:
            print(verdicts(found["ideas"], "idea", "verdict", config.markdown), flush=True)  # the rest may take hours
        found["fresh"] = search.confirm("fresh")
        found["larger"] = search.confirm("larger") if config.larger else []
        tested = [found["fresh"], *([found["larger"]] if config.larger else [])]
        found["held"] = sum(all(row["verdict"] == "better" for row in rows) for rows in zip(*tested, strict=True))
        found["notes"] = search.notes
        print(json.dumps(found, indent=2) if config.json else f"\n{end_of(found, config.markdown)}", flush=True)


if __name__ == "__main__":
    main()
