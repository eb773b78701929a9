"""Oomph: the peak CUDA memory of a training step, predicted to the byte and without a GPU.

The names below are imported when they are first used, so that ``import oomph`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oomph.errors import UserError
    from oomph.records import Choice, Footprint, Plan, Prediction

__all__ = ["Choice", "Footprint", "Plan", "Prediction", "UserError"]

_HOME = {
    "Choice": "oomph.records",
    "Footprint": "oomph.records",
    "Plan": "oomph.records",
    "Prediction": "oomph.records",
    "UserError": "oomph.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
