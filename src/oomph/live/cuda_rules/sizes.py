"""Integer arithmetic that the kernels' launch code shares."""

from __future__ import annotations

import torch


def ceil_div(numerator: int, denominator: int) -> int:
    """Quotient rounded up."""
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return ceil_div(value, multiple) * multiple


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's extents as plain ints."""
    return tuple(int(extent) for extent in tensor.shape)
