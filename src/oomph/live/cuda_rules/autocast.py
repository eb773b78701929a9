"""``torch.autocast`` as CUDA does it, on fake tensors that lie on the CPU.

Autocast is a layer of the dispatcher above autograd, with kernels of its own for each kind of device. The CPU's cover other
operators than CUDA's do. Within `cuda_autocast` the CPU's layer does what CUDA's would: each operator of CUDA's lists has
CUDA's policy, every other operator passes through, and autocast for ``cuda`` means that layer.

The policies are those of ``WrapFunction_``, the lists those of the macros ``AT_FORALL_*`` (both ATen/autocast_mode.h, torch
2.13), registered for ``Autocast`` in ATen/autocast_mode.cpp.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Literal, ParamSpec, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp import autocast_mode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdRef

from oomph.live.offload import in_host_memory

P = ParamSpec("P")
R = TypeVar("R")
Policy = Literal["lower_precision_fp", "fp32", "fp32_set_opt_dtype", "fp32_append_dtype", "promote", "banned"]

_LISTS: Final[dict[Policy, str]] = {
    "lower_precision_fp": """
        _convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
        conv_transpose3d.input convolution cudnn_convolution cudnn_convolution_transpose prelu addmm addmv addr matmul
        einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell
        _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention
        scaled_dot_product_attention
    """,
    "fp32": """
        acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
        pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim
        nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
        hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss
        multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits
        dist pdist cdist renorm logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
        _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
        _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa
    """,
    "fp32_set_opt_dtype": """
        prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
        linalg_matrix_norm.str_ord sum sum.dim_IntList
    """,
    "fp32_append_dtype": "norm.Scalar norm.ScalarOpt_dim",
    "promote": "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add",
    "banned": "binary_cross_entropy",
}
POLICIES: Final[dict[str, Policy]] = {name: policy for policy, names in _LISTS.items() for name in names.split()}
"""What CUDA's autocast does with an operator of ``aten``, by its name with its overload."""

_WITH_DTYPE: Final = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
_CPU: Final = "cpu"
_KEY: Final = "AutocastCPU"
_KEYS: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

_casts: dict[WeakIdRef, Tensor] | None = None
"""``cached_casts``: casts of float32 leaves that require gradients, by the leaf; none outside of `cuda_autocast`.

The leaves are held weakly, the casts until the outermost autocast ends.
"""


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Autocast of fake tensors on the CPU does what CUDA's does, and whoever asks about CUDA's is told about it."""
    global _casts
    with ExitStack() as stack:
        stack.callback(_registered()._destroy)
        for patch in _patches():
            stack.enter_context(patch)
        _casts = {}
        try:
            yield
        finally:
            _casts = None


def under_autocast(policy: Policy) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function that stands for an operator of CUDA's, so that it is called as autocast calls the operator."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not casting():
                return function(*args, **kwargs)
            with torch._C._ExcludeDispatchKeyGuard(_KEYS):
                cast_args, cast_kwargs = _cast_all(args, kwargs, _target(policy, args, kwargs))
                return function(*cast_args, **cast_kwargs)

        return call

    return decorate


def casting() -> bool:
    """Whether CUDA's autocast is on."""
    return _casts is not None and torch.is_autocast_enabled(_CPU)


# --- Kernels -----------------------------------------------------------------------------------------------------------


def _registered() -> torch.library.Library:
    """CUDA's kernels in the place of the CPU's; destroying it brings those back."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, policy in POLICIES.items():
            library.impl(name, _kernel(name, policy), _KEY)
        for name in _covered_by_the_cpu():
            if name not in POLICIES:
                library.impl(name, torch.library.fallthrough_kernel, _KEY)
    return library


@functools.cache
def _covered_by_the_cpu() -> tuple[str, ...]:
    """The operators that torch's autocast for the CPU has a kernel for."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    covered = [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, _KEY)]
    return tuple(name.removeprefix("aten::") for name in covered)


@functools.cache
def _kernel(name: str, policy: Policy) -> Callable[..., Any]:
    operator, appended = _overload(name), _overload(_WITH_DTYPE.get(name, name))

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            if policy == "banned":
                raise RuntimeError(f"{name} is unsafe to autocast, torch refuses it on CUDA")
            if policy == "fp32_set_opt_dtype":
                return operator(*args, **(_with_dtype(operator, args, kwargs) if _is_eligible(args[0]) else kwargs))
            if policy == "fp32_append_dtype":
                return appended(*_with_defaults(operator, args), dtype=_type_of(args[0]))
            args, kwargs = _cast_all(args, kwargs, _target(policy, args, kwargs))
            return operator(*args, **kwargs)

    return run


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _with_dtype(operator: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """``set_opt_dtype``: float32 where the caller gives no dtype."""
    position = [argument.name for argument in operator._schema.arguments].index("dtype")
    given = args[position] if position < len(args) else kwargs.get("dtype")
    return kwargs if given is not None else {**kwargs, "dtype": torch.float32}


def _with_defaults(operator: Any, args: Any) -> tuple[Any, ...]:
    return (*args, *(argument.default_value for argument in operator._schema.arguments[len(args) :]))


def _type_of(tensor: Tensor) -> torch.dtype:
    """``type_from_firstarg``."""
    return torch.float32 if _is_eligible(tensor) else tensor.dtype


# --- Casts -------------------------------------------------------------------------------------------------------------


def _target(policy: Policy, args: Any, kwargs: dict[str, Any]) -> torch.dtype:
    """What the arguments of an operator are cast to."""
    lower = torch.get_autocast_dtype(_CPU)
    if policy == "promote":
        dtypes = {tensor.dtype for tensor in tree_leaves((args, kwargs)) if _is_eligible(tensor)}
        if not dtypes <= {torch.float32, lower}:
            raise RuntimeError("autocast promotes float32 and its own dtype alone, not another floating-point type")
        return torch.float32 if torch.float32 in dtypes else lower
    return torch.float32 if policy == "fp32" else lower


def _cast_all(args: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All arguments, the last one first: so the compiled code of torch's wheels evaluates those of a call."""
    named = {name: _cast(value, dtype) for name, value in reversed(kwargs.items())}
    return tuple([_cast(value, dtype) for value in reversed(args)][::-1]), named


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """``cached_cast``: a tensor, or the tensors of a list."""
    if isinstance(value, list | tuple):
        return type(value)(_cast(item, dtype) for item in value)
    if not _is_eligible(value) or value.dtype == dtype:
        return value
    if not _is_cached(value, dtype):
        return value.to(dtype)
    assert _casts is not None
    key = WeakIdRef(value)
    if key not in _casts:
        _casts[key] = value.to(dtype)
    return _casts[key]


def _is_eligible(value: Any) -> bool:
    """``is_eligible``, a fake tensor being one that lies on the GPU."""
    return isinstance(value, FakeTensor) and value.is_floating_point() and value.dtype != torch.float64 and not in_host_memory()


def _is_cached(tensor: Tensor, dtype: torch.dtype) -> bool:
    """``can_try_cache``: casts of float32 leaves that require a gradient are kept."""
    lowers = dtype == torch.get_autocast_dtype(_CPU) and tensor.dtype == torch.float32
    return lowers and tensor.requires_grad and tensor.is_leaf and not tensor._is_view() and torch.is_autocast_cache_enabled()


# --- Python's side -----------------------------------------------------------------------------------------------------


def _patches() -> Iterator[Any]:
    """What asks for CUDA's autocast by name, or by no name, gets the CPU's; leaving the outermost one drops the casts."""
    clear, start, cast = torch.clear_autocast_cache, torch.autocast.__init__, autocast_mode._cast

    def clear_both() -> None:
        clear()
        if _casts is not None:
            _casts.clear()

    def initialise(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        start(self, _here(device_type), *args, **kwargs)

    yield mock.patch.object(torch, "clear_autocast_cache", clear_both)
    yield mock.patch.object(torch.autocast, "__init__", initialise)
    yield mock.patch.object(autocast_mode, "_cast", lambda value, device, dtype: cast(value, _here(device), dtype))
    yield mock.patch.object(torch, "get_autocast_gpu_dtype", functools.partial(torch.get_autocast_dtype, _CPU))
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        yield mock.patch.object(torch, name, _asked_of_the_cpu(getattr(torch, name)))


def _asked_of_the_cpu(function: Callable[[str], Any]) -> Callable[..., Any]:
    return lambda device="cuda": function(_here(device))


def _here(device: str) -> str:
    return _CPU if device == "cuda" else device
