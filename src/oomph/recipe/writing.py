"""Recipes as files again, and what tells two of them apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from oomph.recipe.schema import Recipe


def plain(recipe: Recipe) -> dict[str, Any]:
    """Every key of a recipe that has a value, those that it leaves to us included.

    Where a stage sets limits or knobs of its own, only those that it sets are there, as the others follow the recipe's.
    """
    data = recipe.model_dump(mode="json", exclude_none=True)
    for stage, own in zip(data["stages"], recipe.stages, strict=True):
        for section in ("data", "memory"):
            stage[section] = getattr(own, section).model_dump(mode="json", exclude_unset=True)
            if not stage[section]:
                del stage[section]
    return data


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a file that `load` reads, every key written out."""
    text: str = yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True, width=120)
    return text


def differences(before: Recipe, after: Recipe) -> dict[str, tuple[Any, Any]]:
    """The values of the keys that differ, by their dotted paths as settings write them; None where a recipe lacks one."""
    ours, theirs = (dict(_flat("", _by_stage(plain(recipe)))) for recipe in (before, after))
    ours["stages"], theirs["stages"] = (", ".join(stage.name for stage in recipe.stages) for recipe in (before, after))
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def _by_stage(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "stages": {stage["name"]: stage for stage in data["stages"]}}


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _flat(f"{path}.{key}" if path else str(key), inner)
    if not isinstance(value, dict | list):
        yield path, value
