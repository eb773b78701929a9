"""What a real step takes, phase by phase: from the allocator's own statistics on CUDA, from PyTorch's profiler on the CPU.

A phase begins with what the one before it left, and lasts until another one begins, as in `oomph.core.allocator.replay`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from oomph.records import Footprint, PhasePeak

_MARK = "oomph phase: "


class Meter(Protocol):
    """Use it as a context around everything that counts; then ask for the footprint."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...

    def enter(self, phase: str) -> None:
        """Another phase begins; the first one is ``load``."""
        ...

    def footprint(self) -> Footprint:
        """The peaks, once the block has ended."""
        ...


class CudaMeter:
    """The peaks that ``torch.cuda`` counts, which begin anew with each phase."""

    def __init__(self) -> None:
        self._phase, self._peaks = "load", dict[str, tuple[int, int]]()

    def __enter__(self) -> Self:
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: Any) -> None:
        self.enter("")

    def enter(self, phase: str) -> None:
        """Another phase begins."""
        allocated, reserved = self._peaks.get(self._phase, (0, 0))
        seen = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        self._peaks[self._phase] = max(allocated, seen[0]), max(reserved, seen[1])
        torch.cuda.reset_peak_memory_stats()
        self._phase = phase

    def footprint(self) -> Footprint:
        """The peaks of each phase, and the largest of each kind."""
        return _footprint(self._peaks)


class CpuMeter:
    """The bytes alive in the CPU's allocator, as PyTorch's profiler reports each allocation and release.

    What an operator takes for itself and gives back before it ends does not count: that is its kernel's, and CUDA has other
    kernels. Without a cache nothing is reserved but what is allocated.
    """

    def __init__(self) -> None:
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Self:
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)

    def enter(self, phase: str) -> None:
        """Another phase begins."""
        with record_function(_MARK + phase):
            pass

    def footprint(self) -> Footprint:
        """The peaks of each phase, and the largest of them."""
        result: Any = self._profiler.profiler
        changes = _outlasting(sorted(_changes(result.kineto_results.experimental_event_tree())))
        peaks, alive, phase = {"load": 0}, 0, "load"
        for change in changes:
            phase = change.phase or phase
            alive += change.nbytes
            peaks[phase] = max(peaks.get(phase, 0), alive)
        return _footprint({phase: (peak, peak) for phase, peak in peaks.items()})


def make_meter(device: str) -> Meter:
    """The meter of a device, ``cuda`` or ``cpu``."""
    return CudaMeter() if device == "cuda" else CpuMeter()


def _footprint(peaks: dict[str, tuple[int, int]]) -> Footprint:
    phases = tuple(PhasePeak(phase, *seen) for phase, seen in peaks.items())
    allocated, reserved = (max(seen) for seen in zip(*peaks.values(), strict=True))
    return Footprint(allocated, reserved, phases)


class _Change(NamedTuple):
    """An allocation, a release (`nbytes` < 0), or the beginning of a phase; `call` is the operator's in which it happens."""

    time: int
    nbytes: int
    address: int
    call: int
    phase: str = ""


def _changes(events: list[Any]) -> Iterator[_Change]:
    waiting = [(event, 0) for event in events]
    while waiting:
        event, call = waiting.pop()
        fields = event.extra_fields
        if hasattr(fields, "alloc_size"):
            yield _Change(event.start_time_ns, fields.alloc_size, fields.ptr, call)
        elif event.name.startswith(_MARK):
            yield _Change(event.start_time_ns, 0, 0, 0, event.name.removeprefix(_MARK))
        elif not call and _has_a_kernel(event.name):
            call = event.id
        waiting += [(child, call) for child in event.children]


@functools.cache
def _has_a_kernel(name: str) -> bool:
    """Whether an operator is one that runs, and not one that is made of others."""
    schemas = torch._C._jit_get_schemas_for_operator(name) if "::" in name else []
    overloads = [f"{s.name}.{s.overload_name}" if s.overload_name else s.name for s in schemas if "out" not in s.overload_name]
    known = [overload for overload in overloads if torch._C._dispatch_has_kernel(overload)]
    composite = "CompositeImplicitAutograd"
    return any(not torch._C._dispatch_has_kernel_for_dispatch_key(overload, composite) for overload in known)


def _outlasting(changes: list[_Change]) -> list[_Change]:
    """The changes without allocations that end in the call in which they were made, and without ends of unknown ones."""
    births: dict[int, int] = {}
    dropped: set[int] = set()
    for at, change in enumerate(changes):
        if change.nbytes > 0:
            births[change.address] = at
        elif change.nbytes < 0:
            birth = births.pop(change.address, None)
            if birth is None:
                dropped.add(at)
            elif change.call and changes[birth].call == change.call:
                dropped |= {birth, at}
    return [change for at, change in enumerate(changes) if at not in dropped]
