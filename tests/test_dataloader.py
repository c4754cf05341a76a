"""Shards must match numpy.load and llm.c's layout; the stream must serve every token of every epoch."""

import errno
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
from conftest import REPO, TINY, Trap, forked, read_stream, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from common import cli
from common.files import read_json, sha256, write_json
from common.shards import Shards, differences, find_shards, open_shard, verify_shards, write_shard
from dataloader import TokenStream, permute, rank_positions


def folder_of(tmp_path, sizes):
    """Writes shards in which token i of the row is i."""
    row, entries = np.arange(sum(sizes), dtype=np.uint16), []
    for index, part in enumerate(np.split(row, np.cumsum(sizes)[:-1])):
        entries.append(write_shard(tmp_path / f"count_train_{index:06d}.npy", part))
    return Shards(tmp_path, vocab_size=65536, entries=entries)


def llmc_bin(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


# ---- the stream ----


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seq_len=st.integers(1, 12),
    processes=st.integers(1, 4),
    micro_batch=st.integers(1, 3),
    micro_steps=st.integers(1, 3),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_token_is_a_target_once_per_epoch(tmp_path_factory, sizes, seq_len, processes, micro_batch, micro_steps, shuffle, seed):
    total = sum(sizes)
    if total <= seq_len:
        return
    shards = folder_of(tmp_path_factory.mktemp("s"), sizes)
    streams = [TokenStream(shards, "train", seq_len, shuffle, seed) for _ in range(processes)]
    per_epoch = (total - 1) // seq_len
    per_step = processes * micro_batch * micro_steps
    inputs, targets = [], []
    for step in range(-(-2 * per_epoch // per_step)):
        taken = [rank_positions(step, per_step, micro_batch, rank, processes) for rank in range(processes)]
        for micro_step in range(micro_steps):
            for rank in range(processes):
                x, y = streams[rank].batch(taken[rank][micro_step])
                inputs += x.tolist()
                targets += y.tolist()
    for epoch in range(2):
        rows = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        counts = Counter(token for row in targets[rows] for token in row)
        assert counts == Counter(range(1, per_epoch * seq_len + 1))
        counts = Counter(token for row in inputs[rows] for token in row)
        assert counts == Counter(range(per_epoch * seq_len))
    assert all(y == x + 1 for xs, ys in zip(inputs, targets, strict=True) for x, y in zip(xs, ys, strict=True))
    if not shuffle:
        assert [row[0] for row in inputs[:per_epoch]] == list(range(0, per_epoch * seq_len, seq_len))


def test_sequences_cross_shards(tmp_path):
    stream = TokenStream(folder_of(tmp_path, [5, 2, 1, 10]), "train", 8, shuffle=False)
    x, y = stream.batch([0, 1])
    assert x.dtype == y.dtype == np.int64
    assert x.tolist() == [list(range(8)), list(range(8, 16))]
    assert y.tolist() == [list(range(1, 9)), list(range(9, 17))]


def test_each_epoch_and_seed_has_its_own_order(tmp_path):
    shards = folder_of(tmp_path, [1000])
    first = TokenStream(shards, "train", 10, seed=1)
    orders = [[first.sequence_at(e * 99 + i) for i in range(99)] for e in range(3)]
    other = [TokenStream(shards, "train", 10, seed=2).sequence_at(i) for i in range(99)]
    assert all(sorted(order) == list(range(99)) for order in [*orders, other])
    assert len({tuple(order) for order in [*orders, other, list(range(99))]}) == 5


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_permute_is_a_permutation(n, key):
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_permute_looks_random():
    """A random permutation moves an element by n/3 on average, separates neighbours by n/3, and favours no place."""
    n = 1000
    places = np.array([[permute(i, n, key) for i in range(n)] for key in range(100)])
    assert abs(places - np.arange(n)).mean() == pytest.approx(n / 3, rel=0.03)
    assert places.mean(0).std() == pytest.approx(n / 12**0.5 / 100**0.5, rel=0.15)
    assert abs(np.diff(places, axis=1)).mean() == pytest.approx(n / 3, rel=0.03)


def test_epoch_order_never_changes_between_versions():
    """A run may be resumed by a later version."""
    assert [permute(i, 10, 1337) for i in range(10)] == [3, 6, 2, 0, 4, 9, 8, 1, 5, 7]


def test_too_few_tokens_for_one_sequence(tmp_path):
    with pytest.raises(ValueError, match=r"8 train tokens, fewer than one sequence of 8 \+ 1"):
        TokenStream(folder_of(tmp_path, [8]), "train", 8)
    assert TokenStream(folder_of(tmp_path, [9]), "train", 8).sequences_per_epoch == 1


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_step_positions_are_independent_of_world_size(world_size, micro_batch):
    parts = [rank_positions(5, 8, micro_batch, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1  # every rank has the same number of micro steps
    assert sorted(p for part in parts for positions in part for p in positions) == list(range(40, 48))


# ---- shards ----


def test_shard_is_a_plain_npy_file(tmp_path):
    tokens = np.array([50256, 1, 2], dtype=np.uint16)
    entry = write_shard(tmp_path / "x_train_000001.npy", tokens)
    loaded = np.load(tmp_path / "x_train_000001.npy")
    assert loaded.dtype == np.uint16 and loaded.tolist() == [50256, 1, 2]
    assert entry["tokens"] == 3 and not list(tmp_path.glob("*.tmp"))


def test_read_shards_of_build_nanogpt_and_llmc(tmp_path):
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(20, dtype=np.uint16))
    llmc_bin(tmp_path / "fineweb_train_000001.bin", np.arange(100, 130))
    shards = find_shards(tmp_path)
    assert (shards.tokenizer, shards.vocab_size) == ("gpt2", 50257)
    assert TokenStream(shards, "train", 4, shuffle=False).batch([1])[1].tolist() == [[105, 106, 107, 108]]
    assert TokenStream(shards, "val", 4, shuffle=False).batch([0])[0].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("prefix", ["my_val_set", "my_train_set"])
def test_prefix_does_not_change_the_split(tmp_path, prefix):
    for split in ("val", "train"):
        np.save(tmp_path / f"{prefix}_{split}_000000.npy", np.arange(20, dtype=np.uint16))
    shards = find_shards(tmp_path)
    assert [[entry["file"] for entry in shards.split(split)] for split in ("val", "train")] == [
        [f"{prefix}_val_000000.npy"], [f"{prefix}_train_000000.npy"],
    ]  # fmt: skip


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def archive(path):
    with open(path, "wb") as file:
        np.savez(file, np.zeros(9))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is damaged"),
        (flip, "sha256"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_text("<html>404</html>"), "is damaged"),
        (lambda path: np.save(path, np.arange(5003, dtype=np.int64)), "1-dimensional int64, expected 1-dimensional uint16"),
        (lambda path: np.save(path, np.zeros((2, 3), dtype=np.uint16)), "2-dimensional uint16"),
        (lambda path: np.save(path, np.array([Trap()], dtype=object), allow_pickle=True), "1-dimensional object"),
        (lambda path: np.save(path, np.zeros(5003, dtype=">u2")), "1-dimensional >u2"),
        (archive, "an archive of arrays"),
        (lambda path: np.save(path, np.zeros(9, dtype=np.uint16)), "has 9 tokens, the manifest says"),
    ],
)
def test_damaged_shard_is_named(tmp_path, damage, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards = find_shards(write_shards(tmp_path, [100, 5003]))
    damage(tmp_path / "tiny_train_000001.npy")
    with pytest.raises(ValueError, match=message) as error:
        verify_shards(shards)
    assert "tiny_train_000001.npy" in str(error.value) and "delete" not in str(error.value)
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"magic": 1}, "magic 20240520"),
        ({"magic": 20240801, "version": 7}, "holds llm.c's uint32, expected 1-dimensional uint16"),
        ({"version": 2}, "version 1"),
        ({"count": 99}, "promises 1,222 bytes"),
        ({"count": -1}, "promises 1,022 bytes"),
    ],
)
def test_damaged_bin_is_refused(tmp_path, kind, message):
    llmc_bin(tmp_path / "a_train_000001.bin", range(10), **kind)
    with pytest.raises(ValueError, match=message):
        open_shard(tmp_path, {"file": "a_train_000001.bin"})


def test_npy_headers_of_other_programs_load(tmp_path):
    """numpy writes version 1.0; other programs may write 2.0 or 3.0, other spaces and another order."""
    header = b"{ 'shape':(3, ), 'fortran_order': True, 'descr':'<u2' }\n"
    for version in (2, 3):
        data = b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(4, "little") + header + np.arange(3, dtype="<u2").tobytes()
        (tmp_path / "a_train_000001.npy").write_bytes(data)
        assert open_shard(tmp_path, {"file": "a_train_000001.npy"}).tolist() == [0, 1, 2]


@pytest.mark.parametrize("code", ["EACCES", "EIO", "EMFILE", "ENFILE", "ENOMEM", "ESTALE"])
@pytest.mark.parametrize("call", ["open", "read"])
def test_unreadable_shard_is_not_called_damaged(tmp_path, code, call, monkeypatch, capsys):
    shards, number = find_shards(write_shards(tmp_path, [100, 5003])), getattr(errno, code)
    stream = TokenStream(shards, "train", 8)
    plain = open

    def failing(path, *arguments, **how):
        if "train" in str(path):
            raise OSError(number, os.strerror(number), *([str(path)] if call == "open" else []))
        return plain(path, *arguments, **how)

    monkeypatch.setattr("builtins.open", failing)
    monkeypatch.setattr(os, call if call == "open" else "pread", lambda *_: failing("train"))
    for read in (lambda: verify_shards(shards), lambda: stream.batch([0])):
        with pytest.raises(SystemExit) as status, cli.one_line_errors():
            read()
        error = capsys.readouterr().err
        assert os.strerror(number) in error and "train" in error and len(error.splitlines()) == 1
        assert "damaged" not in error and "again in another" not in error and status.value.code == (2 if code == "EACCES" else 1)
        assert ("ulimit -n" in error) == (code == "EMFILE")


def limit_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))


def test_more_shards_than_open_files(tmp_path):
    """Under ulimit -n 128; a fresh Python with PyTorch has fewer than 20 files open."""
    write_shards(tmp_path / "shards", [300, *[70] * 400])
    run = forked(tmp_path, "train", *TINY, "--data-dir", tmp_path / "shards", "--out-dir", tmp_path / "run", first=limit_files)
    assert run.returncode == 0, run.stderr
    assert len(read_stream(tmp_path / "run", "train")) == 20


@pytest.mark.slow
def test_twenty_thousand_shards_train(tmp_path):
    """Opens, verifies and trains under ulimit -n 256, macOS's limit."""
    entries = []
    for index in range(20_000):
        path = tmp_path / f"many_{'train' if index else 'val'}_{index:06d}.npy"
        np.save(path, np.random.default_rng(index).integers(0, 257, 100).astype(np.uint16))
        entries.append({"file": path.name, "tokens": 100, "sha256": sha256(path)})
    write_json(tmp_path / "manifest.json", {"tokenizer": "bytes", "vocab_size": 257, "shards": entries})
    flags = shlex.join([*TINY, "--data-dir", str(tmp_path), "--out-dir", str(tmp_path / "run"), "--max-steps", "4"])
    flags += " --total-batch-tokens 32768 --micro-batch-size 128"
    command = f"ulimit -n 256 && exec {sys.executable} {REPO / 'train.py'} {flags}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(read_stream(tmp_path / "run", "train")) == 4  # each step reads from about a thousand shards


def test_shard_shortened_while_open_is_named(tmp_path):
    shards = find_shards(write_shards(tmp_path, [100, 5003]))
    stream = TokenStream(shards, "train", 8, shuffle=False)
    stream.batch([0])
    os.truncate(tmp_path / "tiny_train_000001.npy", 1000)
    with pytest.raises(ValueError, match=r"tiny_train_000001.npy has become shorter since the start: restore it"):
        stream.batch([600])


def test_replaced_shard_is_read_anew(tmp_path):
    """Another stream in the same process must not get the open file of the earlier shard."""
    for seed in (0, 1):
        shards = find_shards(write_shards(tmp_path, [100, 5003], seed))
        expected = np.load(tmp_path / "tiny_train_000001.npy")[:8].tolist()
        assert TokenStream(shards, "train", 8, shuffle=False).batch([0])[0].tolist() == [expected]


def test_batch_refuses_ids_beyond_the_vocabulary(tmp_path):
    shards = folder_of(tmp_path, [300])
    shards.vocab_size = 257
    stream = TokenStream(shards, "train", 8, shuffle=False)
    stream.batch([31])
    with pytest.raises(ValueError, match=r"count_train_000000.npy holds id 264, the vocabulary has 257"):
        stream.batch([32])


def test_missing_split_or_folder_is_refused(tmp_path):
    np.save(tmp_path / "x_train_000001.npy", np.arange(20, dtype=np.uint16))
    with pytest.raises(ValueError, match="no val shard in .*: x_train_000001.npy alone is there; add a shard named x_val_000000.npy$"):
        find_shards(tmp_path)
    np.save(tmp_path / "x_train_000002.npy", np.arange(20, dtype=np.uint16))
    with pytest.raises(ValueError, match="no val shard in .*: choose a .*, such as x_train_000001.npy to x_val_000000.npy$"):
        find_shards(tmp_path)
    (tmp_path / "x_train_000001.npy").rename(tmp_path / "x_val_000000.npy")
    assert [entry["file"] for entry in find_shards(tmp_path).entries] == ["x_train_000002.npy", "x_val_000000.npy"]
    (tmp_path / "x_train_000002.npy").unlink()
    with pytest.raises(ValueError, match="x_val_000000.npy alone is there; add train .*, named like x_train_000000.npy$"):
        find_shards(tmp_path)
    (tmp_path / "x_val_000000.npy").unlink()
    with pytest.raises(ValueError, match="^no shards in .*: give the folder that shards are in, or make some: python fineweb.py --out-dir"):
        find_shards(tmp_path)
    with pytest.raises(ValueError, match="does not exist; make it: python fineweb.py"):
        find_shards(tmp_path / "nowhere")


def test_other_files_are_no_shards(tmp_path):
    for name in ("x_val_000000", "x_train_000001"):
        np.save(tmp_path / f"{name}.npy", np.arange(20, dtype=np.uint16))
        (tmp_path / f"._{name}.npy").write_bytes(b"\0\5\x16\7 Mac OS X")  # AppleDouble
    for name in ("training_args.bin", "pytorch_model.bin", "scores.npy"):
        (tmp_path / name).write_bytes(b"PK")
    shards = find_shards(tmp_path)
    assert [entry["file"] for entry in shards.entries] == ["x_train_000001.npy", "x_val_000000.npy"]
    verify_shards(shards)


def test_nanogpt_bin_is_named_as_such(tmp_path, monkeypatch):
    """The advice in the message works."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        np.arange(50, dtype=np.uint16).tofile(f"{split}.bin")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=f"no {split} shard in .*: {split}.bin looks like nanoGPT's") as error:
            find_shards(tmp_path)
        exec(re.search(r"np\.save.*\)$", str(error.value))[0])
    assert TokenStream(find_shards(tmp_path), "train", 8, shuffle=False).batch([0])[0].tolist() == [list(range(8))]


@pytest.mark.parametrize("how", ["twice", "hard link", "symbolic link"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_repeated_shard_is_refused(tmp_path, how, with_manifest):
    write_shards(tmp_path, [100, 200, 300])
    manifest, first, name = read_json(tmp_path / "manifest.json", ""), tmp_path / "tiny_train_000001.npy", "tiny_train_000003.npy"
    if how == "twice":
        name = first.name
    elif how == "hard link":
        os.link(first, tmp_path / name)
    else:
        (tmp_path / name).symlink_to(first.name)
    manifest["shards"].append(manifest["shards"][1] | {"file": name})
    write_json(tmp_path / "manifest.json", manifest)
    if not with_manifest:
        (tmp_path / "manifest.json").unlink()
    advice = "keep one of them, move the other elsewhere" + (", and restore that file from a copy" if with_manifest else "$")
    if how == "twice":
        advice = "manifest.json lists tiny_train_000001.npy twice: restore it from a copy, or make the shards again in another folder"
    with nullcontext() if how == "twice" and not with_manifest else pytest.raises(ValueError, match=advice):
        find_shards(tmp_path)
    if how != "twice":  # do as told
        (tmp_path / name).unlink()
        shutil.copy(first, tmp_path / name)
        find_shards(tmp_path)


def test_equal_shards_are_accepted(tmp_path):
    """Repetitive text makes them."""
    for name in ("x_val_000000", "x_train_000001", "x_train_000002"):
        np.save(tmp_path / f"{name}.npy", np.arange(20, dtype=np.uint16))
    assert len(find_shards(tmp_path).split("train")) == 2


def test_unfinished_preparation_is_refused(tmp_path):
    write_shards(tmp_path, [100, 200])
    (tmp_path / "progress.json").write_text("{}")
    find_shards(tmp_path)  # a kill between the manifest and the removal of progress.json
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is not finished: run the same fineweb.py command again"):
        find_shards(tmp_path)


@pytest.mark.parametrize(
    "part", [{"vocab_size": 257.0}, {"vocab_size": 0}, {"tokenizer": 5}, {"shards": [{}]}, {"shards": {}}, {"settings": []}]
)
def test_manifest_with_wrong_types_is_refused(tmp_path, part):
    write_shards(tmp_path, [100, 100])
    write_json(tmp_path / "manifest.json", read_json(tmp_path / "manifest.json", "") | part)
    with pytest.raises(ValueError, match=f"not a manifest of shards \\(see its {next(iter(part))}\\): restore it from a copy"):
        find_shards(tmp_path)


def test_invalid_manifest_is_refused(tmp_path):
    write_shards(tmp_path, [100, 100])
    manifest = read_json(tmp_path / "manifest.json", "")
    del manifest["shards"]
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(ValueError, match="not a manifest of shards"):
        find_shards(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        find_shards(tmp_path)


def test_changes_to_a_folder_are_listed(tmp_path):
    """Compares by the sha256 of the manifest or of verify_shards, and by sizes alone if both are missing."""
    a, b, c = (find_shards(write_shards(tmp_path / name, [100, 200], seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert differences(a.contents(), b.contents()) == []
    assert differences(a.contents(), c.contents()) == ["tiny_train_000001.npy has changed", "tiny_val_000000.npy has changed"]
    other = dict(reversed(a.contents().items()))
    assert differences(a.contents(), other) == ["the manifest has the shards in another order"]
    (tmp_path / "b" / "manifest.json").unlink()
    unverified, verified = find_shards(tmp_path / "b"), find_shards(tmp_path / "b")
    verify_shards(verified)
    assert unverified.contents() == {name: [size, None] for name, (size, _) in a.contents().items()}
    assert verified.contents() == a.contents() and differences(unverified.contents(), verified.contents()) == []
    before = verified.contents()
    flip(tmp_path / "b" / "tiny_train_000001.npy")
    again = find_shards(tmp_path / "b")
    verify_shards(again)
    assert differences(before, again.contents()) == ["tiny_train_000001.npy has changed"]
    (tmp_path / "b" / "tiny_train_000001.npy").rename(tmp_path / "b" / "tiny_train_000002.npy")
    renamed = differences(before, find_shards(tmp_path / "b").contents())
    assert renamed == ["tiny_train_000001.npy is missing", "tiny_train_000002.npy was added"]
    truncate(tmp_path / "b" / "tiny_val_000000.npy")
    before = {name: [size, None] for name, (size, _) in before.items()}
    assert "tiny_val_000000.npy has changed" in differences(before, find_shards(tmp_path / "b").contents())


def test_verify_refuses_ids_beyond_the_vocabulary(tmp_path):
    shards = folder_of(tmp_path, [300])
    shards.vocab_size = 257
    with pytest.raises(ValueError, match=r"count_train_000000.npy holds id 299, the vocabulary has 257: .*make the shards again"):
        verify_shards(shards)


def test_place_names_the_first_token(tmp_path):
    stream = TokenStream(folder_of(tmp_path, [5, 2, 1, 1010]), "train", 8, shuffle=False)
    assert [stream.place(i) for i in (0, 1, 126)] == [
        "count_train_000000.npy from token 0", "count_train_000003.npy from token 0", "count_train_000003.npy from token 1,000"
    ]  # fmt: skip
    assert stream.batch([126])[0][0, 0] == 8 + 1000
