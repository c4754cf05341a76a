"""What a run survives: kills while it saves, a rank that dies or hangs, a full disk, a nonfinite loss, silent drift."""

import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import product

import pytest
import torch
from conftest import REPO, THOROUGH, TINY, Forked, forked, kill_at_write, read_stream, run_main, run_train
from test_hellaswag import make_tasks
from test_train import final_weights

import checkpoint
import train
import training.log
from checkpoint import newest_step
from common import tokenizer
from common.files import read_json, write_json
from common.shards import find_shards
from dataloader import TokenStream


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows_of(out_dir) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    torch.set_num_threads(1)
    assert run_train(shards, out_dir, "--checkpoint-every", 5, "--keep", 0) == 0
    return out_dir


# ---- kills ----


@pytest.mark.slow
def test_kill_while_compiling_breaks_no_later_run(shards, tmp_path):
    """A killed compiler leaves an empty library in the cache that all runs share."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    flags = [*TINY, "--compile", "--n-layer", 1, "--data-dir", shards, "--out-dir", run, "--max-steps", 2, "--warmup-steps", 1]
    for _ in range(2):
        result = subprocess.run([sys.executable, REPO / "train.py", *map(str, flags)], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        [path.unlink() for path in run.iterdir()]
        libraries = sorted(cache.glob("*/*.so"))
        assert len(libraries) > 3 and all(path.stat().st_size for path in libraries)
        for path in libraries[::4]:  # each takes seconds to compile again
            path.write_bytes(b"")
            os.utime(path, (0, 0))


@pytest.mark.slow
def test_fifty_kills_while_saving(undisturbed, shards, tmp_path):
    """Each SIGKILL comes at a random write of a checkpoint, or up to 2 ms later. The next launch finds the newest complete checkpoint.
    The final run has the losses and weights of the undisturbed one."""
    generator, run = random.Random(0), tmp_path / "run"
    argv = [*TINY, "--data-dir", shards, "--out-dir", run, "--checkpoint-every", 1, "--keep", 2, "--val-every", 0]
    kills, newest = 0, 0
    while kills < 50:
        # a checkpoint takes nine writes: model, state and seal, a rename of each, and three files deleted by --keep
        kill = partial(kill_at_write, run, generator.randint(3, 12), generator.choice([0, 0.0003, 0.002]))
        result = forked(tmp_path, "train", *argv, first=kill)
        if result.returncode == 0:  # near its end, a launch has too few writes left for the kill: start over
            newest, argv = 0, [*TINY, "--data-dir", shards, "--out-dir", run, *argv[-6:]]
            [path.unlink() for path in run.iterdir()]
            continue
        assert result.returncode == -signal.SIGKILL, result.stderr
        kills += 1
        checkpoint.recover_interrupted_save(run)  # as the next launch will
        found = newest_step(run) or 0
        assert found >= newest, f"kill {kills}: the checkpoint of step {newest} is lost"
        newest = found
        argv = ["--resume", "--out-dir", run, "--checkpoint-every", 1, "--keep", 2, "--val-every", 0]
    assert forked(tmp_path, "train", "--resume", "--out-dir", run).returncode == 0
    assert read_stream(run, "train") == read_stream(undisturbed, "train")
    assert same_weights(final_weights(run, 20), final_weights(undisturbed, 20))
    assert not list(run.glob("*.tmp"))


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_resumes(undisturbed, shards, tmp_path):
    """torchrun repeats its command, without --resume."""
    (tmp_path / "killed.py").write_text(
        "import os, sys, signal\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        "import train\n"
        "plain = train.Trainer.update\n"
        "def update(self, step, *args, **how):\n"
        "    if step == 12 and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(self, step, *args, **how)\n"
        "train.Trainer.update = update\n"
        "train.main()\n"
    )
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    command += [tmp_path / "killed.py", *TINY, "--data-dir", shards, "--out-dir", run, "--checkpoint-every", 5]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100, env=env)
    assert result.returncode == 0, result.stderr
    launches = json.loads((run / "run.json").read_text())["launches"]
    assert [launch["step"] for launch in launches] == [0, 10] and launches[0]["torchrun"] == launches[1]["torchrun"] != ""
    here, there = read_stream(run, "train"), read_stream(undisturbed, "train")
    assert here.keys() == there.keys() and max(abs(float(here[step]) - float(there[step])) for step in there) <= 1e-5


@pytest.mark.parametrize(("before", "now", "resumes"), [("a", "a", True), ("a", "b", False), ("", "a", False), ("", "", False)])
def test_only_the_same_torchrun_resumes_without_flag(shards, tmp_path, monkeypatch, capsys, before, now, resumes):
    """Each torchrun has its own folder, the same in all attempts."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", before and f"/none/{before}/attempt_0/0/error.json")
    assert run_train(shards, tmp_path / "run", "--max-steps", 2) == 0
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", now and f"/none/{now}/attempt_1/0/error.json")
    assert run_train(shards, tmp_path / "run", "--max-steps", 2) == (0 if resumes else 2)
    assert ("finished already" if resumes else "already: add --resume") in capsys.readouterr().err


def note_positions(folder):
    """Makes each process write down which sequences it takes."""
    plain = TokenStream.batch

    def batch(self, positions):
        with open(folder / "positions", "a") as file:
            file.write("".join(f"{self.sequence_at(p)}\n" for p in positions) if "train" in self.shards[0].path.name else "")
        return plain(self, positions)

    TokenStream.batch = batch


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "micro_batch"), [(0, 8), (4, 1)])
def test_resume_with_another_world_size(undisturbed, shards, tmp_path, processes, micro_batch):
    """Two processes save, one or four resume: with the same sequences in each step and the losses of the undisturbed run."""
    run, first = tmp_path / "run", partial(note_positions, tmp_path)
    argv = [*TINY, "--data-dir", shards, "--out-dir", run, "--val-every", 0, "--checkpoint-every", 10]
    assert forked(tmp_path, "train", *argv, processes=2, first=first).returncode == 0
    [path.unlink() for path in checkpoint.files_of(run, 20)]
    taken = [int(line) for line in (tmp_path / "positions").read_text().split()]
    assert len(taken) == 20 * 8
    (tmp_path / "positions").unlink()
    argv = ["--resume", "--out-dir", run, "--micro-batch-size", micro_batch]
    assert forked(tmp_path, "train", *argv, processes=processes, first=first).returncode == 0
    again = [int(line) for line in (tmp_path / "positions").read_text().split()]
    for step in range(10):
        assert sorted(again[8 * step : 8 * step + 8]) == sorted(taken[80 + 8 * step : 88 + 8 * step])
    here, there = read_stream(run, "train"), read_stream(undisturbed, "train")
    assert max(abs(float(here[step]) - float(there[step])) for step in there) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number"),
    product(["step", "HellaSwag", "compilation"], [signal.SIGTERM, signal.SIGINT])
    if THOROUGH
    else [("step", signal.SIGINT), ("HellaSwag", signal.SIGTERM), ("compilation", signal.SIGTERM)],
)
def test_signal_to_torchrun_saves_within_30_seconds(shards, tmp_path, where, number):
    """Two processes save everything. While the first step compiles, there is nothing to save yet."""
    run, tasks = tmp_path / "run", tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in make_tasks(2000)))
    argv = [*TINY, "--max-steps", 10**6, "--hellaswag-file", tasks, "--hellaswag-every", 5 if where == "HellaSwag" else 0]
    argv += ["--val-every", 0, *(["--compile"] if where == "compilation" else [])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", REPO / "train.py"]
    with open(tmp_path / "err", "w") as err:
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        process = subprocess.Popen([*map(str, [*command, *argv, "--data-dir", shards, "--out-dir", run])], stderr=err, env=env)
    sign = {"compilation": "an epoch is", "HellaSwag": "HellaSwag:   0%", "step": "| loss "}[where]
    times = 1 if where == "compilation" else 2  # the second HellaSwag is at step 5; a second step means that all ranks have finished one
    while (tmp_path / "err").read_text().count(sign) < times:
        assert process.poll() is None
        time.sleep(0.05)
    if where == "compilation":
        time.sleep(1)
    began = time.monotonic()
    process.send_signal(number)
    process.wait(40)
    assert time.monotonic() - began < 30
    err = (tmp_path / "err").read_text()
    assert ("nothing to save" if where == "compilation" else "all saved") in err
    assert (newest_step(run) is None) == (where == "compilation") and (where != "HellaSwag" or newest_step(run) == 5)


@pytest.mark.parametrize("how", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_one_failing_rank_ends_all_ranks(shards, tmp_path, how):
    """The other rank prints one line and exits: at once if rank 1 dies, after a timeout of 6 s if it hangs. A rank that dies says why."""
    run = Forked(
        tmp_path, "train", *TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--timeout-minutes", 0.1 if how == "hangs" else 1,
        processes=2, first=partial(fail_rank_1, how),
    )  # fmt: skip
    began = time.monotonic()
    run.processes[0].join(40)
    assert run.processes[0].exitcode == 1 and time.monotonic() - began < 30
    if how == "dies":
        run.processes[1].join(20)
        assert run.processes[1].exitcode == 2
        assert run.outputs[1][1].read_text().count("error: shard x is damaged") == 1
    else:
        run.processes[1].kill()
    err = [line for line in run.outputs[0][1].read_text().splitlines() if not line.startswith(("[W", "[E"))]
    assert err[-1].startswith("error: rank 0 lost touch with another") and "Traceback" not in "".join(err)


def fail_rank_1(how: str):
    plain = train.Trainer.update

    def update(self, step, *args, **rest):
        if step == 5 and self.world.rank == 1:
            if how == "hangs":
                time.sleep(100)
            raise ValueError("shard x is damaged")
        return plain(self, step, *args, **rest)

    train.Trainer.update = update


# ---- a full disk ----


def limit_files(size: int):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("choice", ["continue", "stop"])
def test_full_disk_while_saving(undisturbed, shards, tmp_path, choice):
    """Limits files to 200 kB. The model has 140, the optimizer's state 280."""
    run, argv = tmp_path / "run", ["--checkpoint-every", 5, "--on-save-error", choice]
    assert run_main(train.main, *TINY, "--data-dir", shards, "--out-dir", run, "--max-steps", 20, "--checkpoint-every", 5, "--keep", 0) == 0
    for step in (10, 15, 20):
        [path.unlink() for path in checkpoint.files_of(run, step)]
    (run / "log.txt").unlink()
    result = forked(tmp_path, "train", "--resume", "--out-dir", run, *argv, first=partial(limit_files, 200_000))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    warning = re.search(r"warning: could not save the checkpoint of step 10 \(.*\): it needs 0.4 MB, .* MB free; .*", result.stderr)
    assert ("the run ends" if choice == "stop" else "training continues") in warning[0]
    assert re.search(r"\nerror: could not save the checkpoint of step \d+ .*: free some space, then --resume", result.stderr)
    assert max(read_stream(run, "train")) == (19 if choice == "continue" else 10)
    assert newest_step(run) == 5 and not list(run.glob("*.tmp"))
    assert forked(tmp_path, "train", "--resume", "--out-dir", run).returncode == 0
    assert same_weights(final_weights(run, 20), final_weights(undisturbed, 20))


def test_log_lines_wait_for_disk_space(undisturbed, shards, tmp_path, monkeypatch, capsys):
    plain, calls = training.log.append, []

    def append(path, text):
        calls.append(path)
        if 7 < len(calls) < 30:
            raise OSError(28, "No space left on device", str(path))
        plain(path, text)

    monkeypatch.setattr(training.log, "append", append)
    assert run_train(shards, tmp_path / "run") == 0
    assert capsys.readouterr().err.count("its lines are kept in memory until they can be written") == 2
    for stream in ("train", "val"):
        assert read_stream(tmp_path / "run", stream) == read_stream(undisturbed, stream)
    assert len(rows_of(tmp_path / "run")) == len(rows_of(undisturbed))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_run_survives_full_disk_under_its_output(shards, tmp_path):
    command = [sys.executable, REPO / "train.py", *TINY, "--data-dir", shards, "--out-dir", tmp_path / "run"]
    with open("/dev/full", "w") as full:
        assert subprocess.run([*map(str, command)], stdout=full, stderr=full, timeout=60).returncode == 0
    assert len(read_stream(tmp_path / "run", "train")) == 20


def test_unwritable_log_fails_the_run_after_saving(shards, tmp_path, capsys):
    assert run_train(shards, tmp_path / "run", "--max-steps", 2) == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--max-steps", 4) == 2
    assert "error: [Errno 21] Is a directory" in capsys.readouterr().err and newest_step(tmp_path / "run") == 4


def test_append_writes_all_of_a_line_or_nothing(tmp_path):
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from common.files import append\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "append(Path(sys.argv[2]), 'fifteen letters\\n')\n"
        "try: append(Path(sys.argv[2]), 'ten letters\\n')\n"
        "except OSError as e: print(e)\n"
        "append(Path(sys.argv[2]), 'four')\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(REPO), str(tmp_path / "log")], capture_output=True, text=True)
    assert "log" in result.stdout and result.stderr == ""
    assert (tmp_path / "log").read_text() == "fifteen letters\nfour"


# ---- nonfinite numbers and spikes ----


@pytest.mark.parametrize(
    ("cause", "what"),
    [
        ("hardware", "loss"),
        ("data", "gradient"),
        pytest.param("hardware", "gradient", marks=pytest.mark.slow),
        pytest.param("data", "loss", marks=pytest.mark.slow),
    ],
)
def test_nonfinite_numbers_on_one_rank_change_no_weight(shards, tmp_path, what, cause):
    run = tmp_path / "run"
    first = partial(bad_update, what, cause)
    argv = [*TINY, "--data-dir", shards, "--out-dir", run, "--checkpoint-every", 1, "--keep", 0]
    result = forked(tmp_path, "train", *argv, processes=2, first=first)
    assert result.returncode == 0, result.stderr
    assert same_weights(final_weights(run, 5), final_weights(run, 6)) and not same_weights(final_weights(run, 6), final_weights(run, 7))
    state = [torch.load(run / f"state_{step:05d}.pt", weights_only=True) for step in (5, 6)]
    assert all(torch.equal(state[0]["optimizer"]["state"][0][key], state[1]["optimizer"]["state"][0][key]) for key in ("step", "exp_avg"))
    assert all(p.isfinite().all() for p in final_weights(run, 20).values())
    why = next(row for row in rows_of(run) if row["step"] == 5 and "loss" in row)["skipped"]
    assert f"warning: step 5 changes no weight (1 in a row, 10 end the run): {why}" in result.stderr
    assert ("rank 1's loss is nan" if what == "loss" else "the gradient's norm is nan") in why
    stream = TokenStream(find_shards(shards), "train", 32)
    # rank 1 takes positions 44 to 47 in step 5; if the data causes a bad loss, only its sequence is named
    positions = [45] if (what, cause) == ("loss", "data") else [44, 45, 46, 47]
    assert "sequences of rank 1: " + ", ".join(map(stream.place, positions)) in why
    assert ("hardware may be at fault" in why) == (cause == "hardware")
    # a gradient that is bad only once can come from any rank
    assert ("sequences of rank 0" in why) == ((what, cause) == ("gradient", "hardware"))


def bad_update(what: str, cause: str):
    """Turns the loss of rank 1 in step 5, or only its gradient, into nan: once, or whenever position 45 is in the batch."""
    plain, calls = train.Trainer.loss, []

    def loss(self, model, positions):
        value = plain(self, model, positions)
        if 45 not in positions or (cause == "hardware" and calls):
            return value
        calls.append(positions)
        if what == "loss":
            return value * math.nan
        value.register_hook(lambda gradient: gradient * math.nan)
        return value

    train.Trainer.loss = loss


def nan_on_rank_1_after_the_sum():
    """Spoils the summed gradients on rank 1 alone, as a failing card would."""
    plain, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_grad_norm_(parameters, *args):
        calls.append(1)
        parameters = list(parameters)
        if len(calls) == 6 and os.environ["RANK"] == "1":
            [p.grad.mul_(math.nan) for p in parameters]
        return plain(parameters, *args)

    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_


def test_nan_after_gradient_sum_changes_no_weight(shards, tmp_path):
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--checkpoint-every", 1, "--keep", 0]
    result = forked(tmp_path, "train", *argv, processes=2, first=nan_on_rank_1_after_the_sum)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("changes no weight") == 1 and "step 5 changes no weight" in result.stderr
    assert same_weights(final_weights(tmp_path / "run", 5), final_weights(tmp_path / "run", 6))


@pytest.mark.parametrize(("bad", "status"), [((3, 5), 0), ((3, 4), 1)])
def test_only_consecutive_bad_steps_end_a_run(shards, tmp_path, monkeypatch, capsys, bad, status):
    plain = train.Trainer.loss

    def loss(self, model, positions):
        return plain(self, model, positions) * (math.nan if positions[0] // 8 in bad else 1)

    monkeypatch.setattr(train.Trainer, "loss", loss)
    assert run_train(shards, tmp_path / "run", "--max-bad-steps", 2, "--checkpoint-every", 2) == status
    assert ("error: 2 updates in a row were skipped" in capsys.readouterr().err) == bool(status)
    assert newest_step(tmp_path / "run") == (4 if status else 20)  # step 4 is saved before its update
    assert all(p.isfinite().all() for p in final_weights(tmp_path / "run", newest_step(tmp_path / "run")).values())


def test_skip_spikes_decides_the_same_after_resume(shards, tmp_path, monkeypatch, capsys):
    plain = train.Trainer.loss

    def loss(self, model, positions):
        return plain(self, model, positions) * (10 if 90 * 8 <= positions[0] < 91 * 8 else 1)

    monkeypatch.setattr(train.Trainer, "loss", loss)
    argv = ["--max-steps", 100, "--val-every", 0, "--checkpoint-every", 30, "--keep", 0]
    for name, flags in (("plain", []), ("skips", ["--skip-spikes", 6])):
        assert run_train(shards, tmp_path / name, *argv, *flags) == 0
    assert capsys.readouterr().err.count("standard deviations above that of the last") == 1
    skipped = [row["step"] for row in rows_of(tmp_path / "skips") if "skipped" in row]
    assert skipped == [90] and not any("skipped" in row for row in rows_of(tmp_path / "plain"))
    assert read_stream(tmp_path / "plain", "train")[90] == read_stream(tmp_path / "skips", "train")[90]
    assert read_stream(tmp_path / "plain", "train")[91] != read_stream(tmp_path / "skips", "train")[91]
    before = final_weights(tmp_path / "skips", 100)
    for path in checkpoint.files_of(tmp_path / "skips", 90) + checkpoint.files_of(tmp_path / "skips", 100):
        path.unlink()
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "skips") == 0
    assert same_weights(final_weights(tmp_path / "skips", 100), before)


# ---- drift ----

GOLDEN = REPO / "tests" / "golden.json"


def test_golden_run(undisturbed, request):
    """Compares 20 steps and three validations with golden.json. To renew it on purpose: pytest -k golden --renew-golden"""
    losses = {stream: read_stream(undisturbed, stream) for stream in ("train", "val")}
    if request.config.getoption("--renew-golden"):
        write_json(GOLDEN, losses)
    golden = read_json(GOLDEN, "")
    for stream, expected in golden.items():
        found = {str(step): float(loss) for step, loss in losses[stream].items()}
        assert found == pytest.approx({step: float(loss) for step, loss in expected.items()}, abs=2e-5)


def test_replay_step_reproduces_the_logged_loss(undisturbed, capsys):
    """It starts from the checkpoint before, or from the beginning, gets the same bits, and changes nothing on disk."""
    before = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    for step in (3, 12, 15):
        assert run_main(train.main, "--replay-step", step, "--out-dir", undisturbed) == 0
        out = capsys.readouterr().out
        loss = next(row["loss"] for row in rows_of(undisturbed) if row["step"] == step and "loss" in row)
        assert f"step {step}: loss {loss!r}, gradient norm " in out and "the same as in the log" in out
        assert re.search(rf"step {step}, rank 0: loss {loss!r}, first sequence tiny_train_\d+.npy from token [\d,]+", out)
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == before
    assert run_main(train.main, "--replay-step", 20, "--out-dir", undisturbed) == 2
    assert "the run's steps are 0 to 19" in capsys.readouterr().err


def test_replay_step_uses_the_settings_of_its_launch(shards, tmp_path, capsys):
    """A resume with more steps stretches the schedule. Steps done before it had another learning rate."""
    run = tmp_path / "run"
    assert run_train(shards, run, "--keep", 0, "--checkpoint-every", 10) == 0
    assert run_main(train.main, "--resume", "--out-dir", run, "--max-steps", 40) == 0
    for step in (15, 35):
        assert run_main(train.main, "--replay-step", step, "--out-dir", run) == 0
        assert "the same as in the log" in capsys.readouterr().out
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "loss": 3.1')  # cut off by a crash
    assert run_main(train.main, "--replay-step", 15, "--out-dir", run) == 0
    (run / "metrics.jsonl").unlink()
    assert run_main(train.main, "--replay-step", 15, "--out-dir", run) == 0
    assert "the log has no such step" in capsys.readouterr().out


def no_tokenizer_on_rank_1():
    plain = tokenizer.get_tokenizer

    def get_tokenizer(name):
        if os.environ["RANK"] == "1":
            raise ValueError("could not fetch it")
        return plain(name)

    tokenizer.get_tokenizer = get_tokenizer


def test_no_rank_samples_if_one_lacks_the_vocabulary(shards, tmp_path):
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in make_tasks(3)))
    argv = [
        *TINY,
        "--data-dir",
        shards,
        "--out-dir",
        tmp_path / "run",
        "--hellaswag-every",
        10,
        "--hellaswag-file",
        tmp_path / "tasks.jsonl",
    ]
    result = forked(tmp_path, "train", *argv, processes=2, first=no_tokenizer_on_rank_1)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning: no samples or HellaSwag in this run: could not fetch it") == 1


def test_replay_step_reports_a_different_loss(undisturbed, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    [(copy / path.name).write_bytes(path.read_bytes()) for path in undisturbed.iterdir()]
    row = next(line for line in (copy / "metrics.jsonl").read_text().splitlines() if line.startswith('{"step": 7, "loss"'))
    (copy / "metrics.jsonl").write_text(re.sub(r'"loss": [\d.]+', '"loss": 4.25', row) + "\n")
    assert run_main(train.main, "--replay-step", 7, "--out-dir", copy) == 1
    assert "in the log: 4.25" in capsys.readouterr().out


@pytest.mark.slow
def test_signal_inside_a_weakref_callback_ends_the_run(tmp_path):
    """Python drops what a callback raises. This one gets SIGTERM, as in the middle of torch.compile."""
    (tmp_path / "stop.py").write_text(
        f"import os, signal, sys, time, weakref\nsys.path.insert(0, {str(REPO)!r})\nimport train\n"
        "stop = train.StopSignal()\nthing = {1}\n"
        "ref = weakref.ref(thing, lambda _: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.1)))\n"
        "del thing\ntime.sleep(60)\n"
    )
    result = subprocess.run([sys.executable, tmp_path / "stop.py"], capture_output=True, text=True, timeout=30)
    assert result.returncode == 143 and "nothing to save" in result.stderr and "Exception ignored" in result.stderr
