"""Recipes that are written are read as they were; two of them differ where they differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from oomph.recipe import data_of, load, memory_of, override
from oomph.recipe.writing import differences, to_yaml

SHIPPED = ["moe-llava/phi2-clip336", "moe-llava/phi2-clip336-as-published"]


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_written_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    recipe = override(load(name), ["data.files=[{path: a.jsonl, weight: 0.5}]", "stages.align.memory.micro_batch=4"])
    (tmp_path / "again.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    again = load(tmp_path / "again.yaml")
    assert again == recipe
    for ours, theirs in zip(recipe.stages, again.stages, strict=True):
        assert data_of(recipe, ours) == data_of(again, theirs)
        assert memory_of(recipe, ours) == memory_of(again, theirs)
    assert not differences(recipe, again)
    assert "save_every: 500" in to_yaml(recipe), "what the recipe leaves to us is written out"


def test_differences_are_named_as_settings_are() -> None:
    before = load(SHIPPED[0])
    first, second = (stage.name for stage in before.stages[:2])
    settings = {
        "data.max_tokens": 64,
        "run.seed": 3,
        f"stages.{first}.effective_batch": 512,
        f"stages.{second}.steps": 5,
        "memory.loss": "full",
    }
    after = override(before, [f"{key}={value}" for key, value in settings.items()])
    found = differences(before, after)
    assert {key: value for key, (_, value) in found.items()} == settings
    assert found[f"stages.{second}.steps"][0] is None
    assert differences(after, before) == {key: (after, before) for key, (before, after) in found.items()}


def test_another_order_of_stages_is_a_difference() -> None:
    before = load(SHIPPED[0])
    after = before.model_copy(update={"stages": before.stages[::-1]})
    assert list(differences(before, after)) == ["stages"]
