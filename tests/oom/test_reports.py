"""Real reports: every figure of every one is read, and where the configuration is known the tensor is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oomph.core.oom.explain import explain
from oomph.core.oom.sizes import read_size
from oomph.diagnosis_records import Diagnosis, OomMessage
from oomph.units import KIB

REPORTS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "reports.json").read_text(encoding="utf-8"))
FIELDS = {
    "asked": "requested_bytes",
    "capacity": "capacity_bytes",
    "allocated": "allocated_bytes",
    "free": "free_bytes",
    "reserved": "reserved_bytes",
    "unallocated": "unallocated_bytes",
    "process": "process_bytes",
    "allowed": "limit_bytes",
    "private": "private_pool_bytes",
    "other": "other_bytes",
}
KINDS = {
    "cuda": "cuda allocator",
    "async": "cuda allocator",
    "hip": "hip allocator",
    "xpu": "xpu allocator",
    "mps": "mps",
    "cpu": "cpu allocator",
    "rust": "cpu allocator",
    "kernel": "linux oom killer",
    "cublas": "cublas",
    "cudnn": "cudnn",
    "nccl": "nccl",
}
Written = Callable[[dict[str, Any]], str]


def name(report: dict[str, Any]) -> str:
    """A report's repository and number."""
    return str(report["source"]).removeprefix("https://github.com/").replace("/issues/", "#")


def kind(wording: str) -> str:
    """The reporter of a wording."""
    return "cuda runtime" if wording == "cuda runtime" else KINDS[wording.split(" ")[0]]


def read(text: str) -> int:
    """A figure as bytes."""
    printed = read_size(text if " " in text else f"{text} bytes")
    assert printed is not None, text
    return printed.bytes


def figures(message: OomMessage) -> dict[str, Any]:
    """The figures of a message, by the names of the reports."""
    found = {key: getattr(message, field) for key, field in FIELDS.items() if getattr(message, field) is not None}
    return {**found, "others": [[process.pid, process.bytes] for process in message.others]}


def test_there_are_enough_reports_of_every_form() -> None:
    assert len(REPORTS) >= 40
    assert {kind(report["wording"]) for report in REPORTS} >= {*KINDS.values(), "cuda runtime"}
    assert len({report["source"] for report in REPORTS}) == len(REPORTS)
    assert sum("tensor" in report.get("expected", {}) for report in REPORTS) >= 15


@pytest.fixture(scope="module")
def diagnoses(written: Written) -> dict[str, Diagnosis]:
    """The diagnosis of every report, by its source."""
    return {report["source"]: explain(written(report), "log") for report in REPORTS}


@pytest.mark.parametrize("report", REPORTS, ids=name)
def test_every_figure_is_read(report: dict[str, Any], diagnoses: dict[str, Diagnosis]) -> None:
    diagnosis = diagnoses[report["source"]]
    assert len(diagnosis.messages) == 1
    message, numbers = diagnosis.message, report["numbers"]
    assert message.kind == kind(report["wording"])
    assert message.rank == report.get("rank")
    if message.kind == "linux oom killer":
        assert message.process == numbers["name"]
        assert message.process_bytes == KIB * (numbers["anon"] + numbers["file"] + numbers["shmem"])
        return
    expected = {key: read(value) for key, value in numbers.items() if key in FIELDS and value != "1 EB"}
    found = figures(message)
    assert {key: found.get(key) for key in expected} == expected
    assert found["others"] == [[pid, read(held)] for pid, held in numbers.get("others", [])]
    assert message.gpu == numbers.get("gpu")
    assert message.truncated == (", cut" in report["wording"] and "unallocated" not in numbers)


@pytest.mark.parametrize("report", [r for r in REPORTS if "expected" in r], ids=name)
def test_tensor_cause_and_phase_are_right(report: dict[str, Any], diagnoses: dict[str, Diagnosis]) -> None:
    diagnosis, expected = diagnoses[report["source"]], report["expected"]
    if "phase" in expected:
        assert diagnosis.message.phase == expected["phase"]
    if "cause" in expected:
        assert diagnosis.causes[0].name == expected["cause"]
    if "tensor" in expected:
        tensor = expected["tensor"]
        candidates = [(c.what, c.dtype, list(c.shape)) for c in diagnosis.candidates]
        assert len(candidates) >= tensor["rank"], candidates
        what, dtype, shape = candidates[tensor["rank"] - 1]
        assert (what, dtype) == (tensor["what"], tensor["dtype"]), candidates
        if tensor.get("near"):  # the length is not known, but for what the printed size leaves of it
            assert len(shape) == len(tensor["shape"])
            message, nbytes = diagnosis.message, diagnosis.candidates[tensor["rank"] - 1].bytes
            assert message.requested_low is not None
            assert message.requested_high is not None
            assert message.requested_low <= nbytes <= message.requested_high
        else:
            assert shape == tensor["shape"], candidates


def test_every_diagnosis_survives_json(diagnoses: dict[str, Diagnosis]) -> None:
    for diagnosis in diagnoses.values():
        assert Diagnosis.from_json(json.loads(json.dumps(diagnosis.to_json()))) == diagnosis
