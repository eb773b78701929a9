"""Tensors in host memory: what leaves the GPU between forward and backward, and an optimizer that runs on the host.

Everything that is made for the host is made inside `host_memory`, by which a tracer, whose tensors all claim to lie on the
CPU, knows that it is not the GPU's. Copies run on the stream of the computation, one after the other: nothing is fetched
ahead, so that no copy on the GPU lives longer than its use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

_inside = 0


@contextmanager
def host_memory() -> Iterator[None]:
    """What is made in the block lies in host memory."""
    global _inside
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1


def in_host_memory() -> bool:
    """Whether what is made now lies in host memory."""
    return _inside > 0


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned and written asynchronously where the tensor lies on a GPU."""
    with host_memory():
        host = torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=tensor.is_cuda)
        return host.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


def checkpoint_on_host(function: Callable[..., Any], *args: Any) -> Any:
    """``torch.utils.checkpoint.checkpoint``, with the inputs in host memory between forward and backward.

    Inputs without a gradient stay where they are: masks for instance, which all blocks share.
    """
    with saved_tensors_hooks(_pack, _unpack):
        return checkpoint(function, *args, use_reentrant=False)


def _pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    if not (tensor.requires_grad and tensor.is_floating_point()):
        return tensor
    return tensor.device, to_host(tensor)


def _unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    """The tensor on its device again. Its copy begins the recomputation, which runs with gradients on."""
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    with torch.enable_grad():
        return host.to(device, non_blocking=True, copy=True)


class HostOptimizer(torch.optim.AdamW):
    """AdamW whose states and whose step are in host memory, over host copies of the parameters.

    A step copies each gradient to the host and frees it, updates the host copies with torch's fused AdamW for the CPU, and
    copies them into the parameters, in place: it allocates nothing on the GPU, and what changes dtype does so on the host.
    Whoever changes a parameter by other means calls `load_state_dict` after it, which fetches the weights anew.

    Args:
        parameters: tensors, or groups of them as ``torch.optim.AdamW`` takes them.
        master_weights: whether the host copies are float32, so that the parameters are rounded from them; else they have
            the parameters' own dtypes.
        settings: further arguments of ``torch.optim.AdamW``.
    """

    def __init__(self, parameters: Iterable[Any], master_weights: bool = False, **settings: Any) -> None:
        super().__init__(parameters, fused=True, **settings)
        self._step_supports_amp_scaling = False  # a scaler of the loss leaves the step out itself
        self._masters = master_weights
        groups = [{**group, "params": [self._host(p) for p in group["params"]]} for group in self.param_groups]
        self._adamw = torch.optim.AdamW(groups, fused=True, **settings)
        self._staged: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient and drops the gradients."""
        assert closure is None, "the gradients are there before the step, which cannot run the model again"
        self._hand_over_settings(self.param_groups, self._adamw.param_groups)
        stepped = [(parameter, host) for parameter, host in self._pairs() if parameter.grad is not None]
        for parameter, _ in stepped:
            self._fetch_gradient(parameter)
        if any(parameter.is_cuda for parameter, _ in stepped):
            torch.cuda.current_stream().synchronize()
        with host_memory():
            for parameter, host in stepped:
                host.grad = self._staged[parameter].to(host.dtype)
            self._adamw.step()
            self._adamw.zero_grad()
        for parameter, host in stepped:
            parameter.copy_(self._rounded(parameter, host), non_blocking=True)
        self._show_states()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` of this class or of another AdamW gave.

        The weights are the parameters' present ones, or master weights where these are kept and the states have them.
        """
        with host_memory():
            self._adamw.load_state_dict(state_dict)
            for parameter, host in self._pairs():
                master = self._adamw.state[host].pop("master", None)
                host.copy_(parameter if master is None or not self._masters else master)
        self._hand_over_settings(self._adamw.param_groups, self.param_groups)
        self.state.clear()
        self._show_states()

    def _host(self, parameter: Tensor) -> Tensor:
        host = to_host(parameter)
        if self._masters:
            if parameter.is_cuda:
                torch.cuda.current_stream().synchronize()
            with host_memory():
                host = host.float()
        return host.requires_grad_()

    def _fetch_gradient(self, parameter: Tensor) -> None:
        """Moves a parameter's gradient into its pinned buffer."""
        assert parameter.grad is not None
        if parameter in self._staged:
            self._staged[parameter].copy_(parameter.grad, non_blocking=True)
        else:
            self._staged[parameter] = to_host(parameter.grad)
        parameter.grad = None

    def _rounded(self, parameter: Tensor, host: Tensor) -> Tensor:
        """A host copy in the dtype of its parameter; rounded ones take the gradient's place in the pinned buffer."""
        if host.dtype == parameter.dtype:
            return host
        with host_memory():
            return self._staged[parameter].copy_(host)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter with its host copy."""
        for group, hosts in zip(self.param_groups, self._adamw.param_groups, strict=True):
            yield from zip(group["params"], hosts["params"], strict=True)

    def _show_states(self) -> None:
        """The states by parameter, as they are known outside."""
        for parameter, host in self._pairs():
            if self._adamw.state.get(host):
                master = {"master": host.detach()} if host.dtype != parameter.dtype else {}
                self.state[parameter] = {**self._adamw.state[host], **master}

    @staticmethod
    def _hand_over_settings(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
        for given, taken in zip(source, target, strict=True):
            taken.update({name: value for name, value in given.items() if name != "params"})
