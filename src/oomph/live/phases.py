"""Records a step that somebody else wrote: which phase it is in is found out while it runs.

* ``backward``: the autograd engine runs. What is recomputed there is told apart by the recorder.
* ``optimizer``: inside an optimizer's ``step``; and, outside of modules, what works on gradients, such as clipping.
* ``forward``: everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from oomph.core.events import Kind
from oomph.core.trace import NOWHERE
from oomph.errors import UserError
from oomph.live.offload import host_memory
from oomph.live.stand_in import fake_of, real_tensors
from oomph.live.tensors import dtype_name, tensors_in
from oomph.live.trace import HOST, Recorder

_MADE_OF_NUMBERS = torch.ops.aten.lift_fresh.default
OUTSIDE = "pass everything that holds weights as one module, for example an nn.ModuleDict of models and losses with parameters"


class StepRecorder(Recorder):
    """A recorder that finds the phases, and takes in tensors that the step has from elsewhere.

    Attributes:
        backwards: how often a backward ran.
        optimizer_steps: how often an optimizer stepped.
        failed: the last error that an operator raised, and the operator.
    """

    backwards = optimizer_steps = 0
    failed: tuple[BaseException | None, str] = (None, "")

    def __init__(self, model: nn.Module, mode: FakeTensorMode, *args: Any) -> None:
        super().__init__(model, *args)
        self._mode = mode
        self._engines, self._marked = 0, ""
        self._stepping: list[str] = []
        self._elsewhere = WeakIdKeyDictionary()
        self._meter = _NoMeter()  # type: ignore[assignment]

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The autograd engine runs in the block."""
        before = self.phase
        self.backwards += 1
        self._engines += 1
        self.enter("backward")
        try:
            yield
        finally:
            self._engines -= 1
        self._resume(before)

    def enter(self, phase: str) -> None:
        """The operators from here on belong to another phase."""
        super().enter(phase)
        self._marked = phase

    def _resume(self, phase: str) -> None:
        """Goes back to a phase. The forward's peaks go on with the next module: what is alive until then is not its own."""
        if self._engines or self._stepping:
            self.enter(phase)
        else:
            self.phase = phase

    @contextmanager
    def watching_optimizers(self) -> Iterator[None]:
        """Steps of optimizers are the optimizer's phase in the block, and the tensors in their states its states."""
        handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if not isinstance(parameter, FakeTensor):
                raise UserError(
                    f"the step calls an optimizer ({type(optimizer).__name__}) over parameters that are not those of its model",
                    "a prediction runs a copy of the model: pass optimizer=, a function that makes the optimizer from "
                    "parameters, and write the step as step(model, optimizer, batch)",
                )
        self._stepping.append(self.phase)
        self.enter("optimizer")

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.optimizer_steps += 1
        self.assign(self._states(optimizer.state), "optimizer")
        self._resume(self._stepping.pop())

    def _states(self, state: Mapping[Tensor, Any]) -> Iterator[tuple[int, Tensor]]:
        for parameter, values in state.items():
            number = self._parameter_index.get(id(parameter), -1)
            for value in tree_leaves(values):
                if isinstance(value, Tensor) and value is not parameter:
                    yield number, value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Records an operator in the phase that it belongs to, with every tensor from elsewhere as a fake one."""
        if func is not _MADE_OF_NUMBERS and real_tensors((*args, *(kwargs or {}).values())):
            args, kwargs = tree_map_only(Tensor, self.known_here, (args, kwargs or {}))
        self._find_phase(args)
        first = next(tensors_in(args), None)
        try:
            if self._rules is not None and first is not None and all(map(self.on_host, tensors_in(args))):
                with host_memory():
                    return super().__torch_dispatch__(func, types, args, kwargs)
            return super().__torch_dispatch__(func, types, args, kwargs)
        except Exception as error:
            self.failed = error, str(func).removesuffix(".default")
            raise

    def _find_phase(self, args: Any) -> None:
        if self._engines:
            return
        if self._frames:
            phase = "forward"
        elif self._stepping or self._on_gradients(args):
            phase = "optimizer"
        else:
            self.phase = "forward"
            return
        if not phase == self.phase == self._marked:
            self.enter(phase)

    def _on_gradients(self, args: Any) -> bool:
        """Whether an operator outside of modules works on gradients, or goes on with what was made of them."""
        if self.phase == "optimizer" and not torch.is_grad_enabled():
            return True
        first = next(tensors_in(args), None)
        number = -1 if first is None else self._live.get(first.untyped_storage()._cdata, (-1,))[0]
        return number >= 0 and self.trace.storages[number].kind.role == "gradient"

    def known_here(self, tensor: Tensor) -> Tensor:
        """The fake tensor that stands for one that the step has from elsewhere; the GPU's, unless it is a single number.

        Raises:
            UserError: it is a weight.
        """
        if isinstance(tensor, FakeTensor):
            return tensor
        if isinstance(tensor, nn.Parameter) or tensor.requires_grad:
            raise UserError(
                f"the step uses a parameter of shape {list(tensor.shape)} that is not in the model it is given", OUTSIDE
            )
        if tensor not in self._elsewhere:
            self._elsewhere[tensor] = self.take_in(tensor)
        found: Tensor = self._elsewhere[tensor]
        return found

    def take_in(self, tensor: Tensor) -> Tensor:
        """A fake input of the step of a real tensor's shape; a single number from elsewhere stays in host memory."""
        fake = fake_of(tensor, self._mode)
        if self._rules is not None and not self._inputs and tensor.dim() == 0:
            self._adopt(fake, HOST)
        else:
            kind = Kind("input", "", self.phase, "input", dtype_name(fake.dtype))
            self._birth(fake, kind, NOWHERE, NOWHERE)
        return fake

    def on_host(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in host memory."""
        return self._live.get(tensor.untyped_storage()._cdata, (None,))[0] == HOST

    def live_bytes(self) -> int:
        """Bytes alive now, the host's not counted."""
        return sum(self.trace.storages[number].nbytes for number, _ in self._live.values() if number != HOST)


class _NoMeter:
    """Nobody asks what the operators compute."""

    def done(self, *_: Any) -> None:
        """Nothing is noted."""
