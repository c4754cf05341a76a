"""--remote: a run that loses its disk continues from a bucket and ends with the same bits; the bucket may fail in any way."""

import errno
import hashlib
import importlib
import io
import itertools
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import THOROUGH, TINY, Forked, forked, read_stream, run_main, run_train

import checkpoint
import train
from checkpoint import Saver, files_of, find_problem, newest_step, sealed_steps
from common import cli, remote
from common.files import append, read_json, write_json
from common.remote import Remote, explain
from common.run_folder import RunFolder
from training import lease, mirror
from training.bucket import Bucket, fetch_newest, prune
from training.config import TrainConfig
from training.lease import Lease, LeaseLost
from training.rehearsal import exchange
from training.run_json import read_run
from training.stop import StopSignal
from training.trainer import Trainer

SECRET = "sesame0123456789"
RUN = ["--checkpoint-every", 5, "--keep", 2]


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_train(shards, run, *RUN) == 0
    return run


def assert_same(run: Path, reference: Path, step: int = 20):
    """The same weights at the end, bit for bit, and the same losses of every step."""
    ours, theirs = (torch.load(folder / f"model_{step:05d}.pt", weights_only=True) for folder in (run, reference))
    assert all(torch.equal(ours["model"][name], p) for name, p in theirs["model"].items()) and ours["val_loss"] == theirs["val_loss"]
    assert find_problem(run, step) is None
    for stream in ("train", "val"):
        assert read_stream(run, stream) == read_stream(reference, stream)


def quickly():
    """Makes leases and pauses short, so that tests are."""
    lease.EVERY, lease.SETTLE, mirror.PAUSES = 0.3, 0.1, (0.05, 0.2)


@pytest.fixture
def quick(monkeypatch):
    for module, name in ((lease, "EVERY"), (lease, "SETTLE"), (mirror, "PAUSES")):
        monkeypatch.setattr(module, name, getattr(module, name))
    quickly()


# ---- a real S3 server, with faults ----


class Faulty:
    """Moto's S3 server. `fault` may answer a request itself, or change it."""

    def __init__(self, app):
        self.app, self.fault = app, None

    def __call__(self, environ, start_response):
        environ["fault"] = lambda: self.fault
        answer = self.fault(environ, start_response) if self.fault else None
        return self.app(environ, start_response) if answer is None else answer


def answers(status: str, code: str):
    def fault(environ, start_response):
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(status, [("Content-Type", "application/xml")])
        return [f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()]

    return fault


def gone(environ, start_response):
    """Closes the connection, as if nobody were there."""
    environ["werkzeug.socket"].close()
    raise ConnectionResetError


def cut_off(environ, start_response):
    """Closes the connection in the middle of an upload or of a listing."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
    gone(environ, start_response)


def wrong_bytes(environ, start_response):
    """Changes a byte of each upload, as if the sender's checksum had been made of these."""
    body = bytearray(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
    if environ["REQUEST_METHOD"] == "PUT" and body:
        body[len(body) // 2] ^= 1
    for name in [name for name in environ if "CHECKSUM" in name or name == "HTTP_CONTENT_MD5"]:
        del environ[name]
    environ["wsgi.input"] = io.BytesIO(bytes(body))


def half(environ, start_response):
    """Keeps only half of each upload, and says that all is well."""
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    if environ["REQUEST_METHOD"] == "PUT":
        for name in [name for name in environ if "CHECKSUM" in name or name == "HTTP_CONTENT_MD5"]:
            del environ[name]
        body = body[: len(body) // 2]
        environ["CONTENT_LENGTH"] = str(len(body))
    environ["wsgi.input"] = io.BytesIO(body)


def slow(environ, start_response):
    time.sleep(0.3)


def silent(environ, start_response):
    """Answers nothing while the fault lasts."""
    while environ["fault"]() is silent:
        time.sleep(0.01)


FAULTS = {
    "busy": answers("503 Slow Down", "SlowDown"),
    "broken": answers("500 Internal Server Error", "InternalError"),
    "refused": answers("403 Forbidden", "AccessDenied"),
    "full": answers("507 Insufficient Storage", "XMinioStorageFull"),
    "no bucket": answers("404 Not Found", "NoSuchBucket"),
    "gone": gone,
    "cut off": cut_off,
    "wrong bytes": wrong_bytes,
    "half": half,
    "slow": slow,
    "silent": silent,
}


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log(self, *args):
            pass

    app = Faulty(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Silent)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    app.env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{http.server_port}",
        "AWS_ACCESS_KEY_ID": "AKIAABCDEFGHIJKLMNOP",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    yield app
    http.shutdown()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path, quick):
    """The URL of an empty folder in a bucket."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    server.fault = None
    remote = Remote("s3://bucket/" + tmp_path.name)
    remote.fs.makedirs("bucket", exist_ok=True)
    yield remote.url
    server.fault = None


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_training_ends_while_the_bucket_fails(undisturbed, shards, tmp_path, bucket, server, monkeypatch, capsys, name):
    """The fault begins at step 3 and ends when training has. Then everything arrives."""
    update, end, seen, quiet = Trainer.update, mirror.Mirror.end, [], name in ("slow", "silent")

    def broken_update(self, step, **how):
        server.fault = FAULTS[name] if step >= 3 else None
        return update(self, step, **how)

    def mended_end(self, wait, stopping=False):
        deadline = time.monotonic() + 90
        while not quiet and not self.health.problems and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append((read_stream(tmp_path / "run", "train"), self.sent))
        server.fault = None
        return end(self, wait, stopping)

    monkeypatch.setattr(Trainer, "update", broken_update)
    monkeypatch.setattr(mirror.Mirror, "end", mended_end)
    assert run_train(shards, tmp_path / "run", *RUN, "--remote", bucket) == 0
    err = capsys.readouterr().err
    losses, sent = seen[0]
    assert len(losses) == 20 and (sent is None or sent.step != 20)
    assert err.count("training continues") == (not quiet), err
    assert err.count("waiting until") == err.count("everything is in s3://") == 1 and err.count("works again and is up to date") <= 1
    assert err.count("warning") == (not quiet) and SECRET not in err
    shutil.rmtree(tmp_path / "run")
    monkeypatch.undo()
    for key, value in server.env.items():
        monkeypatch.setenv(key, value)
    quickly()
    assert run_train(shards, tmp_path / "run", "--resume", "--remote", bucket) == 0
    assert "finished already, at step 20" in capsys.readouterr().err
    assert_same(tmp_path / "run", undisturbed)
    for path in (tmp_path / "run").iterdir():
        assert SECRET.encode() not in path.read_bytes()


# ---- kills ----


def kill_at_put(number: int, middle: bool):
    """Sends SIGKILL before this launch's upload of this number, or while it runs. Training waits a little in each step, so that the
    launch lives until then."""
    torch.set_num_threads(1)
    quickly()
    put, update, count = Remote.put, Trainer.update, [0]

    def counted(self, source, name, **how):
        count[0] += name != lease.NAME
        if count[0] == number and middle:
            threading.Timer(random.Random(number).uniform(0, 0.02), os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, source, name, **how)

    def slow_update(self, *args, **how):
        time.sleep(0.05)
        return update(self, *args, **how)

    Remote.put, Trainer.update = counted, slow_update


def one_machine(folder: Path, world: int, *argv, first, **env) -> SimpleNamespace:
    """Runs train.py on a machine that is gone once rank 0 is. Returns what Forked.wait returns, with rank 0's exit status."""
    machine = Forked(folder, "train", *argv, processes=world if world > 1 else 0, first=first, **env)
    machine.processes[0].join(60)
    for process in machine.processes[1:] if machine.processes[0].exitcode else []:
        process.kill()
    status, result = machine.processes[0].exitcode, machine.wait()
    return SimpleNamespace(returncode=status, stderr=result.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [[1], [2, 1]], ids=str)
def test_kills_with_wiped_folder_lose_nothing(shards, tmp_path, quick, worlds, request):
    """Each machine loses its disk. The next one has only the bucket, the same command, and perhaps another world size."""
    url = request.getfixturevalue("bucket") if THOROUGH else f"file://{tmp_path}/bucket"
    env = request.getfixturevalue("server").env if THOROUGH else {}
    generator, kills, seen, (wanted, steps) = random.Random(0), 0, [], (50, 120) if THOROUGH else (3, 20)
    assert run_train(shards, tmp_path / "undisturbed", "--max-steps", steps) == 0
    argv = [*TINY, "--data-dir", shards, "--max-steps", steps, "--checkpoint-every", 2, "--keep", 2, "--remote", url, "--resume"]
    for number in range(2 * wanted):
        run, world = tmp_path / str(number), worlds[number % len(worlds)]
        at = generator.randrange(2, 16) if kills < wanted else -1
        result = one_machine(tmp_path, world, *argv, "--out-dir", run, first=partial(kill_at_put, at, generator.random() < 0.5), **env)
        assert "Traceback" not in result.stderr and SECRET not in result.stderr
        seen.append(max((int(found) for found in re.findall(r"resuming from the checkpoint of step (\d+)", result.stderr)), default=0))
        kills += result.returncode == -signal.SIGKILL
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        shutil.rmtree(run)
    assert result.returncode == 0 and seen == sorted(seen) and seen[-1] > 0 and kills == wanted, (seen, kills)
    if worlds == [1]:
        assert_same(run, tmp_path / "undisturbed", steps)
    for stream in ("train", "val"):
        ours, theirs = read_stream(run, stream), read_stream(tmp_path / "undisturbed", stream)
        assert ours.keys() == theirs.keys() and all(abs(float(ours[step]) - float(theirs[step])) <= 1e-5 for step in ours)
    found = Bucket(Remote(url))
    assert [each.step for each in found.checkpoints][-1] == steps and len(found.checkpoints) == 2
    assert sum(len(files) for files in found.files.values()) <= 2 * 4 + 2 * 3  # nothing that dead launches left


@pytest.mark.slow
@pytest.mark.parametrize("failing", range(0, 22, 3 if not THOROUGH else 1))
def test_upload_cut_anywhere_is_never_resumed(undisturbed, tmp_path, monkeypatch, failing):
    """After any number of requests the bucket stops answering for good. What is there then is complete, or doesn't count."""
    shutil.copytree(undisturbed, tmp_path / "run")
    remote, folder = Remote(f"file://{tmp_path}/bucket"), RunFolder(tmp_path / "run")
    sender = mirror.Mirror(remote, folder, replace(read_run(folder.path), keep=1))
    done, plain = [0], type(remote.fs).put_file

    def put_file(fs, source, target, **how):
        plain(fs, source, target, **how)
        count(target)

    def count(target):
        done[0] += 1
        if done[0] > failing:
            if Path(target).exists():
                os.truncate(target, Path(target).stat().st_size // 2)
            raise OSError("gone")

    monkeypatch.setattr(type(remote.fs), "put_file", put_file)
    for name in ("mv", "pipe_file", "rm_file"):
        method = getattr(type(remote.fs), name)
        monkeypatch.setattr(type(remote.fs), name, lambda fs, *args, method=method: (count("/none"), method(fs, *args)))
    for step in (15, 20):
        if not files_of(folder.path, step).seal.exists():
            continue
        sender.saved(step)
        with suppress(ValueError, OSError):
            sender.send()
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    found = Bucket(Remote(remote.url))
    step = fetch_newest(found, tmp_path / "empty", -1, set())
    assert step is None or find_problem(tmp_path / "empty", step) is None
    assert step is not None or not any(path.name.startswith("model_") and path.suffix == ".json" for path in tmp_path.glob("bucket/*/*"))


# ---- whose bucket it is ----


@pytest.fixture(scope="module")
def kept(undisturbed, shards, tmp_path_factory):
    """A finished run's folder, and its bucket. Copy both."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "SETTLE", 0.1)
        assert run_train(shards, folder / "run", *RUN, "--remote", f"file://{folder}/bucket") == 0
    return folder


@pytest.fixture
def copied(kept, tmp_path, quick):
    """A copy of the bucket. Returns its URL."""
    shutil.copytree(kept / "bucket", tmp_path / "bucket")
    return f"file://{tmp_path}/bucket"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != lease.NAME}


def steps_in(url: str) -> list[int]:
    return [each.step for each in Bucket(Remote(url)).checkpoints]


@pytest.mark.slow
def test_bucket_of_another_run_is_refused(copied, shards, tmp_path, capsys):
    before = files_in(tmp_path / "bucket")
    assert run_train(shards, tmp_path / "new", "--remote", copied) == 2
    assert capsys.readouterr().err == f"error: {copied} has a run already: add --resume to continue it, or choose another --remote\n"
    assert not (tmp_path / "new").exists()
    assert run_train(shards, tmp_path / "other", "--max-steps", 2) == 0
    capsys.readouterr()
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "other", "--remote", copied, "--max-steps", 4) == 2
    assert f"{copied} has the run" in (err := capsys.readouterr().err) and err.count("\n") == 1 and "choose another --remote" in err
    assert files_in(tmp_path / "bucket") == before


@pytest.mark.slow
def test_empty_machine_takes_the_settings_of_the_run(copied, tmp_path):
    assert run_main(train.main, "--resume", "--remote", copied, "--out-dir", tmp_path / "empty", "--max-steps", 30) == 0
    assert steps_in(copied) == [25, 30] and read_run(tmp_path / "empty").keep == 2


@pytest.mark.parametrize("flags", [[], ["--resume"]], ids=str)
@pytest.mark.parametrize("name", ["model_00020.pt", "config.json", "model-00001-of-00002.safetensors"])
def test_files_of_others_are_left_alone(shards, tmp_path, capsys, name, flags):
    out = tmp_path / "run"
    out.mkdir()
    for each in (name, "model_00007.pt.tmp"):
        (out / each).write_bytes(b"not ours")
    assert run_train(shards, out, *flags, "--remote", f"file://{tmp_path}/bucket") == 2
    assert "holds a run or a model already" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} - {".lock"} == {name, "model_00007.pt.tmp"} and not (tmp_path / "bucket").exists()


@pytest.mark.parametrize("text", ["not json", "[" * 200_000, "{}", None])
def test_damaged_run_json_never_starts_over(tmp_path, capsys, text):
    """A launch's run.json is damaged or gone. Its checkpoints are reported, and other launches still count."""
    launch, remote = tmp_path / "bucket/launch-0123456789abcdef", Remote(f"file://{tmp_path}/bucket")
    launch.mkdir(parents=True)
    (launch / "model_00005.json").write_text("{}")
    if text is not None:
        (launch / "run.json").write_text(text)
    with pytest.raises(ValueError, match="launch-0123456789abcdef/run.json is missing or damaged: restore it"):
        mirror.fetch(remote, tmp_path, True, -1, set())
    with pytest.raises(ValueError, match="is missing or damaged"):
        exchange(TrainConfig(remote=remote.url, out_dir=str(tmp_path / "run")), None)
    (tmp_path / "bucket/launch-00000000000000ff").mkdir()
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "bucket/launch-00000000000000ff/run.json", {"id": "ab", "launches": []})
    (tmp_path / "bucket/launch-00000000000000ff/model_00007.json").write_text("{}")  # a seal that fits no files
    reported = set()
    for warnings in (2, 0):
        with pytest.raises(ValueError, match="has a run already"):
            mirror.fetch(remote, tmp_path, False, -1, reported)
        mirror.fetch(remote, tmp_path / "empty", True, -1, reported)
        assert capsys.readouterr().err.count("warning: ") == warnings


@pytest.mark.slow
def test_resume_may_add_change_and_drop_the_bucket(undisturbed, shards, tmp_path, quick, capsys):
    first, second = f"file://{tmp_path}/first", f"file://{tmp_path}/second"
    resume = partial(run_main, train.main, "--resume", "--out-dir", tmp_path / "run")
    assert run_train(shards, tmp_path / "run", *RUN, "--max-steps", 5) == 0 == resume("--remote", first, "--max-steps", 10)
    assert steps_in(first) == [5, 10] or steps_in(first) == [10]
    assert resume("--remote", second, "--max-steps", 15) == 0 and max(steps_in(first)) == 10 and max(steps_in(second)) == 15
    assert resume("--max-steps", 18) == 0 and max(steps_in(second)) == 18
    assert resume("--remote", "", "--max-steps", 20) == 0 and max(steps_in(second)) == 18
    assert read_run(tmp_path / "run").remote == "" and "warning" not in capsys.readouterr().err


@pytest.mark.slow
def test_newer_folder_is_sent_even_when_finished(undisturbed, kept, copied, tmp_path, capsys):
    """The bucket lost its newest checkpoint."""
    for path in (tmp_path / "bucket").glob("launch-*/*_00020.*"):
        path.unlink()
    shutil.copytree(kept / "run", tmp_path / "run")
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--remote", copied) == 0
    err = capsys.readouterr().err
    assert "finished already, at step 20" in err and max(steps_in(copied)) == 20 and "downloading" not in err
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "empty", "--remote", copied) == 0
    assert_same(tmp_path / "empty", undisturbed)


@pytest.mark.slow
def test_unsent_checkpoint_is_a_failure_with_remedy(undisturbed, shards, tmp_path, monkeypatch, capsys, quick):
    url, put, full = f"file://{tmp_path}/bucket", Remote.put, [True]

    def refuse(self, source, name, **how):
        if full[0] and name.endswith(".pt"):
            raise ValueError(f"{url} is full")
        put(self, source, name, **how)

    monkeypatch.setattr(Remote, "put", refuse)
    monkeypatch.setattr(mirror, "PATIENCE", 0.5)
    assert run_train(shards, tmp_path / "run", *RUN, "--remote", url) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {url} lacks the checkpoint of step 20") and last.endswith(f"--resume --out-dir {tmp_path / 'run'}")
    full[0] = False
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run") == 0 and max(steps_in(url)) == 20
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_damaged_checkpoint_in_bucket_is_skipped(undisturbed, copied, tmp_path, capsys):
    (path,) = (tmp_path / "bucket").glob("launch-*/state_00020.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--remote", copied) == 0
    err = capsys.readouterr().err
    assert err.count("warning: skipping the checkpoint of step 20") == 1 and "its bytes are wrong" in err
    assert "resuming from the checkpoint of step" in err
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_interrupted_download_is_tried_again(undisturbed, copied, tmp_path, monkeypatch):
    get, failed = Remote.get, []

    def cut(self, name, path):
        if name not in failed:
            failed.append(name)
            raise cli.TryAgain("cut off")
        get(self, name, path)

    monkeypatch.setattr(Remote, "get", cut)
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--remote", copied) == 0
    assert len(failed) == 2
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_bucket_of_damaged_checkpoints_never_starts_over(copied, tmp_path, capsys):
    for path in (tmp_path / "bucket").glob("launch-*/state_*.pt"):
        path.write_bytes(bytes(path.stat().st_size))
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--remote", copied) == 2
    assert f"checkpoints in {copied} can be resumed" in capsys.readouterr().err


@pytest.mark.slow
def test_prune_never_deletes_what_is_not_ours(kept, copied, tmp_path):
    (launch,) = (path.name for path in (tmp_path / "bucket").glob("launch-*"))
    run = read_json(tmp_path / "bucket" / launch / "run.json", "")
    foreign, dead = (tmp_path / "bucket" / f"launch-{letter * 16}" for letter in "ab")
    for folder, content in ((foreign, run | {"id": "other"}), (dead, run)):
        shutil.copytree(tmp_path / "bucket" / launch, folder)
        write_json(folder / "run.json", content)
    for name in ("model_00001.pt", "mine.txt", "launch-x/model_00001.pt", f"{dead.name}/mine.txt"):
        (tmp_path / "bucket" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bucket" / name).write_text("not ours")
    (dead / "state_00099.pt.0123abcd.tmp").write_text("of a killed upload")
    before, found = files_in(tmp_path / "bucket"), Bucket(Remote(copied))
    prune(found, run["id"], 1, launch)
    gone = before.keys() - files_in(tmp_path / "bucket").keys()
    others = [name for name in gone if name.split("/")[0] not in (dead.name, launch)]
    assert others == [] and not any(name.endswith("mine.txt") or ("00020" in name and launch in name) for name in gone)
    assert (dead / "mine.txt").exists() and [path.name for path in dead.iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in (tmp_path / "bucket" / launch).glob("*_0*")) == [
        "model_00020.json",
        "model_00020.pt",
        "state_00020.pt",
    ]


# ---- two machines, one run ----


def pause_before_step_3(go: Path):
    """Makes training wait before step 3 until a file exists, at most a minute."""
    quickly()
    plain, deadline = Trainer.update, time.monotonic() + 60

    def update(self, step, *args, **how):
        while step == 3 and not go.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return plain(self, step, *args, **how)

    Trainer.update = update


def begin(folder: Path, shards: Path, url: str, *argv, first=pause_before_step_3, **how) -> Forked:
    """Starts a run that pauses before step 3. Returns once its first checkpoint is in the bucket."""
    argv = [*TINY, "--data-dir", shards, "--out-dir", folder / "run", *RUN, "--checkpoint-every", 2, "--remote", url, *argv]
    run, deadline = Forked(folder, "train", *argv, first=partial(first, folder / "go"), **how), time.monotonic() + 60
    while not list(Path(url[7:]).glob("launch-*/model_00002.json")):
        assert run.processes[0].is_alive() and time.monotonic() < deadline, run.outputs[0][1].read_text()
        time.sleep(0.01)
    return run


@pytest.mark.slow
def test_second_machine_is_refused_until_the_first_ends(undisturbed, shards, tmp_path, quick, capsys):
    url = f"file://{tmp_path}/bucket"
    first = begin(tmp_path, shards, url)
    for _ in range(2):
        assert run_main(train.main, "--resume", "--out-dir", tmp_path / "second", "--remote", url) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("error: another launch, on ") and err.endswith("wait for its end, or stop it there")
    (tmp_path / "go").touch()
    assert first.wait().returncode == 0
    assert_same(tmp_path / "run", undisturbed)
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "second", "--remote", url) == 0
    assert "finished already" in capsys.readouterr().err


def test_lease_taken_during_a_download_is_respected(tmp_path, monkeypatch):
    url = f"file://{tmp_path}/bucket"
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    late = Lease(Remote(url), "late", folders[0])
    late.watch(1.2)  # nobody has it; the download begins
    Lease(Remote(url), "first", folders[1]).acquire()
    with pytest.raises(cli.TryAgain, match="another launch"):
        late.acquire()
    assert Lease(Remote(url), "third", folders[0]).seen["token"] == "first"


def test_machine_that_stands_by_downloads_nothing(tmp_path, monkeypatch):
    renewals = itertools.count()
    lease_of_another = {"token": "other", "host": "there", "every": 0.01}
    monkeypatch.setattr(Lease, "read", lambda self: lease_of_another | {"renewed": next(renewals)})
    monkeypatch.setattr(mirror, "fetch", lambda *args: pytest.fail("it downloads"))
    second = mirror.Mirror(Remote(f"file://{tmp_path}/bucket"), RunFolder(tmp_path), TrainConfig())
    with pytest.raises(cli.TryAgain, match="another launch, on there"):
        second.begin(True)


def pause_and_mark_renewals(go):
    """While the lease is being renewed, there is a file that says so."""
    plain = Lease.renew

    def renew(self):
        mark = go.with_name(f"renewing-{threading.get_ident()}")
        mark.touch()
        try:
            plain(self)
        finally:
            mark.unlink()

    Lease.renew = renew
    pause_before_step_3(go)


def suspend(run: Forked, folder: Path):
    """Stops a process, but not between its look at the lease and its write."""
    while os.kill(run.processes[0].pid, signal.SIGSTOP) or list(folder.glob("renewing-*")):
        os.kill(run.processes[0].pid, signal.SIGCONT)
        time.sleep(0.01)


@pytest.mark.slow
def test_stalled_machine_stops_once_another_took_over(undisturbed, shards, tmp_path, quick, capsys):
    """The first machine is suspended, and wakes up when the second one is at work or has ended."""
    url = f"file://{tmp_path}/bucket"
    first = begin(tmp_path, shards, url, first=pause_and_mark_renewals)
    suspend(first, tmp_path)
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "second", "--remote", url) == 0
    before = files_in(tmp_path / "bucket")
    os.kill(first.processes[0].pid, signal.SIGCONT)
    deadline = time.monotonic() + 30
    while "has taken over the run" not in first.outputs[0][1].read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    result = first.wait()
    assert result.returncode == 143 and result.stderr.count("has taken over the run") == 1 and "all saved; to continue" in result.stderr
    assert files_in(tmp_path / "bucket") == before and newest_step(tmp_path / "run") in (3, 4)
    assert_same(tmp_path / "second", undisturbed)


@pytest.mark.slow
def test_late_upload_replaces_nothing(undisturbed, kept, copied, tmp_path):
    """A machine that was believed dead sends its checkpoint of a step that another one has sent, with other bits, and its log."""
    shutil.copytree(kept / "run", tmp_path / "run")
    (tmp_path / "run" / "log.txt").write_text("0 train 1.0\n")
    before = files_in(tmp_path / "bucket")
    late = mirror.Mirror(Remote(copied), RunFolder(tmp_path / "run"), replace(read_run(tmp_path / "run"), keep=1))
    late.saved(20)
    with pytest.raises(LeaseLost):  # before it deletes anything
        late.send()
    after = files_in(tmp_path / "bucket")
    assert before.items() <= after.items() and len(after) > len(before)


@pytest.mark.slow
def test_lease_is_watched_and_never_dated(tmp_path, quick, monkeypatch):
    url = f"file://{tmp_path}/bucket"
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    first = Lease(Remote(url), "a", folders[0])
    first.acquire()
    Lease(Remote(url), "a2", folders[0]).acquire()  # the first launch's folder, which is locked now: it has ended
    with pytest.raises(LeaseLost, match="has taken over the run in file://"):
        first.renew()
    first.release()
    slept = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: (slept.append(seconds), time.sleep(seconds)))
    monkeypatch.setattr(lease, "time", clock)  # it has no time of day
    second = Lease(Remote(url), "b", folders[1])
    second.acquire()
    assert len(slept) > 2
    second.release()
    slept.clear()
    Lease(Remote(url), "c", folders[2]).acquire()
    assert slept == [0.0]
    (tmp_path / "bucket" / lease.NAME).write_bytes(b"{ damaged")
    Lease(Remote(url), "d", folders[1]).acquire()


def test_release_of_the_lease_is_tried_again(tmp_path, monkeypatch):
    url, write, failures = f"file://{tmp_path}/bucket", Lease.write, iter([OSError("busy"), OSError("busy")])
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    first = Lease(Remote(url), "a", tmp_path)
    first.acquire()

    def fails_twice(self, released=False):
        if error := next(failures, None):
            raise error
        write(self, released)

    monkeypatch.setattr(Lease, "write", fails_twice)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    first.release()
    assert Lease(Remote(url), "b", tmp_path).seen["released"]


# ---- the end that was announced ----


def hold_second_checkpoint(go: Path, seconds: float):
    """Makes each upload of a checkpoint after step 2 take some seconds. The signal comes in step 3."""
    pause_before_step_3(go)
    put = Remote.put

    def slow_put(self, source, name, **how):
        time.sleep(seconds if name.endswith(".pt") and "00002" not in name else 0)
        put(self, source, name, **how)

    Remote.put = slow_put


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "notice", "arrives"), [(0.2, 30, True), (60, 1, False)])
def test_signal_sends_what_fits_into_the_notice(undisturbed, shards, tmp_path, quick, seconds, notice, arrives):
    url = f"file://{tmp_path}/bucket"
    first = partial(hold_second_checkpoint, seconds=seconds)
    run = begin(tmp_path, shards, url, "--notice-seconds", notice, first=first)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    began = time.monotonic()
    (tmp_path / "go").touch()
    result = run.wait()
    assert result.returncode == 143 and time.monotonic() - began < 50 and "Traceback" not in result.stderr
    saved, sent = newest_step(tmp_path / "run"), max(steps_in(url))
    assert saved > 2 and sent == (saved if arrives else 2)
    assert (f"warning: {url} lacks the checkpoint of step {saved}" in result.stderr) == (not arrives), result.stderr
    if arrives:
        assert run_main(train.main, "--resume", "--out-dir", tmp_path / "next", "--remote", url) == 0
        assert_same(tmp_path / "next", undisturbed)


# ---- without it, and what is never told ----


def leave_a_list(path: Path):
    def write():
        names = [name for name in sys.modules if name.partition(".")[0] in ("fsspec", "s3fs", "aiobotocore")]
        path.write_text("\n".join([*names, *(name for thread in threads if "remote" in (name := thread.name) or "fsspec" in name)]))

    threads, plain = set(), Trainer.update

    def update(self, *args, **how):
        threads.update(threading.enumerate())
        return plain(self, *args, **how)

    Trainer.update = update
    finish = train.Log.finish
    train.Log.finish = lambda self: (finish(self), write())


@pytest.mark.slow
def test_without_the_flag_no_import_and_no_thread(shards, tmp_path):
    argv = [*TINY, "--data-dir", shards, "--max-steps", 3, "--out-dir"]
    assert forked(tmp_path, "train", *argv, tmp_path / "run", first=partial(leave_a_list, tmp_path / "list")).returncode == 0
    assert (tmp_path / "list").read_text() == ""
    url = f"file://{tmp_path}/bucket"
    first = partial(leave_a_list, tmp_path / "list")
    assert forked(tmp_path, "train", *argv, tmp_path / "run2", "--remote", url, first=first).returncode == 0
    assert {"fsspec", "--remote: send_all"} <= set((tmp_path / "list").read_text().splitlines())


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("s3://AKIAABCDEFGHIJKLMNOP:sesame0123456789@bucket/run", "contains credentials"),
        ("https://host/run?X-Amz-Signature=sesame0123456789", "contains credentials"),
        ("bucket/run", "needs a URL such as"),
        ("simplecache::s3://bucket/run", "needs a URL such as"),
        ("s3://", "needs a URL such as"),
        ("s3:///run", "needs a URL such as"),
        ("file:///", "needs a URL such as"),
        ("s3://AKIAABCDEFGHIJKLMNOP%3Asesame0123456789@bucket/run", "contains credentials"),
        ("S3://AKIAABCDEFGHIJKLMNOP:sesame0123456789@bucket/run", "contains credentials"),
        ("hf://hf_sesame0123456789@buckets/me", "contains credentials"),
        ("nothing://bucket/run", "create the bucket, or check the URL"),
    ],
)
def test_wrong_urls_are_refused_unseen(shards, tmp_path, capsys, url, error):
    assert run_train(shards, tmp_path / "run", "--remote", url) == 2
    err = capsys.readouterr().err
    assert error in err and err.count("\n") == 1 and SECRET not in err and "AKIA" not in err and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket/run", "hf://buckets/me/run"])
def test_missing_package_is_named(shards, tmp_path, capsys, monkeypatch, url):
    package = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}[url[:2]]
    for name in remote.PACKAGES:  # what other tests have loaded
        monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, name, raising=False)
    for module in (package, f"{package}.core"):
        monkeypatch.setitem(sys.modules, module, None)
    assert run_train(shards, tmp_path / "run", "--remote", url) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"pip install fsspec {package}")


def test_errors_are_one_line_without_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    error = explain("s3://bucket/run", OSError(f"the\nserver says {SECRET} AKIAABCDEFGHIJKLMNOP"))
    assert isinstance(error, cli.TryAgain) and "\n" not in str(error) and SECRET not in str(error) and "AKIA" not in str(error)
    missing = FileNotFoundError("The specified bucket does not exist")
    elsewhere = [NotADirectoryError("/a/file"), OSError(errno.EROFS, "read-only"), OSError("Invalid bucket name"), OSError("(501) when")]
    cases = [(PermissionError(), "check your credentials"), (missing, "create the bucket"), *((e, "check the URL, or") for e in elsewhere)]
    for lasting, remedy in cases:
        error = explain("s3://bucket/run", lasting)
        assert not isinstance(error, cli.TryAgain) and remedy in str(error) and str(error).startswith("s3://bucket/run ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "remedy"), [("refused", "check your credentials"), ("busy", "check the network"), ("none", "create the bucket")]
)
def test_unusable_bucket_ends_the_start(shards, tmp_path, bucket, server, capsys, name, remedy):
    server.fault = FAULTS.get(name)
    url = bucket if name != "none" else "s3://no-such-bucket/run"
    assert run_train(shards, tmp_path / "run", "--remote", url) == 2
    err = capsys.readouterr().err
    assert remedy in err and err.count("\n") == 1 and url in err and SECRET not in err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_large_files_arrive_in_parts_and_are_checked(tmp_path, bucket, monkeypatch):
    """As a file of 124M's checkpoint. S3's hash of it is a hash of hashes; where that is no MD5, the file is read back once."""
    monkeypatch.setattr(remote, "PART", 5 * 2**20)
    store = Remote(bucket)
    plain = store.fs.put_file
    store.fs.put_file = partial(plain, chunksize=5 * 2**20)
    (tmp_path / "large").write_bytes(random.Random(0).randbytes(11 * 2**20))
    opened = []
    store.fs.open = lambda *args, open=store.fs.open, **how: opened.append(args) or open(*args, **how)
    store.put(tmp_path / "large", "a")
    assert store.fs.info(store.place("a"))["ETag"].endswith('-3"') and opened == []
    monkeypatch.setattr(remote, "PART", 6 * 2**20)
    store.put(tmp_path / "large", "b")
    assert len(opened) == 1 and not store.hashes
    store.get("b", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()


# ---- what the sender does first, and what it leaves ----


def sender_of(run: Path, url: str, **changed) -> mirror.Mirror:
    return mirror.Mirror(Remote(url), RunFolder(run), replace(read_run(run), **changed))


@pytest.mark.slow
def test_timed_checkpoints_in_bucket_last_until_the_next(kept, copied, tmp_path, quick):
    """Step 15 was sent as a timed one."""
    (launch,) = (tmp_path / "bucket").glob("launch-*")
    run = read_json(launch / "run.json", "")["id"]
    assert steps_in(copied) == [15, 20]
    seal = launch / "model_00015.json"
    write_json(seal, read_json(seal, "") | {"timed": True})
    shutil.copytree(launch, tmp_path / "bucket" / f"launch-{'a' * 16}")
    for path in launch.glob("*_00020.*"):
        path.unlink()
    prune(Bucket(Remote(copied)), run, 0, launch.name)
    assert [(each.step, each.launch == launch.name) for each in Bucket(Remote(copied)).checkpoints] == [(15, True), (20, False)]
    prune(Bucket(Remote(copied)), run, 0, "none")
    assert steps_in(copied) == [20]


@pytest.mark.slow
def test_checkpoint_on_its_way_is_not_pruned(undisturbed, tmp_path):
    """Else an upload that takes longer than --keep saves would never complete one."""
    shutil.copytree(undisturbed, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    for sending, left in ((15, [15, 20]), (None, [20])):
        folder.mirror = SimpleNamespace(sending=sending)
        Saver(folder, 1, background=False).prune(20)
        assert sealed_steps(folder.path) == left


@pytest.mark.slow
def test_after_a_signal_the_newest_goes_first(undisturbed, tmp_path, monkeypatch, quick):
    """The signal comes while the model of step 15 is on its way, and step 20 is saved."""
    shutil.copytree(undisturbed, tmp_path / "run")
    sender, put, names = sender_of(tmp_path / "run", f"file://{tmp_path}/bucket", keep=1), Remote.put, []

    def noted(self, source, name, **how):
        names.append(name.partition("/")[2])
        put(self, source, name, **how)
        if name.endswith("model_00015.pt"):
            sender.saved(20)
            monkeypatch.setattr(StopSignal, "current", SimpleNamespace(received=15, at=time.monotonic()))

    monkeypatch.setattr(Remote, "put", noted)
    sender.saved(15)
    sender.send()
    sender.send()
    sent = [name for name in names if "_0" in name]
    assert sent == ["model_00015.pt", "model_00020.pt", "state_00020.pt", "model_00020.json"]
    assert (tmp_path / "bucket" / sender.launch / "model_00015.pt").exists()  # there is no time to delete it


@pytest.mark.slow
@pytest.mark.parametrize("when", ["after", "while"])
def test_step_saved_again_is_sent_again(undisturbed, tmp_path, monkeypatch, quick, when):
    """As after an evaluation that the last launch had not made: before the first upload ends, or after it."""
    shutil.copytree(undisturbed, tmp_path / "run")
    content, state = checkpoint.load_training(tmp_path / "run", 20)
    sender, put, saved = sender_of(tmp_path / "run", f"file://{tmp_path}/bucket", keep=1), Remote.put, []

    def save_again():
        saved.append(1)
        owner = {"run": sender.run, "step": 20}
        ours = SimpleNamespace(path=tmp_path / "run", id=owner["run"], check=lambda: None)
        checkpoint.write_checkpoint(ours, 20, content | {"val_loss": 0.125}, state | owner)
        sender.saved(20)

    def noted(self, source, name, **how):
        put(self, source, name, **how)
        if when == "while" and not saved and name.endswith("model_00020.pt"):
            save_again()

    monkeypatch.setattr(Remote, "put", noted)
    sender.saved(20)
    sender.send()
    if when == "after":
        assert sender.wanted == sender.sent
        save_again()
    assert sender.wanted != sender.sent
    sender.send()
    assert sender.wanted == sender.sent
    (tmp_path / "empty").mkdir()
    assert fetch_newest(Bucket(sender.remote), tmp_path / "empty", -1, set()) == 20
    assert checkpoint.load_training(tmp_path / "empty", 20)[0]["val_loss"] == 0.125


@pytest.mark.slow
def test_rescued_run_keeps_its_log(undisturbed, tmp_path):
    """Someone deletes the folder: the new one gets the log from what the bucket has."""
    shutil.copytree(undisturbed, tmp_path / "run")
    sender = sender_of(tmp_path / "run", f"file://{tmp_path}/bucket")
    sender.folder.begin(read_json(tmp_path / "run" / "run.json", ""))
    sender.folder.mirror = sender
    sender.send()
    shutil.rmtree(tmp_path / "run")
    sender.folder.rescue()
    assert sender.folder.path != tmp_path / "run" and read_stream(sender.folder.path, "train") == read_stream(undisturbed, "train")
    append(sender.folder.path / "log.txt", "21 train 1.0\n")
    sender.send()
    sent = (tmp_path / "bucket" / sender.launch / "log.txt").read_text()
    assert sent == (undisturbed / "log.txt").read_text() + "21 train 1.0\n"


@pytest.mark.slow
def test_end_waits_also_after_a_long_failure(undisturbed, tmp_path, monkeypatch, quick):
    sender = sender_of(undisturbed, f"file://{tmp_path}/bucket")
    sender.saved(20)
    began = time.monotonic()
    sender.health.since = began - 10 * mirror.PATIENCE
    monkeypatch.setattr(mirror, "PATIENCE", 0.3)
    sender.wait_until_sent(math.inf)
    assert time.monotonic() - began >= 0.3


@pytest.mark.slow
def test_ctrl_c_ends_the_wait(undisturbed, tmp_path, monkeypatch, quick):
    def interrupted(seconds=None):
        raise KeyboardInterrupt

    sender = sender_of(undisturbed, f"file://{tmp_path}/bucket")
    sender.saved(20)
    sender.threads = [threading.Thread(target=int)]
    sender.threads[0].start()
    monkeypatch.setattr(sender.changed, "wait", interrupted)
    assert "lacks the checkpoint of step 20" in sender.end(wait=True)


def test_own_disk_is_not_called_a_failed_bucket(tmp_path, monkeypatch):
    store = Remote(f"file://{tmp_path}/bucket")

    def full(place, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.fs, "get_file", full)
    with pytest.raises(OSError, match="No space left on device.*file"):
        store.get("a", tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("hashes", [True, False])
def test_upload_with_a_late_answer_is_not_repeated(tmp_path, monkeypatch, hashes):
    """As when S3 takes a minute to put the parts of a large file together. A store that tells no hash gets all again: shards have equal
    sizes."""
    (tmp_path / "file").write_bytes(b"content")
    store, calls = Remote(f"memory://{tmp_path.name}"), []
    plain, plain_info = store.fs.put_file, store.fs.info

    def info(place):
        return plain_info(place) | ({"ETag": hashlib.md5(store.fs.cat_file(place)).hexdigest()} if hashes else {})

    monkeypatch.setattr(store.fs, "info", info)

    def late(source, target):
        calls.append(target)
        plain(source, target)
        raise FileNotFoundError("The specified upload does not exist.")

    monkeypatch.setattr(store.fs, "put_file", late)
    with pytest.raises(cli.TryAgain):
        store.put(tmp_path / "file", "name")
    with suppress(cli.TryAgain):
        store.put(tmp_path / "file", "name")
    assert len(calls) == (1 if hashes else 2) and store.read("name") == b"content"
    for other in (b"CONTENT", b"other content"):
        calls.clear()
        (tmp_path / "file").write_bytes(other)
        with pytest.raises(cli.TryAgain):
            store.put(tmp_path / "file", "name")
        assert len(calls) == 1 and store.read("name") == other


def test_only_launches_are_listed(tmp_path, monkeypatch):
    """A bucket may hold millions of other files."""
    for name in (f"launch-{'a' * 16}", "data", "launch-mine"):
        (tmp_path / name).mkdir()
    (tmp_path / f"launch-{'b' * 16}").write_text("a file")
    listed, plain = [], Remote.list
    monkeypatch.setattr(Remote, "list", lambda self, folder="": listed.append(folder) or plain(self, folder))
    assert Bucket(Remote(f"file://{tmp_path}")).checkpoints == [] and listed == ["", f"launch-{'a' * 16}"]
