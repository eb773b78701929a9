"""Answers to what model code asks of a tensor's values, which a fake tensor does not have.

* Small tensors made from numbers (grids of patches, positions) keep their values beside the fake, and so does what is
  computed from them.
* transformers' helpers for images of any size compute with such values: they run for real.
* Where code keeps the elements that satisfy a condition on values that nobody knows, all do, and counts that are
  compared with a number differ from it (Idefics3 looks for images that are all padding): the worst case.
* Grouped products run in any precision, as the real kernels do.
* transformers looks in the position ids for several sequences packed in one row; a real run with plain positions finds
  none and drops the mask, but with fake tensors, which it takes for a graph capture, it keeps one.
* AdamW reads its step counter, which lives on the CPU.
* A scaler of the loss reads whether all gradients are finite: they are.
* A list of a tensor's values is read at once, as a copy from the GPU would.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers.masking_utils as masking
import transformers.vision_utils as vision_utils
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CONSTANTS = 1 << 20
VIEWS = 1 << 40

_aten = torch.ops.aten
_ARANGE = {_aten.arange.default, _aten.arange.start, _aten.arange.start_step}


class WorstCase(TorchDispatchMode):
    """Gives values to ranges and lets every condition select everything. Enter it inside the fake mode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator; `nonzero` and boolean indices on values that nobody knows select all."""
        kwargs = kwargs or {}
        if func is _aten.nonzero.default and _unknown(args[0]):
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        if func is _aten.index.Tensor and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
            return func(args[0], [number for i in args[1] for number in _numbers(i)])
        if func is _aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return _grouped(args, kwargs)
        out = func(*args, **kwargs)
        if func in _ARANGE and _unknown(out) and out.numel() <= CONSTANTS:
            know(out, really_run(func, args, kwargs))
        if func is _aten.ne.Scalar and _unknown(out) and out.dim() == 1 and args[0].dtype == torch.long:
            know(out, really_run(torch.ones, (out.shape,), {"dtype": torch.bool}))
        return out


def _grouped(args: Any, kwargs: Any) -> Tensor:
    """``_grouped_mm`` in a precision that its fake kernel refuses; real ones take it."""
    left, right, *rest = args
    halves = (torch.empty_like(matrix, dtype=torch.bfloat16) for matrix in (left, right))
    return torch.empty_like(_aten._grouped_mm.default(*halves, *rest, **kwargs), dtype=left.dtype)


def _unknown(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def _numbers(index: Any) -> list[Any]:
    """A boolean index as the numbers of the elements it selects, one tensor for each of its dimensions."""
    if not isinstance(index, Tensor) or index.dtype != torch.bool:
        return [index]
    if _unknown(index):
        return [index.new_empty((index.numel(),), dtype=torch.long) for _ in range(index.dim())]
    values = index.constant if isinstance(index, FakeTensor) else index
    assert values is not None
    found = really_run(values.nonzero, (), {"as_tuple": True})
    return [_faked(numbers) for numbers in found]


def really_run(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a function on real tensors, on the CPU, unseen by any mode."""
    with unset_fake_temporarily(), torch.utils._python_dispatch._disable_current_modes():
        return function(*args, **({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))


def know(fake: Tensor, real: Tensor) -> None:
    """Gives a fake tensor the values of a real one of its shape."""
    assert isinstance(fake, FakeTensor)
    fake.constant = real
    fake.fake_mode.fake_tensor_converter.add_constant_storage_mapping(fake)


def known(make: Callable[[], Tensor]) -> Tensor:
    """A fake tensor with the values of the real one that `make` makes; an operator makes it, so that it is recorded."""
    return _faked(really_run(make, (), {}))


@contextmanager
def answering(without: Collection[str] = ()) -> Iterator[None]:
    """Model code that runs in the block gets the answers that this file's first lines list.

    Args:
        without: names of CUDA rules that are switched off; ``packed-mask-dropped`` is one of them.
    """
    adam: Any = importlib.import_module("torch.optim.adam")
    packed, value = masking.find_packed_sequence_indices, adam._get_value

    def none_packed(position_ids: Tensor) -> None:
        packed(position_ids)

    with (
        mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", VIEWS),
        mock.patch.object(masking, "find_packed_sequence_indices", packed if "packed-mask-dropped" in without else none_packed),
        mock.patch.object(adam, "_get_value", lambda x: 1.0 if isinstance(x, Tensor) else value(x)),
        mock.patch.object(FakeTensor, "tolist", _as_list),
        mock.patch.object(torch.amp.GradScaler, "_maybe_opt_step", _stepping),
        _real_helpers(),
    ):
        yield


def _stepping(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, state: Any, *args: Any, **kwargs: Any) -> Any:
    return optimizer.step(*args, **kwargs)


_one_by_one = FakeTensor.tolist


def _as_list(fake: FakeTensor) -> Any:
    """``tolist``, which copies the values once where they are known, and does not make a tensor of each."""
    return _one_by_one(fake) if fake.constant is None else really_run(fake.constant.tolist, (), {})


@contextmanager
def _real_helpers() -> Iterator[None]:
    """Lets the functions of transformers' vision_utils run on real values, wherever they were imported."""
    functions = [function for _, function in inspect.getmembers(vision_utils, inspect.isfunction)]
    helpers = {function: _really(function) for function in functions if function.__module__ == vision_utils.__name__}
    replaced: list[tuple[Any, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models."):
            for attribute, found in list(vars(module).items()):
                if inspect.isfunction(found) and found in helpers:
                    replaced.append((module, attribute, found))
                    setattr(module, attribute, helpers[found])
    try:
        yield
    finally:
        for module, attribute, found in replaced:
            setattr(module, attribute, found)


def _really(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(_unknown(tensor) for tensor in tensors):
            return function(*args, **kwargs)
        real_args, real_kwargs = tree_map_only(FakeTensor, lambda t: t.constant, (args, kwargs))
        out = really_run(function, real_args, real_kwargs)
        return tree_map_only(Tensor, _faked, out)

    return run


def _faked(real: Tensor) -> Tensor:
    fake = torch.empty_like(real)
    if real.numel() <= CONSTANTS:
        know(fake, real)
    return fake
