"""What a training step meets on a machine with a GPU, for one that runs without: its words for devices, and values.

* Every tensor of the step is the GPU's. ``.cuda()``, ``.to("cuda")`` and ``device="cuda"`` leave a tensor where it is;
  ``.cpu()`` and ``.to("cpu")`` copy it into host memory, where the copy is not counted, nor what is computed from it.
* Numbers that the step reads from floating-point tensors, as a loss for a log, are 1.0, and all values are finite. Such
  a number refuses to become an integer, since a size might be made of it.
* Optimizers and clipping choose their implementations as they do for tensors on a GPU.
* transformers reads masks and position ids whose values are known, as a run does, and drops a mask that hides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.optim.optimizer as optimizers
import torch.utils._foreach_utils as foreach
import transformers.masking_utils as masking
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from oomph.live.fake import CONSTANTS, WorstCase, know, really_run
from oomph.live.offload import host_memory
from oomph.live.phases import StepRecorder
from oomph.live.tensors import tensors_in

_aten = torch.ops.aten
_READ = _aten._local_scalar_dense.default
_SELECTING = {_aten.nonzero.default, _aten.index.Tensor, _aten.ne.Scalar}
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_CPU = torch.device("cpu")
_MOST_BYTES = 8 * CONSTANTS
"""Larger tensors' values are forgotten, as computing with them would take long."""
_find_packed = masking.find_packed_sequence_indices
_is_tracing: Callable[[Any], bool] = vars(masking)["is_tracing"]


class Reading(float):
    """A number read from a fake tensor: 1.0, whatever is computed from it, and never an integer."""

    def _refuse(self, *_: Any) -> int:
        raise DataDependentOutputException(_READ)

    __int__ = __trunc__ = __floor__ = __ceil__ = _refuse

    def __round__(self, digits: int | None = None) -> Any:  # type: ignore[override]
        """The number itself, as one rounds it for a log; not to an integer."""
        return self._refuse() if digits is None else self


def _computed(name: str) -> Callable[..., Any]:
    plain: Callable[..., Any] = getattr(float, name)

    def compute(self: float, *others: Any) -> Any:
        found = plain(self, *others)
        return Reading(found) if isinstance(found, float) else found

    return compute


for _operation in "add radd sub rsub mul rmul truediv rtruediv neg pos abs mod rmod pow rpow".split():
    setattr(Reading, f"__{_operation}__", _computed(f"__{_operation}__"))


class Values(WorstCase):
    """Answers what a step asks of values.

    Args:
        worst_case: whether conditions on values that nobody knows select everything; if not, the step fails there.

    Attributes:
        read: whether a value was read that nobody knows.
        selected: whether a condition selected everything.
    """

    def __init__(self, worst_case: bool) -> None:
        super().__init__()
        self._worst_case = worst_case
        self.read = self.selected = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator; numbers whose value is known stay known when they are changed in place."""
        kwargs = kwargs or {}
        if func is _READ and args[0].constant is None and args[0].is_floating_point():
            self.read = True
            return 1.0
        if func is _aten.masked_select.default and self._worst_case:
            self.selected = True
            return args[0].new_empty((math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape)),))
        if func in _SELECTING and not self._all_known(func, args):
            if not self._worst_case:
                return func(*args, **kwargs)
            self.selected = True
        numbers = _known_numbers(func, args, kwargs)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for fake, value in numbers:
            know(fake, value)
        for fake in tensors_in(out):
            if isinstance(fake, FakeTensor) and fake.constant is not None and _nbytes(fake.constant) > _MOST_BYTES:
                fake.constant = None
        return out

    @staticmethod
    def _all_known(func: Any, args: Any) -> bool:
        asked = [args[0]] if func is not _aten.index.Tensor else [i for i in args[1] if i is not None and i.dtype == torch.bool]
        return all(not isinstance(tensor, FakeTensor) or tensor.constant is not None for tensor in asked)


def _nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _known_numbers(func: Any, args: Any, kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    """The numbers that an operator changes in place and that are known, with what it makes of them."""
    if not func._schema.is_mutable or func.namespace != "aten" or kwargs:
        return []
    fakes: list[Any] = list(tensors_in(args))
    if not fakes or any(not isinstance(fake, FakeTensor) or fake.constant is None or fake.dim() for fake in fakes):
        return []
    changed = {argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write}
    written = [
        fake
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.name in changed
        for fake in tensors_in(value)
    ]
    values = {id(fake): really_run(fake.constant.clone, (), {}) for fake in fakes}
    really_run(lambda: func(*tree_map_only(Tensor, lambda fake: values[id(fake)], args)), (), {})
    return [(fake, values[id(fake)]) for fake in written]


class Surroundings(TorchFunctionMode):
    """Answers to functions of torch that ask for a device or for a value. Enter it before `CudaFunctions`.

    Args:
        recorder: is told when a backward runs, and knows what lies in host memory.
        values: is told when a value is read.
        gpu: whether there is to be a GPU; if not, the step runs on the CPU, whose copies to itself are none.

    Attributes:
        recurrent: whether a recurrent layer of torch ran.
    """

    def __init__(self, recorder: StepRecorder, values: Values, gpu: bool) -> None:
        super().__init__()
        self._recorder, self._values, self._gpu = recorder, values, gpu
        self.recurrent = False
        self._handlers: dict[Any, Callable[..., Any]] = {
            Tensor.backward: self._backward(Tensor.backward),
            torch.autograd.backward: self._backward(torch.autograd.backward),
            torch.autograd.grad: self._backward(torch.autograd.grad),
            Tensor.to: self._to,
            Tensor.cuda: lambda tensor, *args, **kwargs: self._to_gpu(tensor),
            Tensor.cpu: lambda tensor, **kwargs: self._to_host(tensor),
            Tensor.item: self._item,
            Tensor.tolist: self._tolist,
            Tensor.__float__: lambda tensor: float(self._item(tensor)),
            Tensor.__int__: lambda tensor: int(self._item(tensor)),
            Tensor.__bool__: self._truth,
            Tensor.__format__: self._format,
        }
        for name, finite in (("isfinite", True), ("isnan", False), ("isinf", False)):
            for function in (getattr(torch, name), getattr(Tensor, name)):
                self._handlers[function] = self._finite(function, finite)
        for name in _RECURRENT:
            self._handlers[getattr(torch, name)] = self._recur(getattr(torch, name))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the answer to a function where there is one, else the function; ``cuda`` is where all tensors are."""
        kwargs = kwargs or {}
        if kwargs.get("device") is not None and _names_gpu(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        return self._handlers.get(func, func)(*args, **kwargs)

    def _backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            engine: Callable[..., Any] = vars(torch.autograd)["_engine_run_backward"]

            def with_mode(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return engine(*args, **kwargs)

            with self._recorder.backward(), mock.patch.object(torch.autograd, "_engine_run_backward", with_mode):
                return function(*args, **kwargs)

        return run

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``Tensor.to``: a device object is that of the model's weights, the GPU; the word "cpu" is the host."""
        device = kwargs.pop("device", args[0] if args and isinstance(args[0], str | int | torch.device) else None)
        if args and isinstance(args[0], str | int | torch.device):
            args = args[1:]
        if device is None:
            return tensor.to(*args, **kwargs)
        moved = self._to_host(tensor) if device == "cpu" else self._to_gpu(tensor)
        return moved.to(_CPU, *args, **kwargs)

    def _to_gpu(self, tensor: Tensor) -> Tensor:
        tensor = self._recorder.known_here(tensor)
        return _copied(tensor) if self._recorder.on_host(tensor) else tensor

    def _to_host(self, tensor: Tensor) -> Tensor:
        tensor = self._recorder.known_here(tensor)
        if not self._gpu or self._recorder.on_host(tensor):
            return tensor
        with host_memory():
            return _copied(tensor)

    def _item(self, tensor: Tensor) -> Any:
        if not (_is_unknown(tensor) and tensor.numel() == 1 and tensor.is_floating_point()):
            return tensor.item()
        self._values.read |= self._recorder.phase != "optimizer"  # no optimizer's memory depends on what it reads
        return Reading(1.0)

    def _tolist(self, tensor: Tensor) -> Any:
        if not _is_unknown(tensor) or not tensor.is_floating_point():
            return tensor.tolist()
        self._values.read = True
        return tree_map_only(float, Reading, really_run(torch.ones(0).new_ones, (tuple(tensor.shape),), {}).tolist())

    @staticmethod
    def _truth(tensor: Tensor) -> bool:
        if _is_unknown(tensor):
            raise DataDependentOutputException(_READ)
        return bool(tensor)

    def _format(self, tensor: Tensor, specification: str) -> str:
        return format(self._item(tensor), specification) if tensor.dim() == 0 else str(tensor)

    def _finite(self, function: Callable[..., Any], finite: bool) -> Callable[..., Any]:
        def run(tensor: Tensor) -> Any:
            out = function(tensor)
            if isinstance(out, FakeTensor) and out.constant is None and out.numel() <= CONSTANTS:
                know(out, really_run(torch.full, (out.shape, finite), {}))
            return out

        return run

    def _recur(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.recurrent = True
            return function(*args, **kwargs)

        return run


def _is_unknown(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def _names_gpu(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")


_make_scaler = torch.amp.GradScaler.__init__


def _scaler_on_the_cpu(self: torch.amp.GradScaler, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
    _make_scaler(self, "cpu" if _names_gpu(device) else device, *args, **kwargs)


def _giving(value: Any) -> Callable[..., Any]:
    def give(*_: Any, **__: Any) -> Any:
        return value

    return give


def _copied(tensor: Tensor) -> Tensor:
    copy = torch.empty_like(tensor).copy_(tensor)
    if isinstance(tensor, FakeTensor) and tensor.constant is not None:
        know(copy, really_run(tensor.constant.clone, (), {}))
    return copy


@contextmanager
def as_real(gpu: bool) -> Iterator[None]:
    """Code that tells real tensors from fake ones, or the GPU's from the CPU's, does as in a run. Enter it in `answering`."""
    types = [*optimizers._foreach_supported_types, FakeTensor]
    devices = [*foreach._get_foreach_kernels_supported_devices(), "cpu"]
    no_samples_packed = masking.find_packed_sequence_indices

    def packed(position_ids: Tensor) -> Tensor | None:
        return (no_samples_packed if _is_unknown(position_ids) else _find_packed)(position_ids)

    def tracing(tensor: Any = None) -> bool:
        return _is_tracing(None if isinstance(tensor, FakeTensor) and not _is_unknown(tensor) else tensor)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(masking, "find_packed_sequence_indices", packed))
        stack.enter_context(mock.patch.object(masking, "is_tracing", tracing))
        if gpu:
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(mock.patch.object(torch.amp.GradScaler, "__init__", _scaler_on_the_cpu))
        for module in (optimizers, torch.optim.swa_utils) if gpu else ():
            stack.enter_context(mock.patch.object(module, "_get_foreach_kernels_supported_devices", _giving(devices)))
        stack.enter_context(mock.patch.object(optimizers, "_foreach_supported_types", types))
        stack.enter_context(mock.patch.object(foreach, "_foreach_supported_types", types))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", _giving(None)))
        yield
