"""Runs start, save and resume wherever people run them: other systems, file systems, launchers, terminals and names."""

import ast
import errno
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY, Forked, forked, read_stream, run_main, run_train
from test_house import FILES

import fineweb
import perplexity
import plot_log
import sample
from common import cli, device, distributed, files
from common.distributed import Launch, launched
from training import checks, run_json, trainer
from training.config import LOWER_MEMORY
from training.flags import holds_a_run

LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")

# ---- systems and file systems ----


@pytest.mark.slow
def test_quickstart_runs_without_posix(shards, tmp_path):
    """Stands in for Windows: every module imports, and the quickstart trains, resumes, samples and plots."""
    run, quick = f"--out-dir {tmp_path}/run", "--preset quickstart --no-compile --val-tokens 2048 --sample-tokens 4"
    commands = [
        f"fineweb --dataset {REPO}/docs --tokenizer bytes --workers 1 --out-dir {tmp_path}/docs",
        f"train {quick} --data-dir {tmp_path}/docs {run} --max-steps 2",
        f"train --resume {run} --max-steps 3",
        f"sample -m {tmp_path}/run --num-samples 1 --max-new-tokens 5",
        f"plot_log {tmp_path}/run --out {tmp_path}/plot.png",
        f"perplexity -m {tmp_path}/run {REPO}/LICENSE",
    ]
    command = [sys.executable, REPO / "tests" / "windows.py", *" , ".join(commands).split()]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_stream(tmp_path / "run", "train").keys() == {0, 1, 2} and (tmp_path / "plot.png").exists()
    assert "bits a byte" in result.stdout


def test_windows_hides_what_it_should(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import windows; windows.hide()\n"
        "namespace = {'__file__': str(windows.REPO / 'train.py')}\n"
        "for line in ('import fcntl', 'import resource', 'import os; os.sysconf', 'import os; os.uname', 'import os; os.open(\".\", 0)',\n"
        "             'import signal; signal.SIGHUP'):\n"
        "    try: exec(line, namespace)\n"
        "    except (ImportError, AttributeError, PermissionError): continue\n"
        "    raise SystemExit(line)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_memory_is_known_without_psutil(monkeypatch):
    total = device.total_memory(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert device.total_memory(torch.device("cpu")) == total > 2**30 and device.peak_memory(torch.device("cpu")) > 2**26


def test_peak_memory_without_proc(monkeypatch):
    """On macOS, in gVisor (a status file without the peak) and on Windows."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(Path, "read_text", lambda *args, **how: "VmRSS: 1 kB")
    assert device.peak_memory(cpu) > 2**26
    monkeypatch.setitem(sys.modules, "resource", None)
    assert device.peak_memory(cpu) > 2**26


def encoding_missing(node: ast.Call) -> bool:
    """Whether a call opens a text file and leaves its encoding to the system: cp1252 on Windows."""
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    named = {keyword.arg for keyword in node.keywords}
    modes = [part.value for part in [*node.args, *(k.value for k in node.keywords if k.arg == "mode")] if isinstance(part, ast.Constant)]
    if name in ("read_text", "write_text"):
        return isinstance(node.func, ast.Attribute) and "encoding" not in named
    binary = any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
    return isinstance(node.func, ast.Name) and name == "open" and not binary and "encoding" not in named


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_text_files_name_their_encoding(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    own = {"read_text"} if path.name == "perplexity.py" else set()  # its function of that name
    assert [node.lineno for node in calls if encoding_missing(node) and getattr(node.func, "id", "") not in own] == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EACCES, errno.EBADF])
def test_refused_fsync_does_not_fail_a_write(tmp_path, monkeypatch, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    monkeypatch.setattr(files.os, "open", refuse)
    files.write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2} and len(list(tmp_path.iterdir())) == 1


def test_failing_disk_still_fails_a_write(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_json(tmp_path / "a.json", {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="Input/output error"):
        files.sync_folder(tmp_path)


# ---- signals and streams ----


def until_steps(process: Forked, run: Path, number: int = 3):
    deadline = time.monotonic() + 60
    while not (run / "log.txt").exists() or (run / "log.txt").read_text().count(" train ") < number:
        assert time.monotonic() < deadline and process.processes[0].exitcode is None, process.outputs[0][1].read_text()
        time.sleep(0.02)


def slow_steps():
    plain = trainer.Trainer.update

    def update(*args, **how):
        time.sleep(0.05)
        return plain(*args, **how)

    trainer.Trainer.update = update


def on_terminal(name: str):
    """Makes a terminal this process's own, with both its outputs."""
    slow_steps()
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(terminal, number)
        setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
    termios.tcsetwinsize(terminal, (24, 200))


def closed_terminal(shards, tmp_path) -> subprocess.CompletedProcess:
    """train.py in a terminal that closes after a few steps, as that of an ssh session."""
    ours, theirs = pty.openpty()
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--max-steps", 1000]
    process = Forked(tmp_path, "train", *argv, first=partial(on_terminal, os.ttyname(theirs)))
    shown, deadline = b"", time.monotonic() + 60
    while shown.count(b"| loss") < 2:
        assert time.monotonic() < deadline and process.processes[0].exitcode is None, shown.decode()
        if select.select([ours], [], [], 0.1)[0]:
            shown += os.read(ours, 10000)
    os.close(theirs)
    os.close(ours)
    return process.wait()


def test_closed_terminal_saves(shards, tmp_path):
    assert closed_terminal(shards, tmp_path).returncode == 128 + signal.SIGHUP
    steps = len(read_stream(tmp_path / "run", "train"))
    assert (tmp_path / "run" / f"state_{steps:05d}.pt").exists()
    resumed = forked(tmp_path, "train", "--resume", "--out-dir", tmp_path / "run", "--max-steps", steps + 2)
    assert resumed.returncode == 0 and read_stream(tmp_path / "run", "train").keys() == set(range(steps + 2))


def ignore_hangup():
    slow_steps()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_nohup_keeps_running_after_hangup(shards, tmp_path):
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--max-steps", 20]
    process = Forked(tmp_path, "train", *argv, first=ignore_hangup)
    until_steps(process, tmp_path / "run")
    os.kill(process.processes[0].pid, signal.SIGHUP)
    assert process.wait().returncode == 0 and len(read_stream(tmp_path / "run", "train")) == 20


def test_second_hangup_does_not_cut_the_save():
    import train

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        stop = train.StopSignal()
        stop.unsaved = True
        stop.handle(signal.SIGHUP, None)
        stop.at -= 10
        try:
            stop.handle(signal.SIGHUP, None)
        except KeyboardInterrupt:
            pytest.fail("the second SIGHUP ends the run")
        with pytest.raises(KeyboardInterrupt):
            stop.handle(signal.SIGTERM, None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def slow_documents():
    plain = fineweb.chunks
    fineweb.CHUNK_CHARS = 100

    def chunks(documents):
        for one in plain(documents):
            time.sleep(0.1)
            yield one

    fineweb.chunks = chunks


def test_hangup_ends_fineweb_cleanly(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i} " * 50}) + "\n" for i in range(300)))
    argv = ["--dataset", text, "--tokenizer", "bytes", "--shard-size", 2000, "--workers", 2, "--out-dir", tmp_path / "out"]
    process = Forked(tmp_path, "fineweb", *argv, first=slow_documents)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*.npy")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.processes[0].pid, signal.SIGHUP)
    assert process.wait().returncode == 128 + signal.SIGHUP
    assert run_main(fineweb.main, *argv) == 0


def close_streams(*numbers: int):
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


@pytest.mark.parametrize("numbers", [(2,), (1,), (0, 1, 2)])
def test_closed_streams_change_nothing(shards, tmp_path, numbers):
    argv = [*TINY, "--data-dir", shards, "--max-steps", 2, "--sample-every", 1, "--sample-tokens", 3, "--out-dir"]
    result = forked(tmp_path, "train", *argv, tmp_path / "run", first=partial(close_streams, *numbers))
    assert result.returncode == 0 and forked(tmp_path, "train", *argv, tmp_path / "open").returncode == 0
    assert (tmp_path / "run" / "log.txt").read_bytes() == (tmp_path / "open" / "log.txt").read_bytes()
    assert forked(tmp_path, "sample", "-m", "nowhere", first=partial(close_streams, *numbers)).returncode == 2


def test_full_disk_of_stderr_does_not_end_work(tmp_path):
    (tmp_path / "t.txt").write_text("the cat sat on the mat\n" * 100)
    command = f"{sys.executable} {REPO}/fineweb.py --dataset t.txt --tokenizer bytes --workers 1 --out-dir out 2>/dev/full"
    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 0


# ---- launchers ----


def set_launch(monkeypatch, **variables):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


MASTER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "variables",
    [{}, {"WORLD_SIZE": "8"}, {"RANK": "0"}, {"WORLD_SIZE": ""}, {"RANK": " ", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "x"},
     {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1", **MASTER}, {"RANK": "3", **MASTER}],
)  # fmt: skip
def test_leftover_variables_mean_one_process(shards, tmp_path, monkeypatch, capsys, variables):
    set_launch(monkeypatch, **variables)
    distributed.warn_once.cache_clear()
    assert launched() is None
    lone = [name for name in ("RANK", "WORLD_SIZE") if variables.get(name, "").strip()]
    error = capsys.readouterr().err
    assert error.startswith(f"warning: ignoring {lone[0]}=") and error.count("\n") == 1 if len(lone) == 1 else error == ""
    assert run_train(shards, tmp_path, "--max-steps", 1, "--val-every", 0) == 0


def test_launcher_without_local_rank(monkeypatch):
    """Kubeflow's PyTorchJob."""
    set_launch(monkeypatch, RANK="11", WORLD_SIZE="16", **MASTER)
    assert launched() == Launch(11, 16, None, None, False)
    assert [launched().gpu(count) for count in (8, 1, 0)] == [3, 0, 0]
    set_launch(monkeypatch, RANK="11", WORLD_SIZE="16", LOCAL_RANK="3", LOCAL_WORLD_SIZE="8", TORCHELASTIC_RUN_ID="x", **MASTER)
    assert launched() == Launch(11, 16, 3, 8, True) and launched().gpu(8) == 3
    with pytest.raises(ValueError, match="8 processes on this host, but PyTorch sees 4 GPUs: pass --nproc_per_node=4"):
        launched().gpu(4)
    set_launch(monkeypatch, RANK="3", WORLD_SIZE="4", LOCAL_RANK="3", **MASTER)
    assert launched().gpu(1) == 0  # as Slurm's --gpus-per-task shows each process only its own


def without_local_rank(rank_names=("LOCAL_RANK",)):
    for name in rank_names:
        os.environ.pop(name, None)


def test_two_processes_train_without_local_rank(shards, tmp_path):
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--max-steps", 3]
    assert forked(tmp_path, "train", *argv, processes=2, first=without_local_rank).returncode == 0
    again = forked(tmp_path, "train", "--resume", "--max-steps", 5, "--out-dir", tmp_path / "run", processes=2, first=without_local_rank)
    assert again.returncode == 0 and len(read_stream(tmp_path / "run", "train")) == 5


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 are set, but MASTER_ADDR and MASTER_PORT not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "but MASTER_PORT not"),
        ({"RANK": "x", "WORLD_SIZE": "2", **MASTER}, "is not a number (invalid literal for int() with base 10: 'x')"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MASTER}, "RANK=2 and WORLD_SIZE=2 contradict each other"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **MASTER}, "contradict each other"),
    ],
)
def test_contradictory_variables_are_one_line(shards, tmp_path, monkeypatch, capsys, variables, message):
    set_launch(monkeypatch, **variables)
    assert run_train(shards, tmp_path) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error and error.endswith("start with torchrun, or unset RANK and WORLD_SIZE to run one process")


@pytest.mark.parametrize("path", ["/tmp/error.json", "error.json", "/a/b/c/d/e.json", "/", ""])
def test_foreign_torchelastic_file_is_ignored(monkeypatch, path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
    assert run_json.torchrun_id() == ""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_y/attempt_2/3/error.json")
    assert run_json.torchrun_id() == f"{socket.gethostname()} /tmp/torchelastic_x/none_y"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_only_launched_reads_the_launcher(path):
    names = {node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)}
    assert path == REPO / "common" / "distributed.py" or not names & set(LAUNCH)


# ---- names ----

ODD = os.fsdecode(b"n\xe9\xff")  # not UTF-8
LONG = "x" * 240


@pytest.mark.parametrize("name", [ODD, LONG, "a?b#c%41", "models"])
def test_odd_names_work_everywhere(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    try:
        Path(f"{name}.txt").write_text("the cat sat on the mat\n" * 400)
    except OSError as e:
        pytest.skip(f"this file system refuses the name: {e}")
    data, run = f"{name}-data", f"{name}-run"
    assert run_main(fineweb.main, "--dataset", f"{name}.txt", "--tokenizer", "bytes", "--workers", 1, "--out-dir", data) == 0
    (tmp_path / run / "models").mkdir(parents=True)
    assert run_train(data, run, "--max-steps", 1, "--sample-every", 1, "--sample-tokens", 3, "--sample-prompt", name) == 0
    assert run_main(run_train_resumed, run) == 0
    assert run_main(sample.main, "-m", run, "--prompt", name, "--num-samples", 1, "--max-new-tokens", 2) == 0
    assert run_main(perplexity.main, "-m", run, f"{name}.txt", data) == 0
    assert run_main(plot_log.main, run, "--out", f"{name}.png") == 0
    import export

    assert run_main(export.main, "-m", run, "--out-dir", f"{name}-hf") == 0
    assert run_main(sample.main, "-m", f"{name}-hf", "--num-samples", 1, "--max-new-tokens", 2) == 0
    assert "error" not in capsys.readouterr().err


def run_train_resumed():
    import train

    sys.argv = ["train.py", "--resume", "--max-steps", "2", "--out-dir", sys.argv[1]]
    train.main()


def test_long_names_leave_room_for_temporaries(tmp_path):
    for name in ("x" * 255, "é" * 127, "short.json"):
        path = tmp_path / name
        files.write_json(path, {"a": 1})
        assert files.read_json(path, "") == {"a": 1} and len(list(tmp_path.iterdir())) == 1
        path.unlink()
    assert files.temporary_name("model_00010.pt") == "model_00010.pt.tmp"  # recover_interrupted_save looks for it


@pytest.mark.parametrize(
    ("name", "holds"),
    [("models/a", False), ("model_1.pt/a", False), ("model_card.md", False), ("modelling.py", False),
     ("model_00010.pt", True), ("model_00010.json", True),
     ("model.safetensors", True), ("model-00001-of-00002.safetensors", True), ("run.json", True), ("ckpt.pt", True)],
)  # fmt: skip
def test_only_runs_and_models_count_as_such(tmp_path, name, holds):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert holds_a_run(tmp_path) == holds


@pytest.mark.parametrize("file", ["none/a.jsonl", "folder", "locked/a.jsonl"])
def test_unwritable_output_is_refused_at_the_start(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "locked"):
        Path(name).mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != "locked")  # root may write everywhere
    assert cli.writable("", "out") == cli.writable("a.jsonl", "out") == cli.writable("folder/a.jsonl", "out") == []
    [error] = cli.writable(file, "out")
    assert error.startswith(f"--out {file} ") and error.endswith("choose another path")


# ---- memory ----


def test_real_cpu_allocation_failure_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert cli.out_of_memory(caught.value) and not isinstance(caught.value, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried to allocate 1 B."),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_names_its_remedy(shards, tmp_path, monkeypatch, capsys, error, memory):
    def fail(*args, **how):
        raise error

    monkeypatch.setattr(trainer.Trainer, "update", fail)
    if not memory and isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="multiplied"):
            run_train(shards, tmp_path)
        return
    assert run_train(shards, tmp_path) == (1 if memory else 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: out of memory (" if memory else "error: ") and (LOWER_MEMORY in last) == memory


@pytest.mark.parametrize("name", ["sample", "perplexity", "hellaswag", "evaluate"])
def test_scripts_name_their_memory_remedy(name, monkeypatch, capsys):
    import importlib

    module = importlib.import_module(name)

    def fail(*args, **how):
        raise MemoryError

    monkeypatch.setattr(cli, "parse", fail)
    assert run_main(module.main) == 1
    assert capsys.readouterr().err.startswith("error: out of memory (MemoryError): lower --")


@pytest.mark.parametrize(("threads", "slower", "said"), [(2, 1.0, False), (2, 1.2, False), (2, 5.0, True), (1, 5.0, False)])
def test_threads_on_busy_cores_are_reported(monkeypatch, threads, slower, said):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(checks, "product_seconds", lambda n: 0.01 if n == 1 else 0.01 * slower)
    warnings = checks.thread_warnings(torch.device("cpu"))
    assert len(warnings) == said and all("2 threads compute 5.0 × slower than one" in w and "OMP_NUM_THREADS=1" in w for w in warnings)
    assert checks.thread_warnings(torch.device("cuda")) == []


def test_threads_are_restored_after_timing():
    before = torch.get_num_threads()
    assert checks.product_seconds(1) > 0 and torch.get_num_threads() == before
