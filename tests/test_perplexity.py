"""Compares perplexity.py with Hugging Face's losses over lm-evaluation-harness's windows, and with train.py's log."""

import gzip
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, read_stream, run_main, run_train
from hypothesis import given
from hypothesis import strategies as st

import fineweb
import perplexity
from common.shards import find_shards, open_shard
from common.tokenizer import get_tokenizer
from perplexity import rows_of_text, score
from variants import VariantConfig, build

TEXT = (REPO / "README.md").read_text()[:1500]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A saved random model with large weights, and the same model in transformers."""
    from transformers import GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    model = build(VariantConfig(257, 64, 2, 2, 32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    return folder, model, GPT2LMHeadModel.from_pretrained(folder).eval()


def harness_nats(hf, ids: list[int], context_len: int) -> float:
    """The loss summed over lm-evaluation-harness's windows, one at a time."""
    from lm_eval.utils import get_rolling_token_windows

    total = 0.0
    with torch.no_grad():
        for inputs, targets in get_rolling_token_windows(ids, 256, 64, context_len):
            logits = hf(torch.tensor([inputs])).logits[0, -len(targets) :]
            total += F.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
    return total


@pytest.mark.parametrize(("length", "stride"), [(1500, 64), (1500, 10), (1500, 1), (64, 64), (65, 64), (7, 64), (1, 64)])
def test_text_score_matches_harness(models, length, stride):
    _, model, hf = models
    tokenizer = get_tokenizer("bytes")
    ids = tokenizer.encode(TEXT)[:length]
    result = score(model, tokenizer, rows_of_text([256, *ids], 64, stride), batch_size=5)
    expected = harness_nats(hf, ids, context_len=64 - stride + 1)
    assert result["tokens"] == length and result["loss"] * length == pytest.approx(expected, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(expected / length), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(expected / math.log(2) / length, rel=1e-5)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 40))
def test_each_token_is_predicted_once_in_full_windows(count, seq_len, stride):
    stride = min(stride, seq_len)
    predicted = []
    for number, (ids, n) in enumerate(rows_of_text(list(range(count + 1)), seq_len, stride)):
        assert 1 <= n < len(ids) <= seq_len + 1 and ids == list(range(ids[0], ids[-1] + 1))
        assert number == 0 or len(ids) == seq_len + 1  # all the context that the model sees
        predicted += ids[len(ids) - n :]
    assert predicted == list(range(1, count + 1))


def test_bits_per_byte_ignore_the_tokenizer(gpt2_tokenizer):
    """A model that finds all ids equally likely needs log2(V) bits per id, with any tokenizer."""
    for tokenizer, V in ((gpt2_tokenizer, 50257), (get_tokenizer("bytes"), 257)):
        model = build(VariantConfig(V, 64, 1, 2, 16))
        torch.nn.init.zeros_(model.lm_head.weight)
        ids = tokenizer.encode("Grüße, 你好! " * 9)
        result = score(model, tokenizer, rows_of_text([tokenizer.eot, *ids, tokenizer.eot], 64, 0), batch_size=4)
        assert result["bits_per_byte"] == pytest.approx((len(ids) + 1) * math.log2(V) / len(("Grüße, 你好! " * 9).encode()), rel=1e-5)


def test_shard_loss_matches_the_log(shards, tmp_path, capsys):
    assert run_train(shards, tmp_path) == 0
    capsys.readouterr()
    for argv in (["--max-tokens", 640], ["--max-tokens", 640, "--batch-size", 3], ["--max-tokens", 64]):
        assert run_main(perplexity.main, shards, "-m", tmp_path, *argv, "--json") == 0
        (result,) = json.loads(capsys.readouterr().out)
        assert result["tokens"] <= argv[1]
        assert (result["loss"] == pytest.approx(float(read_stream(tmp_path, "val")[20]), abs=2e-6)) == (argv[1] == 640)


def test_files_are_scored_separately(models, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_bytes("\ufeffUTF-16".encode("utf-16-le"))
    argv = [tmp_path / "a.txt", tmp_path / "b.txt", "-m", models[0], "--stride", 16]
    assert run_main(perplexity.main, *argv) == 0
    out, err = capsys.readouterr()
    a, b = out.splitlines()
    assert "error" not in err
    assert a.startswith(f"{tmp_path}/a.txt: {len(TEXT.encode()):,} tokens, loss ") and a.endswith(" bits a byte") and "b.txt: 6 tokens" in b
    assert run_main(perplexity.main, *argv, "--max-tokens", 100, "--dtype", "bf16") == 0
    assert "a.txt: 100 tokens" in capsys.readouterr().out
    (tmp_path / "u.txt").write_bytes("ü\r\n".encode())
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, REPO / "perplexity.py", tmp_path / "u.txt", "-m", models[0]]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert "u.txt: 3 tokens" in result.stdout and "warning" not in result.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\ufeffGrüße\r\nfrom\rWindows\n".encode()),
        ("a.TXT", "Grüße\r\n".encode("utf-16")),
        ("a.md.gz", gzip.compress(b"packed\r\n", mtime=0)),
        ("a.jsonl", b'{"text": "one\\r\\n"}\r\n\r\n{"text": ""}\n{"text": null}\n{"text": "two"}'),
        ("a.json", b'[{"text": "one"}, {"text": "two"}, 3]'),
    ],
)
def test_tokens_are_those_of_the_shards(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    flags = ["--skip-bad-rows"] if "json" in name else []
    argv = ["--dataset", tmp_path / name, "--out-dir", tmp_path / "out", "--tokenizer", "bytes", "--workers", 1, *flags]
    assert run_main(fineweb.main, *argv) == 0
    shards = find_shards(tmp_path / "out")
    row = np.concatenate([open_shard(shards.folder, entry) for entry in shards.entries]).tolist()
    config = perplexity.PerplexityConfig(paths=(), skip_bad_rows=bool(flags))
    assert perplexity.read_ids(tmp_path / name, config, get_tokenizer("bytes")) == row
    assert perplexity.read_ids(tmp_path / name, replace(config, max_tokens=2), get_tokenizer("bytes")) == row[:3]
    assert capsys.readouterr().err.count("--skip-bad-rows left out 1 row:") == (2 if flags else 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-m", "M"], "no paths: pass at least one text file or folder of shards"),
        (["-m", "M", "none.txt", "--stride", -1, "--batch-size", 0], "--stride is -1: it must be at least 0; --batch-size is 0"),
        (["-m", "M", "none.txt"], "no file none.txt: pass text files or folders of shards"),
        (["-m", "M", "EMPTY", "none.txt", "x.npy"], "no file none.txt: pass text files or folders of shards; no file x.npy"),
        (["-m", "M", "GPT2/x_val_000000.npy"], "x_val_000000.npy is a shard: pass its folder"),
        (["-m", "M", "EMPTY"], "is empty: pass a file with text"),
        (
            ["-m", "M", "LATIN"],
            "not UTF-8 at byte offset 3 (0xe9): save it as UTF-8 (iconv -f ITS_ENCODING -t utf-8), or leave it out with --skip-bad-rows",
        ),
        (["-m", "M", "GPT2"], "has gpt2 tokens, the model uses bytes: score the text itself"),
    ],
)
def test_wrong_inputs_are_one_line(models, tmp_path, capsys, argv, message):
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "gpt2").mkdir()
    for split in ("train", "val"):
        (tmp_path / "gpt2" / f"x_{split}_000000.npy").touch()
    names = {"M": models[0], "EMPTY": tmp_path / "empty", "LATIN": tmp_path / "latin.txt", "GPT2": tmp_path / "gpt2"}
    assert run_main(perplexity.main, *(str(names.get(word, word)).replace("GPT2/", f"{tmp_path}/gpt2/") for word in argv)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
