"""The page of the ablation is what its script writes, and its figures are those of today's code."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from oomph.live.cuda_rules import RULES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ablation" / "run.py"
PAGE = "docs/ablation.md"
RESULTS: dict[str, Any] = json.loads(SCRIPT.with_name("results.json").read_text(encoding="utf-8"))
AGAIN = "run benchmarks/ablation/run.py --write"


@pytest.fixture(scope="module")
def ablation() -> Any:
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(pages: dict[str, Any], ablation: Any) -> None:
    assert pages[PAGE].text == ablation.page(RESULTS, ablation.measured()), f"{AGAIN} --as-recorded"


def test_another_figure_makes_another_page(pages: dict[str, Any], ablation: Any) -> None:
    changed = copy.deepcopy(RESULTS)
    row = changed["rows"]["SmolLM2-360M-sdpa-1x4096"]["cublas-workspace"]
    row["allocated"] -= 1 << 30
    assert pages[PAGE].text != ablation.page(changed, ablation.measured())


def test_every_rule_is_on_the_page(pages: dict[str, Any]) -> None:
    assert not [name for name in RULES if name not in pages[PAGE].text]


def test_the_rows_are_exact_with_every_rule(ablation: Any) -> None:
    truth = ablation.measured()
    assert {key: row[ablation.ALL] for key, row in RESULTS["rows"].items()} == {key: truth[key] for key in ablation.ROWS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "key", "names"),
    [
        ("rows", "SmolLM2-360M-sdpa-1x4096", ("efficient-attention", "host-seeds")),
        ("rows", "SmolLM2-360M-eager-1x4096", ("softmax-backward-temporary",)),
        ("steps", "MoE, H100", ("cudnn-attention", "packed-mask-dropped")),
    ],
)
def test_predictions_are_those_of_today(ablation: Any, part: str, key: str, names: tuple[str, ...]) -> None:
    found = ablation.variants(ablation.MEASURED if part == "rows" else ablation.PREDICTED, key, names)
    assert found == {name: RESULTS[part][key][name] for name in found}, AGAIN
    assert set(names) < set(found)
