"""What a rule says: the allocations that a CUDA kernel makes besides its outputs, and the device facts it depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Extra(NamedTuple):
    """An allocation inside a kernel that is freed when the op returns.

    Attributes:
        shape: elements per dimension.
        dtype: element type; ``torch.uint8`` where the kernel asks for bytes.
        name: the variable's name in the kernel's source.
        size: for bytes that are no product of dimensions, the name in `kernel_sizes.SIZES` of what gives them.
        arguments: what `size` is called with.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str
    size: str = ""
    arguments: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """What the allocator is asked for."""
        count = self.dtype.itemsize
        for extent in self.shape:
            count *= extent
        return count


def sized(name: str, size: Callable[..., int], *arguments: int) -> Extra:
    """An extra of as many bytes as `size`, one of `kernel_sizes.SIZES`, gives; of none where the kernel does without."""
    numbers = tuple(int(argument) for argument in arguments)
    return Extra((size(*numbers),), torch.uint8, name, size.__name__, numbers)


class Program(NamedTuple):
    """The hidden allocations of one op call, in order.

    Attributes:
        before: allocated before the outputs.
        after: allocated after the outputs; an int ``i`` frees the ``i``-th ``Extra`` of ``after`` at that point. What
            remains is freed when the op returns, in order, ``before`` first.
    """

    before: tuple[Extra, ...] = ()
    after: tuple[Extra | int, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most bytes that the hidden allocations hold at one time."""
        live = peak = sum(extra.bytes for extra in self.before)
        extras = [step for step in self.after if isinstance(step, Extra)]
        for step in self.after:
            live += step.bytes if isinstance(step, Extra) else -extras[step].bytes
            peak = max(peak, live)
        return peak


class _Architecture(NamedTuple):
    shared_memory_per_block: int
    threads_per_multiprocessor: int
    multiprocessors: int


_ARCHITECTURES = {
    (7, 0): _Architecture(98304, 2048, 80),
    (7, 5): _Architecture(65536, 1024, 40),
    (8, 0): _Architecture(166912, 2048, 108),
    (8, 6): _Architecture(101376, 1536, 84),
    (8, 9): _Architecture(101376, 1536, 142),
    (9, 0): _Architecture(232448, 2048, 132),
    (10, 0): _Architecture(232448, 2048, 148),
    (10, 3): _Architecture(232448, 2048, 148),
    (12, 0): _Architecture(101376, 1536, 170),
    (12, 1): _Architecture(101376, 1536, 48),
}


@dataclass(frozen=True)
class Device:
    """The device facts that the rules depend on.

    Attributes:
        capability: compute capability, ``(8, 0)`` for sm_80.
        multiprocessors: streaming multiprocessors; ``None`` takes the count of the largest data-centre or workstation
            card of that capability. It decides how a large reduction is split, and whether flash attention splits keys.
        cudnn: the cuDNN version as ``cudnnGetVersion`` gives it; 0 stands for a build without cuDNN attention. The
            torch 2.13 wheels come with 9.20.
        unified_workspaces: whether cuBLASLt shares the workspace of cuBLAS, as in torch 2.11 and later.
        cublas_workspace_config: what ``CUBLAS_WORKSPACE_CONFIG`` says there, as in ``:4096:8``; empty where it is not set.
    """

    capability: tuple[int, int]
    multiprocessors: int | None = None
    cudnn: int = 92000
    unified_workspaces: bool = True
    cublas_workspace_config: str = ""

    @property
    def sm(self) -> int:
        """Compute capability as one number: 86 for sm_86."""
        return self.capability[0] * 10 + self.capability[1]

    @property
    def multiprocessor_count(self) -> int:
        """Streaming multiprocessors, ``cudaDeviceProp::multiProcessorCount``."""
        return self.multiprocessors or self._architecture.multiprocessors

    @property
    def threads_per_multiprocessor(self) -> int:
        """``cudaDeviceProp::maxThreadsPerMultiProcessor`` (CUDA C++ Programming Guide, compute capabilities)."""
        return self._architecture.threads_per_multiprocessor

    @property
    def shared_memory_per_block(self) -> int:
        """``cudaDeviceProp::sharedMemPerBlockOptin`` in bytes (CUDA C++ Programming Guide, compute capabilities)."""
        return self._architecture.shared_memory_per_block

    @property
    def _architecture(self) -> _Architecture:
        known = [capability for capability in _ARCHITECTURES if capability <= self.capability]
        return _ARCHITECTURES[max(known, default=min(_ARCHITECTURES))]


Arguments = dict[str, Any]
Rule = Callable[[Device, Arguments, tuple[torch.Tensor, ...]], Program | None]


def bind(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The call's arguments by name, defaults included. The dispatcher may pass any argument by position."""
    bound: Arguments = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args) and not argument.kwarg_only:
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound
