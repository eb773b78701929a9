"""Hidden allocations of the remaining kernels: matrix products, softmax, norms, grouped products, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oomph.core.kernel_sizes import ceil_div, layer_norm_partials, round_up
from oomph.live.cuda_rules.norms import rows_and_width
from oomph.live.cuda_rules.program import Arguments, Device, Extra, Program, Rule, sized
from oomph.live.cuda_rules.reduce import Kernel, partial_results
from oomph.live.cuda_rules.sizes import shape_of

_HALF = (torch.float16, torch.bfloat16)
_CHUNK = 65536
_TENSOR_MAP_BYTES = 128

Outputs = tuple[torch.Tensor, ...]


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """``acc_type`` on CUDA: fp32 for half precision, int64 for integers."""
    if dtype.is_floating_point:
        return torch.float64 if dtype == torch.float64 else torch.float32
    return torch.int64


# --- matrix products ---------------------------------------------------------------------------------------------------


def _dense(matrix: torch.Tensor) -> bool:
    """``is_non_overlapping_and_dense`` of a matrix: its elements fill their memory without gaps, in either order."""
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    by_row = (columns <= 1 or column_stride == 1) and (rows <= 1 or row_stride == columns)
    return by_row or ((rows <= 1 or row_stride == 1) and (columns <= 1 or column_stride == rows))


def _fits_blas(matrix: torch.Tensor) -> bool:
    """Whether cuBLAS takes the matrix by its strides: one of the last two is 1, the other spans its rows or columns."""
    (rows, columns), (row_stride, column_stride) = matrix.shape[-2:], matrix.stride()[-2:]
    by_column = row_stride == 1 and column_stride >= max(1, rows)
    return by_column or (column_stride == 1 and row_stride >= max(1, columns))


def matrix_product(*names: str) -> Rule:
    """Rule of ``mm``/``addmm``: operands that cuBLAS cannot address are cloned (``prepare_matrix_for_cublas``)."""

    def rule(device: Device, call: Arguments, outputs: Outputs) -> Program | None:
        operands = [call[name] for name in names]
        clones = [m for m in operands if not (_dense(m) or _fits_blas(m))]
        return Program(after=tuple(Extra(shape_of(m), m.dtype, "contiguous") for m in clones)) if clones else None

    return rule


def batched_product(*names: str) -> Rule:
    """Rule of ``bmm``/``baddbmm``, as ``prepare_batch_matrix_for_cublas`` (Blas.cpp)."""

    def rule(device: Device, call: Arguments, outputs: Outputs) -> Program | None:
        clones = [m for m in (call[name] for name in names) if not (_fits_blas(m) or m.is_contiguous())]
        return Program(after=tuple(Extra(shape_of(m), m.dtype, "contiguous") for m in clones)) if clones else None

    return rule


def grouped_product(device: Device, call: Arguments, outputs: Outputs) -> Program | None:
    """``_grouped_mm``: sm_9x and sm_10x run one CUTLASS kernel for bf16 (GroupMM.cu), others one ``mm`` for each group.

    The CUTLASS kernel gets its arguments in one buffer and takes a workspace of tensor maps for each multiprocessor:
    two for the operands, three (sm_90) or two (sm_100) for the epilogue.
    """
    left, right = call["self"], call["mat2"]
    bf16 = left.dtype == right.dtype == outputs[0].dtype == torch.bfloat16
    if not bf16 or device.capability[0] not in (9, 10):
        return None
    ragged = left.dim() == right.dim() == 2
    groups = int(call["offs"].size(0)) if ragged else int((right if left.dim() == 2 else left).size(0))
    arguments = round_up(groups, 2) * 3 * 8 + groups * 12 + 3 * groups * 8
    workspace = (5 if device.capability[0] == 9 else 4) * _TENSOR_MAP_BYTES * device.multiprocessor_count
    return Program(after=(Extra((arguments,), torch.uint8, "input_buf"), Extra((workspace,), torch.uint8, "workspace")))


# --- softmax -----------------------------------------------------------------------------------------------------------


def softmax_backward(device: Device, call: Arguments, outputs: Outputs) -> Program:
    """``softmax_backward_cuda_out`` (SoftMax.cu): ``tmp = grad * output``, as large as the probabilities."""
    grad, output = call["grad_output"], call["output"]
    return Program(after=(Extra(shape_of(grad), torch.promote_types(grad.dtype, output.dtype), "tmp"),))


def contiguous_inputs(*names: str) -> Rule:
    """Rule of a kernel that makes its inputs contiguous (``host_softmax``, ``host_softmax_backward``, layer norm)."""

    def rule(device: Device, call: Arguments, outputs: Outputs) -> Program | None:
        copies = [call[name] for name in names if call[name] is not None and not call[name].is_contiguous()]
        return Program(after=tuple(Extra(shape_of(t), t.dtype, "contiguous") for t in copies)) if copies else None

    return rule


def safe_softmax(device: Device, call: Arguments, outputs: Outputs) -> Program:
    """``_safe_softmax`` (transformers/attention.cpp): the softmax, which scores are -inf, which rows are, and a zero."""
    scores, result = call["self"], outputs[0]
    rows = list(shape_of(scores))
    rows[call["dim"]] = 1
    return Program(
        (
            Extra(shape_of(result), result.dtype, "out"),
            Extra(shape_of(scores), torch.bool, "masked"),
            Extra(tuple(rows), torch.bool, "masked_rows"),
            Extra((), result.dtype, "zero"),
        )
    )


def logsumexp(device: Device, call: Arguments, outputs: Outputs) -> Program:
    """``logsumexp`` (ReduceOps.cpp): the maxima, and the exponentials of the whole input."""
    tensor = call["self"]
    dims = {dim % tensor.dim() for dim in call["dim"]}
    maxima = tuple(1 if dim in dims else int(extent) for dim, extent in enumerate(tensor.shape))
    return Program((Extra(maxima, tensor.dtype, "maxes"), Extra(shape_of(tensor), tensor.dtype, "exp")))


# --- norms -------------------------------------------------------------------------------------------------------------


def strided_input(device: Device, call: Arguments, outputs: Outputs) -> Program | None:
    """Layer norm and RMS norm, forward (layer_norm_kernel.cu): a strided input is copied first."""
    tensor = call["input"]
    return None if tensor.is_contiguous() else Program((Extra(shape_of(tensor), tensor.dtype, "X"),))


def _norm_backward(device: Device, call: Arguments, rank: int, names: Sequence[str]) -> Program | None:
    """``LaunchGammaBetaBackwardCUDAKernel`` (layer_norm_kernel.cu): partial gradients where rows are many and short."""
    tensor, grad, weight = call["input"], call["grad_out"], call["weight"]
    before = () if tensor.is_contiguous() else (Extra(shape_of(tensor), tensor.dtype, "X"),)
    after: tuple[Extra, ...] = () if grad.is_contiguous() else (Extra(shape_of(grad), grad.dtype, "dY"),)
    if weight is not None:
        numbers = (device.multiprocessor_count, *rows_and_width(tensor, rank), weight.element_size())
        after += tuple(sized(name, layer_norm_partials, *numbers) for name in names)
    return Program(before, after) if before or after else None


def layer_norm_backward(device: Device, call: Arguments, outputs: Outputs) -> Program | None:
    """``native_layer_norm_backward``: strided tensors are copied, the input first."""
    wanted = zip(("dgamma_blocks", "dbeta_blocks"), call["output_mask"][1:], strict=True)
    return _norm_backward(device, call, len(call["normalized_shape"]), [name for name, needed in wanted if needed])


def rms_norm_backward(device: Device, call: Arguments, outputs: Outputs) -> Program | None:
    """``_fused_rms_norm_backward``: like that of layer norm, without bias."""
    return _norm_backward(device, call, call["rank"], ["dgamma_blocks"] if call["output_mask"][1] else [])


def foreach_norm(device: Device, call: Arguments, outputs: Outputs) -> Program:
    """``foreach_tensor_norm_cuda`` (ForeachReduceOp.cu): one partial norm for each chunk of the largest tensor's count."""
    tensors = call["self"]
    chunks = max(ceil_div(t.numel(), _CHUNK) for t in tensors)
    return Program((Extra((len(tensors) * chunks,), accumulate_type(tensors[0].dtype), "output_per_tensor"),))


# --- reductions --------------------------------------------------------------------------------------------------------


def _vector(dtype: torch.dtype) -> int:
    return 8 if dtype.itemsize == 2 else 4


def _reduced_dims(call: Arguments) -> Sequence[int]:
    dims = call.get("dim")
    if dims is None:
        return ()
    return (dims,) if isinstance(dims, int) else tuple(dims)


def total(device: Device, call: Arguments, outputs: Outputs) -> Program | None:
    """``sum``, ``prod``, ``mean`` (ReduceSumProdKernel.cu, ReduceMomentKernel.cu); other types are cast first."""
    tensor, result = call["self"], outputs[0]
    after: tuple[Extra, ...] = ()
    cast = tensor.dtype != result.dtype and not (tensor.dtype in _HALF and result.dtype == torch.float32)
    if cast:
        after = (Extra(shape_of(tensor), result.dtype, "self"),)
    source = result.dtype if cast else tensor.dtype
    kernel = Kernel(accumulate_type(source).itemsize, _vector(source))
    subject = torch.empty_like(tensor, dtype=source, device="meta") if cast else tensor
    after += partial_results(device, subject, _reduced_dims(call), kernel)
    return Program(after=after) if after else None


def reduction(accumulator_bytes: int | None = None) -> Rule:
    """Rule of another reduction: partial results of the given size, or of the accumulation type's."""

    def rule(device: Device, call: Arguments, outputs: Outputs) -> Program | None:
        tensor: Any = call["self"]
        size = accumulate_type(tensor.dtype).itemsize if accumulator_bytes is None else accumulator_bytes
        after = partial_results(device, tensor, _reduced_dims(call), Kernel(size, 4))
        return Program(after=after) if after else None

    return rule


def extremum(device: Device, call: Arguments, outputs: Outputs) -> Program | None:
    """``amax``, ``amin``, ``max``, ``min`` without indices (ReduceMaxValuesKernel.cu): partial results of the input's type."""
    tensor = call["self"]
    after = partial_results(device, tensor, _reduced_dims(call), Kernel(tensor.element_size(), 4))
    return Program(after=after) if after else None
