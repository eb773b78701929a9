"""Attention on CUDA: which backend scaled_dot_product_attention takes on a device.

The selection follows ``sdp::select_sdp_backend`` (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp) with the shared
checks of sdp_utils_cpp.h, torch 2.13, all backends enabled, no deterministic algorithms, no nested tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from oomph.live.cuda_rules.program import Device

Backend = Literal["cudnn", "flash", "efficient", "math"]

_HALF = (torch.float16, torch.bfloat16)
_CUDNN_DROPOUT_STEPS = 16
_CUDNN_MOST_HEADS = 65535


@dataclass(frozen=True)
class Call:
    """One call of scaled_dot_product_attention; tensors are [batch, heads, tokens, head_dim]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    grouped: bool = False

    @property
    def needs_grad(self) -> bool:
        """Whether any input takes part in backward."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.query, self.key, self.value))


def select_backend(device: Device, call: Call) -> Backend:
    """The backend that torch's dispatcher takes on `device` (``select_sdp_backend``, ``priority_order``)."""
    if _prefers_cudnn(device) and can_use_cudnn(device, call):
        return "cudnn"
    if can_use_flash(device, call):
        return "flash"
    if can_use_efficient(device, call):
        return "efficient"
    return "math"


def can_use_cudnn(device: Device, call: Call) -> bool:
    """``can_use_cudnn_attention``: a mask may broadcast, key and value heads may differ, dropout is in sixteenths."""
    return (
        device.cudnn >= 90000
        and not (call.dropout > 0.0 and 91100 < device.cudnn < 91400)
        and call.dropout * _CUDNN_DROPOUT_STEPS == int(call.dropout * _CUDNN_DROPOUT_STEPS)
        and max(call.query.shape[:2]) <= _CUDNN_MOST_HEADS
        and (8, 0) <= device.capability <= (12, 1)
        and _fused_shapes(call)
        and _same_dtype(call, _low_precision(device))
        and _broadcastable_mask(call)
        and _last_dim_contiguous(call, ignore_singleton=True)
        and _compatible_heads(call, supports_grouped=True, same_key_value=False)
        and _cudnn_shapes(device, call)
    )


def can_use_flash(device: Device, call: Call) -> bool:
    """``can_use_flash_attention``: sm_80 or newer, half precision, no mask, equal head sizes up to 256."""
    head_dim = call.query.size(-1)
    return (
        (8, 0) <= device.capability <= (12, 1)
        and _fused_shapes(call)
        and call.mask is None
        and head_dim == call.key.size(-1) == call.value.size(-1) <= 256
        and not (_small_shared_memory(device) and call.needs_grad and _large_head(head_dim, call.dropout))
        and (not call.causal or call.query.size(-2) == call.key.size(-2))
        and _same_dtype(call, _low_precision(device))
        and _compatible_heads(call, supports_grouped=True)
        and _last_dim_contiguous(call, ignore_singleton=True)
    )


def can_use_efficient(device: Device, call: Call) -> bool:
    """``can_use_mem_efficient_attention``: aligned head sizes, a mask allowed, no grouped heads in torch 2.13."""
    alignment = _gemm_alignment(device, call.query.dtype)
    head_dim, value_dim = call.query.size(-1), call.value.size(-1)
    dtypes = (torch.float16, torch.float32, torch.bfloat16) if device.sm >= 80 else (torch.float16, torch.float32)
    return (
        (5, 0) <= device.capability <= (12, 1)
        and _fused_shapes(call)
        and head_dim == call.key.size(-1)
        and all(size > 0 and size % alignment == 0 for size in (head_dim, value_dim))
        and (device.sm < 80 or _aligned_starts(call, alignment))
        and _last_dim_contiguous(call, ignore_singleton=False)
        and _compatible_heads(call, supports_grouped=False)
        and _same_dtype(call, dtypes)
    )


def _prefers_cudnn(device: Device) -> bool:
    """``check_prefer_cudnn_attention``, without ``TORCH_CUDNN_SDPA_DEPRIORITIZED``."""
    return device.cudnn > 91500 and device.capability in ((9, 0), (10, 0), (10, 3))


def _same_dtype(call: Call, allowed: tuple[torch.dtype, ...]) -> bool:
    """``check_tensor_dtype``."""
    return call.query.dtype == call.key.dtype == call.value.dtype and call.query.dtype in allowed


def _low_precision(device: Device) -> tuple[torch.dtype, ...]:
    """``check_dtypes_low_precision``."""
    return _HALF if device.sm >= 80 else (torch.float16,)


def _fused_shapes(call: Call) -> bool:
    """``check_tensor_shapes`` and ``check_nonzero_sequence_lengths_dense``."""
    return all(t.dim() == 4 for t in (call.query, call.key, call.value)) and call.query.size(2) > 0 and call.key.size(2) > 0


def _last_dim_contiguous(call: Call, ignore_singleton: bool) -> bool:
    """``check_last_dim_stride_equals_1_dense``."""
    contiguous = all(t.stride(-1) == 1 for t in (call.query, call.key, call.value))
    contiguous = contiguous or (ignore_singleton and call.query.size(-1) == 1)
    return contiguous and (call.mask is None or call.mask.stride(-1) == 1)


def _compatible_heads(call: Call, supports_grouped: bool, same_key_value: bool = True) -> bool:
    """``check_batch_size_and_num_heads_dense`` with ``check_grouped_query_attention``."""
    if not call.query.size(0) == call.key.size(0) == call.value.size(0):
        return False
    heads, key_heads, value_heads = call.query.size(1), call.key.size(1), call.value.size(1)
    if not (call.grouped and supports_grouped):
        return heads == key_heads == value_heads
    if same_key_value:
        return key_heads == value_heads and heads % key_heads == 0
    return heads % key_heads == 0 and heads % value_heads == 0


def _broadcastable_mask(call: Call) -> bool:
    """``check_attn_mask_shape``."""
    if call.mask is None:
        return True
    if call.mask.requires_grad or call.mask.dim() not in (2, 4):
        return False
    wanted = (call.query.size(0), call.query.size(1), call.query.size(2), call.key.size(2))[-call.mask.dim() :]
    return all(extent in (1, target) for extent, target in zip(call.mask.shape, wanted, strict=True))


def _cudnn_shapes(device: Device, call: Call) -> bool:
    """``check_cudnn_tensor_shapes`` for cuDNN 9."""
    head_dim, value_dim = call.query.size(3), call.value.size(3)
    limit = 128
    if device.capability == (9, 0) and device.cudnn >= 91000:
        limit = 256
    if device.capability[0] == 10 and device.cudnn >= 91100 and (head_dim, value_dim) == (192, 128):
        limit = 192
    return (
        head_dim <= limit
        and value_dim <= limit
        and head_dim % 8 == 0
        and value_dim % 8 == 0
        and call.key.size(2) != 1
        and not (call.query.size(2) == 1 and call.dropout != 0.0)
    )


def _aligned_starts(call: Call, alignment: int) -> bool:
    """``check_data_ptr_alignment_mem_efficient``: base addresses are multiples of 512 bytes, so offsets decide."""
    return all(t.numel() == 0 or t.storage_offset() % alignment == 0 for t in (call.query, call.key, call.value))


def _small_shared_memory(device: Device) -> bool:
    return (8, 6) <= device.capability <= (8, 9) or (12, 0) <= device.capability <= (12, 1)


def _large_head(head_dim: int, dropout: float) -> bool:
    """``check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120``."""
    return 192 < head_dim <= 224 or (head_dim > 224 and dropout > 0.0)


def _gemm_alignment(device: Device, dtype: torch.dtype) -> int:
    """``minimum_gemm_alignment``, in elements."""
    half = dtype in _HALF
    alignment = 4 if device.sm >= 80 else 1
    tensor_cores = device.sm >= 80 or (device.sm >= 70 and half)
    return max(alignment, 128 // (16 if half else 32)) if tensor_cores else alignment
