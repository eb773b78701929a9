"""Recipes: what the user wants, read from YAML and checked whole."""

from __future__ import annotations

from oomph.recipe.reading import load, override, stage_of
from oomph.recipe.rules import PARTS, cover
from oomph.recipe.schema import (
    KNOBS,
    Data,
    Experts,
    Hardware,
    Memory,
    Parts,
    Recipe,
    Stage,
    data_of,
    memory_of,
)

__all__ = [
    "KNOBS",
    "PARTS",
    "Data",
    "Experts",
    "Hardware",
    "Memory",
    "Parts",
    "Recipe",
    "Stage",
    "cover",
    "data_of",
    "load",
    "memory_of",
    "override",
    "stage_of",
]
