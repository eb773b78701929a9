"""QLoRA steps that somebody measured on a Tesla T4, and what the order of loading leaves open in them.

Weights were loaded by threads, and no two runs have the same blocks. Rows of the models in which that leaves the same rests of
blocks are predicted to the byte in every phase; docs/accuracy.md has every row.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _quantized_rows() -> ModuleType:
    name = "measured_quantized_rows"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("quantized_rows.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


nf4 = _quantized_rows()
QUICK = {"SmolLM2-135M-eager-2x512", "TinyLlama-1.1B-Chat-v1.0-sdpa-2x512"}
KEYS = [pytest.param(key, marks=() if key in QUICK else pytest.mark.slow) for key in nf4.QUANTISED]
OPEN = ("Qwen2.5-1.5B", "SmolLM2-360M", "TinyLlama", "SmolLM2-135M-sdpa-2x512", "SmolLM2-135M-eager-1x4096")
"""Rows whose rests depend on the loader's threads."""
EXACT = [key for key in nf4.QUANTISED if not key.startswith(OPEN)]
PHASES = ("forward", "backward", "optimizer", "allocated")
WORST = 0.0035
"""Of the row's peak, in every phase."""
MEDIAN = 0.0005


def measured(row: dict[str, Any]) -> Any:
    return nf4.rows.Peaks.of(row["measured"])


@pytest.mark.parametrize("key", KEYS)
def test_a_measured_step_is_predicted_within_the_bound(key: str) -> None:
    point = nf4.predicted(key).point
    for row in nf4.QUANTISED[key]:
        found = measured(row)
        off = {phase: (getattr(point, phase) - getattr(found, phase)) / found.allocated for phase in PHASES}
        assert all(abs(difference) <= WORST for difference in off.values()), off


@pytest.mark.parametrize("key", KEYS)
def test_reserved_bytes_lie_in_the_interval(key: str) -> None:
    prediction = nf4.predicted(key)
    assert prediction.low.reserved <= prediction.point.reserved <= prediction.high.reserved
    for row in nf4.QUANTISED[key]:
        assert prediction.low.reserved <= measured(row).reserved <= prediction.high.reserved


@pytest.mark.parametrize("key", [pytest.param(key, marks=() if key in QUICK else pytest.mark.slow) for key in EXACT])
def test_a_step_whose_rests_are_known_is_predicted_to_the_byte(key: str) -> None:
    point = nf4.predicted(key).point
    for row in nf4.QUANTISED[key]:
        found = measured(row)
        assert point.loaded == found.loaded
        assert {phase: getattr(point, phase) for phase in PHASES} == {phase: getattr(found, phase) for phase in PHASES}


@pytest.mark.parametrize("key", KEYS)
def test_what_was_measured_is_the_requests_and_rests_of_blocks(key: str) -> None:
    requested = nf4.requested(key)
    for row in nf4.QUANTISED[key]:
        assert 0 <= measured(row).allocated - requested <= 0.02 * requested


@pytest.mark.slow
def test_half_of_the_rows_are_closer_than_the_median_bound() -> None:
    off = [
        abs(nf4.predicted(key).point.allocated / measured(row).allocated - 1)
        for key, repeated in nf4.QUANTISED.items()
        for row in repeated
    ]
    assert len(off) == 20
    assert statistics.median(off) <= MEDIAN


@pytest.mark.slow
def test_every_residual_above_a_thousandth_has_a_cause() -> None:
    lines = [line for key in nf4.QUANTISED for line in nf4.shown(key)]
    assert len(lines) == 20
    for line in lines:
        assert (abs(line["allocated"] / line["measured_allocated"] - 1) > 0.001) == bool(line["cause"])
