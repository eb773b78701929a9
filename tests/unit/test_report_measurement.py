"""A measurement as a screen: every number of the record, signs and verdicts, 80 columns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomph import cli
from oomph.errors import UserError
from oomph.records import Choice, Footprint, MeasuredRung, MeasuredStage, Measurement, PhasePeak
from oomph.report.measurement import render
from oomph.report.reading import parse_record
from oomph.units import GIB, MIB

STOPPED = "micro-batch 2: the recipe's micro-batch"


def footprint(allocated: int, reserved: int) -> Footprint:
    return Footprint(
        allocated,
        reserved,
        (PhasePeak("load", allocated // 2, reserved // 2), PhasePeak("backward", allocated, reserved)),
    )


def rung(micro_batch: int = 1, difference: int = 0, reserved: int = 0, **more: Any) -> MeasuredRung:
    whole = micro_batch * GIB
    return MeasuredRung(
        choice=Choice(micro_batch, 2, 2 * micro_batch),
        predicted=footprint(whole, 2 * whole),
        bound_bytes=10 * MIB,
        measured=footprint(whole - difference, 2 * whole - reserved),
        process_peak_bytes=3 * GIB,
        outside_bytes=500 * MIB,
        step_seconds=0.25,
        samples_per_second=8.0 * micro_batch,
        tokens_per_second=8192.0 * micro_batch,
        utilisation=0.97,
        sm_activity=0.42,
        **more,
    )


def measurement(*rungs: MeasuredRung, device: Any = "cuda", stopped: str = STOPPED) -> Measurement:
    stage = MeasuredStage("tune", 1024, 1, rungs, stopped)
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    return Measurement("tiny", device, "A100-SXM4-40GB", "580.65", "13.0", (stage,), ("a note",), versions, "2026-01-02")


def test_every_number_stands_on_the_screen() -> None:
    text = render(measurement(rung(1, 0), rung(2, -512, 2 * MIB)))
    assert text.splitlines()[0] == "tiny measured on A100-SXM4-40GB"
    for line in (
        "    1              1,073,741,824    1,073,741,824               +0   +0.000 %",
        "    2              2,147,483,648    2,147,484,160             -512   -0.000 %",
        "    2              4,294,967,296    4,292,870,144       +2,097,152   +0.049 %",
        "    load           1,073,741,824    1,073,742,080             -256   -0.000 %",
        "  a note",
        "  2 micro-batch sizes, all within the error bound",
        "  climb ended   micro-batch 2: the recipe's micro-batch",
        "  every prediction is within its error bound",
    ):
        assert line in text.splitlines(), text
    for part in ("250 ms a step", "16.0 samples/s", "16,384 tokens/s", "busy 97 %", "SMs 42 %", "process 3.00 GiB"):
        assert part in text
    for part in ("outside the allocator 0.49 GiB", "driver 580.65", "CUDA 13.0", "torch 2.13.0", "1,024 tokens, 1 image each"):
        assert part in " ".join(text.split())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"difference": 11 * MIB}, "micro-batch 2: 11.0 MiB more is predicted than was allocated, and the error bound is"),
        ({"difference": -11 * MIB}, "micro-batch 2: 11.0 MiB less is predicted than was allocated"),
        ({"reserved": 12 * MIB}, "micro-batch 2: 12.0 MiB more is predicted than was reserved"),
    ],
)
def test_what_is_not_within_the_bound_is_said(wrong: dict[str, int], sentence: str) -> None:
    text = " ".join(render(measurement(rung(1), rung(2, **wrong))).split())
    assert sentence in text
    assert "1 of 2 micro-batch sizes not within the error bound" in text
    assert text.endswith("not every prediction holds")


def test_a_rung_that_failed_says_why_and_has_no_numbers() -> None:
    failed = replace(rung(2), measured=None, failure="out of memory in phase backward: Tried to allocate 2.00 GiB")
    text = " ".join(render(measurement(rung(1), failed)).split())
    assert "micro-batch 2 failed: out of memory in phase backward: Tried to allocate 2.00 GiB" in text
    assert "2,147,483,648 2,147,483,648" in text
    assert "4,294,967,296" not in text


def test_nothing_that_was_measured_is_a_screen_too() -> None:
    text = render(measurement(stopped="micro-batch 1 is predicted to need 41.00 GiB"))
    assert "not measured: not even the smallest micro-batch is predicted to fit" in text
    assert "micro-batch 1 is predicted to need 41.00 GiB" in " ".join(text.split())
    assert text.rstrip().endswith("not every prediction holds")


def test_the_cpu_has_nothing_reserved_and_no_driver() -> None:
    bare = replace(rung(1), outside_bytes=None, sm_activity=None)
    text = render(replace(measurement(bare, device="cpu"), driver="", cuda="", gpu="EPYC"))
    assert text.startswith("EPYC") is False
    assert "tiny measured on EPYC (CPU)" in text
    for word in ("reserved", "driver", "CUDA", "SMs", "outside"):
        assert word not in text


@given(st.integers(1, 10**12 - 1), st.integers(-(10**11) + 1, 10**11 - 1), st.integers(70, 120))
def test_no_line_is_wider_than_the_screen(nbytes: int, difference: int, width: int) -> None:
    wide = replace(
        rung(1),
        predicted=footprint(nbytes, nbytes),
        measured=footprint(min(max(nbytes - difference, 1), 10**12 - 1), nbytes),
    )
    text = render(measurement(wide, replace(rung(65536), measured=None, failure="word " * 40)), width)
    assert max(map(len, text.splitlines())) <= max(width, 80)


def test_control_characters_do_not_reach_the_terminal() -> None:
    evil = replace(measurement(rung(1)), recipe="\x1b[2J", gpu="\x07", notes=("\x1b[0m",), versions={"\x1b": "\x9b"})
    assert not set(render(evil)) & {"\x1b", "\x07", "\x9b"}
    assert "\x1b[" in render(measurement(rung(1)), color=True)


# Read again.


def test_a_saved_measurement_is_printed_again(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(measurement(rung(1)).to_json()))
    assert cli.run(["report", str(file)]) == 0
    assert capsys.readouterr().out == render(measurement(rung(1)))
    assert cli.run(["report", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == measurement(rung(1)).to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 9}, "has schema 9"),
        ({"device": "tpu"}, "is a damaged measurement: Measurement.device: 'tpu' is none of 'cuda', 'cpu'"),
        ({"stages": [{}]}, "is a damaged measurement"),
        ({"kind": "else", "stages": None}, "is a damaged plan"),
    ],
)
def test_a_measurement_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    content = json.dumps({**measurement(rung(1)).to_json(), **change}).encode()
    with pytest.raises(UserError) as error:
        parse_record(content, "file")
    assert message in error.value.problems[0]
