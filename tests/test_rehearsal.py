"""--rehearse finds what would break a run, says what the run will cost, and changes nothing."""

import errno
import json
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, Forked, make_tasks, run_train, script
from made_up_tasks import write_tasks
from test_remote import FAULTS, SECRET, bucket, quick, server  # noqa: F401  (fixtures)
from torch.distributed import TCPStore

import checkpoint
from common.remote import Remote
from training import cost, evaluation, measuring, rehearsal
from training.config import TrainConfig
from training.rehearsal import check_disk, scratch, slow_ranks
from training.saving import Checkpoints
from training.trainer import Trainer

SAVES = ["--checkpoint-every", 5, "--keep", 2]


def contents(folder: Path) -> dict:
    """Each file below a folder, with its bytes and the time of its last change; each folder with its time."""
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in [folder, *folder.rglob("*")]}


def briefly():
    """Measures less exactly, so that tests are short."""
    torch.set_num_threads(1)
    measuring.STEPS_TAKE, measuring.EVALUATION_TAKES, rehearsal.LEFT = 0.05, 0.01, 0.5
    rehearsal.PRODUCTS_TAKE = 0.02


@pytest.fixture
def brief(monkeypatch):
    for module, name in (
        (measuring, "STEPS_TAKE"),
        (measuring, "EVALUATION_TAKES"),
        (rehearsal, "LEFT"),
        (rehearsal, "PRODUCTS_TAKE"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in this process has set its own
    briefly()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tried(brief, shards, tmp_path, capsys):
    """Rehearses a tiny run in this process. Returns the exit status and what it printed."""

    def rehearse(*argv, data=shards, out=tmp_path / "run") -> tuple[int, str]:
        capsys.readouterr()
        status = run_train(data, out, "--rehearse", *argv)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out + err

    return rehearse


def states(text: str) -> dict[str, str]:
    """Check → ok or WRONG, from the lines of a rehearsal."""
    return dict(re.findall(r"^(\S+) +(ok|WRONG) ", text, re.M))


ALL = ["ranks", "speed", "links", "shards", "start", "tasks", "steps", "validation", "memory", "save", "disk", "resume"]

# ---- a run that will work ----


@pytest.mark.slow
def test_rehearsal_changes_nothing(tried, shards, tmp_path):
    (tmp_path / "other").write_text("mine")
    before = contents(tmp_path)
    status, text = tried("--price", 3, *SAVES)
    assert status == 0 and states(text) == dict.fromkeys(ALL, "ok"), text
    assert contents(tmp_path) == before | {tmp_path: contents(tmp_path)[tmp_path]}  # its time has changed
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"^in all +[\d.]+ (?:s|min), [\d.]+ \$ at 3 \$ per GPU and hour$", text, re.M) and text.endswith(
        "wrong        nothing\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--ema", 0.9, "--optimizer", "muon"], ["--max-seconds", 1000]], ids=str)
def test_rehearsed_resume_changes_nothing(tried, shards, tmp_path, flags):
    assert run_train(shards, tmp_path / "run", *SAVES, *flags) == 0
    status, text = tried("--resume")
    assert status == 2 and "the run in" in text and "is finished, at step 20: raise --max-steps" in text
    (tmp_path / "run" / "model_00025.pt.tmp").write_bytes(b"half")  # of a save that is running or was killed
    before = contents(tmp_path / "run")
    status, text = tried("--resume", "--max-steps", 30)
    assert status == 0 and states(text) == dict.fromkeys(ALL, "ok"), text
    assert "10 steps of 256 tokens" in text and contents(tmp_path / "run") == before and os.listdir(tmp_path) == ["run"]
    assert tried()[0] == 2 and contents(tmp_path / "run") == before  # without --resume: the run would refuse it, too
    assert run_train(shards, tmp_path / "run", "--resume", "--max-steps", 30) == 0


@pytest.mark.slow
def test_page_counts_what_the_run_does(tried, shards, tmp_path, monkeypatch):
    """Evaluations of all kinds, saves and steps. Their seconds are those of slow ones."""
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in make_tasks(40)))
    write_tasks(tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--hellaswag-every", 8, "--hellaswag-file", "tasks.jsonl", "--eval-every", 7, "--eval-tasks", "lambada=lambada_test.jsonl"]
    flags += ["--sample-every", 6, "--sample-tokens", 3, "--checkpoint-every", 9, "--checkpoint-minutes", 0, "--seq-len", 64]
    counted = {}

    def slowly(owner, name, key):
        plain = getattr(owner, name)

        def slow(*args, **how):
            counted[key] = counted.get(key, 0) + 1
            time.sleep(0.05)
            return plain(*args, **how)

        monkeypatch.setattr(owner, name, slow)

    for owner, name, key in (
        (Trainer, "update", "training steps"),
        (evaluation, "validate", "validation"),
        (evaluation.Evaluation, "hellaswag", "HellaSwag"),
        (evaluation.Evaluation, "evaluate", "--eval-tasks"),
        (evaluation.Evaluation, "sample", "samples"),
        (Checkpoints, "save", "saves"),
    ):
        slowly(owner, name, key)
    monkeypatch.setattr(measuring, "EVALUATION_TAKES", 10)  # all of each
    status, text = tried(*flags)
    assert status == 0, text
    counted.clear()
    assert run_train(shards, tmp_path / "run", *flags) == 0
    found = re.findall(r"^(\S.*?) +([\d,]+) +([\d.e-]+) +[\d.]+ (?:s|min) +[\d.]+%", text, re.M)
    assert {name: int(times) for name, times, _ in found if name in counted} == counted
    assert all(0.05 <= float(each) < 2 for name, _, each in found if name in counted), text


@pytest.mark.slow
def test_two_processes_under_torchrun(shards, tmp_path):
    """All of it, with the real durations. torchrun's failed.txt of an earlier launch stays."""
    (tmp_path / "failed.txt").write_text("why\n")
    result = script("train.py", *TINY, "--data-dir", shards, "--out-dir", tmp_path, "--rehearse", processes=2, timeout=200)
    assert result.returncode == 0, result.stderr
    assert states(result.stdout) == dict.fromkeys(ALL, "ok") and "ranks        ok     2 of 2" in result.stdout, result.stdout
    assert os.listdir(tmp_path) == ["failed.txt"] and (tmp_path / "failed.txt").read_text() == "why\n"


# ---- what it finds ----


@pytest.mark.slow  # a second
def test_missing_rank_is_named(tried, monkeypatch):
    torchrun = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": torchrun.port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    status, text = tried("--timeout-minutes", 0.01)
    assert status == 2 and "error: not all ranks came within 1 s: rank 0 waited too long for ranks 1: start all hosts" in text


def failing_rank(how: str):
    """In rank 1's third step, memory runs out, or the kernel kills it."""
    briefly()
    plain = Trainer.update

    def update(self, step, **asked):
        if step == 2 and self.world.rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return plain(self, step, **asked)

    Trainer.update = update


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("killed", "wrong        ranks: rank 1 died or hangs"),
        ("memory", "Tried to allocate 20.00 GiB): --micro-batch-size 2 fits by calculation, on rank 1"),
    ],
)
def test_rank_that_fails_alone_is_named(shards, tmp_path, how, says):
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--rehearse"]
    running = Forked(tmp_path, "train", *argv, processes=2, first=partial(failing_rank, how))
    result = running.wait()
    assert running.processes[0].exitcode == 2 and says in result.stdout, result
    assert "Traceback" not in result.stderr and not [path for path in tmp_path.iterdir() if "rehearsal" in path.name]


@pytest.mark.slow
def test_batch_that_does_not_fit(tried, tmp_path, monkeypatch):
    def update(self, *args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")

    monkeypatch.setattr(Trainer, "update", update)
    status, text = tried()
    assert status == 2 and os.listdir(tmp_path) == []
    assert "memory       WRONG  out of memory (CUDA out of memory. Tried to allocate 20.00 GiB): --micro-batch-size 2 fits" in text
    status, text = tried("--micro-batch-size", 1)
    assert "GiB): lower --activation-memory" in text


@pytest.mark.slow
def test_damaged_shard_is_found(tried, shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "shards")
    path = copy / "tiny_train_000001.npy"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    status, text = tried(data=copy)
    wrong = f"shards: shard {path} is damaged (its sha256 is not the manifest's)"
    assert status == 2 and states(text) == dict.fromkeys(ALL, "ok") | {"shards": "WRONG"} and f"\nwrong        {wrong}" in text
    path.unlink()
    status, text = tried(data=copy)
    assert status == 2 and "is missing: copy it back" in text and states(text)["start"] == "WRONG" and "steps" not in states(text)


@pytest.mark.slow
def test_missing_shards_are_found(tried, tmp_path):
    status, text = tried(data=tmp_path / "none")
    assert status == 2 and "does not exist; make it: python fineweb.py" in text
    assert states(text) == {"ranks": "ok", "speed": "ok", "links": "ok", "shards": "WRONG"}


@pytest.mark.slow
def test_missing_tasks_are_found(tried, tmp_path):
    status, text = tried("--eval-every", 5, "--eval-tasks", "lambada=none.jsonl")
    assert (
        status == 2 and states(text) == dict.fromkeys(ALL, "ok") | {"tasks": "WRONG"} and "wrong        tasks: no file none.jsonl" in text
    )
    (tmp_path / "tasks.jsonl").write_text("nothing\n")
    status, text = tried("--hellaswag-every", 5, "--hellaswag-file", tmp_path / "tasks.jsonl")
    assert status == 2 and "wrong        tasks: no HellaSwag in this run" in text and states(text)["steps"] == "ok"


@pytest.mark.slow
def test_full_disk_is_found(tried, tmp_path, monkeypatch):
    def save_torch(content, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    plain = checkpoint.save_torch
    monkeypatch.setattr(checkpoint, "save_torch", save_torch)
    status, text = tried("--remote", f"file://{tmp_path}/bucket")
    assert status == 2 and "save         WRONG  could not save the checkpoint" in text and "free some space" in text
    assert states(text)["remote"] == "ok" and "resume" not in states(text) and os.listdir(tmp_path) == []
    monkeypatch.setattr(checkpoint, "save_torch", plain)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    status, text = tried()
    assert status == 2 and "or lower --keep" in text and states(text) == dict.fromkeys(ALL, "ok") | {"disk": "WRONG"}


@pytest.mark.slow
def test_resume_with_another_loss_is_found(tried, monkeypatch):
    plain = Checkpoints.load_weights

    def load_weights(self, full):
        plain(self, full | {"transformer.wpe.weight": full["transformer.wpe.weight"] * 1.01})

    monkeypatch.setattr(Checkpoints, "load_weights", load_weights)
    status, text = tried()
    assert status == 2 and states(text)["resume"] == "WRONG" and "and after a resume" in text


def test_slow_card_is_named():
    fast, slow, dtype = (600e12, "NVIDIA H100 80GB HBM3", "host1"), (300e12, "NVIDIA H100 80GB HBM3", "host2"), torch.bfloat16
    assert slow_ranks([fast] * 8, dtype, "cuda") == []
    [line] = slow_ranks([*[fast] * 7, slow], dtype, "cuda")
    assert line.startswith("rank 7, NVIDIA H100 80GB HBM3 on host2, reaches 300 TFLOP/s, the median is 600: look for")
    assert ["30% of the H100's peak" in line for line in slow_ranks([slow] * 2, dtype, "cuda")] == [True, True]
    assert slow_ranks([(1e12, "AMD EPYC", "host"), (0.6e12, "AMD EPYC", "host")], dtype, "cpu") == []


@pytest.mark.parametrize(("seconds", "text"), [(7.66, "7.7 s"), (119, "119.0 s"), (271, "4.5 min"), (44100, "12.25 hours")])
def test_times_are_as_people_read_them(seconds, text):
    assert cost.duration(seconds) == text


def test_disk_counts_what_is_still_to_come(tmp_path, monkeypatch):
    """100 bytes are free. The resumed run has a checkpoint of 30; shards of 20 are still to come."""
    out, folder = tmp_path / "run", tmp_path / "rehearsal"
    for each in (out, folder):
        each.mkdir()
    (out / "model_00005.pt").write_bytes(bytes(30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))

    def fits(need: int, keep: int, coming: int) -> bool:
        shards = SimpleNamespace(missing_bytes=lambda: coming, folder=folder)
        try:
            return bool(check_disk(TrainConfig(out_dir=str(out), keep=keep), folder, need, shards))
        except ValueError as e:
            assert "or lower --keep" in str(e)
            return False

    assert fits(130, 3, 0) and not fits(131, 3, 0)
    assert fits(100, 0, 0) and not fits(101, 0, 0)  # --keep 0 deletes nothing
    assert fits(110, 3, 20) and not fits(111, 3, 20)


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a second disk")
def test_temporary_folder_is_on_the_runs_disk(tmp_path):
    for out_dir, parent in ((tmp_path / "log" / "run", tmp_path), (Path("/dev/shm/run"), "/dev/shm"), (Path("/dev/shm"), "/dev/shm")):
        with scratch(out_dir) as folder:
            assert folder.parent == Path(parent)
        assert not folder.exists() and not (tmp_path / "log").exists()


# ---- the bucket ----


@pytest.mark.slow
def test_bucket_that_refuses_is_found(tried, request):
    url = request.getfixturevalue("bucket")
    request.getfixturevalue("server").fault = FAULTS["refused"]
    status, text = tried("--remote", url)
    assert status == 2 and states(text) == dict.fromkeys(ALL, "ok") | {"remote": "WRONG"} and SECRET not in text
    assert re.search(r"^wrong        remote: s3://bucket/\S+ refuses access .*check your credentials", text, re.M), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bucket", "folder"])
def test_rehearsal_leaves_the_bucket_alone(tried, shards, tmp_path, request, kind):
    url = request.getfixturevalue("bucket") if kind == "bucket" else f"file://{tmp_path}/bucket"
    run = tmp_path / "run"

    def objects() -> dict:
        remote = Remote(url)
        return {name: remote.fs.cat_file(name) for name in remote.fs.find(remote.root)} if remote.exists() else {}

    status, text = tried("--remote", url)
    assert status == 0 and states(text) == dict.fromkeys([*ALL, "remote"], "ok") and objects() == {} and os.listdir(tmp_path) == []
    assert run_train(shards, run, *SAVES, "--remote", url) == 0
    before, files = objects(), contents(run)
    status, text = tried("--resume", "--max-steps", 30)
    assert status == 0 and states(text)["remote"] == "ok" and "last upload" in text
    status, text = tried("--remote", url, out=tmp_path / "other")
    assert status == 2 and "has a run already: add --resume" in text
    status, text = tried("--remote", url, "--resume", out=tmp_path / "empty")
    assert status == 2 and "--rehearse does not download it" in text
    assert objects() == before and contents(run) == files and os.listdir(tmp_path) == (["bucket", "run"] if kind == "folder" else ["run"])


# ---- stopped in the middle ----


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", ["update", "put"])
def test_stopped_rehearsal_leaves_nothing(tried, tmp_path, monkeypatch, number, status, where):
    owner = Trainer if where == "update" else Remote
    plain = getattr(owner, where)

    def stopped(self, *args, **how):
        result = plain(self, *args, **how)
        os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(owner, where, stopped)
    assert tried("--remote", f"file://{tmp_path}/bucket")[0] == status and os.listdir(tmp_path) == []


@pytest.mark.slow  # half a second each
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--replay-step", 3], "--rehearse and --replay-step don't work together"),
        (["--micro-batch-size", 3], "does not divide --total-batch-tokens"),
        (["--resume"], "there is no run in"),
        (["--remote", "s3:/bucket"], "--remote needs a URL"),
    ],
)
def test_wrong_flags_are_one_line(tried, tmp_path, flags, says):
    status, text = tried(*flags)
    assert status == 2 and says in text and os.listdir(tmp_path) == []
