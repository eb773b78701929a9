"""Composite functions whose C++ branch asks whether a tensor is on CUDA, written out as CUDA runs them.

On fake CPU tensors torch would take the CPU branch: another attention kernel, an unfused softmax, a dropout with a
noise tensor. ``CudaFunctions`` calls the ops of the CUDA branch instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from oomph.live.cuda_rules.attention import Backend, Call, can_use_efficient, can_use_flash, select_backend
from oomph.live.cuda_rules.rules import CudaRules

_aten = torch.ops.aten


def _additive_mask(mask: torch.Tensor | None, dtype: torch.dtype, blocked: float = -math.inf) -> torch.Tensor | None:
    """``convert_boolean_attn_mask_``: 0 where attention is allowed, `blocked` elsewhere."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.scalar_tensor(blocked, dtype=dtype, device=mask.device))


def _aligned_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``preprocess_mask``: rows padded so that strides are multiples of 8, then expanded to [B, H, Sq, Sk]."""
    if any(stride % 8 for stride in mask.stride()[:-1]) or mask.stride(-1) != 1:
        columns = mask.size(-1)
        mask = F.pad(mask, (0, 8 - columns % 8))[..., :columns]
    return mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))


def _pad_head(tensor: torch.Tensor) -> torch.Tensor:
    """``pad_last_dim``: the head size rounded up to a multiple of 8."""
    excess = tensor.size(-1) % 8
    return F.pad(tensor, (0, 8 - excess)) if excess else tensor


def _flash(call: Call, scale: float | None) -> torch.Tensor:
    head_dim = call.query.size(-1)
    query, key, value = (_pad_head(t) for t in (call.query, call.key, call.value))
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out = _aten._scaled_dot_product_flash_attention(query, key, value, call.dropout, call.causal, False, scale=scale)[0]
    return out[..., :head_dim] if out.size(-1) != head_dim else out


def _efficient(call: Call, scale: float | None) -> torch.Tensor:
    mask = _additive_mask(call.mask, call.query.dtype)
    if mask is not None:
        mask = _aligned_mask(mask, call.query, call.key)
    return _aten._scaled_dot_product_efficient_attention(
        call.query, call.key, call.value, mask, call.needs_grad, call.dropout, call.causal, scale=scale
    )[0]


def _cudnn(call: Call, scale: float | None) -> torch.Tensor:
    mask = _additive_mask(call.mask, call.query.dtype)
    return _aten._scaled_dot_product_cudnn_attention(
        call.query, call.key, call.value, mask, call.needs_grad, call.dropout, call.causal, False, scale=scale
    )[0]


def _math(call: Call, scale: float | None) -> torch.Tensor:
    """``_scaled_dot_product_attention_math``: half inputs are computed in fp32; the mask is added in place."""
    dtype = call.query.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    query, key, value = (t.to(torch.float32) if half else t for t in (call.query, call.key, call.value))
    factor = math.sqrt(1 / math.sqrt(query.size(-1)) if scale is None else scale)
    mask = _additive_mask(call.mask, dtype)
    query = _aten.mul.Scalar(query, factor)
    if call.causal:
        allowed = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        mask = _additive_mask(allowed, query.dtype)
    if call.grouped and call.query.size(-3) != call.key.size(-3):
        key = key.repeat_interleave(call.query.size(-3) // call.key.size(-3), -3)
        value = value.repeat_interleave(call.query.size(-3) // call.value.size(-3), -3)
    scores = torch.matmul(query, _aten.mul.Scalar(key.transpose(-2, -1), factor))
    if mask is not None:
        scores.add_(mask)
    weights = _aten._safe_softmax(scores, -1)
    if call.dropout > 0.0:
        weights = torch.native_dropout(weights, call.dropout, True)[0]
    weights.to(dtype)
    return torch.matmul(weights, value).to(dtype)


_BACKENDS: dict[Backend, Callable[[Call, float | None], torch.Tensor]] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "efficient": _efficient,
    "math": _math,
}


def _softmax_operands(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, int | None, torch.dtype | None]:
    return input, dim, dtype


def _fused_softmax(
    fused: Callable[[torch.Tensor, int, bool], torch.Tensor], plain: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """``softmax``/``log_softmax`` (SoftMax.cpp): fp16 to fp32 is one fused kernel on CUDA, for Half only."""

    def call(input: torch.Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = kwargs.get("dtype", next((a for a in args if isinstance(a, torch.dtype)), None))
        if input.dtype == torch.float16 and dtype == torch.float32 and dim is not None:
            return fused(input, dim, True)
        return plain(input, dim, *args, **kwargs)

    return call


def _dropout(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``dropout`` (Dropout.cpp): on CUDA one kernel that keeps a bool mask, unless in place."""

    def call(input: torch.Tensor, p: float = 0.5, *args: Any, **kwargs: Any) -> torch.Tensor:
        training = kwargs.get("training", kwargs.get("train", args[0] if args else True))
        inplace = kwargs.get("inplace", args[1] if len(args) > 1 else False)
        if training and not inplace and 0 < p < 1 and input.numel() > 0:
            return torch.native_dropout(input, p, True)[0]
        return plain(input, p, *args, **kwargs)

    return call


class CudaFunctions(TorchFunctionMode):
    """Runs composite functions as CUDA would, on tensors that lie elsewhere. Enter it around the step.

    Args:
        rules: the device, and the attention: "flash" and "efficient" pin that backend of scaled_dot_product_attention,
            any other leaves the choice to the dispatcher.
    """

    def __init__(self, rules: CudaRules) -> None:
        super().__init__()
        self._device = rules.device
        self._attention = rules.attention
        self._handlers: dict[Any, Callable[..., Any]] = {F.scaled_dot_product_attention: self.attend}
        for plain in (F.softmax, torch.softmax, torch.Tensor.softmax):
            self._handlers[plain] = _fused_softmax(torch._softmax, plain)
        for plain in (F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax):
            self._handlers[plain] = _fused_softmax(torch._log_softmax, plain)
        for plain in (F.dropout, torch.dropout):
            self._handlers[plain] = _dropout(plain)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the CUDA branch of `func` where there is one, else `func`."""
        return self._handlers.get(func, func)(*args, **(kwargs or {}))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """``scaled_dot_product_attention`` (transformers/attention.cpp) with the backend of the device.

        Raises:
            UserError: the pinned backend cannot run on the device with these tensors.
        """
        call = Call(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        return _BACKENDS[self._backend(call)](call, scale)

    def _backend(self, call: Call) -> Backend:
        return select_backend(self._device, call)
