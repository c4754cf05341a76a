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
def test_docs_loops_and_slurm_look_for_the_file(line):
    text = (REPO / "docs" / "rented-machines.md").read_text()
    loop = re.findall(r"^until .*?done$", text, re.M | re.S)[line]
    assert loop.endswith(f"|| test -e log/{failure.FAILED}; do sleep 10; done")
    assert f'test -e "$out_dir/{failure.FAILED}" || scontrol requeue' in (REPO / "slurm.sh").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("argv", ["--data-dir nowhere", "--micro-batch-size 3", "--max-lr 1e30 --max-bad-steps 2 --max-restarts"])
def test_docs_loop_ends_by_itself(shards, tmp_path, argv):
    text = (REPO / "docs" / "rented-machines.md").read_text()
    loop = re.search(r"^until .*done$", text, re.M)[0].replace("nproc_per_node=8", "nproc_per_node=2").replace("sleep 10", "sleep 0")
    argv, _, restarts = argv.partition(" --max-restarts")
    flags = f"train.py {shlex.join([*TINY, '--data-dir', str(shards)])} {argv}"
    loop = loop.replace("train.py", flags).replace("--standalone", f"--standalone --max-restarts={3 if restarts else 0}")
    (tmp_path / "train.py").symlink_to(REPO / "train.py")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    result = subprocess.run(["bash", "-c", loop], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert (tmp_path / "log" / failure.FAILED).exists() and result.stderr.count("restarting won't help") == (3 if restarts else 0)
