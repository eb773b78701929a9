"""Who reports that memory ran out: one pattern for each reporter's own words.

The words are those of the CUDA and HIP runtimes' error strings and codes, cuBLAS's and cuDNN's status names, NCCL's warnings,
numpy's and the C library's messages, PyTorch's data loader, mm/oom_kill.c of Linux (4.x to 6.x, with the line of a cgroup),
Slurm's, torchrun's and DeepSpeed's launchers.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from oomph.core.oom.sizes import LARGEST, NUMBER, SIZE, Printed, read_size
from oomph.diagnosis_records import Reporter
from oomph.units import KIB


class Reported(NamedTuple):
    """Where in a line a reporter's words stand, and what they say.

    Attributes:
        kind: who reports.
        start: the column of the first letter.
        end: the column after the last.
        weight: how sure the words are: 3 of an allocator's message with sizes, 2 of an error, 1 of a process that was ended.
        fields: fields of an `OomMessage`.
    """

    kind: Reporter
    start: int
    end: int
    weight: int
    fields: dict[str, Any]


TRIGGERS = (
    "out of memory",
    "outofmemory",
    "out_of_memory",
    "out of device memory",
    "out of shared memory",
    "insufficient shared memory",
    "allocation on device",
    "alloc_failed",
    "allocation_failed",
    "tried to allocate",
    "memory allocation of",
    "already allocated",
    "would exceed allowed memory",
    "has a total capac",
    "is allocated by pytorch",
    "memoryallocation",
    "killed process",
    "oom-kill",
    "oom_kill",
    "unable to allocate",
    "cannot allocate memory",
    "bad_alloc",
    "memoryerror",
    "signal 9",
    "sigkill",
    "exitcode",
    "return code",
    "signal: killed",
    "invalid buffer size",
    "resource exhausted",
)
"""Lower-case words of which at least one stands in every line that a reporter writes."""

_CUDA = re.compile(
    r"CUDA (?:driver |runtime )?error: out of memory|cuda runtime error \(2\)\s?: out of memory"
    r"|\bcudaErrorMemoryAllocation\b|\bCUDA_ERROR_OUT_OF_MEMORY\b|CUDA_OUT_OF_MEMORY\b|CUDA failure 2\b"
)
_HIP = re.compile(r"HIP error: out of memory|\bhipError(?:OutOfMemory|MemoryAllocation)\b|\bHIP_ERROR_OutOfMemory\b")
_BLAS = re.compile(r"\b(?:CUBLAS|HIPBLAS|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED\b")
_DNN = re.compile(
    r"\b(?:CUDNN_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_(?:DEVICE|HOST)_ALLOCATION_FAILED|miopenStatusAllocFailed)\b"
)
_NCCL = re.compile(
    r"Cuda failure (?:2 |999 )?'out of memory'|NCCL WARN [^\n]{0,160}out of memory|Failed to CUDA (?:c|m)alloc[^\n]{0,60}"
)
_XPU = re.compile(
    r"\b(?:UR_RESULT_ERROR_OUT_OF_(?:DEVICE|HOST)_MEMORY|PI_ERROR_OUT_OF_RESOURCES|ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)\b"
)
_MPS_BUFFER = re.compile(rf"Invalid buffer size: ({SIZE})")
_CPU = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory): you tried to allocate\s{0,3}(\d{1,24})\s{0,2}bytes"
    r"(?:\.? Error code (\d{1,4}) \([^)\n]{0,60}\))?|memory allocation of (\d{1,24}) bytes failed"
)
_NUMPY = re.compile(rf"Unable to allocate ({NUMBER} ?[KMGTPE]?i?B|{NUMBER} bytes) for an array with shape \(([\d, ]{{1,80}})\)")
_HOST = re.compile(
    r"\[Errno 12\] Cannot allocate memory|std::bad_alloc|\bMemoryError\b(?=\s*(?::|$))|workers? (?:are|is) out of shared memory"
    r"|insufficient shared memory \(shm\)"
    r"|DataLoader worker \(pid[^)\n]{0,40}\) is killed by signal: Killed"
)
_KB = r"(\d{1,15})\s{0,300}kB"
_RSS = rf"total-vm:{_KB}, ?anon-rss:{_KB}(?:, ?file-rss:{_KB})?(?:, ?shmem-rss:{_KB})?"
_KILLED = re.compile(
    r"(?:Memory cgroup out of memory|Out of memory)(?: \(\w{1,40}\))?: Kill(?:ed)? process (\d{1,10}),? "
    rf"\(([^\n]{{1,64}}?)\)(?=[\s,]|$)(?:[^\n]{{0,80}}?{_RSS})?"
)
_KILLED_BARE = re.compile(rf"^\s*Killed process (\d{{1,10}}) \(([^)\n]{{1,64}})\),?(?: UID \d{{1,8}},?)? {_RSS}")
_OOM_KILL = re.compile(r"oom-kill:constraint=(\w{1,40})[^\n]{0,400}?task=([^,\n]{1,64}),pid=(\d{1,10})")
_INVOKED = re.compile(r"(\S{1,64}) invoked oom-killer")
_SLURM = re.compile(
    r"(?:Detected \d{1,6} oom[-_]kill event|Exceeded (?:step|job) memory limit|task \d{1,6}: Out Of Memory)[^\n]{0,80}"
)
_ENDED = re.compile(
    r"exitcode\s{0,4}:\s?-9\b|Signal 9 \(SIGKILL\)|exits? with return code = -9\b|died with <Signals\.SIGKILL: 9>"
    r"|exitcode:? ?-9\b|terminated by signal SIGKILL"
)
_SIMPLE: tuple[tuple[Reporter, re.Pattern[str]], ...] = (
    ("nccl", _NCCL),
    ("cuda runtime", _CUDA),
    ("hip runtime", _HIP),
    ("cublas", _BLAS),
    ("cudnn", _DNN),
    ("xpu allocator", _XPU),
)


def other_reports(line: str) -> list[Reported]:
    """What the reporters that are no device allocator of PyTorch say in a line."""
    found: list[Reported] = []
    for kind, pattern in _SIMPLE:
        match = pattern.search(line)
        if match:
            found.append(Reported(kind, match.start(), match.end(), 2, {}))
            break
    if match := _CPU.search(line):
        asked = _exactly(int(match[1] or match[3]))
        found.append(Reported("cpu allocator", match.start(), match.end(), 3, _asked(asked)))
    elif match := _NUMPY.search(line):
        printed = read_size(match[1])
        found.append(Reported("cpu allocator", match.start(), match.end(), 3, _asked(printed) if printed else {}))
    elif match := _MPS_BUFFER.search(line):
        printed = read_size(match[1])
        found.append(Reported("mps", match.start(), match.end(), 3, _asked(printed) if printed else {}))
    return found or _host_reports(line)


def _host_reports(line: str) -> list[Reported]:
    match = _KILLED.search(line) or _KILLED_BARE.search(line)
    if match:
        resident = [int(value) * KIB for value in match.groups()[3:6] if value]
        fields: dict[str, Any] = {"process": match[2]}
        if resident:
            fields["process_bytes"] = sum(resident)
        return [Reported("linux oom killer", match.start(), match.end(), 3, fields)]
    if match := _OOM_KILL.search(line):
        return [Reported("linux oom killer", match.start(), match.end(), 2, {"process": match[2]})]
    if match := _INVOKED.search(line):
        return [Reported("linux oom killer", match.start(), match.end(), 1, {})]
    if match := _SLURM.search(line):
        return [Reported("linux oom killer", match.start(), match.end(), 2, {})]
    if match := _HOST.search(line):
        return [Reported("cpu allocator", match.start(), match.end(), 2, {})]
    if match := _ENDED.search(line):
        return [Reported("linux oom killer", match.start(), match.end(), 0, {})]
    return []


def _exactly(nbytes: int) -> Printed:
    kept = min(LARGEST, nbytes)
    return Printed(kept, kept, kept)


def _asked(printed: Printed) -> dict[str, Any]:
    return {
        "requested_bytes": printed.bytes,
        "requested_low": max(1, printed.low),
        "requested_high": max(1, printed.high),
    }
