"""Hidden allocations of index kernels: embedding, index_put, masked_scatter, nonzero, sort, topk, cumsum."""

from __future__ import annotations

import torch

from oomph.live.cuda_rules import cub
from oomph.live.cuda_rules.program import Arguments, Device, Extra, Program
from oomph.live.cuda_rules.sizes import ceil_div, round_up, shape_of

_LONG = torch.int64
_SMALL_SORT = 4096
_ROWS_PER_THREAD = 10
_FEW_INDICES = 3072


def copy_if_strided(tensor: torch.Tensor, name: str) -> tuple[Extra, ...]:
    """The copy that ``contiguous()`` makes, none where the tensor is contiguous."""
    return () if tensor.is_contiguous() else (Extra(shape_of(tensor), tensor.dtype, name),)


def embedding_dense_backward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """``embedding_dense_backward_cuda`` (Embedding.cu), ``embedding_backward_cuda_kernel`` (EmbeddingBackwardKernel.cu).

    Up to 3072 indices are scattered directly. More are sorted, and rows of equal index are summed in runs of ten into a
    fp32 buffer. The counting range and the sort's storage are freed before the gradient is allocated and left out.
    """
    grad, indices = call["grad_output"], call["indices"]
    count, width, rows = indices.numel(), int(grad.size(-1)), int(call["num_weights"])
    before = copy_if_strided(indices, "indices") + copy_if_strided(grad, "grad")
    if count <= _FEW_INDICES and not call["scale_grad_by_freq"]:
        return Program(before) if before else None
    segments = min(count, rows)
    runs = count // _ROWS_PER_THREAD + segments
    names = ("sorted_indices", "orig_indices", "count") if call["scale_grad_by_freq"] else ("sorted_indices", "orig_indices")
    before += tuple(Extra(shape_of(indices), indices.dtype, name) for name in names)
    after: list[Extra | int] = [
        Extra((count,), indices.dtype, "segment_offsets"),
        Extra((), _LONG, "num_of_segments"),
        Extra((count,), indices.dtype, "keys_out"),
        cub.storage(cub.unique_by_key_bytes(device, count), "unique_by_key"),
        3,
        2,
        Extra((segments,), indices.dtype, "partials_per_segment"),
        Extra((segments,), indices.dtype, "partials_per_segment_offset"),
        cub.storage(cub.scan_bytes(segments, indices.element_size()), "exclusive_sum"),
        6,
        Extra((), _LONG, "num_of_partial_segments"),
        Extra((runs,), indices.dtype, "partial_segment_offset"),
    ]
    half = grad.dtype in (torch.float16, torch.bfloat16)
    accumulate = torch.float32 if half else grad.dtype
    if _sums_atomically(device, segments, runs, width):
        after.append(Extra((runs,), indices.dtype, "partial_to_segment_idx"))
        if half:
            after.append(Extra((rows, width), accumulate, "grad_weight_acc"))
    else:
        after.append(Extra((runs, width), accumulate, "grad_weight_per_segment"))
    return Program(before, tuple(after))


def _sums_atomically(device: Device, segments: int, runs: int, width: int) -> bool:
    """``use_fused_kernel``: few, long segments are added atomically into the gradient."""
    warped = round_up(width, 32)
    grid = ceil_div(segments * warped, min(warped, 1024))
    return grid < 4 * device.multiprocessor_count and runs > 4 * grid


def index_put(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """``index_put_with_sort_kernel`` (Indexing.cu): accumulation sorts the linear indices; plain writes need nothing."""
    tensor, values = call["self"], call["values"]
    indices = [index for index in call["indices"] if index is not None]
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    if masks or not call["accumulate"] or not indices:
        return None
    shape = torch.broadcast_shapes(*(index.shape for index in indices))
    count = 1
    for extent in shape:
        count *= int(extent)
    width, indexed = _slice_width(tensor, call["indices"])
    if count == 0 or width == 0:
        return None
    linear = Extra((count,), _LONG, "linearIndex")
    bits = max(1, ((tensor.numel() - 1) // width).bit_length())
    expanded = values.numel() < count * (tensor.numel() // indexed) or not values.is_contiguous()
    after = [linear]
    if expanded:
        after.append(Extra((count * (tensor.numel() // indexed),), values.dtype, "expandedValue"))
    after += [linear._replace(name=name) for name in ("sorted_indices", "orig_indices", "range")]
    after.append(cub.storage(cub.radix_sort_bytes(device, count, 8, bits), "radix_sort"))
    return Program(after=tuple(after))


def _slice_width(tensor: torch.Tensor, indices: list[torch.Tensor | None]) -> tuple[int, int]:
    """Elements after the last indexed dimension, and the product of the indexed extents."""
    last = max(dim for dim, index in enumerate(indices) if index is not None)
    width = indexed = 1
    for dim, extent in enumerate(tensor.shape):
        width *= int(extent) if dim > last else 1
        indexed *= int(extent) if dim < len(indices) and indices[dim] is not None else 1
    return width, indexed


def index(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """``expandTensors`` (IndexingUtils.h): a bool mask becomes the int64 coordinates of its true elements."""
    masks = [i for i in call["indices"] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    if not masks:
        return None
    found = int(outputs[0].size(next(d for d, i in enumerate(call["indices"]) if i is not None)))
    return Program(tuple(Extra((mask.dim(), found), _LONG, "nonzero") for mask in masks))


def masked_scatter(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """``masked_scatter__cuda`` (IndexKernel.cpp, IndexKernel.cu): an int64 prefix sum as large as the tensor.

    The mask is expanded to the tensor and copied if that makes it strided.
    """
    target, mask, source = outputs[0], call["mask"], call["source"]
    if target.numel() == 0:
        return None
    shape = shape_of(target)
    after: list[Extra | int] = [Extra(shape, _LONG, "maskPrefixSum")]
    after += copy_if_strided(mask.expand(target.shape), "mask")
    after += [cub.storage(cub.scan_bytes(target.numel(), 8), "exclusive_sum"), len(after)]
    after += copy_if_strided(source, "source")
    return Program(after=tuple(after))


def masked_scatter_backward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program:
    """``masked_scatter_backward`` selects with the mask, hence with the coordinates of its true elements.

    The number of true elements is taken to be that of the source, as transformers requires.
    """
    mask, found = call["mask"], outputs[0].numel()
    coordinates = Extra((mask.dim(), found), _LONG, "nonzero")
    return Program((*copy_if_strided(mask, "mask"), coordinates))


def nonzero(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program:
    """``nonzero_cuda_out_impl`` (Nonzero.cu): the count; the storage of the selection is not modelled."""
    return Program((*copy_if_strided(call["self"], "self"), Extra((1,), torch.int32, "num_nonzeros")))


def sort(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """``sort_cuda_kernel`` (Sort.cpp): up to 4096 elements in place, one long row by radix sort with an index range.

    Several rows of more than 4096 elements, and keys of 1 or 2 bytes, are not modelled.
    """
    tensor = call["self"]
    if tensor.dim() == 0 or tensor.numel() == 0:
        return None
    length = int(tensor.size(call["dim"]))
    if length <= _SMALL_SORT:
        return Program(after=(Extra((length,), _LONG, "range"),))
    if length != tensor.numel() or tensor.element_size() < 4:
        return None
    key_bytes = tensor.element_size()
    storage = cub.storage(cub.radix_sort_bytes(device, length, key_bytes, 8 * key_bytes), "radix_sort")
    return Program(after=(*copy_if_strided(tensor, "self"), Extra((length,), _LONG, "indices"), storage))


def topk(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """``launch_gather_topk_kernel`` (TensorTopK.cu): the input made contiguous; up to 4096 results are sorted in place."""
    copies = copy_if_strided(call["self"], "input")
    return Program(after=copies) if copies else None


def cumsum(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """``cumsum`` (ReduceOps.cpp) casts first; one row is scanned by CUB, several by kernels without storage."""
    tensor, result = call["self"], outputs[0]
    after: tuple[Extra, ...] = ()
    if tensor.dtype != result.dtype:
        after = (Extra(shape_of(tensor), result.dtype, "self"),)
    else:
        after = copy_if_strided(tensor, "self")
    if tensor.dim() and tensor.numel() == tensor.size(call["dim"]) and result.element_size() in (4, 8):
        after += (cub.storage(cub.scan_bytes(tensor.numel(), result.element_size()), "inclusive_scan"),)
    return Program(after=after) if after else None
