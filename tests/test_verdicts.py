"""lab.compare on made-up runs, which no one trained: what it pairs, refuses, names, records and prints."""

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rich.cells
import torch
from conftest import TINY, covered, forked, rewrite_run, run_main
from made_up import CRASH, code_once, loss_of, made_up, noise

from common.cli import CHECK_NETWORK, WAIT
from common.files import write_json
from common.shards import write_shard
from common.tables import WIDTH
from lab import compare, measure, report, runs
from lab.compare import CompareConfig
from lab.judge import SAME
from lab.origins import Origin
from lab.report import draw, show
from lab.suites import SUITES
from model import cross_entropy
from training.config import TrainConfig
from training.run_json import RUN
from variants import VariantConfig, VariantGPT, build

# ---- folders ----


@pytest.mark.slow
def test_folders_of_seeds_are_paired(world):
    found = world.judge(world.variant("log/plain"), world.variant("log/better", (2, 3, 4, 5, 6)), world.variant("log/even"))
    plain, better, even = found["variants"]
    assert [row["verdict"] for row in (better, even)] == ["better", "no difference shown"] and "verdict" not in plain
    assert better["paired_seeds"] == [2, 3, 4, 5] and better["seeds"] == [2, 3, 4, 5, 6]
    assert better["differences"] == pytest.approx([noise("better", seed) - 0.05 for seed in (2, 3, 4, 5)])
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
def test_numbered_runs_have_their_folders_name(world):
    world.variant("log/plain", (1, 2)), world.variant("log/even", (1, 2), ("--pos", "rope")), world.variant("x/even", (1,))
    rows = world.judge("log/plain/1", "log/even/1", "log/even/2", "x/even/1")["variants"]
    assert [(row["variant"], row["seeds"]) for row in rows] == [("plain", [1]), ("even", [1, 2]), ("x/even/1", [1])]


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
    assert run_main(compare.main, "log/plain", "log/better", "--may-change", "variants.py") == 3
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
        (lambda shards: both(shards, "--seq-len", "16"), "idea validates on sequences of 16 tokens, plain of 32"),
        (lambda shards: both(shards, "--teacher", "x.pt"), "idea learns from another model (--teacher x.pt), plain doesn't"),
    ],
)
def test_unfair_mixtures_are_refused(world, spoil, message):
    world.variant("plain", (1, 2)), world.variant("idea", (1, 2))
    spoil(world.shards)
    assert f"{message}" in (error := world.error("plain", "idea")) and "pass --mixed" in error
    assert world.judge("plain", "idea", "--mixed")["variants"][1]["variant"] == "idea"


@pytest.mark.slow
def test_variants_with_unequal_tokens_are_refused(world):
    argv = ["plain=", "even=--max-steps 40", "batch=--total-batch-tokens 512 --max-steps 10", world.flags(), "--seeds", 2]
    why = "even trains for 10,240 tokens, plain for 5,120 tokens"
    assert world.error(*argv) == f"error: {why}: make both equal, or pass --mixed to compare them anyway" and world.started == []
    assert world.judge(*argv, "--mixed")["notes"] == [why]
    assert "val validates on 320 tokens, plain on 640" in world.error(*argv[:1], "val=--val-tokens 320", *argv[3:])


@pytest.mark.slow
def test_suite_of_lengths_survives_a_failed_one(world):
    others = [*SUITES["modern"]][1:]
    steps = dict(zip(SUITES["modern"], (100, 10, 20, 40), strict=True))
    losses = dict(zip(map(folder_name, steps), (2.0, 2.5, 2.2, 1.5), strict=True))
    world.loss = lambda name, seed, argv: losses[name]
    argv = ["--suite", "modern", "--data-dir", world.shards, "--seeds", 1]
    assert world.judge(*argv)["to_the_same_loss"].startswith("× fewer tokens")
    world.failing = {folder_name(others[0]): CRASH}
    assert world.judge(*argv, "--out-dir", "a")["to_the_same_loss"].startswith("× fewer tokens")
    world.failing = {folder_name(name): CRASH for name in others}
    assert ", and without it the series does not reach" in world.judge(*argv, "--out-dir", "b")["to_the_same_loss"]


def folder_name(variant: str) -> str:
    return runs.folder_of("", variant, 1).parent.name


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
    assert "judge.json is a file of lab.compare: rename the variant" in world.error("plain", "judge.json=--pos rope")
    assert "start no new run: leave them out" in world.error("plain", "idea=--rehearse", world.flags())
    world.judge("plain=", f"long={'--pos rope ' * 50}", world.flags(), "--seeds", 2)  # longer than a file's name may be


# ---- seeds, looks and failures ----


@pytest.mark.slow
def test_ideas_train_the_seeds_of_a_folder(world):
    world.variant("log/plain", (11, 12, 13))
    rows = world.judge("log/plain", "better=--pos rope", world.flags())["variants"]
    assert world.started == [("better", 11), ("better", 12), ("better", 13)] and rows[1]["paired_seeds"] == [11, 12, 13]
    made_up(Path("log/twice/1"), world.shards, 5, 2.0), made_up(Path("log/twice/2"), world.shards, 5, 2.0)
    assert "log/twice/1 and log/twice/2 have the same seed, 5, so they count as one" in world.error("log/plain", "log/twice")
    world.variant("log/other", (1, 2))
    assert "no seed is in all folders (plain has 11, 12, 13; other has 1, 2)" in world.error("log/plain", "log/other")
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
def test_better_ideas_are_completed_if_asked(world, monkeypatch):
    pictures = []
    monkeypatch.setattr(compare, "draw_or_warn", lambda draw, results, *more: pictures.append(results))
    argv = ["plain=", "better=--pos rope", "even=--window 8", world.flags(), "--until-decided", "--seeds", 6, "--complete-better"]
    better = world.judge(*argv)["variants"][1]
    assert better["seeds"] == [1, 2, 3, 4, 5, 6] and len(better["paired_seeds"]) < 6 and better["verdict"] == "better"
    assert [*pictures[0]["better"]] == better["paired_seeds"] and len(pictures[0]["even"]) == 6  # the picture shows what decided
    world.failing = {"better/6": CRASH}
    assert world.judge(*argv, "--out-dir", "o")["variants"][1]["text"] == "failed: seed 6: KeyError: 'x'"


@pytest.mark.slow
def test_idea_without_effect_gets_three_seeds(world):
    world.loss = lambda name, seed, argv: 2.0 + seed
    row = world.judge("plain=", "same=--window 8", world.flags(), "--until-decided", "--seeds", 8)["variants"][1]
    assert row["text"] == "no difference shown: the losses are equal" and row["seeds"] == [1, 2, 3]


@pytest.mark.slow
def test_unequal_clocks_of_workers_are_noted(world, monkeypatch):
    argv = ["plain=", "even=--pos rope", world.flags() + " --max-seconds 2", "--seeds", 2]
    assert world.judge(*argv)["notes"] == []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    (note,) = world.judge(*argv, "--workers", 2)["notes"]
    assert note.startswith("the runs slow each other, so --max-seconds is no fair limit")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert world.judge(*argv, "--workers", 2)["notes"] == []


@pytest.mark.slow
def test_other_limits_and_second_looks_are_named(world):
    argv = ["plain=", "even=--pos rope", world.flags()]
    assert world.judge(*argv, "--seeds", 3)["notes"] == world.judge(*argv, "--seeds", 3)["notes"] == []
    again = "even against plain was judged with seeds 1, 2, 3 before, and looking again adds false verdicts: confirm with fresh seeds"
    assert world.judge(*argv, "--seeds", 4)["notes"][0].startswith(again) and world.judge(*argv, "--seeds", 2)["notes"]
    (note,) = world.judge(*argv, "--seeds", 3, "--first-seed", 2)["notes"]  # until one likes the seeds
    assert "was judged with seeds 1, 2, 3; seeds 1, 2, 3, 4; seeds 1, 2 before" in note
    other = [*argv, "--out-dir", "o", "--until-decided"]
    world.judge(*other, "--seeds", 4)
    assert "began with --until-decided --seeds 4, and that limit can't change afterwards: pass --seeds 4" in world.error(*other)
    for _ in range(2):
        (note,) = world.judge(*other, "--seeds", 4, "--first-seed", 2)["notes"]
        assert "was judged with --until-decided and seeds 1, 2, 3, 4 before" in note
    given = [world.variant("log/few", (1, 2, 3)), *argv[1:], "--out-dir", "p", "--until-decided", "--seeds", 4]
    assert world.judge(*given)["notes"] == []
    world.variant("log/few", (4,))
    assert world.judge(*given)["notes"] == [] and json.loads(Path("p/judge.json").read_text())["even against few"]["limit"] == 4
    (note,) = world.judge(*argv, "--out-dir", "o", "--seeds", 5)["notes"]
    assert "was judged with --until-decided and seeds 1, 2, 3, 4; --until-decided and seeds 2, 3, 4, 5 before" in note


def edit_run(folder: Path, change):
    run = json.loads((folder / RUN).read_text())
    change(run)
    write_json(folder / RUN, run)


@pytest.mark.slow
def test_runs_resumed_with_other_settings_are_refused(world):
    """A longer --max-steps lets the schedule end twice. The settings at the end are equal."""

    def shorter_first(run):
        (last,) = run["launches"]
        run["launches"] = [last | {"config": last["config"] | {"max_steps": 10}}, last | {"step": 10}]

    folders = [world.variant("log/plain", (1, 2, 3)), world.variant("log/better", (1, 2, 3))]
    edit_run(Path("log/better/2"), shorter_first)
    changed = "was resumed with other settings (--max-steps 10, then 20)"
    assert f"better: log/better/2 {changed}, log/better/1 was not resumed with other settings: leave" in world.error(*folders)
    for seed in (1, 3):
        edit_run(Path(f"log/better/{seed}"), shorter_first)
    assert f"better {changed}, plain was not resumed with other settings: make both equal" in world.error(*folders)
    assert world.judge(*folders, "--mixed")["notes"] == [f"better {changed}, plain was not resumed with other settings"]
    for seed in (1, 2, 3):
        edit_run(Path(f"log/plain/{seed}"), shorter_first)
    assert world.judge(*folders, "--out-dir", "o")["notes"] == []  # both in the same way
    for seed in (1, 2, 3):  # the first launch's steps were computed again
        edit_run(Path(f"log/better/{seed}"), lambda run: run["launches"][1].update(step=0))
        edit_run(Path(f"log/plain/{seed}"), lambda run: run["launches"].pop(0))
    assert world.judge(*folders, "--out-dir", "p")["notes"] == []


@pytest.mark.slow
def test_equal_time_needs_as_many_processes(world):
    flags = ("--max-seconds", "2")
    folders = [world.variant("log/plain", (1, 2), flags), world.variant("log/better", (1, 2), flags)]
    for seed in (1, 2):
        edit_run(Path(f"log/plain/{seed}"), lambda run: run["launches"][0].update(world_size=1))
    assert "better trains for 2 seconds on 8 processes, plain for 2 seconds: make both equal" in world.error(*folders)
    notes = world.judge(*folders, "--mixed")["notes"]
    assert "the runs had more than one number of processes: 1, 8" in notes


@pytest.mark.slow
def test_seeds_that_change_nothing_count_as_one(world, monkeypatch):
    """With --init-from and --no-shuffle, runs differ by rounding alone."""
    folders = [world.variant("log/plain", (1, 2, 3)), world.variant("log/better", (1, 2, 3))]
    assert world.judge(*folders)["variants"][1]["verdict"] == "better"
    monkeypatch.setattr(Origin, "ignores_seed", True)
    assert world.judge(*folders)["variants"][1]["text"] == f"no difference shown: {SAME}"
    monkeypatch.undo()
    plain = TrainConfig(init_from="log/pre", shuffle=False, seed=3, model=VariantConfig())
    assert Origin(plain, {}, {}, {}, {}).ignores_seed
    for changed in (
        dict(shuffle=True),
        dict(init_from=""),
        dict(init_from="log/pre/3"),
        dict(teacher="a/3"),
        dict(model=VariantConfig(dropout=0.1)),
    ):
        assert not Origin(replace(plain, **changed), {}, {}, {}, {}).ignores_seed


@pytest.mark.slow
def test_changed_weights_under_one_path_are_named(world, monkeypatch):
    folders = [world.variant("log/plain", (1, 2)), world.variant("log/better", (1, 2))]
    for folder, fingerprint in (("plain/1", "a"), ("plain/2", "a"), ("better/1", "b"), ("better/2", "c")):
        edit_run(
            Path("log", folder), lambda run, fingerprint=fingerprint: (run.update(init=fingerprint), run["config"].update(init_from="m"))
        )
    assert "better: log/better/2 has another --init-from than log/better/1, under the same path: leave them" in world.error(*folders)
    edit_run(Path("log/better/2"), lambda run: run.update(init="b"))
    assert "better has another --init-from than plain, under the same path: make both equal" in world.error(*folders)
    monkeypatch.setattr("checkpoint.fingerprint", lambda path, revision=None: "b")
    monkeypatch.setattr("checkpoint.load_config", lambda *args: None)
    changed = "idea has another --init-from than plain, under the same path: make both equal"
    assert changed in world.error("log/plain", "idea=--init-from m", world.flags())


@pytest.mark.slow
def test_model_of_other_code_is_not_counted_anew(world):
    """This checkout builds another model from the same settings."""
    folders = [world.variant("log/plain", (1, 2)), world.variant("log/better", (1, 2))]
    for seed in (1, 2):
        edit_run(Path(f"log/better/{seed}"), lambda run: run.update(params=12345))
    plain, better = world.judge(*folders)["variants"]
    assert plain["work"] == 1 and better["params"] == 12345 and better["work"] is better["cache_bytes"] is None
    assert run_main(compare.main, *folders) == 0 and "0.012 M" in world.capsys.readouterr().out


@pytest.mark.slow
def test_mistakes_in_the_command_blame_no_idea(world, monkeypatch):
    """Status 3 would make a program go through all its ideas."""

    def no_data(config):
        raise ValueError("gone")

    world.judge("plain=", world.flags(), "--seeds", 3)
    given = ["log/compare/plain", "even=--pos rope", "--until-decided"]
    assert run_main(compare.main, *given, world.flags() + " --no-such-flag") == 2
    assert run_main(compare.main, "plain=--no-such-flag", "even=", world.flags()) == 2
    for wrong in (" --seed 3", " 'open", " --max-steps 0"):
        assert run_main(compare.main, *given, world.flags() + wrong) == 2
    assert run_main(compare.main, *given[:1], "even=--no-such-flag", world.flags()) == 3
    assert run_main(compare.main, *given[:1], "even=--data-dir none", world.flags()) == 3
    monkeypatch.setattr(compare, "find_data", no_data)
    assert "gone" in world.error(*given, world.flags()) and run_main(compare.main, *given, world.flags()) == 2
    assert "--until-decided looks first after 3 seeds, and the given runs have 2 in common: train more" in world.error(
        world.variant("log/few", (1, 2)), "even=--pos rope", world.flags(), "--until-decided"
    )


@pytest.mark.slow
def test_more_seeds_in_a_folder_are_named(world):
    folders = [world.variant("log/plain", (1, 2, 3)), world.variant("log/even", (1, 2, 3))]
    assert world.judge(*folders)["notes"] == world.judge(*folders)["notes"] == []
    world.variant("log/plain", (4,)), world.variant("log/even", (4, 5))
    (note,) = world.judge(*folders)["notes"]
    assert note.startswith("even against plain was judged with seeds 1, 2, 3 before")
    assert "so --until-decided has nothing to train: leave it out" in world.error(*folders, "--until-decided")


@pytest.mark.slow
def test_failed_idea_gets_a_row(world):
    world.failing = {"bad": CRASH, "slow": (99, "")}
    argv = ["plain=", "bad=--pos rope", "slow=--window 8", "better=--qk-norm", world.flags(), "--max-minutes", 2]
    rows = world.judge(*argv)["variants"]
    assert [row.get("text") for row in rows[:3]] == [None, "failed: seed 1: KeyError: 'x'", "failed: seed 1 took longer than 2 minutes"]
    assert rows[3]["verdict"] == "better" and [name for name, _ in world.started].count("bad") == 1
    assert "\tbad\tplain\t\t\t\t\t\t\t\tfailed: seed 1: KeyError: 'x'\n" in Path("log/compare/results.tsv").read_text()
    world.failing = {"plain": (2, "error: no")}
    assert "plain: train.py " in (error := world.error(*argv, "--out-dir", "o")) and error.endswith("exited with 2: error: no")
    assert run_main(compare.main, "plain=", "bad=--no-such-flag", world.flags()) == 3  # unlike a mistake in the command, which is 2
    assert run_main(compare.main, "plain", "bad=", world.flags()) == 2
    world.failing = {"bad": (1, "error: no space: free some space")}  # every later idea would fail too
    assert "bad: train.py " in world.error(*argv, "--out-dir", "p")


@pytest.mark.slow
def test_failed_ideas_are_not_tried_again(world):
    argv = ["plain=", "bad=--pos rope", world.flags(), "--seeds", 2]
    world.failing = {"bad": (99, "")}
    row = world.judge(*argv, "--max-minutes", 2)["variants"][1]
    world.failing = {}
    world.started.clear()
    found = world.judge(*argv)
    assert world.started == [] and found["variants"][1]["text"] == row["text"] == "failed: seed 1 took longer than 2 minutes"
    note = "bad failed before (seed 1 took longer than 2 minutes): delete log/compare/bad/failed.json to try it again"
    assert found["notes"] == [note] and world.error("bad=--pos rope", *argv[2:]) == f"error: {note}"
    Path("log/compare/bad/failed.json").unlink()
    assert world.judge(*argv)["variants"][1]["verdict"] != "failed" and world.started == [("bad", 1), ("bad", 2)]


@pytest.mark.slow
def test_changed_ideas_are_tried_again(world):
    argv = [world.flags(), "--seeds", 2]
    world.failing = {"bad": CRASH}
    world.judge("plain=", "bad=--pos rope", *argv)
    world.failing = {}
    assert world.judge("plain=", "bad=--window 8", *argv)["variants"][1]["verdict"] != "failed"


@pytest.mark.slow
def test_locked_or_damaged_runs_fail_no_idea(world):
    argv = ["plain=", "idea=--pos rope", world.flags(), "--seeds", 2]
    for message in (f"another process is writing into x: {WAIT}", f"s3://b failed (TimeoutError): {CHECK_NETWORK}"):
        world.failing = {"idea/2": (2, f"error: {message}")}
        assert f"exited with 2: error: {message}" in world.error(*argv)
    world.failing = {}
    world.judge(*argv)
    Path("log/compare/idea/2", RUN).unlink()
    assert "idea/2 has files of a run, but no run.json: restore that, or delete the folder" in world.error(*argv)
    assert not Path("log/compare/idea/failed.json").exists()
    shutil.rmtree("log/compare/idea/2")
    assert world.judge(*argv)["variants"][1]["verdict"] != "failed"
    Path("log/compare/idea/1/metrics.jsonl").write_text("")
    assert "log/compare/idea/1/metrics.jsonl has no steps: delete the folder" in world.error(*argv)


@pytest.mark.slow
def test_no_run_starts_after_a_failure(world):
    world.failing = {"plain/2": (1, "error: no space: free some space")}
    assert "free some space" in world.error("plain=", "idea=--pos rope", world.flags(), "--seeds", 9)
    assert world.started == [("plain", 1), ("idea", 1), ("plain", 2)]


@pytest.mark.slow
def test_moved_results_are_found(world, monkeypatch):
    argv = ["plain=", "idea=--pos rope", world.flags(), "--seeds", 2]
    found = world.judge(*argv)
    world.started.clear()
    Path("log/compare").rename("log/moved")
    assert world.judge(*argv, "--out-dir", Path("log/moved").absolute())["variants"] == found["variants"] and world.started == []
    lines = Path("log/moved/results.tsv").read_text()
    monkeypatch.setattr(compare, "code_now", lambda: code_once() | {"commit": "a" * 40})  # the runs' commit counts, not today's
    world.judge(*argv, "--out-dir", "log/moved")
    assert Path("log/moved/results.tsv").read_text() == lines


@pytest.mark.slow
def test_hanging_run_is_killed(monkeypatch, tmp_path):
    """A run that ignores SIGTERM, as code that hangs in a step does."""
    script = tmp_path / "train.py"
    script.write_text("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('begun', flush=True)\ntime.sleep(99)\n")
    monkeypatch.setattr(runs, "SCRIPT", script)
    monkeypatch.setattr(runs, "SECONDS_TO_SAVE", 0.5)
    began, running = time.monotonic(), runs.Running()
    with pytest.raises(subprocess.TimeoutExpired):
        runs.run_to_end([], running, dict(os.environ), 0.02)
    assert time.monotonic() - began < 30 and running.processes == []


def test_run_that_starts_too_late_is_ended():
    """A worker starts its run while an error ends the others. Each gets one signal: a second one would prevent its save."""
    running, signals = runs.Running(), []
    early, late = (SimpleNamespace(terminate=partial(signals.append, name)) for name in ("early", "late"))
    running.add(early)
    running.close()
    running.add(late)
    running.close()
    assert signals == ["early", "late"]


@pytest.mark.slow
def test_fault_of_the_machine_fails_no_idea(world):
    argv = ["plain=", "bad=--pos rope", world.flags(), "--seeds", 2]
    world.failing, world.replay = {"bad": CRASH}, (1, "Traceback (most recent call last):\nRuntimeError: CUDA error: device lost")
    error = world.error(*argv)
    assert "exited with 1: KeyError: 'x'. plain fails now too (RuntimeError: CUDA error: device lost): mend the machine" in error
    assert world.replayed == [("plain", 1)] and not Path("log/compare/bad/failed.json").exists()
    world.replay = (0, "")
    assert world.judge(*argv)["variants"][1]["verdict"] == "failed"
    given = ["log/compare/plain", "bad=--window 8", world.flags(), "--out-dir", "o"]
    assert world.judge(*given)["variants"][1]["verdict"] == "failed" and len(world.replayed) == 3


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
    error = "error: plain is no measure for others (seed 2: the loss is not finite): compare with another variant"
    assert world.error("plain", "even") == error


@pytest.mark.slow
@pytest.mark.parametrize("block", [2, 8, 32])
def test_idea_that_looks_ahead_fails(world, monkeypatch, block):
    """A made-up run has the weights of a real model. In this idea, each position sees the mean of its block of tokens."""
    world.variant("plain"), world.variant("idea", flags=("--pos", "rope"))
    assert world.judge("plain", "idea")["variants"][1]["verdict"] == "no difference shown"
    honest = VariantGPT.hidden_states_and_balance

    def peeking(self, idx, *more):
        x, balance = honest(self, idx, *more)
        means = [part.mean(1, keepdim=True).expand_as(part) for part in self.transformer.wte(idx).split(block, 1)]
        return x + torch.cat(means, 1), balance

    monkeypatch.setattr(VariantGPT, "hidden_states_and_balance", peeking)
    row = world.judge("plain", "idea")["variants"][1]
    assert row["text"] == "failed: seed 1: its predictions depend on later tokens"
    assert "idea is no measure for others (seed 1: its predictions depend on later tokens)" in world.error("idea", "plain")


@pytest.mark.slow
def test_idea_may_branch_on_its_numbers(world, monkeypatch):
    """Its cache can't be measured with fake numbers, and nothing else changes."""
    world.variant("plain"), world.variant("idea", flags=("--pos", "rope"))
    honest = VariantGPT.hidden_states_and_balance

    def branching(self, *args):
        return honest(self, *args) if self.transformer.wte.weight.sum() != 5 else None

    monkeypatch.setattr(VariantGPT, "hidden_states_and_balance", branching)
    row = world.judge("plain", "idea")["variants"][1]
    assert row["verdict"] == "no difference shown" and row["cache_bytes"] is None
    assert run_main(compare.main, "plain", "idea") == 0 and " kB" in world.capsys.readouterr().out  # only the idea's cell is empty

    def whole_only(self, idx, *more):
        return honest(self, idx, *more) if idx.size(1) in (1, 32) else 1 / 0

    monkeypatch.setattr(VariantGPT, "hidden_states_and_balance", whole_only)
    row = world.judge("plain", "idea")["variants"][1]
    assert row["text"] == "failed: seed 1: from its checkpoint, it can't predict parts of a text (division by zero)"


def test_loss_must_be_of_the_predictions():
    model = build(VariantConfig(vocab_size=257, seq_len=16, n_layer=1, n_head=1, n_embd=8, n_expert=4, pos="rope")).eval()
    assert measure.not_a_language_model(model) == ""
    model.loss = lambda x, weight, targets, vocab_size: 0.9 * cross_entropy(x, weight, targets, vocab_size)
    assert measure.not_a_language_model(model) == "its loss is not the cross entropy of its predictions"


def test_equal_time_is_passed_to_every_run():
    variants = compare.variants_of(CompareConfig(variants=("a=--pos rope", "b="), flags="--n-layer 1", max_seconds=90))
    assert [v.flags for v in variants] == [["--n-layer", "1", "--max-seconds", "90", *own] for own in (["--pos", "rope"], [])]


@pytest.mark.slow
def test_unused_seconds_are_noted(world):
    """Made-up runs have trained for 2 seconds."""
    argv = ["plain=", "even=--pos rope", world.flags(), "--seeds", 2]
    assert world.judge(*argv, "--max-seconds", 2)["notes"] == []
    notes = world.judge(*argv, "--max-seconds", 9, "--out-dir", "o")["notes"]
    assert notes[0] == "plain trained for 2 of 9 seconds, until --max-steps: raise that, or the times are unequal" and len(notes) == 2


# ---- what it prints and leaves ----


def row_of(name: str, **more) -> dict:
    numbers = dict(
        tokens=819_200_000, val_loss=3.2914, bits_per_byte=0.98, speed=1.0, work=12.5, tokens_per_second=123_456.0, memory_bytes=1e10
    )
    return {
        "variant": name,
        "seeds": [1, 2, 3],
        "params": 1_557_611_200,
        "active_params": 124_439_808,
        "cache_bytes": 1e8,
        **numbers,
        **more,
    }


def test_table_fits_a_hundred_columns(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    verdict = dict(difference=-0.0123, low=-0.05, high=0.03, p=0.012345, text="no difference shown (12 seeds could detect 0.042)")
    verdict |= dict(differences=[0.0123] * 12, paired_seeds=[*range(1, 13)])
    names = ["a", "実験" * 30, "[red]" + "long name " * 12, "x" * 120]
    text = show([row_of("first"), *(row_of(name, **verdict) for name in names)], [3, 4, 5])
    lines = text.splitlines()
    assert max(map(rich.cells.cell_len, lines)) <= WIDTH and "\x1b" not in text and "[red]long" in text
    assert "no difference shown" in text and "-0.0123 ± 0.0400" in text and "1,557.6 M (124.4 M)" in text
    starts = {rich.cells.cell_len(line[: line.index("-0.0123")]) for line in lines if "-0.0123" in line}
    assert len(starts) == 1  # aligned, even beside double-width letters


@pytest.mark.parametrize(("p", "shown"), [(5.8e-13, "<.0001"), (0.0, "<.0001"), (0.00012, "0.0001"), (0.07, "0.0700"), (None, "")])
def test_small_p_is_not_shown_as_zero(p, shown):
    line = show([row_of("first"), row_of("idea", p=p, text="better", difference=-0.1, low=-0.2, high=0.0)], [5]).splitlines()[3]
    assert line.split("± 0.1000")[1].split("better")[0].strip() == shown


def test_table_says_how_many_seeds_each_loss_has():
    text = show([row_of("first", seeds=[*range(8)]), row_of("idea")], [3, 4, 5])
    assert text.split()[:4] == ["variant", "loss", "bits/byte", "seeds"]
    assert [line.split()[3] for line in text.splitlines()[2:4]] == ["8", "3"]
    assert "evidence this strong for better, at any planned look. One-sided" in " ".join(text.split())
    assert "at any planned look" not in show([row_of("first"), row_of("idea")], [5])


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


def test_results_file_names_each_first_once(tmp_path):
    path, idea = tmp_path / "results.tsv", row_of("idea", verdict="better", text="better", commit="c")
    for seeds in ([1, 2, 3], [1, 2], [1, 2, 3, 4], [1, 2]):
        report.record([row_of("first", seeds=seeds, commit="c"), idea], path, "first")
    report.record([idea | {"variant": "next"}], path, "idea")
    report.record([row_of("idea", seeds=[1, 2], commit="c")], path, "idea")  # it has a line as an idea
    lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    assert [(line[1], line[2], line[3]) for line in lines] == [
        ("first", "", "1 2 3"), ("idea", "first", "1 2 3"), ("first", "", "1 2 3 4"), ("next", "idea", "1 2 3"),
    ]  # fmt: skip


def test_older_results_file_keeps_its_columns(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text("name\tloss\nfirst\t3.000000\n")
    report.record([row_of("idea", verdict="better")], path, "first")
    assert path.read_text().splitlines()[1:] == ["first\t3.000000", "idea\t3.291400"]


@pytest.mark.slow
@pytest.mark.parametrize("points", [(), (100, 200)])
def test_picture_shows_losses_and_differences(tmp_path, drawn, points):
    noise = {1: 0.03, 2: -0.01, 3: 0.0}

    def runs_at(shift: float, spread: float = 0.0) -> dict:
        shifts = {seed: shift + 0.01 * seed + spread * noise[seed] for seed in noise}
        curves = {seed: {at: 3.0 - at / 300 + shift for at in (*points, 300)} for seed, shift in shifts.items()}
        return {seed: {"curve": curve, "val_loss": curve[300], "params": 843_000, "tokens": 4.1e6} for seed, curve in curves.items()}

    draw({"first": runs_at(0.0), "idea": runs_at(-0.1, 1.0), "failed": {}}, (3,), tmp_path / "compare.png")
    (figure,) = drawn
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    final = panels["Difference from first, 95 % interval" + " of the mean, at the end; dots are seeds" * (points != ())]
    differences = [-0.1 + x for x in noise.values()]
    mean, half = np.mean(differences), 4.302653 * np.std(differences, ddof=1) / 3**0.5  # t at 97.5 %, two degrees of freedom
    low, high = final.containers[1].lines[2][0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-6)
    assert sorted(final.lines[final.lines.index(final.containers[0].lines[0]) + 3].get_xdata()) == pytest.approx(sorted(differences))
    named = panels["Validation loss, 95 % interval"] if not points else final
    assert [label.get_text() for label in named.get_yticklabels()] == ["first", "idea", "failed: no result"]
    assert figure.get_suptitle() == "3 variants, the first is first: 843 k parameters, 4.1 M tokens, 3 seeds"
    if points:
        gaps = panels["Difference from first, 95 % band: below 0 is better"]
        assert gaps.lines[1].get_ydata() == pytest.approx([mean] * 3) and gaps.get_ylim()[0] == pytest.approx(1.1 * (mean - half))
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "idea", "failed"]
    assert not covered(figure)


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
