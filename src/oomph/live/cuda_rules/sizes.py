"""Extents of a tensor as plain integers."""

from __future__ import annotations

import torch


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's extents as plain ints."""
    return tuple(int(extent) for extent in tensor.shape)
