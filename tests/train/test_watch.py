"""Other tools get each step's numbers by their names; how busy the device is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oomph.errors import UserError
from oomph.live.watch import Busy, numbers_of, open_logs
from oomph.recipe import load
from oomph.records import Choice
from oomph.run_records import EvaluationRecord, StepRecord

STEP = StepRecord(
    stage="tune",
    step=3,
    steps=4,
    epoch=0.5,
    loss=1.25,
    grad_norm=None,
    learning_rates={"language": 1e-4},
    samples=16,
    tokens=4000,
    label_tokens=900,
    choice=Choice(8, 2, 16),
    split=((16, 300, 16),),
    predicted_peak_bytes=300,
    measured_peak_bytes=200,
    prediction_error_bytes=100,
    limit_bytes=400,
    recoveries=(),
    skipped=(),
    shrunk=(),
    seconds={"data": 0.5, "step": 1.5, "between": 0.0},
    decode_seconds=0.2,
    workers=2,
    activity=0.5,
)


def test_a_step_in_numbers() -> None:
    assert numbers_of(STEP) == {
        "tune/loss": 1.25,
        "tune/samples per second": 8.0,
        "tune/tokens per second": 2000.0,
        "tune/data wait seconds": 0.5,
        "tune/memory predicted": 300.0,
        "tune/memory measured": 200.0,
        "tune/recoveries": 0.0,
        "tune/activity": 0.5,
        "tune/learning rate language": 1e-4,
    }
    assert numbers_of(EvaluationRecord("tune", 3, 1.5, 4, 40, 0.1)) == {"tune/evaluation loss": 1.5}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What tools are told that are not installed here."""
    made: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            made.append(("open", Path(folder).name))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            made.append((name, value, step))

        def close(self) -> None:
            made.append("close")

    tracker = SimpleNamespace(
        init=lambda **settings: made.append(("init", settings["project"], settings["name"], settings.get("dir"))),
        log=lambda numbers, step: made.append((numbers, step)),
        finish=lambda: made.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "wandb", tracker)  # type: ignore[arg-type]
    return made


def test_each_tool_is_spoken_to_in_its_own_way(calls: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    logs = open_logs(["tensorboard", "wandb"], load("moe-llava/phi2-clip336"), folder)
    for log in logs:
        log.log({"tune/loss": 1.25}, 3)
        log.close()
    assert calls == [
        ("open", "tensorboard"),
        ("init", "oomph", "run", str(folder)),
        ("tune/loss", 1.25, 3),
        "close",
        ({"tune/loss": 1.25}, 3),
        "finish",
    ]


def test_all_that_are_missing_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(UserError) as raised:
        open_logs(["trackio", "wandb"], load("moe-llava/phi2-clip336"), tmp_path)
    assert [problem.split()[2] for problem in raised.value.problems] == ["trackio,", "wandb,"]
    assert raised.value.hint.startswith("install trackio, wandb")


def test_the_processes_time_is_how_busy_the_cpu_is() -> None:
    busy = Busy("cpu")
    sum(range(200_000))
    share = busy.share()
    assert share is not None
    assert 0 < share <= 1
