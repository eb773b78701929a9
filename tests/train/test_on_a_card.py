"""A run on a CUDA card: memory as predicted, under a limit, and going on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from oomph.recipe import Recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["float32", "float16-mixed"])
def test_a_card_trains_as_predicted(text_recipe: Callable[..., Recipe], run: Any, precision: str) -> None:
    made = run(text_recipe(memory={"precision": precision}, hardware={"gpu": torch.cuda.get_device_name()}))
    assert made.summary.device == "cuda"
    assert made.losses[-1] < made.losses[0]
    for record in made.steps:
        assert not record.recoveries
        assert abs(record.prediction_error_bytes) <= 0.01 * record.measured_peak_bytes + 512 * 1024


def test_a_limit_on_a_card_is_kept(text_recipe: Callable[..., Recipe], run: Any, alike: Any) -> None:
    recipe = text_recipe(memory={"precision": "float32"})
    whole = run(recipe, "whole")
    peak = max(record.measured_peak_bytes for record in whole.steps)
    limited = run(recipe, "limited", limit=peak + 16 * 2**20)
    assert all(record.measured_peak_bytes <= peak + 16 * 2**20 for record in limited.steps)
    assert limited.losses == pytest.approx(whole.losses, rel=1e-4)


def test_a_run_on_a_card_goes_on(text_recipe: Callable[..., Recipe], run: Any, Listener: Any) -> None:
    class Killed(Exception):
        pass

    def ends(record: Any) -> None:
        if record.step == 5:
            raise Killed

    recipe = text_recipe(memory={"precision": "float32"}, run={"save_every": 2})
    with pytest.raises(Killed):
        run(recipe, "parts", Listener(ends))
    again = run(recipe, "parts", resume=True)
    assert again.losses == pytest.approx(run(recipe, "whole").losses, rel=1e-5)
