"""Runs operators on fake tensors from memory: an operator seen before with the same shapes gives the same shapes again.

A step runs the same few hundred calls thousands of times. `FakeTensorMode` has such a memory too, but its keys cost most
of the time of a trace. Remembered are operators that make new tensors and change nothing, and operators that write into
tensors that they are given and leave the shapes of these as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from oomph.live.fake import know, really_run
from oomph.live.tensors import tensors_in

_CPU = torch.device("cpu")
_NAMESPACES = ("aten", "oomph_cuda")
_WRITTEN = object()
"""In place of an output: the first argument, which the operator has written into."""
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
    """The call has an argument that no key is made of, or an output that cannot be made again."""


class Memo:
    """The memory of one fake mode."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._made: dict[Any, tuple[Any] | None] = {}
        self._rememberable: dict[Any, bool] = {}
        self._attributes = dict(vars(FakeTensor(mode, torch.empty(0, device="meta"), _CPU)))

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator's outputs, new ones in each call."""
        if func in _VIEWS and isinstance(args[0], FakeTensor):
            return self._view(func, args, kwargs)
        rememberable = self._rememberable.get(func)
        if rememberable is None:
            rememberable = self._rememberable[func] = _makes(func) or _writes(func)
        if not rememberable:
            return func(*args, **kwargs)
        try:
            key = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else None)
        except _Unfit:
            return func(*args, **kwargs)
        found = self._made.get(key)
        if found is not None:
            return self._again(found[0], args)
        outputs = func(*args, **kwargs)
        if key not in self._made:
            self._made[key] = _remembered(key, args, kwargs, outputs)
        return outputs

    def _again(self, output: Any, args: Any) -> Any:
        """What the description of an output stands for."""
        if isinstance(output, _Made):
            return self._make(output)
        if isinstance(output, tuple | list):
            return type(output)(self._again(item, args) for item in output)
        return args[0] if output is _WRITTEN else output

    def _view(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """A view of a fake tensor, with the values of its base where those are known."""
        with in_kernel_invocation_manager(self._mode):
            meta = func(*args, **kwargs)
        view = self._fake(meta)
        if args[0].constant is not None:
            know(view, really_run(func, (args[0].constant, *args[1:]), kwargs))
        return view

    def _make(self, made: _Made) -> Tensor:
        guard = torch._C._DisableTorchDispatch()
        meta = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
        del guard
        return self._fake(meta)

    def _fake(self, meta: Tensor) -> Tensor:
        """``FakeTensor(mode, meta, "cpu")`` without its checks of the arguments, which take most of its time."""
        fake: Tensor = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=_CPU)
        torch._C._set_throw_on_mutable_data_ptr(fake)
        fake.__dict__.update(self._attributes)
        return fake


def _makes(func: Any) -> bool:
    """Whether the operator makes new tensors and changes none. One with a random result is as good as any other."""
    schema = func._schema
    if schema.is_mutable or func.namespace not in _NAMESPACES or not schema.returns:
        return False
    made = all(value.alias_info is None for value in schema.returns)
    return made and torch.Tag.data_dependent_output not in func.tags and torch.Tag.dynamic_output_shape not in func.tags


def _writes(func: Any) -> bool:
    """Whether the operator writes into tensors it is given, and returns the first of them or nothing."""
    schema = func._schema
    in_place = schema.is_mutable and schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags
    return in_place and func.namespace in _NAMESPACES and len(schema.returns) <= 1


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


def _remembered(key: Any, args: Any, kwargs: Any, outputs: Any) -> tuple[Any] | None:
    """The description of the outputs, in a tuple; None where the call has to be run each time."""
    func = key[0]
    try:
        if not func._schema.is_mutable:
            return (_described(outputs, {tensor.untyped_storage()._cdata for tensor in tensors_in(args)}),)
        same = _key(args) == key[1] and (outputs is args[0] if func._schema.returns else outputs is None)
    except _Unfit:
        return None
    return (_WRITTEN if func._schema.returns else None,) if same else None


def _described(output: Any, inputs: set[int]) -> Any:
    """An output as it can be made again.

    Raises:
        _Unfit: a tensor shares a storage, has values, or does not fill its storage.
    """
    if isinstance(output, FakeTensor):
        storage = output.untyped_storage()
        made = _Made(tuple(output.shape), output.stride(), output.dtype)
        shares = output.storage_offset() or storage._cdata in inputs
        if output.constant is not None or shares or _filled_bytes(made) != storage.nbytes():
            raise _Unfit
        return made
    if isinstance(output, tuple | list):
        return type(output)(_described(item, inputs) for item in output)
    if isinstance(output, Tensor | torch.SymInt | torch.SymFloat):
        raise _Unfit
    return output


def _filled_bytes(made: _Made) -> int:
    if 0 in made.shape:
        return 0
    last = sum((extent - 1) * stride for extent, stride in zip(made.shape, made.stride, strict=True))
    return (last + 1) * made.dtype.itemsize
