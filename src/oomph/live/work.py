"""What an operator computes and moves on a GPU: its floating-point operations, its memory traffic, its launches.

Floating-point operations are those of matrix products, convolutions and attention, two for each multiplication, by the
formulas of ``torch.utils.flop_counter`` (torch 2.13): attention is counted in full where a kernel skips masked scores.
Traffic is what an ideal kernel moves: every distinct input once, with an expanded dimension once; every output once; what
is updated in place twice. Operators that gather or scatter move the rows that they touch. A temporary tensor of a kernel, as
the CUDA rules give it, is written and read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers.integrations.moe  # noqa: F401  registers torch.ops.transformers.grouped_mm_fallback
from torch import Tensor

from oomph.live.cuda_rules import Extra, Program
from oomph.live.tensors import dtype_name, tensors_in

_aten = torch.ops.aten

Product = tuple[int, ...]
Arguments = Sequence[Any]
Flops = Callable[[Arguments, Any], tuple[Product, ...]]
Traffic = Callable[[Arguments, Any], tuple[Product, ...]]


class Part(NamedTuple):
    """What an operator over lists does to the tensors at one position of them; `first` is the first of these."""

    first: Tensor
    traffic: tuple[Product, ...]


class Done(NamedTuple):
    """What one call of an operator does, as `trace.Operation` has it. `parts` are beside `traffic`, not in it."""

    dtype: str
    launches: int
    flops: tuple[Product, ...]
    traffic: tuple[Product, ...]
    parts: tuple[Part, ...] = ()


class _Operator(NamedTuple):
    """What is known of an operator before it is called.

    `written` are the positions of arguments that it updates, `passes` is 1 where it does not read them first.
    `reads` is false where inputs give nothing but a shape; `makes` is whether its outputs are new tensors.
    """

    written: frozenset[int]
    passes: int
    reads: bool
    makes: bool
    lists: bool
    flops: Flops | None
    traffic: Traffic | None


class Meter:
    """Says what calls of operators do on one kind of card.

    Args:
        capability: the card's; none for a card that multiplies groups of rows one group at a time.
    """

    def __init__(self, capability: tuple[int, int] | None) -> None:
        self._fused_groups = capability is not None and capability[0] in (9, 10)

    def done(self, func: Any, args: Arguments, kwargs: dict[str, Any], outputs: Any) -> Done | None:
        """What a call does; none where it launches no kernel: it makes a view, allocates, or asks for a value."""
        operator = _operator(func)
        if operator is None:
            return None
        flops = operator.flops(args, outputs) if operator.flops is not None else ()
        if operator.lists and isinstance(outputs, Tensor):
            return Done(_dtype(args, outputs), 1, flops, (_bytes(outputs, 2),))
        if operator.lists:
            return Done(_dtype(args, outputs), 1, flops, (), tuple(_parts(operator, args, outputs)))
        if operator.traffic is not None:
            traffic = operator.traffic(args, outputs)
        else:
            traffic = _moved(operator, args, kwargs, outputs)
        return Done(_dtype(args, outputs), self._launches(func, args), flops, traffic)

    def _launches(self, func: Any, args: Arguments) -> int:
        """One, but for products of groups of rows where no kernel takes all groups at once.

        Compute capabilities 9.x and 10.x have one for bfloat16 (torch, aten/src/ATen/native/cuda/GroupMM.cu).
        """
        loops = _LOOPS.get(func, 0)
        if not loops or (self._fused_groups and func is _aten._grouped_mm.default and args[0].dtype == torch.bfloat16):
            return 1
        return loops * _groups(args)


def temporaries(program: Program) -> tuple[Product, ...]:
    """The bytes that a kernel's temporary tensors are written and read; scratch of irregular size is left out."""
    extras = (*program.before, *program.after)
    return tuple((2 * e.dtype.itemsize, *e.shape) for e in extras if isinstance(e, Extra) and not e.size)


def _groups(args: Arguments) -> int:
    stacked = [tensor.shape[0] for tensor in tensors_in(tuple(args)) if tensor.dim() == 3]
    ends = args[2] if len(args) > 2 else None
    return int(stacked[0]) if stacked else int(ends.numel()) if isinstance(ends, Tensor) else 1


@functools.cache
def _operator(func: Any) -> _Operator | None:
    """None for an operator that launches nothing."""
    schema = func._schema
    name = schema.name.rpartition("::")[2]
    written = frozenset(
        n for n, argument in enumerate(schema.arguments) if argument.alias_info is not None and argument.alias_info.is_write
    )
    tensors = [value for value in schema.returns if "Tensor" in str(value.type)]
    makes = any(value.alias_info is None for value in tensors)
    if name in _NO_KERNEL or not (makes or written) or func.namespace in ("prim", "profiler"):
        return None
    shape_only = name.endswith("_like") or name.startswith("new_")
    lists = any(str(argument.type) == "List[Tensor]" for argument in schema.arguments)
    written -= _READ_ONLY.get(name, frozenset())
    passes = 1 if name in _WRITE_ONLY else 2
    flops = _FLOPS.get(func) or _QUANTIZED.get(name)
    return _Operator(written, passes, not shape_only, makes, lists, flops, _TRAFFIC.get(name))


def _dtype(args: Arguments, outputs: Any) -> str:
    """The type of the first floating-point tensor among the inputs, else of any tensor."""
    first = args[0] if args else None
    if isinstance(first, Tensor) and first.is_floating_point():
        return _name(first.dtype)
    tensors = list(tensors_in((*args, outputs)))
    found = next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0] if tensors else None)
    return _name(found.dtype) if found is not None else ""


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return dtype_name(dtype)


# --- Traffic -----------------------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor, passes: int = 1, itemsize: int = 0) -> Product:
    """The bytes of a tensor, a dimension along which it is expanded counting as one."""
    dims: Sequence[int] = tensor.shape
    strides = tensor.stride()
    if 0 in strides:
        dims = [extent for extent, stride in zip(dims, strides, strict=True) if stride or extent == 1]
    return (passes * (itemsize or tensor.element_size()), *dims)


def _moved(operator: _Operator, args: Arguments, kwargs: dict[str, Any], outputs: Any) -> tuple[Product, ...]:
    found: dict[int, Product] = {}
    for position, argument in enumerate((*args, *kwargs.values()) if kwargs else args):
        if position in operator.written:
            _add(argument, operator.passes, found)
        elif operator.reads:
            _add(argument, 1, found)
    if operator.makes:
        _add(outputs, 1, found)
    return tuple(found.values())


def _add(value: Any, passes: int, found: dict[int, Product]) -> None:
    """Adds the bytes of the tensors that are not among the found ones yet."""
    if isinstance(value, Tensor):
        if id(value) not in found:
            found[id(value)] = _bytes(value, passes)
    elif isinstance(value, list | tuple):
        for item in value:
            _add(item, passes, found)


def _parts(operator: _Operator, args: Arguments, outputs: Any) -> Iterator[Part]:
    """The lists' tensors by position."""
    columns = [
        (argument, operator.passes if position in operator.written else 1)
        for position, argument in enumerate(args)
        if _is_list(argument)
    ]
    if operator.makes and _is_list(outputs):
        columns.append((outputs, 1))
    for position in range(max((len(column) for column, _ in columns), default=0)):
        here: dict[int, tuple[Tensor, int]] = {}
        for column, passes in columns:
            if position < len(column):
                here.setdefault(id(column[position]), (column[position], passes))
        first, _ = next(iter(here.values()))
        yield Part(first, tuple(_bytes(tensor, passes) for tensor, passes in here.values()))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Tensor)


def _gathered(*indices: int) -> Traffic:
    """Reads the indices and the elements that they name, writes the result."""

    def traffic(args: Arguments, outputs: Any) -> tuple[Product, ...]:
        return (*_all(args, indices), _bytes(outputs, 2))

    return traffic


def _scattered(index: int, source: int, adds: bool, copies: bool) -> Traffic:
    """Reads indices and source, writes as many elements, which it reads first where it adds; may copy the target first."""

    def traffic(args: Arguments, outputs: Any) -> tuple[Product, ...]:
        moved = args[source] if len(args) > source and isinstance(args[source], Tensor) else None
        accumulates = adds or (len(args) > 3 and args[3] is True)
        itemsize = args[0].element_size()
        targets = _all(args, (source,)) if moved is not None and moved.dim() else _counted(args[index], itemsize)
        written = tuple((n * (1 + accumulates), *dims) for n, *dims in targets)
        copied = (_bytes(args[0], 2),) if copies else ()
        return (*_all(args, (index,)), *_all(args, (source,)), *written, *copied)

    return traffic


def _counted(indices: Any, itemsize: int) -> tuple[Product, ...]:
    """As many elements as the first of the indices has."""
    return tuple(_bytes(tensor, 1, itemsize) for tensor in list(tensors_in(indices))[:1])


def _all(args: Arguments, positions: Sequence[int]) -> tuple[Product, ...]:
    return tuple(_bytes(tensor) for n in positions if n < len(args) for tensor in tensors_in(args[n]))


def _picked_loss(args: Arguments, outputs: Any) -> tuple[Product, ...]:
    """``nll_loss``: of each row the one element that its target names."""
    return (*_all(args, (1,)), *_counted(args[1], args[0].element_size()))


def _picked_loss_backward(args: Arguments, outputs: Any) -> tuple[Product, ...]:
    """``nll_loss_backward``: zeros, and one element of each row."""
    return (*_all(args, (2,)), _bytes(outputs))


_TRAFFIC: dict[str, Traffic] = {
    "embedding": _gathered(1),
    "index": _gathered(1),
    "index_select": _gathered(2),
    "gather": _gathered(2),
    "take": _gathered(1),
    "index_put": _scattered(1, 2, False, True),
    "index_put_": _scattered(1, 2, False, False),
    "_index_put_impl_": _scattered(1, 2, False, False),
    "index_add": _scattered(2, 3, True, True),
    "index_add_": _scattered(2, 3, True, False),
    "index_copy": _scattered(2, 3, False, True),
    "index_copy_": _scattered(2, 3, False, False),
    "scatter": _scattered(2, 3, False, True),
    "scatter_": _scattered(2, 3, False, False),
    "scatter_add": _scattered(2, 3, True, True),
    "scatter_add_": _scattered(2, 3, True, False),
    "nll_loss_forward": _picked_loss,
    "nll_loss2d_forward": _picked_loss,
    "nll_loss_backward": _picked_loss_backward,
    "nll_loss2d_backward": _picked_loss_backward,
}

_WRITE_ONLY = frozenset(
    "copy_ fill_ zero_ normal_ uniform_ bernoulli_ random_ exponential_ _foreach_copy_ _foreach_zero_".split()
)
_READ_ONLY = {
    "_fused_adamw_": frozenset({1}),
    "_fused_adam_": frozenset({1}),
    "optimizer_update_32bit": frozenset({1}),
    "optimizer_update_8bit_blockwise": frozenset({1, 12, 13}),
}
"""Arguments that a schema marks as written and the kernel reads: gradients, and bitsandbytes' maps (``csrc/kernels.cu``)."""
_NO_KERNEL = frozenset(
    """
    _unsafe_view empty empty_like empty_permuted empty_strided new_empty new_empty_strided lift_fresh item
    _local_scalar_dense is_same_size resize_ set_ record_stream
    """.split()
)

# --- Floating-point operations -----------------------------------------------------------------------------------------


def _product(left: int, right: int) -> Flops:
    """Of matrices, [..., m, k] times [..., k, n], at these positions of the arguments."""

    def flops(args: Arguments, outputs: Any) -> tuple[Product, ...]:
        return ((2, *args[left].shape, args[right].shape[-1]),)

    return flops


def _linear(args: Arguments, outputs: Any) -> tuple[Product, ...]:
    return ((2, *args[0].shape, args[1].shape[0]),)


def _quantized_linear(args: Arguments, outputs: Any) -> tuple[Product, ...]:
    return ((2, *args[0].shape, next(tensors_in(outputs)).shape[-1]),)


def _grouped_product(args: Arguments, outputs: Any) -> tuple[Product, ...]:
    """Each row, or each column, belongs to one group; where the groups divide what is summed over, each term does."""
    left, right = args[0], args[1]
    if left.dim() == 3 and right.dim() == 3:
        return ((2, *left.shape, right.shape[-1]),)
    return ((2, *left.shape[-2:], right.shape[-1]),)


def _looped_product_backward(args: Arguments, outputs: Any) -> tuple[Product, ...]:
    """The gradients of rows [rows, in] and of weights [groups, in, out]."""
    rows, weight = args[0], args[1]
    return ((4, *rows.shape, weight.shape[-1]),)


def _convolution(args: Arguments, outputs: Any) -> tuple[Product, ...]:
    """Every element of the output is a product of a filter; of a transposed one, every element of the input."""
    image, filters, transposed = args[0], args[1], args[6]
    return (_filtered(image, filters, image if transposed else outputs),)


def _filtered(image: Tensor, filters: Tensor, swept: Tensor) -> Product:
    return (2, image.shape[0], *swept.shape[2:], *filters.shape)


def _convolution_backward(args: Arguments, outputs: Any) -> tuple[Product, ...]:
    """As many operations as the forward for each of the gradients of input and filters that is asked for."""
    grad, image, filters, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    return tuple(_filtered(image, filters, image if transposed else grad) for asked in wanted[:2] if asked)


def _attention(args: Arguments, outputs: Any) -> tuple[Product, ...]:
    """Scores from queries and keys, then the weighted sums of values."""
    query, key, value = args[0], args[1], args[2]
    scores = (*query.shape[:3], key.shape[2])
    return ((2, *scores, query.shape[3]), (2, *scores, value.shape[3]))


def _attention_backward(args: Arguments, outputs: Any) -> tuple[Product, ...]:
    """Scores again; the gradients of scores and values; those of queries and keys."""
    _, query, key, value = args[:4]
    scores = (*query.shape[:3], key.shape[2])
    by_query, by_value = (2, *scores, query.shape[3]), (2, *scores, value.shape[3])
    return (by_query, by_value, by_value, by_query, by_query)


_QUANTIZED: dict[str, Flops] = {"gemm_4bit": _quantized_linear, "int8_mixed_scaled_mm": _quantized_linear}
"""Operators of bitsandbytes, which exist only where it is imported."""

_FLOPS: dict[Any, Flops] = {
    _aten.mm.default: _product(0, 1),
    _aten.addmm.default: _product(1, 2),
    _aten.addmm_.default: _product(1, 2),
    _aten.bmm.default: _product(0, 1),
    _aten.baddbmm.default: _product(1, 2),
    _aten.baddbmm_.default: _product(1, 2),
    _aten.linear.default: _linear,
    _aten._grouped_mm.default: _grouped_product,
    torch.ops.transformers.grouped_mm_fallback.default: _grouped_product,
    torch.ops.transformers.grouped_mm_fallback_backward.default: _looped_product_backward,
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    **{
        getattr(_aten, f"_scaled_dot_product_{kind}").default: _attention
        for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    },
    **{
        getattr(_aten, f"_scaled_dot_product_{kind}_backward").default: _attention_backward
        for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    },
}

_LOOPS = {
    _aten._grouped_mm.default: 1,
    torch.ops.transformers.grouped_mm_fallback.default: 1,
    torch.ops.transformers.grouped_mm_fallback_backward.default: 2,
}
"""Products of groups of rows, and how many products they make for each group where each group is multiplied by itself."""
