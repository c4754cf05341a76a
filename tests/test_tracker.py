"""--tracker: each tracker gets the numbers of metrics.jsonl, and its errors never end a run."""

import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO, TINY, forked, run_train

from training import tracker


def losses(folder, name="loss") -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[name] for row in rows if name in row}


def in_tensorboard(folder, name) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def in_trackio(folder, name) -> dict[int, float]:
    (path,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = list(database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"))
    assert len({run for run, _, _ in rows}) == 1
    return {step: json.loads(metrics)[name] for _, step, metrics in rows if name in json.loads(metrics)}


def in_wandb(folder, name) -> dict[int, float]:
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len({path.stem for path in files}) == 1
    found = {}
    for record in map(Record.FromString, (content for path in files for content in in_leveldb(path.read_bytes()))):
        row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        if name in row:
            found[row["step"]] = row[name]
    return found


def in_leveldb(log: bytes):
    """Yields the records of LevelDB's log format, which W&B's files have after seven bytes: blocks of 32 KiB with parts of records, each
    with a checksum, a length and a type."""
    at, record = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        if kind == 0:
            return
        record = (b"" if kind in (1, 2) else record) + log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record


def set_environment(**names):
    os.environ.update(names)


@pytest.mark.parametrize("kind", ["tensorboard", "trackio", pytest.param("wandb", marks=pytest.mark.slow)])
def test_tracker_shows_a_resume_as_one_run(shards, tmp_path, kind):
    first = partial(set_environment, WANDB_MODE="offline", TRACKIO_DIR=str(tmp_path / "trackio"))
    found = {"tensorboard": in_tensorboard, "trackio": in_trackio, "wandb": in_wandb}[kind]
    flags = ["--out-dir", tmp_path, "--tracker", kind]
    result = forked(tmp_path, "train", *TINY, "--data-dir", shards, *flags, first=first)
    assert result.stdout.count("val loss") == 3
    result = forked(tmp_path, "train", "--resume", *flags, "--max-steps", 24, first=first)
    assert result.returncode == 0 and "warning" not in result.stderr
    assert all(line.startswith("step ") for line in result.stdout.splitlines())
    for name in ("loss", "val_loss", "lr"):
        expected = losses(tmp_path, name)
        assert expected and found(tmp_path, name) == pytest.approx(expected)


@pytest.mark.slow
def test_ctrl_c_saves_a_tracked_run(shards, tmp_path):
    """W&B's own process also gets the signal."""
    env = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path, "--tracker", "wandb", "--max-steps", 100_000]
    command = [sys.executable, REPO / "train.py", *argv]
    process = subprocess.Popen(list(map(str, command)), env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "log.txt").exists() or "20 train" not in (tmp_path / "log.txt").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and "all saved" in err and "Traceback" not in err
    assert in_wandb(tmp_path, "loss") == pytest.approx(losses(tmp_path))


class Broken:
    """A tracker that raises an error in the method `where`."""

    where = ""

    def __init__(self, *args):
        self.call("init")

    def log(self, step, numbers):
        self.call("log" if step == 5 else "")

    def text(self, step, name, text):
        self.call("text")

    def finish(self):
        self.call("finish")

    def call(self, where):
        print(f"chatter of {where}")
        if where == self.where:
            raise RuntimeError("the server\nis gone")


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_failing_tracker_is_one_warning(shards, tmp_path, monkeypatch, capsys, where):
    monkeypatch.setitem(tracker.SINKS, "wandb", type("Sink", (Broken,), {"where": where}))
    assert run_train(shards, tmp_path, "--tracker", "wandb") == 0
    out, err = capsys.readouterr()
    assert err.count("warning: continuing without wandb: the server is gone\n") == err.count("warning") == 1
    assert "chatter" not in out and len(losses(tmp_path)) == 20


def test_missing_tracker_names_pip_install(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert run_train(shards, tmp_path, "--tracker", "trackio") == 0
    assert ": pip install trackio\n" in capsys.readouterr().err


def test_samples_go_to_tensorboard(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = []
    board = tracker.Tracker("tensorboard", str(tmp_path / "my run"), "ab12", {"max_steps": 5}, 0, said.append)
    board.text(3, "samples", "def f():\n    return <b>")
    board.finish()
    assert said == [f"to watch the run: tensorboard --logdir '{tmp_path}/my run'/tensorboard"]
    events = EventAccumulator(str(tmp_path / "my run" / "tensorboard"), {"tensors": 0})
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert (event.step, event.tensor_proto.string_val[0].decode()) == (3, "    def f():\n        return <b>")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_samples_go_to_other_trackers(tmp_path, kind):
    code = (
        "from training import tracker\n"
        f"sink = tracker.Tracker({kind!r}, {str(tmp_path)!r}, 'ab12', {{}}, 0, print)\n"
        "sink.text(3, 'samples', 'def f():\\n    return <b>')\nsink.log(4, {'loss': 1.0})\nsink.finish()\n"
    )
    env = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    result = subprocess.run([sys.executable, "-c", code], env=env, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0 and "warning" not in result.stdout
    if kind == "trackio":
        assert "return <b>" in json.dumps(in_trackio(tmp_path, "samples")[3])
    else:
        assert "return &lt;b&gt;" in "".join(path.read_text() for path in tmp_path.rglob("*.html"))


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_trackers_tell_runs_of_a_comparison_apart(tmp_path, monkeypatch, kind):
    """Both modules get the same names here."""
    names = []
    module = SimpleNamespace(
        init=lambda **how: names.append((how["name"], how.get("group"))) or SimpleNamespace(define_metric=lambda *args, **how: None),
        Settings=lambda **how: None,
    )
    monkeypatch.setitem(sys.modules, kind, module)
    monkeypatch.setenv("WANDB_RUN_GROUP", "rope")
    for folder in ("log/compare/rope/1", "log/compare/rope/2"):
        tracker.SINKS[kind](tmp_path / folder, "ab12", {}, 0)
    ending = "-ab12" if kind == "trackio" else ""
    group = "rope" if kind == "trackio" else None  # W&B reads the variable itself
    assert names == [(f"rope/1{ending}", group), (f"rope/2{ending}", group)] and tracker.name_of(Path("/log")) == "log"


def test_tracker_gets_only_finite_numbers(monkeypatch):
    sent = []
    sink = type("Sink", (Broken,), {"log": lambda self, step, numbers: sent.append((step, numbers))})
    monkeypatch.setitem(tracker.SINKS, "wandb", sink)
    wandb = tracker.Tracker("wandb", "log", "id", {}, 0, print)
    wandb.log(3, {"loss": float("nan"), "lr": 0.5, "mfu": None, "skipped": "rank 0's loss is nan", "tokens": 7, "grad_norm": float("inf")})
    assert sent == [(3, {"lr": 0.5, "tokens": 7})]
