"""failed.txt: the loop around torchrun ends if a restart can't mend the failure, and only then."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, TINY, forked, run_main, run_train

import train
from common.distributed import PeerLost
from common.files import read_json
from common.locks import lock_folder
from training import failure


def error_file(name: str) -> str:
    """Where torchrun wants errors. Each torchrun has its own folder, the same in all attempts."""
    return f"/none/{name}/attempt_0/0/error.json"


@pytest.fixture
def under_torchrun(monkeypatch):
    """Sets what torchrun sets. Returns a function that pretends to be another torchrun."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file("one"))
    return lambda name: monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file(name))


@pytest.mark.parametrize(
    ("argv", "status", "reason"),
    [
        (["--data-dir", "nowhere"], 2, "no shards: the folder nowhere does not exist"),
        (["--micro-batch-size", 3], 2, "--micro-batch-size 3 × --seq-len 32"),
        (["--no-such-flag"], 2, "train.py rejects these flags"),
        (["--max-lr", 1e30, "--max-bad-steps", 2, "--val-every", 0], 1, "2 updates in a row were skipped: start again with a lower"),
    ],
)
def test_lasting_failure_leaves_its_reason(under_torchrun, shards, tmp_path, argv, status, reason):
    assert run_train(shards, tmp_path / "run", *argv) == status
    first, *_ = (tmp_path / "run" / "failed.txt").read_text().splitlines()
    assert first.startswith(reason)


def test_restart_ends_at_once_and_next_launch_trains(under_torchrun, shards, tmp_path, capsys, monkeypatch):
    assert run_train(shards, tmp_path / "run", "--micro-batch-size", 3) == 2
    capsys.readouterr()
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    assert run_train(shards, tmp_path / "run") == 2 and capsys.readouterr().err == ""  # one process of each host says it
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert run_train(shards, tmp_path / "run") == 2  # the flags are right now, but torchrun can't have changed them
    assert capsys.readouterr().err.startswith("error: restarting won't help: --micro-batch-size 3 × --seq-len 32")
    under_torchrun("two")
    assert run_train(shards, tmp_path / "run", "--max-steps", 2) == 0
    assert not (tmp_path / "run" / "failed.txt").exists()


@pytest.mark.parametrize("error", [PeerLost("rank 1 lost touch"), OSError(28, "No space left on device"), RuntimeError("NCCL")])
def test_passing_failure_is_tried_again(under_torchrun, shards, tmp_path, monkeypatch, error):
    def fail(*args, **how):
        raise error

    monkeypatch.setattr(train.Trainer, "update", fail)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            run_train(shards, tmp_path / "run")
    else:
        assert run_train(shards, tmp_path / "run") == 1
    assert not (tmp_path / "run" / "failed.txt").exists()


@pytest.mark.slow
def test_fourth_launch_without_a_new_checkpoint_is_refused(under_torchrun, shards, tmp_path, monkeypatch, capsys):
    def fail_at(failing):
        def update(self, step, **how):
            if step == failing:
                raise PeerLost("rank 1 lost touch")
            return plain(self, step, **how)

        monkeypatch.setattr(train.Trainer, "update", update)

    def launches(number):
        under_torchrun(f"torchrun {number}")
        argv = ["--resume", "--out-dir", run] if (run / "run.json").exists() else [*TINY, "--data-dir", shards, "--out-dir", run]
        return run_main(train.main, *argv, "--checkpoint-every", 2)

    plain, run = train.Trainer.update, tmp_path / "run"
    fail_at(1)
    assert [launches(number) for number in range(2)] == [1, 1]
    fail_at(3)  # this launch saves step 2, so the count begins again
    assert launches(2) == 1
    with lock_folder(run):  # a launch that is told to try again doesn't count
        assert [launches(number) for number in range(3, 7)] == [2] * 4
    assert [launches(number) for number in range(7, 9)] == [1, 1] and not (run / "failed.txt").exists()
    capsys.readouterr()
    assert launches(9) == 1 and launches(10) == 2
    reason = "3 launches in a row saved no checkpoint since that of step 2: read why each of them ended, then start again"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {reason}"
    assert (run / "failed.txt").read_text().splitlines()[0] == reason
    monkeypatch.setattr(train.Trainer, "update", plain)
    assert launches(11) == 0 and not (run / "failed.txt").exists() and not (run / "launches.json").exists()


def test_launches_of_one_checkpoint_are_counted(under_torchrun, tmp_path, monkeypatch):
    path = tmp_path / "launches.json"
    for number in (1, 2, 3):
        failure.count_launch(tmp_path)
        assert read_json(path, "") == {"newest": None, "launches": number}
    with pytest.raises(ValueError, match="3 launches in a row saved no checkpoint at all: "):
        failure.count_launch(tmp_path)
    assert not path.exists()  # the user may try again
    path.write_text("damaged")
    failure.count_launch(tmp_path)
    (tmp_path / "model_00002.json").touch()
    failure.count_launch(tmp_path)
    assert read_json(path, "") == {"newest": 2, "launches": 1}
    path.unlink()
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    failure.count_launch(tmp_path)
    assert not path.exists()


def test_another_run_at_work_is_left_alone(under_torchrun, shards, tmp_path):
    with lock_folder(tmp_path / "run"):
        assert run_train(shards, tmp_path / "run") == 2 == run_train(shards, tmp_path / "run", "--micro-batch-size", 3)
        assert not (tmp_path / "run" / "failed.txt").exists()


def test_lock_of_the_own_run_is_no_obstacle(under_torchrun, shards, tmp_path):
    """A rank may fail while rank 0 still trains."""
    assert run_train(shards, tmp_path / "run", "--max-steps", 2) == 0
    with lock_folder(tmp_path / "run"):
        failure.write_reason(tmp_path / "run" / "failed.txt", "no room")
        under_torchrun("two")
        with pytest.raises(ValueError, match="another process is writing"):
            failure.write_reason(tmp_path / "run" / "failed.txt", "not this")
    assert (tmp_path / "run" / "failed.txt").read_text().splitlines()[0] == "no room"


def test_without_torchrun_a_mistake_writes_nothing(shards, tmp_path):
    assert run_train(shards, tmp_path / "run", "--micro-batch-size", 3) == 2 and not (tmp_path / "run").exists()


def test_quickstarts_folder_gets_its_failure(under_torchrun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main(train.main, "--preset", "quickstart", "--micro-batch-size", 7) == 2
    assert (tmp_path / "log" / "quickstart" / "failed.txt").exists()


def test_one_ranks_failure_is_left_during_a_run(shards, tmp_path):
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--timeout-minutes", 0.2]
    result = forked(tmp_path, "train", *argv, processes=2, first=out_of_memory_on_rank_1, TORCHELASTIC_ERROR_FILE=error_file("one"))
    assert result.returncode != 0
    assert (tmp_path / "run" / "failed.txt").read_text().startswith("no room")


def out_of_memory_on_rank_1():
    plain = train.Trainer.update

    def update(self, step, *args, **how):
        if step == 2 and self.world.rank == 1:
            raise MemoryError("no room")
        return plain(self, step, *args, **how)

    train.Trainer.update = update


@pytest.mark.parametrize("line", range(3))
def test_docs_loops_and_slurm_show_the_reason(line):
    text = (REPO / "docs" / "rented-machines.md").read_text()
    loop = re.findall(r"^until .*?done$", text, re.M | re.S)[line]
    assert loop.endswith(f"|| cat log/{failure.FAILED} 2>/dev/null; do sleep 10; done")
    assert f'cat "$out_dir/{failure.FAILED}" 2>/dev/null || scontrol requeue' in (REPO / "slurm.sh").read_text()


def docs_loop(folder: Path, flags: str, processes: int = 2, restarts: int = 0) -> subprocess.CompletedProcess:
    """Runs the first loop of docs/rented-machines.md in a folder with a train.py, and these flags."""
    text = (REPO / "docs" / "rented-machines.md").read_text()
    loop = re.search(r"^until .*done$", text, re.M)[0].replace("nproc_per_node=8", f"nproc_per_node={processes}")
    loop = loop.replace("sleep 10", "sleep 0").replace("train.py", f"train.py {flags}")
    loop = loop.replace("--standalone", f"--standalone --max-restarts={restarts}")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    return subprocess.run(["bash", "-c", loop], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("argv", ["--data-dir nowhere", "--micro-batch-size 3", "--max-lr 1e30 --max-bad-steps 2 --max-restarts"])
def test_docs_loop_ends_by_itself(shards, tmp_path, argv):
    argv, _, restarts = argv.partition(" --max-restarts")
    (tmp_path / "train.py").symlink_to(REPO / "train.py")
    result = docs_loop(tmp_path, f"{shlex.join([*TINY, '--data-dir', str(shards)])} {argv}", restarts=3 if restarts else 0)
    assert result.stdout.endswith((tmp_path / "log" / failure.FAILED).read_text())
    assert result.stderr.count("restarting won't help") == (3 if restarts else 0)


@pytest.mark.slow
def test_docs_loop_ends_after_three_crashes(shards, tmp_path):
    crash = "train.set_up = lambda *args: os._exit(7)"
    (tmp_path / "train.py").write_text(f"import os, sys\nsys.path.insert(0, {str(REPO)!r})\nimport train\n{crash}\ntrain.main()\n")
    result = docs_loop(tmp_path, shlex.join([*TINY, "--data-dir", str(shards)]), processes=1)
    assert result.stdout.startswith("3 launches in a row saved no checkpoint at all: ")
    assert len(re.findall("exitcode: 7", result.stderr)) == 3
