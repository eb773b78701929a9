"""Temporary storage that CUB asks for, as built with CUDA 13.0 (CCCL 3.0), the toolkit of the torch 2.13 cu130 wheels.

Every CUB call packs its parts into one allocation: each part starts at a multiple of 256 bytes, and 255 bytes are added
so that the start can be aligned (``detail::alias_temporaries``). Tile sizes are the tuned policies' block threads times
items per thread, by architecture.
"""

from __future__ import annotations

import torch

from oomph.live.cuda_rules.program import Device, Extra
from oomph.live.cuda_rules.sizes import ceil_div, round_up

_ALIGNMENT = 256
_WARP = 32
_RADIX_BITS = 8
_RADIX_DIGITS = 256
_OFFSET_BYTES = 8
_LOOKBACK_BYTES = 4
_SINGLE_TILE_SORT = 2304
_SCAN_TILES = {8: 896, 4: 1920}


def _packed(*parts: int) -> int:
    return sum(round_up(part, _ALIGNMENT) for part in parts) + _ALIGNMENT - 1


def _by_architecture(device: Device, sizes: tuple[tuple[int, int], ...]) -> int:
    return next(size for first, size in sizes if device.sm >= first)


def storage(nbytes: int, name: str) -> Extra:
    """A CUB call's temporary storage as an extra."""
    return Extra((nbytes,), torch.uint8, name)


def radix_sort_bytes(device: Device, items: int, key_bytes: int, bits: int) -> int:
    """``DeviceRadixSort::SortPairs`` with 8-byte values: one pass over the data for each 8 of the `bits` (onesweep).

    Args:
        device: the device.
        items: pairs to sort.
        key_bytes: 4 or 8.
        bits: the key bits that are compared.
    """
    if items <= _SINGLE_TILE_SORT:
        return 1
    tiles_8, tiles_4 = ((90, 4608), (80, 3840), (0, 2816)), ((90, 5376), (80, 3072), (0, 2816))
    tile = _by_architecture(device, tiles_8 if key_bytes == 8 else tiles_4)
    passes = ceil_div(bits, _RADIX_BITS)
    lookback = ceil_div(items, tile) * _RADIX_DIGITS * _LOOKBACK_BYTES
    buffers = (items * key_bytes, items * 8) if passes > 1 else (0, 0)
    return _packed(passes * _RADIX_DIGITS * _OFFSET_BYTES, lookback, *buffers, passes * _LOOKBACK_BYTES)


def scan_bytes(items: int, element_bytes: int) -> int:
    """``DeviceScan`` over 4- or 8-byte sums: one status word of twice the element for each tile, and one warp more."""
    tiles = ceil_div(items, _SCAN_TILES[element_bytes])
    return _packed((tiles + _WARP) * 2 * element_bytes, 1)


def unique_by_key_bytes(device: Device, items: int) -> int:
    """``DeviceSelect::UniqueByKey`` with 8-byte keys."""
    tile = _by_architecture(device, ((100, 3840), (90, 4480), (86, 320), (80, 1792), (0, 320)))
    return _packed((ceil_div(items, tile) + _WARP) * 16, 1)
