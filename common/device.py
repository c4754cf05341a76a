"""The hardware a process runs on, and what it supports."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from common import cli


def pick_device(name: str, warn: bool = True) -> torch.device:
    """Picks a device by name; 'auto' is the fastest here. ValueError if this machine lacks it. warn: whether to say why 'auto'
    can't use this machine's NVIDIA GPU."""
    with warnings.catch_warnings(action="ignore"):  # about an old driver: cuda_problem says it better
        has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    problem = cuda_problem() if name in ("auto", "cuda") and not has["cuda"] else ""
    if name == "auto":
        name = next(kind for kind, available in has.items() if available)
        if problem and warn:
            cli.say(f"warning: running on {name}, far slower than on this machine's NVIDIA GPU: {problem}")
    if not has.get(name):
        raise ValueError(f"--device {name}: {problem or 'this machine has none that PyTorch can use; try --device auto'}")
    if name == "cuda":
        set_allocator()
    return torch.device(name)


def cuda_problem() -> str:
    """Says why PyTorch can't use this machine's NVIDIA GPU, and what helps; '' if there is no GPU, or if the user hides it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if hidden or not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()):
        return ""
    if not torch.backends.cuda.is_built():
        return f"PyTorch {torch.__version__} is built without CUDA: install a build with CUDA, see pytorch.org/get-started"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        remedy = "look at nvidia-smi; update the driver, or install an older build of PyTorch; a container needs --gpus all"
        return f"{cli.first_line(e).split('. ')[0]}: {remedy}"
    return ""


ALLOCATOR_SETTINGS = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # the latter is the older name, which PyTorch still reads


def set_allocator():
    """Lets PyTorch's CUDA allocator grow its segments, so that fragmentation wastes less memory. PyTorch reads this variable when it first
    uses CUDA. Does nothing if the user set the allocator."""
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Picks a dtype by name; 'auto' is bf16 if the hardware multiplies in it, else fp16 on CUDA (with a loss scaler), fp32 elsewhere.
    'int8' gives the dtype beside 8-bit weights: that of 'auto' on CUDA, fp32 elsewhere."""
    if name == "int8":
        name = "auto" if device.type == "cuda" else "fp32"
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        has = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        name = "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here."""
    return not compile_problem(device)


def compile_problem(device: torch.device) -> str:
    """Says why torch.compile doesn't work here, and what helps; '' if it works. On CUDA, Triton compiles a small module of C at its first
    use. MPS is not supported."""
    if device.type == "cpu":
        found = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
        return "" if found else "it needs a C++ compiler: install g++"
    if device.type != "cuda":
        return f"it is not ready for {device.type}"
    if not find_spec("triton"):
        return "it needs Triton: pip install triton"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "it needs a GPU from 2017 or later"
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        return "it needs a C compiler: install gcc"
    if os.name == "posix" and not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "it needs Python.h: install python3-dev"
    return ""


COMPILE_WORKERS = "TORCHINDUCTOR_COMPILE_THREADS"


def share_compile_workers(processes: int):
    """Splits this host's cores among its processes: torch.compile would start a worker per core in each of them. Does nothing if the user
    set their number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if processes == 1 or COMPILE_WORKERS in os.environ:
        return
    os.environ[COMPILE_WORKERS] = str(max(1, min(32, cores // processes)))  # 32: PyTorch's own limit
    if inductor := sys.modules.get("torch._inductor.config"):  # it has read the environment already
        inductor.compile_threads = int(os.environ[COMPILE_WORKERS])


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # in glibc's malloc.h
MALLOC_SETTINGS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"  # a user's way to set these


def set_malloc(device: torch.device, sparing: bool = False):
    """Makes malloc keep freed memory for the next step, for compiled training on a CPU with glibc.

    By default, malloc returns large blocks to the kernel, which zeroes them page by page in each step: a fifth of a step's time.
    Keeping them takes 6 % more memory at 124M (results/memory.md). sparing: returns blocks of 8 MB and more, to save memory.
    Does nothing if the user set malloc in the environment."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if device.type != "cpu" or not mallopt or any(name in os.environ for name in MALLOC_SETTINGS):
        return
    if sparing:
        mallopt(M_MMAP_MAX, 65536)  # glibc's default
        mallopt(M_MMAP_THRESHOLD, 8 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)  # the most that glibc would choose by itself
    else:
        mallopt(M_MMAP_MAX, 0)  # maps no block, so that none is unmapped when it is freed
        mallopt(M_TRIM_THRESHOLD, -1)  # never returns the heap's free end either


FP_CONTRACT = "TORCHINDUCTOR_CPP_ENABLE_FLOATING_POINT_CONTRACT_FLAG"
COPY_BY_CALL, CPU_IS = "-mstringop-strategy=libcall", "-DCPU_IS_"


def set_compiler_flags():
    """Adds two flags to torch.compile's C++ compiler. Each prevents silently wrong results.

    -mstringop-strategy=libcall: GCC calls memcpy and never copies with `rep movsq`. GCC 11 and 12 delete the stores that filled an
    array before such a copy (GCC bug 113255). On Emerald Rapids, a CPU that GCC 12.2 doesn't know, this corrupts 16-bit tensors where
    Inductor puts two transposes in one kernel (results/compiler.md).

    -DCPU_IS_…: Inductor's cache mixes up graphs that were made for vectors of different lengths. It does tell flags apart.

    Call this at import, before anything is compiled. It doesn't import Inductor, which takes a second. Inductor has no setting for
    extra compiler flags. It pastes this variable after `-ffp-contract=`, so they are appended there.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return
    flags = [word for word in os.environ.get(FP_CONTRACT, "off").split() if not word.startswith((COPY_BY_CALL, CPU_IS))]
    flags.append(CPU_IS + torch.backends.cpu.get_cpu_capability().replace(" ", "_"))
    if is_gcc(os.environ.get("CXX", "g++")):
        flags.append(COPY_BY_CALL)  # clang rejects it
    os.environ[FP_CONTRACT] = " ".join(flags)
    if inductor := sys.modules.get("torch._inductor.config"):  # it has read the environment already
        inductor.cpp.enable_floating_point_contract_flag = os.environ[FP_CONTRACT]


def is_gcc(compiler: str) -> bool:
    """Whether a C++ compiler is GCC. Asks it for its version if the name doesn't say."""
    name = os.path.basename(compiler)
    if "clang" in name:
        return False
    if re.fullmatch(r"(.+-)?g\+\+(-[\d.]+)?", name):
        return True
    with suppress(OSError, subprocess.SubprocessError):
        return b"Free Software Foundation" in subprocess.run([compiler, "--version"], capture_output=True, timeout=10).stdout
    return False


def mend_compile_cache():
    """Deletes empty libraries from torch.compile's cache. A process that is killed while compiling leaves them, and every later run
    would fail to load them (pytorch/pytorch#102539). Keeps those of the last 10 seconds: another process may be writing them."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    for library in Path(cache_dir()).glob("*/*.so"):
        with suppress(FileNotFoundError):  # another process deletes it too
            info = library.stat()
            if info.st_size == 0 and time.time() - info.st_mtime > 10:
                library.unlink()


class Card(NamedTuple):
    """A GPU's figures, from NVIDIA's data sheets."""

    flops: float  # FLOP/s, dense bf16 or fp16 with fp32 accumulation
    memory: float  # bytes, in the largest version sold


# by words in a card's name
CARDS = {
    "B200": Card(2250e12, 180e9), "GH200": Card(989e12, 96e9), "H200 NVL": Card(835e12, 141e9), "H200": Card(989e12, 141e9),
    "H100 PCIe": Card(756e12, 80e9), "H100 NVL": Card(835e12, 94e9), "H100": Card(989e12, 80e9), "A100": Card(312e12, 80e9),
    "L40S": Card(362e12, 48e9), "L40": Card(181e12, 48e9), "L4": Card(121e12, 24e9), "A10": Card(125e12, 24e9), "V100": Card(125e12, 32e9),
    "RTX 4090": Card(165e12, 24e9), "RTX 3090": Card(71e12, 24e9),
}  # fmt: skip

ASSUMED_MFU = 0.4  # share of that rate, for plans without a measurement


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's peak rate of matrix products in FLOP/s; None if unknown."""
    card = card_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return card and peak_of(card, dtype)


def peak_of(card: str, dtype: torch.dtype) -> float:
    """A card's peak rate of matrix products in FLOP/s. fp32 runs in TF32 at half the rate; a V100 has no TF32 and runs at an eighth."""
    return CARDS[card].flops / (1 if dtype != torch.float32 else 8 if card == "V100" else 2)


def card_of(description: str) -> str | None:
    """The key of CARDS that fits a card's name, or None."""
    return next((words for words in CARDS if re.search(rf"\b{words}\b", description)), None)


def total_memory(device: torch.device) -> int:
    """Memory in bytes: the card's on CUDA, the machine's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        import psutil
    except ImportError:  # on Linux and macOS the system can tell
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return psutil.virtual_memory().total


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes so far: the card's on CUDA, the process's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, TypeError):  # Linux's getrusage also counts the parent's memory before the fork
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(device: torch.device) -> str:
    """Names the hardware in a few words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {os.cpu_count()} cores"


def cpu_name() -> str:
    """Returns the CPU's name and the widest of its instructions that matter here, such as "AMD EPYC 9R14, AVX512, bf16"."""
    name = platform.machine()
    with suppress(OSError, TypeError):  # Linux
        name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))[1].strip()
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    bf16 = ["AMX"] if has.get("amx_bf16") else ["bf16"] if has.get("avx512_bf16") else []
    return ", ".join([name, torch.backends.cpu.get_cpu_capability(), *bf16])
