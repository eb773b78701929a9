"""Runs whose last stage makes experts: trained, balanced, resumed, and seen in the log, the picture and the summary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oomph.errors import UserError
from oomph.report.run import render


class Killed(Exception):
    """Stands for the end of the process: nothing is saved."""


SECTION = {"experts": {"count": 4, "top_k": 2, "layers": [1]}, "effective_batch": 4}
FROZEN = {"language": "frozen", "head": "frozen"}
TRAINED = {"experts": 1.0e-3, "router": 1.0e-3}


@pytest.mark.slow
def test_a_stage_with_experts_trains_and_shows_their_load(image_recipe: Any, run: Any) -> None:
    rules = {"vision": "frozen", "projector": "frozen", **FROZEN, **TRAINED}
    balance = {"kind": "sequence", "z_loss": 0.001}
    stage = {"name": "moe", "train": rules, "balance": balance, "steps": 2, **SECTION}
    done = run(image_recipe(stages=[stage], hardware={"gpu": "T4"}))
    assert len(done.steps) == 2
    for step in done.steps:
        (load,) = step.experts
        assert load.layer == 1
        assert sum(load.total) == 2 * step.tokens
        assert sum(load.image) > 0
        assert 1 <= step.balance_loss < 4
        assert step.z_loss > 0
        assert step.prediction_error_bytes == 0
    (summed,) = done.summary.stages[-1].experts
    assert summed.total == tuple(map(sum, zip(*(step.experts[0].total for step in done.steps), strict=True)))
    assert any(sentence.startswith("experts trains") for sentence in done.summary.stages[-1].trained)
    assert done.summary.stages[-1].inexact == ()
    assert "1 layer of 4; an expert got" in render(done.summary)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_its_biases(text_recipe: Any, run: Any, Listener: Any) -> None:
    stage = {"train": {**FROZEN, **TRAINED}, "balance": {"kind": "bias", "bias_rate": 0.05}, **SECTION}
    recipe = text_recipe(stage={**stage, "steps": 4}, run={"save_every": 2})
    whole = run(recipe, "whole")

    def after(record: Any) -> None:
        if record.step == 3:
            raise Killed

    with pytest.raises(Killed):
        run(recipe, "killed", Listener(after))
    again = run(recipe, "killed", resume=True)
    assert again.losses == whole.losses
    assert [step.experts for step in again.steps] == [step.experts for step in whole.steps]
    ours, theirs = again.weights(), whole.weights()
    assert any(name.endswith("choice_bias") and tensor.any() for name, tensor in ours.items())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_what_cannot_be_trained_is_refused_before_anything_is(text_recipe: Any, run: Any) -> None:
    experts = {"count": 4, "top_k": 2, "dispatch": "capacity"}
    with pytest.raises(UserError, match="capacity is planned and not trained"):
        run(text_recipe(stage={"train": {**FROZEN, **TRAINED}, "experts": experts}))
