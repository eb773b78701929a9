"""Running out of memory as an event: told apart by its type, cleaned up after, and undone as if it had not been.

What is kept of a failure is words. The exception holds the frames in which it was raised, and these hold activations and the
graph; so it is let go before anything is freed, and freeing happens outside of the ``except`` block.
"""

from __future__ import annotations

import gc
import random
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from oomph.errors import RunError
from oomph.live.budget import uncounted

T = TypeVar("T")
Kind = Literal["allocator", "accelerator"]
"""Who ran out: the allocator, after which all is well; the device's runtime or a library, after which that has to be seen."""

_OUT_OF_MEMORY = 2
"""``cudaErrorMemoryAllocation``, the code of a ``torch.AcceleratorError``."""
_CPU = re.compile(r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)")
_LIBRARIES = re.compile(
    r"\bCUBLAS_STATUS_ALLOC_FAILED\b|\bCUDNN_STATUS_(?:\w+_)?ALLOC(?:ATION)?_FAILED\b|\bCuda failure (?:2 )?'out of memory'"
)
_PLAIN = (int, float, bool, str, type(None))
_OURS = {"gradient_checkpointing"}
"""Set by `checkpointing.apply_checkpointing`, and not by any forward."""


class DeviceLostError(RunError):
    """The device does not work any more, and nothing on it can be trusted or put back."""


def kind_of(error: BaseException) -> Kind | None:
    """What kind of running out of memory an exception is; None where it is something else.

    The type decides; the text only where torch has no type of its own for it, and then by the whole name that the library has
    for it. A ``CUDNN_STATUS_NOT_SUPPORTED`` or a message that merely speaks of memory is something else.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "allocator"
    text = str(error)
    if isinstance(error, torch.AcceleratorError):
        code = getattr(error, "error_code", None)
        ran_out = code == _OUT_OF_MEMORY if code is not None else text.startswith("CUDA error: out of memory")
        return "accelerator" if ran_out else None
    if type(error) not in (RuntimeError, getattr(torch.distributed, "DistBackendError", RuntimeError)):
        return None
    if _CPU.search(text):
        return "allocator"
    return "accelerator" if _LIBRARIES.search(text) else None


def healthy(device: torch.device) -> bool:
    """Whether the device still allocates and computes."""
    try:
        halves = torch.full((64, 64), 0.5, device=device)
        return bool((halves @ halves == 16).all())
    except Exception:  # whatever it raises, it does not work
        return False


class Place:
    """Where a step is; what `step.accumulate` tells it."""

    def __init__(self) -> None:
        self.phase, self.micro_batch = "forward", 0

    def __call__(self, phase: str, micro_batch: int) -> None:
        """A phase begins."""
        self.phase, self.micro_batch = phase, micro_batch


@dataclass(frozen=True)
class Failure:
    """Memory ran out.

    Attributes:
        kind: who ran out.
        message: the first line of what was said.
        phase: ``forward``, ``recompute``, ``backward`` or ``clip``.
        module: the path of the module whose code ran; empty outside of modules and in the backward, where none's runs.
        micro_batch: its number.
    """

    kind: Kind
    message: str
    phase: str
    module: str
    micro_batch: int


def attempt(run: Callable[[], T], model: nn.Module, place: Place, device: torch.device) -> T | Failure:
    """Runs what may run again. Where memory runs out, nothing of it is left but the failure in words.

    Args:
        run: forwards and backwards of the model.
        model: its gradients are dropped after a failure.
        place: what `run` tells where it is.
        device: the model's.

    Raises:
        DeviceLostError: the device does not work any more.
    """
    try:
        return run()
    except Exception as error:
        kind = kind_of(error)
        if kind is None:
            raise
        failure = _described(error, kind, model, place)
        _let_go(error)
    free(model, device)
    if failure.kind == "accelerator" and not healthy(device):
        hint = "the last checkpoint is good: resume from it in a new process"
        raise DeviceLostError(f"the device does not work any more after {failure.message!r}", hint)
    return failure


def free(model: nn.Module, device: torch.device) -> None:
    """Drops gradients, what only cycles hold, and what the allocator keeps for later."""
    drop_gradients(model)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def drop_gradients(model: nn.Module) -> None:
    """As ``zero_grad``, for all parameters of the model."""
    for parameter in model.parameters():
        parameter.grad = None


def _described(error: BaseException, kind: Kind, model: nn.Module, place: Place) -> Failure:
    """What the traceback says. A module's code in the backward is a recomputation."""
    paths = {id(module): path for path, module in model.named_modules()}
    module, recomputes = "", False
    for frame in _frames(error):
        module = paths.get(id(frame.f_locals.get("self")), module)
        recomputes |= place.phase == "backward" and frame.f_code.co_filename == torch.utils.checkpoint.__file__
    message = str(error).partition("\n")[0] or type(error).__name__
    return Failure(kind, message, "recompute" if recomputes else place.phase, module, place.micro_batch)


def _frames(error: BaseException) -> Iterator[FrameType]:
    """The frames that an exception left, without the one that caught it, which a look at its locals would keep from dying."""
    caught = error.__traceback__
    return (frame for frame, _ in traceback.walk_tb(caught.tb_next if caught is not None else None))


def _let_go(error: BaseException | None) -> None:
    """Empties the frames that an exception holds, and those that led to it, whoever else may keep the exception."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        error = waiting.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            for frame in _frames(error):
                frame.f_locals.keys()  # a look at it empties what an earlier look at it left with the frame
            waiting += [error.__context__, error.__cause__]


class _Random(NamedTuple):
    """The states of the random generators."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Tensor | None


@dataclass
class _Buffers:
    """One module's buffers: the tensors that it had, their versions, and copies of their contents on the host."""

    tensors: dict[str, Tensor | None]
    versions: dict[str, float]
    copies: dict[str, Tensor]


class Snapshot:
    """What a forward may change beside gradients: random generators, buffers, plain numbers that modules keep.

    Of every buffer there is a copy on the host, which is made anew only when the buffer has changed. Its version says so, or
    that of another buffer of the module; the statistics of a batch norm for instance change without a version of their own.
    Buffers that change without any are found when they do so in the first step, by comparing contents once.

    Args:
        model: whose modules do not come and go.
        device: its device.
        scaler: of the loss; what it noted about the gradients is dropped.
    """

    def __init__(self, model: nn.Module, device: torch.device, scaler: torch.amp.GradScaler | None = None) -> None:
        self._model, self._device, self._scaler = model, device, scaler
        self._modules = list(model.modules())
        self._plain = [_plain_names(module) for module in self._modules]
        self._buffers: dict[int, _Buffers] = {}
        self._unversioned: set[int] = set()
        self._taken = 0

    def take(self) -> None:
        """Remembers how things are."""
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        self._random = _Random(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)
        self._values = [tuple(map(vars(m).get, names)) for m, names in zip(self._modules, self._plain, strict=True)]
        with uncounted(), torch.no_grad():
            if self._taken == 1:
                self._find_unversioned()
            for number, module in enumerate(self._modules):
                if (module._buffers or number in self._buffers) and not self._current(number, module):
                    self._buffers[number] = _copied(module)
        self._taken += 1

    def restore(self) -> None:
        """Makes things as they were, in place. Gradients are dropped."""
        drop_gradients(self._model)
        if self._scaler is not None:
            self._scaler._per_optimizer_states.clear()
        for module, names, values in zip(self._modules, self._plain, self._values, strict=True):
            for name, value in zip(names, values, strict=True):
                if vars(module).get(name) is not value:
                    setattr(module, name, value)
        with uncounted(), torch.no_grad():
            for number, module in enumerate(self._modules):
                if module._buffers or number in self._buffers:
                    _put_back(module, self._buffers.get(number, _Buffers({}, {}, {})))
        random.setstate(self._random.python)
        np.random.set_state(self._random.numpy)
        torch.set_rng_state(self._random.torch)
        if self._random.cuda is not None:
            torch.cuda.set_rng_state(self._random.cuda, self._device)

    def _current(self, number: int, module: nn.Module) -> bool:
        """Whether the copies are those of the module's buffers as they are."""
        known = self._buffers.get(number)
        if known is None or number in self._unversioned or known.tensors.keys() != module._buffers.keys():
            return False
        return all(
            tensor is known.tensors[name] and (tensor is None or _version(tensor) == known.versions[name])
            for name, tensor in module._buffers.items()
        )

    def _find_unversioned(self) -> None:
        for number, module in enumerate(self._modules):
            if module._buffers and self._current(number, module):
                copies = self._buffers[number].copies
                if not all(torch.equal(copies[name], tensor.cpu()) for name, tensor in _present(module)):
                    self._unversioned.add(number)


def _plain_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, value in vars(module).items() if isinstance(value, _PLAIN) and name not in _OURS)


def _present(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in module._buffers.items() if tensor is not None)


def _version(tensor: Tensor) -> float:
    """How often the tensor was changed; not a number, which equals nothing, where that is not counted."""
    return float("nan") if tensor.is_inference() else tensor._version


def _copied(module: nn.Module) -> _Buffers:
    versions = {name: _version(tensor) for name, tensor in _present(module)}
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _present(module)}
    return _Buffers(dict(module._buffers), versions, copies)


def _put_back(module: nn.Module, known: _Buffers) -> None:
    for name in module._buffers.keys() - known.tensors.keys():
        delattr(module, name)
    for name, tensor in known.tensors.items():
        module._buffers[name] = tensor
        if tensor is not None:
            tensor.copy_(known.copies[name])
            known.versions[name] = _version(tensor)


def materialise(optimizer: torch.optim.Optimizer) -> None:
    """Makes the states of all parameters, as they are before the first step, so that no later step has to.

    The optimizer steps once for each parameter that has no state, with a gradient of zeros and without learning rate or decay,
    which changes no parameter and leaves the moments at zero; then its count of steps is set back.

    Args:
        optimizer: AdamW as `optimizers.optimizer_over` makes it, before anything counts its steps, such as a schedule.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [{name: group[name] for name in ("lr", "weight_decay")} for group in optimizer.param_groups]
    gradients = [parameter.grad for parameter in parameters]
    try:
        for group in optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
        for parameter in parameters:
            parameter.grad = None
        for parameter in parameters:
            if not optimizer.state.get(parameter):
                parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                parameter.grad = None
                _count_from_zero(optimizer.state[parameter])
    finally:
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group.update(values)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _count_from_zero(state: dict[str, Any]) -> None:
    if isinstance(state["step"], Tensor):
        state["step"].zero_()
    else:
        state["step"] = 0
