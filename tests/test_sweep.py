"""lab.sweep: the space in Optuna and W&B; runs that are pruned, fail, stop and resume."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import optuna
import pytest
from conftest import TINY, rewrite_run, run_main, run_train
from made_up import made_up

from lab import sweep
from lab.runs import Run
from lab.sweep import Choice, Range, Running, flags_of, follow, parse_space
from training.config import LOWER_MEMORY, SMALLER_MODEL
from training.flags import parse_flags

SPACE = ("max_lr=1e-3..1e-1:log", "n-layer=1..3", "mlp=gelu,relu2", "qk_norm=true,false", "ema=0..0.5")


def test_space_suggests_its_values_as_flags():
    space = parse_space(SPACE)
    assert space["max_lr"] == Range(1e-3, 1e-1, True) and space["n_layer"] == Range(1, 3, False) and space["ema"] == Range(0.0, 0.5, False)
    assert space["mlp"] == Choice(["gelu", "relu2"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = []
    for _ in range(100):
        trial = study.ask()
        points.append({name: values.suggest(trial, name) for name, values in space.items()})
        config = parse_flags(flags_of(points[-1]))
        assert (config.max_lr, config.ema) == (points[-1]["max_lr"], points[-1]["ema"])
        shape = config.model.n_layer, config.model.mlp, config.model.qk_norm
        assert shape == (points[-1]["n_layer"], points[-1]["mlp"], points[-1]["qk_norm"] == "true")
    assert {point["n_layer"] for point in points} == {1, 2, 3} and len({(point["mlp"], point["qk_norm"]) for point in points}) == 4
    assert 30 < sum(point["max_lr"] < 1e-2 for point in points) < 70  # 1e-2 is the middle of the logarithmic range


def test_exported_sweep_runs_like_a_wandb_sweep(tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    argv = [
        *SPACE,
        "n_embd=32..64:log",
        "bias=true,false",
        "--flags=--preset quickstart --sample-prompt 'a b'",
        "--export",
        file,
        "--out-dir",
        tmp_path / "x y",
    ]
    assert run_main(sweep.main, *argv) == 0
    content = json.loads(file.read_text())
    assert content["metric"] == {"name": "val_loss", "goal": "minimize"} and content["early_terminate"]["type"] == "hyperband"
    assert content["parameters"]["max_lr"] == {"distribution": "log_uniform_values", "min": 1e-3, "max": 1e-1}
    assert content["parameters"]["n_layer"] == {"distribution": "int_uniform", "min": 1, "max": 3}
    assert content["parameters"]["ema"] == {"distribution": "uniform", "min": 0.0, "max": 0.5}
    assert content["parameters"]["qk_norm"] == {"values": [True, False]}
    # the agent replaces the last word with flags and puts the run's id into the environment
    command = [*content["command"][:-1], "--max_lr=0.5", "--qk_norm"]
    command[2] = command[2].replace("python train.py", f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'")
    printed = subprocess.run(command, capture_output=True, text=True, env={"WANDB_RUN_ID": "abc"}, check=True).stdout
    config = parse_flags(json.loads(printed))
    assert config.out_dir == f"{tmp_path}/x y/abc" and config.tracker == "wandb" and config.sample_prompt == "a b"
    assert config.max_lr == 0.5 and config.model.qk_norm and config.model.n_layer == 2
    printed = subprocess.run(command[:-1], capture_output=True, text=True, env={"WANDB_RUN_ID": "abc"}, check=True).stdout
    assert not parse_flags(json.loads(printed)).model.qk_norm and "--no-bias" in json.loads(printed)  # W&B omits a false flag
    assert not (tmp_path / "x y").exists()


class Process:
    """Runs until it is terminated, or has exited with a code."""

    def __init__(self, code=None):
        self.returncode = code

    def poll(self):
        return self.returncode

    def terminate(self):
        self.returncode = 143


def write_losses(folder, *losses, message="error: the loss is nan: begin again with a lower --max-lr"):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": 10 * i, "val_loss": loss}) + "\n" for i, loss in enumerate(losses)))
    folder.with_suffix(".out").write_text(f"step 3\n{message}\n")


def test_run_worse_than_the_median_is_pruned(tmp_path):
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    for loss in (1.0, 2.0, 3.0):
        trial = study.ask()
        trial.report(loss, 10)
        study.tell(trial, loss)
    for number, (loss, ends) in enumerate(((1.9, False), (2.1, True))):
        one = Running(study.ask(), Run("x", [], tmp_path / str(number)), Process(), 0)
        write_losses(tmp_path / str(number), 9.0, loss)
        assert not follow(one, study) and (one.process.returncode == 143) == ends
        if ends:
            assert follow(one, study)
            last = study.get_trials()[-1]
            rows = sweep.rows_of(study)
            assert rows[0]["val_loss"] == 1.0 and rows[-1]["val_loss"] is None and rows[-1]["note"] == "pruned at step 10"
            assert last.state.name == "PRUNED" and last.user_attrs["why"] == "pruned at step 10" and last.intermediate_values == {10: 2.1}


def test_diverged_run_counts_as_pruned(tmp_path):
    study = optuna.create_study()
    write_losses(tmp_path / "0", 9.0)
    one = Running(study.ask(), Run("x", [], tmp_path / "0"), Process(1), 0)
    assert follow(one, study)
    (trial,) = study.get_trials()
    assert trial.state.name == "PRUNED" and trial.user_attrs["why"] == "error: the loss is nan: begin again with a lower --max-lr"


@pytest.mark.parametrize(
    ("status", "message", "why"),
    [
        (1, f"error: out of memory (DefaultCPUAllocator: can't allocate memory): {LOWER_MEMORY}\nException ignored in: x", "out of memory"),
        (2, f"error: this model's weights need 9 GB, cpu has 4 GB: {SMALLER_MODEL}", "this model's weights need 9 GB"),
        (-9, "step 3/9 | loss 4.0", "killed, probably because memory ran out"),
    ],
)
def test_point_without_enough_memory_counts_as_pruned(tmp_path, status, message, why):
    study = optuna.create_study()
    write_losses(tmp_path / "0", 9.0, message=message)
    assert follow(Running(study.ask(), Run("x", [], tmp_path / "0"), Process(status), 0), study)
    (trial,) = study.get_trials()
    assert trial.state.name == "PRUNED" and why in trial.user_attrs["why"]


def test_only_this_launch_explains_a_failure(tmp_path):
    study = optuna.create_study()
    write_losses(tmp_path / "0", message=f"error: out of memory (x): {LOWER_MEMORY}")
    start = (tmp_path / "0.out").stat().st_size
    with open(tmp_path / "0.out", "a") as file:
        file.write("Fatal Python error: Aborted\n")
    with pytest.raises(ValueError, match="exited with -6: Fatal Python error: Aborted"):
        follow(Running(study.ask(), Run("x", [], tmp_path / "0"), Process(-6), 0, output_start=start), study)


def test_stopped_launch_shows_finished_trials(shards, tmp_path, monkeypatch, capsys):
    """Also with characters in its path that a URL would take for something else."""

    def begin(config, space, trial, slot):
        lr = space["max_lr"].suggest(trial, "max_lr")
        if lr == "2e-3":
            raise ValueError("another process is writing")
        trial.study.tell(trial, 1.25)
        return []

    monkeypatch.setattr(sweep, "begin", begin)
    out = tmp_path / os.fsdecode(b"lr?a=b#c%3F\xff")
    argv = ["max_lr=1e-3,2e-3", f"--flags=--data-dir {shards}", "--trials", 2, "--out-dir", out, "--markdown"]
    assert run_main(sweep.main, *argv) == 2
    shown = capsys.readouterr()
    assert "| 0 | 1e-3 | 1.2500 |  |" in shown.out and "error: another process is writing" in shown.err
    assert (out / "sweep.db").stat().st_size > 1000 and [path.name for path in tmp_path.iterdir()] == [out.name]
    assert run_main(sweep.main, *argv) == 2 and "| 0 | 1e-3 | 1.2500 |  |" in capsys.readouterr().out


def test_unequal_budgets_are_noted(shards, tmp_path):
    """A search for the batch size gives larger batches more tokens."""
    for name, flags in (("1", ()), ("2", ("--total-batch-tokens", "512")), ("3", ("--max-lr", "1"))):
        made_up(tmp_path / name, shards, 1, 2.0, flags)
    config = sweep.SweepConfig(("total_batch_tokens=256,512",), out_dir=str(tmp_path))
    assert sweep.unfair_to(config, "1", "2") == ["2 trains for 10,240 tokens, 1 for 5,120 tokens"] and not sweep.unfair_to(config, "1", "3")


def test_unrelated_failure_stops_the_sweep(tmp_path):
    study = optuna.create_study()
    write_losses(tmp_path / "0", 9.0, message="error: another process is writing into x")
    with pytest.raises(ValueError, match=r"x, in .*/0, exited with 2: error: another process is writing into x"):
        follow(Running(study.ask(), Run("x", [], tmp_path / "0"), Process(2), 0), study)
    assert study.get_trials()[0].state.name == "RUNNING"


@pytest.mark.slow
def test_small_space_runs_each_point_once(shards, tmp_path, monkeypatch, capsys):
    seen = []

    def begin(config, space, trial, slot):
        seen.append(tuple(values.suggest(trial, name) for name, values in space.items()))
        if len(seen) == 3:
            raise ValueError("stopped")
        trial.study.tell(trial, float(len(seen)))
        return []

    monkeypatch.setattr(sweep, "begin", begin)
    argv = ["n_layer=1..3", "mlp=gelu,relu2", "ema=0.5..0.5", f"--flags=--data-dir {shards}", "--out-dir", tmp_path, "--trials"]
    assert run_main(sweep.main, *argv, 6) == 2 and run_main(sweep.main, *argv, 9) == 0
    assert sorted(seen[:2] + seen[3:]) == [(n, mlp, 0.5) for n in (1, 2, 3) for mlp in ("gelu", "relu2")]
    assert run_main(sweep.main, *argv, 6) == 0 and len(seen) == 7
    assert len(optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/sweep.db").trials) == 7  # no point is left in the queue
    assert len(capsys.readouterr().out.splitlines()) == 5 + 2 * 8  # the stopped launch shows its three trials too
    seen[:] = [None] * 3  # begin stops at the third point only
    argv[-2] = tmp_path / "fewer trials first"
    assert run_main(sweep.main, *argv, 5) == 0 and run_main(sweep.main, *argv, 20) == 0
    assert len(set(seen[3:])) == 6 and len(seen[8:]) == 6 - len(set(seen[3:8]))
    assert parse_space(("mlp=gelu,relu2,gelu",))["mlp"] == Choice(["gelu", "relu2"])
    assert sweep.all_points(parse_space(("seed=1..99999999999999999999",)), 5) == []
    assert sweep.all_points(parse_space(argv[:3]), 5) == sweep.all_points(parse_space(("max_lr=1..2.5",)), 5) == []


def test_workers_split_cores_and_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 16)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [sweep.environment(4, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["0", "1", "2", "0"]
    assert sweep.environment(4, 0)["OMP_NUM_THREADS"] == "4" and "CUDA_VISIBLE_DEVICES" not in sweep.environment(1, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [sweep.environment(2, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["4", "6"]
    assert sweep.environment(2, 0)["OMP_NUM_THREADS"] == "1"


def test_plot_shows_each_flag_and_the_best(tmp_path, drawn):
    space = parse_space(("mlp=gelu,relu2,swiglu", "n_layer=1..3", "sample_prompt=_a,$x", "max_lr=1e-4..1e-1:log"))
    points = [("swiglu", 3, "_a", 1e-3, 1.0), ("gelu", 1, "$x", 1e-2, 2.0), ("relu2", 2, "_a", 3e-2, None)]
    rows = [dict(mlp=m, n_layer=n, sample_prompt=s, max_lr=lr, val_loss=loss) for m, n, s, lr, loss in points]
    sweep.plot(rows, space, tmp_path / "sweep.png")
    mlp, layers, prompt, rate = drawn[0].axes
    assert [label.get_text() for label in mlp.get_xticklabels()] == ["gelu", "relu2", "swiglu"] and list(mlp.get_xticks()) == [0, 1, 2]
    assert mlp.collections[0].get_offsets().tolist() == [[2, 1.0], [0, 2.0]]
    assert layers.collections[0].get_offsets().tolist() == [[3, 1.0], [1, 2.0]] and layers.get_ylim() == mlp.get_ylim()
    assert [label.get_text() for label in prompt.get_xticklabels()] == [" _a", r"\$x"]
    assert [(list(line.get_xdata()), line.get_marker()) for line in mlp.lines] == [([2], "*"), ([1], "x")]
    assert [rate.xaxis.get_major_formatter()(x, 0) for x in rate.get_xticks()] == ["0.001", "0.003", "0.01", "0.03"]
    assert drawn[0].get_suptitle() == "3 runs, 1 of them pruned or failed; the lowest loss is 1.0000"


def test_runs_of_other_code_are_refused(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "begin", lambda config, space, trial, slot: pytest.fail("trained"))
    study = sweep.open_study(sweep.SweepConfig(("max_lr=1,2",), f"--data-dir {shards}", out_dir=str(tmp_path)), [])
    study.enqueue_trial({"max_lr": "1"})
    trial = study.ask()
    trial.suggest_categorical("max_lr", ["1", "2"])
    study.tell(trial, 2.5)
    assert run_train(shards, tmp_path / "0", "--max-steps", 2) == 0
    rewrite_run(tmp_path / "0", lambda launch: launch["code"].update({"model.py": "older"}))
    argv = ["max_lr=1,2", f"--flags=--data-dir {shards}", "--out-dir", tmp_path, "--trials", 1]
    capsys.readouterr()
    assert run_main(sweep.main, *argv) == 2
    assert f"error: {tmp_path}/0 was trained by other code (model.py): train all runs again" in capsys.readouterr().err
    assert run_main(sweep.main, *argv, "--mixed", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["val_loss"] == 2.5 and row["note"] == f"{tmp_path}/0 was trained by other code (model.py)"


def test_missing_optuna_names_the_install_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run_main(sweep.main, "max_lr=1,2", "--out-dir", tmp_path / "out") == 2
    assert ": pip install optuna" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_stopped_sweep_resumes(shards, tmp_path):
    flags = shlex.join([*TINY, "--data-dir", str(shards), "--max-steps", "300"])
    argv = ["max_lr=1e-3..1e-1:log", "n_head=1,2,3", f"--flags={flags}", "--trials", "5", "--workers", "2", "--out-dir", tmp_path / "sweep"]
    argv.append("--markdown")
    command = list(map(str, [sys.executable, "-m", "lab.sweep", *argv]))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any("5 train" in log.read_text() for log in (tmp_path / "sweep").glob("*/log.txt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    rows = [line.strip("| ").split(" | ") for line in again.stdout.splitlines()[2:]]
    assert len(rows) == 5 and (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000
    assert len({row[1] for row in rows}) == 5  # the second launch draws other points than the first
    losses = [float(row[3]) for row in rows if row[2] != "3"]
    assert losses == sorted(losses) and all("n_embd 32 is not a multiple of n_head 3" in row[-1] for row in rows if row[2] == "3")
    for row in rows:
        if row[2] != "3":
            log = (tmp_path / "sweep" / row[0] / "log.txt").read_text().splitlines()
            steps = [int(line.split()[0]) for line in log if " train " in line]
            assert steps == list(range(300))  # each resumed in its own folder, and no step ran twice
    third = subprocess.run(command, capture_output=True, text=True)
    assert third.stdout == again.stdout
    other = subprocess.run([*command[:3], "max_lr=1,2", *command[4:]], capture_output=True, text=True)
    assert other.returncode == 2 and "run that one, or choose another --out-dir" in other.stderr
    (tmp_path / "sweep" / "sweep.db").write_bytes(b"x" * 5000)
    damaged = subprocess.run(command, capture_output=True, text=True)
    assert damaged.returncode == 2 and "sweep.db can't be used (DatabaseError)" in damaged.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give at least one FLAG=VALUES"),
        (["max_lr=1", "--trials", 0, "--workers", 0], "--trials is 0: it must be at least 1; --workers is 0"),
        (["max_lr"], "'max_lr' is not FLAG=VALUES"),
        (["max_lr=1", "max-lr=2"], "'max-lr=2' is not FLAG=VALUES, or repeats a flag"),
        (["out_dir=a,b"], "or sets one of --out-dir, --resume, --replay-step"),
        (["max_lr=1..x"], "'max_lr=1..x' is not FLAG=LOW..HIGH"),
        (["max_lr=2..1"], "LOW must be at most HIGH"),
        (["max_lr=0..1:log"], "above 0 for :log"),
        (["max_lr=0..nan"], "is not FLAG=LOW..HIGH"),
        (["max_lrr=1,2"], "'max_lrr=1,2': train.py has no flag --max-lrr"),
        (["max_lr=1", "--flags=--out-dir x"], "the sweep sets --out-dir itself: remove it"),
        (["max_lr=1", "--flags=--resume"], "the sweep sets --resume itself: remove it"),
        (["max_lr=0..inf"], "is not FLAG=LOW..HIGH"),
        (["max_lr=0..1:lin"], "is not FLAG=LOW..HIGH"),
        (["max_lr=1", "--flags='"], "No closing quotation: check the quotes and backslashes in the flags"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, argv, message):
    assert run_main(sweep.main, *argv, "--out-dir", tmp_path / "out") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["mlp=gelu,none", "n_layer=1..2.5"])
def test_invalid_values_are_refused_early(capsys, tmp_path, word):
    assert run_main(sweep.main, word, "--out-dir", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
