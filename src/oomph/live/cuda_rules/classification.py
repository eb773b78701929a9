"""The ops whose CUDA kernels allocate nothing but their outputs.

Elementwise ops carry torch's ``pointwise`` tag and are known by it: TensorIterator casts inside the kernel, on CUDA
without temporaries. Views return their argument. The rest is listed here: kernels that write into their outputs
directly; the copy that some of them make of a strided input is not modelled. Missing on purpose: convolutions, cuDNN
attention, group norm, and whatever nobody looked at.
"""

from __future__ import annotations

import torch

_FACTORIES = """
    arange empty empty_like empty_permuted empty_strided eye full full_like linspace new_empty new_empty_strided new_full
    new_ones new_zeros normal ones ones_like rand rand_like randint randint_like randn randn_like scalar_tensor zeros
    zeros_like lift_fresh lift_fresh_copy triu_indices tril_indices
"""
_COPIES = """
    _to_copy clone contiguous copy copy_ cat stack constant_pad_nd repeat roll flip tril tril_ triu triu_ fill fill_ zero_
    _unsafe_view _reshape_copy expand_copy view_copy slice_scatter select_scatter slice_backward select_backward
    unfold unfold_backward as_strided_scatter diagonal_backward
"""
_GATHERS = """
    embedding gather index_select index_add index_add_ index_copy index_copy_ index_fill index_fill_ scatter scatter_
    scatter_add scatter_add_ take_along_dim masked_fill masked_fill_ where searchsorted bucketize
"""
_NETWORK = """
    native_layer_norm native_dropout native_dropout_backward _softmax _log_softmax _log_softmax_backward_data
    nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward glu glu_backward
    upsample_bilinear2d upsample_bilinear2d_backward _upsample_bilinear2d_aa _upsample_bilinear2d_aa_backward
    upsample_bicubic2d upsample_bicubic2d_backward _upsample_bicubic2d_aa _upsample_bicubic2d_aa_backward
    upsample_nearest2d upsample_nearest2d_backward avg_pool2d avg_pool2d_backward max_pool2d_with_indices
    im2col col2im pixel_shuffle pixel_unshuffle bernoulli bernoulli_ uniform_ normal_ random_ histc
    gelu_backward silu_backward sigmoid_backward tanh_backward threshold_backward leaky_relu_backward elu_backward
    hardswish_backward hardsigmoid_backward hardtanh_backward softplus_backward mse_loss mse_loss_backward
    _fused_adamw_ _fused_adam_ _fused_sgd_ _amp_foreach_non_finite_check_and_unscale_ _amp_update_scale_
    _local_scalar_dense item equal is_same_size polar complex
    floor_divide
"""
_NAMES = frozenset((_FACTORIES + _COPIES + _GATHERS + _NETWORK).split())


def allocates_outputs_only(func: torch._ops.OpOverload) -> bool:
    """Whether the op is known to allocate nothing on CUDA besides its outputs."""
    if torch.Tag.pointwise in func.tags:
        return True
    returns = func._schema.returns
    if not any("Tensor" in str(value.type) for value in returns):
        return True
    if all(value.alias_info is not None and not value.alias_info.is_write for value in returns):
        return True
    name = func._schema.name.removeprefix("aten::")
    return name in _NAMES or (name.startswith("_foreach_") and name not in ("_foreach_norm", "_foreach_max"))
