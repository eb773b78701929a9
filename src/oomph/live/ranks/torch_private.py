"""All that Oomph touches of FSDP2 beyond its public names, in one place.

Checked against torch 2.13.0, ``torch/distributed/fsdp/_fully_shard``: ``_fsdp_collectives.py`` (the default collectives),
``_fsdp_state.py`` (``_get_module_fsdp_state``), ``_fsdp_param_group.py`` and ``_fsdp_param.py``. `missing` says what another
version does not have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param, _fsdp_param_group, _fsdp_state

VERSION = "2.13"
"""The minor release of torch that this was checked against."""

DefaultAllGather: Any = _fsdp_collectives.DefaultAllGather
DefaultReduceScatter: Any = _fsdp_collectives.DefaultReduceScatter


def has_run(model: nn.Module) -> bool:
    """Whether a forward of the root has begun; ``reset_iter_state`` needs what the first one makes."""
    state: Any = _fsdp_state._get_module_fsdp_state(model)
    return state is not None and state._is_root is not None


def drop_partial(model: nn.Module) -> None:
    """Drops what ``FSDPModule.reset_iter_state`` leaves behind of a forward or backward that broke off.

    These are gradients of whole parameters, which are no parameters of the model any more after they are sharded again, so that
    ``zero_grad`` does not reach them, and which the next reduction would add: ``FSDPParam._unsharded_param.grad`` and
    ``FSDPParam.unsharded_accumulated_grad``. Where memory ran out while a group was gathered, also parameters that were whole
    already, and their storages.

    Args:
        model: the root, after ``reset_iter_state``.
    """
    for parameter in _parameters(model):
        parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, "_unsharded_param"):
            parameter._unsharded_param.grad = None
            if parameter.sharded_state != _fsdp_param.ShardedState.SHARDED:
                parameter.to_sharded()
            parameter.free_unsharded_param()


def partial_gradients(model: nn.Module) -> int:
    """How many gradients there are that `drop_partial` would drop."""
    return sum(
        (parameter.unsharded_accumulated_grad is not None)
        + (hasattr(parameter, "_unsharded_param") and parameter._unsharded_param.grad is not None)
        for parameter in _parameters(model)
    )


def missing() -> list[str]:
    """What the installed torch has not, of all that is used here and in `shards`."""
    module = nn.Linear(1, 1)
    parameter, group = _fsdp_param.FSDPParam, _fsdp_param_group.FSDPParamGroup
    wanted: list[tuple[Any, str]] = [
        *((FSDPModule, name) for name in ("reset_iter_state", "set_custom_all_gather", "set_custom_reduce_scatter")),
        *((FSDPModule, name) for name in ("set_all_reduce_hook", "set_force_sum_reduction_for_comms")),
        (FSDPModule, "set_gradient_divide_factor"),
        *((_fsdp_collectives, name) for name in ("DefaultAllGather", "DefaultReduceScatter")),
        *((parameter, name) for name in ("to_sharded", "free_unsharded_param")),
        (group, "_reset_iter_state"),
        (_fsdp_param.ShardedState, "SHARDED"),
    ]
    found = [f"{owner.__name__}.{name}" for owner, name in wanted if not hasattr(owner, name)]
    annotated = parameter.__annotations__
    found += [f"FSDPParam.{name}" for name in ("_unsharded_param", "unsharded_accumulated_grad") if name not in annotated]
    assert _fsdp_state._get_module_fsdp_state(module) is None
    return found


def supported() -> bool:
    """Whether the installed torch is one that this was checked against."""
    return torch.__version__.startswith(f"{VERSION}.") and not missing()


def _parameters(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        state = _fsdp_state._get_module_fsdp_state(module)
        for group in state._fsdp_param_groups if state is not None else ():
            yield from group.fsdp_params
