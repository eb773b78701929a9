"""The optimizer that a Choice names, made the same way for the trace and for training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oomph.core.eight_bit import EIGHT_BIT
from oomph.live.eight_bit import bitsandbytes_adamw
from oomph.live.masters import MasterWeights
from oomph.live.offload import HostOptimizer


def optimizer_over(
    parameters: Iterable[Any], kind: str, offload: bool = False, master_weights: bool = False, **settings: Any
) -> torch.optim.Optimizer:
    """AdamW in the implementation that a Choice names.

    Args:
        parameters: tensors, or groups of them as ``torch.optim.AdamW`` takes them.
        kind: the Choice's `optimizer`.
        offload: its `optimizer_offload`.
        master_weights: its `master_weights`.
        settings: learning rate, betas, eps, weight decay, by the names that ``torch.optim.AdamW`` has for them.

    Raises:
        UserError: the optimizer is bitsandbytes', which is not installed.
    """
    if kind in EIGHT_BIT:
        assert not offload, "choices.clashes refuses it with states of 8 bits"
        assert not master_weights, "choices.clashes refuses them with states of 8 bits"
        return bitsandbytes_adamw(kind)(parameters, **settings)
    if offload:
        return HostOptimizer(parameters, master_weights, **settings)
    variant = kind.removeprefix("adamw-")
    if master_weights:
        return MasterWeights(parameters, variant, **settings)
    return torch.optim.AdamW(parameters, foreach=variant == "foreach", fused=variant == "fused", **settings)


def make_optimizer(model: nn.Module, kind: str, offload: bool = False, master_weights: bool = False) -> torch.optim.Optimizer:
    """`optimizer_over` the trainable parameters of a model, with one learning rate for all."""
    return optimizer_over([p for p in model.parameters() if p.requires_grad], kind, offload, master_weights, lr=1e-4)


def states_of(optimizer: torch.optim.Optimizer, numbers: Mapping[int, int]) -> Iterator[tuple[int, Tensor]]:
    """The tensors among an optimizer's states, each with the number of its parameter; -1 with one that parameters share.

    Args:
        optimizer: after a step.
        numbers: of the parameters, by their ids.
    """
    found = [
        (numbers[id(parameter)], value)
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    holders = Counter(id(value) for _, value in found)
    for number, value in found:
        yield (number if holders[id(value)] == 1 else -1), value
