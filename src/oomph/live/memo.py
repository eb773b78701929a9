"""Runs operators on fake tensors from memory: an operator seen before with the same shapes gives the same shapes again.

A step runs the same few hundred calls thousands of times. `FakeTensorMode` has such a memory too, but its keys cost most
of the time of a trace. Only operators that make new tensors and change nothing are remembered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from oomph.live.fake import know, really_run
from oomph.live.tensors import tensors_in

_CPU = torch.device("cpu")
_aten = torch.ops.aten
_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.transpose.int,
    _aten.t.default,
    _aten.permute.default,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.detach.default,
    _aten.alias.default,
    _aten.as_strided.default,
}


class _Made(NamedTuple):
    """An output: its sizes, strides and dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Unfit(Exception):
    """The call has an argument that no key is made of."""


class Memo:
    """The memory of one fake mode."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._made: dict[Any, list[_Made] | _Made | None] = {}
        self._pure: dict[Any, bool] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator's outputs, new ones in each call."""
        if func in _VIEWS and isinstance(args[0], FakeTensor):
            return self._view(func, args, kwargs)
        pure = self._pure.get(func)
        if pure is None:
            pure = self._pure[func] = _pure(func)
        if not pure:
            return func(*args, **kwargs)
        try:
            key = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else None)
        except _Unfit:
            return func(*args, **kwargs)
        found = self._made.get(key)
        if found is None:
            outputs = func(*args, **kwargs)
            if key not in self._made:
                self._made[key] = _describe(outputs, {t.untyped_storage()._cdata for t in tensors_in(args)})
            return outputs
        if isinstance(found, _Made):
            return self._make(found)
        return tuple(self._make(made) for made in found)

    def _view(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """A view of a fake tensor, with the values of its base where those are known."""
        with in_kernel_invocation_manager(self._mode):
            meta = func(*args, **kwargs)
        view: Tensor = FakeTensor(self._mode, meta, _CPU)
        if args[0].constant is not None:
            know(view, really_run(func, (args[0].constant, *args[1:]), kwargs))
        return view

    def _make(self, made: _Made) -> Tensor:
        guard = torch._C._DisableTorchDispatch()
        meta = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
        del guard
        result: Tensor = FakeTensor(self._mode, meta, _CPU)
        return result


def _pure(func: Any) -> bool:
    """Whether the operator makes new tensors and changes none. One with a random result is as good as any other."""
    schema = func._schema
    if schema.is_mutable or func.namespace != "aten" or not schema.returns:
        return False
    tensors = all(str(value.type) == "Tensor" and value.alias_info is None for value in schema.returns)
    return tensors and torch.Tag.data_dependent_output not in func.tags and torch.Tag.dynamic_output_shape not in func.tags


def _key(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        if value.constant is not None:
            raise _Unfit
        return value.shape, value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, tuple | list):
        return tuple(_key(item) for item in value)
    if isinstance(value, Tensor):
        raise _Unfit
    return type(value), value


def _describe(outputs: Any, inputs: set[int]) -> list[_Made] | _Made | None:
    """What to make again; none where an output shares a storage, has values, or does not fill its storage."""
    if isinstance(outputs, FakeTensor):
        storage = outputs.untyped_storage()
        if outputs.constant is not None or outputs.storage_offset() or storage._cdata in inputs:
            return None
        made = _Made(tuple(outputs.shape), outputs.stride(), outputs.dtype)
        return made if _filled_bytes(made) == storage.nbytes() else None
    if isinstance(outputs, tuple):
        several = [_describe(item, inputs) for item in outputs]
        return [item for item in several if isinstance(item, _Made)] if all(isinstance(m, _Made) for m in several) else None
    return None


def _filled_bytes(made: _Made) -> int:
    if 0 in made.shape:
        return 0
    last = sum((extent - 1) * stride for extent, stride in zip(made.shape, made.stride, strict=True))
    return (last + 1) * made.dtype.itemsize
