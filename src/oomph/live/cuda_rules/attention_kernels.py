"""Hidden allocations of the attention kernels: mem-efficient (CUTLASS), flash and cuDNN, forward and backward.

Tensors are [batch, heads, tokens, head_dim] in the ops' signatures; the kernels see them with tokens before heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from oomph.live.cuda_rules.program import Arguments, Device, Extra, Program
from oomph.live.cuda_rules.sizes import ceil_div, round_up, shape_of

_HALF = (torch.float16, torch.bfloat16)


def _contiguous_copy(tensor: torch.Tensor, name: str) -> tuple[Extra, ...]:
    """The copy that ``.transpose(1, 2).contiguous()`` makes, none if that view is contiguous already."""
    tokens_first = tensor.transpose(1, 2)
    return () if tokens_first.is_contiguous() else (Extra(shape_of(tokens_first), tensor.dtype, name),)


# --- mem-efficient -----------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    queries: int
    keys: int
    max_head: int


def _backward_tile(device: Device, dtype: torch.dtype, head: int) -> _Tile:
    """The first kernel of ``dispatch_cutlassB`` that takes the head size and fits the shared memory."""
    if dtype not in _HALF or device.sm < 75:
        large = 128 if device.sm >= 80 or (dtype in _HALF and device.sm >= 70) else 64
    else:
        large = 128
    for limit in (32, 64):
        if head <= limit:
            return _Tile(64, 64, limit)
    if dtype in _HALF and device.sm in (86, 89) and head <= 96:
        return _Tile(128, 64, 96)
    if head <= 128:
        if dtype in _HALF and device.sm >= 80:
            return _Tile(128, 128, 128) if device.shared_memory_per_block >= 131072 else _Tile(64, 64, 128)
        return _Tile(large, 64, 128)
    return _Tile(large, 64, 65536)


def efficient_backward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program:
    """``_efficient_attention_backward`` (attention_backward.cu), workspace as in mem_eff_attention/kernel_backward.h."""
    query, key, value, grad = call["query"], call["key"], call["value"], call["grad_out_"]
    batch, heads, queries, head = shape_of(query)
    keys, value_head = key.size(2), value.size(3)
    tile = _backward_tile(device, query.dtype, max(head, value_head))
    half = query.dtype in _HALF
    in_registers = half and tile.max_head <= tile.queries
    splits = ceil_div(keys, tile.keys)
    if batch * heads >= 256 and keys <= 2 * tile.keys:
        splits = 1
    accumulates = not in_registers and half
    if accumulates:
        splits = max(1, min(splits, 200 // (batch * heads)))
    key_elements = splits * tile.keys * (round_up(head, tile.queries) + round_up(value_head, tile.queries))
    query_elements = ceil_div(queries, tile.queries) * ceil_div(head, tile.keys) * (4 + tile.queries * tile.keys)
    elements = round_up((key_elements if accumulates else 0) + query_elements, 4)
    workspace = Extra((batch * heads * elements * 4,), torch.uint8, "workspace")
    delta = Extra((batch, heads, queries), torch.float32, "delta")
    if half and (in_registers or not 70 <= device.sm < 75):
        return Program(_contiguous_copy(grad, "grad_out"), (delta, workspace))
    tokens_first = (batch, queries, heads)
    product = Extra((*tokens_first, value_head), torch.float32, "grad_out * out")
    row_sum = Extra(tokens_first, torch.float32, "sum")
    return Program(_contiguous_copy(grad, "grad_out"), (product, row_sum, 0, delta, 1, workspace))


def efficient_forward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """``_efficient_attention_forward`` (attention.cu): a fp32 accumulator where a head does not fit the registers."""
    query, value = call["query"], call["value"]
    if query.dtype not in _HALF or max(query.size(3), value.size(3)) <= 128:
        return None
    batch, heads, queries, _ = shape_of(query)
    return Program(after=(Extra((batch, queries, heads, value.size(3)), torch.float32, "output_accum"),))


# --- flash -------------------------------------------------------------------------------------------------------------


def flash_splits(device: Device, blocks: int, key_blocks: int) -> int:
    """``num_splits_heuristic`` (flash_api.cpp): how many parts the keys are split into to fill the multiprocessors."""
    slots = 2 * device.multiprocessor_count
    if blocks >= 0.8 * slots:
        return 1
    eligible = [
        splits
        for splits in range(1, min(128, slots, key_blocks) + 1)
        if splits == 1 or ceil_div(key_blocks, splits) != ceil_div(key_blocks, splits - 1)
    ]
    efficiency = {splits: (blocks * splits / slots) / ceil_div(blocks * splits, slots) for splits in eligible}
    best = max(efficiency.values())
    return next(splits for splits in eligible if efficiency[splits] >= 0.85 * best)


def flash_forward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """``mha_fwd`` with ``set_params_splitkv`` (flash_api.cpp): accumulators of a split over keys; no split with dropout."""
    batch, heads, queries, head = shape_of(call["query"])
    if call["dropout_p"] > 0.0:
        return Program(after=(Extra((2,), torch.uint64, "rng_state"),))
    block = 256 if head <= 64 else 128 if head <= 128 else 64
    splits = flash_splits(device, batch * heads * ceil_div(queries, 64), ceil_div(call["key"].size(2), block))
    if splits == 1:
        return None
    rounded = round_up(head, 32 if head <= 128 else 64)
    rows = (splits, batch, heads, queries)
    return Program(
        after=(Extra(rows, torch.float32, "softmax_lse_accum"), Extra((*rows, rounded), torch.float32, "out_accum"))
    )


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
