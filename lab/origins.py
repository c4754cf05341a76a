"""Where runs come from: their code, data, settings and machine. Says what must not be mixed."""

from functools import cache
from pathlib import Path

import checkpoint
from common.shards import differences, find_shards
from training.run_json import RUN, other_code, read_run, read_run_json


def code_notes(folders: list[Path], reference: dict) -> list[str]:
    """Names the runs in these folders that were made by other code than the reference, which code_now() or a launch is."""
    notes = []
    for folder in recorded(folders):
        launches = read_run_json(folder / RUN)["launches"]
        if why := next(filter(None, (other_code(launch, reference) for launch in launches)), ""):
            notes.append(f"{folder} was trained by other code ({why})")
    return notes


def data_notes(folders: list[Path]) -> list[str]:
    """Names the runs in these folders whose shards or --init-from have changed since, or whose shards differ from an earlier run's in
    the same --data-dir."""
    contents, weights, first, notes = cache(lambda data_dir: find_shards(data_dir).contents()), cache(checkpoint.fingerprint), {}, []
    for folder in recorded(folders):
        config, run = read_run(folder), read_run_json(folder / RUN)
        data_dir, data = config.data_dir, run["data"]
        if changed := differences(data, contents(data_dir)) or differences(data, first.setdefault(data_dir, data)):
            notes.append(f"{folder} was trained on other data than {data_dir} has now ({shortened(changed)})")
        if config.init_from and run.get("init") not in (None, weights(config.init_from, config.init_revision)):
            notes.append(f"{folder} started from other weights than {config.init_from} has now")
        if config.teacher and run.get("teacher_sha256") not in (None, weights(config.teacher)):
            notes.append(f"{folder} had another teacher than {config.teacher} is now")
    return notes


def recorded(folders: list[Path]) -> list[Path]:
    return [folder for folder in folders if (folder / RUN).exists()]


def refuse_unless(mixed: bool, notes: list[str]) -> list[str]:
    """Returns the notes. ValueError with them unless mixed."""
    if notes and not mixed:
        raise ValueError(f"{shortened(notes)}: train all runs again in another --out-dir, or pass --mixed to use these too")
    return notes


def shortened(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if items[3:] else "")


def machine_notes(folders: list[Path]) -> list[str]:
    """Names the devices, and the versions of torch, if the runs in these folders had several: their speeds can't be compared."""
    launches = [launch for folder in folders for launch in read_run_json(folder / RUN)["launches"]]
    notes = []
    for name in ("device", "torch"):
        found = sorted({str(launch.get(name)) for launch in launches})
        notes += [f"the runs had more than one {name}: {', '.join(found)}"] if found[1:] else []
    return notes
