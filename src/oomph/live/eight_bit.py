"""bitsandbytes' AdamW with states of 8 bits, and the answers that its code gets while it is traced.

Checked with bitsandbytes 0.50.2. Its optimizer runs as it is, on fake tensors that claim to lie on the CPU. What it asks there
that a tensor on a GPU would answer otherwise, in ``bitsandbytes/optim/optimizer.py`` and ``bitsandbytes/functional.py``:

* ``create_dynamic_map`` makes the two maps of the 256 values of a byte from numbers, in host memory, which it does for real.
  The first state of 8 bits moves both to its device (``init_state``): two tensors that all parameters share.
* ``get_state_buffer`` asks whether the parameter lies on the CPU, where no state is paged. It does not.
* ``get_paged`` takes large states from CUDA's managed memory, which is not the caching allocator's: they count as host memory.
  ``fill`` and ``prefetch_tensor`` write into such memory and move it, and allocate nothing.
* ``GlobalPageManager`` keeps every paged tensor of the process: those of a trace are taken out again.

The rest is true of both: ``is_on_gpu`` finds all tensors on one device, and ``sync_gpu`` waits for a GPU alone, which allocates
nothing. The updates are operators without outputs, ``optimizer_update_32bit`` and ``optimizer_update_8bit_blockwise``: they
launch one kernel each, which allocates nothing (``bitsandbytes/backends/cuda/ops.py``, ``csrc/ops.cu``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from oomph.errors import UserError
from oomph.live.fake import really_run
from oomph.live.offload import host_memory


def bitsandbytes_adamw(kind: str) -> Callable[..., torch.optim.Optimizer]:
    """The class of an optimizer of ``oomph.core.eight_bit.EIGHT_BIT``.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    name = {"adamw-8bit": "AdamW8bit", "adamw-8bit-paged": "PagedAdamW8bit"}[kind]
    made: Callable[..., torch.optim.Optimizer] = getattr(_module("bitsandbytes.optim", kind), name)
    return made


@contextmanager
def on_a_gpu(kind: str) -> Iterator[None]:
    """Fake tensors are taken for tensors on a GPU by bitsandbytes' optimizer in the block.

    Args:
        kind: the optimizer, which a message names.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    functional, optimizer = (_module(f"bitsandbytes.{name}", kind) for name in ("functional", "optim.optimizer"))
    make_map, make_state = functional.create_dynamic_map, optimizer.Optimizer8bit.get_state_buffer

    def map_in_host_memory(*args: Any, **kwargs: Any) -> _HostMap:
        return _HostMap(really_run(make_map, args, kwargs))

    def state(self: Any, parameter: Tensor, dtype: torch.dtype = torch.float32) -> Any:
        return make_state(self, _OnGpu(parameter), dtype=dtype)

    with (
        mock.patch.object(functional, "create_dynamic_map", map_in_host_memory),
        mock.patch.object(optimizer.Optimizer8bit, "get_state_buffer", state),
        mock.patch.object(functional, "get_paged", _paged),
        mock.patch.object(functional, "fill"),
        mock.patch.object(functional, "prefetch_tensor"),
        mock.patch.object(functional.GlobalPageManager.get_instance(), "paged_tensors", []),
    ):
        yield


def _module(name: str, kind: str) -> Any:
    """A module of bitsandbytes, which makes tensors of its own when it is imported."""
    try:
        really_run(importlib.import_module, ("bitsandbytes",), {})
    except ModuleNotFoundError as missing:
        if missing.name != "bitsandbytes":
            raise
        hint = 'pip install "oomph[quantized]", or take another optimizer'
        raise UserError(f"optimizer {kind} is bitsandbytes', which is not installed", hint) from None
    return really_run(importlib.import_module, (name,), {})


class _HostMap:
    """A map in host memory, of which a GPU gets a copy."""

    def __init__(self, values: Tensor) -> None:
        self._shape = values.shape

    def to(self, device: torch.device) -> Tensor:
        """The copy, from then on a tensor like others."""
        with host_memory():
            host = torch.empty(self._shape, device=device)
        copied: Tensor = torch.ops.aten._to_copy.default(host)
        return copied


class _OnGpu:
    """A parameter that says it lies on a GPU; what is made like it lies where the parameter does."""

    device = torch.device("cuda", 0)

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self.shape, self.numel = parameter.shape, parameter.numel

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        parameter = args[0]._parameter
        return func(parameter, *args[1:], **{**(kwargs or {}), "device": parameter.device})


def _paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with host_memory():
        managed: Any = torch.empty(shape, dtype=dtype)
    managed.is_paged, managed.page_deviceid = True, device.index
    return managed  # type: ignore[no-any-return]
