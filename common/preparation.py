"""What a preparation of shards records, and whether a later command may continue it: progress.json, sources.json, manifest.json.

`config` is fineweb.py's PrepareConfig.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

from common import cli
from common.documents import How, LocalDocuments, changes, describe_bad
from common.files import read_json, write_json
from common.folders import Listing, list_files, older_files, older_revision, stdlib_files
from common.shards import MAKE_AGAIN, MANIFEST, PROGRESS, SOURCES, are_entries, inspect_shard, read_manifest, split_of
from common.text import shown
from common.tokenizer import VOCAB_SIZES
from common.validation import has_type

START_AGAIN = f"restore it from a copy, or {MAKE_AGAIN}"


def local_documents(config, revision: str = "", quiet: bool = False) -> LocalDocuments | None:
    """Opens --dataset if it is stdlib, or if all its paths exist; None otherwise. revision: the recorded one, or ''. Says what is read
    and what is skipped, unless quiet."""
    stdlib, paths = config.dataset == ("stdlib",), [Path(name) for name in config.dataset]
    if not (stdlib or all(path.exists() for path in paths)):
        return None
    if revision.startswith("files-"):  # from a version that read other files and didn't hash them: continue as it began
        files = stdlib_files() if stdlib else older_files(paths)
        if not quiet:
            cli.say(f"reading {len(files):,} files by the rules of the older version that began this")
        return LocalDocuments(files, config.part_range, How(tolerant=True), config.skip_bad_rows, older_revision(files))
    listing = Listing(stdlib_files()) if stdlib else list_files(paths, config.text_field, Path(config.out_dir))
    if not (stdlib or quiet):
        cli.say("\n".join(listing.summary()))
    how = How(config.text_field, tolerant=stdlib)  # Python's library has wrong bytes on purpose, in tests of encodings
    return LocalDocuments(listing.files, config.part_range, how, config.skip_bad_rows)


def is_complete(out: Path, config) -> bool:
    """Whether this run's manifest exists; prints so. ValueError if it belongs to other settings or files."""
    if not (out / MANIFEST).exists():
        return False
    check_same(own_manifest(out), config, out)
    (out / PROGRESS).unlink(missing_ok=True)  # left by a kill between the last two steps
    print(f"{out} is already complete")
    return True


def check_same(manifest: dict, config, place: Path | str):
    """ValueError if a folder's or URL's manifest belongs to other settings, or to files that have changed."""
    if other := other_settings(manifest["settings"], config, manifest.get("skipped", {})):
        raise ValueError(f"{place} has shards made with other settings ({other}): choose another folder")
    documents = local_documents(config, manifest["revision"], quiet=True)
    if documents and documents.revision != manifest["revision"]:
        changed = describe_changes(place, documents.sources) if isinstance(place, Path) else ""
        raise ValueError(f"the files changed since {place} was made from them{changed}: choose another folder")


def own_manifest(folder: Path) -> dict:
    """Reads a manifest that this script wrote. ValueError if it is damaged or another program's."""
    manifest = read_manifest(folder)
    if missing := {"settings", "revision"} - manifest.keys():
        raise ValueError(f"{folder / MANIFEST} is damaged or not made by fineweb.py, it has no {min(missing)}: {START_AGAIN}")
    return manifest


def resume_point(out: Path, config) -> dict | None:
    """Returns the progress to resume from: that of the progress file, or of a new run. None if the folder is complete.
    ValueError if it contains something else."""
    if is_complete(out, config):
        return None
    fresh = {"settings": settings_of(config), "revision": "", "shards": [], "state": None, "skip": 0}
    if (out / PROGRESS).exists():
        progress = read_progress(out)
        other = other_settings(progress["settings"], config, (progress["state"] or {}).get("skipped", {}))
        if not progress["shards"]:  # nothing to lose, so settings may change; keep the recorded commit of the hub
            keep = not other and not progress["revision"].startswith(("files-", "sha256-"))
            return fresh | {"revision": progress["revision"]} if keep else fresh
        if other:
            raise ValueError(f"{out} has an unfinished run with other settings ({other}): use the same, or choose another folder")
        for entry in progress["shards"]:
            inspect_shard(out, entry)
        return progress | {"settings": progress["settings"] | {"skip_bad_rows": config.skip_bad_rows}}
    if any(path.suffix in (".npy", ".bin") for path in out.iterdir()):
        raise ValueError(f"{out} has shards that this command did not make: choose another folder")
    return fresh


def settings_of(config) -> dict:
    """Returns the settings that determine the shards' bytes, as JSON types."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("out_dir", "workers")}
    if not config.part:
        del settings["part"]
    return settings | {"dataset": [str(Path(name)) for name in config.dataset]}  # d/ is d


def other_settings(recorded: dict, config, skipped: dict, leave_out: tuple[str, ...] = ()) -> str:
    """Names the settings that differ from recorded ones: '--shard-size 200 here, 100 there'. '' if none does.
    --skip-bad-rows counts only if there were bad rows. A setting that an older version lacked had today's default."""
    ours, defaults = settings_of(config), {"part": ""} | settings_of(type(config)())
    ignored = {*leave_out, *(() if skipped and not config.skip_bad_rows else ("skip_bad_rows",))}
    names = [name for name in {**ours, **recorded} if name not in ignored]
    pairs = {name: [settings.get(name, defaults.get(name)) for settings in (ours, recorded)] for name in names}
    return "; ".join(f"{cli.flag(name)} {as_typed(a)} here, {as_typed(b)} there" for name, (a, b) in pairs.items() if not same(name, a, b))


def same(name: str, a, b) -> bool:
    """Whether two values of a setting are equal. Different spellings of a path are."""
    if name == "dataset" and isinstance(b, list) and all(isinstance(path, str) for path in b):
        return list(map(os.path.realpath, a)) == list(map(os.path.realpath, b))
    return a == b and type(a) is type(b)


def as_typed(value) -> str:
    """A setting's value as on a command line; '' as quotes."""
    return shown(" ".join(map(str, value))) if isinstance(value, list) else shown(value) or "''"


def write_progress(out: Path, progress: dict):
    write_json(out / PROGRESS, progress | {"seal": seal(progress)})


def read_progress(out: Path) -> dict:
    """Reads the progress file. ValueError if it is damaged: one wrong digit would lose or repeat text."""
    progress = read_json(out / PROGRESS, START_AGAIN)
    sealed = progress.pop("seal", "")  # older versions had none
    kinds = {"settings": dict, "revision": str, "shards": list, "state": dict | None, "skip": int}
    intact = progress.keys() == kinds.keys() and all(has_type(progress[name], kind) for name, kind in kinds.items())
    if not intact or progress["skip"] < 0 or not are_entries(progress["shards"]) or sealed not in ("", seal(progress)):
        raise ValueError(f"{out / PROGRESS} is damaged: {START_AGAIN}")
    return progress


def seal(progress: dict) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(out: Path, progress: dict, shards: list[dict]):
    """Writes the manifest, the last step: from now on the folder is complete."""
    settings = progress["settings"]
    manifest = {
        "tokenizer": settings["tokenizer"],
        "vocab_size": VOCAB_SIZES[settings["tokenizer"]],
        "source": " ".join(settings["dataset"]),
        "revision": progress["revision"],
        "tokens": sum(shard["tokens"] for shard in shards),
        "settings": settings,
        "shards": shards,
    }
    if skipped := progress.get("skipped"):
        manifest["skipped"] = skipped
        cli.say(describe_bad(skipped))
    write_json(out / MANIFEST, manifest)
    (out / PROGRESS).unlink(missing_ok=True)
    val_tokens = sum(shard["tokens"] for shard in shards if split_of(shard["file"]) == "val")
    print(f"{out}: {manifest['tokens']:,} tokens in {len(shards)} shards, {val_tokens:,} of them for validation")


def write_sources(out: Path, revision: str, sources: list):
    if sources:
        write_json(out / SOURCES, {"revision": revision, "files": sources})
    else:
        (out / SOURCES).unlink(missing_ok=True)  # of an earlier start with other --dataset


def shard_name(config, split: str, index: int) -> str:
    prefix = re.sub(r"[^a-z0-9]", "", Path(config.dataset[0]).stem.lower())[:200] or "documents"  # a name has at most 255 bytes
    return f"{prefix}_{split}_{index:06d}.npy"


def describe_changes(folder: Path, sources: list) -> str:
    """Names the files that differ from those that a folder was made from; '' if that is not known."""
    names = changes(recorded_sources(folder), sources)
    return names and f" ({names})"


def recorded_sources(folder: Path) -> list:
    """Returns [name, sha256] of each file that a folder was made from. [] for the hub, and for folders of older versions."""
    if not (folder / SOURCES).exists():
        return []
    sources = read_json(folder / SOURCES, START_AGAIN).get("files")
    if not (isinstance(sources, list) and all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in sources)):
        raise ValueError(f"{folder / SOURCES} is damaged: {START_AGAIN}")
    return sources
