"""Bytes of kernels' hidden allocations that are no product of dimensions: scratch of CUB, of reductions, of sorts.

CUDA kernels choose between code paths by thresholds, and cut work into tiles. Each function here gives the bytes of one
allocation, 0 where the kernel does not make it, from integers alone, so that a closed form can ask for any shape without
running a tensor operation. `SIZES` names them for a trace.

CUB is that of CUDA 13.0 (CCCL 3.0), the toolkit of the torch 2.13 cu130 wheels. Every CUB call packs its parts into one
allocation: each part starts at a multiple of 256 bytes, and 255 bytes are added so that the start can be aligned
(``detail::alias_temporaries``). Tile sizes are the tuned policies' block threads times items per thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from oomph.core.cudnn_sizes import convolution_copies, cudnn_attention_backward, cudnn_attention_forward
from oomph.core.quantized_sizes import dequantized_scales, dequantized_weight

_ALIGNMENT = 256
_WARP = 32
_RADIX_BITS = 8
_RADIX_DIGITS = 256
_OFFSET_BYTES = 8
_LOOKBACK_BYTES = 4
_SINGLE_TILE_SORT = 2304
_SCAN_TILES = {8: 896, 4: 1920}

_MAX_THREADS = 512
_MIN_VALUES_PER_THREAD = 16
_MAX_VALUES_PER_THREAD = 256

SMALL_SORT = 4096
"""Elements that ``sort`` orders in place with one index range (Sort.cpp)."""
FEW_INDICES = 3072
"""Indices up to which an embedding's gradient is scattered directly (Embedding.cu)."""
ROWS_PER_THREAD = 10
"""Rows of equal index that the embedding's backward sums in one run (EmbeddingBackwardKernel.cu)."""


def ceil_div(numerator: int, denominator: int) -> int:
    """Quotient rounded up."""
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return ceil_div(value, multiple) * multiple


# --- CUB ---------------------------------------------------------------------------------------------------------------


def _packed(*parts: int) -> int:
    return sum(round_up(part, _ALIGNMENT) for part in parts) + _ALIGNMENT - 1


def _by_architecture(sm: int, sizes: tuple[tuple[int, int], ...]) -> int:
    return next(size for first, size in sizes if sm >= first)


def radix_sort(sm: int, items: int, key_bytes: int, bits: int) -> int:
    """``DeviceRadixSort::SortPairs`` with 8-byte values: one pass over the data for each 8 of the `bits` (onesweep).

    Args:
        sm: the architecture, 80 for sm_80.
        items: pairs to sort.
        key_bytes: 4 or 8.
        bits: the key bits that are compared.
    """
    if items <= _SINGLE_TILE_SORT:
        return 1
    tiles_8, tiles_4 = ((90, 4608), (80, 3840), (0, 2816)), ((90, 5376), (80, 3072), (0, 2816))
    tile = _by_architecture(sm, tiles_8 if key_bytes == 8 else tiles_4)
    passes = ceil_div(bits, _RADIX_BITS)
    lookback = ceil_div(items, tile) * _RADIX_DIGITS * _LOOKBACK_BYTES
    buffers = (items * key_bytes, items * 8) if passes > 1 else (0, 0)
    return _packed(passes * _RADIX_DIGITS * _OFFSET_BYTES, lookback, *buffers, passes * _LOOKBACK_BYTES)


def scan(items: int, element_bytes: int) -> int:
    """``DeviceScan`` over 4- or 8-byte sums: one status word of twice the element for each tile, and one warp more."""
    tiles = ceil_div(items, _SCAN_TILES[element_bytes])
    return _packed((tiles + _WARP) * 2 * element_bytes, 1)


def unique_by_key(sm: int, items: int) -> int:
    """``DeviceSelect::UniqueByKey`` with 8-byte keys."""
    tile = _by_architecture(sm, ((100, 3840), (90, 4480), (86, 320), (80, 1792), (0, 320)))
    return _packed((ceil_div(items, tile) + _WARP) * 16, 1)


def index_sort(sm: int, count: int, rows: int) -> int:
    """``index_put_with_sort_kernel`` (Indexing.cu): the sort of `count` linear indices into `rows`, by their used bits."""
    return radix_sort(sm, count, 8, max(1, (rows - 1).bit_length()))


def sort_range(length: int) -> int:
    """``sort_cuda_kernel`` (Sort.cpp): the index range of a short sort."""
    return length * 8 if length <= SMALL_SORT else 0


def long_sort_indices(length: int) -> int:
    """``sort_cuda_kernel`` (Sort.cpp): the index range of a long sort."""
    return 0 if length <= SMALL_SORT else length * 8


def long_sort_scratch(sm: int, length: int, key_bytes: int) -> int:
    """``sort_cuda_kernel`` (Sort.cpp): the radix sort's scratch of a long sort."""
    return 0 if length <= SMALL_SORT else radix_sort(sm, length, key_bytes, 8 * key_bytes)


# --- embedding ---------------------------------------------------------------------------------------------------------


def embedding_column(count: int, itemsize: int) -> int:
    """``embedding_backward_cuda_kernel``: a column of one number for each index, where indices are sorted."""
    return 0 if count <= FEW_INDICES else count * itemsize


def embedding_number(count: int) -> int:
    """``embedding_backward_cuda_kernel``: one 8-byte number, where indices are sorted."""
    return 0 if count <= FEW_INDICES else 8


def embedding_segments(count: int, rows: int, itemsize: int) -> int:
    """``embedding_backward_cuda_kernel``: a column of one number for each distinct index, at most `rows`."""
    return 0 if count <= FEW_INDICES else min(count, rows) * itemsize


def embedding_runs(count: int, rows: int, itemsize: int) -> int:
    """``embedding_backward_cuda_kernel``: a column of one number for each run of rows."""
    return 0 if count <= FEW_INDICES else _runs(count, rows) * itemsize


def embedding_unique(sm: int, count: int) -> int:
    """``embedding_backward_cuda_kernel``: scratch of the search for distinct indices."""
    return 0 if count <= FEW_INDICES else unique_by_key(sm, count)


def embedding_scan(count: int, rows: int, itemsize: int) -> int:
    """``embedding_backward_cuda_kernel``: scratch of the sum over segments."""
    return 0 if count <= FEW_INDICES else scan(min(count, rows), itemsize)


def embedding_atomic_runs(multiprocessors: int, count: int, rows: int, width: int, itemsize: int) -> int:
    """``embedding_backward_cuda_kernel``: the segment of each run, where runs are added atomically."""
    if count <= FEW_INDICES or not _sums_atomically(multiprocessors, count, rows, width):
        return 0
    return _runs(count, rows) * itemsize


def embedding_atomic_sum(multiprocessors: int, count: int, rows: int, width: int, itemsize: int) -> int:
    """``embedding_backward_cuda_kernel``: the gradient in fp32, where runs are added atomically to it."""
    if count <= FEW_INDICES or not _sums_atomically(multiprocessors, count, rows, width):
        return 0
    return rows * width * itemsize


def embedding_run_sums(multiprocessors: int, count: int, rows: int, width: int, itemsize: int) -> int:
    """``embedding_backward_cuda_kernel``: the sum of each run, where they are not added atomically."""
    if count <= FEW_INDICES or _sums_atomically(multiprocessors, count, rows, width):
        return 0
    return _runs(count, rows) * width * itemsize


def _runs(count: int, rows: int) -> int:
    return count // ROWS_PER_THREAD + min(count, rows)


def _sums_atomically(multiprocessors: int, count: int, rows: int, width: int) -> bool:
    """``use_fused_kernel``: few, long segments are added atomically into the gradient."""
    warped = round_up(width, 32)
    grid = ceil_div(min(count, rows) * warped, min(warped, 1024))
    return grid < 4 * multiprocessors and _runs(count, rows) > 4 * grid


# --- norms and attention -----------------------------------------------------------------------------------------------


def layer_norm_partials(multiprocessors: int, rows: int, width: int, itemsize: int) -> int:
    """``LaunchGammaBetaBackwardCUDAKernel`` (layer_norm_kernel.cu): partial gradients where rows are many and short."""
    if rows <= 65536 or width // 32 >= multiprocessors // 2:
        return 0
    return min(32768 // ceil_div(width, 32), ceil_div(rows, 32)) * width * itemsize


def flash_splits(multiprocessors: int, blocks: int, key_blocks: int) -> int:
    """``num_splits_heuristic`` (flash_api.cpp): how many parts the keys are split into to fill the multiprocessors."""
    slots = 2 * multiprocessors
    if blocks >= 0.8 * slots:
        return 1
    eligible = [
        splits
        for splits in range(1, min(128, slots, key_blocks) + 1)
        if splits == 1 or ceil_div(key_blocks, splits) != ceil_div(key_blocks, splits - 1)
    ]
    efficiency = {splits: (blocks * splits / slots) / ceil_div(blocks * splits, slots) for splits in eligible}
    best = max(efficiency.values())
    return next(splits for splits in eligible if efficiency[splits] >= 0.85 * best)


def flash_accumulator(multiprocessors: int, batch: int, heads: int, queries: int, keys: int, block: int, width: int) -> int:
    """``set_params_splitkv`` (flash_api.cpp): fp32 accumulators of `width` numbers a row, where keys are split."""
    splits = flash_splits(multiprocessors, batch * heads * ceil_div(queries, 64), ceil_div(keys, block))
    return 0 if splits == 1 else splits * batch * heads * queries * width * 4


def efficient_workspace(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head: int,
    value_head: int,
    tile_queries: int,
    tile_keys: int,
    in_registers: int,
) -> int:
    """``Params::workspace_size`` (kernel_backward.h): gradients of a block of keys if not in registers, and of queries."""
    elements = ceil_div(queries, tile_queries) * ceil_div(head, tile_keys) * (4 + tile_queries * tile_keys)
    if not in_registers:
        splits = 1 if batch * heads >= 256 and keys <= 2 * tile_keys else ceil_div(keys, tile_keys)
        splits = max(1, min(splits, 200 // (batch * heads)))
        elements += splits * tile_keys * (round_up(head, tile_queries) + round_up(value_head, tile_queries))
    return batch * heads * round_up(elements, 4) * 4


# --- reductions --------------------------------------------------------------------------------------------------------


class Dim(NamedTuple):
    """A dimension of the iterator of a reduction; strides in elements."""

    extent: int
    output_stride: int
    input_stride: int


def reduction_buffer(*numbers: int) -> int:
    """``setReduceConfig`` (Reduce.cuh): partial results that thread blocks exchange; see `_reduction` for the numbers."""
    return _reduction(numbers)[0]


def reduction_semaphores(*numbers: int) -> int:
    """``setReduceConfig`` (Reduce.cuh): a 4-byte semaphore for each output of a grid; see `_reduction` for the numbers."""
    return _reduction(numbers)[1]


@functools.lru_cache(maxsize=4096)
def _reduction(numbers: tuple[int, ...]) -> tuple[int, int]:
    """Buffer and semaphore bytes of a reduction.

    The numbers are: multiprocessors, threads of one, bytes of a partial result, elements that a thread loads at once,
    reduced dimensions, and extent, output stride and input stride of each dimension, fastest first.
    """
    multiprocessors, threads, accumulator_bytes, vector, reduced, *rest = numbers
    dims = [Dim(*rest[n : n + 3]) for n in range(0, len(rest), 3)]
    elements = 1
    for dim in dims:
        elements *= dim.extent
    if not 0 < elements < 2**31:
        return 0, 0
    return _split(multiprocessors, threads, dims, reduced, accumulator_bytes, vector) or (0, 0)


def _last_power(value: int) -> int:
    return 1 << (value.bit_length() - 1) if value > 0 else 1


def _output_vector(dims: Sequence[Dim], reduced: int) -> int:
    """``get_output_vec_size``, for a base address that is a multiple of four elements."""
    vector = 4
    others = [dim.input_stride for index, dim in enumerate(dims) if index != reduced]
    for multiple in (dims[reduced].extent, *others):
        while multiple % vector:
            vector //= 2
    return vector


def _split(
    multiprocessors: int, threads: int, dims: Sequence[Dim], reduced: int, accumulator_bytes: int, vector: int
) -> tuple[int, int] | None:
    """Buffer and semaphore bytes of ``setReduceConfig``; ``None`` where no global reduction is needed."""
    outputs = functools.reduce(lambda product, dim: product * dim.extent, dims[reduced:], 1)
    inputs = functools.reduce(lambda product, dim: product * dim.extent, dims[:reduced], 1)
    fastest = reduced == len(dims) or (reduced > 0 and dims[0].input_stride < dims[reduced].input_stride)
    dim0, dim1 = (inputs, outputs) if fastest else (outputs, inputs)
    step = dims[0].input_stride if fastest else dims[reduced].input_stride
    output_vector = 1
    if step == 1 and fastest and dim0 >= 128 and reduced == 1:
        dim0 //= vector
    elif step == 1 and not fastest:
        output_vector = _output_vector(dims, reduced)
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
    target = multiprocessors * (threads // (width * height))
    if values < _MAX_VALUES_PER_THREAD or grid > target:
        return None
    most = min(ceil_div(target, grid), ceil_div(values, _MIN_VALUES_PER_THREAD))
    blocks = max(most, ceil_div(values, _MAX_VALUES_PER_THREAD))
    if blocks <= 1:
        return None
    size = accumulator_bytes * outputs * blocks
    return (size if fastest else size * width * output_vector), grid * 4


SIZES: dict[str, Callable[..., int]] = {
    function.__name__: function
    for function in (
        radix_sort,
        scan,
        unique_by_key,
        index_sort,
        sort_range,
        long_sort_indices,
        long_sort_scratch,
        embedding_column,
        embedding_number,
        embedding_segments,
        embedding_runs,
        embedding_unique,
        embedding_scan,
        embedding_atomic_runs,
        embedding_atomic_sum,
        embedding_run_sums,
        layer_norm_partials,
        flash_accumulator,
        efficient_workspace,
        reduction_buffer,
        reduction_semaphores,
        dequantized_weight,
        dequantized_scales,
        cudnn_attention_forward,
        cudnn_attention_backward,
        convolution_copies,
    )
}
