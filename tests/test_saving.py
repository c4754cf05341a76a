"""--checkpoint-minutes: how much work a crash may cost, and how much time the saves may take."""

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, forked, read_stream

from checkpoint import Saver, sealed_steps
from training import saving
from training.trainer import Trainer


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def next_save(interval: saving.Interval, clock, step: float) -> float:
    """Lets steps pass until a save is due. Returns when the step before it ends."""
    while not interval.due(step):
        clock.now += step
    clock.now += step
    return clock.now


def test_saves_are_complete_before_minutes_are_over(clock):
    interval = saving.Interval(15, None)
    for cost in (0.0, 4.0, 4.0, 4.0):
        began = clock.now
        clock.now += cost
        interval.saved(began)
        assert 900 - 2 * 7 <= next_save(interval, clock, 7.0) + cost - began <= 900


def test_slow_saves_come_less_often(clock):
    lines = []
    interval = saving.Interval(15, lines.append)
    for cost in (20.0, 20.0, 500.0, 20.0, 20.0):  # one alone counts little
        began = clock.now
        clock.now += cost
        interval.saved(began)
        assert 2000 <= next_save(interval, clock, 7.0) - began <= 2007
    assert lines == ["warning: a save takes 20.0 s; for at most 1% of the time, they come every 33.3 minutes"]


def test_zero_minutes_save_never(clock):
    interval = saving.Interval(0, None)
    clock.now = 1e9
    assert not interval.due(1.0)


def minutes_pass(end: int, out: Path):
    """A minute passes in each step on rank 0's clock, ten seconds on another rank's. Notes the saves. The machine is gone before a step."""
    update, save, clock = Trainer.update, Saver.save, SimpleNamespace(now=0.0)
    saving.time = SimpleNamespace(monotonic=lambda: clock.now)

    def later(self, step, **how):
        if step == end:
            os._exit(9)
        clock.now += 10 if self.world.rank else 60
        return update(self, step, **how)

    def noted(self, step, content, state, timed):
        with open(out, "a") as file:
            file.write(f"{step}{' timed' * timed}\n")
        save(self, step, content, state, timed)

    Trainer.update, Saver.save = later, noted


@pytest.mark.slow
def test_ranks_save_by_rank_0s_clock(shards, tmp_path):
    """Muon gathers its state for a save: a rank that took no part would hang."""
    run, argv = tmp_path / "run", [*TINY, "--data-dir", shards, "--optimizer", "muon", "--timeout-minutes", 0.3]
    assert forked(tmp_path, "train", *argv, "--out-dir", tmp_path / "plain", processes=2).returncode == 0
    argv += ["--out-dir", run, "--checkpoint-every", 8, "--checkpoint-minutes", 5, "--keep", 1]
    result = forked(tmp_path, "train", *argv, processes=2, first=partial(minutes_pass, 15, tmp_path / "saves"))
    assert result.returncode == 9, result.stderr
    assert (tmp_path / "saves").read_text().splitlines() == ["6 timed", "8", "14 timed"] and sealed_steps(run) == [8, 14]
    result = forked(tmp_path, "train", "--resume", "--out-dir", run, processes=2)
    assert result.returncode == 0 and "resuming from the checkpoint of step 14" in result.stderr
    for stream in ("train", "val"):
        assert read_stream(run, stream) == read_stream(tmp_path / "plain", stream)
    ours, theirs = (torch.load(folder / "model_00020.pt", weights_only=True)["model"] for folder in (run, tmp_path / "plain"))
    assert all(torch.equal(ours[name], p) for name, p in theirs.items())
