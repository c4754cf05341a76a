"""Joins the shards that fineweb.py made in parts, each in a folder of its own, into one set. `config` is its PrepareConfig."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from common import cli
from common.documents import add_bad
from common.locks import HeldFolder
from common.preparation import (
    describe_changes,
    is_complete,
    other_settings,
    own_manifest,
    recorded_sources,
    shard_name,
    write_manifest,
    write_sources,
)
from common.shards import MANIFEST, inspect_shard, part_folder, part_folders, split_of
from common.validation import raise_errors


def join_parts(held: HeldFolder, config):
    """Moves the shards of all parts into --out-dir, in order, and writes the manifest. Resumes after a kill.
    If parts are missing, it prints them; without --part it raises a ValueError."""
    out = held.path
    if not is_complete(out, replace(config, part="")):
        count = count_of_parts(out)
        folders = [part_folder(out, index, count) for index in range(count)]
        if missing := [folder.name for folder in folders if not (folder / MANIFEST).exists()]:
            return report_missing_parts(out, config, missing)
        manifests = [own_manifest(folder) for folder in folders]
        check_parts_match(config, folders, manifests)
        shards = move_shards(held, config, folders, manifests)
        settings = {key: value for key, value in manifests[0]["settings"].items() if key != "part"}
        skipped = add_bad(manifest.get("skipped", {}) for manifest in manifests)
        held.check()
        write_sources(out, manifests[0]["revision"], recorded_sources(folders[0]))  # the same in all parts
        held.check()
        write_manifest(out, {"settings": settings, "revision": manifests[0]["revision"], "skipped": skipped}, shards)
    remove_joined(out)


def count_of_parts(out: Path) -> int:
    """Returns the number of parts, from the names of their folders."""
    counts = set(part_folders(out).values())
    if len(counts) > 1:
        raise ValueError(f"{out} mixes parts of {' and of '.join(map(str, sorted(counts)))}: move one kind elsewhere")
    return counts.pop()


def report_missing_parts(out: Path, config, missing: list[str]):
    some = cli.some(missing)
    todo = f"{out} still lacks {some}: make them with --part or copy their folders there, then run the same command without --part"
    if not config.part:
        raise ValueError(todo)
    print(todo)


def check_parts_match(config, folders: list[Path], manifests: list[dict]):
    """ValueError if parts differ in their settings from ours, or in their data from each other, or if a folder has another part."""
    revision, errors = manifests[0]["revision"], []
    for index, (folder, manifest) in enumerate(zip(folders, manifests, strict=True)):
        if (part := manifest["settings"].get("part")) != f"{index + 1}/{len(folders)}":
            errors.append(f"{folder} has part {part}: move it away, and make or copy the right one")
        if other := other_settings(manifest["settings"], config, manifest.get("skipped", {}), ("part", "revision")):
            errors.append(f"{folder} was made with other settings ({other}): use the same, or move it away and make that part again")
        if manifest["revision"] != revision:
            errors.append(
                f"{folder} was made from {manifest['revision']}, {folders[0]} from {revision}"
                f"{describe_changes(folder, recorded_sources(folders[0]))}: "
                "move one away and make it again from the same data"
            )
    raise_errors(errors)


def move_shards(held: HeldFolder, config, folders: list[Path], manifests: list[dict]) -> list[dict]:
    """Renames the parts' shards into --out-dir and returns their entries for the manifest. ValueError if a shard is missing or
    damaged, before any is renamed."""
    out, moves, shards = held.path, [], []
    for folder, manifest in zip(folders, manifests, strict=True):
        for entry in manifest["shards"]:
            split = split_of(entry["file"])
            shards.append(entry | {"file": shard_name(config, split, len(shards))})
            source, target = folder / entry["file"], out / shards[-1]["file"]
            if target.exists() and not source.exists():  # already renamed before a kill
                inspect_shard(out, shards[-1])
                continue
            inspect_shard(folder, entry)
            if target.exists():
                raise ValueError(f"{target} is in the way of {source}: move it elsewhere")
            moves.append((source, target))
    for source, target in moves:
        held.check()
        os.replace(source, target)
    return shards


def remove_joined(out: Path):
    """Removes the folders of joined parts; some may remain from a kill. ValueError if one still has shards."""
    left = []
    for folder in sorted(part_folders(out)):
        if any(path.suffix in (".npy", ".bin") for path in folder.rglob("*")):
            left.append(f"{folder} was not joined: {out} was complete before; move it elsewhere")
        else:
            shutil.rmtree(folder)
    raise_errors(left)
