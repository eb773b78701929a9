"""Layer norm and RMS norm with the tensors that CUDA saves: statistics in fp32, one kernel each.

On fake CPU tensors torch gives the statistics the type of the input, and runs RMS norm as separate operators. The operators
here have CUDA's outputs and no values: they are for fake tensors only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("oomph_cuda", "DEF")
_library.define("layer_norm(Tensor input, int rank) -> (Tensor out, Tensor mean, Tensor rstd)")
_library.define("rms_norm(Tensor input, int rank) -> (Tensor out, Tensor rstd)")
_library.define("rms_norm_backward(Tensor grad_out, Tensor input, Tensor? weight, int rank, bool[2] output_mask) -> Tensor[]")


def _statistics(input: Tensor, rank: int) -> Tensor:
    return input.new_empty((*input.shape[:-rank], *[1] * rank), dtype=torch.float32)


def _dense(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.impl(_library, "layer_norm", "Meta")
def _layer_norm(input: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return _dense(input), _statistics(input, rank), _statistics(input, rank)


@torch.library.impl(_library, "rms_norm", "Meta")
def _rms_norm(input: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return _dense(input), _statistics(input, rank)


@torch.library.impl(_library, "rms_norm_backward", "Meta")
def _rms_norm_backward(
    grad_out: Tensor, input: Tensor, weight: Tensor | None, rank: int, output_mask: Sequence[bool]
) -> list[Tensor]:
    return [_dense(t) for t, wanted in zip((input, weight), output_mask, strict=True) if t is not None and wanted]


class LayerNorm(torch.autograd.Function):
    """``layer_norm_cuda`` (layer_norm_kernel.cu): mean and rstd have the accumulation type."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The result; input, weight, bias and the statistics are saved."""
        out, mean, rstd = torch.ops.oomph_cuda.layer_norm(input, len(shape))
        ctx.save_for_backward(input, mean, rstd, weight, bias)
        ctx.shape = list(shape)
        normalized: Tensor = out
        return normalized

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The gradients of ``native_layer_norm_backward``."""
        input, mean, rstd, weight, bias = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
        found = torch.ops.aten.native_layer_norm_backward(grads[0], input, ctx.shape, mean, rstd, weight, bias, wanted)
        return found[0], None, found[1], found[2]


class RmsNorm(torch.autograd.Function):
    """``_fused_rms_norm`` (layer_norm_kernel.cu): the result and one fp32 factor for each row."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, shape: Sequence[int], weight: Tensor | None) -> Tensor:
        """The result; input, weight and factors are saved."""
        out, rstd = torch.ops.oomph_cuda.rms_norm(input, len(shape))
        ctx.save_for_backward(input, weight, rstd)
        ctx.rank = len(shape)
        normalized: Tensor = out
        return normalized

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The gradients of input and weight."""
        input, weight, _ = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        found = iter(torch.ops.oomph_cuda.rms_norm_backward(grads[0], input, weight, ctx.rank, wanted))
        return next(found) if wanted[0] else None, None, next(found) if wanted[1] else None


def rows_and_width(tensor: Tensor, rank: int) -> tuple[int, int]:
    """The rows that are normalized, and the elements of one."""
    width = math.prod(int(extent) for extent in tensor.shape[tensor.dim() - rank :])
    return tensor.numel() // max(1, width), width
