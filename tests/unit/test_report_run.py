"""A run on the screen: what went wrong in one sentence, figures of a step, the summary, the bar, the curves."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from oomph.errors import UserError
from oomph.records import Choice, Recovery
from oomph.report.curves import draw
from oomph.report.progress import Screen, figures
from oomph.report.reading import parse_record
from oomph.report.run import recovery, render
from oomph.run_records import EvaluationRecord, RunStage, RunSummary, StepRecord
from oomph.units import GIB, MIB

CHOICE = Choice(8, 2, 16)
FAILED = Recovery(
    step=12,
    micro_batch=1,
    kind="allocator",
    phase="backward",
    module="model.layers.3",
    message="CPU out of memory. Tried to allocate 64.0 MiB.",
    predicted_bytes=3 * GIB,
    limit_bytes=4 * GIB,
    measured_bytes=4 * GIB,
    from_choice=CHOICE,
    to_choice=CHOICE,
    from_split=(tuple(range(8)), tuple(range(8, 16))),
    to_split=(tuple(range(8)), tuple(range(8, 12)), tuple(range(12, 16))),
)
STEP = StepRecord(
    stage="tune",
    step=2,
    steps=4,
    epoch=0.5,
    loss=1.25,
    grad_norm=0.5,
    learning_rates={"language": 1e-4, "head": 5e-5},
    samples=16,
    tokens=4000,
    label_tokens=900,
    choice=CHOICE,
    split=((16, 300, 16),),
    predicted_peak_bytes=3 * GIB,
    measured_peak_bytes=2 * GIB,
    prediction_error_bytes=GIB,
    limit_bytes=4 * GIB,
    recoveries=(),
    skipped=(),
    shrunk=(),
    seconds={"data": 0.1, "step": 1.9, "between": 0.0},
    decode_seconds=0.2,
    workers=2,
    activity=0.97,
)
HELD = EvaluationRecord("tune", 2, 1.5, 40, 800, 0.3)
STAGE = RunStage(
    name="tune",
    steps=4,
    planned_steps=4,
    samples=64,
    tokens=16000,
    trained=("language trains at 0.0001: 9.2 M parameters in 40 tensors",),
    inexact=("dropout in model.layers.0: another cut draws other masks",),
    choice=CHOICE,
    first_loss=2.5,
    last_loss=1.25,
    evaluations=(HELD, replace(HELD, step=4, loss=1.75)),
    limit_bytes=4 * GIB,
    predicted_peak_bytes=3 * GIB,
    measured_peak_bytes=3 * GIB,
    worst_error=-0.004,
    mean_error=0.0,
    recoveries=(FAILED,) * 7,
    skipped=("a.jsonl:3",),
    shrunk=(),
    seconds={"data": 0.4, "step": 7.6, "between": 1.0},
)
SUMMARY = RunSummary("demo", "runs/demo", "cpu", "EPYC", (STAGE,), "runs/demo/final", ("a note",), {"torch": "2.13.0"}, "2026")


def test_a_recovery_says_what_happened_what_was_taken_and_that_the_step_was_redone() -> None:
    assert recovery(FAILED).replace("\u00a0", " ") == (
        "step 12: memory ran out in the backward of micro-batch 2 in model.layers.3: CPU out of memory. Tried to allocate "
        "64.0 MiB (3.00 GiB predicted, 4.00 GiB taken by then); redone with the same samples on the same rung, "
        "cut 2 × 8 → 8 + 2 × 4"
    )
    leaner = replace(FAILED, to_choice=replace(CHOICE, checkpointing="blocks", loss="chunked"), step=0, measured_bytes=None)
    said = recovery(leaner)
    assert said.startswith("the dry run: memory ran out")
    assert "on the next rung, checkpointing none → blocks, loss full → chunked, cut" in said
    assert "taken by then" not in said
    assert recovery(replace(FAILED, to_split=())).endswith("nothing of the step was left to train on")
    assert recovery(replace(FAILED, kind="retries")).endswith("the next steps take less")


def test_the_summary_has_all_that_a_reader_asks_for() -> None:
    shown = render(SUMMARY)
    for words in (
        "demo trained on EPYC (CPU)",
        "steps         4: 64 samples, 16,000 tokens",
        "2.5000 in the first step, 1.2500 in the last",
        "1.7500 after step 4, at best 1.5000 after step 2; 40 samples, 800",
        "peak 3.00 GiB predicted, 3.00 GiB measured; 4.00 GiB allowed",
        "predicted less measured: 0 % on average, -0.400 % at the most",
        "8.00 samples/s, 2,000 tokens/s, 1.90 s a step; 5.0 % of it",
        "not exact     dropout",
        "recoveries    7 times",
        "and 2 more",
        "left out      1 sample: a.jsonl:3",
        "model         runs/demo/final",
    ):
        assert " ".join(words.split()) in " ".join(shown.split()), shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b[" in render(SUMMARY, color=True)
    exact = render(replace(SUMMARY, stages=(replace(STAGE, worst_error=0.0),)))
    assert "predicted to the byte in every step" in exact
    assert "predicted less measured" not in exact
    assert "no step ran" in render(replace(SUMMARY, stages=(replace(STAGE, steps=0, seconds={}, first_loss=None),)))
    assert "2 of 4: 64 samples" in render(replace(SUMMARY, stages=(replace(STAGE, steps=2, planned_steps=4),)))


def test_names_cannot_steer_the_terminal() -> None:
    evil = replace(SUMMARY, recipe="a\x1b[2Jb", stages=(replace(STAGE, skipped=("\x1b]0;x\x07",)),))
    assert "\x1b" not in render(evil)


def test_a_summary_is_read_back_and_a_damaged_one_is_told() -> None:
    data = SUMMARY.to_json()
    assert parse_record(json.dumps(data).encode(), "run.json") == SUMMARY
    with pytest.raises(UserError, match=r"run\.json has schema 9"):
        parse_record(json.dumps({**data, "schema": 9}).encode(), "run.json")
    with pytest.raises(UserError, match=r"run\.json is a damaged run: RunSummary"):
        parse_record(json.dumps({**data, "device": "tpu"}).encode(), "run.json")


def test_the_figures_of_a_step() -> None:
    assert figures(STEP) == (
        "loss 1.2500, lr 1.00e-04, 8.00 samples/s, 2,000 tokens/s, memory 2.00 GiB / predicted 3.00 GiB / allowed 4.00 GiB, "
        "data wait 5 %, busy 97 %"
    )
    assert figures(replace(STEP, loss=None, activity=None, measured_peak_bytes=None)).startswith("no label, lr")


def screen(terminal: bool, width: int = 120) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system=None, width=width, highlight=False, _environ={})
    return Screen(console), out


def told(shown: Screen) -> None:
    shown.note("a [bold]note[/bold]")
    shown.begin("tune", 4, 0)
    shown.step(replace(STEP, step=0, recoveries=(replace(FAILED, step=0),)))
    shown.step(replace(STEP, step=1, skipped=("a.jsonl:3",)))
    shown.step(replace(STEP, recoveries=(FAILED,)))
    shown.evaluation(HELD)
    shown.end()
    shown.end()


def test_without_a_terminal_there_are_lines() -> None:
    shown, out = screen(terminal=False)
    told(shown)
    lines = out.getvalue().splitlines()
    assert lines[0] == "a [bold]note[/bold]"
    assert lines[1].startswith("tune: the dry run: memory ran out")
    assert lines[2] == "tune: dry run of the largest samples: memory 2.00 GiB / predicted 3.00 GiB / allowed 4.00 GiB"
    assert lines[3] == "tune: step 1: left out, as it does not fit: a.jsonl:3"
    assert lines[4] == f"tune 1/4: {figures(STEP)}"
    assert lines[5].startswith("tune: step 12: memory ran out")
    assert lines[7] == "tune: loss 1.5000 on held-out data after step 2 (800 label tokens)"
    assert "\x1b" not in out.getvalue()


def test_of_many_steps_a_hundred_get_a_line() -> None:
    shown, out = screen(terminal=False)
    for step in range(1, 2501):
        shown.step(replace(STEP, step=step, steps=2500))
    assert 100 <= len(out.getvalue().splitlines()) <= 102


def test_in_a_terminal_there_is_a_bar_with_the_last_figures() -> None:
    shown, out = screen(terminal=True)
    told(shown)
    text = out.getvalue()
    assert "2/4" in text
    assert "━" in text
    assert "loss 1.2500, lr 1.00e-04" in text
    assert "step 12: memory ran out" in text


def test_in_a_terminal_all_is_wrapped_between_words() -> None:
    shown, out = screen(terminal=True, width=80)
    told(shown)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", out.getvalue().replace("\r", "\n")).splitlines()
    assert max(map(len, lines)) <= 80
    found = [line.strip() for line in lines]
    assert "memory 2.00 GiB / predicted 3.00 GiB / allowed 4.00 GiB, data wait 5 %," in found
    assert "busy 97 %" in found
    assert "layers.3: CPU out of memory." in " ".join(" ".join(found).split())


def drawn(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int64)


def test_curves_show_what_the_log_has(tmp_path: Path) -> None:
    steps = [replace(STEP, step=number, loss=3.0 / number) for number in range(1, 5)]
    first, second = draw([*steps, HELD], "demo", tmp_path)
    assert (first.name, second.name) == ("loss.png", "memory.png")
    loss, memory = drawn(first), drawn(second)
    assert loss.shape == (540, 960, 3)
    (tmp_path / "other").mkdir()
    again, with_recovery = draw([*steps[:3], replace(steps[3], recoveries=(FAILED,)), HELD], "demo", tmp_path / "other")
    assert (drawn(again) == loss).all(), "the loss is the same"
    red = np.array([0xD6, 0x27, 0x28])
    marks = [(np.abs(picture - red).sum(axis=2) < 60).sum() for picture in (drawn(with_recovery), memory)]
    assert marks[0] > marks[1] > 0, "the limit is drawn, and where a step was redone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "memory.png", "other"]


def test_nothing_is_drawn_of_nothing_and_a_far_limit_is_left_out(tmp_path: Path) -> None:
    assert draw([replace(STEP, step=0), HELD], "demo", tmp_path) == []
    far = [replace(STEP, step=number, limit_bytes=1 << 40, predicted_peak_bytes=2 * MIB) for number in (1, 2)]
    _, memory = draw(far, "日本 $x$", tmp_path)
    assert not (np.abs(drawn(memory) - np.array([0xD6, 0x27, 0x28])).sum(axis=2) < 60).any()
