"""What was measured outside the allocator on this machine: kept whole, read strictly, taken before the catalogue's figures."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from oomph.core.devices import find_gpu, outside, usable_bytes
from oomph.core.machine import Constant, constant, constants, machine_file, remember
from oomph.errors import UserError
from oomph.report import words
from oomph.units import MIB

TORCH = metadata.version("torch")
SEEN = Constant("T4", "580.1", TORCH, "context", 1, 150 * MIB, 150 * MIB, "2026-01-02T03:04:05+00:00")


@pytest.fixture(autouse=True)
def _config_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_the_file_lies_where_configuration_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_file() == tmp_path / "config" / "oomph" / "machine.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine_file() == tmp_path / ".config" / "oomph" / "machine.json"


def test_without_a_file_nothing_is_known() -> None:
    assert constants() == ()
    assert constant("T4", TORCH, "context") is None


def test_what_is_remembered_is_found_again() -> None:
    remember(SEEN)
    assert constants() == (SEEN,)
    assert constant("T4", TORCH, "context") == SEEN
    others = ("L4", TORCH, "context", 1), ("T4", "2.0", "context", 1), ("T4", TORCH, "nccl", 1), ("T4", TORCH, "context", 2)
    assert [constant(*other) for other in others] == [None] * 4
    assert [path.name for path in machine_file().parent.iterdir()] == ["machine.json"]


def test_a_second_reading_widens_the_first() -> None:
    remember(SEEN)
    remember(replace(SEEN, low=140 * MIB, high=140 * MIB, date="2026-01-03"))
    (both,) = constants()
    assert (both.low, both.high, both.bytes, both.date) == (140 * MIB, 150 * MIB, 150 * MIB, "2026-01-03")


def test_of_several_drivers_the_latest_counts() -> None:
    remember(replace(SEEN, driver="570", date="2026-01-09", low=1, high=1))
    remember(SEEN)
    assert len(constants()) == 2
    found = constant("T4", TORCH, "context")
    assert found is not None
    assert found.driver == "570"


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"\xff", b'{"schema": 2, "constants": []}', b'{"schema": 1, "constants": [{}]}', b"[" * 100_000],
)
def test_a_damaged_file_is_an_error_with_a_way_out(content: bytes) -> None:
    machine_file().parent.mkdir(parents=True)
    machine_file().write_bytes(content)
    for use in (lambda: outside(find_gpu("T4"), 1), lambda: remember(SEEN)):
        with pytest.raises(UserError, match="does not hold what `oomph measure` writes there") as error:
            use()
        assert "delete the file" in error.value.hint
    assert machine_file().read_bytes() == content


@pytest.mark.parametrize("fails", ["os.fsync", "os.replace"])
def test_an_interrupted_write_leaves_the_file_as_it_was(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(SEEN)
    before = machine_file().read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"oomph.core.machine.{fails}", fail)
        with pytest.raises(OSError, match="No space"):
            remember(replace(SEEN, high=200 * MIB))
    assert machine_file().read_bytes() == before
    assert [path.name for path in machine_file().parent.iterdir()] == ["machine.json"]


# Planning with it.


def test_the_catalogue_s_context_gives_way_to_this_machine_s() -> None:
    card = find_gpu("T4")
    before = outside(card, 1)
    usable = usable_bytes(card, 1)
    remember(SEEN)
    (line,) = outside(card, 1).lines
    assert (line.name, line.bytes, line.low, line.high) == ("context", 150 * MIB, 150 * MIB, 150 * MIB)
    assert line.basis == "this machine"
    assert line.source == "driver 580.1, 2026-01-02"
    assert line.label == "context, measured on this machine"
    assert usable_bytes(card, 1) == usable + before.bytes - 150 * MIB
    assert outside(find_gpu("L4"), 1).lines[0].basis != "this machine"


def test_nccl_is_that_of_as_many_gpus() -> None:
    remember(replace(SEEN, name="nccl", gpus=4))
    assert [line.basis for line in outside(find_gpu("T4"), 4).lines] == ["measured", "this machine"]
    assert [line.basis for line in outside(find_gpu("T4"), 2).lines] == ["measured", "estimated"]


def test_what_another_torch_held_does_not_count() -> None:
    remember(replace(SEEN, torch="2.0.0"))
    assert outside(find_gpu("T4"), 1).lines[0] == find_gpu("T4").context


def test_the_report_says_that_it_was_measured_here() -> None:
    assert words.outside("context, measured on this machine") == "CUDA context, measured on this machine"
    assert words.outside("nccl") == "NCCL"
    assert words.outside("driver and libraries") == "driver and libraries"


def test_a_file_that_another_process_has_changed_is_read_again() -> None:
    remember(SEEN)
    data = json.loads(machine_file().read_text())
    data["constants"][0]["high"] = 160 * MIB
    assert constant("T4", TORCH, "context") == SEEN
    machine_file().write_text(json.dumps(data))
    os.utime(machine_file(), ns=(1, 1))
    assert constant("T4", TORCH, "context") == replace(SEEN, high=160 * MIB)
