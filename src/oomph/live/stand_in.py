"""Copies of a model and of a batch on fake tensors, which leave what they are made from as it is.

A copy of a module is Python's own (``copy.deepcopy``), except that every tensor in it becomes a fake one on the way: no
weight is copied. Tied weights stay tied, small integers and bools keep their values, gradients are not taken along.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from oomph.errors import UserError
from oomph.live.fake import CONSTANTS, know

_PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)
_SHOWN = 4


class _Faking(TorchFunctionMode):
    """Lets ``copy.deepcopy`` make a fake tensor where it meets a tensor."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._make = make

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Copies a tensor as a fake one; every other function is called as it is."""
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self._make(tensor)
        return memo[id(tensor)]


def fake_of(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor on the CPU of a tensor's shape and dtype, with its values where they are few and no floats.

    It lies in memory of its own, and as a copy to another device would lie there.
    """
    with torch.no_grad(), torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        meta = torch.empty_like(tensor, device="meta", requires_grad=False)
        fake: Tensor = FakeTensor(mode, meta, torch.device("cpu"))
        if has_values(tensor):
            know(fake, tensor.detach().to("cpu", copy=True))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad) if tensor.requires_grad else fake


def has_values(tensor: Tensor) -> bool:
    """Whether the values of a tensor are carried over: they are few integers or bools, and known."""
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return whole and not tensor.is_meta and not isinstance(tensor, FakeTensor) and tensor.numel() <= CONSTANTS


def copy_model(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model on fake tensors.

    Raises:
        UserError: it is something that cannot be traced, or cannot be copied.
    """
    _refuse(model)
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): fake_of(tensor, mode) for tensor in tensors}
    try:
        with _Faking(lambda tensor: fake_of(tensor, mode)):
            copied: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:  # what a module's attributes raise when they are copied
        raise UserError(
            f"the model cannot be copied: {type(error).__name__}: {error}",
            "a prediction runs a copy, so that your model stays as it is: keep locks, files and the like out of the modules, "
            "or give the class that holds them a __deepcopy__",
        ) from error
    return copied


def copy_batch(batch: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """A batch with a tensor that `make` makes for each tensor in it; what cannot be copied is passed as it is.

    Raises:
        UserError: a tensor is of a kind that cannot be traced.
    """
    memo: dict[int, Any] = {}

    def made(tensor: Tensor) -> Tensor:
        if not _is_plain(tensor):
            raise UserError(f"the batch holds a {_kind(tensor)}, and only plain dense tensors can be traced")
        return make(tensor)

    def copied(leaf: Any) -> Any:
        try:
            with _Faking(made):
                return copy.deepcopy(leaf, memo)
        except UserError:
            raise
        except Exception:  # what objects raise that were not made to be copied
            return leaf

    return tree_map(copied, batch)


# What cannot be traced.


def _refuse(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(
            f"the model is a {type(model).__name__}, not an nn.Module", "to trace several modules, pass an nn.ModuleDict"
        )
    problems = [problem for path, module in model.named_modules() for problem in _module_problems(path or "the model", module)]
    named = [*model.named_parameters(), *model.named_buffers()]
    problems += [problem for name, tensor in named for problem in _tensor_problems(name, tensor)]
    if problems:
        more = len(problems) - _SHOWN
        raise UserError([*problems[:_SHOWN], *([f"and {more} more like these"] if more > 0 else [])])


def _module_problems(path: str, module: nn.Module) -> Iterator[str]:
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    if (compiled and isinstance(module, compiled)) or getattr(module, "_compiled_call_impl", None) is not None:
        yield f"{path} is compiled, and compiled code allocates otherwise than eager code: pass the module before torch.compile"
    elif isinstance(module, torch.jit.ScriptModule):
        yield f"{path} is a TorchScript module, whose code cannot be traced: pass the module that it was made from"
    elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        yield f"{path} is a {type(module).__name__}, which needs its GPUs: pass the module inside it, `.module`"
    elif type(module).__name__ == "FullyShardedDataParallel":
        yield f"{path} is sharded over several GPUs: pass the module before it is wrapped"


def _tensor_problems(name: str, tensor: Tensor) -> Iterator[str]:
    if is_lazy(tensor):
        yield f"{name} has no shape yet: run the model once on a small batch, so that its lazy modules know their sizes"
    elif not _is_plain(tensor):
        yield f"{name} is a {_kind(tensor)}, and only plain dense tensors can be traced"
    elif tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        yield (
            f"{name} has a hook that would not run on its copy: register it in the function that makes the optimizer, which "
            "gets the parameters that are traced"
        )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout == torch.strided and not tensor.is_quantized


def _kind(tensor: Tensor) -> str:
    layout = "" if type(tensor) not in _PLAIN else "quantized " if tensor.is_quantized else f"{tensor.layout} "
    return f"{layout}{type(tensor).__name__}".replace("torch.", "")


def real_tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operator's arguments that are not fake."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += real_tensors(value)
        elif isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            found.append(value)
    return found
