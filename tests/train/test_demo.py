"""`make demo` with few digits and few steps: its own command lines, recipe and data, and the recoveries that it is to show."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from oomph import cli
from oomph.live.run_folder import read_log
from oomph.report.reading import read_record
from oomph.run_records import RunSummary, StepRecord
from oomph.units import MIB

load_digits = pytest.importorskip("sklearn.datasets", reason="the demo's digits are scikit-learn's").load_digits

FEW = ["run.grow_after=1", "stages.align.steps=8", "stages.finetune.steps=3", "stages.moe.steps=3"]
DIGITS = 180


@pytest.fixture(scope="module")
def lines(root: Path) -> dict[str, list[str]]:
    """The commands that the Makefile's demo shows and runs, by their verb; of several the first."""
    text = (root / "Makefile").read_text(encoding="utf-8")
    names = dict(re.findall(r"^(\w+) := (.*)$", text, re.MULTILINE))
    found: dict[str, list[str]] = {}
    for command in re.findall(r"\$\(call shown,(.*)\)$", text, re.MULTILINE):
        words = shlex.split(re.sub(r"\$\((\w+)\)", lambda name: names[name[1]], command))
        found.setdefault("make_data" if words[0] == "python" else words[1], words)
    return found


@pytest.fixture(scope="module")
def make_data(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("make_data", root / "recipes" / "demo" / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(root: Path, lines: dict[str, list[str]], make_data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes and a few of the digits."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "recipes").symlink_to(root / "recipes")
    program, script, target = lines["make_data"]
    assert (program, script) == ("python", "recipes/demo/make_data.py")
    made = make_data.make(folder / target, number=DIGITS)
    assert made == {"pictures to train on": 450, "held out": 30, "texts without a picture": 50}
    return folder


def test_held_out_digits_are_not_trained_on(place: Path) -> None:
    folder = place / "build" / "demo"
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("captions", "conversations", "test")}
    digits = {name: {record["image"].split("-")[1][:4] for record in records} for name, records in read.items()}
    assert digits["captions"] == digits["conversations"]
    assert len(digits["captions"]) == 150
    assert len(digits["test"]) == 30
    assert not digits["test"] & digits["captions"]
    assert all((folder / "pictures" / record["image"]).is_file() for records in read.values() for record in records)


def test_the_data_is_the_same_for_the_same_seed(make_data: Any, tmp_path: Path) -> None:
    for folder, seed in (("one", 0), ("again", 0), ("other", 1)):
        make_data.make(tmp_path / folder, seed, 18)
    texts = {name: (tmp_path / name / "conversations.json").read_bytes() for name in ("one", "again", "other")}
    assert texts["one"] == texts["again"] != texts["other"]


@pytest.mark.slow
def test_the_demo_recovers_and_predicts_to_the_byte(
    place: Path, lines: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    _, *train = lines["train"]
    output, limit = Path(train[train.index("--output") + 1]), train[train.index("--memory-limit") + 1]
    assert cli.run([*train, *FEW]) == 0
    shown, told = capsys.readouterr()
    summary = read_record(str(output / "run.json"))
    assert isinstance(summary, RunSummary)
    assert shown.count("predicted to the byte in every step") == 3
    steps = [line for line in read_log(output) if isinstance(line, StepRecord)]
    first, *rest = steps
    (found,) = first.recoveries
    assert (first.step, found.kind, found.limit_bytes >= found.predicted_bytes) == (0, "allocator", True)
    assert found.predicted_bytes > int(limit.removesuffix("MiB")) * MIB >= (found.measured_bytes or 0)
    assert [len(piece) for piece in found.from_split] == [32]
    assert len(found.to_split) > 1
    assert sorted(position for piece in found.to_split for position in piece) == list(range(32))
    assert "the dry run: memory ran out in the forward" in told
    assert "redone with the same samples on the same rung, cut 32 →" in told.replace("\u00a0", " ")
    for record in rest:
        assert record.prediction_error_bytes == 0
        assert record.measured_peak_bytes is not None
        assert record.measured_peak_bytes <= int(limit.removesuffix("MiB")) * MIB
    assert [stage.steps for stage in summary.stages] == [8, 3, 3]
    assert [bool(record.experts) for record in rest] == [record.stage == "moe" and record.step > 0 for record in rest]
    losses = [record.loss for record in rest]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < losses[0]
    assert cli.run(lines["eval"][1:]) == 0
    assert "of 30 answers" in capsys.readouterr().out


def test_the_picture_that_is_asked_about_is_held_out(lines: dict[str, list[str]], make_data: Any) -> None:
    _, verb, model, _, image, _, question = lines["chat"]
    assert (verb, model) == ("chat", "build/demo/run/final")
    held_out = make_data.choose(random.Random(0), len(load_digits().images))
    assert Path(image).stem in {f"test-{number:04}" for number in held_out}
    assert question in make_data.DIGIT
