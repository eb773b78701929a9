"""Hidden allocations of the attention kernels: mem-efficient (CUTLASS), flash and cuDNN, forward and backward.

Tensors are [batch, heads, tokens, head_dim] in the ops' signatures; the kernels see them with tokens before heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from oomph.core.cudnn_sizes import cudnn_attention_backward, cudnn_attention_forward
from oomph.core.kernel_sizes import efficient_workspace, flash_accumulator, round_up
from oomph.live.cuda_rules.program import Arguments, Device, Extra, Program, sized
from oomph.live.cuda_rules.sizes import shape_of

_HALF = (torch.float16, torch.bfloat16)
_ANY_HEAD = 65536


def _contiguous_copy(tensor: torch.Tensor, name: str) -> tuple[Extra, ...]:
    """The copy that ``.transpose(1, 2).contiguous()`` makes, none if that view is contiguous already."""
    tokens_first = tensor.transpose(1, 2)
    return () if tokens_first.is_contiguous() else (Extra(shape_of(tokens_first), tensor.dtype, name),)


# --- mem-efficient -----------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """A backward kernel of kernels/cutlassB.h: block sizes, the head size it takes, and its shared memory in bytes."""

    queries: int
    keys: int
    max_head: int
    shared_memory: int


def _backward_tiles(device: Device, dtype: torch.dtype, dropout: bool) -> tuple[_Tile, ...]:
    """The kernels that ``dispatch_cutlassB`` tries, in order; variants that differ in alignment alone are left out.

    Shared memory is ``sizeof(AttentionBackwardKernel<...>::SharedStorage)`` of torch 2.13's headers, compiled.
    """
    if device.sm >= 80 and dtype in _HALF:
        plain, dropped = (154112, 162304) if dtype == torch.float16 else (133632, 152064)
        narrow = (_Tile(128, 64, 96, 91648),) if device.sm in (86, 89) and not dropout else ()
        return (
            _Tile(64, 64, 32, 40192),
            _Tile(64, 64, 64, 52480),
            *narrow,
            _Tile(128, 128, 128, dropped if dropout else plain),
            _Tile(64, 64, 128, 34048),
            _Tile(128, 64, _ANY_HEAD, 60928),
        )
    small = 53504 if device.sm >= 80 else 37120 if dtype not in _HALF else 27904
    tiles = (_Tile(64, 64, 32, small), _Tile(64, 64, 64, small))
    if device.sm >= 80:
        large, fallback = _Tile(128, 64, 128, 121344), _Tile(64, 64, 128, 67840)
        return (*tiles, large, fallback, large._replace(max_head=_ANY_HEAD), fallback._replace(max_head=_ANY_HEAD))
    if dtype in _HALF and device.sm >= 70:
        return (*tiles, _Tile(128, 64, 128, 54784), _Tile(128, 64, _ANY_HEAD, 54784))
    return (*tiles, _Tile(64, 64, 128, small), _Tile(64, 64, _ANY_HEAD, small))


def _workspace(device: Device, call: Arguments, tile: _Tile) -> Extra:
    """``Params::workspace_size`` (kernel_backward.h)."""
    query, key, value = call["query"], call["key"], call["value"]
    batch, heads, queries, head = shape_of(query)
    in_registers = not (query.dtype in _HALF and tile.max_head > tile.queries)
    sides = (batch, heads, queries, int(key.size(2)), head, int(value.size(3)))
    return sized("workspace", efficient_workspace, *sides, tile.queries, tile.keys, in_registers)


def efficient_backward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program:
    """``_efficient_attention_backward`` (attention_backward.cu).

    Half precision computes the row sums of grad * out in the kernel; fp32, and sm_70 where gradients do not stay in
    registers, compute them with tensor operations whose temporaries live until the sums are there.
    """
    query, value = call["query"], call["value"]
    batch, heads, queries, head = shape_of(query)
    largest = max(head, int(value.size(3)))
    tiles = _backward_tiles(device, query.dtype, call["dropout_p"] != 0.0)
    tile = next(t for t in tiles if t.max_head >= largest and t.shared_memory <= device.shared_memory_per_block)
    half = query.dtype in _HALF
    workspace = _workspace(device, call, tile)
    before = _contiguous_copy(call["grad_out_"], "grad_out")
    delta = Extra((batch, heads, queries), torch.float32, "delta")
    if half and (tile.max_head <= tile.queries or not 70 <= device.sm < 75):
        return Program(before, (delta, workspace))
    rows = (batch, queries, heads)
    product = Extra((*rows, int(value.size(3))), torch.float32, "grad_out * out")
    casts = [product._replace(name=name) for name in ("grad_out", "out")] if half else []
    temporaries = [*casts, product, Extra(rows, torch.float32, "sum")]
    kept = heads == 1 or queries == 1
    if kept:
        return Program(before, (*temporaries, *range(len(temporaries) - 1), workspace))
    return Program(before, (*temporaries, delta, *reversed(range(len(temporaries))), workspace))


def efficient_forward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """``_efficient_attention_forward`` (attention.cu): a fp32 accumulator where a head does not fit the registers."""
    query, value = call["query"], call["value"]
    if query.dtype not in _HALF or max(query.size(3), value.size(3)) <= 128:
        return None
    batch, heads, queries, _ = shape_of(query)
    return Program(after=(Extra((batch, queries, heads, value.size(3)), torch.float32, "output_accum"),))


# --- flash -------------------------------------------------------------------------------------------------------------


def flash_forward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """``mha_fwd`` with ``set_params_splitkv`` (flash_api.cpp): accumulators of a split over keys; no split with dropout."""
    batch, heads, queries, head = shape_of(call["query"])
    if call["dropout_p"] > 0.0:
        return Program(after=(Extra((2,), torch.uint64, "rng_state"),))
    block = 256 if head <= 64 else 128 if head <= 128 else 64
    keys, rounded = int(call["key"].size(2)), round_up(head, 32 if head <= 128 else 64)
    numbers = (device.multiprocessor_count, batch, heads, queries, keys, block)
    rows, out = (
        sized(name, flash_accumulator, *numbers, width) for name, width in (("softmax_lse_accum", 1), ("out_accum", rounded))
    )
    return Program(after=(rows, out))


def flash_backward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program:
    """``mha_bwd`` (flash_api.cpp): row sums, fp32 query gradient, per-head key and value gradients under grouped heads."""
    query, key = call["query"], call["key"]
    batch, heads, queries, head = shape_of(query)
    rows, rounded = round_up(queries, 128), round_up(head, 32 if head <= 128 else 64)
    before = _contiguous_copy(call["grad_out"], "grad_out") + _contiguous_copy(call["out"], "out")
    after = [
        Extra((batch, heads, rows), torch.float32, "softmax_d"),
        Extra((batch, rows, heads, rounded), torch.float32, "dq_accum"),
    ]
    if key.size(1) != heads:
        expanded = (batch, int(key.size(2)), heads, head)
        after += [Extra(expanded, key.dtype, "dk_expanded"), Extra(expanded, key.dtype, "dv_expanded")]
    return Program(before, tuple(after))


# --- cuDNN -------------------------------------------------------------------------------------------------------------


def cudnn_forward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program:
    """``run_cudnn_SDP_fprop`` (cudnn/MHA.cpp): the execution plan's workspace, after the outputs."""
    return Program(after=(sized("workspace", cudnn_attention_forward, device.sm),))


def cudnn_backward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program:
    """``run_cudnn_SDP_bprop`` (cudnn/MHA.cpp): the same, after a copy of a gradient whose rows have gaps."""
    query, key, value, gradient = call["query"], call["key"], call["value"], call["grad_out"]
    batch, heads, queries, head = shape_of(query)
    numbers = batch, heads, int(key.size(1)), queries, int(key.size(2)), head, int(value.size(3))
    copies = () if gradient.stride(-1) == 1 else (Extra(shape_of(gradient), gradient.dtype, "dO"),)
    return Program(after=(*copies, sized("workspace", cudnn_attention_backward, device.sm, *numbers)))
