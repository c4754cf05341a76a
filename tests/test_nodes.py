"""Several hosts: two network namespaces with a cable between them. Each has its own torchrun and its own folders."""

import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import REPO, TINY, forked, read_stream, run_train

import checkpoint
from common import distributed
from common.files import read_json

PORT = 29400


class Host:
    """A network namespace with one end of the cable. Its processes work in their own folder, which the other host can't see."""

    def __init__(self, number: int, folder: Path):
        self.name, self.link, self.address = f"host{number}-{os.getpid()}", f"veth{number}-{os.getpid()}", f"10.77.0.{number}"
        self.folder, self.err = folder, folder / "err"
        folder.mkdir()

    def up(self):
        for command in (f"addr add {self.address}/24 dev {self.link}", f"link set {self.link} up", "link set lo up"):
            ip("-n", self.name, *command.split())

    def cable(self, state: str):
        ip("-n", self.name, "link", "set", self.link, state)

    def torchrun(self, *argv, restarts: int = 0) -> list[str]:
        """The command of docs/rented-machines.md. is_host says who has the endpoint, since both hosts have this machine's name."""
        first = self.address.endswith(".1")
        conf = f"is_host={int(first)},join_timeout=60,read_timeout=10,keep_alive_interval=1"
        words = f"-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --max-restarts={restarts} --rdzv-backend=c10d --rdzv-id=run"
        words += f" --rdzv-endpoint=10.77.0.1:{PORT} --rdzv-conf={conf} --local-addr={self.address}"
        return [sys.executable, *words.split(), *map(str, argv)]

    def start(self, command: list[str]) -> subprocess.Popen:
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.link, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(self.err, "a") as err:
            return subprocess.Popen(["ip", "netns", "exec", self.name, *command], stdout=err, stderr=err, cwd=self.folder, env=env)

    def kill(self):
        """Kills everything that runs on it."""
        while pids := ip("netns", "pids", self.name).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def ip(*argv) -> str:
    return subprocess.run(["ip", *argv], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def hosts(tmp_path):
    one, two = Host(1, tmp_path / "one"), Host(2, tmp_path / "two")
    if not shutil.which("ip"):
        pytest.skip("network namespaces need the command ip (iproute2)")
    try:
        try:
            ip("netns", "add", one.name)
            ip("netns", "add", two.name)
            ip("link", "add", one.link, "netns", one.name, "type", "veth", "peer", "name", two.link, "netns", two.name)
            one.up()
            two.up()
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces can't be made here: {e.stderr.strip()}")
        yield one, two
    finally:
        for host in (one, two):
            if host.name in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.split():
                host.kill()
                ip("netns", "delete", host.name)


@pytest.fixture(scope="module")
def on_one_host(shards, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out_dir = tmp_path_factory.mktemp("alone") / "run"
    assert run_train(shards, out_dir) == 0
    return out_dir


@pytest.fixture
def argv(shards, tmp_path) -> list:
    """train.py with steps slow enough to interrupt."""
    (tmp_path / "slow.py").write_text(
        f"import sys, time; sys.path.insert(0, {str(REPO)!r})\n"
        "import train\n"
        "plain = train.Trainer.update\n"
        "train.Trainer.update = lambda *args, **how: (time.sleep(0.2), plain(*args, **how))[1]\n"
        "train.main()\n"
    )
    return [tmp_path / "slow.py", *TINY, "--data-dir", shards, "--out-dir", "run", "--checkpoint-every", 5]


# ---- hosts as folders: each process has its own, like the first process of a host ----


def on_own_host(folder: Path):
    os.environ["LOCAL_RANK"] = "0"
    (folder / os.environ["RANK"]).mkdir(exist_ok=True)
    os.chdir(folder / os.environ["RANK"])


def on_two(folder: Path, *argv) -> subprocess.CompletedProcess:
    return forked(folder, "train", *argv, processes=2, first=partial(on_own_host, folder))


@pytest.mark.slow
def test_rank_0_sends_checkpoint_to_other_hosts(shards, tmp_path, on_one_host):
    assert on_two(tmp_path, *TINY, "--data-dir", shards, "--out-dir", "run", "--checkpoint-every", 10).returncode == 0
    [path.unlink() for path in checkpoint.files_of(tmp_path / "0" / "run", 20)]
    (tmp_path / "1" / "run").mkdir()
    damaged = checkpoint.files_of(tmp_path / "1" / "run", 10)
    [path.write_text("{}") for path in damaged]  # as another run might leave it
    result = on_two(tmp_path, "--resume", "--out-dir", "run")
    assert result.returncode == 0, result.stderr
    assert same_losses(tmp_path / "0" / "run", on_one_host)
    assert sorted(path.name for path in (tmp_path / "1" / "run").iterdir()) == sorted(path.name for path in damaged)


@pytest.mark.parametrize("fault", ["absent", "another"])
def test_host_with_wrong_shards_is_named(shards, tmp_path, fault):
    for rank in "01":
        shutil.copytree(shards, tmp_path / rank / "shards")
    shard = next((tmp_path / "1" / "shards").glob("*train*"))
    shard.unlink() if fault == "absent" else shutil.copy(next(shards.glob("*val*")), shard)
    result = on_two(tmp_path, *TINY, "--data-dir", "shards", "--out-dir", "run")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"error: {platform.node()} needs the same shards in its --data-dir as the others: " in result.stderr
    assert shard.name in result.stderr and not (tmp_path / "0" / "run").exists()


def test_mistake_on_several_hosts_prints_one_line(tmp_path):
    result = on_two(tmp_path, "--resume", "--out-dir", "run")
    assert result.returncode == 2 and result.stderr == ("error: there is no run in run; check --out-dir, or start one without --resume\n")


# ---- rendezvous ----


def test_rendezvous_ignores_entries_of_dead_processes():
    """In each attempt, rank 1 asks, dies and asks again. The store also has the answers of earlier attempts."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False) for _ in range(2)]
    deadline, attempts = time.monotonic() + 20, set()
    with ThreadPoolExecutor(2) as pool:
        for number in range(3):
            server.set("1 asks", f"dead {number}")
            first = pool.submit(distributed.serve_rendezvous, stores[0], 2, lambda number=number: number, deadline)
            wait_until(lambda number=number: server.check([f"answer to dead {number}"]), 10)
            answer = pool.submit(distributed.join_rendezvous, stores[1], 1, deadline).result()
            assert answer == first.result() and answer[1:] == (number, None)
            attempts.add(answer[0])
    assert len(attempts) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_rendezvous_gives_up_on_a_missing_host(monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(distributed.PeerLost, match="waited too long for rank 0" if rank else "waited too long for ranks 1, 2"):
        distributed.join_rendezvous(store, 1, time.monotonic() + 0.2) if rank else distributed.serve_rendezvous(
            store, 3, int, time.monotonic() + 0.2
        )


# ---- hosts as network namespaces ----


def wait_for_step(host: Host, step: int, processes: list[subprocess.Popen]):
    log = host.folder / "run" / "log.txt"
    while not log.exists() or max(read_stream(log.parent, "train"), default=0) < step:
        assert all(process.poll() is None for process in processes), host.err.read_text()
        time.sleep(0.05)


def wait_until(done, seconds: float):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def same_losses(a: Path, b: Path) -> bool:
    a, b = read_stream(a, "train"), read_stream(b, "train")
    return a.keys() == b.keys() and max(abs(float(a[step]) - float(b[step])) for step in a) <= 1e-5


@pytest.mark.slow
def test_pulled_cable_between_two_hosts(hosts, argv, on_one_host):
    """If the cable is back in time, the run continues. If not, both hosts exit within --timeout-minutes and say so, and --resume
    continues. Only the first host has the run's folder."""
    one, two = hosts
    argv += ["--timeout-minutes", 0.2]
    both = [host.start(host.torchrun(*argv)) for host in hosts]
    wait_for_step(one, 3, both)
    two.cable("down")
    time.sleep(1.5)
    two.cable("up")
    wait_for_step(one, 11, both)
    two.cable("down")
    lost = [f"error: rank {rank} lost touch with another" for rank in (0, 1)]
    wait_until(lambda: all(line in host.err.read_text() for line, host in zip(lost, hosts, strict=True)), 60)
    two.cable("up")
    for process in both:
        assert process.wait(60) != 0
    for rank, host in enumerate(hosts):
        assert host.err.read_text().count("error: ") == host.err.read_text().count(lost[rank]) == 1
    both = [host.start(host.torchrun(*argv, "--resume")) for host in hosts]
    assert [process.wait(60) for process in both] == [0, 0], one.err.read_text() + two.err.read_text()
    assert same_losses(one.folder / "run", on_one_host) and not (two.folder / "run").exists()
    assert [launch["step"] for launch in read_json(one.folder / "run" / "run.json", "")["launches"]] == [0, 10]


def loop_on(host: Host, argv: list, restarts: int = 3) -> list[str]:
    """The loop of docs/rented-machines.md."""
    resume, failed = "$(test -e run/run.json && echo --resume)", "cat run/failed.txt 2>/dev/null"
    return ["bash", "-c", f"until {shlex.join(host.torchrun(*argv, restarts=restarts))} {resume} || {failed}; do sleep 1; done"]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [["--data-dir", "nowhere"], ["--max-lr", "1e30", "--max-bad-steps", "2"]])
def test_loops_of_all_hosts_end_together(hosts, argv, wrong):
    both = [host.start(loop_on(host, [*argv, *wrong], restarts=1)) for host in hosts]
    assert [process.wait(90) for process in both] == [0, 0]
    assert all((host.folder / "run" / "failed.txt").exists() for host in hosts)


@pytest.mark.slow
def test_restarted_host_rejoins_the_run(hosts, argv, on_one_host):
    """Runs the loop of docs/rented-machines.md on both. Only the first host has the run's folder: it reports the lost host and waits."""
    one, two = hosts
    loops = [loop_on(host, argv) for host in hosts]
    both = [host.start(loop) for host, loop in zip(hosts, loops, strict=True)]
    wait_for_step(one, 11, both)
    two.kill()
    wait_until(lambda: "error: rank 0 lost touch with another" in one.err.read_text(), 60)
    again = two.start(loops[1])
    assert (again.wait(90), both[0].wait(60)) == (0, 0), one.err.read_text() + two.err.read_text()
    assert same_losses(one.folder / "run", on_one_host) and not (two.folder / "run").exists()
    assert [launch["step"] for launch in read_json(one.folder / "run" / "run.json", "")["launches"]] == [0, 10]


@pytest.mark.slow
def test_unresolvable_host_name_needs_local_addr(tmp_path):
    """docs/troubleshooting.md has this remedy. Without the flag, torchrun hangs."""
    if subprocess.run(["unshare", "--uts", "true"]).returncode:
        pytest.skip("needs root, to change the host's name")
    (tmp_path / "done.py").write_text("import os; open(os.environ['RANK'], 'w')")
    command = "hostname no-such-host; exec torchrun --standalone --nproc_per_node=2 {} done.py"
    env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    run = partial(subprocess.run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run(["unshare", "--uts", "bash", "-c", command.format("--local-addr=localhost")], timeout=60).returncode == 0
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
    hung = run(["timeout", "20", "unshare", "--uts", "bash", "-c", command.format("")])
    assert hung.returncode == 124 and "(no-such-host, " in hung.stderr and "cannot be retrieved" in hung.stderr


# ---- Slurm ----

STUBS = {
    # starts both tasks here and passes signals on, as srun does; srun's own flags come before the command
    "srun": 'while [ "$1" != torchrun ]; do shift; done\n"$@" & one=$!\n"$@" & two=$!\n'
    'trap "kill -TERM $one $two" TERM\nwait $one; wait $two; wait $one; one=$?; wait $two && exit $one\n',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi\n',
}


@pytest.mark.slow
def test_slurm_job_saves_requeues_and_resumes(shards, tmp_path):
    for name, content in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "train.py").symlink_to(REPO / "train.py")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    env = os.environ | job | {"SLURM_CPUS_PER_TASK": "1", "OMP_NUM_THREADS": "1", "PATH": path, "OUT_DIR": "run"}
    command = ["bash", str(REPO / "slurm.sh"), *TINY, "--data-dir", str(shards), "--val-every", "0", "--max-steps"]
    with open(tmp_path / "err", "w") as err:
        started = subprocess.Popen([*command, str(10**6)], cwd=tmp_path, env=env, stdout=err, stderr=err)
    # a second step in the log means that both processes have finished one: there is something to save
    log = tmp_path / "run" / "log.txt"
    wait_until(lambda: started.poll() is not None or (log.exists() and len(read_stream(log.parent, "train")) > 1), 60)
    started.send_signal(signal.SIGUSR1)
    started.wait(60)
    assert "all saved" in (tmp_path / "err").read_text() and (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    step = checkpoint.newest_step(tmp_path / "run")
    result = subprocess.run([*command, str(step + 5)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert checkpoint.newest_step(tmp_path / "run") == step + 5 and len((tmp_path / "requeued").read_text().splitlines()) == 1
