"""Composite functions whose C++ branch asks whether a tensor is on CUDA, written out as CUDA runs them.

On fake CPU tensors torch would take the CPU branch: another attention kernel, an unfused softmax, a dropout with a
noise tensor, a one-hot encoding that reads its indices. ``CudaFunctions`` calls the ops of the CUDA branch instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from oomph.errors import UserError
from oomph.live.cuda_rules.attention import Backend, Call, can_use_efficient, can_use_flash, select_backend
from oomph.live.cuda_rules.autocast import casting, under_autocast
from oomph.live.cuda_rules.norms import LayerNorm, RmsNorm
from oomph.live.cuda_rules.rules import CudaRules

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_one_hot_reading = F.one_hot
_unfused_rms_norm = torch.rms_norm
_plain_layer_norm = torch.layer_norm
_plain_linear = F.linear
_plain_multi_head = F.multi_head_attention_forward
_plain_engine = torch.autograd.graph._engine_run_backward
_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)
_LOG_SOFTMAX = (F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax)


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype, blocked: float = -math.inf) -> torch.Tensor | None:
    """``convert_boolean_attn_mask_``: 0 where attention is allowed, `blocked` elsewhere; other masks as they are."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.scalar_tensor(blocked, dtype=dtype, device=mask.device))


def aligned_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``preprocess_mask``: padded so that its strides are multiples of 8, then expanded to [B, H, Sq, Sk]."""
    if any(stride % 8 for stride in mask.stride()[:-1]) or mask.stride(-1) != 1:
        columns = mask.size(-1)
        mask = F.pad(mask, (0, 8 - columns % 8))[..., :columns]
    return mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))


def _pad_head(tensor: torch.Tensor) -> torch.Tensor:
    """``pad_last_dim``: the head size rounded up to a multiple of 8."""
    excess = tensor.size(-1) % 8
    return F.pad(tensor, (0, 8 - excess)) if excess else tensor


def _repeat_heads(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``pre_process_group_query_attention_input``: one key and value head for each query head."""
    heads = call.query.size(-3)
    if not call.grouped or heads == call.key.size(-3) == call.value.size(-3):
        return call.key, call.value
    return (
        call.key.repeat_interleave(heads // call.key.size(-3), -3),
        call.value.repeat_interleave(heads // call.value.size(-3), -3),
    )


def _as_repeated(call: Call) -> Call:
    """A call with the shapes that repeated heads have, and no copies."""
    if not call.grouped:
        return call
    key, value = (tensor.detach()[:, :1].expand(-1, call.query.size(1), -1, -1) for tensor in (call.key, call.value))
    return replace(call, key=key, value=value, grouped=False)


def _flash(call: Call, scale: float | None) -> torch.Tensor:
    head = call.query.size(-1)
    query, key, value = (_pad_head(t) for t in (call.query, call.key, call.value))
    scale = 1 / math.sqrt(head) if scale is None else scale
    out: torch.Tensor = _aten._scaled_dot_product_flash_attention(
        query, key, value, call.dropout, call.causal, False, scale=scale
    )[0]
    return out[..., :head] if out.size(-1) != head else out


def _efficient(call: Call, scale: float | None) -> torch.Tensor:
    key, value = _repeat_heads(call)
    mask = additive_mask(call.mask, call.query.dtype)
    if mask is not None:
        mask = aligned_mask(mask, call.query, key)
    out: torch.Tensor = _aten._scaled_dot_product_efficient_attention(
        call.query, key, value, mask, call.needs_grad, call.dropout, call.causal, scale=scale
    )[0]
    return out


def _cudnn(call: Call, scale: float | None) -> torch.Tensor:
    mask = additive_mask(call.mask, call.query.dtype)
    out: torch.Tensor = _aten._scaled_dot_product_cudnn_attention(
        call.query, call.key, call.value, mask, call.needs_grad, call.dropout, call.causal, False, scale=scale
    )[0]
    return out


def math_attention(call: Call, scale: float | None) -> torch.Tensor:
    """``_scaled_dot_product_attention_math``: half inputs are computed in fp32, and the mask is added in place.

    torch's own composite would add it out of place to a fake tensor, and draw dropout without the fused kernel.
    """
    dtype = call.query.dtype
    mask = additive_mask(call.mask, dtype)
    query, key, value = (t.to(torch.float32) if dtype in _HALF else t for t in (call.query, call.key, call.value))
    factor = math.sqrt(1 / math.sqrt(query.size(-1)) if scale is None else scale)
    query = _aten.mul.Scalar(query, factor)
    if call.causal:
        allowed = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        mask = additive_mask(allowed, query.dtype)
    key, value = _repeat_heads(Call(query, key, value, grouped=call.grouped))
    scores = torch.matmul(query, _aten.mul.Scalar(key.transpose(-2, -1), factor))
    if mask is not None:
        scores.add_(mask)
    weights = _aten._safe_softmax(scores, -1)
    if call.dropout > 0.0:
        weights = torch.native_dropout(weights, call.dropout, True)[0]
    returned = weights.to(dtype)
    out = torch.matmul(weights, value).to(dtype)
    del returned
    return out


_BACKENDS: dict[Backend, Callable[[Call, float | None], torch.Tensor]] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "efficient": _efficient,
    "math": math_attention,
}


def _fused_softmax(fused: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``softmax``, ``log_softmax`` (SoftMax.cpp): fp16 to fp32 is one kernel on CUDA, for Half only."""

    def call(input: torch.Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = kwargs.get("dtype", next((a for a in args if isinstance(a, torch.dtype)), None))
        dtype = torch.float32 if dtype is None and casting() else dtype
        if input.dtype == torch.float16 and dtype == torch.float32 and dim is not None:
            return fused(input, dim, True)
        return plain(input, dim, *args, **kwargs)

    return call


def _fused_dropout(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``dropout`` (Dropout.cpp, ``is_fused_kernel_acceptable``): on CUDA one kernel that keeps a bool mask."""

    def call(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if training and not inplace and 0 < p < 1 and input.numel() > 0:
            return torch.native_dropout(input, p, True)[0]
        return plain(input, p, training, inplace)

    return call


def _one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """``one_hot`` (Onehot.cpp): on CUDA the indices are not read where the number of classes is given."""
    if num_classes < 1:
        return _one_hot_reading(tensor, num_classes)
    encoded = torch.zeros(*tensor.shape, num_classes, dtype=tensor.dtype, device=tensor.device)
    return encoded.scatter_(-1, tensor.unsqueeze(-1), 1)


@under_autocast("fp32")
def _rms_norm(
    input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """``rms_norm`` (layer_norm.cpp): fused on CUDA, unless the weight has another type than the input."""
    if not _fake(input) or input.is_complex() or (weight is not None and weight.dtype != input.dtype):
        return _unfused_rms_norm(input, list(normalized_shape), weight, eps)
    out: torch.Tensor = RmsNorm.apply(input, normalized_shape, weight)  # type: ignore[no-untyped-call]
    return out


@under_autocast("fp32")
def _layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """``layer_norm`` (layer_norm.cpp): for half precision the saved statistics are fp32 on CUDA."""
    if not _fake(input) or input.dtype not in _HALF:
        return _plain_layer_norm(input, list(normalized_shape), weight, bias, eps)
    out: torch.Tensor = LayerNorm.apply(input, normalized_shape, weight, bias)  # type: ignore[no-untyped-call]
    return out


@under_autocast("lower_precision_fp")
def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear`` (Linear.cpp): the bias is added in place to the product of a strided input, which no fake tensor does."""
    if bias is None or input.dim() == 2 or input.is_contiguous():
        return _plain_linear(input, weight, bias)
    return torch.matmul(input, weight.t()).add_(bias)


def _fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


class CudaFunctions(TorchFunctionMode):
    """Runs composite functions as CUDA would, on fake tensors that lie elsewhere. Enter it around the step.

    Args:
        rules: the device, and the attention: "flash" and "efficient" pin that backend of scaled_dot_product_attention,
            any other leaves the choice to the dispatcher.
    """

    def __init__(self, rules: CudaRules) -> None:
        super().__init__()
        self._rules = rules
        branches = {name: branch for name, branch in self._branches().items() if name not in rules.without}
        self._handlers = {function: handler for branch in branches.values() for function, handler in branch.items()}
        self._handlers[F.multi_head_attention_forward] = self._multi_head

    def _branches(self) -> dict[str, dict[Any, Callable[..., Any]]]:
        """What replaces which function, by the name of the rule."""
        dropout = _fused_dropout(F.dropout)
        softmax = {function: _fused_softmax(torch._softmax, function) for function in _SOFTMAX}
        log_softmax = {function: _fused_softmax(torch._log_softmax, function) for function in _LOG_SOFTMAX}
        return {
            "attention-backend": {F.scaled_dot_product_attention: self.attend},
            "bias-in-place": {F.linear: _linear},
            "half-to-float-softmax": softmax | log_softmax,
            "native-dropout": {F.dropout: dropout, torch.dropout: dropout},
            "norm-kernels": {
                F.layer_norm: _layer_norm,
                torch.layer_norm: _layer_norm,
                F.rms_norm: _rms_norm,
                torch.rms_norm: _rms_norm,
            },
            "one-hot": {F.one_hot: _one_hot},
        }

    @property
    def replacements(self) -> dict[Any, Callable[..., Any]]:
        """The CUDA branch by function, for a caller that replaces the functions themselves instead of entering the mode."""
        return dict(self._handlers)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the CUDA branch of `func` where there is one, else `func`.

        The mode stays on within backward, where checkpoints run parts of forward again.
        """
        if func in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            with mock.patch.object(torch.autograd, "_engine_run_backward", self._run_engine):
                return func(*args, **(kwargs or {}))
        return self._handlers.get(func, func)(*args, **(kwargs or {}))

    def _run_engine(self, *args: Any, **kwargs: Any) -> Any:
        """The autograd engine with the mode on, which torch takes off for the call of ``backward`` that leads here."""
        with self:
            return _plain_engine(*args, **kwargs)

    @under_autocast("lower_precision_fp")
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
        device = self._rules.device
        if self._rules.attention == "flash":
            if not can_use_flash(device, call):
                raise _refused("flash", device.capability, call)
            return "flash"
        if self._rules.attention == "efficient":
            if not can_use_efficient(device, _as_repeated(call)):
                raise _refused("memory-efficient", device.capability, call)
            return "efficient"
        return select_backend(device, call)

    def _multi_head(self, *args: Any, **kwargs: Any) -> Any:
        """``multi_head_attention_forward`` with the functions it looks up in torch.nn.functional replaced."""
        names = ("scaled_dot_product_attention", "softmax", "dropout", "linear")
        fused: dict[str, Any] = {name: self._handlers.get(getattr(F, name), getattr(F, name)) for name in names}
        with mock.patch.multiple(F, **fused):
            return _plain_multi_head(*args, **kwargs)


def _refused(name: str, capability: tuple[int, int], call: Call) -> UserError:
    shapes = ", ".join("x".join(map(str, t.shape)) for t in (call.query, call.key, call.value))
    masked = "with a mask" if call.mask is not None else "without a mask"
    return UserError(
        f"The {name} attention kernel does not take {call.query.dtype} tensors of {shapes} {masked} on compute capability"
        f" {capability[0]}.{capability[1]}.",
        "Choose attention: sdpa, which takes the fastest kernel that fits.",
    )
