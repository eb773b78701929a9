"""What this process may use of the machine: less than the machine has, inside a container."""

from __future__ import annotations

import math
import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""Control groups of version 1 write a limit near the largest number where there is none."""


def usable_cores(root: Path = _ROOT) -> int:
    """Cores that this process may run on: those of its affinity, and no more than the control group's quota buys."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _numbers(root / "cpu.max")[:2] or (None, None)
    if quota is None:
        quota, period = (_first(root / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota is None or not period or quota <= 0:
        return own
    return max(1, min(own, math.ceil(quota / period)))


def free_bytes(root: Path = _ROOT, memory: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of host memory that are free to this process; None where the system does not say."""
    limits = []
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        most, now = _first(root / limit), _first(root / used)
        if most is not None and now is not None and most < _UNLIMITED:
            limits.append(max(0, most - now))
    try:
        lines = dict(line.split(":", 1) for line in memory.read_text(encoding="ascii").splitlines() if ":" in line)
        limits.append(int(lines["MemAvailable"].split()[0]) << 10)
    except (OSError, ValueError, KeyError, IndexError):
        pass
    return min(limits, default=None)


def _numbers(path: Path) -> tuple[int | None, ...]:
    """The numbers of a control group's file, None for ``max``; nothing where there is no such file."""
    try:
        words = path.read_text(encoding="ascii").split()
        return tuple(None if word == "max" else int(word) for word in words)
    except (OSError, ValueError):
        return ()


def _first(path: Path) -> int | None:
    return next(iter(_numbers(path)), None)
