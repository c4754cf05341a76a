"""What a machine can do: its GPU, its compilers. And how malloc and torch.compile's workers are set."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, TINY

from common import device

# ---- an NVIDIA GPU that PyTorch can't use ----


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with an NVIDIA GPU and programs in its PATH, and a PyTorch with CUDA that can't use the GPU."""

    def old_driver():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver.")

    def install(*programs):
        for program in programs:
            (tmp_path / program).touch(mode=0o755)

    install("nvidia-smi")
    for name in ("CC", "CXX", "CUDA_VISIBLE_DEVICES", *device.ALLOCATOR_SETTINGS, device.COMPILE_WORKERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: (8, 0))
    monkeypatch.setattr(device, "find_spec", lambda name: True)
    monkeypatch.setattr(device.sysconfig, "get_path", lambda *args: str(tmp_path))
    return SimpleNamespace(install=install, folder=tmp_path)


@pytest.mark.parametrize(
    ("built", "cause"),
    [
        (True, "The NVIDIA driver on your system is too old (found version 11040): look at nvidia-smi; update the driver"),
        (False, f"PyTorch {torch.__version__} is built without CUDA: install a build with CUDA"),
    ],
)
def test_unusable_gpu_is_named_with_its_cause(machine, monkeypatch, capsys, built, cause):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    assert device.pick_device("auto").type == "cpu"
    assert capsys.readouterr().err.startswith(f"warning: running on cpu, far slower than on this machine's NVIDIA GPU: {cause}")
    assert device.pick_device("auto", warn=False).type == device.pick_device("cpu").type == "cpu" and not capsys.readouterr().err
    with pytest.raises(ValueError) as error:
        device.pick_device("cuda")
    assert str(error.value).startswith(f"--device cuda: {cause}")


@pytest.mark.parametrize("reason", ["hidden", "none"])
def test_no_gpu_is_no_reason_to_warn(machine, monkeypatch, capsys, reason):
    if reason == "hidden":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    else:
        (machine.folder / "nvidia-smi").unlink()
        monkeypatch.setattr(device.Path, "exists", lambda self: False)
    assert device.pick_device("auto").type == "cpu" and not capsys.readouterr().err
    with pytest.raises(ValueError, match="--device cuda: this machine has none that PyTorch can use"):
        device.pick_device("cuda")


# ---- torch.compile ----


def test_missing_compilers_are_named(machine, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert device.compile_problem(cpu) == "it needs a C++ compiler: install g++"
    assert device.compile_problem(cuda) == "it needs a C compiler: install gcc"
    machine.install("g++", "gcc")
    assert device.compile_problem(cuda) == "it needs Python.h: install python3-dev"
    machine.install("Python.h")
    assert device.can_compile(cuda) and device.can_compile(cpu) and not device.can_compile(torch.device("mps"))
    monkeypatch.setenv("CC", "none")
    assert not device.can_compile(cuda)
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert device.compile_problem(cuda) == "it needs Triton: pip install triton"


def test_processes_share_the_compile_workers(machine, monkeypatch):
    from torch._inductor import config

    with config.patch(compile_threads=9):  # monkeypatch would delete it afterwards
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(96), raising=False)
        device.share_compile_workers(1)
        assert device.COMPILE_WORKERS not in os.environ and config.compile_threads == 9
        for processes, workers in ((8, 12), (2, 32), (200, 1)):
            device.share_compile_workers(processes)
            assert os.environ.pop(device.COMPILE_WORKERS) == str(workers) and config.compile_threads == workers
        monkeypatch.setenv(device.COMPILE_WORKERS, "5")
        device.share_compile_workers(8)
        assert os.environ[device.COMPILE_WORKERS] == "5"


# ---- CUDA's allocator ----


@pytest.mark.skipif(sys.platform != "linux", reason="expandable segments need Linux")
def test_allocator_settings_of_the_user_win(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device.pick_device("cpu")
    assert not any(name in os.environ for name in device.ALLOCATOR_SETTINGS)
    device.pick_device("auto")
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    device.pick_device("cuda")
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="expandable segments need Linux")
def test_pytorch_reads_the_allocator_setting_late():
    """Also if it is set after PyTorch was imported."""
    code = "import torch; from common import device; device.set_allocator(); print(torch._C._accelerator_getAllocatorSettings())"
    env = {name: value for name, value in os.environ.items() if name not in device.ALLOCATOR_SETTINGS}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env | {"PYTHONPATH": str(REPO)})
    assert result.stdout == "expandable_segments:True\n", result.stderr


# ---- malloc: a kept block causes no page faults when it is allocated again ----

ON_GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="set_malloc needs glibc")

# Counts page faults of blocks of 4, 16 and 64 MB: 1,024, 4,096 and 16,384 pages, or 2, 8 and 32 huge pages of 2 MB. The heap may
# need a few rounds to make room for a block. glibc by itself keeps blocks of up to 32 MB, once it has freed one.
COUNT = """
import resource, torch
def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print("faults", *(min(faults(size) for _ in range(30)) for size in (2**20, 2**22, 2**24)))
"""
ALL, GLIBC, SPARING = "4 16 64", "4 16", "4"


def kept(code: str, *argv, **env) -> str:
    """The sizes in MB of freed blocks that the process keeps after running this code. argv: the code's command line."""
    command = [sys.executable, "-c", code + COUNT, *map(str, argv)]
    inherited = {name: value for name, value in os.environ.items() if name not in device.MALLOC_SETTINGS}
    own = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **env}
    result = subprocess.run(command, capture_output=True, text=True, env=inherited | own, timeout=120)
    assert result.returncode == 0, result.stderr
    faults = dict(zip(("4", "16", "64"), map(int, result.stdout.split()[-3:]), strict=True))
    return " ".join(size for size in faults if faults[size] < 2)


@ON_GLIBC
@pytest.mark.slow
def test_compiled_training_keeps_freed_memory(shards, tmp_path):
    code = (
        "import train, training.trainer\nfrom common import device\n"
        "device.compile_problem, training.trainer.compile_blocks = lambda _: '', lambda *_: None\n"  # pretends to compile
        "train.main()"
    )
    argv = [*TINY, "--data-dir", shards, "--max-steps", 1, "--val-every", 0, "--out-dir"]
    assert kept(code, *argv, tmp_path / "kept", "--compile") == ALL
    assert kept(code, *argv, tmp_path / "sparing", "--compile", "--activation-memory", 0.5) == SPARING
    assert kept(code, *argv, tmp_path / "eager") == GLIBC


@ON_GLIBC
@pytest.mark.slow
def test_malloc_settings_in_environment_win():
    code = "import torch; from common import device; device.set_malloc(torch.device('{}'))"
    assert kept(code.format("cpu")) == ALL and kept(code.format("cuda")) == GLIBC
    for name, value in (("MALLOC_MMAP_THRESHOLD_", "4194304"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=4194304")):
        assert kept(code.format("cpu"), **{name: value}) in ("", "4")


@pytest.mark.slow
@ON_GLIBC
def test_set_malloc_can_switch_to_sparing():
    code = "import torch; from common import device\nfor sparing in (False, True): device.set_malloc(torch.device('cpu'), sparing)"
    assert kept(code) == SPARING
