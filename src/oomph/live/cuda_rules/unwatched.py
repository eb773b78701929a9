"""What torch writes in place unless a dispatch mode watches.

Composite functions and autograd write into a tensor that they made themselves, if no tensor at hand may be a subclass with
semantics of its own (``at::isTensorSubclassLike``, ATen/TensorSubclassLikeUtils.h). A dispatch mode makes every tensor
count as one. So a traced backward allocates results that a real one does not: a second copy of a gathered gradient, or of the
residual stream's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

_aten = torch.ops.aten

_SELECTIONS = ("Topk", "Sort", "Max", "Min", "Kthvalue", "Median", "Nanmedian", "Mode")
_FORMULAS: dict[torch._ops.OpOverload, tuple[torch._ops.OpOverload, tuple[str, ...], tuple[Any, ...]]] = {
    _aten.index_put.default: (_aten._index_put_impl_.default, ("IndexBackward",), (True,)),
    _aten.scatter_add.default: (_aten.scatter_add_.default, ("GatherBackward",), ()),
    _aten.index_add.default: (_aten.index_add_.default, ("IndexSelectBackward",), ()),
    _aten.scatter.src: (_aten.scatter_.src, tuple(f"{name}Backward" for name in _SELECTIONS), ()),
}
_SOLE_OWNER = 4
"""``use_count`` of a tensor of the autograd engine as the first dispatch mode sees it, if nobody else holds it."""
_SOLE_STORAGE = 2
"""The same for its storage."""


def as_unwatched(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], without: Collection[str] = ()
) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The operator and arguments with which torch does in place what `func` does, or both as they are.

    Call it from the dispatch mode that was entered last, with the arguments as they come. In place are:

    - the gradients of indexing, ``gather``, ``index_select``, and of ``topk``, ``sort``, ``max`` and their like:
      ``index_backward`` (FunctionsManual.cpp), ``gather_backward``, ``index_select_backward_symint``
      (TensorAdvancedIndexing.cpp), ``value_selecting_reduction_backward_symint`` (ReduceOps.cpp);
    - the sum of two gradients of one tensor, if nobody else holds the first: ``can_accumulate_inplace``, ``accumulate``
      (torch/csrc/autograd/input_buffer.cpp).

    Args:
        func: the operator.
        args: its positional arguments.
        kwargs: its other arguments; they stay as they are.
        without: names of rules that are switched off, as in `names.RULES`.
    """
    if "unwatched-in-place" in without:
        return func, args
    if func is _aten.add.Tensor:
        return (_aten.add_.Tensor, args) if not kwargs and _accumulates(*args) else (func, args)
    formula = _FORMULAS.get(func)
    if formula is None or torch.is_grad_enabled():
        return func, args
    in_place, nodes, more = formula
    node: Any = torch._C._current_autograd_node()
    return (in_place, args + more) if node is not None and node.name().startswith(nodes) else (func, args)


def _accumulates(first: Any, second: Any, *_: Any) -> bool:
    """Whether the autograd engine adds up gradients in a tensor that it alone holds."""
    return (
        not torch.is_grad_enabled()
        and torch._C._current_autograd_node() is not None
        and isinstance(first, torch.Tensor)
        and isinstance(second, torch.Tensor)
        and first._use_count() == _SOLE_OWNER  # type: ignore[attr-defined]
        and torch._C._storage_Use_Count(first.untyped_storage()._cdata) == _SOLE_STORAGE
        and torch._prims_common.is_non_overlapping_and_dense_or_false(first)
    )
