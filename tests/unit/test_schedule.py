"""Learning rates over the steps: those of transformers' own schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from oomph.core.schedule import rate_factor

THEIRS = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_rates_are_those_of_transformers(kind: Any, warmup: float, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rising = math.ceil(steps * warmup)
    if kind == "constant":
        theirs = get_constant_schedule_with_warmup(optimizer, rising)
    else:
        theirs = THEIRS[kind](optimizer, rising, steps)
    for step in range(steps):
        assert rate_factor(kind, warmup, step, steps) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@given(st.sampled_from(["cosine", "linear"]), st.floats(0, 0.9), st.integers(1, 500))
def test_rates_rise_and_then_fall(kind: Any, warmup: float, steps: int) -> None:
    factors = [rate_factor(kind, warmup, step, steps) for step in range(steps + 1)]
    top = factors.index(max(factors))
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[-1] == pytest.approx(0, abs=1e-12) or math.ceil(steps * warmup) == steps
