"""What of a model is not exact: where the gradient of a step depends on how its samples are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from oomph.live.balance import routers_of
from oomph.live.tensors import dtype_name

_HALF = (torch.bfloat16, torch.float16)


def exactness_of(model: PreTrainedModel) -> list[str]:
    """A sentence for everything in a model, as it stands, that makes another cut another gradient; none if it is exact.

    Found by what modules are called and hold: dropout (`nn.Dropout`, and numbers of modules with ``drop`` in their names),
    statistics over a batch, balance losses of micro-batches, limits to how many tokens an expert takes. That sums run in
    another order is true of every model and not among them, but for gradients of 16 bits, which are rounded each time.

    Args:
        model: in training mode, with what trains requiring gradients.
    """
    modules = [(path, module) for path, module in model.named_modules() if module.training]
    dropping = [path for path, module in modules if _drops(module)]
    normalising = [path for path, module in modules if isinstance(module, _BatchNorm)]
    limiting = [path for path, module in modules if getattr(module, "expert_capacity", None)]
    return [
        *_said(dropping, "dropout", "another cut draws other masks; the same cut draws the same again"),
        *_said(normalising, "batch norm", "means and variances are those of a micro-batch"),
        *_said(limiting, "expert capacity", "which tokens an expert drops depends on the micro-batch"),
        *_balance(model),
        *_rounding(model),
    ]


def _drops(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    numbers = (value for name, value in vars(module).items() if "drop" in name.lower())
    return any(isinstance(value, float) and value > 0 for value in numbers)


def _said(paths: list[str], what: str, why: str) -> Iterator[str]:
    if paths:
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield f"{what} in {paths[0]}{others}: {why}"


def _balance(model: PreTrainedModel) -> Iterator[str]:
    balance = routers_of(model).balance
    if balance is not None and balance.kind == "micro-batch" and balance.coefficient:
        yield (
            f"the experts' balance (balance.kind micro-batch, coefficient {balance.coefficient:g}): it evens the load of each "
            "micro-batch, so that another cut trains another loss; kinds sequence, group and bias do not"
        )
    config: Any = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0)
    if getattr(config, "output_router_logits", False) and coefficient:
        yield (
            f"the routers' balance loss (router_aux_loss_coef {coefficient:g}): it is computed for each micro-batch and added, "
            "so that more micro-batches weigh it more"
        )


def _rounding(model: PreTrainedModel) -> Iterator[str]:
    found = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype in _HALF}
    for dtype in sorted(found, key=str):
        yield f"gradients add up in {dtype_name(dtype)}: each micro-batch's are rounded to it, and so are their sums"
