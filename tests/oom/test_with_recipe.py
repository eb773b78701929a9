"""`oomph explain` with a recipe or a script, from the command line to the screen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len

from oomph import cli
from oomph.diagnosis_records import Cure, Diagnosis, OomMessage
from oomph.records import FailingRequest
from oomph.report.diagnosis import render
from oomph.units import GIB

# Reported as PKU-YuanGroup/MoE-LLaVA#72, at second hand: 6.56 GiB asked for, 33.67 GiB in use, 3.18 GiB free.
MESSAGE = (
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.56 GiB (GPU 0; 39.39 GiB total capacity; "
    "33.67 GiB already allocated; 3.18 GiB free; 35.03 GiB reserved in total by PyTorch)\n"
)
SCRIPT = """\
deepspeed moellava/train/train_mem.py --deepspeed ./scripts/zero2.json --model_name_or_path microsoft/phi-2 \\
    --image_tower openai/clip-vit-large-patch14-336 --image_projector_type mlp2x_gelu --mm_vision_select_layer -2 \\
    --bf16 True --per_device_train_batch_size 8 --per_device_eval_batch_size 4 --gradient_accumulation_steps 2 \\
    --learning_rate 2e-5 --model_max_length 2048 --gradient_checkpointing True
"""


@pytest.fixture
def message(tmp_path: Path) -> Path:
    path = tmp_path / "crash.txt"
    path.write_text(MESSAGE)
    return path


@pytest.mark.slow
def test_the_crash_is_explained_from_its_message_and_its_script(
    message: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The ladder of this stage, which takes a minute, has a test of its own; what is valued beside it is here.
    monkeypatch.setattr("oomph.core.curing.searched", lambda _: SimpleNamespace(ladder=(), nearest=None, suggestions=()))
    script = tmp_path / "finetune.sh"
    script.write_text(SCRIPT)
    assert cli.run(["explain", str(message), "--script", str(script), "--json"]) == 0
    found = Diagnosis.from_json(json.loads(capsys.readouterr().out))
    event = found.event
    assert event is not None
    assert (event.bytes, event.shape, event.dtype) == (7_045_252_096, (8, 32, 2623, 2623), "float32")
    assert (event.phase, event.module) == ("backward", "model.language_model.layers.31.self_attn")
    assert "softmax_backward" in event.op
    assert event.in_use_bytes == pytest.approx(33.67 * GIB, rel=0.03)
    assert "2,622 or 2,623 tokens" in found.why_now[0]
    by_change = {cure.change: cure for cure in found.cures}
    lean, own = by_change["attention efficient"], next(cure for cure in found.cures if cure.asked)
    assert (own.choice.micro_batch, own.choice.accumulation) == (4, 4)  # type: ignore[union-attr]
    for cure, gib in ((lean, 25.8), (by_change["attention efficient, loss chunked"], 17.4), (own, 25.5)):
        assert cure.fits
        assert cure.allocated_peak_bytes == pytest.approx(gib * GIB, rel=0.05)
    assert (lean.samples_per_second or 0) > (own.samples_per_second or 0)
    (cut,) = [cure for cure in found.cures if "image_tokens_count" in cure.change]
    assert (cut.exact, cut.fits) == (False, True)
    assert cut.allocated_peak_bytes == pytest.approx(29.5 * GIB, rel=0.05)
    assert all(cell_len(line) <= 80 for line in render(found).splitlines())


def answer() -> Diagnosis:
    """A diagnosis with a recipe."""
    event = FailingRequest(
        7 * GIB, (8, 32, 2623, 2623), "float32", "aten._softmax_backward_data.default:tmp", "model.layers.31.self_attn",
        "backward", "scores", in_use_bytes=34 * GIB, reserved_bytes=36 * GIB,
    )  # fmt: skip
    said = OomMessage("cuda allocator", "text", 1, requested_bytes=7 * GIB, allocated_bytes=33 * GIB, reserved_bytes=35 * GIB)
    cures = (
        Cure("attention sdpa", "no scores; the same gradient", True, 7 * GIB, 25 * GIB, 26 * GIB, 25.2, True),
        Cure("micro-batch 4 and accumulation 4", "the same gradient", True, None, 39 * GIB, 40 * GIB, 8.0, False, asked=True),
    )
    alive = {"scores": 20 * GIB, "weight": 14 * GIB}
    why = ("Only a micro-batch of 8 whose longest sample has 2,623 tokens makes this request.", "It comes in all of them.")
    return Diagnosis("crash.txt", (said,), 0, (), (), event, alive, why, cures, ("one note",), "finetune.sh, stage finetune")


def test_the_screen_has_what_the_recipe_adds() -> None:
    text = render(answer())
    lines = text.splitlines()
    assert all(cell_len(line) <= 80 for line in lines)
    flat = " ".join(text.split())
    for part in (
        "in finetune.sh, stage finetune",
        "fp32 [8, 32, 2623, 2623], softmax backward, temporary in model.layers.31.self_attn",
        "34.00 GiB predicted, 33.00 GiB reported",
        "36.00 GiB reserved by the allocator, 35.00 GiB by the message",
        "20.00 GiB 59 %",
        "why now Only a micro-batch of 8",
        "fits, allocated 25.00 GiB, reserved 26.00 GiB, 25.2 samples/s",
        "micro-batch 4 and accumulation 4 (your own: half the batch)",
        "does not fit, allocated 39.00 GiB",
    ):
        assert part in flat
    assert "--recipe RECIPE each of these" not in flat


def test_without_a_match_the_reason_is_there() -> None:
    found = replace(answer(), event=None, alive={}, why_now=("No request of stage finetune matches.",))
    text = render(found)
    assert "No request of stage finetune matches." in text
    assert "what else was alive" not in text


def test_names_from_a_script_cannot_steer_the_terminal() -> None:
    found = replace(answer(), recipe="\x1b[31mx.sh", why_now=("\x1b[2J",))
    assert "\x1b" not in render(found)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "T4"], "go with --recipe or --script"),
        (["micro_batch=4"], "go with --recipe or --script"),
        (["--recipe", "nobody"], "there is no recipe 'nobody'"),
        (["--recipe", "moe-llava/phi2-clip336", "--stage", "tune"], "there is no stage 'tune'"),
        (["--recipe", "moe-llava/phi2-clip336", "--gpu", "T5"], "T5"),
        (["--recipe", "moe-llava/phi2-clip336", "--script", "x.sh"], "two descriptions of one run"),
        (["--script", "nowhere.sh"], "nowhere.sh cannot be read"),
        (["--script", "nowhere.sh", "--gpus", "0"], "--gpus must be a whole number from 1"),
    ],
)
def test_what_cannot_be_is_refused(message: Path, capsys: Any, arguments: list[str], sentence: str) -> None:
    assert cli.run(["explain", str(message), *arguments]) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert not shown.out
