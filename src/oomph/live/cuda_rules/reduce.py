"""Partial results that CUDA reductions keep in global memory: ``gpu_reduce_kernel``, ``setReduceConfig``.

A reduction with few outputs and many inputs, a bias gradient for instance, is split over thread blocks. Their partial
results take ``global_memory_size`` bytes, which grows with the outputs, the split and the block width.
Source: aten/src/ATen/native/cuda/Reduce.cuh and the dimension order of aten/src/ATen/TensorIterator.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from oomph.live.cuda_rules.program import Device, Extra
from oomph.live.cuda_rules.sizes import ceil_div

_WARP = 32
_MAX_THREADS = 512
_MIN_VALUES_PER_THREAD = 16
_MAX_VALUES_PER_THREAD = 256


class Kernel(NamedTuple):
    """What of a reduction's functor decides its memory.

    Attributes:
        accumulator_bytes: size of a partial result.
        vector: elements that a thread loads at once along the reduced dimension.
    """

    accumulator_bytes: int
    vector: int


class _Dim(NamedTuple):
    extent: int
    output_stride: int
    input_stride: int


@dataclass(frozen=True)
class _Layout:
    """The iterator's dimensions, fastest first, the reduced ones in front; strides in elements."""

    dims: tuple[_Dim, ...]
    reduced: int

    @property
    def outputs(self) -> int:
        product = 1
        for dim in self.dims[self.reduced :]:
            product *= dim.extent
        return product

    @property
    def inputs(self) -> int:
        product = 1
        for dim in self.dims[: self.reduced]:
            product *= dim.extent
        return product


def partial_results(device: Device, tensor: torch.Tensor, dims: Sequence[int], kernel: Kernel) -> tuple[Extra, ...]:
    """The buffer and the semaphores of a reduction of `tensor` over `dims` (all, if empty); none if one block does it.

    Tensors that need 64-bit indexing are split further by torch; for them nothing is returned.
    """
    if tensor.dim() == 0 or not 0 < tensor.numel() < 2**31:
        return ()
    layout = _iterator(tensor, dims)
    split = _split(device, layout, tensor.element_size(), kernel)
    if split is None:
        return ()
    buffer, semaphores = split
    return Extra((buffer,), torch.uint8, "buffer"), Extra((semaphores,), torch.int32, "semaphores")


def _iterator(tensor: torch.Tensor, dims: Sequence[int]) -> _Layout:
    """``reorder_dimensions`` and ``coalesce_dimensions`` of a reduction into a contiguous result."""
    rank = tensor.dim()
    reduced = {dim % rank for dim in dims} if dims else set(range(rank))
    output_strides, stride = [0] * rank, 1
    for dim in reversed(range(rank)):
        if dim not in reduced:
            output_strides[dim] = stride
            stride *= tensor.size(dim)
    rows = [_Dim(tensor.size(d), output_strides[d], tensor.stride(d)) for d in reversed(range(rank))]
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
    return _Layout(tuple(merged), sum(dim.output_stride == 0 for dim in merged))


def _order(first: _Dim, second: _Dim) -> int:
    """``should_swap``: positive where `second` belongs before `first`."""
    if (first.output_stride == 0) != (second.output_stride == 0):
        return 1 if second.output_stride == 0 else -1
    for a, b in ((first.output_stride, second.output_stride), (first.input_stride, second.input_stride)):
        if a and b and a != b:
            return -1 if a < b else 1
        if a and b and first.extent > second.extent:
            return 1
    return 0


def _coalesce(rows: list[_Dim]) -> list[_Dim]:
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


def _last_power(value: int) -> int:
    return 1 << (value.bit_length() - 1) if value > 0 else 1


def _output_vector(layout: _Layout) -> int:
    """``get_output_vec_size``, for a base address that is a multiple of four elements."""
    vector = 4
    others = [d.input_stride for index, d in enumerate(layout.dims) if index != layout.reduced]
    for multiple in (layout.dims[layout.reduced].extent, *others):
        while multiple % vector:
            vector //= 2
    return vector


def _split(device: Device, layout: _Layout, element_bytes: int, kernel: Kernel) -> tuple[int, int] | None:
    """Buffer bytes and semaphores of ``setReduceConfig``; ``None`` where no global reduction is needed."""
    outputs, inputs = layout.outputs, layout.inputs
    everything = layout.reduced == len(layout.dims)
    fastest = everything or (layout.reduced > 0 and layout.dims[0].input_stride < layout.dims[layout.reduced].input_stride)
    dim0, dim1 = (inputs, outputs) if fastest else (outputs, inputs)
    step = layout.dims[0].input_stride if fastest else layout.dims[layout.reduced].input_stride
    output_vector = 1
    if step == 1 and fastest and dim0 >= 128 and layout.reduced == 1:
        dim0 //= kernel.vector
    elif step == 1 and not fastest:
        output_vector = _output_vector(layout)
        dim0 //= output_vector
    limit = _MAX_THREADS // output_vector
    width_limit = _last_power(dim0) if dim0 < limit else limit
    height_limit = _last_power(dim1) if dim1 < limit else limit
    height = min(height_limit, limit // min(width_limit, _WARP))
    width = min(width_limit, limit // height)
    step_input, step_output = (width, 1) if fastest else (1, width)
    if ceil_div(inputs, step_input) < min(height * 16, _MAX_VALUES_PER_THREAD):
        return None
    step_input *= height
    values = ceil_div(inputs, step_input)
    grid = ceil_div(outputs // output_vector, step_output)
    target = device.multiprocessor_count * (device.threads_per_multiprocessor // (width * height))
    if values < _MAX_VALUES_PER_THREAD or grid > target:
        return None
    most = min(ceil_div(target, grid), ceil_div(values, _MIN_VALUES_PER_THREAD))
    blocks = max(most, ceil_div(values, _MAX_VALUES_PER_THREAD))
    if blocks <= 1:
        return None
    size = kernel.accumulator_bytes * outputs * blocks
    return size if fastest else size * width * output_vector, grid
