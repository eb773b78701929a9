"""What the trainer's benchmark shows: the losses of transformers' Trainer, and steps that fit where fixed ones would not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from oomph.recipe import Recipe

BATCH, LONGEST = 4, 512


@pytest.fixture(scope="module")
def trainer(root: Path) -> ModuleType:
    """The benchmark's script, which runs both."""
    pytest.importorskip("accelerate")
    folder = root / "benchmarks"
    spec = importlib.util.spec_from_file_location("benchmark_trainer", folder / "trainer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.mark.parametrize("memory", [{"micro_batch": 3}, {}], ids=["equal micro-batches", "as predicted"])
def test_losses_are_those_of_transformers(
    trainer: Any, image_recipe: Callable[..., Recipe], tmp_path: Path, memory: dict[str, int]
) -> None:
    recipe = image_recipe(memory=memory, run={"workers": 0})
    recipe = recipe.model_copy(update={"stages": recipe.stages[1:]})
    found = trainer.compare(tmp_path, recipe, 3)
    ours, theirs = found.losses
    assert len(ours) == len(theirs) == 4
    assert ours == pytest.approx(theirs, rel=1e-5, abs=0)
    assert ours[-1] < ours[0]
    assert (max(len(step.split) for step in found.steps) == 2) == bool(memory)
    assert len(found.seconds[0]) == len(found.seconds[1]) == 4


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_no_step_fails_where_a_fixed_micro_batch_would(
    trainer: Any, image_recipe: Callable[..., Recipe], run: Any, tmp_path: Path, steps: int
) -> None:
    sizes = trainer.Sizes(16, 2, 320, 2)
    trainer.write_data(tmp_path, trainer.Work(sizes, LONGEST, 4, steps * BATCH, BATCH))
    files = [{"path": str(tmp_path / "data.jsonl"), "images": str(tmp_path / "pictures")}]
    recipe = image_recipe(data={"max_tokens": LONGEST, "files": files}, run={"workers": 0})
    stage = recipe.stages[1].model_copy(update={"effective_batch": BATCH, "data": recipe.stages[0].data})
    recipe = recipe.model_copy(update={"stages": (stage,)})
    limit = trainer.limit_for(recipe)
    assert trainer.fixed_peak(recipe, 2) <= limit < trainer.fixed_peak(recipe, 4)
    made = run(recipe, limit=limit)
    assert len(made.steps) == steps
    assert not any(record.recoveries for record in made.told.steps)
    for record in made.steps:
        assert record.measured_peak_bytes <= limit
        assert abs(record.prediction_error_bytes) <= record.measured_peak_bytes / 100, record
    assert all(record.prediction_error_bytes == 0 for record in made.steps)
    splits = [record.split for record in made.steps]
    assert {len(split) for split in splits} >= {1, 2}, "short samples go together, long ones do not"
    assert any(not split[0][2] and any(images for _, _, images in split) for split in splits), "text before images"
