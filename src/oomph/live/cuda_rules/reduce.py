"""Partial results that CUDA reductions keep in global memory: ``gpu_reduce_kernel``, ``setReduceConfig``.

A reduction with few outputs and many inputs, a bias gradient for instance, is split over thread blocks. Their partial
results take ``global_memory_size`` bytes, which grows with the outputs, the split and the block width.
Source: aten/src/ATen/native/cuda/Reduce.cuh and the dimension order of aten/src/ATen/TensorIterator.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from oomph.core.kernel_sizes import Dim, reduction_buffer, reduction_semaphores
from oomph.live.cuda_rules.program import Device, Extra, sized


class Kernel(NamedTuple):
    """What of a reduction's functor decides its memory.

    Attributes:
        accumulator_bytes: size of a partial result.
        vector: elements that a thread loads at once along the reduced dimension.
    """

    accumulator_bytes: int
    vector: int


def partial_results(device: Device, tensor: torch.Tensor, dims: Sequence[int], kernel: Kernel) -> tuple[Extra, ...]:
    """The buffer and the semaphores of a reduction of `tensor` over `dims` (all, if empty), of 0 bytes if one block does it.

    Tensors that need 64-bit indexing are split further by torch; for them 0 bytes are returned.
    """
    if tensor.dim() == 0 or tensor.numel() == 0:
        return ()
    layout, reduced = _iterator(tensor, dims)
    machine = (device.multiprocessor_count, device.threads_per_multiprocessor)
    numbers = (*machine, *kernel, reduced, *(number for dim in layout for number in dim))
    return sized("buffer", reduction_buffer, *numbers), sized("semaphores", reduction_semaphores, *numbers)


def _iterator(tensor: torch.Tensor, dims: Sequence[int]) -> tuple[list[Dim], int]:
    """``reorder_dimensions`` and ``coalesce_dimensions`` of a reduction into a contiguous result.

    Returns:
        The dimensions, fastest first, the reduced ones in front, and the number of those.
    """
    rank = tensor.dim()
    reduced = {dim % rank for dim in dims} if dims else set(range(rank))
    output_strides, stride = [0] * rank, 1
    for dim in reversed(range(rank)):
        if dim not in reduced:
            output_strides[dim] = stride
            stride *= tensor.size(dim)
    rows = [Dim(tensor.size(d), output_strides[d], tensor.stride(d)) for d in reversed(range(rank))]
    for position in range(1, len(rows)):
        mover = position
        for other in reversed(range(position)):
            order = _order(rows[other], rows[mover])
            if order > 0:
                rows[other], rows[mover] = rows[mover], rows[other]
                mover = other
            elif order < 0:
                break
    merged = _coalesce(rows)
    return merged, sum(dim.output_stride == 0 for dim in merged)


def _order(first: Dim, second: Dim) -> int:
    """``should_swap``: positive where `second` belongs before `first`."""
    if (first.output_stride == 0) != (second.output_stride == 0):
        return 1 if second.output_stride == 0 else -1
    for a, b in ((first.output_stride, second.output_stride), (first.input_stride, second.input_stride)):
        if a and b and a != b:
            return -1 if a < b else 1
        if a and b and first.extent > second.extent:
            return 1
    return 0


def _coalesce(rows: list[Dim]) -> list[Dim]:
    merged = rows[:1]
    for dim in rows[1:]:
        last = merged[-1]
        if last.extent == 1:
            merged[-1] = dim
        elif dim.extent == 1 or (
            last.extent * last.output_stride == dim.output_stride and last.extent * last.input_stride == dim.input_stride
        ):
            merged[-1] = last._replace(extent=last.extent * dim.extent)
        else:
            merged.append(dim)
    return merged
