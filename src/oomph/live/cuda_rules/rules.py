"""The rules by op: hidden allocations, host outputs, library workspaces, and what has been looked at."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from oomph.core.devices import cublas_workspace_bytes, cublaslt_workspace_bytes
from oomph.live.cuda_rules import attention_kernels, convolutions, indexing, kernels, quantized
from oomph.live.cuda_rules.classification import allocates_outputs_only
from oomph.live.cuda_rules.names import switched_off
from oomph.live.cuda_rules.program import Device, Program, Rule, bind
from oomph.records import Attention

_aten = torch.ops.aten
_cuda = torch.ops.oomph_cuda

_MULTIPLIES: dict[torch._ops.OpOverload, Rule] = {
    _aten.mm.default: kernels.matrix_product("self", "mat2"),
    _aten.addmm.default: kernels.matrix_product("mat1", "mat2"),
    _aten.bmm.default: kernels.batched_product("self", "mat2"),
    _aten.baddbmm.default: kernels.batched_product("batch1", "batch2"),
}
_GROUPED: dict[torch._ops.OpOverload, Rule] = {_aten._grouped_mm.default: kernels.grouped_product}
_CALLS_BLAS = frozenset({*_MULTIPLIES, *_GROUPED})

TABLE: dict[str, dict[torch._ops.OpOverload, Rule]] = {
    "convolution-workspace": convolutions.WORKSPACES,
    "cudnn-attention": {
        _aten._scaled_dot_product_cudnn_attention.default: attention_kernels.cudnn_forward,
        _aten._scaled_dot_product_cudnn_attention_backward.default: attention_kernels.cudnn_backward,
    },
    "efficient-attention": {
        _aten._scaled_dot_product_efficient_attention.default: attention_kernels.efficient_forward,
        _aten._scaled_dot_product_efficient_attention_backward.default: attention_kernels.efficient_backward,
    },
    "embedding-backward": {_aten.embedding_dense_backward.default: indexing.embedding_dense_backward},
    "flash-attention": {
        _aten._scaled_dot_product_flash_attention.default: attention_kernels.flash_forward,
        _aten._scaled_dot_product_flash_attention_backward.default: attention_kernels.flash_backward,
    },
    "foreach-norm": {_aten._foreach_norm.Scalar: kernels.foreach_norm},
    "grouped-products": _GROUPED,
    "index-backward": {
        _aten.index_put.default: indexing.index_put,
        _aten.index_put_.default: indexing.index_put,
        _aten._index_put_impl_.default: indexing.index_put,
        _aten._unsafe_index_put.default: indexing.index_put,
    },
    "mask-coordinates": {
        _aten.index.Tensor: indexing.index,
        _aten.masked_scatter.default: indexing.masked_scatter,
        _aten.masked_scatter_.default: indexing.masked_scatter,
        _aten.masked_scatter_backward.default: indexing.masked_scatter_backward,
        _aten.nonzero.default: indexing.nonzero,
    },
    "norm-temporaries": {
        _aten.native_layer_norm.default: kernels.strided_input,
        _aten.native_layer_norm_backward.default: kernels.layer_norm_backward,
        _cuda.layer_norm.default: kernels.strided_input,
        _cuda.rms_norm.default: kernels.strided_input,
        _cuda.rms_norm_backward.default: kernels.rms_norm_backward,
    },
    "reductions": {
        _aten.sum.default: kernels.total,
        _aten.sum.dim_IntList: kernels.total,
        _aten.mean.default: kernels.total,
        _aten.mean.dim: kernels.total,
        _aten.prod.default: kernels.total,
        _aten.prod.dim_int: kernels.total,
        _aten.linalg_vector_norm.default: kernels.reduction(),
        _aten.amax.default: kernels.extremum,
        _aten.amin.default: kernels.extremum,
        _aten.max.default: kernels.extremum,
        _aten.min.default: kernels.extremum,
        _aten.all.default: kernels.reduction(1),
        _aten.all.dim: kernels.reduction(1),
        _aten.any.default: kernels.reduction(1),
        _aten.any.dim: kernels.reduction(1),
        _aten.var.correction: kernels.reduction(16),
        _aten.var_mean.correction: kernels.reduction(16),
        _aten.argmax.default: kernels.reduction(16),
        _aten.argmin.default: kernels.reduction(16),
        _aten.max.dim: kernels.reduction(16),
        _aten.min.dim: kernels.reduction(16),
    },
    "softmax-backward-temporary": {_aten._softmax_backward_data.default: kernels.softmax_backward},
    "softmax-temporaries": {
        _aten._safe_softmax.default: kernels.safe_softmax,
        _aten.logsumexp.default: kernels.logsumexp,
    },
    "sorts-and-scans": {
        _aten.sort.default: indexing.sort,
        _aten.sort.stable: indexing.sort,
        _aten.topk.default: indexing.topk,
        _aten.cumsum.default: indexing.cumsum,
    },
    "strided-copies": {
        **_MULTIPLIES,
        _aten._softmax.default: kernels.contiguous_inputs("self"),
        _aten._log_softmax.default: kernels.contiguous_inputs("self"),
        _aten._log_softmax_backward_data.default: kernels.contiguous_inputs("grad_output", "output"),
    },
}
"""The rules of operators by name. Those of bitsandbytes are in `quantized`."""

_RULES = {func: (name, rule) for name, rules in TABLE.items() for func, rule in rules.items()}

_HOST_SEED = _aten._scaled_dot_product_efficient_attention.default
_FIRST_SEED = 2


class CudaRules:
    """What CUDA kernels of one device allocate besides an op's outputs.

    Args:
        device: the device facts.
        attention: which attention the model runs, as in ``records.Attention``.
        without: names of rules, as in `names.RULES`, that are left out: the answers are then those of the traced device.

    Raises:
        ValueError: `without` has a name of no rule.
    """

    def __init__(self, device: Device, attention: Attention, without: Collection[str] = ()) -> None:
        self.device = device
        self.attention = attention
        self.without = switched_off(without)

    def program(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Program | None:
        """The hidden allocations of one op call, ``None`` where there are none. `outputs` is what the op returned."""
        name, rule = _named_rule(func)
        if rule is None or name in self.without:
            return None
        tensors = tuple(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor))
        return rule(self.device, bind(func, args, kwargs), tensors)

    def on_host(self, func: torch._ops.OpOverload, output_index: int) -> bool:
        """Whether this output tensor lives on the CPU. `output_index` counts the tensors among the outputs.

        Mem-efficient attention keeps its philox seed and offset on the CPU outside graph capture (attention.cu, Note
        [Seed and Offset Device]); flash attention keeps both on the device (flash_api.cpp).
        """
        return func is _HOST_SEED and output_index >= _FIRST_SEED and "host-seeds" not in self.without

    def workspaces(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[str, int], ...]:
        """Persistent library workspaces that the op needs, as (key, bytes); one of each key per thread.

        Products with a bias go through cuBLASLt, which uses the workspace of cuBLAS unless that is switched off.
        """
        quantized_product = quantized.multiplies(func)
        if func not in _CALLS_BLAS and not quantized_product:
            return ()
        found = {"cublas": cublas_workspace_bytes(self.device.capability, self.device.cublas_workspace_config)}
        biased = quantized_product and bind(func, args, kwargs)["bias"] is not None
        if biased or (func is _aten.addmm.default and args[0].dim() == 1):
            found["cublaslt"] = cublaslt_workspace_bytes(unified=self.device.unified_workspaces)
        return tuple((key, size) for key, size in found.items() if size and f"{key}-workspace" not in self.without)

    def classified(self, func: torch._ops.OpOverload) -> bool:
        """Whether the op's CUDA kernel has been looked at; others count against the confidence of a prediction."""
        if func in convolutions.WORKSPACES:
            return convolutions.is_settled(self.device, func)
        return _classified(func)


@functools.cache
def _named_rule(func: torch._ops.OpOverload) -> tuple[str, Rule | None]:
    return _RULES.get(func) or ("bitsandbytes", quantized.rule_of(func))


@functools.cache
def _classified(func: torch._ops.OpOverload) -> bool:
    return func in _RULES or quantized.is_classified(func) or allocates_outputs_only(func)
