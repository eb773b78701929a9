"""Sizes as allocators print them, and what a printed size can have been before it was rounded.

PyTorch prints two decimals of the largest unit that the size exceeds (`format_size` in c10/cuda/CUDACachingAllocator.cpp,
2.13: ``1024.00 MiB``, not ``1.00 GiB``). What it prints as asked for is the segment that the caching allocator would have had
to get from the driver (`alloc_size`, of `get_allocation_size`): 2 MiB for a request of at most 1 MiB, 20 MiB below 10 MiB, else
the next multiple of 2 MiB.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from oomph.units import GIB, KIB, MIB

LARGEST = 2**63 - 1
"""What a record can hold; sizes above it are taken as it."""

NUMBER = r"(?:\d[\d,]{0,24}(?:\.\d{1,6})?|\.\d{1,6})"
UNIT = r"(?:[KMGTPE]i?B|[kmgtp]i?b|bytes?|B)(?![A-Za-z])"
SIZE = rf"{NUMBER}\s?{UNIT}"
"""A printed size, as a pattern without groups."""

ROUND_UP_DIVISIONS = re.compile(r"roundup_power2_divisions\s*[:=]\s*\[?\s*[\"']?(?:\d+\s*:\s*|>\s*:\s*)?(\d{1,3})")

_DECIMAL_COMMA = re.compile(r"\d{1,4},\d{1,2}")
_SPLIT = re.compile(rf"({NUMBER})\s?({UNIT})")
_SCALES = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB, "p": MIB * GIB, "e": GIB * GIB}
_SMALL, _LARGE, _PAGE = MIB, 10 * MIB, 2 * MIB
_SMALL_SEGMENT, _LARGE_SEGMENT = 2 * MIB, 20 * MIB
_ALIGNMENT = 512


class Printed(NamedTuple):
    """A printed size in bytes: the nearest whole number, and the least and the most that prints so."""

    bytes: int
    low: int
    high: int


def read_size(text: str) -> Printed | None:
    """A size from its printed form, as ``6.56 GiB``; None where it is none.

    GB, MB and KB are powers of 1024, as the allocators mean them.
    """
    match = _SPLIT.fullmatch(text.strip())
    if match is None:
        return None
    number = match[1].replace(",", ".") if _DECIMAL_COMMA.fullmatch(match[1]) else match[1].replace(",", "")
    unit = match[2].lower()
    scale = _SCALES["" if unit.startswith("b") else unit[0]]
    digits = len(number.partition(".")[2])
    value = Fraction(number) * scale
    half = Fraction(scale, 2 * 10**digits) if digits else Fraction(0)
    low, high = -((half - value) // 1), (value + half) // 1
    return Printed(*(min(LARGEST, max(0, int(bound))) for bound in (round(value), low, high)))


class Asked(NamedTuple):
    """What a request can have been: its least and its most bytes, and the rule by which it was rounded."""

    low: int
    high: int
    rule: str


def before_rounding(printed: Printed, divisions: int = 0) -> Asked:
    """What can have been asked of the caching allocator that prints this segment size.

    A printed size that no segment has is taken as it is.

    Args:
        printed: what the message says.
        divisions: `roundup_power2_divisions` where it is set; 0 where it is not.
    """
    first = -(-printed.low // _PAGE) * _PAGE
    last = printed.high // _PAGE * _PAGE
    if first > last or printed.high >= LARGEST:
        return Asked(max(1, printed.low), max(1, printed.high), "")
    if last == _SMALL_SEGMENT:
        return Asked(1, _SMALL, "2 MiB is the segment for every request of up to 1 MiB")
    if first <= _LARGE_SEGMENT <= last:
        return Asked(_SMALL + 1, _LARGE_SEGMENT, "20 MiB is the segment for every request of more than 1 MiB and less than 10")
    low, rule = max(_LARGE, first - _PAGE + 1), "rounded up to 2 MiB"
    if divisions > 1:
        low, rule = min(low, _below(low, divisions)), f"rounded up to one of {divisions} divisions of a power of two"
    return Asked(low, last, rule)


def _below(nbytes: int, divisions: int) -> int:
    """The least request that `roundup_power2_divisions` rounds up to at least `nbytes`.

    A power of two is divided into so many steps, and a request takes the next (`roundup_power2_next_division`).
    """
    power = 1 << (max(1, nbytes - 1).bit_length() - 1)
    step = max(_ALIGNMENT, power // divisions)
    return max(1, power + (nbytes - 1 - power) // step * step + 1)
