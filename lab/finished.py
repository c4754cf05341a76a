"""Finished runs, given by their folders: which of them form a variant, and whether they are finished."""

import json
from pathlib import Path

from common import cli
from lab.origins import last_of, settings_of
from training.run_json import RUN, is_finished, read_run


def variants_in(words: list[str]) -> tuple[dict[str, str], dict[str, dict[int, Path]]]:
    """Returns word → its variant's name, and name → seed → folder. A word is a folder of numbered runs, as lab.compare writes them, or the
    folder of one run. Single runs of the same settings and code, but other seeds, form one variant. ValueError if a folder has no finished
    run."""
    names, found, single = {}, {}, {}
    for word in words:
        folders, is_one = runs_in(Path(word))
        runs = by_seed(folders)
        kind = identity(folders[0]) if is_one else ""
        name = single.get(kind) if is_one else None  # the latest variant of runs like this one
        if not name or runs.keys() & found[name].keys():  # a seed twice begins another variant
            name = unused_name(word, found)
        if is_one:
            single[kind] = name
        names[word] = name
        found[name] = found.get(name, {}) | runs
    return names, {name: dict(sorted(seeds.items())) for name, seeds in found.items()}


def by_seed(folders: list[Path]) -> dict[int, Path]:
    """Returns seed → folder. ValueError if two runs have one seed."""
    found = {}
    for folder in folders:
        seed = read_run(folder).seed
        if seed in found:
            raise ValueError(f"{found[seed]} and {folder} have the same seed, {seed}, so they count as one: leave one out")
        found[seed] = folder
    return found


def unused_name(word: str, taken: dict) -> str:
    """Returns a variant's name: its folder's, or that of the folder above a numbered run; the whole path if that is taken."""
    path = Path(word).resolve()
    name = path.parent.name if path.name.isdecimal() else path.name
    return word if name in taken else name


def runs_in(folder: Path) -> tuple[list[Path], bool]:
    """Returns the runs that a word stands for, and whether it is one run's own folder. ValueError if there are none, or one has not
    finished."""
    is_one = (folder / RUN).exists()
    folders = [folder] if is_one else [path for path in folder.glob("*") if path.name.isdecimal() and (path / RUN).exists()]
    if not folders:
        raise ValueError(f"{folder} is no run and has no numbered runs: give a run's folder, or the folder of a variant's seeds")
    for one in folders:
        if not is_finished(one):
            raise ValueError(f"{one} has not finished: wait for it, or continue it with train.py --resume --out-dir {one}")
    return sorted(folders, key=lambda path: int(path.name) if path.name.isdecimal() else 0), is_one


def identity(folder: Path) -> str:
    """Returns what the runs of one variant have in common: settings and code."""
    launch = last_of(folder)
    return json.dumps([settings_of(folder), launch.get("code") or launch.get("commit")], sort_keys=True, default=str)


def common_seeds(variants: dict[str, dict[int, Path]]) -> list[int]:
    """Returns the seeds that all of these variants have. ValueError if there are none."""
    seeds = sorted(set.intersection(*(set(seeds) for seeds in variants.values())))
    if not seeds:
        each = "; ".join(f"{name} has {cli.some(seeds)}" for name, seeds in variants.items())
        raise ValueError(f"no seed is in all folders ({each}): train the missing ones")
    return seeds
