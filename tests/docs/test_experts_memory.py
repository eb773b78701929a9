"""docs/experts-memory.md: its screens and its numbers, on the published recipe and on ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from oomph import cli
from oomph.records import StagePlan
from oomph.units import GIB

PAGE = "docs/experts-memory.md"
PUBLISHED = "moe-llava/phi2-clip336-as-published"
OURS = "moe-llava/phi2-clip336"
FFN = 2 * 2560 * 10240 + 10240 + 2560
TOWER = 303_507_456

pytestmark = pytest.mark.slow


def planned(capsys: Any, *arguments: str) -> StagePlan:
    cli.run(["plan", *arguments, "--stage", "moe", "--no-ladder", "--json"])
    return StagePlan.from_json(json.loads(capsys.readouterr().out)["stages"][0])


def test_the_page_shows_what_is_printed(reader: Any, pages: Any, follow: Any) -> None:
    follow(reader, pages[PAGE])


def test_the_published_stage_runs_out_of_memory_in_its_dispatch(capsys: Any) -> None:
    stage = planned(capsys, PUBLISHED)
    request = stage.prediction.failing_request
    assert request is not None
    tokens = 8 * 2623
    assert (request.shape, request.dtype, request.role) == ((tokens, 4, 3 * tokens // 4), "float32", "dispatch")
    assert request.bytes == 4 * 4 * tokens * (3 * tokens // 4)
    assert stage.prediction.by_role["dispatch"] > 10 * GIB
    assert planned(capsys, PUBLISHED, "micro_batch=4").prediction.fits


def test_the_counts_are_those_of_the_published_model(capsys: Any) -> None:
    stage = planned(capsys, PUBLISHED)
    experts, routers, projector = 64 * FFN, 16 * 4 * 2560, 9_180_160
    assert stage.trainable_parameters == experts + 16 * FFN + routers + projector
    phi = 2_779_683_840 - 51_200  # LLaVA's head has no bias
    assert stage.total_parameters - TOWER == phi + 48 * FFN + routers + projector
    counts = stage.total_parameters - TOWER, experts, stage.trainable_parameters
    assert [round(n / 1e9, 3) for n in counts] == [5.306, 3.356, 4.205]
    assert planned(capsys, OURS, "sharding=zero2").trainable_parameters == experts + routers


def test_ours_takes_a_whole_share_of_full_length_samples_at_once(capsys: Any) -> None:
    stage = planned(capsys, OURS, "sharding=zero2", "data.image_tokens_count=false")
    assert stage.samples_tokens == 2623
    assert (stage.choice.micro_batch, stage.choice.accumulation, stage.choice.effective_batch) == (16, 1, 128)
    assert stage.prediction.fits
    assert "dispatch" not in stage.prediction.by_role
    assert any(name.endswith("mlp.experts") for name in stage.prediction.by_module)
