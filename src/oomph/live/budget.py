"""A limit on the memory of training, on any device, and what training has taken of it.

On CUDA the caching allocator keeps the limit and the statistics. On the CPU there is nobody who does: `LiveStorages` sees every
operator that runs in its thread, in the backward and in what is recomputed too, and counts the storages that come out of
them until their last owner lets go. What a kernel takes for itself and gives back before it returns is not seen, nor is what
other threads and processes make, such as the workers of a data loader.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from oomph.live.tensors import tensors_in
from oomph.units import size

_RESIZES = {"aten::resize_", "aten::resize_as_", "aten::set_", "aten::_resize_output_"}
"""Operators that return their argument, whose storage is another afterwards or has another size."""


class Memory(Protocol):
    """What is taken of a device's memory by tensors, in bytes."""

    @property
    def allocated_bytes(self) -> int:
        """Taken now."""
        ...

    @property
    def peak_bytes(self) -> int:
        """The most that was taken since `reset_peak`."""
        ...

    @property
    def retries(self) -> int:
        """How often the allocator had to give back what it kept for later, before it could serve a request."""
        ...

    def reset_peak(self) -> None:
        """The peak begins anew, with what is taken now."""
        ...


class CudaMemory:
    """What the caching allocator counts.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def allocated_bytes(self) -> int:
        """Bytes in blocks that are in use."""
        return int(self._statistics()["allocated_bytes"]["all"]["current"])

    @property
    def peak_bytes(self) -> int:
        """The most of them since `reset_peak`."""
        return int(self._statistics()["allocated_bytes"]["all"]["peak"])

    @property
    def retries(self) -> int:
        """``num_alloc_retries``."""
        return int(self._statistics()["num_alloc_retries"])

    def reset_peak(self) -> None:
        """The peak begins anew."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def _statistics(self) -> dict[str, Any]:
        return torch.cuda.memory_stats_as_nested_dict(self._device)


class LiveStorages(TorchDispatchMode):
    """Counts the storages that are alive on the CPU, while its block runs.

    Args:
        limit_bytes: none to count only.
        held: tensors that exist already and count too. Others count as soon as an operator returns them.

    Raises:
        torch.OutOfMemoryError: within the block, when an operator's result would exceed the limit.
    """

    retries = 0

    def __init__(self, limit_bytes: int | None = None, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit = limit_bytes
        self._bytes = self._peak = 0
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._makes: dict[Any, bool] = {}
        for tensor in held:
            self._take_in(tensor)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the storages that are alive."""
        return self._bytes

    @property
    def peak_bytes(self) -> int:
        """The most of them since `reset_peak`."""
        return self._peak

    def reset_peak(self) -> None:
        """The peak begins anew."""
        self._peak = self._bytes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs more than the counting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **kwargs) if kwargs else func(*args)
        makes = self._makes.get(func)
        if makes is None:
            makes = self._makes[func] = makes_storages(func)
        if makes:
            for tensor in (outputs,) if isinstance(outputs, Tensor) else tensors_in(outputs):
                self._take_in(tensor)
        return outputs

    def _take_in(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        more = nbytes if known is None else nbytes - known[0]
        if not more:
            return
        total = self._bytes + more
        if self._limit is not None and total > self._limit:
            raise torch.OutOfMemoryError(_refusal(more, self._limit, self._bytes))
        self._bytes = total
        self._peak = max(self._peak, total)
        self._alive[key] = nbytes, known[1] if known else weakref.ref(storage, functools.partial(self._died, key))

    def _died(self, key: int, _: object) -> None:
        self._bytes -= self._alive.pop(key)[0]


def makes_storages(operator: Any) -> bool:
    """Whether an operator may return a storage that its arguments do not have, or change the size of one they have."""
    schema = operator._schema
    if schema.name in _RESIZES or "out" in schema.overload_name or schema.name == "aten::lift_fresh":
        return True
    return any(returned.alias_info is None for returned in schema.returns)


def _refusal(nbytes: int, limit: int, taken: int) -> str:
    """In the words of CUDA's allocator."""
    return (
        f"CPU out of memory. Tried to allocate {size(nbytes)}. The memory limit is {size(limit)} "
        f"of which {size(max(0, limit - taken))} is free. Live tensors hold {size(taken)}."
    )


@contextmanager
def uncounted() -> Iterator[None]:
    """What this thread makes in the block is the host's and not the device's: on the CPU it is not counted."""
    with _disable_current_modes():
        yield


def resident(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Tensor]:
    """The tensors that stay from step to step: parameters, buffers, gradients that are there, the optimizer's states."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for states in optimizer.state.values() if optimizer is not None else ():
        yield from tensors_in(list(states.values()))


def memory_limit(
    limit_bytes: int | None, device: torch.device, held: Iterable[Tensor] = ()
) -> AbstractContextManager[Memory]:
    """Limits the memory that tensors take while the block runs.

    On CUDA the allocator may reserve no more than the limit from the driver; what CUDA itself takes comes on top. On the CPU
    live storages may be no more, and every operator is looked at, which makes small models slower.

    Args:
        limit_bytes: none to count only.
        device: ``cuda`` or ``cpu``.
        held: tensors that exist already; on CUDA the allocator knows them itself. All that is resident, as `resident` finds it,
            unless the block begins before the model is built.

    Raises:
        torch.OutOfMemoryError: within the block, when a request would exceed the limit; at once, when `held` does.
    """
    return LiveStorages(limit_bytes, held) if device.type == "cpu" else _limited_cuda(limit_bytes, device)


@contextmanager
def _limited_cuda(limit_bytes: int | None, device: torch.device) -> Iterator[Memory]:
    if limit_bytes is None:
        yield CudaMemory(device)
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    # The allocator cuts the product off to whole bytes; half a byte more makes up for the fraction's rounding.
    torch.cuda.set_per_process_memory_fraction(min(before, (limit_bytes + 0.5) / total), device)
    try:
        yield CudaMemory(device)
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
