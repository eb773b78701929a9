"""What can train on which ranks, and the private names of PyTorch that FSDP2's recovery needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oomph.errors import UserError
from oomph.live.ranks import torch_private
from oomph.live.ranks.apply import check
from oomph.live.ranks.group import Ranks
from oomph.records import Choice

REFUSED: list[Any] = [
    ({"sharding": "zero2", "gpus": 4}, 4, "zero2 can be planned, but not trained", "fsdp2"),
    ({"sharding": "ddp", "gpus": 8}, 4, "the choice is for 8 GPUs, and 4 processes run", "hardware.gpus=4"),
    ({"sharding": "none", "gpus": 2}, 2, "sharding none trains in one process, and 2 run", "ddp or fsdp2"),
    ({"sharding": "fsdp2-hybrid", "gpus": 6, "nodes": 4}, 6, "several nodes of equally many GPUs, and 6 run on 4", "fsdp2"),
]


@pytest.mark.parametrize(("knobs", "size", "problem", "hint"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_cannot_train(knobs: dict[str, Any], size: int, problem: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        check(Choice(1, 1, 8, **knobs), Ranks(0, size))
    assert problem in str(error.value)
    assert hint in error.value.hint


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "fsdp2-no-reshard"])
def test_what_can(sharding: Any) -> None:
    check(Choice(1, 1, 8, gpus=4, sharding=sharding), Ranks(3, 4))


def test_the_installed_torch_has_every_private_name() -> None:
    assert torch_private.missing() == []
    assert torch_private.supported(), f"check torch_private.py against torch {torch.__version__}, then move VERSION"


def test_another_torch_trains_no_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1")
    with pytest.raises(UserError, match=r"fsdp2 does not run on torch 2\.12\.1: it was checked with torch 2\.13 alone"):
        check(Choice(1, 1, 8, gpus=2, sharding="fsdp2"), Ranks(0, 2))
    check(Choice(1, 1, 8, gpus=2, sharding="ddp"), Ranks(0, 2))


def test_one_process_talks_to_nobody() -> None:
    ranks = Ranks()
    assert ranks.sums([1.5, 2]) == [1.5, 2]
    assert ranks.most([3, -1]) == [3, -1]
    assert ranks.exchange("x") == ["x"]
    assert ranks.broadcast("x") == "x"
    ranks.leave()


def test_several_talk(on_ranks: Any) -> None:
    assert on_ranks(3, "talk") == [[[3.0, 0.75], [2, 0], ["0", "1", "2"], "1"]] * 3
