"""The hardware a process runs on, and what it can do."""

import ctypes
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch


def pick_device(name: str) -> torch.device:
    """'auto' is the fastest device there is. Raises ValueError for one this machine does not have."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in has.items() if there)
    if not has.get(name):
        raise ValueError(f"--device {name}: this machine has none that PyTorch can use; try --device auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bf16 where the hardware multiplies in it; else fp16 on CUDA (with a loss scaler), fp32 elsewhere."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        has = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        name = "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def can_compile(device: torch.device) -> bool:
    """torch.compile needs a C++ compiler on CPU and is not ready for MPS."""
    if device.type == "cpu":
        return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    return device.type == "cuda"


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # in glibc's malloc.h
MALLOC_SETTINGS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"  # mallopt's, for a user


def set_malloc(device: torch.device, sparing: bool = False):
    """For compiled training on a CPU with glibc: what is freed stays the process's, for the next step to use; 6 % more memory at
    124M (results/README.md). As a rule large blocks go back to the kernel, which hands them out anew in each step, zeroed page by
    page: a fifth of its time. sparing: blocks of 8 MB and more go back, for less memory. What the environment says stands."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if device.type != "cpu" or not mallopt or any(name in os.environ for name in MALLOC_SETTINGS):
        return
    if sparing:
        mallopt(M_MMAP_MAX, 65536)  # glibc's own number
        mallopt(M_MMAP_THRESHOLD, 8 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)  # what glibc comes to by itself, at most, where it is not told a threshold
    else:
        mallopt(M_MMAP_MAX, 0)  # no block is mapped, to be unmapped when it is freed
        mallopt(M_TRIM_THRESHOLD, -1)  # nor is the heap's free end given back


FP_CONTRACT = "TORCHINDUCTOR_CPP_ENABLE_FLOATING_POINT_CONTRACT_FLAG"
COPY_BY_CALL, CPU_IS = "-mstringop-strategy=libcall", "-DCPU_IS_"


def set_compiler_flags():
    """Gives the C++ compiler that torch.compile calls two more flags, each against silently wrong results.

    -mstringop-strategy=libcall: GCC calls memcpy and never copies with `rep movsq`. GCC 11 and 12 delete the stores that filled an
    array before such a copy (GCC bug 113255). On Emerald Rapids, a CPU that GCC 12.2 doesn't know, this corrupts 16-bit tensors where
    Inductor puts two transposes in one kernel (results/compiler.md).

    -DCPU_IS_…: Inductor's cache does not tell apart graphs made for vectors of different lengths. It does tell apart flags.

    Call this at import, before anything is compiled. It doesn't import Inductor, which takes a second. Inductor has no setting for
    extra compiler flags. It pastes this variable after `-ffp-contract=`, so they are appended there.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return
    flags = [word for word in os.environ.get(FP_CONTRACT, "off").split() if not word.startswith((COPY_BY_CALL, CPU_IS))]
    flags.append(CPU_IS + torch.backends.cpu.get_cpu_capability().replace(" ", "_"))
    if is_gcc(os.environ.get("CXX", "g++")):
        flags.append(COPY_BY_CALL)  # clang refuses it
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
        return "Free Software Foundation" in subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10).stdout
    return False


def mend_compile_cache():
    """Deletes the empty libraries that a process killed while torch.compile wrote them has left in its cache, which every later
    run would fail to load (pytorch's issue 102539). Those of the last seconds may be another process's at work."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    for library in Path(cache_dir()).glob("*/*.so"):
        with suppress(FileNotFoundError):  # another process mends it too
            about = library.stat()
            if about.st_size == 0 and time.time() - about.st_mtime > 10:
                library.unlink()


class Card(NamedTuple):
    """From NVIDIA's data sheets."""

    flops: float  # FLOP/s, dense bf16 or fp16 with fp32 accumulation
    memory: float  # bytes, the most that is sold


# by the words that are in a card's name
CARDS = {
    "B200": Card(2250e12, 180e9), "GH200": Card(989e12, 96e9), "H200": Card(989e12, 141e9), "H100 PCIe": Card(756e12, 80e9),
    "H100 NVL": Card(835e12, 94e9), "H100": Card(989e12, 80e9), "A100": Card(312e12, 80e9), "L40S": Card(362e12, 48e9),
    "L40": Card(181e12, 48e9), "L4": Card(121e12, 24e9), "A10": Card(125e12, 24e9), "V100": Card(125e12, 32e9),
    "RTX 4090": Card(165e12, 24e9), "RTX 3090": Card(71e12, 24e9),
}  # fmt: skip

ASSUMED_MFU = 0.4  # of that rate, for plans of what was not measured


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The card's matrix rate in FLOP/s; None where it is not known."""
    card = card_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return card and peak_of(card, dtype)


def peak_of(card: str, dtype: torch.dtype) -> float:
    """A card's matrix rate in FLOP/s. fp32 is multiplied in TF32, at half the rate, or on a V100, which has none, at an eighth."""
    return CARDS[card].flops / (1 if dtype != torch.float32 else 8 if card == "V100" else 2)


def card_of(description: str) -> str | None:
    """The row of the table above that a card's name belongs to."""
    return next((words for words in CARDS if re.search(rf"\b{words}\b", description)), None)


def total_memory(device: torch.device) -> int:
    """Bytes: the card's on CUDA, the machine's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: torch.device) -> int:
    """Bytes used at most so far: of the card on CUDA, by the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):  # Linux's getrusage also counts what the parent had before this process began
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.uname().machine}, {os.cpu_count()} cores"
