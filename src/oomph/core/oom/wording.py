"""What PyTorch's device allocators say when they run out, in the wordings of 1.4 to 2.15, field by field.

The wordings are those of these files, in the versions named:

- c10/cuda/CUDACachingAllocator.cpp: ``(GPU 0; ... total capacity; ... already allocated; ... free; ... reserved in total by
  PyTorch)`` until 2.0, its advice of `max_split_size_mb` since late in 1.10; ``GPU 0 has a total capacty of`` with processes in
  2.1; ``capacity`` and the advice of `expandable_segments` since 2.2; ``allocated in private pools`` since 2.4. The class is
  RuntimeError until 1.12, ``torch.cuda.OutOfMemoryError`` from 1.13 and ``torch.OutOfMemoryError`` from 2.4 or 2.5 on. What
  hipify makes of it says HIP; c10/xpu/XPUCachingAllocator.cpp says XPU.
- c10/cuda/CUDAMallocAsyncAllocator.cpp: ``Allocation on device 0 would exceed allowed memory``, with a table.
- aten/src/ATen/mps/MPSAllocator.mm: ``MPS backend out of memory (MPS allocated: ...``.
- c10/core/impl/alloc_cpu.cpp: ``DefaultCPUAllocator: can't allocate memory``, and ``not enough memory`` on Windows.
"""

from __future__ import annotations

import re
from typing import Any

from oomph.core.oom.sizes import SIZE, read_size
from oomph.diagnosis_records import OtherProcess

_S = rf"({SIZE})"
ASKED = re.compile(rf"Tried to allocate\s{{0,3}}{_S}", re.IGNORECASE)
_OLD_GPU = re.compile(r"\(GPU (\d{1,4})\s?;")
_NEW_GPU = re.compile(r"GPU ?(\d{1,4}) has a total")
_FIELDS = {
    "capacity_bytes": (rf"{_S} total capacity", rf"total capac(?:i)?ty of {_S}", rf"Device limit\s{{0,4}}:\s?{_S}"),
    "allocated_bytes": (
        rf"{_S} already allocated",
        rf"Of the allocated memory {_S}",
        rf"Currently allocated\s{{0,8}}:\s?{_S}",
        rf"MPS allocated: {_S}",
    ),
    "free_bytes": (rf"{_S} free\b(?! \(acc)", rf"of which {_S} is free", rf"Free \(according to CUDA\)\s{{0,4}}:\s?{_S}"),
    "limit_bytes": (rf"{_S} allowed\b", rf"user-supplied memory fraction\)\s{{0,30}}:\s?{_S}", rf"max allowed: {_S}"),
    "reserved_bytes": (rf"{_S} reserved in total", rf"{_S} cached\)"),
    "unallocated_bytes": (rf"and {_S} is reserved by PyTorch", rf"{_S} is reserved by PyTorch but"),
    "process_bytes": (rf"this process has {_S} memory in use",),
    "private_pool_bytes": (rf"with {_S} allocated in private pools",),
    "other_bytes": (rf"other allocations: {_S}",),
}
_PATTERNS = {name: tuple(re.compile(pattern, re.IGNORECASE) for pattern in patterns) for name, patterns in _FIELDS.items()}
_PROCESS = re.compile(rf"Process (\d{{1,10}}) has {_S} memory in use", re.IGNORECASE)
_HINTS = {
    "max_split_size_mb": re.compile(r"try setting\s?max_split_size_mb"),
    "expandable_segments": re.compile(r"expandable_segments\s?:\s?True"),
    "empty_cache": re.compile(r"use `empty_cache`"),
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO": re.compile(r"PYTORCH_MPS_HIGH_WATERMARK_RATIO"),
}
_ENDS = re.compile(
    r"PYTORCH_(?:CUDA|HIP)_ALLOC_CONF\s?\)?[\"'.]?\s*(?:$|\n)|environment-variables\s?\)?|in total by PyTorch\s?\)|cached\s?\)"
    r"|but unallocated\.?|system failure\)|unoccupied cached memory|fraction\)\s{0,30}:"
)

WORDS = frozenset(
    """CUDA HIP XPU MPS out of memory Tried to allocate GPU has a total capacity capacty of which is free Including
    non-PyTorch this process Process in use Of the allocated by PyTorch and reserved but unallocated If large try setting
    max_split_size_mb expandable_segments PYTORCH_CUDA_ALLOC_CONF avoid fragmentation See documentation for Memory Management
    already GiB MiB KiB GB MB KB bytes with private pools backend allocations max allowed""".split()
)
"""The words of the messages, by which a word that a line break cut in two is put together again."""


def device_fields(text: str) -> dict[str, Any]:
    """The fields of an `OomMessage` that a device allocator's message gives.

    Args:
        text: the message on one line.
    """
    fields: dict[str, Any] = {}
    for name, patterns in _PATTERNS.items():
        match = next((found for pattern in patterns if (found := pattern.search(text))), None)
        printed = read_size(match[1]) if match else None
        if printed is not None:
            fields[name] = printed.bytes
    gpu = _OLD_GPU.search(text) or _NEW_GPU.search(text) or re.search(r"on device (\d{1,4}) would", text)
    if gpu:
        fields["gpu"] = int(gpu[1])
    others = []
    for match in _PROCESS.finditer(text):
        printed = read_size(match[2])
        if printed is not None:
            others.append(OtherProcess(int(match[1]), printed.bytes))
    if others:
        fields["others"] = tuple(others)
    allocated, unallocated = fields.get("allocated_bytes"), fields.get("unallocated_bytes")
    if "reserved_bytes" not in fields and allocated is not None and unallocated is not None:
        fields["reserved_bytes"] = allocated + unallocated
    elif "reserved_bytes" in fields and allocated is not None:
        fields["unallocated_bytes"] = max(0, fields["reserved_bytes"] - allocated)
    fields["hints"] = tuple(name for name, pattern in _HINTS.items() if pattern.search(text))
    fields["truncated"] = not _ENDS.search(text)
    return fields


def torch_versions(text: str, before: str) -> str:
    """The versions of PyTorch that word a device allocator's message so; empty where nothing says it.

    Args:
        text: the message on one line.
        before: what stands before it on its line, with the exception's class.
    """
    low, high = (0, 0), (9, 99)
    for pattern, first, last in _VERSIONS:
        if pattern.search(text):
            low, high = max(low, first), min(high, last)
    for name, first, last in _CLASSES:
        if before.rstrip().endswith(f"{name}:"):
            low, high = max(low, first), min(high, last)
            break
    if low > high or (low == (0, 0) and high == (9, 99)):
        return ""
    if low == high:
        return _dotted(low)
    if low == (0, 0):
        return f"up to {_dotted(high)}"
    return f"{_dotted(low)} or later" if high == (9, 99) else f"{_dotted(low)} to {_dotted(high)}"


_VERSIONS = (
    (re.compile(r"cached\)"), (0, 4), (1, 3)),
    (re.compile(r"reserved in total by PyTorch"), (1, 4), (2, 0)),
    (re.compile(r"already allocated"), (0, 4), (2, 0)),
    (re.compile(r"reserved in total by PyTorch\s?\) ?If reserved"), (1, 10), (2, 0)),
    (re.compile(r"total capacty of"), (2, 1), (2, 1)),
    (re.compile(r"GPU ?\d{0,4} has a total capacity of"), (2, 2), (9, 99)),
    (re.compile(r"allocated in private pools"), (2, 4), (9, 99)),
    (re.compile(r"PYTORCH_ALLOC_CONF"), (2, 9), (9, 99)),
)
_CLASSES = (
    ("torch.cuda.OutOfMemoryError", (1, 13), (2, 4)),
    ("torch.OutOfMemoryError", (2, 4), (9, 99)),
)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def joined(lines: list[str]) -> str:
    """Lines as one: what a line break cut in two is put together, and all other breaks become spaces."""
    text = ""
    for line in lines:
        piece = line.strip()
        if not piece:
            continue
        text += ("" if not text or _belongs(text, piece) else " ") + piece
    return re.sub(r"\s{2,}", " ", text)


def _belongs(text: str, piece: str) -> bool:
    """Whether a line goes on in the middle of a word or of a number."""
    last, first = text[-1], piece[0]
    if (last.isdigit() or last in ".,") and first.isdigit():
        return bool(re.search(r"\d[.,]?$", text))
    if last.isdigit() and first == ".":
        return True
    if last.isalpha() and first.isalpha():
        head = re.split(r"[^\w-]", text[-40:])[-1]
        tail = re.split(r"[^\w-]", piece[:40])[0]
        return head + tail in WORDS and not (head in WORDS and tail in WORDS)
    return False
