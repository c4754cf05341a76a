"""Where runs come from: their code, data, settings and machine. Says what must not be mixed."""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import checkpoint
from common import cli
from common.bucket_shards import open_shards
from common.run_folder import without_seed
from common.shards import differences
from training.config import TrainConfig
from training.run_json import RUN, changed_files, other_code, read_run, read_run_json, teachers_fingerprint


def code_notes(folders: list[Path], reference: dict) -> list[str]:
    """Names the runs in these folders that were made by other code than the reference, which code_now() or a launch is."""
    notes = []
    for folder in recorded(folders):
        launches = read_run_json(folder / RUN)["launches"]
        if why := next(filter(None, (other_code(launch, reference) for launch in launches)), ""):
            notes.append(f"{folder} was trained by other code ({why})")
    return notes


def data_notes(folders: list[Path]) -> list[str]:
    """Names the runs in these folders whose shards, --init-from or --teacher have changed since, or whose shards differ from an earlier
    run's in the same --data-dir."""
    contents, weights, first, notes = cache(lambda data_dir: open_shards(data_dir).contents()), cache(checkpoint.fingerprint), {}, []
    for folder in recorded(folders):
        config, run = read_run(folder), read_run_json(folder / RUN)
        data_dir, data = config.data_dir, run["data"]
        if changed := differences(data, contents(data_dir)) or differences(data, first.setdefault(data_dir, data)):
            notes.append(f"{folder} was trained on other data than {data_dir} has now ({cli.some(changed, 3)})")
        if config.init_from and run.get("init") not in (None, weights(config.init_from, config.init_revision)):
            notes.append(f"{folder} started from other weights than {config.init_from} has now")
        if config.teachers and run.get("teacher_sha256") not in (None, teachers_fingerprint(config, weights)):
            notes.append(f"{folder} learned from other weights than {config.teacher} has now")
    return notes


def recorded(folders: list[Path]) -> list[Path]:
    return [folder for folder in folders if (folder / RUN).exists()]


# settings that decide a loss, and that a resume may change
RESUMED = ("max_steps", "max_seconds", "dtype", "skip_spikes")
FINGERPRINTS = {"init": "init_from", "teacher_sha256": "teacher"}  # in run.json → the flag
TRAIN_AGAIN = "train all runs again in another --out-dir, or pass --mixed to use these too"
LEAVE_OUT = "leave them out, or pass --mixed to use these too"
MAKE_EQUAL = "make both equal, or pass --mixed to compare them anyway"


def refuse_unless(mixed: bool, notes: list[str], remedy: str = TRAIN_AGAIN) -> list[str]:
    """Returns the notes. ValueError with them and the remedy unless mixed."""
    if notes and not mixed:
        raise ValueError(f"{cli.some(notes, 3)}: {remedy}")
    return notes


def machine_notes(folders: list[Path]) -> list[str]:
    """Names the devices, their numbers and the versions of torch, if the runs in these folders had several: their speeds can't be
    compared."""
    launches = [launch for folder in folders for launch in read_run_json(folder / RUN)["launches"]]
    notes = []
    for name, what in (("device", "device"), ("world_size", "number of processes"), ("torch", "torch")):
        found = sorted({str(launch[name]) for launch in launches if name in launch})
        notes += [f"the runs had more than one {what}: {', '.join(found)}"] if found[1:] else []
    return notes


# ---- runs given by their folders ----


def last_of(folder: Path) -> dict:
    """Returns the last launch of a run: its commit, code and hardware."""
    return read_run_json(folder / RUN)["launches"][-1]


def settings_of(folder: Path) -> dict:
    """Returns the settings that decide a run's loss, apart from its seed."""
    config = read_run(folder)
    return without_seed({**vars(config), **vars(config.model)}, config.seed)


def changed_by_resumes(folder: Path) -> dict[str, list]:
    """Returns the settings that decide a loss and that a resume changed, each with its values in order: --max-steps [1000, 1900] had the
    schedule end twice. Launches whose steps were all computed again don't count."""
    launches = read_run_json(folder / RUN)["launches"]
    starts = [launch.get("step", 0) for launch in launches]
    kept = [launch for i, launch in enumerate(launches) if "config" in launch and starts[i] < min(starts[i + 1 :], default=math.inf)]
    values = {name: [launch["config"].get(name) for launch in kept] for name in RESUMED}
    return {cli.flag(name): found for name, found in values.items() if any(value != found[0] for value in found)}


def mixtures(name: str, folders: list[Path]) -> list[str]:
    """Says how the runs of one variant differ in more than the seed."""
    if not folders:
        return []
    first, *others = folders
    settings, notes = settings_of(first), []
    for folder in others:
        found = settings_of(folder)
        if changed := [key for key in settings if settings[key] != found[key]]:
            notes.append(f"{name}: {folder} has other settings than {first} ({cli.some(changed, 3)})")
        elif (ours := changed_by_resumes(folder)) != (theirs := changed_by_resumes(first)):
            notes.append(f"{name}: {folder} {described(ours)}, {first} {described(theirs)}")
        ours, theirs = read_run_json(folder / RUN), read_run_json(first / RUN)
        for key, flag in FINGERPRINTS.items():
            same_path = ours["config"].get(flag) == theirs["config"].get(flag)
            if same_path and ours.get(key) and theirs.get(key) and ours[key] != theirs[key]:
                notes.append(f"{name}: {folder} has another {cli.flag(flag)} than {first}, under the same path")
        if why := differences(read_run_json(first / RUN)["data"], read_run_json(folder / RUN)["data"]):
            notes.append(f"{name}: {folder} was trained on other data than {first} ({cli.some(why, 3)})")
    return notes + [f"{name}: {note}" for note in code_notes(folders, last_of(first))]


def described(changed: dict[str, list]) -> str:
    """Says what changed_by_resumes found."""
    pairs = [f"{flag} {', then '.join(map(str, values))}" for flag, values in changed.items()]
    return f"was resumed with other settings ({'; '.join(pairs)})" if pairs else "was not resumed with other settings"


class Origin(NamedTuple):
    """What one run stands for its variant with."""

    config: TrainConfig
    data: dict[str, list]  # as contents() of the shards
    launch: dict  # commit and code, as code_now() or a launch
    changed: dict[str, list]  # by resumes
    weights: dict[str, str]  # fingerprints of --init-from and --teacher

    @property
    def budget(self) -> str:
        config, processes = self.config, self.launch.get("world_size", 1)
        if not config.max_seconds:
            return f"{config.max_steps * config.total_batch_tokens:,} tokens"
        return f"{config.max_seconds:g} seconds" + f" on {processes} processes" * (processes > 1)

    @property
    def ignores_seed(self) -> bool:
        """Whether runs with other seeds are the same, apart from rounding: they start from one model and read the same text."""
        config, shared = self.config, without_seed(vars(self.config), self.config.seed)
        own = any(shared[name] != getattr(config, name) for name in ("init_from", "teacher"))  # each seed has its own
        return bool(config.init_from) and not (config.shuffle or config.model.dropout or own)


def origin_of(folder: Path) -> Origin:
    run = read_run_json(folder / RUN)
    weights = {flag: run[key] for key, flag in FINGERPRINTS.items() if run.get(key)}
    return Origin(read_run(folder), run["data"], last_of(folder), changed_by_resumes(folder), weights)


def weights_now(config: TrainConfig, others: dict[str, Origin]) -> dict[str, str]:
    """Returns the fingerprint of --init-from, if a finished run started from the same path: the file may have changed since."""
    known = config.init_from and any(each.weights and each.config.init_from == config.init_from for each in others.values())
    return {"init_from": checkpoint.fingerprint(config.init_from, config.init_revision)} if known else {}


def unequal(name: str, ours: Origin, first: str, theirs: Origin, budget: bool) -> list[str]:
    """Says what makes a comparison of two variants unfair: other data, another validation and, if budget, more training or help from
    another model."""
    notes = []
    if why := differences(theirs.data, ours.data):
        notes.append(f"{name} has other data than {first} ({cli.some(why, 3)})")
    if ours.config.val_tokens != theirs.config.val_tokens:
        notes.append(f"{name} validates on {ours.config.val_tokens:,} tokens, {first} on {theirs.config.val_tokens:,}")
    if ours.config.model.seq_len != theirs.config.model.seq_len:  # the validation's tokens then differ, too
        notes.append(f"{name} validates on sequences of {ours.config.model.seq_len:,} tokens, {first} of {theirs.config.model.seq_len:,}")
    for field in ("init_from", "teacher") if budget else ():
        if bool(mine := getattr(ours.config, field)) != bool(other := getattr(theirs.config, field)):
            who, whose, value = (name, first, mine) if mine else (first, name, other)
            notes.append(f"{who} learns from another model ({cli.flag(field)} {value}), {whose} doesn't")
        elif mine == other and len({ours.weights.get(field), theirs.weights.get(field)} - {None}) > 1:
            notes.append(f"{name} has another {cli.flag(field)} than {first}, under the same path")
    if budget and ours.budget != theirs.budget:
        notes.append(f"{name} trains for {ours.budget}, {first} for {theirs.budget}")
    if budget and ours.changed != theirs.changed:
        notes.append(f"{name} {described(ours.changed)}, {first} {described(theirs.changed)}")
    return notes


def code_change(name: str, ours: Origin, first: str, theirs: Origin) -> list[str]:
    """Names the commit and the changed files of a variant whose code is not the first's."""
    why = other_code(ours.launch, theirs.launch)
    commits = f"commit {commit_of(ours.launch)} against {commit_of(theirs.launch)}"
    return [f"{name} has other code than {first} ({why}): {commits}"] if why else []


def forbidden(ours: Origin, theirs: Origin, may_change: tuple[str, ...]) -> str:
    """Names the changed files that may not change; "" if there are none. may_change is () if all may."""
    changed = changed_files(ours.launch, theirs.launch)
    changed = ["unknown files: a run is of an older version"] if changed is None else changed
    wrong = [file for file in changed if file not in may_change] if may_change else []
    return f"changes {cli.some(wrong, 3)}: only {', '.join(may_change)} may change" if wrong else ""


def commit_of(launch: dict) -> str:
    """Returns a launch's commit for people, such as d4f681e4 or d4f681e4+."""
    commit = str(launch.get("commit") or "unknown")
    return commit[:8] + "+" * commit.endswith("+")
