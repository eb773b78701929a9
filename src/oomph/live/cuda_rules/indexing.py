"""Hidden allocations of index kernels: embedding, index_put, masked_scatter, nonzero, sort, topk, cumsum."""

from __future__ import annotations

import torch

from oomph.core import kernel_sizes as sizes
from oomph.live.cuda_rules.program import Arguments, Device, Extra, Program, sized
from oomph.live.cuda_rules.sizes import shape_of

_LONG = torch.int64


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
    item, many = indices.element_size(), device.multiprocessor_count
    names = ("sorted_indices", "orig_indices", "count") if call["scale_grad_by_freq"] else ("sorted_indices", "orig_indices")
    before += tuple(sized(name, sizes.embedding_column, count, item) for name in names)
    half = grad.dtype in (torch.float16, torch.bfloat16)
    accumulate = 4 if half else grad.element_size()
    after: list[Extra | int] = [
        sized("segment_offsets", sizes.embedding_column, count, item),
        sized("num_of_segments", sizes.embedding_number, count),
        sized("keys_out", sizes.embedding_column, count, item),
        sized("unique_by_key", sizes.embedding_unique, device.sm, count),
        3,
        2,
        sized("partials_per_segment", sizes.embedding_segments, count, rows, item),
        sized("partials_per_segment_offset", sizes.embedding_segments, count, rows, item),
        sized("exclusive_sum", sizes.embedding_scan, count, rows, item),
        6,
        sized("num_of_partial_segments", sizes.embedding_number, count),
        sized("partial_segment_offset", sizes.embedding_runs, count, rows, item),
        sized("partial_to_segment_idx", sizes.embedding_atomic_runs, many, count, rows, width, item),
        sized("grad_weight_acc", sizes.embedding_atomic_sum, many, count, rows, width, accumulate if half else 0),
        sized("grad_weight_per_segment", sizes.embedding_run_sums, many, count, rows, width, accumulate),
    ]
    return Program(before, tuple(after))


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
    expanded = values.numel() < count * (tensor.numel() // indexed) or not values.is_contiguous()
    after = [linear]
    if expanded:
        after.append(Extra((count * (tensor.numel() // indexed),), values.dtype, "expandedValue"))
    after += [linear._replace(name=name) for name in ("sorted_indices", "orig_indices", "range")]
    after.append(sized("radix_sort", sizes.index_sort, device.sm, count, tensor.numel() // width))
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
    after += [sized("exclusive_sum", sizes.scan, target.numel(), 8), len(after)]
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
    short = sized("range", sizes.sort_range, length)
    if length != tensor.numel() or tensor.element_size() < 4:
        return Program(after=(short,))
    scratch = sized("radix_sort", sizes.long_sort_scratch, device.sm, length, tensor.element_size())
    copies = copy_if_strided(tensor, "self") if length > sizes.SMALL_SORT else ()
    return Program(after=(short, *copies, sized("indices", sizes.long_sort_indices, length), scratch))


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
        after += (sized("inclusive_scan", sizes.scan, tensor.numel(), result.element_size()),)
    return Program(after=after) if after else None
