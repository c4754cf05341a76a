"""Rented machines: SkyPilot accepts sky.yaml, and its commands carry a run from a lost machine to the next one; so does a copy."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from conftest import REPO, TINY, Forked, read_stream, run_train
from test_bucket_shards import wait_until
from test_remote import assert_same, bucket, quick, server  # noqa: F401

from checkpoint import sealed_steps
from common.remote import Remote
from training.bucket import Bucket
from training.trainer import Trainer

pytestmark = pytest.mark.slow
PARSE = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
resources = [[each.use_spot, each.accelerators, each.disk_size] for each in task.resources]
print(json.dumps({name: getattr(task, name) for name in ("name", "setup", "run", "envs", "workdir")} | {"resources": resources}))
"""


def parsed() -> dict:
    """What SkyPilot reads in sky.yaml. SKY_PYTHON: a Python that has it; its packages don't fit beside ours."""
    python = os.environ.get("SKY_PYTHON") or (importlib.util.find_spec("sky") and sys.executable)
    if not python:
        pytest.skip("no SkyPilot: SKY_PYTHON must name a Python that has it")
    result = subprocess.run([python, "-c", PARSE, REPO / "sky.yaml"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_skypilot_reads_sky_yaml():
    import yaml

    task, file = parsed(), yaml.safe_load((REPO / "sky.yaml").read_text())
    assert task["name"] == "gpt2" and (task["setup"], task["run"]) == (file["setup"], file["run"])
    assert task["workdir"] == "." and task["envs"] == file["envs"]
    assert all(spot and count == {8} and disk == 256 for spot, gpus, disk in task["resources"] for count in [set(gpus.values())])
    assert {next(iter(gpus)) for _, gpus, _ in task["resources"]} == {"H100", "A100-80GB", "A100"}


class Machine:
    """A machine as SkyPilot rents it: the checkout, uv in ~/.local/bin, the task's variables. It has nothing else."""

    def __init__(self, folder: Path, task: dict, **env):
        self.folder, self.task = folder, task
        home = folder / "home"
        (home / ".local/bin").mkdir(parents=True)
        uv = home / ".local/bin/uv"
        # this machine's packages are those of the tests: `uv venv` links their environment, pip finds everything there
        uv.write_text(f"""#!/bin/bash
if [ "$1" = venv ]; then exec ln -s "{sys.prefix}" "${{@: -1}}"; fi
shift 4; exec "{sys.executable}" -m pip install --quiet --no-index "$@"
""")
        uv.chmod(0o755)
        listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listing, cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines():
            if (REPO / name).exists() and not name.startswith(("tests/", "results/", "docs/")):
                (folder / "work" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPO / name, folder / "work" / name)
        lease = folder / "work" / "training" / "lease.py"  # a dead machine's lease ends sooner
        text, found = re.subn(r"\bEVERY = 10.0", "EVERY = 1.0", lease.read_text())
        assert found == 1
        lease.write_text(text)
        given = {name: str(value) for name, value in (task["envs"] | env).items()}
        self.env = os.environ | given | {"HOME": str(home), "OMP_NUM_THREADS": "1"}

    def start(self, name: str) -> subprocess.Popen:
        """Starts the task's commands of this name, word for word."""
        log = open(self.folder / f"{name}.txt", "wb")  # noqa: SIM115
        command = ["bash", "-c", self.task[name]]
        return subprocess.Popen(command, cwd=self.folder / "work", env=self.env, stdout=log, stderr=log)

    @contextmanager
    def running(self):
        """Sets the machine up, and runs the task while the block runs. Then the machine is gone."""
        assert self.start("setup").wait(120) == 0, self.said("setup")
        process = self.start("run")
        try:
            yield process
        finally:
            if process.poll() is None:
                for each in [process, *psutil.Process(process.pid).children(recursive=True)]:  # first the loop, then torchrun
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
                process.wait()

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()


def test_run_of_sky_yaml_survives_its_machine(bucket, server, shards, tmp_path):  # noqa: F811
    import yaml

    task, store = yaml.safe_load((REPO / "sky.yaml").read_text()), Remote(f"{bucket}/shards")
    for path in shards.iterdir():
        store.put(path, path.name)
    flags = [*TINY, "--max-steps", 60, "--checkpoint-every", 10]
    assert run_train(shards, tmp_path / "undisturbed", *flags) == 0
    env = dict(server.env, SHARDS=store.url, RUN=f"{bucket}/run", OTHER_FLAGS=" ".join(map(str, flags)), SKYPILOT_NUM_GPUS_PER_NODE=1)
    run = Remote(env["RUN"])
    first = Machine(tmp_path / "first", task, **env)
    with first.running() as process:
        wait_until(lambda: Bucket(run).checkpoints or process.poll() is not None, 120)
        assert process.poll() is None, first.said("run")
    shutil.rmtree(first.folder)
    second = Machine(tmp_path / "second", task, **env)
    with second.running() as process:
        assert process.wait(180) == 0, second.said("run")
    assert "resuming from the checkpoint of step" in second.said("run")
    assert_same(second.folder / "work/log", tmp_path / "undisturbed", 60)


# ---- carried by rsync, as docs/rented-machines.md says ----


def copy_over(source: Path, target: Path, *excluded: str, limit: int = sys.maxsize):
    """What rsync -a does: copies files in the order of their names, each in one piece. limit: files, until a kill."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir())[:limit]:
        with suppress(FileNotFoundError):  # the run has deleted it meanwhile
            if path.is_file() and not any(path.match(pattern) for pattern in excluded):
                data = path.read_bytes()
                (target / path.name).write_bytes(data)


def slowly():
    """Makes steps long enough for a copy to meet every moment of a run."""
    torch.set_num_threads(1)
    update = Trainer.update
    Trainer.update = lambda *args, **how: time.sleep(0.03) or update(*args, **how)


def test_live_run_can_be_copied(shards, tmp_path):
    flags = [*TINY, "--data-dir", shards, "--max-steps", 30, "--checkpoint-every", 2, "--keep", 2]
    launch, old = Forked(tmp_path, "train", *flags, "--out-dir", tmp_path / "old", first=slowly), tmp_path / "old"
    wait_until(lambda: len(sealed_steps(old)) == 2, 60)
    copies = [tmp_path / f"copy{number}" for number in range(4)]
    for number, copy in enumerate(copies):
        copy_over(old, copy, "*.tmp", "model_*.json")
        copy_over(old, copy, "*.tmp", limit=4 * number if number else sys.maxsize)
        time.sleep(0.1)
    assert launch.wait().returncode == 0
    statuses = [run_train(shards, copy, "--resume", "--max-steps", 30) for copy in copies]
    assert statuses[0] == 0 and set(statuses[1:]) <= {0, 2}, statuses  # 2: the copy was cut, and nothing in it can be resumed
    for copy in [copy for copy, status in zip(copies, statuses, strict=True) if status == 0]:
        assert_same(copy, old, 30)


def test_few_files_are_enough_to_resume(shards, tmp_path):
    assert run_train(shards, tmp_path / "old", "--checkpoint-every", 10) == 0
    for name in ("run.json", "model_00010.pt", "state_00010.pt", "model_00010.json"):
        copy_over(tmp_path / "old", tmp_path / "new", *({path.name for path in (tmp_path / "old").iterdir()} - {name}))
    assert run_train(shards, tmp_path / "new", "--resume") == 0
    assert list(read_stream(tmp_path / "new", "train")) == list(range(10, 20))
    ours, theirs = (torch.load(tmp_path / name / "model_00020.pt", weights_only=True)["model"] for name in ("old", "new"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
