"""One trajectory on 1, 2 and 4 ranks, whatever is shared how, and wherever memory runs out on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

TOLERANCE = 1e-6

CASES: list[Any] = [
    pytest.param(2, "ddp", {"experts": True}, id="ddp on 2, experts"),
    pytest.param(4, "ddp", {"bucket": 8192}, id="ddp on 4, small buckets"),
    pytest.param(2, "fsdp2", {"loss": "chunked", "checkpointing": "blocks"}, id="fsdp2 on 2"),
    pytest.param(4, "fsdp2", {"experts": True}, id="fsdp2 on 4, experts"),
    pytest.param(4, "fsdp2-hybrid", {"nodes": 2}, id="fsdp2-hybrid on 2 × 2"),
]


@pytest.fixture(scope="module")
def alone(on_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[list[float], dict[str, Tensor]]]:
    """What one process gives, with and without experts."""

    @functools.cache
    def of(experts: bool) -> tuple[list[float], dict[str, Tensor]]:
        path = tmp_path_factory.mktemp("alone") / "parameters"
        (losses,) = on_ranks(1, "trajectory", sharding="none", path=str(path), experts=experts)
        return losses, torch.load(path)

    return of


@pytest.mark.parametrize(("ranks", "sharding", "knobs"), CASES)
def test_one_trajectory(on_ranks: Any, alone: Any, tmp_path: Path, ranks: int, sharding: str, knobs: dict[str, Any]) -> None:
    every_rank = on_ranks(ranks, "trajectory", sharding=sharding, path=str(tmp_path / "parameters"), **knobs)
    losses, parameters = alone(knobs.get("experts", False))
    assert every_rank == [every_rank[0]] * ranks
    assert every_rank[0] == pytest.approx(losses, rel=TOLERANCE, abs=0)
    assert losses[-1] < losses[0]
    found = torch.load(tmp_path / "parameters")
    far = {name: float((found[name] - one).norm() / one.norm().clamp(min=1e-3)) for name, one in parameters.items()}
    print(f"largest {max(far.values()):.1e} of a norm")
    assert max(far.values()) < TOLERANCE
