"""The device that rungs are measured on: the first CUDA card, or the CPU with the memory that its control group leaves it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from oomph.core.measuring import Machine
from oomph.errors import UserError
from oomph.live.processes import Failed, in_new_process
from oomph.live.watching import driver_version
from oomph.units import GIB, KIB

_ON_THE_CPU = "CUDA_VISIBLE_DEVICES= measures on the CPU"
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "oomph")


def machine() -> Machine:
    """The device that rungs run on. A card is looked at from a new process, so that this one takes nothing of it.

    Raises:
        UserError: there is a card, and it cannot be used or is not CUDA's.
    """
    if not torch.cuda.is_available():
        return cpu_machine()
    if torch.version.hip:
        raise UserError("this build of torch runs on AMD's cards, and only CUDA's memory is predicted", _ON_THE_CPU)
    try:
        seen: Machine = in_new_process(cuda_machine)
    except Failed as failure:
        raise UserError(f"the CUDA card cannot be used: {failure}", _ON_THE_CPU) from None
    return seen


def cuda_machine() -> Machine:
    """The first CUDA card; this process makes a context on it."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    others = max(0, total - free - GIB)  # a context of our own takes less than 1 GiB
    return Machine(
        device="cuda",
        name=properties.name,
        driver=driver_version(),
        cuda=str(torch.version.cuda or ""),
        total_bytes=properties.total_memory,
        free_bytes=properties.total_memory - others,
        capability=(properties.major, properties.minor),
        cores=properties.multi_processor_count,
        **_software(),
    )


def cpu_machine() -> Machine:
    """The CPU, with the memory that its control group leaves to this process."""
    total, free = _memory()
    return Machine(
        device="cpu",
        name=_processor(),
        driver="",
        cuda="",
        total_bytes=total,
        free_bytes=free,
        capability=(),
        cores=len(os.sched_getaffinity(0)),
        **_software(),
    )


def _software() -> dict[str, Any]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "date": datetime.now(UTC).isoformat(timespec="seconds")}


def _processor() -> str:
    names = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return names[1].strip() if names else platform.processor() or platform.machine()


def _memory() -> tuple[int, int]:
    """Bytes of memory, and those that can still be had: the machine's, or the control group's where it has fewer."""
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _text(Path("/proc/meminfo")), re.MULTILINE))
    total = int(info.get("MemTotal", 0)) * KIB or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(info.get("MemAvailable", 0)) * KIB or total
    for limit, used in _control_groups(Path("/sys/fs/cgroup"), _text(Path("/proc/self/cgroup"))):
        total, free = min(total, limit), min(free, limit - used)
    return total, free


def _control_groups(root: Path, membership: str) -> Iterator[tuple[int, int]]:
    """The limit of each control group (version 2) that this process is in, and what is used of it and cannot be given back."""
    found = re.search(r"^0::/(.*)$", membership, re.MULTILINE)
    group = root / found[1] if found else root
    for folder in (group, *group.parents):
        limit, used = _text(folder / "memory.max").strip(), _text(folder / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            cached = re.search(r"^inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            yield int(limit), int(used) - (int(cached[1]) if cached else 0)
        if folder == root:
            return


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
