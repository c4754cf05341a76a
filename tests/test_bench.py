"""lab.bench: times both sides of every task, and they give the same answers."""

import json
import os
import signal

import pytest
from conftest import run_main, script
from test_hellaswag import make_tasks

from lab import bench


@pytest.mark.slow
def test_bench_times_both_sides_of_every_task(tmp_path, gpt2_tokenizer):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in make_tasks(6)))
    shape = "--n-layer 2 --n-head 2 --n-embd 32 --seq-len 256 --dtype fp32 --no-compile --device cpu".split()
    small = "--rounds 3 --passes 2 --tasks 6 --new-tokens 20 --megabytes 1 --shard-tokens 100000 --json".split()
    result = script("lab.bench", *shape, *small, "--hellaswag-file", tasks, timeout=300, GPT_WAYS="row=mv")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [row["work"] for row in report["rows"]] == list(bench.WORK) and report["threads"] == 1
    assert float(report["matrix products"].split()[0]) > 1 and "cores" in report["machine"]
    ways = {row["work"]: row["ways"] for row in report["rows"]}
    assert ways["generate"] == ways["load"] == {"row": "mv"}
    for row in report["rows"]:
        assert row.get("same_answers", True) and len(row["rounds"]) == 3
        assert min(rate for both in row["rounds"] for rate in both) > 0 and row["memory_peer"] > 0
        low, high = (f(a / b for a, b in row["rounds"]) for f in (min, max))
        assert low <= row["ratio"] <= high


@pytest.mark.slow
def test_failing_side_is_one_line(tmp_path):
    shape = "--n-layer 1 --n-head 1 --n-embd 8 --seq-len 16 --device cpu".split()
    result = script("lab.bench", "--what", "score", *shape, "--hellaswag-file", tmp_path / "none.jsonl")
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(error) == 1 and error[0].startswith(f"error: no file {tmp_path}/none.jsonl")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--what", "generate", "--seq-len", 64], "--new-tokens 128 exceed --seq-len 64: lower --new-tokens"),
        (["--vocab-size", 257], "--vocab-size is 257"),
        (["--what"], "--what has no value"),
        (["--dtype", "int8", "--what", "generate", "load"], "--dtype int8 is for generation only: add --what generate"),
        (["--activation-memory", 1.5], "--activation-memory is 1.5: it must be from 0 to 1"),
        (["--rounds", 0, "--shard-tokens", 0], "--rounds is 0: it must be at least 1; --shard-tokens is 0"),
        (["--what", "tokenize", "--dataset", "none.txt"], "none.txt not found"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, message):
    assert run_main(bench.main, *argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]


def kill_self(bench):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_side_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="a benchmark process was killed"):
        bench.Side(kill_self, bench.BenchConfig(device="cpu"), tmp_path).round(0)


def test_table_shows_different_answers():
    row = {
        "work": "score",
        "unit": "tasks/s",
        "ours": 3.0,
        "peer": 1.5,
        "peer_name": "x",
        "ratio": 2.0,
        "memory_ours": 1e9,
        "memory_peer": 2e9,
    }
    assert bench.show_rows([row | {"same_answers": False}], markdown=True).splitlines()[-1] == (
        "| score | 3.0 tasks/s | 1.5 (x) | 2.00 × | 1.00 GB | 2.00 GB | OTHER ANSWERS |"
    )
