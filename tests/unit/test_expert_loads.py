"""The load of experts in words and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oomph.records import Choice
from oomph.report.curves import draw
from oomph.report.expert_loads import sentences, shares
from oomph.run_records import LAST_STEPS, ExpertLoad, StepRecord, last_loads


def step(number: int, *experts: ExpertLoad, **more: Any) -> StepRecord:
    choice, seconds = Choice(1, 1, 1), {"data": 0.1, "step": 1.0, "between": 0.0}
    memory = (10**6, 10**6, 0, 2 * 10**6)
    head = ("moe", number, 9, 1.0, 2.0, 1.0, {"a": 1e-3}, 4, 100, 50, choice, ((1, 2, 0),))
    return StepRecord(*head, *memory, (), (), (), seconds, 0.0, 1, 0.5, experts=experts, **more)


def test_loads_add_up_over_the_last_steps_that_have_them() -> None:
    steps = [step(n, ExpertLoad(2, (n, 1), (0, n)), balance_loss=float(n)) for n in range(1, LAST_STEPS + 3)]
    loads, balance = last_loads([*steps, step(99)])
    kept = range(3, LAST_STEPS + 3)
    assert loads == (ExpertLoad(2, (sum(kept), LAST_STEPS), (0, sum(kept))),)
    assert balance == pytest.approx(sum(kept) / LAST_STEPS)
    assert last_loads([step(1)]) == ((), None)
    assert StepRecord.from_json(steps[0].to_json()) == steps[0]


def test_dead_and_overloaded_experts_are_named() -> None:
    even, uneven = ExpertLoad(0, (5, 5, 5, 5), (0, 0, 0, 0)), ExpertLoad(2, (0, 20, 9, 11), (1, 40, 9, 10))
    said = list(sentences([even, uneven], 1.25))
    assert said == [
        "2 layers of 4; an expert got 0.04 to 2.40 of an even load; balance loss 1.250, and 1 is even",
        "layer 2: expert 0 dead: less than 0.1 of an even load",
        "layer 2: expert 1 (2.40) overloaded: 2 or more of an even load",
    ]
    assert list(sentences([even])) == ["1 layer of 4; an expert got 1.00 to 1.00 of an even load"]
    assert list(sentences([])) == []
    assert list(sentences([uneven] * 9))[-1] == "and 13 more"
    assert shares((0, 0)) == (0.0, 0.0)


def test_the_picture_is_drawn_where_there_is_a_load(tmp_path: Path) -> None:
    names = [
        path.name for path in draw([step(1, ExpertLoad(0, (1, 2), (0, 0)), ExpertLoad(3, (1, 2, 3), (4, 0, 0)))], "r", tmp_path)
    ]
    assert names == ["loss.png", "memory.png", "experts.png"]
    assert (tmp_path / "experts.png").stat().st_size > 1000
    for experts in ((), (ExpertLoad(0, (0, 0), (0, 0)),)):
        assert len(draw([step(1, *experts)], "r", tmp_path)) == 2
