"""AdamW with float32 copies of the parameters: the master weights, from which the model's own are rounded.

An update smaller than half the distance to the next bfloat16 number is lost on a bfloat16 weight, and kept on a float32 one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from oomph.live.offload import host_memory


class MasterWeights(torch.optim.AdamW):
    """AdamW that updates a float32 copy of each parameter and rounds it into the parameter, one parameter after the other.

    A step turns one gradient into float32 and drops it, updates the copy, and goes on to the next: gradients in float32 never
    exist all at once. All states, of parameters without a gradient too, are made at construction. A parameter that is
    float32 already is its own master.

    Args:
        parameters: tensors, or groups of them as ``torch.optim.AdamW`` takes them.
        variant: ``fused``, ``foreach`` or ``loop``: the implementation of AdamW.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, in units of the learning rate.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        variant: str = "fused",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(parameters, lr, betas, eps, weight_decay, foreach=variant == "foreach", fused=variant == "fused")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as every optimizer does, and makes its states."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            self.state[parameter] = dict(_states(parameter.detach(), group["fused"]))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient and drops the gradients."""
        assert closure is None, "the gradients are there before the step, which cannot run the model again"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        master = state.get("master", parameter)
        gradient = parameter.grad.float()
        parameter.grad = None
        adamw(
            [master],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=group["foreach"],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if master is not parameter:
            parameter.copy_(master)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave into the states that are there, and rounds the master weights into the parameters.

        The implementation of AdamW stays that of this optimizer.

        Raises:
            ValueError: the states are those of other parameters or of another optimizer.
        """
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        saved = [state_dict["state"].get(number, {}) for number in numbers]
        if [_shapes(self.state[parameter]) for parameter in own] != [_shapes(state) for state in saved]:
            raise ValueError("the saved states are not those of master weights of these parameters")
        variants = [{name: group[name] for name in ("foreach", "fused")} for group in self.param_groups]
        groups = [group | variant for group, variant in zip(state_dict["param_groups"], variants, strict=True)]
        states = self.state
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state = states
        for parameter, state in zip(own, saved, strict=True):
            for name, tensor in states[parameter].items():
                tensor.copy_(state[name])
            parameter.copy_(states[parameter].get("master", parameter))


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _states(parameter: Tensor, fused: bool) -> Iterator[tuple[str, Tensor]]:
    """The states by the names that AdamW gives them; the step counter is in host memory unless a fused kernel counts."""
    master = parameter.float()
    if parameter.dtype != torch.float32:
        yield "master", master
    if fused:
        yield "step", torch.zeros((), device=parameter.device)
    else:
        with host_memory():
            step = torch.zeros(())
        yield "step", step
    yield "exp_avg", torch.zeros_like(master)
    yield "exp_avg_sq", torch.zeros_like(master)
