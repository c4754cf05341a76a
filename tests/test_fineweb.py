"""fineweb.py: shards equal the concatenated tokens, also after kills, full disks and failures of a hub on localhost."""

import errno
import gzip
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO, Forked, forked, kill_at_write, run_main, run_train, script
from hub import SHA, serve
from test_dataloader import llmc_bin

import fineweb
from common import documents as reading
from common import folders, hub, parts, preparation
from common import tokenizer as tokenizers
from common.documents import LocalDocuments, read_file
from common.files import read_json, write_json
from common.folders import stdlib_files
from common.locks import lock_folder
from common.shards import find_shards, open_shard, verify_shards
from common.tokenizer import get_tokenizer

TEXTS = [f"Document {i}: " + "naïve café, 日本語, \n\ttabs… " * (i % 7) + "<|endoftext|>" * (i % 2) for i in range(40)] + [""]


def expected(texts, tokenizer="bytes") -> list[int]:
    tokenizer = get_tokenizer(tokenizer)
    return [token for text in texts for token in [tokenizer.eot, *tokenizer.encode(text)]]


def row(folder) -> list[int]:
    """Returns all tokens of a complete folder, in order."""
    shards = find_shards(folder)
    verify_shards(shards)
    return np.concatenate([open_shard(folder, entry) for entry in shards.entries]).tolist()


def bytes_of(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def the_error(text: str) -> str:
    """Returns the only error line. Fails on a traceback or on several errors."""
    lines = [line for line in text.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def prepare(*argv) -> int:
    return run_main(fineweb.main, "--workers", 1, "--tokenizer", "bytes", *argv)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))
    return path


# ---- tokenizers ----


def test_bytes_tokenizer_is_utf8_with_eot_last():
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    assert tokenizer.decode([0xC3, 0xA9, 256, 10]) == "é\n"
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.encode("\ud800") == [ord("?")]


def test_gpt2_ids_match_published_ones(gpt2_tokenizer):
    """The ids are from Hugging Face's documentation and build-nanogpt."""
    assert gpt2_tokenizer.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2_tokenizer.vocab_size, gpt2_tokenizer.eot) == (50257, 50256)
    assert 50256 not in gpt2_tokenizer.encode("<|endoftext|>")
    assert all(gpt2_tokenizer.decode(gpt2_tokenizer.encode(text)) == text for text in TEXTS)


def test_unavailable_vocabulary_is_a_one_line_error(tmp_path):
    result = script(
        "fineweb.py", "--dataset", "stdlib", "--out-dir", tmp_path / "x",
        TIKTOKEN_CACHE_DIR=tmp_path / "none", HTTPS_PROXY="http://127.0.0.1:9",
    )  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "TIKTOKEN_CACHE_DIR" in result.stderr and "--tokenizer bytes" in result.stderr


# ---- formats ----


def test_read_every_local_format(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), tmp_path / "c.parquet", row_group_size=7)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert list(read_file(tmp_path / name)) == TEXTS, name
    for name in ("d.txt", "e.md", "f.py"):
        (tmp_path / name).write_text("é\n", encoding="utf-8")
        assert list(read_file(tmp_path / name)) == ["é\n"]


def test_read_a_folder_recursively_by_name(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    for name in ("c.txt", "a.md", "b/x.py", "ignored.png"):
        (tmp_path / "in" / name).write_text(name * 10)
    assert prepare("--dataset", tmp_path / "in", "--out-dir", tmp_path / "out") == 0
    assert row(tmp_path / "out") == expected(name * 10 for name in ("a.md", "b/x.py", "c.txt"))


def test_stdlib_is_this_python_without_site_packages():
    files = [found.path for found in stdlib_files()]
    assert files == [found.path for found in stdlib_files()] and files != sorted(files)
    assert json.__file__ in map(str, files) and not any("site-packages" in str(path) for path in files)
    assert sum(path.stat().st_size for path in files) > 8_000_000


# ---- shards ----


@pytest.mark.parametrize("size", [100, 1000, 1777, 2000, 10**6])
def test_shards_equal_the_concatenated_tokens(tmp_path, corpus, size):
    tokens = expected(TEXTS)
    assert prepare("--dataset", corpus, "--out-dir", tmp_path / "out", "--shard-size", size) == 0
    assert row(tmp_path / "out") == tokens
    manifest = read_json(tmp_path / "out" / "manifest.json", "")
    sizes = [shard["tokens"] for shard in manifest["shards"]]
    assert max(sizes) <= size and sum(sizes) == manifest["tokens"] == len(tokens)
    names = [shard["file"] for shard in manifest["shards"]]
    assert names == [f"corpus_{'train' if i else 'val'}_{i:06d}.npy" for i in range(len(names))] and len(names) > 1
    if len(tokens) >= 2 * size:
        assert set(sizes[:-1]) == {size}  # as build-nanogpt does
    else:
        assert sizes[0] == len(tokens) // 10
    assert (manifest["tokenizer"], manifest["vocab_size"]) == ("bytes", 257)
    assert not (tmp_path / "out" / "progress.json").exists()


@pytest.mark.parametrize("limit", [2, 3, 150, 1000, 1999])
def test_max_tokens_is_exact(tmp_path, corpus, limit):
    assert prepare("--dataset", corpus, "--out-dir", tmp_path / "out", "--shard-size", 500, "--max-tokens", limit) == 0
    assert row(tmp_path / "out") == expected(TEXTS)[:limit]


def test_workers_do_not_change_the_bytes(tmp_path, corpus, monkeypatch):
    prepare("--dataset", corpus, "--out-dir", tmp_path / "one", "--shard-size", 500)
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 100)
    prepare("--dataset", corpus, "--out-dir", tmp_path / "chunks", "--shard-size", 500)
    result = script(
        "fineweb.py", "--dataset", corpus, "--out-dir", tmp_path / "three", "--shard-size", 500, "--tokenizer", "bytes", "--workers", 3
    )
    assert result.returncode == 0, result.stderr
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "chunks") == bytes_of(tmp_path / "three")
    # without gigatoken, workers are processes
    code = "import fineweb; from common import tokenizer; fineweb.fast_encode = tokenizer.fast_encode = lambda name: None; fineweb.main()"
    argv = ["--dataset", corpus, "--out-dir", tmp_path / "spawned", "--shard-size", "500", "--tokenizer", "bytes", "--workers", "2"]
    result = subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "spawned")


HARD = [
    "", " ", "\n\n  \n\t x", "it's we'll I'M they'Re", "<|endoftext|>", "a" * 3000, " " * 500, "1234567 12 ½ Ⅷ ٣", "naïve café\u0301",
    "你好，世界。こんにちは", "👩‍👩‍👧‍👦🏳️‍🌈", "\u200b\ufeff\x00\x1c\x85\xa0\u2028x", "zero\r\nwidth", "\ud800 half a pair", "ſK ΑΒΓ אבג",
]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_fast_encoder_matches_the_plain_one(name, gpt2_tokenizer):
    pytest.importorskip("gigatoken")
    texts = [*HARD, *TEXTS, *(path.read_text() for path in sorted(REPO.glob("*.py")))]
    rng = random.Random(0)
    texts += ["".join(rng.choices("".join(HARD), k=50)) for _ in range(300)]
    tokenizer = get_tokenizer(name)
    expected = [id for text in texts for id in (tokenizer.eot, *tokenizer.encode(text))]
    assert tokenizers.tokenize(name, texts).tolist() == expected
    valid = [text for text in texts if "\ud800" not in text]
    fast = tokenizers.fast_encode(name)(valid)
    assert [row.tolist() for row in fast] == [tokenizer.encode(text) for text in valid]


def test_plain_encoder_takes_over_if_they_differ(monkeypatch, capsys):
    plain = tokenizers.tokenize("bytes", TEXTS)
    monkeypatch.setattr(tokenizers, "fast_encode", lambda name: lambda texts: [np.zeros(3, np.uint8)] * len(texts))
    assert (tokenizers.tokenize("bytes", TEXTS) == plain).all()
    assert "warning: gigatoken and tiktoken differ on" in capsys.readouterr().err


def test_one_document_fills_many_shards(tmp_path):
    (tmp_path / "long.txt").write_text("abcdefghij" * 500)
    assert prepare("--dataset", tmp_path / "long.txt", "--out-dir", tmp_path / "out", "--shard-size", 300) == 0
    assert row(tmp_path / "out") == expected(["abcdefghij" * 500])


def test_tokenize_with_gpt2s_vocabulary(tmp_path, corpus, gpt2_tokenizer):
    assert prepare("--dataset", corpus, "--out-dir", tmp_path / "out", "--tokenizer", "gpt2", "--shard-size", 200) == 0
    assert row(tmp_path / "out") == expected(TEXTS, "gpt2")


@pytest.mark.slow
def test_killed_at_random_writes_gives_same_bytes(tmp_path):
    """SIGKILL stops ten launches within about a millisecond of a random write. The last launch completes."""
    generator = random.Random(0)
    lines = [json.dumps({"text": "".join(generator.choices("abcdé ", k=generator.randrange(60_000)))}) for _ in range(600)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    argv = ["fineweb", "--dataset", tmp_path / "in.jsonl", "--shard-size", 700_000, "--tokenizer", "bytes", "--workers", 2, "--out-dir"]
    assert forked(tmp_path, *argv, tmp_path / "complete").returncode == 0
    killed = tmp_path / "killed"
    for _ in range(10):
        kill = partial(kill_at_write, killed, generator.randint(2, 12), generator.choice([0, 0.0005, 0.002]))
        assert forked(tmp_path, *argv, killed, first=kill).returncode == -signal.SIGKILL
    assert len(list(killed.glob("*.npy"))) > 3
    assert forked(tmp_path, *argv, killed).returncode == 0
    assert bytes_of(tmp_path / "complete") == bytes_of(killed)


def test_resume_from_every_point_gives_same_bytes(tmp_path, corpus, monkeypatch):
    """Deterministic version: each launch stops right after it records its first new shards."""
    argv = ["--dataset", corpus, "--shard-size", 150]
    prepare(*argv, "--out-dir", tmp_path / "complete")
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 70)
    write_json = preparation.write_json

    def stop_at_second_progress(path, content):
        write_json(path, content)
        recorded.append(path.name)
        if recorded.count("progress.json") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "write_json", stop_at_second_progress)
    for launches in range(1, 100):  # noqa: B007
        recorded = []
        if prepare(*argv, "--out-dir", tmp_path / "stopped") == 0:
            break
    assert launches > 3
    assert bytes_of(tmp_path / "complete") == bytes_of(tmp_path / "stopped")


def test_complete_folder_is_left_alone(tmp_path, corpus, capsys):
    argv = ["--dataset", corpus, "--out-dir", tmp_path / "out"]
    prepare(*argv)
    before = bytes_of(tmp_path / "out")
    assert prepare(*argv) == 0 and "already complete" in capsys.readouterr().out
    assert bytes_of(tmp_path / "out") == before
    assert prepare(*argv, "--shard-size", 77) == 2 and "other settings" in capsys.readouterr().err


def test_changed_input_files_are_detected(tmp_path, corpus, capsys):
    docs = shutil.copy(corpus, tmp_path / "copy.jsonl")
    argv = ["--dataset", docs, "--out-dir", tmp_path / "out"]
    prepare(*argv)
    with open(docs, "a") as file:
        file.write('{"text": "one more"}\n')
    assert prepare(*argv) == 2 and "the files changed since" in capsys.readouterr().err
    os.unlink(docs)  # complete shards don't need the text
    assert prepare(*argv) == 0


def test_too_small_corpus_leaves_no_files(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("")
    argv = ["--dataset", tmp_path / "a.txt", "--out-dir", tmp_path / "out"]
    assert prepare(*argv) == 2 and "give more text" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("enough")
    assert prepare(*argv) == 0


@pytest.mark.parametrize(
    ("files", "argv", "message"),
    [
        ({}, ["--dataset", "nowhere/at/all"], "not found"),
        ({}, ["--dataset", "{}"], "contains no .parquet"),
        ({"a.pdf": b"x"}, ["--dataset", "{}/a.pdf"], "give a folder, or a file that ends in .parquet"),
        ({"a.txt": b""}, ["--dataset", "{}/a.txt"], "not enough tokens"),
        (
            {"a.jsonl": b'{"text": "x"}\n{"txt": 1}\n'},
            ["--dataset", "{}/a.jsonl"],
            "line 2: the field 'text' is missing (it has txt): choose another with --text-field",
        ),
        ({"a.jsonl": b"not json"}, ["--dataset", "{}/a.jsonl"], "line 1"),
        ({"a.jsonl": b"[" * 200_000}, ["--dataset", "{}/a.jsonl"], "line 1"),
        ({}, ["--dataset"], "--dataset has no value"),
        ({"a.jsonl": b'{"text": "x"}\n{"text": "cut off he'}, ["--dataset", "{}/a.jsonl"], "line 2"),
        ({"a.jsonl": b'["text"]'}, ["--dataset", "{}/a.jsonl"], "line 1"),
        ({"a.jsonl": b'{"text": ["x", {"y": 1}]}'}, ["--dataset", "{}/a.jsonl"], "line 1"),
        ({"a.jsonl": b'[{"text": "x"}, {"text": "y"}]'}, ["--dataset", "{}/a.jsonl"], "line 1"),
        ({"a.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 9)[:-9]}, ["--dataset", "{}/a.jsonl.gz"], "is truncated or damaged"),
        ({"a.jsonl": b'{"text": 5}'}, ["--dataset", "{}/a.jsonl"], "line 1"),
        ({"a.jsonl": b'{"text": "x"}\n\n{"text": null}'}, ["--dataset", "{}/a.jsonl"], "line 3"),
        ({}, ["--dataset", "/dev/zero"], "give a folder, or a file that ends in .parquet"),
        ({"a.jsonl.gz": b"not gzip"}, ["--dataset", "{}/a.jsonl.gz"], "a.jsonl.gz"),
        ({"a.parquet": b"PAR1"}, ["--dataset", "{}/a.parquet"], "a.parquet: it is truncated or damaged"),
        ({"a.txt": b"hello"}, ["--dataset", "{}/a.txt", "--shard-size", "0"], "--shard-size is 0: it must be at least 1"),
        ({"a.txt": b"hello", "out/a_train_000001.npy": b""}, ["--dataset", "{}/a.txt"], "shards that this command did not make"),
    ],
)
def test_bad_input_is_a_one_line_error(tmp_path, capsys, files, argv, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert prepare(*[word.format(tmp_path) for word in argv], "--out-dir", tmp_path / "out") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


def test_parquet_without_text_column_is_named(tmp_path, capsys):
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    assert prepare("--dataset", tmp_path / "a.parquet", "--out-dir", tmp_path / "out") == 2
    assert "a.parquet: the field 'text' is missing (it has content): choose another with --text-field" in the_error(capsys.readouterr().err)


# ---- parts ----


@pytest.fixture
def files(tmp_path):
    """Returns a folder with TEXTS in five parquet files, one of them empty."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index, (first, last) in enumerate(itertools.pairwise([0, 9, 20, 20, 31, len(TEXTS)])):
        pq.write_table(pa.table({"text": pa.array(TEXTS[first:last], pa.string())}), folder / f"{index}.parquet", row_group_size=4)
    return folder


@pytest.mark.parametrize(("parts", "size"), [(1, 300), (2, 300), (3, 10**6), (5, 77)])
def test_joined_parts_equal_a_run_without_parts(tmp_path, files, capsys, parts, size):
    out, argv = tmp_path / "out", ["--dataset", files, "--shard-size", size, "--out-dir"]
    numbers = random.Random(parts).sample(range(1, parts + 1), parts)
    for number in numbers[:-1]:
        assert prepare(*argv, out, "--part", f"{number}/{parts}") == 0
        assert "still lacks" in capsys.readouterr().out and not (out / "manifest.json").exists()
    assert prepare(*argv, out, "--part", f"{numbers[-1]}/{parts}") == 0
    assert row(out) == expected(TEXTS)
    manifest = read_json(out / "manifest.json", "")
    names = [shard["file"] for shard in manifest["shards"]]
    assert names == [f"in_{'train' if i else 'val'}_{i:06d}.npy" for i in range(len(names))]
    assert sorted(path.name for path in out.iterdir()) == sorted([".lock", "manifest.json", "sources.json", *names])
    bounds = {1: [0, 41], 2: [0, 20, 41], 3: [0, 9, 20, 41], 5: [0, 9, 20, 20, 31, 41]}[parts]  # of the parts, in TEXTS
    first, *others = [len(expected(TEXTS[start:stop])) for start, stop in itertools.pairwise(bounds)]
    val = size if first >= 2 * size else first // 10
    sizes = [min(size, total - start) for total in (first - val, *others) for start in range(0, total, size)]
    assert [shard["tokens"] for shard in manifest["shards"]] == [val, *sizes]
    assert prepare(*argv, tmp_path / "plain") == 0
    plain = read_json(tmp_path / "plain" / "manifest.json", "")
    assert {key: plain[key] for key in plain if key != "shards"} == {key: manifest[key] for key in manifest if key != "shards"}
    before = bytes_of(out)
    shutil.rmtree(files)  # the documents are not read again
    for again in ([], ["--part", f"1/{parts}"]):
        assert prepare(*argv, out, *again) == 0 and "already complete" in capsys.readouterr().out
    assert bytes_of(out) == before


@pytest.mark.parametrize("limit", [300, 1001])
def test_parts_divide_max_tokens(tmp_path, files, limit):
    out = tmp_path / "out"
    for number in (1, 2):
        assert prepare("--dataset", files, "--out-dir", out, "--max-tokens", limit, "--part", f"{number}/2") == 0
    half = limit // 2
    assert row(out) == expected(TEXTS[:20])[:half] + expected(TEXTS[20:])[: limit - half]


def test_resume_opens_no_finished_file(tmp_path, files, monkeypatch):
    opened, read = [], reading.read_file
    monkeypatch.setattr(reading, "read_file", lambda path, how: opened.append(path.name) or read(path, how))
    documents = LocalDocuments(folders.list_files([files], "text").files)
    states = [documents.state() for _ in documents]
    for number, state in enumerate(states, 1):
        again, opened[:] = LocalDocuments(documents.files), []
        again.load_state(json.loads(json.dumps(state)))
        assert list(again) == TEXTS[number:]
        assert opened[0] == f"{0 if number <= 9 else 1 if number <= 20 else 3 if number <= 31 else 4}.parquet"
        again.load_state({"documents": number})  # the format before --part existed
        again.file = 0
        assert list(again) == TEXTS[number:]


@pytest.mark.slow
def test_part_killed_at_any_write_gives_same_bytes(tmp_path, files):
    """SIGKILL hits while it makes shards, joins the parts or cleans up. Then the same command runs again."""
    argv = ["fineweb", "--dataset", files, "--tokenizer", "bytes", "--workers", 1, "--shard-size", 150]

    def make(out, **how):
        return forked(tmp_path, *argv, "--out-dir", out, "--part", "1/2", **how).returncode

    assert prepare("--dataset", files, "--shard-size", 150, "--out-dir", tmp_path / "second", "--part", "2/2") == 0
    shutil.copytree(tmp_path / "second", tmp_path / "complete")
    assert make(tmp_path / "complete") == 0
    kills = 0
    for number in itertools.count(3, 11):
        out = tmp_path / f"killed-{number}"
        shutil.copytree(tmp_path / "second", out)
        status = make(out, first=partial(kill_at_write, out, number))
        if status == 0:
            break
        kills += 1
        assert status == -signal.SIGKILL and make(out) == 0
        assert bytes_of(tmp_path / "complete") == bytes_of(out)
    assert kills > 5


@pytest.mark.slow
def test_parallel_parts_from_the_hub_are_joined(tmp_path, fineweb_edu):
    """One part resumes in the middle of a file. Whichever part ends last joins them."""
    out = tmp_path / "out"

    def start(number, **how):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        env = {"HF_ENDPOINT": url, "HF_HOME": tmp_path / "hf", "HF_HUB_DISABLE_XET": 1, "HF_HUB_DISABLE_TELEMETRY": 1}
        argv = ["--tokenizer", "bytes", "--workers", 1, "--shard-size", 150, "--out-dir", out, "--part", f"{number}/3"]
        return Forked(folder, "fineweb", *argv, **env, **how)

    with serve({"datasets/HuggingFaceFW/fineweb-edu": fineweb_edu}) as (url, _):
        assert start(2, first=stop_after_two_shards).wait().returncode == 9
        results = [process.wait() for process in [start(1), start(2), start(3)]]
        assert [result.returncode for result in results] == [0, 0, 0], results
        result = from_hub(url, tmp_path, "--out-dir", tmp_path / "other", "--part", "4/4")
    assert row(out) == expected(TEXTS[:39])
    assert read_json(out / "manifest.json", "")["revision"] == SHA and not list(out.glob("part-*"))
    assert result.returncode == 2 and "--part 4/4 is too fine, the dataset has 3 files: make at most 3 parts" in the_error(result.stderr)


def test_only_one_process_may_make_a_part(tmp_path, files, capsys):
    argv = ["--dataset", files, "--out-dir", tmp_path / "out", "--part"]
    with lock_folder(tmp_path / "out" / "part-2-of-2"):
        assert prepare(*argv, "2/2") == 2 and "another process is writing into" in the_error(capsys.readouterr().err)
        assert prepare(*argv, "1/2") == 0


def test_mismatched_parts_are_refused_and_nothing_moves(tmp_path, files, capsys):
    """After the fix that the message names, the parts are joined."""
    out = tmp_path / "out"
    argv = ["--dataset", files, "--shard-size", 300, "--out-dir", out]
    second, foreign = out / "part-2-of-2", out / "in_train_000001.npy"

    def check_refused(message, *more):
        before = bytes_of_tree(out)
        assert prepare(*argv, *more) == 2
        assert message in the_error(capsys.readouterr().err)
        assert bytes_of_tree(out) == before

    assert prepare(*argv, "--part", "1/2") == 0
    check_refused("still lacks part-2-of-2: make them with --part or copy their folders there, then run the same command")
    check_refused("mixes parts of 2 and of 3: move one kind elsewhere", "--part", "1/3")
    prepare(*argv, "--shard-size", 200, "--part", "2/2")
    capsys.readouterr()
    check_refused("part-2-of-2 was made with other settings (--shard-size 300 here, 200 there): use the same, or move it away and make")
    shutil.rmtree(second)
    (files / "5.txt").write_text("one more file")
    prepare(*argv, "--part", "2/2")
    capsys.readouterr()
    check_refused("move one away and make it again from the same data", "--part", "2/2")
    (files / "5.txt").unlink()
    shutil.rmtree(second)
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_bytes(b"someone's")
    prepare(*argv, "--part", "2/2")
    capsys.readouterr()
    check_refused("in_train_000001.npy is in the way of")
    foreign.unlink()
    shutil.move(second, tmp_path / "second")
    shutil.copytree(out / "part-1-of-2", second)  # two machines made the same part
    check_refused("part-2-of-2 has part 1/2: move it away, and make or copy the right one")
    shutil.rmtree(second), shutil.move(tmp_path / "second", second)
    shutil.move(second / "in_train_000001.npy", tmp_path / "elsewhere")
    check_refused("in_train_000001.npy is missing: copy it back")
    shutil.move(tmp_path / "elsewhere", second / "in_train_000001.npy")
    assert prepare(*argv) == 0
    assert row(out) == expected(TEXTS)


@pytest.mark.parametrize(("step", "call"), [("open_documents", 1), ("write_progress", 2)])
def test_start_and_end_spare_anothers_folder(tmp_path, capsys, monkeypatch, step, call):
    """The folder is moved while files are hashed, or before the shard of a text that is too short is deleted."""
    (tmp_path / "short.txt").touch()
    out, plain, calls = tmp_path / "out", getattr(fineweb, step), []

    def move(*args):
        result = plain(*args)
        calls.append(args)
        if len(calls) == call:
            os.rename(out, tmp_path / "moved")
            shutil.copytree(tmp_path / "moved", out)
            calls.append(bytes_of_tree(out))
        return result

    monkeypatch.setattr(fineweb, step, move)
    assert prepare("--dataset", tmp_path / "short.txt", "--out-dir", out) == 2
    assert "moved: continue there; this process was writing into it" in the_error(capsys.readouterr().err)
    assert bytes_of_tree(out) == calls[call]


def bytes_of_tree(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def test_part_that_was_not_joined_is_kept(tmp_path, files, capsys):
    """Someone copies a part of another set into a finished folder."""
    argv, out = ["--dataset", files, "--shard-size", 300, "--out-dir"], tmp_path / "out"
    assert prepare(*argv, tmp_path / "other", "--part", "2/3") == 0 and prepare(*argv, out) == 0
    shutil.copytree(tmp_path / "other" / "part-2-of-3", out / "part-2-of-3")
    (out / "part-1-of-3").mkdir()  # as after a kill: its shards are joined
    before = bytes_of_tree(out)
    for more in ([], ["--part", "2/3"]):
        capsys.readouterr()
        assert prepare(*argv, out, *more) == 2
        assert f"part-2-of-3 was not joined: {out} was complete before; move it elsewhere" in the_error(capsys.readouterr().err)
        assert bytes_of_tree(out) == before and not (out / "part-1-of-3").exists()


@pytest.mark.parametrize("step", ["check_parts_match", "write_sources"])
def test_join_never_writes_into_anothers_folder(tmp_path, files, capsys, monkeypatch, step):
    """The folder is moved away while its parts are joined, and another one lies under its name."""
    argv, out, plain = ["--dataset", files, "--shard-size", 300, "--out-dir", tmp_path / "out"], tmp_path / "out", getattr(parts, step)
    assert prepare(*argv, "--part", "1/2") == 0

    def move(*args):
        plain(*args)
        if step == "check_parts_match" or args[0] == out:
            os.rename(out, tmp_path / "moved")
            shutil.copytree(tmp_path / "moved", out)

    monkeypatch.setattr(parts, step, move)
    assert prepare(*argv, "--part", "2/2") == 2
    assert "moved: continue there; this process was writing into it" in the_error(capsys.readouterr().err)
    assert bytes_of_tree(out).keys() == {path.replace("/moved/", "/out/") for path in bytes_of_tree(tmp_path / "moved")}
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--part", "0/2"], "--part is 0/2: give it as 3/8"),
        (["--part", "3/2", "--shard-size", "0"], "--shard-size is 0: it must be at least 1; --part is 3/2"),
        (["--part", "x"], "--part is x"),
        (["--part", "6/6"], "--part 6/6 is too fine, the dataset has 5 files: make at most 5 parts"),
        (["--part", "1/2", "--pretokenized"], "does not work with --pretokenized: leave one of them out"),
        (["--pretokenized", "--dataset", "a/b", "c/d"], "--pretokenized takes one dataset on the hub: leave out the others"),
    ],
)
def test_invalid_part_is_a_one_line_error(tmp_path, files, capsys, argv, message):
    assert prepare("--dataset", files, "--out-dir", tmp_path / "out", *argv) == 2
    assert message in the_error(capsys.readouterr().err)


@pytest.mark.parametrize("damage", ["progress.json", "manifest.json", "sources.json"])
def test_damaged_record_is_one_line(tmp_path, corpus, capsys, monkeypatch, damage):
    """Puts a wrong value at each place of a JSON file. No traceback, and no advice to delete."""
    out, argv = tmp_path / "out", ["--dataset", corpus, "--shard-size", 1000, "--out-dir", tmp_path / "out"]
    if damage != "manifest.json":
        monkeypatch.setattr(fineweb, "CHUNK_CHARS", 70)
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            assert prepare(*argv) == 130
    else:
        assert prepare(*argv) == 0
    if damage == "sources.json":
        corpus.write_text(corpus.read_text().replace("Document", "DOCUMENT"))
    kept, refused = bytes_of_tree(out), 0
    for content in damaged_values(json.loads(kept[str(out / damage)])):
        for path, old in kept.items():
            Path(path).write_bytes(old)
        (out / damage).write_text(json.dumps(content))
        capsys.readouterr()
        if status := prepare(*argv):
            refused += 1
            error = the_error(capsys.readouterr().err)
            assert status == 2 and "delete" not in error, error
        assert status or damage == "manifest.json"  # a wrong digit in the progress would lose or repeat text
    assert refused > 5


def damaged_values(content):
    """Yields copies of JSON, each with one value replaced by one of another type or size."""
    for key in list(content) if isinstance(content, dict) else range(len(content))[:1]:
        for wrong in (None, -1, 10**30, "x", [], {}, True):
            copy = json.loads(json.dumps(content))
            copy[key] = wrong
            if copy != content:
                yield copy
        if isinstance(content[key], dict | list):
            for inner in damaged_values(content[key]):
                copy = json.loads(json.dumps(content))
                copy[key] = inner
                yield copy


def test_part_in_an_unfinished_folder_is_refused(tmp_path, files, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "progress.json").write_text("{}")
    assert prepare("--dataset", files, "--out-dir", tmp_path / "out", "--part", "1/2") == 2
    assert "has an unfinished run without --part" in the_error(capsys.readouterr().err)


def test_training_needs_joined_parts(tmp_path, files, capsys):
    argv = ["--dataset", files, "--shard-size", 300, "--out-dir", tmp_path / "out", "--part"]
    prepare(*argv, "1/2")
    assert run_train(tmp_path / "out", tmp_path / "log") == 2
    assert "has parts that are not joined yet: run the same fineweb.py command without --part" in the_error(capsys.readouterr().err)
    prepare(*argv, "2/2")
    assert run_train(tmp_path / "out", tmp_path / "log", "--max-steps", 2, "--val-tokens", 64) == 0


# ---- which text it is ----


def text_folder(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def stop_after(monkeypatch, count: int):
    """Stops each launch like a kill, right after it recorded its `count`-th progress."""
    write_json, recorded = preparation.write_json, []

    def stop(path, content):
        write_json(path, content)
        recorded.append(path.name)
        if recorded.count("progress.json") == count:
            recorded.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "write_json", stop)


def test_edit_that_keeps_the_size_is_named(tmp_path, capsys):
    docs = text_folder(tmp_path / "d", a="the cat sat\n" * 50, b="on the mat\n")
    before = (docs / "a.txt").stat()
    argv = ["--dataset", docs, "--out-dir", tmp_path / "out"]
    assert prepare(*argv) == 0
    text_folder(docs, a="the dog sat\n" * 50)
    os.utime(docs / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    capsys.readouterr()
    assert prepare(*argv) == 2
    assert "out was made from them (changed: d/a.txt): choose another folder" in the_error(capsys.readouterr().err)
    text_folder(docs, a="the cat sat\n" * 50, c="new")
    (docs / "b.txt").unlink()
    assert prepare(*argv) == 2 and "(missing: d/b.txt; new: d/c.txt)" in the_error(capsys.readouterr().err)


def test_resume_never_mixes_old_and_new_text(tmp_path, capsys, monkeypatch):
    docs = text_folder(tmp_path / "d", a="a" * 500, b="b" * 500, c="c" * 500)
    argv = ["--dataset", docs, "--shard-size", 200, "--out-dir"]
    assert prepare(*argv, tmp_path / "complete") == 0
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 70)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert prepare(*argv, tmp_path / "out") == 130
    text_folder(docs, a="A" * 500)
    capsys.readouterr()
    assert prepare(*argv, tmp_path / "out") == 2
    assert (
        "files changed after the first run into" in (error := the_error(capsys.readouterr().err)) and "(changed: d/a.txt): restore" in error
    )
    text_folder(docs, a="a" * 500)
    assert prepare(*argv, tmp_path / "out") == 0
    assert bytes_of(tmp_path / "complete") == bytes_of(tmp_path / "out")


@pytest.mark.parametrize("change", [lambda path: path.write_text("B" * 500), os.unlink])
def test_file_that_changes_midway_is_named(tmp_path, capsys, monkeypatch, change):
    docs = text_folder(tmp_path / "d", a="a" * 500, b="b" * 500)
    read = reading.read_file

    def change_the_next(path, how):
        yield from read(path, how)
        if path.name == "a.txt":
            change(docs / "b.txt")

    monkeypatch.setattr(reading, "read_file", change_the_next)
    assert prepare("--dataset", docs, "--out-dir", tmp_path / "out") == 2
    error = the_error(capsys.readouterr().err)
    assert "d/b.txt changed while it was read" in error or "d/b.txt can't be read any more (No such file or directory)" in error
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_other_settings_are_named(tmp_path, capsys, monkeypatch):
    docs = text_folder(tmp_path / "d", a="a" * 500)
    argv = ["--dataset", docs, "--out-dir", tmp_path / "out"]
    assert prepare(*argv, "--shard-size", 100) == 0
    capsys.readouterr()
    assert prepare(*argv, "--shard-size", 200, "--text-field", "body", "--name", "") == 2
    named = "(--name '' here, sample-10BT there; --text-field body here, text there; --shard-size 200 here, 100 there)"
    assert f"{tmp_path}/out has shards made with other settings {named}: choose another folder" in the_error(capsys.readouterr().err)
    monkeypatch.chdir(tmp_path)
    for same in ("d", "d/", "./d", "d/../d"):
        assert prepare("--dataset", same, "--out-dir", "out", "--shard-size", 100, "--skip-bad-rows") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert prepare("--dataset", docs, "--out-dir", "half", "--shard-size", 100) == 130
    capsys.readouterr()
    assert prepare("--dataset", docs, "--out-dir", "half", "--shard-size", 100, "--max-tokens", 300) == 2
    assert "has an unfinished run with other settings (--max-tokens 300 here, 0 there)" in the_error(capsys.readouterr().err)


def as_older(folder, files: list):
    """Rewrites a folder's manifest or progress as versions before --skip-bad-rows wrote it."""
    for path in (folder / "manifest.json", folder / "progress.json"):
        if path.exists():
            content = read_json(path, "")
            content.pop("seal", None)
            content["revision"] = folders.older_revision([reading.Found("", file) for file in files])
            for name in ("text_field", "skip_bad_rows"):
                del content["settings"][name]
            if content.get("state"):
                del content["state"]["skipped"]
            path.write_text(json.dumps(content))
    (folder / "sources.json").unlink()


def test_older_folder_is_compared_by_names_and_sizes(tmp_path, capsys):
    docs = text_folder(tmp_path / "d", a="a" * 500)
    assert prepare("--dataset", docs, "--out-dir", tmp_path / "out") == 0
    text_folder(docs / ".hidden", h="older versions read this too")
    (docs / "B.TXT").write_text("but not this")
    as_older(tmp_path / "out", [docs / ".hidden" / "h.txt", docs / "a.txt"])
    assert prepare("--dataset", docs, "--out-dir", tmp_path / "out") == 0 and "already complete" in capsys.readouterr().out
    text_folder(docs, a="a" * 501)
    assert prepare("--dataset", docs, "--out-dir", tmp_path / "out") == 2 and "the files changed since" in capsys.readouterr().err


def test_older_preparation_continues_as_it_began(tmp_path, monkeypatch):
    """Its second half reads a hidden file, a byte order mark and wrong bytes as older versions did."""
    docs = text_folder(tmp_path / "d", a="a" * 500)
    argv = ["--dataset", docs, "--shard-size", 200, "--out-dir", tmp_path / "out"]
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 70)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert prepare(*argv) == 130
    (docs / "b.txt").write_bytes("\ufeffb\r\n".encode() + b"\xff")
    text_folder(docs, c="c")
    (docs / ".d.txt").write_text("d")
    as_older(tmp_path / "out", [docs / "a.txt", docs / "b.txt", docs / "c.txt"])
    assert prepare(*argv) == 2  # .d.txt is new
    (docs / ".d.txt").rename(docs / "c.py")
    as_older_files = sorted(docs.iterdir())
    progress = read_json(tmp_path / "out" / "progress.json", "")
    progress["revision"] = folders.older_revision([reading.Found("", file) for file in as_older_files])
    (tmp_path / "out" / "progress.json").write_text(json.dumps(progress))
    assert prepare(*argv) == 0
    assert row(tmp_path / "out") == expected(["a" * 500, "\ufeffb\n\N{REPLACEMENT CHARACTER}", "d", "c"])


# ---- bad rows ----

BAD_ROWS = [b'{"text": null}', b"cut", b'{"text": "\xff"}', b'{"body": "x"}']


@pytest.fixture
def bad_files(tmp_path):
    """Returns a folder of three files. Bad rows are everywhere, also at the start, at the end and alone in a file."""
    rows = [json.dumps({"text": f"good {i} " + "x" * (i * 7 % 40)}).encode() for i in range(40)]
    mixed = [BAD_ROWS[0], *(line for i, row in enumerate(rows) for line in (row, *BAD_ROWS[: i % 5])), BAD_ROWS[1]]
    (tmp_path / "in").mkdir()
    for name, lines in {"a": mixed[:60], "b": BAD_ROWS, "c": mixed[60:], "d": BAD_ROWS}.items():
        (tmp_path / "in" / f"{name}.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path / "in", [json.loads(row)["text"] for row in rows], len(mixed) + 8 - 40


def test_skipped_rows_are_counted_in_the_manifest(tmp_path, bad_files, capsys, monkeypatch):
    folder, texts, count = bad_files
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 1)  # so the last chunk has bad rows alone
    argv = ["--dataset", folder, "--shard-size", 300, "--out-dir"]
    assert prepare(*argv, tmp_path / "strict") == 2
    assert f"{folder}/a.jsonl, line 1: the field 'text' is null: fix" in the_error(capsys.readouterr().err)
    assert prepare(*argv, tmp_path / "out", "--skip-bad-rows") == 0
    assert row(tmp_path / "out") == expected(texts)
    skipped = read_json(tmp_path / "out" / "manifest.json", "")["skipped"]
    assert sum(entry["rows"] for entry in skipped.values()) == count
    assert f"--skip-bad-rows left out {count} rows: " in capsys.readouterr().err
    assert prepare(*argv, tmp_path / "out") == 2
    assert "(--skip-bad-rows False here, True there)" in the_error(capsys.readouterr().err)


def test_skipped_rows_survive_a_kill_anywhere(tmp_path, bad_files, monkeypatch):
    folder, _, _ = bad_files
    argv = ["--dataset", folder, "--shard-size", 60, "--skip-bad-rows", "--out-dir"]
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 70)
    assert prepare(*argv, tmp_path / "complete") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        launches = 0
        while prepare(*argv, tmp_path / "stopped") == 130:
            launches += 1
    assert launches > 8
    assert bytes_of(tmp_path / "complete") == bytes_of(tmp_path / "stopped")


@pytest.mark.parametrize("limit", [0, 500])
def test_count_of_skipped_rows_ignores_workers_and_parts(tmp_path, bad_files, monkeypatch, limit):
    folder, _, count = bad_files
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 70)
    argv = ["--dataset", folder, "--shard-size", 300, "--max-tokens", limit, "--skip-bad-rows", "--out-dir"]
    for workers in (1, 3):
        assert prepare(*argv, tmp_path / f"out{workers}", "--workers", workers) == 0
    assert bytes_of(tmp_path / "out1") == bytes_of(tmp_path / "out3")
    if not limit:
        for part in (1, 2):
            assert prepare(*argv, tmp_path / "parts", "--part", f"{part}/2") == 0
        plain, joined = (read_json(tmp_path / name / "manifest.json", "") for name in ("out1", "parts"))
        assert joined["skipped"].keys() == plain["skipped"].keys() and joined["revision"] == plain["revision"]
        assert sum(entry["rows"] for entry in joined["skipped"].values()) == count


def test_skip_bad_rows_may_be_added_later(tmp_path, monkeypatch, capsys):
    """A bad row late in a large file must not cost what is already tokenized."""
    rows = [json.dumps({"text": "x" * 100}) for _ in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, "cut off", *rows]))
    argv = ["--dataset", tmp_path / "a.jsonl", "--shard-size", 300, "--out-dir"]
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 70)
    assert prepare(*argv, tmp_path / "out") == 2 and "line 21: not JSON" in the_error(capsys.readouterr().err)
    before = (tmp_path / "out" / "a_val_000000.npy").stat().st_mtime_ns
    assert prepare(*argv, tmp_path / "out", "--skip-bad-rows") == 0
    assert (tmp_path / "out" / "a_val_000000.npy").stat().st_mtime_ns == before
    assert prepare(*argv, tmp_path / "complete", "--skip-bad-rows") == 0
    assert bytes_of(tmp_path / "complete") == bytes_of(tmp_path / "out")


@pytest.mark.slow
def test_hub_rows_are_named_or_skipped(tmp_path, fineweb_edu):
    values = pa.array([b"one", None, b"two", b"\xff", b"\xfe", b"three", b"\xfd"])
    texts = pa.StringArray.from_buffers(len(values), values.buffers()[1], values.buffers()[2], values.buffers()[0])
    pq.write_table(pa.table({"body": texts, "id": range(7)}), tmp_path / "rows.parquet", row_group_size=3)
    repo = {"README.md": CARD, "sample/10BT/000_00000.parquet": (tmp_path / "rows.parquet").read_bytes()}
    with serve({"datasets/HuggingFaceFW/fineweb-edu": repo}) as (url, _):
        result = from_hub(url, tmp_path, "--out-dir", tmp_path / "none")
        assert result.returncode == 2 and "--text-field" in the_error(result.stderr)
        argv = ("--text-field", "body", "--out-dir", tmp_path / "out")
        result = from_hub(url, tmp_path, *argv)
        assert result.returncode == 2 and "fineweb-edu, row 2: the field 'body' is null" in the_error(result.stderr)
        result = from_hub(url, tmp_path, *argv, "--skip-bad-rows")
    assert result.returncode == 0, result.stderr
    assert row(tmp_path / "out") == expected(["one", "two", "three"])
    manifest = read_json(tmp_path / "out" / "manifest.json", "")
    places = {kind: (entry["rows"], entry["first"]) for kind, entry in manifest["skipped"].items()}
    rows = [f"HuggingFaceFW/fineweb-edu, row {number}" for number in (2, 4, 5, 7)]
    assert places == {"null": (1, rows[:1]), "not UTF-8": (3, rows[1:])}


# ---- a full disk ----


@contextmanager
def disk_of(room: int):
    """Limits each file to `room` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("room", [50, 1000, 4000, 4127])  # a progress file has some 900 bytes, a shard 4128
def test_full_disk_then_run_again(tmp_path, capsys, corpus, room):
    argv = ["--dataset", corpus, "--shard-size", 2000, "--out-dir"]
    assert prepare(*argv, tmp_path / "complete") == 0
    with disk_of(room):
        assert prepare(*argv, tmp_path / "full") == 1
    assert "MB free, a token takes two bytes: free some space and run the command again" in the_error(capsys.readouterr().err)
    assert not [path for path in (tmp_path / "full").glob("*") if path.suffix in (".npy", ".tmp")]
    assert prepare(*argv, tmp_path / "full") == 0
    assert bytes_of(tmp_path / "complete") == bytes_of(tmp_path / "full")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_disk_full_at_any_write_then_run_again(tmp_path, monkeypatch, capsys, corpus, name):
    argv = ["--dataset", corpus, "--shard-size", 1000, "--out-dir"]
    assert prepare(*argv, tmp_path / "complete") == 0
    real = getattr(os, name)
    for number in itertools.count(1):
        left = [number]

        def fail(*args, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
            return real(*args)

        capsys.readouterr()
        monkeypatch.setattr(os, name, fail)
        status = prepare(*argv, tmp_path / str(number))
        monkeypatch.setattr(os, name, real)
        if status == 0:
            break
        assert status == 1 and "free some space" in the_error(capsys.readouterr().err)
        assert prepare(*argv, tmp_path / str(number)) == 0
        assert bytes_of(tmp_path / "complete") == bytes_of(tmp_path / str(number))
    assert number > 8


def test_full_disk_while_downloading_is_not_retried(monkeypatch):
    def disk_full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_sleep(seconds):
        raise AssertionError("retried")

    monkeypatch.setattr("tiktoken.get_encoding", disk_full)
    monkeypatch.setattr(time, "sleep", no_sleep)
    monkeypatch.setattr(hub, "hub_info", lambda *args: SimpleNamespace(sha=SHA))
    monkeypatch.setattr(hub, "retry", lambda *args: None)
    documents = hub.HubDocuments("x/y", "", "", (0, 1))
    documents.dataset = map(disk_full, [1])
    for fetch in (lambda: get_tokenizer.__wrapped__("gpt2"), lambda: next(iter(documents))):
        with pytest.raises(OSError, match="No space left"):
            fetch()


# ---- the hub, on localhost ----

CARD = (
    b"---\nconfigs:\n"
    + b"".join(
        b"- config_name: sample-%b\n  data_files:\n  - split: train\n    path: sample/%b/*\n" % (size, size) for size in (b"10BT", b"100BT")
    )
    + b"---\n"
)


@pytest.fixture
def fineweb_edu(tmp_path) -> dict[str, bytes]:
    """Returns a repo like FineWeb-Edu: a card that lists the sample's files, several columns and many row groups."""
    files = {"README.md": CARD}
    for index in range(3):
        path = tmp_path / "part.parquet"
        texts = TEXTS[index * 13 : index * 13 + 13]
        pq.write_table(pa.table({"text": texts, "id": texts, "token_count": range(len(texts))}), path, row_group_size=4)
        files[f"sample/10BT/{index:03d}_00000.parquet"] = path.read_bytes()
    return files


def from_hub(url, tmp_path, *argv, **how):
    env = {"HF_ENDPOINT": url, "HF_HOME": tmp_path / "hf", "HF_HUB_DISABLE_XET": 1, "HF_HUB_DISABLE_TELEMETRY": 1}
    return forked(tmp_path, "fineweb", "--tokenizer", "bytes", "--workers", 1, *argv, **env | how)


def test_stream_from_hub_and_record_commit(tmp_path, fineweb_edu):
    out = tmp_path / "out"
    with serve({"datasets/HuggingFaceFW/fineweb-edu": fineweb_edu}) as (url, requests):
        result = from_hub(url, tmp_path, "--out-dir", out, "--shard-size", 500)
    assert result.returncode == 0, result.stderr
    assert row(out) == expected(TEXTS[:39])
    manifest = read_json(out / "manifest.json", "")
    assert (manifest["source"], manifest["revision"]) == ("HuggingFaceFW/fineweb-edu", SHA)
    assert not any("resolve/main" in request for request in requests)


def exit_after(pieces: int):
    """Ends the process when it has recorded this number of pieces."""
    plain, numbers = fineweb.write_progress, itertools.count(1)

    def write_progress(out, progress):
        plain(out, progress)
        if progress["shards"] and next(numbers) == pieces:
            sys.exit(9)

    fineweb.write_progress, fineweb.CHUNK_CHARS = write_progress, 1200


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[12, 2], [12, 2, 2]], ids=str)  # a launch that continues records what is there first
def test_second_stop_doubles_no_document_of_the_hub(tmp_path, fineweb_edu, stops):
    """The next piece ends in the chunk at which the run had continued. datasets tells a state that it loaded only after the next row."""
    with serve({"datasets/HuggingFaceFW/fineweb-edu": fineweb_edu}) as (url, _):
        for pieces in stops:
            result = from_hub(url, tmp_path, "--out-dir", tmp_path / "out", "--shard-size", 100, first=partial(exit_after, pieces))
            assert result.returncode == 9, result.stderr
        result = from_hub(url, tmp_path, "--out-dir", tmp_path / "out", "--shard-size", 100)
    assert result.returncode == 0 and row(tmp_path / "out") == expected(TEXTS[:39])


def test_dropped_connections_are_retried(tmp_path, fineweb_edu):
    with serve({"datasets/HuggingFaceFW/fineweb-edu": fineweb_edu}, break_after=4) as (url, _):
        result = from_hub(url, tmp_path, "--out-dir", tmp_path / "out", "--shard-size", 500)
    assert result.returncode == 0, result.stderr
    assert row(tmp_path / "out") == expected(TEXTS[:39])


def print_sleeps():
    """Prints each sleep to stderr instead of sleeping."""
    time.sleep = lambda seconds: print("waits", int(seconds), file=sys.stderr)


@pytest.fixture
def pretokenized(tmp_path) -> dict[str, bytes]:
    files = {}
    for i in range(20):
        name = f"fineweb_{'train' if i else 'val'}_{i:06d}.bin"
        llmc_bin(tmp_path / name, np.arange(i, i + 20_000))
        files[name] = (tmp_path / name).read_bytes()
    return files


def test_busy_hub_is_retried(tmp_path, fineweb_edu, pretokenized):
    """The hub refuses each request three times: with 429, with and without Retry-After, and with 503."""
    repos = {"datasets/HuggingFaceFW/fineweb-edu": fineweb_edu, "datasets/kjj0/fineweb10B-gpt2": pretokenized}
    refusals = [(b"", 503, {}), (b"", 429, {}), (b"", 429, {"Retry-After": "77"})]
    left = {}
    with serve(repos, fault=lambda request: (left.setdefault(request, refusals.copy()) or [None]).pop()) as (url, _):
        result = from_hub(url, tmp_path, "--out-dir", tmp_path / "out", "--shard-size", 500, first=print_sleeps)
        assert result.returncode == 0 and "waits 78\n" in result.stderr, result.stderr
        assert row(tmp_path / "out") == expected(TEXTS[:39])
        result = from_hub(url, tmp_path, "--pretokenized", "--out-dir", tmp_path / "bins", "--max-tokens", 50_000, first=print_sleeps)
        assert result.returncode == 0 and "waits 78\n" in result.stderr, result.stderr
    assert bins(tmp_path / "bins").items() <= pretokenized.items()
    row(tmp_path / "bins")


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--shard-size", 400], ["--pretokenized"]])
def test_hub_busy_for_long_then_run_again(tmp_path, fineweb_edu, pretokenized, argv):
    repos = {"datasets/HuggingFaceFW/fineweb-edu": fineweb_edu, "datasets/kjj0/fineweb10B-gpt2": pretokenized}
    answers = []

    def fault(request):
        return (b"", 429, {}) if request.endswith(("001_00000.parquet", "_000007.bin")) and not answers else None

    with serve(repos, fault=fault) as (url, requests):
        result = from_hub(url, tmp_path, *argv, "--out-dir", tmp_path / "out", first=small_chunks_few_retries)
        assert result.returncode == 2 and " after 9 attempts: run the same command again later" in the_error(result.stderr)
        assert (
            len(read_json(tmp_path / "out" / "progress.json", "")["shards"]) > 1 or (tmp_path / "out" / "fineweb_train_000006.bin").exists()
        )
        answers.append(True)
        requests.clear()
        assert from_hub(url, tmp_path, *argv, "--out-dir", tmp_path / "out", first=small_chunks_few_retries).returncode == 0
        assert not any(request.endswith("000006.bin") for request in requests)
        assert from_hub(url, tmp_path, *argv, "--out-dir", tmp_path / "complete").returncode == 0
    shutil.rmtree(tmp_path / "out" / ".cache", ignore_errors=True)
    shutil.rmtree(tmp_path / "complete" / ".cache", ignore_errors=True)
    assert bytes_of(tmp_path / "complete") == bytes_of(tmp_path / "out")


def small_chunks_few_retries():
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = 2
    fineweb.CHUNK_CHARS = 60
    print_sleeps()


def test_hanging_hub_times_out_and_is_retried(tmp_path, fineweb_edu):
    """A file that hangs once is downloaded at the second try. A hanging dataset lookup ends the run."""
    over, asked = threading.Event(), set()

    def hang(request):
        if request.endswith(("002_00000.parquet", "no/such")) and request not in asked:
            asked.add(request)
            over.wait(20)

    how = {"HF_HUB_DOWNLOAD_TIMEOUT": 1, "first": short_timeout, "timeout": 15}
    with serve({"datasets/HuggingFaceFW/fineweb-edu": fineweb_edu}, fault=hang) as (url, _):
        result = from_hub(url, tmp_path, "--out-dir", tmp_path / "out", **how)
        assert result.returncode == 0, result.stderr
        result = from_hub(url, tmp_path, "--dataset", "no/such", "--out-dir", tmp_path / "none", **how)
        assert result.returncode == 2 and "(ReadTimeout: timed out): check the name, the revision and the network" in the_error(
            result.stderr
        )
        over.set()
    assert row(tmp_path / "out") == expected(TEXTS[:39]) and len(asked) == 2


def short_timeout():
    hub.HUB_TIMEOUT = 1
    print_sleeps()


def stop_after_two_shards():
    write = preparation.write_json

    def stop(path, content):
        write(path, content)
        if path.name == "progress.json" and content["shards"]:
            sys.exit(9)

    fineweb.CHUNK_CHARS, preparation.write_json = 60, stop


def test_lost_connection_drops_or_doubles_no_document(monkeypatch):
    """The dataset fails once in the middle, then fails to open twice."""
    opened = []

    class Dataset:
        def __init__(self):
            self.at = 0

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

        def __iter__(self):
            while self.at < 6:
                if self.at == 3 and len(opened) == 1:
                    raise ConnectionError("gone")
                self.at += 1
                yield {"text": str(self.at - 1)}

    def reopen(self):
        opened.append(1)
        if len(opened) in (2, 3):
            raise ConnectionError("still gone")
        return Dataset()

    monkeypatch.setattr(hub, "hub_info", lambda *args: SimpleNamespace(sha=SHA))
    monkeypatch.setattr(hub, "retry", lambda *args: None)
    monkeypatch.setattr(hub.HubDocuments, "open", reopen)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    documents = hub.HubDocuments("x/y", "", "", (0, 1))
    documents.dataset = documents.open()
    assert list(documents) == list("012345") and len(opened) == 4


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="looks the worker up in /proc")
def test_workers_exit_with_their_parent(tmp_path):
    (tmp_path / "parent.py").write_text(
        f"import sys, time, multiprocessing\nsys.path.insert(0, {str(REPO)!r})\nimport fineweb\n"
        "def work():\n    fineweb.begin_worker()\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    child = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    child.start()\n    print(child.pid, flush=True)\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    time.sleep(2)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.1)
    outlived = os.path.exists(f"/proc/{child}")
    if outlived:
        os.kill(child, signal.SIGKILL)
    assert not outlived


@pytest.mark.slow
def test_resume_streams_the_same_commit(tmp_path, fineweb_edu, monkeypatch):
    with serve({"datasets/HuggingFaceFW/fineweb-edu": fineweb_edu}) as (url, requests):
        argv = ["--shard-size", 400]
        assert from_hub(url, tmp_path, *argv, "--out-dir", tmp_path / "complete").returncode == 0
        assert from_hub(url, tmp_path, *argv, "--out-dir", tmp_path / "stopped", first=stop_after_two_shards).returncode == 9
        progress = read_json(tmp_path / "stopped" / "progress.json", "")
        assert progress["revision"] == SHA and len(progress["shards"]) == 2
        shutil.copytree(tmp_path / "stopped", tmp_path / "older")
        del progress["seal"]
        (tmp_path / "older" / "progress.json").write_text(json.dumps(progress | {"state": progress["state"]["datasets"]}))
        assert from_hub(url, tmp_path, *argv, "--out-dir", tmp_path / "older").returncode == 0
        assert bytes_of(tmp_path / "complete") == bytes_of(tmp_path / "older")
        requests.clear()
        result = from_hub(url, tmp_path, *argv, "--out-dir", tmp_path / "stopped")
        assert result.returncode == 0, result.stderr
        assert any(f"revision/{SHA}" in request for request in requests) and "GET /api/datasets/HuggingFaceFW/fineweb-edu" not in requests
    assert bytes_of(tmp_path / "complete") == bytes_of(tmp_path / "stopped")


def test_unknown_dataset_is_a_one_line_error(tmp_path, fineweb_edu):
    with serve({"datasets/HuggingFaceFW/fineweb-edu": fineweb_edu}) as (url, _):
        result = from_hub(url, tmp_path, "--out-dir", tmp_path / "out", "--dataset", "no/such")
        assert (
            result.returncode == 2
            and "no/such is not a local path, and looking it up on the hub failed" in result.stderr
            and "Traceback" not in result.stderr
        )
        result = from_hub(url, tmp_path, "--out-dir", tmp_path / "out", "--revision", "v9")
        assert result.returncode == 2 and "check the name, the revision and the network" in result.stderr
        result = from_hub(url, tmp_path, "--out-dir", tmp_path / "out", "--name", "sample-9BT")
        assert result.returncode == 2 and "sample-9BT" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(("recorded", "kept"), [("abc", "abc"), ("files-abc", ""), ("sha256-abc", "")])
def test_kill_before_first_shard_keeps_the_commit(tmp_path, recorded, kept):
    config = fineweb.PrepareConfig(dataset=("owner/name",), out_dir=str(tmp_path))
    progress = preparation.resume_point(tmp_path, config)
    write_json(tmp_path / "progress.json", progress | {"revision": recorded})
    assert preparation.resume_point(tmp_path, config)["revision"] == kept


def test_download_pretokenized_shards(tmp_path, pretokenized, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serve({"datasets/kjj0/fineweb10B-gpt2": pretokenized}) as (url, _):
        result = from_hub(url, tmp_path, "--pretokenized", "--out-dir", tmp_path / "out", "--max-tokens", 20_001)
        for _ in range(2):
            in_bucket = from_hub(url, tmp_path, "--pretokenized", "--out-dir", f"file://{tmp_path}/up/bins", "--max-tokens", 20_001)
            assert in_bucket.returncode == 0, in_bucket.stderr
        assert "is already complete" in in_bucket.stdout
    assert result.returncode == 0, result.stderr
    manifest = read_json(tmp_path / "out" / "manifest.json", "")
    assert [shard["file"] for shard in manifest["shards"]] == [
        f"fineweb_{name}.bin" for name in ("val_000000", "train_000001", "train_000002")
    ]
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["revision"]) == ("gpt2", 50257, SHA)
    assert row(tmp_path / "out") == [*range(20_000), *range(1, 20_001), *range(2, 20_002)]


def test_killed_download_gives_same_bytes(tmp_path, pretokenized):
    generator, out = random.Random(0), tmp_path / "out"
    with serve({"datasets/kjj0/fineweb10B-gpt2": pretokenized}) as (url, _):
        argv = (url, tmp_path, "--pretokenized", "--out-dir", out)
        kill = partial(kill_at_write, out / ".cache" / "huggingface" / "download", 6)  # after the locks, in the middle of a file
        assert from_hub(*argv, first=kill).returncode == -signal.SIGKILL and list(out.rglob("*.incomplete"))
        for _ in range(9):
            kill = partial(kill_at_write, out, generator.randint(2, 36), generator.choice([0, 0.0005, 0.002]))
            assert from_hub(*argv, first=kill).returncode == -signal.SIGKILL
        assert 3 < len(list(out.glob("*.bin"))) < 20
        result = from_hub(*argv)
        assert result.returncode == 0, result.stderr
    assert not list(out.rglob("*.incomplete")) + list(out.rglob("*.tmp"))
    assert bins(out) == pretokenized
    row(out)


def bins(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


BAD = "fineweb_train_000003.bin"
ETAG = {"ETag": '"x"', "X-Repo-Commit": SHA}


def test_damaged_download_is_named_and_fetched_again(tmp_path, pretokenized):
    """The hub delivers bad files for a while. At last, a good file is damaged on disk."""
    out, content = tmp_path / "out", pretokenized[BAD]
    answers = {
        "is damaged (its header is not": (b"<html>", 200, ETAG),
        "is damaged (its header promises": (content[:-2], 200, ETAG),
        "is damaged (its sha256 is not the hub's)": (content[:-2] + b"xx", 200, ETAG),
        "RemoteEntryNotFoundError: 404": (b"", 404, {"X-Error-Code": "EntryNotFound"}),
        "shard": None,
    }
    with serve({"datasets/kjj0/fineweb10B-gpt2": pretokenized}, fault=lambda request: answer if request.endswith(BAD) else None) as (
        url,
        _,
    ):
        argv = (url, tmp_path, "--pretokenized", "--out-dir", out)
        for message, answer in answers.items():
            if answer is None:
                damaged, before = out / "fineweb_train_000001.bin", (out / "fineweb_train_000001.bin").stat()
                os.truncate(damaged, 5000)
                os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))  # a new mtime would make the client download it again
            result = from_hub(*argv)
            error = the_error(result.stderr)
            assert result.returncode == 2 and message in error and (BAD if answer else "000001.bin") in error, error
            assert "run the same command again" in error and not (out / BAD).exists()
        assert not (out / "fineweb_train_000001.bin").exists()
        assert from_hub(*argv).returncode == 0
    assert bins(out) == pretokenized


def test_download_fills_the_disk_then_run_again(tmp_path, pretokenized):
    out = tmp_path / "out"
    with serve({"datasets/kjj0/fineweb10B-gpt2": pretokenized}) as (url, _):
        argv = (url, tmp_path, "--pretokenized", "--out-dir", out)
        result = from_hub(*argv, first=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY)))
        assert result.returncode == 1 and "free some space and run the command again" in the_error(result.stderr)
        assert not list(out.rglob("*.bin")) + list(out.rglob("*.incomplete"))
        assert from_hub(*argv).returncode == 0
    row(out)
