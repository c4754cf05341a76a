"""--max-seconds: how far a run is by its clock, when the clock ends it, and what a resume continues with."""

import json
import os
import re
import signal
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, forked, read_stream, run_main, run_train

import checkpoint
import train
from training import trainer
from training.budget import Budget, seconds_in
from training.compiling import noticed_compilations
from training.config import TrainConfig
from training.optimizer import schedule
from training.run_json import is_finished

CONFIG = TrainConfig(max_steps=1000, warmup_steps=4, min_lr_ratio=0.1, decay_ratio=0.2)


def run_of(seconds: list[float], compiled=(), **settings):
    """Yields the budget and the step before each step of a run of one process. The steps take these seconds."""
    budget = Budget(replace(CONFIG, **settings))
    for step, length in enumerate(seconds):
        if budget.limits_reached(step):
            return
        yield budget, step
        budget.count(length, step in compiled, float(np.float32(budget.after_this_step())))
    raise AssertionError("the run did not end")


def rate(budget: Budget, step: int, name: str) -> float:
    c = budget.config
    return schedule(name, step, budget.steps(step), c.warmup_steps, c.min_lr_ratio, c.decay_ratio)


# ---- the clock and the schedule ----


@pytest.mark.parametrize(("limits", "steps"), [((10, 1000), 20), ((10.1, 1000), 21), ((10, 12), 12), ((1e300, 30), 30), ((0, 30), 30)])
def test_first_limit_ends_the_run(limits, steps):
    run = list(run_of([0.5] * 100, max_seconds=limits[0], max_steps=limits[1]))
    assert len(run) == steps
    reached = run[0][0].limits_reached(steps)
    assert reached == (["--max-seconds"] if steps in (20, 21) else ["--max-steps"])


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_steady_clock_gives_the_schedule_of_steps(name):
    rates = [rate(budget, step, name) for budget, step in run_of([0.25] * 100, max_seconds=10)]
    assert rates == pytest.approx([schedule(name, step, 40, 4, 0.1, 0.2) for step in range(40)], abs=1e-5)
    plain = [rate(budget, step, name) for budget, step in run_of([0.25] * 100, max_steps=40)]
    assert plain == [schedule(name, step, 40, 4, 0.1, 0.2) for step in range(40)]  # the same bits


def test_decay_begins_with_its_part_of_the_seconds():
    """Even if the steps become slower in the middle of the run."""
    rates = {budget.elapsed: rate(budget, step, "wsd") for budget, step in run_of([0.02] * 250 + [0.1] * 100, max_seconds=10)}
    assert all(value == 1 for elapsed, value in rates.items() if 0.1 < elapsed < 7.9)
    decay = [(elapsed, value) for elapsed, value in rates.items() if elapsed > 8.2]
    assert len(decay) > 10
    for elapsed, value in decay:
        assert value == pytest.approx(0.1 + 0.9 * (10 - elapsed) / 2, abs=0.03)


def test_schedule_follows_the_limit_nearer_its_end():
    lengths = [0.1] * 50 + [0.4] * 100
    for budget, step in run_of(lengths, max_seconds=20, max_steps=90):
        assert step / budget.steps(step) == pytest.approx(max(budget.elapsed / 20, step / 90), abs=0.02)
    assert step == 50 + round(15 / 0.4) - 1


def test_schedule_does_not_end_before_a_stalled_run():
    """A stall ends the run, once the ranks know of it."""
    values = [step / budget.steps(step) for budget, step in run_of([0.1] * 20 + [500] + [0.1] * 20, max_seconds=10)]
    assert len(values) == 22 and values[0] == 0 and values == sorted(values) and values[-1] < 1


def test_compiling_steps_count_as_usual_ones():
    budgets = [budget for budget, _ in run_of([60, 60, *[0.5] * 10, 30, *[0.5] * 20], {0, 1, 12}, max_seconds=10)]
    assert len(budgets) == 20 and budgets[-1].counted == 10


def test_older_checkpoints_count_all_their_seconds():
    assert seconds_in({"seconds": 3.0}) == 3.0
    assert seconds_in({"seconds": 3.0, "training_seconds": 2.0}) == 2.0


@pytest.mark.slow
def test_compilations_are_noticed():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (self.weight * x).relu()

    def compiled(rows: int) -> bool:
        with noticed_compilations() as found:
            loss = model(torch.ones(rows, 4)).sum()
        with noticed_compilations() as found_backward:
            loss.backward()
        backward.append(bool(found_backward))
        return bool(found)

    model, backward, handler = Model(), [], torch._dynamo.callback_handler
    model.compile(backend="aot_eager")
    assert [compiled(3), compiled(3), compiled(5), compiled(5)] == [True, False, True, False]
    assert backward[0] and not backward[1]
    assert handler.start_callbacks == []
    with noticed_compilations():
        torch._dynamo.reset()  # removes all callbacks


# ---- runs ----


class Clock:
    """A clock in place of train's time, by which every update takes `step` seconds, and as much time passes between updates."""

    def __init__(self, step: float = 0.5):
        self.now, self.step = 0.0, step

    def perf_counter(self) -> float:
        self.now += self.step
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(train, "time", Clock())


def rows(out_dir, key: str) -> dict[int, dict]:
    found = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in found if key in row}


LONG = ("--max-steps", 1000, "--max-seconds", 5, "--val-every", 0)  # ten steps


@pytest.mark.slow
def test_run_ends_validates_and_resumes_with_more(clock, shards, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_train(shards, run, *LONG) == 0
    assert is_finished(run)
    trained = rows(run, "loss")
    assert list(trained) == list(range(10)) and list(rows(run, "val_loss")) == [10]
    assert [row["training_seconds"] for row in trained.values()] == [0, 0, *(step / 2 for step in range(2, 10))]
    expected = [3e-3 * schedule("cosine", step, 10, 3, 0.1, 0.2) for step in range(10)]
    assert [row["lr"] for row in trained.values()] == pytest.approx(expected)
    assert rows(run, "val_loss")[10]["training_seconds"] == 5
    capsys.readouterr()
    assert run_main(train.main, "--resume", "--out-dir", run) == 0
    assert "finished already, at step 10: raise --max-seconds to continue" in capsys.readouterr().err
    assert run_main(train.main, "--resume", "--out-dir", run, "--max-seconds", 8) == 0
    assert is_finished(run) and list(rows(run, "loss")) == list(range(16))
    assert run_main(train.main, "--resume", "--out-dir", run, "--max-seconds", 0, "--max-steps", 18) == 0
    assert is_finished(run) and list(rows(run, "loss")) == list(range(18))


@pytest.mark.slow
def test_stopped_run_keeps_its_used_seconds(clock, shards, tmp_path, monkeypatch):
    def update(self, step, **how):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, step, **how)

    run, plain = tmp_path / "run", trainer.Trainer.update
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "update", update)
        assert run_train(shards, run, *LONG) == 128 + signal.SIGTERM
    step = checkpoint.newest_step(run)
    assert not is_finished(run) and checkpoint.load_training(run, step)[1]["training_seconds"] == step / 2
    assert run_main(train.main, "--resume", "--out-dir", run) == 0
    assert is_finished(run) and checkpoint.newest_step(run) == 10


@pytest.mark.slow
def test_end_says_what_the_run_lacked(clock, shards, tmp_path, capsys):
    assert run_train(shards, tmp_path / "a", *LONG, "--max-steps", 4) == 0
    assert "; --max-steps ended the run after 2.0 of 5.0 seconds: raise it to use them all" in capsys.readouterr().err
    assert run_train(shards, tmp_path / "b", *LONG, "--warmup-steps", 50) == 0
    assert "; after 10 steps the learning rate had not reached --max-lr: lower --warmup-steps" in capsys.readouterr().err


@pytest.mark.slow
def test_replay_step_uses_the_logged_clock(clock, shards, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_train(shards, run, *LONG, "--checkpoint-every", 4, "--keep", 0, "--micro-batch-size", 8) == 0
    for step in (3, 7):
        train.time.step = 0.01
        assert run_main(train.main, "--replay-step", step, "--out-dir", run) == 0
        assert "the same as in the log" in capsys.readouterr().out
    log = run / "metrics.jsonl"
    log.write_text(re.sub(r'("step": 5, "loss".*)"training_seconds"', r'\1"x"', log.read_text()))
    assert run_main(train.main, "--replay-step", 7, "--out-dir", run) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "has no training_seconds of 1 steps such as 5" in error


def different_clocks():
    """Rank 1's clock is ten times as fast. In step 6 it compiles, and rank 0 waits for it for long."""

    @contextmanager
    def noticed():
        late = int(os.environ["RANK"]) and len(read) == 2 * 6 + 1
        yield [1] if late else []

    def perf_counter():
        read.append(0)
        clock.now += 100 if len(read) == 2 * 6 + 2 else clock.step
        return clock.now

    read, clock = [], Clock(5.0 if int(os.environ["RANK"]) else 0.5)
    clock.perf_counter = perf_counter
    train.time, trainer.noticed_compilations = clock, noticed


@pytest.mark.slow
def test_two_ranks_follow_the_first_ones_clock(shards, tmp_path):
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", *LONG]
    result = forked(tmp_path, "train", *argv, processes=2, first=different_clocks)
    assert result.returncode == 0, result.stderr
    assert is_finished(tmp_path / "run")
    assert list(read_stream(tmp_path / "run", "train")) == list(range(10))
    assert [row["training_seconds"] for row in rows(tmp_path / "run", "loss").values()][2:] == [step / 2 for step in range(2, 10)]
