"""Reports of memory that ran out: the wordings of their reporters, and a generator that fills in the figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

# The wordings follow the format strings of these files: c10/cuda/CUDACachingAllocator.cpp of PyTorch 1.3, 1.4, 1.11, 2.1, 2.2,
# 2.5 and 2.9; c10/cuda/CUDAMallocAsyncAllocator.cpp; c10/xpu/XPUCachingAllocator.cpp; aten/src/ATen/mps/MPSAllocator.mm;
# c10/core/impl/alloc_cpu.cpp; Rust's alloc::handle_alloc_error; mm/oom_kill.c of Linux 5.4; NCCL's src/include/alloc.h.
_FRAGMENTS = (
    " If reserved memory is >> allocated memory try setting max_split_size_mb to avoid fragmentation."
    "  See documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF"
)
_UNALLOCATED = (
    " If reserved but unallocated memory is large try setting {} to avoid fragmentation.  See documentation for Memory"
)
_OLD_HINT = _UNALLOCATED.format("max_split_size_mb") + " Management and PYTORCH_CUDA_ALLOC_CONF"
_URL = " Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"


def _old(numbers: dict[str, Any], last: str) -> str:
    return (
        f"CUDA out of memory. Tried to allocate {numbers['asked']} (GPU {numbers['gpu']}; {numbers['capacity']} total "
        f"capacity; {numbers['allocated']} already allocated; {numbers['free']} free; {numbers['reserved']} {last})"
    )


def _new(numbers: dict[str, Any], who: str = "CUDA", capacity: str = "capacity") -> str:
    text = f"{who} out of memory. Tried to allocate {numbers['asked']}. "
    if "gpu" in numbers:
        text += f"GPU {numbers['gpu']} has a total {capacity} of {numbers['capacity']} of which {numbers['free']} is free. "
    for pid, held in numbers.get("others", []):
        text += f"Process {pid} has {held} memory in use. "
    if "process" in numbers:
        text += f"Including non-PyTorch memory, this process has {numbers['process']} memory in use. "
    if "allowed" in numbers:
        text += f"{numbers['allowed']} allowed; "
    if "allocated" in numbers:
        private = f"with {numbers['private']} allocated in private pools (e.g., {who} Graphs), " if "private" in numbers else ""
        text += f"Of the allocated memory {numbers['allocated']} is allocated by PyTorch, {private}and "
        text += f"{numbers['unallocated']} is reserved by PyTorch but unallocated."
    return text


def _advice(numbers: dict[str, Any], name: str) -> str:
    """The advice of 2.2 and later; a message that was cut has none."""
    return _UNALLOCATED.format(f"{name}=expandable_segments:True") + _URL


def _cut(numbers: dict[str, Any], last: str) -> str:
    """The older wording with what is known of it."""
    asked = f"CUDA out of memory. Tried to allocate {numbers['asked']} ... {numbers['allocated']} already allocated; "
    return f"{asked}{numbers['free']} free"


def _async(numbers: dict[str, Any]) -> str:
    return (
        f"Allocation on device {numbers['gpu']} would exceed allowed memory. (out of memory)\n"
        f"Currently allocated     : {numbers['allocated']}\nRequested               : {numbers['asked']}\n"
        f"Device limit            : {numbers['capacity']}\nFree (according to CUDA): {numbers['free']}\n"
        f"PyTorch limit (set by user-supplied memory fraction)\n                        : {numbers['allowed']}"
    )


def _mps(numbers: dict[str, Any]) -> str:
    return (
        f"MPS backend out of memory (MPS allocated: {numbers['allocated']}, other allocations: {numbers['other']}, max "
        f"allowed: {numbers['allowed']}). Tried to allocate {numbers['asked']} on private pool. Use "
        "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations (may cause system failure)."
    )


def _kernel(numbers: dict[str, Any], first: str) -> str:
    return (
        f"[441280.839852] {first}: Killed process {numbers['pid']} ({numbers['name']}) total-vm:{numbers['total_vm']}kB, "
        f"anon-rss:{numbers['anon']}kB, file-rss:{numbers['file']}kB, shmem-rss:{numbers['shmem']}kB, UID:1000 "
        "pgtables:49772kB oom_score_adj:0"
    )


_WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "cuda 1.3": lambda n: f"RuntimeError: {_old(n, 'cached')}",
    "cuda 1.4": lambda n: f"RuntimeError: {_old(n, 'reserved in total by PyTorch')}",
    "cuda 1.11": lambda n: f"RuntimeError: {_old(n, 'reserved in total by PyTorch')}{_FRAGMENTS}",
    "cuda 1.13": lambda n: f"torch.cuda.OutOfMemoryError: {_old(n, 'reserved in total by PyTorch')}{_FRAGMENTS}",
    "cuda 1.11, cut": lambda n: _cut(n, ""),
    "cuda 1EB": lambda n: "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate more than 1EB memory.",
    "cuda 2.1": lambda n: f"torch.cuda.OutOfMemoryError: {_new(n, capacity='capacty')}{_OLD_HINT}",
    "cuda 2.1, cut": lambda n: f"torch.cuda.OutOfMemoryError: {_new(n, capacity='capacty')}",
    "cuda 2.2": lambda n: f"torch.cuda.OutOfMemoryError: {_new(n)}{_advice(n, 'PYTORCH_CUDA_ALLOC_CONF')}",
    "cuda 2.2, cut": lambda n: f"torch.cuda.OutOfMemoryError: {_new(n)}",
    "cuda 2.5": lambda n: f"torch.OutOfMemoryError: {_new(n)}{_advice(n, 'PYTORCH_CUDA_ALLOC_CONF')}",
    "cuda 2.5, cut": lambda n: f"torch.OutOfMemoryError: {_new(n)}",
    "cuda 2.11": lambda n: f"torch.OutOfMemoryError: {_new(n)}{_advice(n, 'PYTORCH_ALLOC_CONF')}",
    "hip 2.5": lambda n: f"torch.OutOfMemoryError: {_new(n, 'HIP')}{_advice(n, 'PYTORCH_HIP_ALLOC_CONF')}",
    "hip 2.9": lambda n: f"torch.OutOfMemoryError: {_new(n, 'HIP')}{_advice(n, 'PYTORCH_CUDA_ALLOC_CONF')}",
    "xpu 2.7": lambda n: (
        f"torch.OutOfMemoryError: XPU out of memory. Tried to allocate {n['asked']}. GPU {n['gpu']} has a total capacity "
        f"of {n['capacity']}. Of the allocated memory {n['allocated']} is allocated by PyTorch, and {n['unallocated']} is "
        "reserved by PyTorch but unallocated. Please use `empty_cache` to release all unoccupied cached memory."
    ),
    "async": lambda n: f"torch.cuda.OutOfMemoryError: {_async(n)}",
    "mps": lambda n: f"RuntimeError: {_mps(n)}",
    "cpu linux": lambda n: (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        f"allocate {n['asked']} bytes. Error code 12 (Cannot allocate memory)"
    ),
    "rust": lambda n: f"memory allocation of {n['asked']} bytes failed",
    "kernel global": lambda n: _kernel(n, "Out of memory"),
    "kernel cgroup": lambda n: _kernel(n, "Memory cgroup out of memory"),
    "cublas": lambda n: "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cudnn": lambda n: "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuda runtime": lambda n: "RuntimeError: CUDA error: out of memory",
    "nccl": lambda n: "node:3063028:3066152 [3] include/alloc.h:178 NCCL WARN Cuda failure 'out of memory'",
}


def write_message(wording: str, numbers: dict[str, Any]) -> str:
    """A reporter's message in its own words."""
    return _WRITERS[wording](numbers)


def write_traceback(frames: Sequence[Sequence[Any]]) -> str:
    """A Python traceback."""
    lines = ["Traceback (most recent call last):"]
    for file, line, function, code in frames:
        lines.append(f'  File "/usr/lib/python3.11/site-packages/{file}", line {line}, in {function}')
        lines += [f"    {code}"] if code else []
    return "\n".join(lines)


def write_report(report: dict[str, Any]) -> str:
    """A report's text: what stood around it, its traceback, its message; with its rank as torchrun prefixes it."""
    parts = [*report.get("context", ())]
    if "frames" in report:
        parts.append(write_traceback(report["frames"]))
    parts.append(write_message(report["wording"], report["numbers"]))
    text = "\n".join(parts)
    if "rank" in report:
        text = "\n".join(f"[rank{report['rank']}]: {line}" for line in text.split("\n"))
    return text


@pytest.fixture(scope="session")
def message() -> Callable[[str, dict[str, Any]], str]:
    """The function `write_message`."""
    return write_message


@pytest.fixture(scope="session")
def traceback() -> Callable[[Sequence[Sequence[Any]]], str]:
    """The function `write_traceback`."""
    return write_traceback


@pytest.fixture(scope="session")
def written() -> Callable[[dict[str, Any]], str]:
    """The function `write_report`."""
    return write_report


@pytest.fixture(scope="session")
def reports() -> list[dict[str, Any]]:
    """The reports of reports.json."""
    rows: list[dict[str, Any]] = json.loads((Path(__file__).parent / "reports.json").read_text(encoding="utf-8"))
    return rows
