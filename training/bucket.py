"""What a run has under --remote, and how a launch fetches it.

    lease.json                                    which launch works on the run now: see lease.py
    launch-TOKEN/run.json, log.txt, …             as in the run's folder, when this launch last saved
    launch-TOKEN/model_00010.pt, state_00010.pt, model_00010.json     its checkpoints, as in checkpoint.py; the seal was sent last

Each launch writes under a name of its own, the token in its run.json. So a machine that was believed dead can't replace another one's
file, however late its upload comes: equal steps may have different bits, and its log is another one. A launch that resumes takes the
newest complete checkpoint together with the log of the launch that made it. Both belong to the same history.
"""

import re
from pathlib import Path
from typing import NamedTuple

from checkpoint import TIMED, Files, files_of, outdated
from common import cli
from common.files import parse_json, replace, sha256, write_atomically, write_json
from common.remote import Remote
from common.run_folder import RUN

TEXTS = (RUN, "log.txt", "metrics.jsonl", "samples.txt")
SEAL = r"model_(\d+)\.json"
LAUNCH = re.compile(r"launch-[0-9a-f]{16}")
# what a launch writes; a store that isn't atomic may keep the temporary file of an upload that was killed
WRITTEN = re.compile(rf"(?:(?:model|state)_(\d+)\.pt|model_(\d+)\.json|{'|'.join(map(re.escape, TEXTS))})(?:\.[0-9a-f]{{8}}\.tmp)?")


class Sealed(NamedTuple):
    """A checkpoint whose files have the sizes that its seal names."""

    step: int
    launch: str
    seal: dict

    def names(self) -> Files:
        return Files(*(f"{self.launch}/{path.name}" for path in files_of(Path(), self.step)))


class Bucket:
    """What was under a URL when this was made. runs: each launch's run.json. checkpoints: the sealed ones, from old to new.
    damaged: names of run.json or of seals that can't be used. Files of others are not looked at."""

    def __init__(self, remote: Remote):
        self.remote, self.runs, self.checkpoints, self.damaged = remote, {}, [], []
        launches = [name for name, size in remote.list().items() if size is None and LAUNCH.fullmatch(name)]
        self.files = {launch: {name: size for name, size in remote.list(launch).items() if size is not None} for launch in launches}
        for launch, files in self.files.items():
            run = self.json_of(launch, RUN) if RUN in files else None
            if run and isinstance(run.get("id"), str) and isinstance(run.get("launches"), list):
                self.runs[launch] = run
                self.checkpoints += self.sealed(launch)
            elif any(re.fullmatch(SEAL, name) for name in files):
                self.damaged.append(f"{launch}/{RUN}")
        self.checkpoints.sort(key=lambda each: (each.step, len(self.runs[each.launch]["launches"]), each.launch))

    def json_of(self, launch: str, name: str) -> dict | None:
        data = self.remote.read(f"{launch}/{name}")
        try:
            found = parse_json(data or b"")
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def sealed(self, launch: str) -> list[Sealed]:
        found, files, run = [], self.files[launch], self.runs[launch]["id"]
        for step in sorted(int(m[1]) for name in files if (m := re.fullmatch(SEAL, name))):
            model, state, name = (path.name for path in files_of(Path(), step))
            seal = self.json_of(launch, name) or {}
            parts = [seal.get(part) for part in (model, state)]
            whole = all(
                isinstance(each, dict) and (each.get("run"), each.get("step"), each.get("bytes")) == (run, step, files.get(part))
                for each, part in zip(parts, (model, state), strict=True)
            )
            if whole:
                found.append(Sealed(step, launch, seal))
            else:
                self.damaged.append(f"{launch}/{name}")
        return found

    def ids(self) -> set[str]:
        return {run["id"] for run in self.runs.values()}

    def newest_launch(self) -> str | None:
        return max(self.runs, key=lambda launch: (len(self.runs[launch]["launches"]), launch), default=None)


def fetch_newest(bucket: Bucket, folder: Path, newer_than: int, damaged: set) -> int | None:
    """Downloads the newest complete checkpoint after a step, with its log and run.json, and returns its step. None if there is none.
    Reports damaged ones and adds them to the set; skips those in it. ValueError if all are damaged and there is no earlier one."""
    newer = [each for each in bucket.checkpoints if each.step > newer_than]
    for found in reversed(newer):
        if found.names() in damaged:
            continue
        if download(bucket.remote, found, folder):
            return found.step
        damaged.add(found.names())
        cli.say(f"warning: skipping the checkpoint of step {found.step} in {bucket.remote.url}/{found.launch}: its bytes are wrong")
    if newer and newer_than < 0:
        raise ValueError(f"none of the {len(newer)} checkpoints in {bucket.remote.url} can be resumed: restore one, or use another folder")
    return None


def download(remote: Remote, found: Sealed, folder: Path) -> bool:
    """Downloads a checkpoint and what belongs to it. Returns False if it is damaged. A kill leaves the folder as it was, or complete:
    see checkpoint.write_checkpoint."""
    files, temporaries = files_of(folder, found.step), []
    size = sum(found.seal[path.name]["bytes"] for path in files[:2])
    cli.say(f"downloading the checkpoint of step {found.step} from {remote.url} ({size / 1e6:,.1f} MB)")
    for path, name in zip(files[:2], found.names(), strict=False):
        temporary = path.with_name(f"{path.name}.tmp")
        temporaries.append(temporary)
        for last in (False, False, True):
            try:
                remote.get(name, temporary)
            except cli.TryAgain:
                if last:
                    raise
                continue
            if sha256(temporary) == found.seal[path.name].get("sha256"):
                break
        else:
            for each in temporaries:
                each.unlink()
            return False
    download_texts(remote, found.launch, folder)
    write_json(files.seal, found.seal)
    for path, temporary in zip(files[:2], temporaries, strict=True):
        replace(temporary, path)
    return True


def download_texts(remote: Remote, launch: str, folder: Path):
    for name in reversed(TEXTS):  # run.json last: it says that the others are its run's
        if (data := remote.read(f"{launch}/{name}")) is not None:
            write_atomically(folder / name, lambda file, data=data: file.write(data))


def prune(bucket: Bucket, run: str, keep: int, own: str):
    """Deletes a run's outdated checkpoints, and what dead launches left. The seal goes first: without it the rest does not count.
    own: the launch that works now; its newest checkpoint always stays.

    Deletes only what proves to be this run's: files of a checkpoint in a launch's folder whose run.json has the run's id."""
    ours = [each for each in bucket.checkpoints if bucket.runs[each.launch]["id"] == run]
    ours.sort(key=lambda each: (each.step, each.launch == own))
    kept = [*ours[-1:], *[each for each in ours if each.launch == own][-1:]]
    timed = [each for each in ours if each.seal.get(TIMED)]
    old = outdated([each for each in ours if each not in timed], timed, keep)
    kept += [each for each in ours if each not in old]
    for launch in [launch for launch in bucket.runs if bucket.runs[launch]["id"] == run]:
        steps = {each.step for each in kept if each.launch == launch}
        names = [name for name in bucket.files[launch] if is_outdated(name, steps, dead=launch != own and not steps)]
        for name in sorted(names, key=lambda name: (name == RUN, not name.endswith(".json"))):
            bucket.remote.delete(f"{launch}/{name}")


def is_outdated(name: str, kept: set[int], dead: bool) -> bool:
    """Whether prune deletes this file of a launch. dead: none of the launch's checkpoints is kept, and it does not work now."""
    found = WRITTEN.fullmatch(name)
    if found and found.lastindex:
        return int(found[found.lastindex]) not in kept
    return bool(found) and dead
