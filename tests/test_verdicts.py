"""lab.compare on made-up runs, which no one trained: what it pairs, refuses, names, records and prints."""

import json
import math
import re
import subprocess
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import rich.cells
from conftest import TINY, forked, rewrite_run, run_main, save_checkpoint

from common.files import write_json
from common.shards import find_shards, write_shard
from lab import compare, measure, report, runs
from lab.compare import CompareConfig
from lab.report import WIDTH, draw, show, table
from training.flags import parse_flags
from training.run_json import RUN, code_now
from variants import build

code_once = cache(code_now)  # it takes a second
NOISE = np.random.default_rng(0).normal(0, 0.01, 20).tolist()


def made_up(folder: Path, shards: Path, seed: int, loss: float, flags: tuple[str, ...] = (), step: int | None = None) -> Path:
    """Writes what a finished run of these flags leaves, with this validation loss."""
    config = parse_flags([*TINY, "--n-layer", "1", "--n-embd", "8", "--data-dir", str(shards), "--seed", str(seed), *flags])
    config.out_dir = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, step or config.max_steps, build(replace(config.model, vocab_size=257)), "bytes", loss, {})
    launch = {"step": 0, "config": asdict(config), **code_once(), "device": "cpu", "torch": "2", "world_size": 8, "token": "t"}
    run = {"id": "i", "size": "none", "data": find_shards(shards).contents(), "config": asdict(config), "launches": [launch]}
    write_json(folder / RUN, run)
    axes = {"tokens": config.max_steps * config.total_batch_tokens, "seconds": 2.0}
    loss = loss if math.isfinite(loss) else None  # as train.py writes it
    lines = [{"step": config.max_steps - 1, "loss": loss, "tokens_per_second": 100.0, "memory_bytes": 10**6, **axes}]
    lines += [{"step": step, "val_loss": loss and loss + 20 - step, **axes, "tokens": 256 * step} for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def loss_of(name: str, seed: int) -> float:
    """better is 0.05 better than the first in each seed, apart from some noise; even is not."""
    return 2.0 + 0.1 * seed - 0.05 * (name == "better") + NOISE[seed] * (name != "plain")


@pytest.fixture
def world(shards, tmp_path, monkeypatch, capsys):
    """Calls lab.compare in an empty folder, without pictures. Runs are made up when they would start; world.started lists them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "draw_or_warn", lambda *args: None)
    monkeypatch.setattr(runs, "environment", lambda workers, slot: {})
    for module in (runs, compare):
        monkeypatch.setattr(module, "code_now", code_once)
    return World(shards, monkeypatch, capsys)


class World:
    def __init__(self, shards: Path, monkeypatch, capsys):
        self.shards, self.capsys, self.started, self.failing = shards, capsys, [], {}
        monkeypatch.setattr(runs, "launch", self.launch)

    def launch(self, argv: list[str], env: dict):
        folder = Path(argv[argv.index("--out-dir") + 1])
        name, seed = folder.parent.name, int(folder.name)
        self.started.append((name, seed))
        status, output = self.failing.get(name, (0, ""))
        if not status:
            made_up(folder, self.shards, seed, loss_of(name, seed), tuple(argv))
        return Process(status, output)

    def variant(self, name: str, seeds=(1, 2, 3, 4, 5), flags: tuple[str, ...] = ()) -> str:
        for seed in seeds:
            made_up(Path(name, str(seed)), self.shards, seed, loss_of(Path(name).name, seed), flags)
        return name

    def judge(self, *argv) -> dict:
        assert run_main(compare.main, *argv, "--json") == 0
        return json.loads(self.capsys.readouterr().out)

    def error(self, *argv) -> str:
        self.capsys.readouterr()
        assert run_main(compare.main, *argv) == 2
        (line,) = (line for line in self.capsys.readouterr().err.splitlines() if line.startswith("error:"))
        return line

    def flags(self) -> str:
        return "--flags=" + " ".join([*TINY, "--n-layer", "1", "--n-embd", "8", "--data-dir", str(self.shards)])


class Process:
    """A finished process with the interface of subprocess.Popen."""

    def __init__(self, status: int, output: str):
        self.returncode, self.output = status, output

    def communicate(self, timeout=None):
        if self.returncode == 99:
            self.returncode = -15
            raise subprocess.TimeoutExpired("train.py", timeout)
        return "", self.output

    def terminate(self):
        pass


# ---- folders ----


@pytest.mark.slow
def test_folders_of_seeds_are_paired(world):
    found = world.judge(world.variant("log/plain"), world.variant("log/better", (2, 3, 4, 5, 6)), world.variant("log/even"))
    plain, better, even = found["variants"]
    assert [row["verdict"] for row in (better, even)] == ["better", "no difference shown"] and "verdict" not in plain
    assert better["paired_seeds"] == [2, 3, 4, 5] and better["seeds"] == [2, 3, 4, 5, 6]
    assert better["differences"] == pytest.approx([NOISE[seed] - 0.05 for seed in (2, 3, 4, 5)])
    assert found["notes"] == [] and plain["changed"] == ""


@pytest.mark.slow
def test_single_runs_alike_are_one_variant(world):
    words = [made_up(Path(f"log/{name}{seed}"), world.shards, seed, loss_of(name, seed)) for name in ("plain",) for seed in (1, 2)]
    words += [made_up(Path(f"log/better{seed}"), world.shards, seed, loss_of("better", seed), ("--pos", "rope")) for seed in (1, 2)]
    rows = world.judge(*words)["variants"]
    assert [(row["variant"], row["seeds"]) for row in rows] == [("plain1", [1, 2]), ("better1", [1, 2])]
    words += [made_up(Path(f"log/again{seed}"), world.shards, seed, loss_of("even", seed)) for seed in (1, 2)]
    rows = world.judge(*words)["variants"]  # a seed that plain has already begins another variant
    assert [(row["variant"], row["seeds"]) for row in rows] == [("plain1", [1, 2]), ("better1", [1, 2]), ("again1", [1, 2])]


@pytest.mark.slow
def test_ideas_are_named_by_commit_and_files(world):
    world.variant("log/plain"), world.variant("log/better")
    change = {"variants.py": "new", "ops/idea.py": "new"}
    for seed in range(1, 6):
        rewrite_run(Path(f"log/better/{seed}"), lambda launch: launch.update(commit="b" * 40, code=launch["code"] | change))
    found = world.judge("log/plain", "log/better")
    assert re.fullmatch(r"better has other code than plain \(ops/idea.py, variants.py\): commit bbbbbbbb against \S+", found["notes"][0])
    assert (found["variants"][1]["commit"], found["variants"][1]["changed"]) == ("bbbbbbbb", "ops/idea.py, variants.py")
    error = world.error("log/plain", "log/better", "--may-change", "variants.py")
    assert error == "error: better changes ops/idea.py: only variants.py may change"
    world.judge("log/plain", "log/better", "--may-change", "variants.py", "ops/idea.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shards: made_up(Path("idea/2"), shards, 2, 1.0, ("--max-lr", "1")), "idea: idea/2 has other settings than idea/1 (max_lr)"),
        (lambda shards: change_code(Path("idea/2")), "idea: idea/2 was trained by other code (train.py)"),
        (lambda shards: change_data(Path("idea/2")), "idea: idea/2 was trained on other data than idea/1 (x.npy was added)"),
        (lambda shards: [change_data(Path(f"idea/{seed}")) for seed in (1, 2)], "idea has other data than plain (x.npy was added)"),
        (lambda shards: both(shards, "--val-tokens", "320"), "idea validates on 320 tokens, plain on 640"),
        (lambda shards: both(shards, "--total-batch-tokens", "512"), "idea trains for 10,240 tokens, plain for 5,120 tokens"),
    ],
)
def test_unfair_mixtures_are_refused(world, spoil, message):
    world.variant("plain", (1, 2)), world.variant("idea", (1, 2))
    spoil(world.shards)
    assert f"{message}" in (error := world.error("plain", "idea")) and "pass --mixed" in error
    assert world.judge("plain", "idea", "--mixed")["variants"][1]["variant"] == "idea"


def change_code(folder: Path):
    rewrite_run(folder, lambda launch: launch.update(code=launch["code"] | {"train.py": "x"}))


def change_data(folder: Path):
    run = json.loads((folder / RUN).read_text())
    write_json(folder / RUN, run | {"data": run["data"] | {"x.npy": [1, None]}})


def both(shards: Path, *flags: str):
    for seed in (1, 2):
        made_up(Path(f"idea/{seed}"), shards, seed, 1.0, flags)


@pytest.mark.slow
def test_folders_without_finished_runs_are_named(world):
    world.variant("plain", (1, 2))
    Path("empty").mkdir()
    made_up(Path("going"), world.shards, 1, 2.0, step=10)
    assert "empty is no run and has no numbered runs: give a run's folder" in world.error("plain", "empty")
    assert "going has not finished: wait for it, or continue it with train.py --resume --out-dir going" in world.error("plain", "going")
    assert "'log/nothing' is neither NAME=FLAGS nor a folder" in world.error("plain", "log/nothing")
    assert "plain is also the name of a folder's variant: rename it" in world.error("plain", "plain=--pos rope")


# ---- seeds, looks and failures ----


@pytest.mark.slow
def test_ideas_train_the_seeds_of_a_folder(world):
    world.variant("log/plain", (11, 12, 13))
    rows = world.judge("log/plain", "better=--pos rope", world.flags())["variants"]
    assert world.started == [("better", 11), ("better", 12), ("better", 13)] and rows[1]["paired_seeds"] == [11, 12, 13]
    world.variant("log/other", (1, 2))
    assert "no seed is in all folders (plain has 11, 12, 13; other has 1, 2)" in world.error("log/plain", "log/other", "x=")


@pytest.mark.slow
def test_first_seed_starts_the_seeds(world):
    world.judge("plain=", "even=--pos rope", world.flags(), "--seeds", 2, "--first-seed", 11)
    assert world.started == [("plain", 11), ("even", 11), ("plain", 12), ("even", 12)]


@pytest.mark.slow
def test_until_decided_stops_each_variant_early(world):
    argv = ["plain=", "better=--pos rope", "even=--window 8", world.flags(), "--until-decided", "--seeds", 6]
    found = world.judge(*argv)
    assert found["looks"] == [3, 4, 5, 6]
    assert [world.started.count((name, seed)) for name in ("plain", "even") for seed in range(1, 7)] == [1] * 12
    better = [seed for name, seed in world.started if name == "better"]
    row = found["variants"][1]
    assert row["verdict"] == "better" and better == row["paired_seeds"] and 3 <= len(better) < 6
    assert found["variants"][2]["verdict"] == "no difference shown" and "6 seeds could detect" in found["variants"][2]["text"]
    world.started.clear()
    assert world.judge(*argv) == found and world.started == []


@pytest.mark.slow
def test_other_limits_and_second_looks_are_named(world):
    argv = ["plain=", "even=--pos rope", world.flags()]
    assert world.judge(*argv, "--seeds", 3)["notes"] == world.judge(*argv, "--seeds", 3)["notes"] == []
    again = "even against plain was judged with --seeds 3 before, and looking again adds false verdicts: begin with --until-decided"
    assert world.judge(*argv, "--seeds", 4)["notes"][0].startswith(again)
    other = [*argv, "--out-dir", "o", "--until-decided"]
    world.judge(*other, "--seeds", 4)
    assert "judged with --until-decided --seeds 4, and that limit can't change afterwards: pass --seeds 4" in world.error(*other)
    (note,) = world.judge(*argv, "--out-dir", "o", "--seeds", 5)["notes"]
    assert "was judged with --until-decided --seeds 4 before" in note


@pytest.mark.slow
def test_failed_idea_gets_a_row(world):
    world.failing = {"bad": (1, "Traceback (most recent call last):\n  …\nKeyError: 'x'"), "slow": (99, "")}
    argv = ["plain=", "bad=--pos rope", "slow=--window 8", "better=--qk-norm", world.flags(), "--max-minutes", 2]
    rows = world.judge(*argv)["variants"]
    assert [row.get("text") for row in rows[:3]] == [None, "failed: seed 1: KeyError: 'x'", "failed: seed 1 took longer than 2 minutes"]
    assert rows[3]["verdict"] == "better" and [name for name, _ in world.started].count("bad") == 1
    assert "\tbad\t\t\t\t\t\t\t\tfailed: seed 1: KeyError: 'x'\n" in Path("log/compare/results.tsv").read_text()
    world.failing = {"plain": (2, "error: no")}
    assert "plain: train.py " in (error := world.error(*argv, "--out-dir", "o")) and error.endswith("exited with 2: error: no")
    world.failing = {"bad": (1, "error: no space: free some space")}  # every later idea would fail too
    assert "bad: train.py " in world.error(*argv, "--out-dir", "p")


@pytest.mark.parametrize(
    ("status", "output", "to_blame"),
    [
        (1, "Traceback (most recent call last):\nValueError: x", True),
        (1, "error: the loss is nan: start again with a lower --max-lr", True),
        (1, "error: [Errno 28] No space left: free some space", False),
        (2, "error: a window of 0", True),
        (-9, "", True),
        (-11, "", True),
        (-15, "", False),
        (143, "stopped after 3 steps", False),
    ],
)
def test_ideas_are_blamed_for_their_own_failures(status, output, to_blame):
    assert runs.is_to_blame(status, output) == to_blame


@pytest.mark.slow
def test_infinite_loss_of_the_first_ends_it(world):
    world.variant("plain", (1, 2)), world.variant("even", (1, 2))
    made_up(Path("plain/2"), world.shards, 2, float("inf"))
    assert world.error("plain", "even") == "error: plain's loss is not finite with seed 2: compare with another variant"


def test_equal_time_is_passed_to_every_run():
    variants = compare.variants_of(CompareConfig(variants=("a=--pos rope", "b="), flags="--n-layer 1", max_seconds=90))
    assert [v.flags for v in variants] == [["--n-layer", "1", "--max-seconds", "90", *own] for own in (["--pos", "rope"], [])]


# ---- what it prints and leaves ----


def row_of(name: str, **more) -> dict:
    numbers = dict(tokens=819_200_000, val_loss=3.2914, bits_per_byte=0.98, speed=1.0, tokens_per_second=123_456.0, memory_bytes=1e10)
    return {"variant": name, "params": 1_557_611_200, "active_params": 124_439_808, "cache_bytes": 1e8, **numbers, **more}


def test_table_fits_a_hundred_columns(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    verdict = dict(difference=-0.0123, low=-0.05, high=0.03, p=0.012345, text="no difference shown (12 seeds could detect 0.042)")
    verdict |= dict(differences=[0.0123] * 12, paired_seeds=[*range(1, 13)])
    names = ["a", "実験" * 30, "[red]" + "long name " * 12, "x" * 120]
    text = show([row_of("first"), *(row_of(name, **verdict) for name in names)], [3, 4, 5])
    lines = text.splitlines()
    assert max(map(rich.cells.cell_len, lines)) <= WIDTH and "\x1b" not in text and "[red]long" in text
    assert "no difference shown (12" in text and "-0.0123 ± 0.0400" in text and "1,557,611,200 (124,439,808)" in text
    starts = {rich.cells.cell_len(line[: line.index("-0.0123")]) for line in lines if "-0.0123" in line}
    assert len(starts) == 1  # aligned, even beside double-width letters


def test_table_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    rows = [["x" * 200, "better"]]
    assert 60 < max(map(len, table(["variant", "verdict"], rows).splitlines())) <= WIDTH  # not a terminal
    monkeypatch.setattr(report.sys.stdout, "isatty", lambda: True)
    assert max(map(len, table(["variant", "verdict"], rows).splitlines())) == 60


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_colors_need_a_terminal_without_no_color(monkeypatch, no_color, colored):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" not in table(["variant", "verdict"], [["a", "better"]])
    monkeypatch.setattr(report.sys.stdout, "isatty", lambda: True)
    assert ("\x1b[32m" in table(["variant", "verdict"], [["a", "better"]])) == colored


@pytest.mark.slow
def test_results_file_gets_each_line_once(world):
    argv = [world.variant("plain"), world.variant("better")]
    assert run_main(compare.main, *argv) == run_main(compare.main, *argv) == 0
    assert world.capsys.readouterr().out.splitlines()[-1] == "verdict better: better"
    head, first, second = (line.split("\t") for line in Path("log/compare/results.tsv").read_text().splitlines())
    assert tuple(head) == report.TSV and (first[1], first[-1]) == ("plain", "the first")
    row = dict(zip(head, second, strict=True))
    low, high = map(float, row["interval"].split())
    assert (row["name"], row["seeds"], row["verdict"]) == ("better", "1 2 3 4 5", "better") and low < float(row["difference"]) < high < 0
    assert (float(row["memory"]), float(row["seconds"])) == (1e6, 2.0) and float(row["p"]) < 0.025


@pytest.mark.slow
@pytest.mark.parametrize("points", [(), (100, 200)])
def test_picture_draws_curves_or_single_points(tmp_path, points):
    def runs_at(shift: float) -> dict:
        return {seed: {"curve": {at: 3.0 - at / 300 + shift + 0.01 * seed for at in (*points, 300)}} for seed in (1, 2)}

    draw({"first": runs_at(0.0), "idea": runs_at(-0.1), "failed": {}}, (2,), tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_band_is_the_interval_of_the_mean():
    """Student's sleep data again."""
    means, halves = report.band([[x] for x in (-1.2, -2.4, -1.3, -1.3, 0.0, -1.0, -1.8, -0.8, -4.6, -1.4)], 0.025)
    assert (means[0] - halves[0], means[0] + halves[0]) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)


class LikeGPT2:
    """Decodes <|endoftext|> to its name, as tiktoken does."""

    eot = 256

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(bytes([i]) if i < 256 else b"<|endoftext|>" for i in ids)


@pytest.mark.slow
def test_bits_per_byte_equal_perplexitys(tmp_path, monkeypatch):
    """A seventh of the tokens is <|endoftext|>, which has no bytes."""
    rows = [np.resize(np.array([*b"the cat"[:6], 256], np.uint16), size) for size in (1000, 5000)]
    entries = [write_shard(tmp_path / f"x_{name}.npy", row) for name, row in zip(("val_000000", "train_000001"), rows, strict=True)]
    write_json(tmp_path / "manifest.json", {"tokenizer": "bytes", "vocab_size": 257, "shards": entries})
    flags = [*TINY, "--max-steps", "2", "--data-dir", str(tmp_path), "--out-dir", str(tmp_path / "run")]
    assert forked(tmp_path, "train", *flags).returncode == 0
    result = forked(tmp_path, "perplexity", "-m", tmp_path / "run", tmp_path, "--max-tokens", 640, "-d", "cpu", "--json")
    found = measure.measure(tmp_path / "run")
    assert found["bits_per_byte"] == pytest.approx(json.loads(result.stdout)[0]["bits_per_byte"], rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(found["val_loss"] / np.log(2) * 7 / 6, rel=0.02)
    monkeypatch.setattr(measure, "get_tokenizer", lambda name: LikeGPT2())
    measure.validated_bytes.cache_clear()
    assert measure.measure(tmp_path / "run") == found
    run = json.loads((tmp_path / "run" / RUN).read_text())
    write_json(tmp_path / "run" / RUN, run | {"data": {}})
    assert measure.measure(tmp_path / "run")["bits_per_byte"] is None  # other shards than the run's
