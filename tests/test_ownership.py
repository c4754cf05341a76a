"""A run owns its folder: whatever happens to the folder, no run writes into another's, and none loses a step."""

import errno
import json
import os
import shutil
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, Forked, forked, read_stream, run_main, run_train, write_shards

import checkpoint
import fineweb
import train
from checkpoint import files_of, find_problem, newest_step
from common import locks, run_folder
from common.files import append, sha256, write_json
from common.locks import HeldFolder, lock_folder
from common.run_folder import RUN, RunFolder
from common.shards import find_shards, verify_shards
from training import checks, run_json
from training.trainer import Trainer


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A run of 20 steps that nothing disturbed."""
    run = tmp_path_factory.mktemp("ownership") / "run"
    assert run_train(shards, run, "--checkpoint-every", 5, "--keep", 0) == 0
    return run


@pytest.fixture(scope="module")
def other(shards, tmp_path_factory):
    """A run with another seed."""
    run = tmp_path_factory.mktemp("other") / "run"
    assert run_train(shards, run, "--checkpoint-every", 5, "--keep", 0, "--seed", 7) == 0
    return run


def same_run(run, reference) -> bool:
    """Whether two runs have the same weights at the end, and the same losses in the log."""
    ours, theirs = (torch.load(folder / "model_00020.pt", weights_only=True)["model"] for folder in (run, reference))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def pause_before_step_3(go):
    """Makes training wait before step 3 until a file exists, at most a minute. A file "waits" beside it says so."""
    plain, deadline = Trainer.update, time.monotonic() + 60

    def update(self, step, *args, **how):
        if step == 3:
            go.with_name("waits").touch()
        while step == 3 and not go.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return plain(self, step, *args, **how)

    Trainer.update = update


def begin(folder, shards, *argv, first=pause_before_step_3, **how) -> Forked:
    """Starts a run, which waits before step 3 until end_pause."""
    argv = [*TINY, "--data-dir", shards, "--out-dir", folder / "run", *argv]
    run = Forked(folder, "train", *argv, first=partial(first, folder / "go"), **how)
    while not (folder / "waits").exists():
        assert run.processes[0].is_alive(), run.outputs[0][1].read_text()
        time.sleep(0.01)
    return run


def end_pause(run, folder):
    (folder / "go").touch()
    return run.wait(60)


def resume(folder) -> int:
    return run_main(train.main, "--resume", "--out-dir", folder)


# ---- two runs, one name ----


@pytest.mark.parametrize("processes", [0, 2])
def test_moved_folder_keeps_its_run(finished, other, shards, tmp_path, processes):
    """The folder is moved, and another run starts under its name."""
    first = begin(tmp_path, shards, "--keep", 1, processes=processes)
    os.rename(tmp_path / "run", tmp_path / "moved")
    assert run_train(shards, tmp_path / "run", "--seed", 7) == 0
    result = end_pause(first, tmp_path)
    assert result.returncode == 1 and f"saves everything in {tmp_path / 'moved'}" in result.stderr and "Traceback" not in result.stderr
    assert f"--resume --out-dir {tmp_path / 'moved'}" in result.stderr
    assert resume(tmp_path / "moved") == 0 and same_run(tmp_path / "run", other)
    assert processes or same_run(tmp_path / "moved", finished)  # two processes round differently
    for run, reference in (("moved", finished), ("run", other)):
        losses, expected = read_stream(tmp_path / run, "train"), read_stream(reference, "train")
        assert losses.keys() == expected.keys()
        assert all(abs(float(losses[step]) - float(expected[step])) < 1e-4 for step in losses)


@pytest.mark.parametrize("replaced", [False, True])
def test_deleted_folder_is_saved_elsewhere(finished, other, shards, tmp_path, replaced):
    first = begin(tmp_path, shards, "--keep", 1)
    id = json.loads((tmp_path / "run" / RUN).read_text())["id"]
    shutil.rmtree(tmp_path / "run")
    if replaced:
        assert run_train(shards, tmp_path / "run", "--seed", 7) == 0
    result = end_pause(first, tmp_path)
    rescued = tmp_path / f"run-{id}"
    assert result.returncode == 1 and f"saves everything in {rescued}" in result.stderr and "Traceback" not in result.stderr
    assert resume(rescued) == 0 and same_run(rescued, finished)
    assert same_run(tmp_path / "run", other) if replaced else not (tmp_path / "run").exists()


def test_removed_lock_lets_no_second_process_in(shards, tmp_path, finished):
    first = begin(tmp_path, shards)
    (tmp_path / "run" / ".lock").unlink()
    second = forked(tmp_path / "run", "train", "--resume", "--out-dir", tmp_path / "run")
    assert second.returncode == 2 and "another process is writing into" in second.stderr
    assert end_pause(first, tmp_path).returncode == 0 and same_run(tmp_path / "run", finished)


def without_locks():
    """Makes flock answer as on a file system without locks."""

    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    locks.fcntl.flock = flock


def pause_without_locks(go):
    without_locks()
    pause_before_step_3(go)


def test_second_process_is_noticed_without_locks(finished, shards, tmp_path):
    """On a file system without locks, the launch that came later has the run. The earlier one saves elsewhere."""
    first = begin(tmp_path, shards, "--checkpoint-every", 1, "--keep", 1, first=pause_without_locks)
    (tmp_path / "second").mkdir()
    second = forked(tmp_path / "second", "train", "--resume", "--out-dir", tmp_path / "run", first=without_locks)
    assert second.returncode == 0 and "without locks: start only one process" in second.stderr
    result = end_pause(first, tmp_path)
    assert result.returncode == 1 and "another process resumed the run in" in result.stderr
    rescued = next(tmp_path.glob("run-*"))
    assert resume(rescued) == 0 and same_run(rescued, finished) and same_run(tmp_path / "run", finished)


def slow_rank_1():
    """Rank 1 comes late, which leaves rank 0 waiting between its checks and the first step."""
    if os.environ["RANK"] == "1":
        time.sleep(2)


def test_raced_launches_start_only_one_run(finished, shards, tmp_path):
    """One launch of two processes and one of one process begin at the same time."""
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run"]
    slow = Forked(tmp_path, "train", *argv, "--seed", 7, processes=2, first=slow_rank_1)
    time.sleep(1)
    (tmp_path / "fast").mkdir()
    fast = forked(tmp_path / "fast", "train", *argv)
    statuses = {fast.returncode, slow.wait(60).returncode}
    assert statuses == {0, 2}
    seed = 7 if fast.returncode else 1337
    assert json.loads((tmp_path / "run" / RUN).read_text())["config"]["seed"] == seed
    assert len(json.loads((tmp_path / "run" / RUN).read_text())["launches"]) == 1


def test_hard_linked_copies_are_separate_runs(finished, shards, tmp_path):
    """cp -al makes a copy whose files are the same files. Both runs go their own way."""
    shutil.copytree(finished, tmp_path / "a")
    for path in files_of(tmp_path / "a", 20):
        path.unlink()
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=os.link)
    lines = len((tmp_path / "a" / "log.txt").read_text().splitlines())
    with lock_folder(tmp_path / "a"):  # the copy's lock file is the same file
        assert run_main(train.main, "--resume", "--out-dir", tmp_path / "b", "--max-steps", 17) == 0
    assert len((tmp_path / "a" / "log.txt").read_text().splitlines()) == lines
    assert resume(tmp_path / "a") == 0 and same_run(tmp_path / "a", finished)


@pytest.mark.parametrize("content", [None, b"", b"{", b"{}"])
def test_damaged_run_json_is_written_again(finished, shards, tmp_path, content):
    first = begin(tmp_path, shards)
    (tmp_path / "run" / RUN).unlink() if content is None else (tmp_path / "run" / RUN).write_bytes(content)
    assert end_pause(first, tmp_path).returncode == 0 and same_run(tmp_path / "run", finished)
    assert run_json.read_run(tmp_path / "run").max_steps == 20


# ---- files of other runs and steps ----


def seal(folder, step):
    """Writes a seal that fits the files, as older versions and careless tools would."""
    model, state, path = files_of(folder, step)
    write_json(path, {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in (model, state)})


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("other run", "is of another run"),
        ("other run, new seal", "state_00015.pt is of another run"),
        ("renamed step", "model_00015.pt is of step 10"),
        ("other step's state", "state_00015.pt is of step 10"),
        ("other run's model", "state_00015.pt belongs to another model_00015.pt"),
    ],
)
def test_foreign_checkpoint_is_skipped(finished, other, tmp_path, capsys, case, problem):
    shutil.copytree(finished, tmp_path / "run")
    for path in files_of(tmp_path / "run", 20):
        path.unlink()
    ours, theirs, earlier = files_of(tmp_path / "run", 15), files_of(other, 15), files_of(tmp_path / "run", 10)
    sources = {
        "other run": theirs,
        "other run, new seal": theirs[:2],
        "renamed step": earlier[:2],
        "other step's state": (ours.model, earlier.state),
        "other run's model": (theirs.model, ours.state),
    }[case]
    for source, path in zip(sources, ours, strict=False):
        if source != path:
            shutil.copy(source, path)
    if len(sources) == 2:
        seal(tmp_path / "run", 15)
    assert problem in find_problem(tmp_path / "run", 15)
    assert checkpoint.load_model(str(tmp_path / "run"))[0] is not None and problem in capsys.readouterr().err  # other scripts skip it too
    assert resume(tmp_path / "run") == 0 and "skipping the checkpoint of step 15" in capsys.readouterr().err
    assert same_run(tmp_path / "run", finished)


def test_other_runs_checkpoints_are_not_pruned(finished, other, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for path in files_of(tmp_path / "run", 5):
        path.unlink()
    foreign = [shutil.copy(path, tmp_path / "run" / path.name) for path in files_of(other, 5)]
    checkpoint.prune(tmp_path / "run", 1, 20)
    assert checkpoint.sealed_steps(tmp_path / "run") == [5, 20] and all(os.path.exists(path) for path in foreign)


def test_checkpoints_of_older_versions_resume(finished, tmp_path):
    """Seals and states without run and step."""
    shutil.copytree(finished, tmp_path / "run")
    for path in files_of(tmp_path / "run", 20):
        path.unlink()
    for step in (5, 10, 15):
        path = files_of(tmp_path / "run", step).state
        state = torch.load(path, weights_only=True)
        torch.save({key: value for key, value in state.items() if key not in ("run", "step", "model_sha256")}, path)
        seal(tmp_path / "run", step)
    assert newest_step(tmp_path / "run") == 15 and resume(tmp_path / "run") == 0 and same_run(tmp_path / "run", finished)


def test_save_never_replaces_another_runs_checkpoint(finished, other, tmp_path, monkeypatch):
    """The folder changes hands while a checkpoint is being written."""
    shutil.copytree(finished, tmp_path / "run")
    ours = RunFolder(tmp_path / "run")
    ours.begin(json.loads((tmp_path / "run" / RUN).read_text()))
    content, state = checkpoint.load_training(finished, 15)
    before = files_of(other, 15).seal.read_text()
    plain = checkpoint.sha256

    def hash_then_move(path):
        found = plain(path)
        if path.name == "state_00015.pt.tmp":  # only the seal is left to write
            os.rename(tmp_path / "run", tmp_path / "moved")
            shutil.copytree(other, tmp_path / "run")
        return found

    monkeypatch.setattr(checkpoint, "sha256", hash_then_move)
    with pytest.raises(OSError, match="belongs to another run now"):
        checkpoint.write_checkpoint(ours, 15, content, state)
    assert files_of(tmp_path / "run", 15).seal.read_text() == before and find_problem(tmp_path / "run", 15) is None


def pause_while(name: str, go):
    """Makes a launch wait before a function of checkpoint or checks until a file exists, at most a minute."""
    module, deadline = checkpoint if hasattr(checkpoint, name) else checks, time.monotonic() + 60
    plain = getattr(module, name)

    def paused(*args, **how):
        (go.parent / "reached").touch()
        while not go.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return plain(*args, **how)

    setattr(module, name, paused)


def reach(run, folder):
    while not (folder / "reached").exists():
        assert run.processes[0].is_alive(), run.outputs[0][1].read_text()
        time.sleep(0.01)


@pytest.mark.parametrize("what", ["moved", "deleted"])
def test_folder_lost_before_the_first_step_stays_untouched(other, shards, tmp_path, what):
    """The launch still verifies its shards when another run takes the folder's name."""
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--keep", 1]
    first = Forked(tmp_path, "train", *argv, first=partial(pause_while, "check_data", tmp_path / "go"))
    reach(first, tmp_path)
    os.rename(tmp_path / "run", tmp_path / "moved")
    if what == "deleted":
        shutil.rmtree(tmp_path / "moved")
    shutil.copytree(other, tmp_path / "run")
    result = end_pause(first, tmp_path)
    assert result.returncode == 2 and "was moved or deleted while this run was starting" in result.stderr
    assert all((tmp_path / "run" / path.name).read_bytes() == path.read_bytes() for path in other.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("what", ["moved", "deleted"])
def test_folder_lost_in_last_save_is_saved_elsewhere(finished, shards, tmp_path, what):
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run"]
    first = Forked(tmp_path, "train", *argv, first=partial(pause_while, "save_torch", tmp_path / "go"))
    reach(first, tmp_path)
    os.rename(tmp_path / "run", tmp_path / "moved")
    if what == "deleted":
        shutil.rmtree(tmp_path / "moved")
    result = end_pause(first, tmp_path)
    place = tmp_path / "moved" if what == "moved" else next(tmp_path.glob("run-*"))
    assert result.returncode == 1 and f"--resume --out-dir {place}" in result.stderr and "Traceback" not in result.stderr
    assert same_run(place, finished)


def test_deleted_current_folder_is_saved_elsewhere(finished, shards, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    run = RunFolder(Path("."))
    with lock_folder(Path(".")) as run.held:
        run.begin({"id": "ab", "launches": [{"token": "cd"}]})
        shutil.rmtree(tmp_path / "run")
        assert "moved or deleted" in run.problem()
        run.rescue()
    assert run.path == tmp_path / "run-ab" and json.loads((run.path / RUN).read_text())["id"] == "ab"


@pytest.fixture
def held(tmp_path):
    """A run's folder, begun and locked."""
    run = RunFolder(tmp_path / "run")
    with lock_folder(run.path) as run.held:
        run.begin({"id": "ab", "launches": [{"token": "cd"}]})
        yield run


def test_folder_deleted_while_restored(held, tmp_path, monkeypatch):
    """Someone deletes run.json first, and the rest while the run writes it again."""
    (held.path / RUN).unlink()
    plain = held.held.is_here

    def is_here():
        found = plain()
        shutil.rmtree(held.path, ignore_errors=True)
        return found

    monkeypatch.setattr(held.held, "is_here", is_here)
    assert "moved or deleted" in held.problem() and not held.path.exists()
    held.rescue()
    assert held.path == tmp_path / "run-ab" and held.id == "ab"


def test_folder_deleted_after_restored(held, monkeypatch):
    """The rest goes just after run.json was written again."""
    (held.path / RUN).unlink()

    def write_json(path, content):
        shutil.rmtree(held.path)

    monkeypatch.setattr(run_folder, "write_json", write_json)
    held.problem()
    assert "moved or deleted" in held.problem()


def test_full_disk_restores_run_json_later(held, monkeypatch):
    (held.path / RUN).unlink()

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_json", full)
        assert held.problem() == ""
    assert held.problem() == "" and json.loads((held.path / RUN).read_text())["id"] == "ab"


@pytest.mark.parametrize("moved", [False, True])
def test_folder_lost_after_the_seal_is_saved_elsewhere(held, tmp_path, monkeypatch, moved):
    def lose(temporary, path):
        monkeypatch.undo()
        held.path.rename(tmp_path / "moved") if moved else shutil.rmtree(held.path)
        return checkpoint.replace(temporary, path)

    monkeypatch.setattr(checkpoint, "replace", lose)
    saver = checkpoint.Saver(held, 1, background=False)
    saver.save(20, {"model": {}}, {})
    saver.finish()
    assert held.path == tmp_path / ("moved" if moved else "run-ab") and find_problem(held.path, 20) is None


def test_link_to_a_missing_disk_is_an_error(tmp_path):
    """lock_folder must not wait for it."""
    (tmp_path / "log").symlink_to(tmp_path / "unmounted")
    with pytest.raises(FileExistsError), lock_folder(tmp_path / "log" / "run"):
        pass


# ---- preparations of shards ----


@pytest.mark.parametrize("what", ["moved", "deleted"])
def test_preparation_never_writes_into_anothers_folder(tmp_path, monkeypatch, what):
    """Another preparation's shards lie under the name when the first one writes its second shard."""
    (tmp_path / "text.txt").write_text("one two three four five " * 20)
    settings = dict(tokenizer="bytes", out_dir=str(tmp_path / "out"), shard_size=50, workers=1)
    config = fineweb.PrepareConfig((str(tmp_path / "text.txt"),), **settings)
    plain, written = fineweb.write_shard, []

    def write_shard(path, tokens):
        written.append(path)
        entry = plain(path, tokens)
        if len(written) == 1:
            os.rename(tmp_path / "out", tmp_path / "moved")
            write_shards(tmp_path / "out", [50, 50, 50])
            if what == "deleted":
                shutil.rmtree(tmp_path / "moved")
        return entry

    monkeypatch.setattr(fineweb, "write_shard", write_shard)
    with pytest.raises(ValueError, match="moved to .*/moved: continue there" if what == "moved" else "deleted: run the same command again"):
        fineweb.prepare(config)
    assert len(written) == 1 and not (tmp_path / "out" / "progress.json").exists()
    verify_shards(find_shards(tmp_path / "out"))
    if what == "moved":
        monkeypatch.undo()
        fineweb.prepare(replace(config, out_dir=str(tmp_path / "moved")))
        assert len(find_shards(tmp_path / "moved").entries) == 10


# ---- the log ----


def test_torn_line_is_ended_before_the_next(tmp_path):
    """A kill within a write leaves "1". The next launch logs step 15, which must not become step 115."""
    log = tmp_path / "log.txt"
    log.write_text("0 train 5.0\n1")
    append(log, "15 train 4.0\n")
    append(log, "16 train 3.0\n")
    assert log.read_text() == "0 train 5.0\n1\n15 train 4.0\n16 train 3.0\n"


def test_log_is_on_disk_before_its_checkpoint(shards, tmp_path, monkeypatch):
    calls, plain = [], os.fsync

    def fsync(handle):
        calls.append(os.readlink(f"/proc/self/fd/{handle}").rsplit("/", 1)[1])
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    assert run_train(shards, tmp_path / "run", "--max-steps", 2) == 0
    seal = calls.index("model_00002.json.tmp")
    assert {"log.txt", "metrics.jsonl"} <= set(calls[:seal])


def test_resume_says_which_steps_it_repeats(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    for path in files_of(tmp_path / "run", 20):
        path.unlink()
    assert resume(tmp_path / "run") == 0
    assert "resuming from the checkpoint of step 15; repeating steps 15 to 19, logged after it" in capsys.readouterr().err


@pytest.mark.parametrize("at", [5, None])
def test_failed_prune_is_no_failed_save(finished, tmp_path, monkeypatch, capsys, shards, at):
    def prune(folder, keep, *spared):
        if at is None or at in spared:
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "prune", prune)
    assert run_train(shards, tmp_path / "run", "--checkpoint-every", 5) == 0
    assert "step 5 is saved, but older ones could not be deleted" in capsys.readouterr().err
    assert newest_step(tmp_path / "run") == 20


# ---- locks ----


def test_lock_follows_a_moved_folder(tmp_path):
    with lock_folder(tmp_path / "a") as held:
        os.rename(tmp_path / "a", tmp_path / "b")
        assert not held.is_here() and held.whereabouts() == tmp_path / "b"
        with pytest.raises(ValueError, match="another process is writing into"), lock_folder(tmp_path / "b"):
            pass
        with lock_folder(tmp_path / "a"):  # a new folder of the old name
            pass
        shutil.rmtree(tmp_path / "b")
        assert held.whereabouts() is None


def test_waiting_lock_survives_a_deleted_folder(tmp_path):
    """The first holder's new, empty folder is deleted at its end, while the second one waits for the lock."""
    order = []

    def second():
        with lock_folder(tmp_path / "a", wait=True) as held:
            order.append("second" if held.is_here() else "lost")

    with lock_folder(tmp_path / "a"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_folder_without_locks_still_works(tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with lock_folder(tmp_path / "a") as held:
        assert isinstance(held, HeldFolder)
    assert "without locks: start only one process in it" in capsys.readouterr().err


@pytest.mark.slow
def test_folders_deleted_under_lock_block_nobody(tmp_path):
    """Twelve threads stand for launches that wait for the same downloads. Each lock is on a folder that its holder deletes."""
    made = []

    def download(number: int):
        with lock_folder(tmp_path / f"{number}.part", wait=True) as held:
            if not (tmp_path / str(number)).exists():
                made.append(number)
                (held.path / "part").write_text("x")
                (held.path / "part").rename(tmp_path / str(number))
                shutil.rmtree(held.path)

    threads = [threading.Thread(target=lambda: [download(number) for number in range(40)], daemon=True) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads) and sorted(made) == list(range(40))
