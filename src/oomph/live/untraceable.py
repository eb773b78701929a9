"""Says why code cannot run on fake tensors: the module, the operator, the line that called it, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from oomph.errors import UntraceableError

_FOREIGN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_NO_KERNEL = re.compile(r"no fake impl|register_fake|no meta kernel|meta tensors|Meta backend|copy out of meta", re.I)
_NO_DATA = re.compile(r"\.numpy\(\) is not supported|data pointer|Cannot access data", re.I)
_NO_GPU = re.compile(r"not linked with support for cuda|not compiled with CUDA|No CUDA GPUs|no NVIDIA driver", re.I)
_UNSUPPORTED = (UnsupportedOperatorException, UnsupportedFakeTensorException, NotImplementedError)
_OPERATOR = re.compile(r"\b([a-z_]\w*::\w+|aten\.\w+)")

REPORT = "if the code trains for real with such a batch, it is one that fake tensors cannot run: please report it"


class Place(NamedTuple):
    """Where something was raised: the module's path (none outside of modules), the file, the line."""

    module: str | None
    file: str
    line: int


def place_of(trace: TracebackType | None, model: nn.Module) -> Place:
    """The innermost module of the model in a traceback, and the innermost line that is neither torch's nor ours."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = Place(None, "", 0)
    for frame, line in _frames(trace):
        itself = paths.get(id(frame.f_locals.get("self")))
        if itself is not None:
            found = found._replace(module=itself)
        file = frame.f_code.co_filename
        if not file.startswith((*_FOREIGN, "<frozen")):
            found = found._replace(file=file, line=line)
    return found


def _frames(trace: TracebackType | None) -> Iterator[tuple[Any, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def explain(error: Exception, model: nn.Module, whereabouts: str, operator: str = "") -> UntraceableError | None:
    """What is to be said where fake tensors are the reason of an error; None where the code itself is.

    Args:
        error: what was raised.
        model: that ran.
        whereabouts: the module that ran, where the traceback has none.
        operator: the operator that raised it, where that is known.
    """
    found = _cause(error, operator)
    if found is None:
        return None
    what, hint = found
    return UntraceableError(f"{_described(error, model, whereabouts)} cannot be traced: {what}", hint)


def untraceable(error: Exception, model: nn.Module, whereabouts: str) -> UntraceableError:
    """What is to be said of any error of a model's code: why it cannot be traced, or what the code itself says."""
    ours = explain(error, model, whereabouts)
    if ours is not None:
        return ours
    what = f"{type(error).__name__}: {_first_line(str(error))}"
    return UntraceableError(f"{_described(error, model, whereabouts)} cannot be traced: {what}", REPORT)


def note(error: Exception, model: nn.Module, whereabouts: str) -> None:
    """Notes on an error of the code itself where it was raised, and that fake tensors ran."""
    error.add_note(f"raised in {_described(error, model, whereabouts)}, while the step ran on fake tensors; {REPORT}")


def _described(error: Exception, model: nn.Module, whereabouts: str) -> str:
    """Where an error was raised: the module, and the line in parentheses."""
    place = place_of(error.__traceback__, model)
    module = whereabouts if place.module is None else place.module or "the model"
    return f"{module} ({place.file}, line {place.line})" if place.file else module


def _cause(error: Exception, operator: str) -> tuple[str, str] | None:
    """What fails and the way out; None where the error is not about fake tensors."""
    text = str(error)
    if isinstance(error, DynamicOutputShapeException):
        return (
            f"{operator or _short(error.func)} gives a tensor whose shape depends on values, and a fake tensor has none",
            "compute with a mask in place of selecting (torch.where, a product), or let integers "
            "of the batch decide, whose values are known",
        )
    if isinstance(error, DataDependentOutputException):
        return (
            "it reads a value (.item(), int(), a branch on a tensor), and a fake tensor has none",
            "sizes and branches may depend on shapes, on numbers of Python, and on integers of the example batch",
        )
    if isinstance(error, _UNSUPPORTED) or _NO_KERNEL.search(text):
        return (
            f"{_named(error, operator)} has no kernel for fake tensors",
            "torch.library.register_fake adds one: a function that returns empty tensors of the right shapes",
        )
    if _NO_DATA.search(text):
        return (
            f"it asks for a tensor's memory ({_first_line(text)}), and a fake tensor has none",
            "keep conversions to NumPy and kernels that take pointers out of the step, or make an operator of them "
            "(torch.library.custom_op) with a fake kernel (register_fake)",
        )
    if _NO_GPU.search(text):
        return (
            f"it asks for a GPU ({_first_line(text)}), and there is none",
            "tensors may be moved with .cuda() and .to('cuda') and made with device='cuda'; leave out other uses of torch.cuda",
        )
    return None


def _named(error: Exception, operator: str) -> str:
    func = getattr(error, "func", None)
    if func is not None:
        return _short(func)
    return operator or next(iter(_OPERATOR.findall(str(error))), "") or f"an operator ({_first_line(str(error))})"


def _short(func: Any) -> str:
    return str(func).removesuffix(".default")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else "no reason given"
