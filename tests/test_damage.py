"""Damages files at random: each must end in one line or load. No traceback, no huge allocation, no advice to delete anything.

The fast tests take 50 damages of each format, the slow ones 250 (2,000 with THOROUGH=1). Each runs in a process of its own, which
measures its memory.
"""

import contextlib
import errno
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FORKS, THOROUGH, run_main, run_train, save_checkpoint, write_shards
from made_up_tasks import write_core, write_lambada
from test_dataloader import llmc_bin
from test_hellaswag import make_tasks

import checkpoint
import fineweb
import hellaswag
import plot_log
import train
import variants
from common import cli, logs, preparation
from common.distributed import DistContext
from common.files import read_json, write_json
from common.shards import find_shards, inspect_shard, verify_shards
from common.tokenizer import get_tokenizer
from dataloader import TokenStream
from lab import scaling
from tasks.readers import read_tasks
from training import checks, plan, run_json
from variants import VariantConfig, build

# ---- damages ----


def damaged_bytes(data: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """Flips bits, or cuts, drops, doubles or overwrites a range. end: the range begins before it."""
    end = min(end or len(data), len(data))
    at, length, kind = rng.randrange(end), rng.choice([1, 2, 8, 100, 5000]), rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + length :]
    if kind == 2:
        return data[: at + length] + data[at:]
    if kind == 3:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    changed = bytearray(data)
    for _ in range(1 if kind == 4 else rng.randrange(2, 9)):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


ODD = [
    None, True, False, 0, -1, 1, 3, 10**9, 10**30, 10**400, -(10**18), 0.5, 1e308, -1e-300, "", "x", "\ud800", "a\nb", "7" * 5000, "../x",
    "\0", [], {}, [[]], [None], {"a": 1}, [1, 2, 3], ["x"] * 5, "NAN", "INFINITY", "DEEP",
]  # fmt: skip


def damaged_tree(tree, rng: random.Random):
    """Replaces, deletes, doubles or adds one value anywhere in nested dicts and lists. Returns a new tree."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    if not keys or rng.random() < 0.05:
        return rng.choice(ODD)
    tree, key, kind = (dict(tree) if isinstance(tree, dict) else list(tree)), rng.choice(keys), rng.random()
    if kind < 0.6:
        tree[key] = damaged_tree(tree[key], rng)
    elif kind < 0.75:
        tree[key] = rng.choice(ODD)
    elif kind < 0.9:
        del tree[key]
    elif isinstance(tree, dict):
        tree[rng.choice(["foo", "n_layer", "", "config"])] = rng.choice(ODD)
    else:
        tree.append(tree[key])
    return tree


def as_json(tree) -> bytes:
    """JSON with things in it that Python's parser accepts and others that it can't read."""
    sys.set_int_max_str_digits(0)
    text = json.dumps(tree).replace('"NAN"', "NaN").replace('"INFINITY"', "-Infinity").replace('"DEEP"', "[" * 9000)
    sys.set_int_max_str_digits(4300)
    return text.encode()


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    return as_json(damaged_tree(json.loads(data), rng)) if rng.random() < 0.7 else damaged_bytes(data, rng)


def damaged_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = damaged_json(lines[number], rng)
    return b"\n".join(lines)


def damaged_pt(data: bytes, rng: random.Random) -> bytes:
    """Most damages hit the pickle, which comes first."""
    return damaged_bytes(data, rng, rng.choice([3000, None]))


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        return damaged_bytes(data, rng, 8 + size)
    header = as_json(damaged_tree(json.loads(data[8 : 8 + size]), rng))
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


# ---- formats: how to make a good folder, the file to damage, and what reads it ----


def make_run(folder: Path):
    write_shards(folder / "shards", [1000, 3000])
    assert run_train(folder / "shards", folder / "run", "--max-steps", 5, "--checkpoint-every", 2, "--val-every", 2) == 0


def read_run_json(folder: Path):
    out = folder / "run"
    run_json.is_restart(out)
    config = run_json.read_run(out)
    config.out_dir = str(out)
    with contextlib.suppress(ValueError):
        run_json.read_run(out, 3).validate(1)
    plan.measured_rate(config, "cpu")
    plot_log.size_beside(out / "log.txt")
    plot_log.title_of(logs.groups_of([logs.read_run(out / "log.txt", "tokens")]))
    scaling.data_of(out)
    config.validate(1)


def read_seal(folder: Path):
    checkpoint.newest_step(folder / "run")
    checkpoint.load_config(str(folder / "run" / "model_00005.pt"))


def read_logs(folder: Path):
    logs.read_log(folder / "run" / "log.txt")
    found = logs.read_metrics(folder / "run" / "metrics.jsonl", ["loss", "seconds", "memory_bytes", "val_loss"])
    assert all(isinstance(value, int | float) for values in found.values() for value in values.values())
    for step in range(5):
        train.logged_loss(folder / "run", step)


def make_shards(folder: Path):
    write_shards(folder, [1000, 3000])


def make_bins(folder: Path):
    for index, size in enumerate((1000, 3000)):
        llmc_bin(folder / f"x_{'train' if index else 'val'}_{index:06d}.bin", np.arange(size) % 257)


def read_shards(folder: Path):
    shards = find_shards(folder)
    verify_shards(shards)
    for split in ("train", "val"):
        TokenStream(shards, split, 8).batch(range(3))
    shards.contents()


def make_progress(folder: Path):
    """A preparation that was killed after its second shards."""
    documents = folder.parent / "text"
    documents.mkdir()
    for number in range(4):
        (documents / f"{number}.txt").write_text("the cat sat on the mat and saw a dog " * 100)
    plain, left = preparation.write_json, [2]

    def write_json(path, content):
        plain(path, content)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    preparation.write_json = write_json
    with contextlib.suppress(KeyboardInterrupt):
        read_progress(folder)
    preparation.write_json = plain


def read_progress(folder: Path):
    documents, out = str(folder.parent / "text"), str(folder / "out")
    fineweb.prepare(fineweb.PrepareConfig(dataset=(documents,), tokenizer="bytes", out_dir=out, shard_size=1500, workers=1))


def small_model():
    torch.manual_seed(0)
    return build(VariantConfig(64, 16, 2, 2, 16))


def make_pt(folder: Path):
    save_checkpoint(folder, 5, small_model(), "bytes", 0.5, {})
    for name in ("state_00005.pt", "model_00005.json"):
        (folder / name).unlink()


def make_nanogpt(folder: Path):
    shape = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
    content = {"model": small_model().state_dict(), "model_args": shape | {"bias": True, "dropout": 0.0}, "iter_num": 5}
    torch.save(content, folder / "ckpt.pt")


def make_build_nanogpt(folder: Path):
    config = type("GPTConfig", (), {"__module__": "__main__"})()
    vars(config).update(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
    main = sys.modules["__main__"]
    main.GPTConfig = type(config)  # where pickle looks for it
    torch.save({"model": small_model().state_dict(), "config": config, "step": 5, "val_loss": 3.0}, folder / "model_00005.pt")
    del main.GPTConfig


def make_contents(folder: Path):
    """A checkpoint's content as JSON: read_contents saves the damaged content as a .pt file."""
    content = {"config": asdict(small_model().config), "step": 5, "val_loss": 0.5, "tokenizer": "bytes"}
    shape = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16, bias=True)
    (folder / "content.json").write_text(json.dumps({"ours": content, "nanogpt": {"model_args": shape}}))


def read_contents(folder: Path):
    try:
        contents = json.loads((folder / "content.json").read_bytes())
    except (ValueError, RecursionError):
        return
    weights = {"model": small_model().state_dict()}
    for content in contents.values() if isinstance(contents, dict) else [contents]:
        torch.save(weights | content if isinstance(content, dict) else content, folder / "model.pt")
        with one_line():
            checkpoint.load_gpt(str(folder / "model.pt"))


def make_hf(folder: Path):
    small_model().save_pretrained(folder)


def read_folder(folder: Path):
    checkpoint.load_gpt(str(folder))


def make_hellaswag(folder: Path):
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in make_tasks(4)))


def make_core(folder: Path):
    write_core(folder / "eval_bundle.zip")


def make_unpacked_core(folder: Path):
    write_core(folder / "eval_bundle", unpacked=True)


def read_given(given: str):
    def read(folder: Path):
        name, _, path = given.partition("=")
        for task in read_tasks((f"{name}={folder / path}",), get_tokenizer("bytes"), 64):
            for i in range(len(task.gold)):
                task.choices(i, get_tokenizer("bytes"))

    return read


def make_law(folder: Path):
    law = {"law": {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2000.0, "beta": 0.37}}
    (folder / "law.json").write_text(json.dumps(law))


FORMATS: dict[str, tuple[Callable, str, Callable, Callable]] = {
    "npy": (make_shards, "tiny_train_000001.npy", lambda data, rng: damaged_bytes(data, rng, 128), read_shards),
    "bin": (make_bins, "x_train_000001.bin", lambda data, rng: damaged_bytes(data, rng, 1024), read_shards),
    "manifest": (make_shards, "manifest.json", damaged_json, read_shards),
    "progress": (make_progress, "out/progress.json", damaged_json, read_progress),
    "run.json": (make_run, "run/run.json", damaged_json, read_run_json),
    "seal": (make_run, "run/model_00005.json", damaged_json, read_seal),
    "metrics": (make_run, "run/metrics.jsonl", damaged_lines, read_logs),
    "log": (make_run, "run/log.txt", damaged_bytes, read_logs),
    "pt": (make_pt, "model_00005.pt", damaged_pt, read_folder),
    "nanogpt": (make_nanogpt, "ckpt.pt", damaged_pt, read_folder),
    "build-nanogpt": (make_build_nanogpt, "model_00005.pt", damaged_pt, read_folder),
    "contents": (make_contents, "content.json", damaged_json, read_contents),
    "config.json": (make_hf, "config.json", damaged_json, read_folder),
    "safetensors": (make_hf, "model.safetensors", damaged_safetensors, read_folder),
    "hellaswag": (make_hellaswag, "tasks.jsonl", damaged_lines, lambda folder: hellaswag.load_tasks(folder / "tasks.jsonl")),
    "lambada": (lambda folder: write_lambada(folder / "a.jsonl"), "a.jsonl", damaged_lines, read_given("lambada=a.jsonl")),
    "bundle": (make_core, "eval_bundle.zip", damaged_bytes, read_given("core=eval_bundle.zip")),
    "core.yaml": (make_unpacked_core, "eval_bundle/core.yaml", damaged_bytes, read_given("core=eval_bundle")),
    "core.csv": (make_unpacked_core, "eval_bundle/eval_meta_data.csv", damaged_bytes, read_given("core=eval_bundle")),
    "law": (make_law, "law.json", damaged_json, lambda folder: scaling.read_law(str(folder / "law.json"))),
}

ONLY_SLOW = ("lambada", "bundle", "core.yaml", "core.csv")
SLOW = [pytest.param(name, 2000 if THOROUGH else 250, marks=pytest.mark.slow) for name in FORMATS]

# ---- the check ----


@contextlib.contextmanager
def one_line():
    """Only a ValueError or an OSError may come out, with one line that advises no harm."""
    try:
        yield
    except (ValueError, OSError) as e:
        text = cli.in_one_line(e)
        assert len(text.splitlines()) == 1 and not re.search(r"\bdelete|\boverwrite|weights_only", text, re.I), text


def memory(name: str) -> int:
    """Bytes, from the kernel: VmSize and VmRSS now, VmPeak and VmHWM at their largest."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def fuzz(name: str, folder: Path, count: int):
    """Damages a format `count` times and writes what went wrong to folder / report."""
    make, file, damage, read = FORMATS[name]
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    good, work, rng, failures, first = folder / "good", folder / "work", random.Random(name), {}, None
    good.mkdir()
    make(good)
    data = (good / file).read_bytes()
    shutil.copytree(good, work)
    read(work)  # imports what it needs
    before = memory("VmSize"), memory("VmRSS")
    for _ in range(count):
        if name == "progress":  # its reader changes the folder
            shutil.rmtree(work)
            shutil.copytree(good, work)
        changed = damage(data, rng)
        (work / file).write_bytes(changed)
        try:
            with one_line():
                read(work)
        except BaseException as e:
            first = first or traceback.format_exc()
            failures[f"{type(e).__name__}: {e}"[:100]] = failures.get(f"{type(e).__name__}: {e}"[:100], 0) + 1
    grown = memory("VmPeak") - before[0], memory("VmHWM") - before[1]
    if grown[0] > 4 * len(data) + 2**30 or grown[1] > 4 * len(data) + 2**27:
        failures[f"allocates {grown[0] / 1e6:,.0f} MB, uses {grown[1] / 1e6:,.0f} MB"] = 1
    (folder / "report").write_text(json.dumps({"failures": failures, "first": first}))


def in_process(target, *arguments):
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize(("name", "count"), [*((name, 50) for name in FORMATS if name not in ONLY_SLOW), *SLOW])
def test_damaged_files_end_in_one_line(tmp_path, name, count):
    assert in_process(fuzz, name, tmp_path, count) == 0
    report = json.loads((tmp_path / "report").read_text())
    assert not report["failures"], f"{sum(report['failures'].values())} of {count}: {report['failures']}\n{report['first']}"


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_every_bit_of_a_shard_header(tmp_path, kind):
    """A flipped bit is one line, or changes no token."""
    make, file, _, _ = FORMATS[kind]
    make(tmp_path)
    path = tmp_path / file
    data, expected = path.read_bytes(), inspect_shard(tmp_path, {"file": file}).read(0, 3000)
    loaded, header = 0, 1024 if kind == "bin" else 128
    with open(path, "r+b", buffering=0) as damaged:
        for bit in range(8 * header):
            os.pwrite(damaged.fileno(), bytes([data[bit // 8] ^ 1 << bit % 8]), bit // 8)
            with one_line():
                assert (inspect_shard(tmp_path, {"file": file}).read(0, 3000) == expected).all()
                loaded += 1
            os.pwrite(damaged.fileno(), data[bit // 8 : bit // 8 + 1], bit // 8)
    assert 0 < loaded < 8 * header


# ---- single faults, with the right answer ----


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[" * 9000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "is not a finite number"),
        (b'{"a": 1, "a": 2}', "a key appears twice"),
        (b'{"a": "\xff"}', "can't decode byte"),
        (b"[1]", "is not a JSON object"),
        (b"", "is not valid JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path, text, why):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=why) as error:
        read_json(tmp_path / "a.json", "the remedy")
    assert str(error.value).endswith(": the remedy")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, 0.5, true, null]}')  # with a BOM
    assert read_json(tmp_path / "a.json", "") == {"a": [1, 0.5, True, None]}


def test_foreign_checkpoints_are_compared_by_number(tmp_path):
    for name in ("model_99999.pt", "model_100000.pt"):
        (tmp_path / name).touch()
    assert checkpoint.checkpoint_file(str(tmp_path)) == tmp_path / "model_100000.pt"
    (tmp_path / "model_100000.pt").rename(tmp_path / "ckpt.pt")
    assert checkpoint.checkpoint_file(str(tmp_path)) == tmp_path / "model_99999.pt"


def forbid_models(monkeypatch):
    """Fails the test if a model gets memory."""

    def checked(config):
        assert torch.get_default_device().type == "meta", "a model was built"
        return build(config)

    monkeypatch.setattr(variants, "build", checked)
    monkeypatch.setattr(checkpoint, "build", checked)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run, and its shards'."""
    folder = tmp_path_factory.mktemp("finished")
    make_run(folder)
    return folder


@pytest.fixture
def content(tmp_path):
    make_pt(tmp_path)
    return torch.load(tmp_path / "model_00005.pt", weights_only=True)


def test_unknown_setting_in_checkpoint_is_named(tmp_path, content):
    content["config"]["n_memory"] = 7
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt has the setting n_memory=7, which this code does not know: use the code \(branch\)"):
        checkpoint.load_gpt(str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["config"].update(lookahead=0.5), "has the setting lookahead=0.5, which this code does not know"),
        (lambda run: run["config"]["model"].update(n_memory=7), "has the setting n_memory=7, which this code does not know"),
        (lambda run: run["config"].update(val_every="10"), "has the setting val_every='10', it must be a whole number"),
        (lambda run: run["config"].update(max_lr=None), "has the setting max_lr=None, it must be a float"),
        (lambda run: run["config"].update(dtype="fp8"), "has the setting dtype='fp8', choose auto or bf16"),
        (lambda run: run["config"]["model"].update(n_embd=64), r"has n_embd 64, model_00005.pt has 32: restore run.json from a copy"),
        (lambda run: run.update(data={"a": [1]}), r"run.json is damaged, or was written by another version .*see its data"),
        (lambda run: run["launches"].append({"step": "5"}), r"run.json is damaged, or was written by another version .*see its launches"),
    ],
)
def test_wrong_run_json_is_named(finished, tmp_path, capsys, change, message, monkeypatch):
    shutil.copytree(finished / "run", tmp_path / "run")
    run = read_json(tmp_path / "run" / "run.json", "")
    change(run)
    write_json(tmp_path / "run" / "run.json", run)
    forbid_models(monkeypatch)
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--max-steps", 30) == 2
    assert re.search(message, capsys.readouterr().err)


def test_run_json_of_older_versions_resumes(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    run = read_json(tmp_path / "run" / "run.json", "")
    for part, names in ((run["config"], ["ema", "teacher", "shard"]), (run["config"]["model"], ["n_expert"]), (run, ["id", "size"])):
        for name in names:
            del part[name]
    del run["launches"][0]["config"]
    run["launches"][0]["torchrun"] = "host"
    write_json(tmp_path / "run" / "run.json", run)
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--max-steps", 6) == 0


@pytest.mark.parametrize("size", [{"n_embd": 10**6}, {"vocab_size": 10**9}, {"seq_len": 10**9}, {"n_layer": 1000}, {"n_layer": 10**12}])
def test_config_of_terabytes_allocates_no_model(tmp_path, content, size, monkeypatch):
    torch.save(content | {"config": content["config"] | size}, tmp_path / "a.pt")
    make_hf(tmp_path / "hf")
    theirs = {"seq_len": "n_positions"}
    config = read_json(tmp_path / "hf" / "config.json", "") | {theirs.get(name, name): value for name, value in size.items()}
    write_json(tmp_path / "hf" / "config.json", config)
    forbid_models(monkeypatch)
    for path in ("a.pt", "hf"):
        with pytest.raises(ValueError, match=r"does not fit the model|config.json says|is only in its weights|must be at most"):
            checkpoint.load_gpt(str(tmp_path / path))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(1).expand(10**10, 16), "its tensors are larger than the file"),
        (torch.zeros(64, 16, dtype=torch.int8), "is torch.int8 on cpu, and only plain floating-point weights can be loaded"),
        (torch.zeros(64, 16, device="meta"), "is torch.float32 on meta"),
        (torch.eye(64, 16).to_sparse(), "only plain floating-point weights"),
    ],
)
def test_odd_weights_are_refused(tmp_path, content, weight, message):
    content["model"]["transformer.wte.weight"] = weight
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        checkpoint.load_gpt(str(tmp_path / "a.pt"))


def test_unreadable_checkpoint_is_not_called_damaged(tmp_path, content, monkeypatch):
    monkeypatch.setattr("builtins.open", failing(errno.EMFILE, "model_00005.pt"))
    with pytest.raises(OSError, match="Too many open files"):
        checkpoint.load_gpt(str(tmp_path / "model_00005.pt"))


def test_damaged_metrics_lines_are_skipped(tmp_path):
    lines = ['{"step": 3, "loss": 1.5}', '{"step": 3, "loss": "x"}', '{"step": 3, "loss": }', '{"step": "3", "loss": 2.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "[" * 9000, '{"step": 4, "loss": null}']))
    assert logs.read_metrics(tmp_path / "metrics.jsonl", ["loss"]) == {"loss": {3: 1.5}}
    assert train.logged_loss(tmp_path, 3) == 1.5 and math.isnan(train.logged_loss(tmp_path, 4))


def test_machine_trouble_on_a_host_keeps_its_name(tmp_path, monkeypatch):
    """It does not ask for other shards."""
    make_shards(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("builtins.open", failing(errno.EMFILE, "tiny_"))
    shards = find_shards(tmp_path)
    with pytest.raises(OSError, match=f"Too many open files on {platform.node()}: .*tiny_val_000000.npy"):
        checks.check_host(train.TrainConfig(), DistContext(torch.device("cpu"), 1, 2), shards)


def failing(code: int, part: str) -> Callable:
    """Returns an open that fails for paths with this part."""
    plain = open

    def fail(path, *arguments, **how):
        if part in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return plain(path, *arguments, **how)

    return fail
