"""LoRA steps that somebody measured on a Tesla T4, predicted to the byte: allocated and reserved, in every phase.

What was run and what the rows are is in rows.py. The page docs/accuracy.md shows them.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "t4_lora_sweep.json").read_text(encoding="utf-8"))["rows"]
QUICK = {("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 512)}


def params() -> list[Any]:
    """The rows without quantised weights, repeated ones too; some are quick."""
    found = []
    for number, row in enumerate(ROWS):
        run = row["run"]
        if run["quantization"] == "none":
            marks = () if (row["model"], run["seq_len"]) in QUICK else pytest.mark.slow
            name = f"{row['model'].split('/')[1]}-{run['attn_impl']}-{run['batch_size']}x{run['seq_len']}-row{number}"
            found.append(pytest.param(number, marks=marks, id=name))
    return found


@pytest.fixture(scope="module")
def accuracy(root: Path) -> ModuleType:
    """The script that writes docs/accuracy.md."""
    spec = importlib.util.spec_from_file_location("accuracy", root / "benchmarks" / "accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("number", params())
def test_a_measured_step_is_predicted_to_the_byte(rows: ModuleType, accuracy: ModuleType, number: int) -> None:
    row = ROWS[number]
    key = rows.name(row)
    predicted = rows.predicted(key)
    assert predicted == rows.Peaks.of(row["measured"])
    kept = json.loads(accuracy.RESULTS.read_text(encoding="utf-8"))
    assert kept["none"][key] == vars(predicted), "benchmarks/accuracy.py --write has to run again"


def test_there_are_twenty_rows_of_sixteen_configurations(rows: ModuleType) -> None:
    assert len(params()) == len(rows.MEASURED) == 20
    assert len(rows.UNQUANTISED) == 16


def test_repeated_rows_came_back_equal(rows: ModuleType) -> None:
    for key, first in rows.UNQUANTISED.items():
        repeated = [rows.Peaks.of(row["measured"]) for row in rows.MEASURED if rows.name(row) == key]
        assert set(repeated) == {rows.Peaks.of(first["measured"])}


def test_the_page_is_what_the_predictions_make_it(accuracy: ModuleType) -> None:
    kept = json.loads(accuracy.RESULTS.read_text(encoding="utf-8"))
    assert accuracy.PAGE.read_text(encoding="utf-8") == accuracy.page(kept), "benchmarks/accuracy.py has to run again"
