"""The rules by op: hidden allocations, host outputs, library workspaces, and what has been looked at."""

from __future__ import annotations

from typing import Any

import torch

from oomph.live.cuda_rules import attention_kernels
from oomph.live.cuda_rules.program import Device, Extra, Program, Rule, bind
from oomph.live.cuda_rules.sizes import shape_of
from oomph.records import Attention

_aten = torch.ops.aten


def _softmax_backward(device: Device, call: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Program:
    grad, output = call["grad_output"], call["output"]
    return Program(after=(Extra(shape_of(grad), torch.promote_types(grad.dtype, output.dtype), "tmp"),))


_RULES: dict[torch._ops.OpOverload, Rule] = {
    _aten._scaled_dot_product_efficient_attention.default: attention_kernels.efficient_forward,
    _aten._scaled_dot_product_efficient_attention_backward.default: attention_kernels.efficient_backward,
    _aten._scaled_dot_product_flash_attention.default: attention_kernels.flash_forward,
    _aten._scaled_dot_product_flash_attention_backward.default: attention_kernels.flash_backward,
    _aten._softmax_backward_data.default: _softmax_backward,
}

_MATMULS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default})


def _cublas_workspace_bytes(capability: tuple[int, int]) -> int:
    return 32 * 1024 * 1024 if capability == (9, 0) else 8_519_680


class CudaRules:
    """What CUDA kernels of one device allocate besides an op's outputs.

    Args:
        device: the device facts.
        attention: which attention the model runs, as in ``records.Attention``.
    """

    def __init__(self, device: Device, attention: Attention) -> None:
        self.device = device
        self.attention = attention

    def program(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Program | None:
        """The hidden allocations of one op call, ``None`` where there are none. `outputs` is what the op returned."""
        rule = _RULES.get(func)
        if rule is None:
            return None
        tensors = tuple(t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor))
        return rule(self.device, bind(func, args, kwargs), tensors)

    def on_host(self, func: torch._ops.OpOverload, output_index: int) -> bool:
        """Whether this output tensor lives on the CPU. `output_index` counts the tensors among the outputs."""
        return output_index >= 2 and func is _aten._scaled_dot_product_efficient_attention.default

    def workspaces(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[str, int], ...]:
        """Persistent library workspaces that the op needs, as (key, bytes); one of each key per thread."""
        if func not in _MATMULS:
            return ()
        return (("cublas", _cublas_workspace_bytes(self.device.capability)),)

    def classified(self, func: torch._ops.OpOverload) -> bool:
        """Whether the op's CUDA kernel has been looked at."""
        return func in _RULES or func in _MATMULS
