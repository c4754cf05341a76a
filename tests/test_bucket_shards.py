"""Shards in a bucket: a run from there equals a run from a folder, whatever happens to bucket, copies and disk; fineweb.py fills it."""

import errno
import os
import random
import shutil
import signal
import threading
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Forked, forked, kill_at_write, run_main, run_train, write_shards
from test_fineweb import bytes_of
from test_remote import assert_same, bucket, gone, quick, server  # noqa: F401

import fineweb
from common import bucket_shards, cli, shard_upload
from common.bucket_shards import BucketShards, Download, Failing, open_shards
from common.files import read_json, write_json
from common.remote import Remote, explain, is_url
from common.shards import MANIFEST, PROGRESS, find_shards
from dataloader import TokenStream
from training.trainer import Trainer

pytestmark = pytest.mark.slow
SIZES = [1000, 5003, 17, 3001, 2500]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"), SIZES)


@pytest.fixture(scope="module")
def local(data, tmp_path_factory) -> Path:
    """A run that read the folder."""
    run = tmp_path_factory.mktemp("local") / "run"
    assert run_train(data, run) == 0
    return run


@pytest.fixture(autouse=True)
def copies(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv(bucket_shards.COPIES, str(tmp_path / "copies"))
    monkeypatch.setattr(bucket_shards, "PAUSES", (0.02, 0.05))
    return tmp_path / "copies"


@pytest.fixture
def url(data, tmp_path) -> str:
    """A bucket with the shards of `data`: a folder, so that a test can damage it."""
    shutil.copytree(data, tmp_path / "bucket" / "tiny")
    return f"file://{tmp_path}/bucket/tiny"


def copied(copies: Path) -> list[str]:
    return sorted(path.name for path in copies.glob("*/*.npy"))


def get_counter(monkeypatch) -> list[str]:
    """Names of the files that Remote.get downloads from now on."""
    names, get = [], Remote.get
    monkeypatch.setattr(Remote, "get", lambda self, name, path: names.append(name) or get(self, name, path))
    return names


def wait_until(holds, seconds: float = 10):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def val_alone(fetch):
    """Makes the download of a train shard wait forever."""
    return lambda self, entry: fetch(self, entry) if "val" in entry["file"] else time.sleep(1e6)


# ---- the same run ----


@pytest.mark.parametrize("how", ["while it downloads", "bucket alone", "copies alone"])
def test_run_from_bucket_equals_run_from_folder(url, local, copies, tmp_path, monkeypatch, capsys, how):
    if how == "bucket alone":
        monkeypatch.setattr(BucketShards, "fetch", val_alone(BucketShards.fetch))
    if how == "copies alone":
        fetch_ahead = BucketShards.fetch_ahead

        def fetch_all(self, needed):
            fetch_ahead(self, needed)
            self.download.wait()

        monkeypatch.setattr(BucketShards, "fetch_ahead", fetch_all)
        monkeypatch.setattr(BucketShards, "read_bucket", lambda self, spans: [] if not spans else 1 / 0)
    assert run_train(url, tmp_path / "run") == 0
    assert_same(tmp_path / "run", local)
    assert read_json(tmp_path / "run" / "run.json", "")["data"] == read_json(local / "run.json", "")["data"]
    wait_until(lambda: len(copied(copies)) == (1 if how == "bucket alone" else len(SIZES)))
    assert f"copies of the shards in {url} are in {copies}" in capsys.readouterr().err


def test_run_from_s3_equals_run_from_folder(bucket, data, local, tmp_path):  # noqa: F811
    store = Remote(bucket)
    for path in data.iterdir():
        store.put(path, path.name)
    assert run_train(bucket, tmp_path / "run") == 0
    assert_same(tmp_path / "run", local)


def test_run_moves_from_folder_to_bucket(url, data, local, tmp_path):
    assert run_train(data, tmp_path / "run", "--max-steps", 20, "--checkpoint-every", 9, "--max-seconds", 0) == 0
    for path in (tmp_path / "run").glob("*_00020*"):
        path.unlink()
    assert run_train(url, tmp_path / "run", "--resume") == 0
    assert_same(tmp_path / "run", local)


def test_two_processes_share_the_copies(url, data, copies, tmp_path):
    argv = [*TINY, "--out-dir"]
    assert forked(tmp_path, "train", *argv, tmp_path / "folder", "--data-dir", data, processes=2).returncode == 0
    how = {"first": partial(count_copies, tmp_path / "made"), bucket_shards.COPIES: copies}
    result = forked(tmp_path, "train", *argv, tmp_path / "run", "--data-dir", url, processes=2, **how)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert_same(tmp_path / "run", tmp_path / "folder")
    names = (tmp_path / "made").read_text().split()
    assert len(names) == len(set(names))


def count_copies(file: Path):
    """Writes the name of each shard that has become a copy into this file. A run may end, and leave its downloads to the others."""
    get, replace = Remote.get, bucket_shards.replace

    def slow_get(self, name, path):
        time.sleep(1)  # so that two launches meet
        get(self, name, path)

    def counted(part, path):
        replace(part, path)
        with open(file, "a") as log:
            log.write(f"{path.name}\n")

    Remote.get, bucket_shards.replace = slow_get, counted


def test_two_launches_share_the_copies(url, local, copies, tmp_path):
    how = {"first": partial(count_copies, tmp_path / "made"), bucket_shards.COPIES: copies}
    runs = [tmp_path / name / "run" for name in "ab"]
    for run in runs:
        run.parent.mkdir()
    launches = [Forked(run.parent, "train", *TINY, "--data-dir", url, "--out-dir", run, **how) for run in runs]
    for launch, run in zip(launches, runs, strict=True):
        assert launch.wait().returncode == 0
        assert_same(run, local)
    names = (tmp_path / "made").read_text().split()
    assert len(names) == len(set(names))


@pytest.mark.parametrize("shuffle", [False, True])
def test_needed_shards_are_those_that_are_read(data, shuffle):
    stream = TokenStream(find_shards(data), "train", 32, shuffle)
    n = stream.sequences_per_epoch
    for first in range(0, 2 * n, 17):
        for end in (first, first + 1, first + 40, first + n, first + 2 * n):
            read = [stream.locate(stream.sequence_at(p) * 32 + i)[0] for p in range(first, end) for i in (0, 16, 32)]
            needed = stream.needed(first, end)
            assert set(read) <= set(needed) and len(needed) == len(set(needed))
            if not shuffle and first % n + end - first <= n:  # within an epoch, in this order; a sequence may cross the short shard 1
                assert [i for i in needed if i != 1] == [i for i in dict.fromkeys(read) if i != 1]
            elif not shuffle:
                assert needed[0] == read[0]


def test_ordered_run_downloads_from_its_position(url, copies, tmp_path):
    flags = ["--no-shuffle", "--checkpoint-every", 10]
    assert run_train(url, tmp_path / "run", *flags, "--max-steps", 19) == 0  # 19 × 256 tokens: all in the first train shard
    wait_until(lambda: len(copied(copies)) == 2)
    shutil.rmtree(copies)
    assert run_train(url, tmp_path / "run", "--resume", "--max-steps", 25) == 0
    wait_until(lambda: copied(copies) == [f"tiny_train_00000{i}.npy" for i in (1, 2, 3)] + ["tiny_val_000000.npy"])


def test_urls_are_told_from_folders():
    assert all(map(is_url, ("s3://bucket/shards", "s3:/bucket/shards", "memory://x", "file:///x")))
    assert not any(map(is_url, ("edu_fineweb10B", "C:/shards", "./a:b", Path("s3"), "/mnt/x://y")))


# ---- damage ----


@pytest.fixture
def mistake(url, tmp_path):
    """Returns a function that makes a user's mistake, and returns the URL to pass."""
    folder = tmp_path / "bucket" / "tiny"

    def make(what: str) -> str:
        if what == "no manifest":
            (folder / MANIFEST).unlink()
        if what == "unfinished":
            (folder / MANIFEST).rename(folder / PROGRESS)
        if what == "broken manifest":
            (folder / MANIFEST).write_text("{")
        if what == "other manifest":
            (folder / MANIFEST).write_text("[]")
        if what == "shard missing":
            (folder / "tiny_train_000003.npy").unlink()
        if what == "shard cut":
            os.truncate(folder / "tiny_train_000003.npy", 1000)
        if what == "shard empty":
            os.truncate(folder / "tiny_train_000003.npy", 0)
        if what == "shard listed twice":
            manifest = read_json(folder / MANIFEST, "")
            write_json(folder / MANIFEST, manifest | {"shards": manifest["shards"] + manifest["shards"][:1]})
        wrong = {"typo": f"{url}s", "scheme": "s4://bucket/tiny", "one slash": "s3:/bucket/tiny", "key": "s3://me:key@bucket/x"}
        return wrong.get(what, url)

    return make


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("typo", "has no manifest.json, nothing is there: check the URL"),
        ("scheme", "Protocol not known: s4"),
        ("one slash", "--data-dir needs a URL such as s3://"),
        ("key", "contains credentials"),
        ("no manifest", "has no manifest.json, it has tiny_train_000001.npy"),
        ("unfinished", "is not finished: run the same fineweb.py command again"),
        ("broken manifest", "manifest.json is not valid JSON"),
        ("other manifest", "manifest.json is not a manifest of shards"),
        ("shard missing", "lacks tiny_train_000003.npy: run the fineweb.py command"),
        ("shard cut", "tiny_train_000003.npy is damaged (its header promises 6,130 bytes, it has 1,000)"),
        ("shard empty", "tiny_train_000003.npy is damaged (it is empty)"),
        ("shard listed twice", "lists a shard twice"),
    ],
)
def test_mistake_ends_in_one_line(mistake, tmp_path, capsys, what, said):
    assert run_train(mistake(what), tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("error: "), err


def test_wrong_shard_in_bucket_ends_the_run(url, copies, tmp_path, monkeypatch, capsys):
    path = tmp_path / "bucket" / "tiny" / "tiny_train_000003.npy"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda self, step, **how: time.sleep(0.05) or update(self, step, **how))
    assert run_train(url, tmp_path / "run") == 2
    err = capsys.readouterr().err.splitlines()
    assert "tiny_train_000003.npy is damaged" in err[-1] and "upload the folder again" in err[-1] and "Traceback" not in "".join(err)
    assert "tiny_train_000003.npy" not in copied(copies)


def test_bytes_unlike_the_copy_end_the_run(url, tmp_path, monkeypatch, capsys):
    ranges, begun = Remote.ranges, []

    def wrong(self, parts):
        found = ranges(self, parts)
        begun.append(parts)
        return [bytes([part[0] ^ 1]) + part[1:] for part in found] if len(begun) > 1 else found  # the first are headers

    def late(self, entry):
        wait_until(lambda: len(begun) > 3 or "val" in entry["file"])
        fetch(self, entry)

    fetch = BucketShards.fetch
    monkeypatch.setattr(Remote, "ranges", wrong)
    monkeypatch.setattr(BucketShards, "fetch", late)
    assert run_train(url, tmp_path / "run", "--max-steps", 200) == 2
    assert "had other bytes when this launch read them than now: delete the checkpoints" in capsys.readouterr().err


def test_other_bytes_are_refused_each_time(url):
    """Also by the next read: the one that reads ahead keeps its errors to itself."""
    source = bucket_shards.open_shards(url)
    shard = source.open("train")[0]
    source.unverified[shard.file] = [(0, 4, 1)]
    source.fetch(source.split("train")[0])
    for other in source.open("train")[:2] * 2:
        with pytest.raises(bucket_shards.Damaged, match="had other bytes when this launch read them"):
            source.read([(other, 0, 4)])


def test_refused_access_is_no_damage(url, monkeypatch):
    source = bucket_shards.open_shards(url)

    def refuse(self, name, path):
        raise explain(url, PermissionError("ExpiredToken"))

    monkeypatch.setattr(Remote, "get", refuse)
    with pytest.raises(ValueError, match="refuses access .* check your credentials") as e:
        source.fetch(source.split("train")[0])
    assert not isinstance(e.value, bucket_shards.Damaged)


def test_cut_download_is_fetched_again(url, local, copies, tmp_path, monkeypatch):
    get, cut = Remote.get, set()

    def cut_once(self, name, path):
        get(self, name, path)
        if name not in cut:
            cut.add(name)
            os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(Remote, "get", cut_once)
    assert run_train(url, tmp_path / "run") == 0
    assert_same(tmp_path / "run", local)
    wait_until(lambda: len(copied(copies)) == len(SIZES))
    assert len(cut) == len(SIZES) and not list(copies.rglob("*.part"))


def test_second_launch_uses_the_copies(url, local, copies, tmp_path, monkeypatch, capsys):
    assert run_train(url, tmp_path / "first") == 0
    wait_until(lambda: len(copied(copies)) == len(SIZES))
    damaged = next(copies.glob("*/tiny_train_000001.npy"))
    data = bytearray(damaged.read_bytes())
    data[500] ^= 1
    damaged.write_bytes(data)
    names = get_counter(monkeypatch)
    capsys.readouterr()
    assert run_train(url, tmp_path / "second") == 0
    assert_same(tmp_path / "second", local)
    wait_until(lambda: names == ["tiny_train_000001.npy"] and damaged.exists())
    assert f"warning: shard {damaged} is damaged (its sha256 is not the manifest's): it is downloaded again" in capsys.readouterr().err
    assert run_train(url, tmp_path / "third") == 0 and names == ["tiny_train_000001.npy"]


def test_other_shards_get_other_copies(url, copies, tmp_path):
    assert run_train(url, tmp_path / "first", "--max-steps", 1) == 0
    write_shards(tmp_path / "bucket" / "tiny", SIZES, seed=1)
    assert run_train(url, tmp_path / "second") == 0
    assert run_train(tmp_path / "bucket" / "tiny", tmp_path / "folder") == 0
    assert_same(tmp_path / "second", tmp_path / "folder")
    assert len(list(copies.iterdir())) == 2


def test_killed_download_leaves_nothing_half(url, local, copies, tmp_path):
    for number in random.Random(0).sample(range(1, 30), 2):
        how = {"first": partial(kill_at_write, copies, number), bucket_shards.COPIES: copies}
        result = forked(tmp_path, "train", *TINY, "--data-dir", url, "--out-dir", tmp_path / "run", **how)
        assert result.returncode in (0, -signal.SIGKILL), result.stderr
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert run_train(url, tmp_path / "run") == 0
    assert_same(tmp_path / "run", local)


# ---- a bucket or a disk that fails ----


@pytest.mark.parametrize("patience", [600.0, 0.1])
def test_step_waits_for_a_failing_bucket(url, local, tmp_path, monkeypatch, capsys, patience):
    ranges, calls = Remote.ranges, []

    def failing(self, parts):
        calls.append(parts)
        if 5 < len(calls) < 12 or (patience < 1 and len(calls) > 5):
            raise cli.TryAgain(f"{self.url} failed (OSError: gone): check the network and the store")
        return ranges(self, parts)

    monkeypatch.setattr(Remote, "ranges", failing)
    monkeypatch.setattr(BucketShards, "fetch", val_alone(BucketShards.fetch))
    monkeypatch.setattr(bucket_shards, "STEP_PATIENCE", patience)
    status, err = run_train(url, tmp_path / "run"), capsys.readouterr().err
    if patience > 1:
        assert status == 0 and err.count("gone") == err.count("training waits for it") == err.count("works again") == 1
        assert_same(tmp_path / "run", local)
    else:
        assert status == 2 and err.splitlines()[-1] == f"error: {url} failed (OSError: gone): check the network and the store"


def test_download_catches_up_after_a_fault(bucket, server, data, local, copies, tmp_path, monkeypatch, capsys):  # noqa: F811
    store, update = Remote(bucket), Trainer.update
    for path in data.iterdir():
        store.put(path, path.name)

    def update_with_fault(self, step, **how):
        server.fault = gone if step == 5 else None if step == 7 else server.fault
        if step == 5:
            threading.Timer(0.5, setattr, (server, "fault", None)).start()
        return update(self, step, **how)

    get = BucketShards.fetch
    monkeypatch.setattr(BucketShards, "fetch", lambda self, entry: ("train" in entry["file"] and time.sleep(0.1)) or get(self, entry))
    monkeypatch.setattr(Trainer, "update", update_with_fault)
    assert run_train(bucket, tmp_path / "run") == 0
    assert_same(tmp_path / "run", local)
    wait_until(lambda: len(copied(copies)) == len(SIZES))
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_ends_a_wait_for_the_bucket(url, copies, tmp_path):
    how = {"first": break_reading, bucket_shards.COPIES: copies}
    launch = Forked(tmp_path, "train", *TINY, "--data-dir", url, "--out-dir", tmp_path / "run", **how)
    wait_until(lambda: "training waits for it" in launch.outputs[0][1].read_text() if launch.outputs[0][1].exists() else False, 30)
    for _ in range(2):  # the first asks for a checkpoint after this step, which can't end
        os.kill(launch.processes[0].pid, signal.SIGINT)
        time.sleep(1.1)
    assert launch.wait(10).returncode == 130


def break_reading():
    def broken(self, parts):
        calls.append(parts)
        if len(calls) > 9:
            raise cli.TryAgain("bucket failed")
        return ranges(self, parts)

    calls, ranges, Remote.ranges, BucketShards.fetch = [], Remote.ranges, broken, val_alone(BucketShards.fetch)


def test_full_disk_ends_in_one_line(url, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 5000))
    assert run_train(url, tmp_path / "run") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in line and bucket_shards.COPIES in line and line.endswith(cli.FULL)


def test_disk_that_fills_up_ends_in_one_line(url, tmp_path, monkeypatch, capsys):
    get = Remote.get

    def full(self, name, path):
        if "train" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        get(self, name, path)

    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda self, step, **how: time.sleep(0.05) or update(self, step, **how))
    monkeypatch.setattr(Remote, "get", full)
    assert run_train(url, tmp_path / "run") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "No space left on device" in line and line.endswith(cli.FULL)


def test_bucket_works_again_once_all_downloads_do(monkeypatch, capsys):
    monkeypatch.setattr(bucket_shards, "PAUSES", (0.0, 0.0))
    failing = Failing("s3://bucket/shards", "the download is tried again")
    for task in ("one", "two"):
        failing.wait(ValueError("it is gone"), task=task)
    failing.over("three")
    failing.over("two")
    assert capsys.readouterr().err == "warning: it is gone; the download is tried again\n"
    failing.over("one")
    assert capsys.readouterr().err == "s3://bucket/shards works again\n"


def test_folder_needs_no_package_and_no_thread(data, tmp_path):
    result = forked(tmp_path, "train", *TINY, "--data-dir", data, "--out-dir", tmp_path / "run", first=forbid_fsspec)
    assert result.returncode == 0, result.stderr


def forbid_fsspec():
    import sys

    sys.modules["fsspec"] = None
    Download.__init__ = Failing.__init__ = None


# ---- fineweb.py ----

STDLIB = ["--dataset", "stdlib", "--tokenizer", "bytes", "--max-tokens", 100_000, "--shard-size", 12_000, "--workers", 1]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Shards that fineweb.py made in a folder."""
    out = tmp_path_factory.mktemp("made") / "std"
    assert run_main(fineweb.main, *STDLIB, "--out-dir", out) == 0
    return out


def uploaded(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in bytes_of(folder).items() if name != ".lock"}


def test_uploaded_shards_equal_those_of_a_folder(bucket, made, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    order, put = [], Remote.put
    monkeypatch.setattr(Remote, "put", lambda self, source, name, **how: order.append(name) or put(self, source, name, **how))
    assert run_main(fineweb.main, *STDLIB, "--out-dir", bucket) == 0
    store = Remote(bucket)
    assert order[-1] == MANIFEST and set(store.list()) == set(uploaded(made))
    for name in uploaded(made):
        store.get(name, tmp_path / "got")
        assert (tmp_path / "got").read_bytes() == (made / name).read_bytes()
    assert "all 9 shards are there" in capsys.readouterr().out
    shards = open_shards(bucket)
    assert np.array_equal(TokenStream(shards, "train", 50).read(0, 5000), TokenStream(find_shards(made), "train", 50).read(0, 5000))
    for folder in (True, False):  # with and without the folder, there is nothing left to do
        assert run_main(fineweb.main, *STDLIB, "--out-dir", bucket) == 0
        assert f"{bucket} is already complete" in capsys.readouterr().out
        if folder:
            shutil.rmtree(tmp_path / tmp_path.name)
    assert not (tmp_path / tmp_path.name).exists()


@pytest.mark.parametrize("wipe", [False, True], ids=["folder kept", "folder wiped"])
def test_killed_upload_continues(made, tmp_path, monkeypatch, wipe):
    monkeypatch.chdir(tmp_path)
    for number in random.Random(1).sample(range(5, 60), 2):
        kill = partial(kill_at_write, tmp_path, number)
        result = forked(tmp_path, "fineweb", *STDLIB, "--out-dir", f"file://{tmp_path}/up/std", first=kill)
        assert result.returncode in (0, -signal.SIGKILL), result.stderr
        complete = (tmp_path / "up/std" / MANIFEST).exists()
        assert not complete or uploaded(made).items() <= uploaded(tmp_path / "up/std").items()
        if wipe:
            shutil.rmtree(tmp_path / "std", ignore_errors=True)
    assert forked(tmp_path, "fineweb", *STDLIB, "--out-dir", f"file://{tmp_path}/up/std").returncode == 0
    found = {name: digest for name, digest in uploaded(tmp_path / "up/std").items() if not name.endswith(".tmp")}
    assert found == uploaded(made)


def test_upload_of_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    url, up = f"file://{tmp_path}/up/std", tmp_path / "up/std"
    assert run_main(fineweb.main, *STDLIB, "--out-dir", url) == 0
    before = uploaded(up)
    other = [*STDLIB, "--max-tokens", 50_000, "--out-dir", url]
    assert run_main(fineweb.main, *other) == 2
    assert "has shards made with other settings (--max-tokens 50000 here, 100000 there)" in capsys.readouterr().err
    write_json(up / PROGRESS, {"settings": read_json(up / MANIFEST, "")["settings"], "shards": []})
    (up / MANIFEST).rename(tmp_path / MANIFEST)
    assert run_main(fineweb.main, *other) == 2
    assert "has an unfinished upload with other settings (--max-tokens 50000 here" in capsys.readouterr().err
    (up / PROGRESS).unlink()
    assert run_main(fineweb.main, *other) == 2
    assert "has shards that this command did not make" in capsys.readouterr().err
    typo = ["--dataset", tmp_path / "text.jsonl", "--tokenizer", "bytes", "--shard-size", 10, "--out-dir", f"file://{tmp_path}/up/typo"]
    (tmp_path / "text.jsonl").write_text('{"body": "some text, and some more of it"}\n')
    assert run_main(fineweb.main, *typo) == 2 and "--text-field" in capsys.readouterr().err
    assert run_main(fineweb.main, *typo, "--text-field", "body") == 0  # nothing had arrived, so a mistake can be corrected
    assert run_main(fineweb.main, *STDLIB, "--part", "1/2", "--out-dir", url) == 2
    assert "--part needs a folder" in capsys.readouterr().err
    (tmp_path / MANIFEST).rename(up / MANIFEST)
    assert uploaded(up) == before


@pytest.mark.parametrize("forever", [False, True])
def test_failing_bucket_delays_only_the_upload(made, tmp_path, monkeypatch, capsys, forever):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shard_upload, "PATIENCE", 0.2)
    put, calls = Remote.put, []

    def failing(self, source, name, **how):
        calls.append(name)
        if len(calls) > 3 and (forever or len(calls) < 8):
            raise cli.TryAgain(f"{self.url} failed (OSError: gone): check the network and the store")
        put(self, source, name, **how)

    monkeypatch.setattr(Remote, "put", failing)
    url = f"file://{tmp_path}/up/std"
    status, err = run_main(fineweb.main, *STDLIB, "--out-dir", url), capsys.readouterr().err
    assert err.count("the work continues, and the upload is tried again") == 1 and (tmp_path / "std" / MANIFEST).exists()
    if forever:
        assert status == 2 and not (tmp_path / "up/std" / MANIFEST).exists()
        assert err.splitlines()[-1].startswith(f"error: {url} lacks 8 of 9 shards ({url} failed")
        monkeypatch.setattr(Remote, "put", put)
        assert run_main(fineweb.main, *STDLIB, "--out-dir", url) == 0
    else:
        assert status == 0 and err.count("works again") == 1
    assert uploaded(tmp_path / "up/std") == uploaded(made)
