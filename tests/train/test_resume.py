"""A run that was interrupted, killed or out of disk goes on as if it had not been; one that is another's is left alone."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from oomph.errors import RunError, UserError
from oomph.live import run_stage
from oomph.live.run_folder import RunFolder, read_log
from oomph.live.trainer import Interrupted
from oomph.recipe import Recipe

SAVING = {"save_every": 2, "evaluate_every": 3}


class Killed(Exception):
    """Stands for the end of the process: nothing is saved."""


@pytest.fixture
def recipe(text_recipe: Callable[..., Recipe], parts: Path) -> Recipe:
    """Six steps, a checkpoint after every second, an evaluation after every third."""
    return text_recipe(run=SAVING, data={"evaluation": [{"path": str(parts / "held.jsonl")}]})


def ends_after(step: int) -> Callable[[Any], None]:
    """Kills the process in a way after a step."""

    def after(record: Any) -> None:
        if record.step == step:
            raise Killed

    return after


def interrupts_after(step: int) -> Callable[[Any], None]:
    def after(record: Any) -> None:
        if record.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return after


def same(one: Any, other: Any) -> None:
    """To the last bit, and told once."""
    assert one.losses == other.losses
    assert [(line.kind, line.step) for line in one.log] == [(line.kind, line.step) for line in other.log]
    ours, theirs = one.weights(), other.weights()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [line.loss for line in one.log] == [line.loss for line in other.log]


def test_an_interrupted_run_goes_on_to_the_last_bit(recipe: Recipe, run: Any, Listener: Any, tmp_path: Path) -> None:
    whole = run(recipe, "whole")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as raised:
        run(recipe, "parts", Listener(interrupts_after(3)))
    assert signal.getsignal(signal.SIGINT) is before
    assert raised.value.folder == tmp_path / "parts"
    assert [line.step for line in read_log(tmp_path / "parts") if line.kind == "step"] == [0, 1, 2, 3]
    told = Listener(interrupts_after(4))
    with pytest.raises(KeyboardInterrupt):
        run(recipe, "parts", told, resume=True)
    assert "tune: goes on after step 3 of 6" in told.notes
    same(whole, run(recipe, "parts", resume=True))


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    recipe: Recipe, run: Any, Listener: Any, tmp_path: Path, step: int
) -> None:
    with pytest.raises(Killed):
        run(recipe, "parts", Listener(ends_after(step)))
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write('{"kind": "step", "stage": "tu')
    again = run(recipe, "parts", resume=True)
    same(run(recipe, "whole"), again)


def test_random_numbers_go_on_too(text_recipe: Callable[..., Recipe], parts: Path, run: Any, Listener: Any) -> None:
    recipe = text_recipe(model=str(parts / "dropping"), run=SAVING)
    with pytest.raises(Killed):
        run(recipe, "parts", Listener(ends_after(5)))
    whole, again = run(recipe, "whole"), run(recipe, "parts", resume=True)
    assert any("not exact: dropout" in note for note in whole.told.notes)
    assert whole.summary.stages[0].inexact
    same(whole, again)


def test_it_may_go_on_otherwise_cut_and_otherwise_loaded(
    text_recipe: Callable[..., Recipe], run: Any, Listener: Any, alike: Any
) -> None:
    with pytest.raises(Killed):
        run(text_recipe(run=SAVING), "parts", Listener(ends_after(5)))
    other = text_recipe(run={"save_every": 3, "workers": 0}, memory={"micro_batch": 1}, hardware={"gpu": "L4"})
    again = run(other, "parts", resume=True)
    alike(run(text_recipe(), "whole"), again)
    assert [len(record.split) for record in again.steps] == [1, 1, 1, 1, 4, 4]
    told = {"memory.micro_batch was auto and is 1: taken over", "run.workers was auto and is 0: taken over"}
    assert told <= set(again.told.notes)


def test_a_damaged_checkpoint_is_passed_over(recipe: Recipe, run: Any, Listener: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(recipe, "parts", Listener(ends_after(5)))
    newest = tmp_path / "parts" / "tune" / "checkpoints" / "step-00000004"
    (newest / "optimizer.safetensors").write_bytes(b"nothing")
    told = Listener()
    again = run(recipe, "parts", told, resume=True)
    assert "tune: goes on after step 2 of 6" in told.notes
    assert any("step-00000004 is not used: optimizer.safetensors" in note for note in told.notes)
    same(run(recipe, "whole"), again)


def test_a_full_disk_leaves_the_checkpoint_before(
    recipe: Recipe, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = run_stage.save_state, list[Path]()

    def full(folder: Path, *rest: Any) -> None:
        calls.append(folder)
        original(folder, *rest)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_stage, "save_state", full)
    with pytest.raises(RunError, match=r"the checkpoint of step 4 cannot be written to .*: No space left on device") as raised:
        run(recipe, "parts")
    assert "--resume" in raised.value.hint
    same(run(recipe, "whole"), run(recipe, "parts", resume=True))


def test_what_safetensors_says_of_a_disk_is_an_error_of_the_run(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from oomph.live.saving import disk_errors

    with pytest.raises(OSError, match="No such file"), disk_errors():
        save_file({"a": torch.zeros(1)}, tmp_path / "nowhere" / "a.safetensors")


def test_a_stage_whose_model_was_not_saved_is_not_trained_again(
    recipe: Recipe, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(run_stage, "save_model", dies)
        with pytest.raises(Killed):
            run(recipe, "parts")
    again = run(recipe, "parts", resume=True)
    assert not again.told.steps
    same(run(recipe, "whole"), again)


def test_a_run_that_is_done_stays_as_it_is(recipe: Recipe, run: Any, Listener: Any) -> None:
    done = run(recipe)
    again = run(recipe, resume=True)
    assert not again.told.steps
    assert again.summary.stages == done.summary.stages


def test_a_folder_with_a_run_is_not_written_over(recipe: Recipe, run: Any, tmp_path: Path) -> None:
    run(recipe)
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"run holds a run already") as raised:
        run(recipe)
    assert "--resume" in raised.value.hint
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(UserError, match="other is not empty, and holds no run"):
            run(recipe, "other", resume=resume)


def test_another_recipe_is_told_key_by_key(text_recipe: Callable[..., Recipe], recipe: Recipe, run: Any, Listener: Any) -> None:
    with pytest.raises(Killed):
        run(recipe, "parts", Listener(ends_after(5)))
    stage = {"train": {"language": 1.0e-3, "head": 1.0e-3}, "weight_decay": 0.1}
    changed = text_recipe(run={"seed": 7, "keep": 5}, stage=stage, data={"max_tokens": 128})
    with pytest.raises(UserError) as raised:
        run(changed, "parts", resume=True)
    told = [problem.partition("another recipe: ")[2] for problem in raised.value.problems]
    assert told == [
        "data.max_tokens was 256 and is 128",
        "run.seed was 0 and is 7",
        "stages.tune.train.language was 0.002 and is 0.001",
        "stages.tune.weight_decay was 0.0 and is 0.1",
    ]


def test_tensors_of_another_kind_are_told(recipe: Recipe, run: Any, Listener: Any) -> None:
    with pytest.raises(Killed):
        run(recipe, "parts", Listener(ends_after(5)))
    other = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"precision": "bfloat16"})})
    with pytest.raises(UserError, match=r"memory\.precision is bfloat16, and the checkpoint was made with float32"):
        run(other, "parts", resume=True)


def test_a_run_that_trained_nothing_is_none(text_recipe: Callable[..., Recipe], run: Any) -> None:
    recipe = text_recipe(memory={"checkpointing": "none", "loss": "full"})
    with pytest.raises(RunError, match="does not fit by itself"):
        run(recipe, limit=400_000)
    made = run(text_recipe(stage={"steps": 2}))
    assert [line.step for line in made.log] == [0, 1, 2]


def test_data_that_changed_since_is_named(recipe: Recipe, run: Any, Listener: Any, parts: Path, tmp_path: Path) -> None:
    data = tmp_path / "told.jsonl"
    shutil.copy(parts / "told.jsonl", data)
    files = recipe.data.files[0].model_copy(update={"path": str(data)})
    own = recipe.model_copy(update={"data": recipe.data.model_copy(update={"files": [files]})})
    with pytest.raises(Killed):
        run(own, "parts", Listener(ends_after(3)))
    data.write_text(data.read_text().replace("What is it?", "What is that?"), encoding="utf-8")
    with pytest.raises(UserError, match=r"the data file .*told\.jsonl has changed since the checkpoint"):
        run(own, "parts", resume=True)


def test_data_that_moved_is_the_same(recipe: Recipe, run: Any, Listener: Any, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(recipe, "parts", Listener(ends_after(3)))
    shutil.copy(parts / "told.jsonl", tmp_path / "moved.jsonl")
    files = recipe.data.files[0].model_copy(update={"path": str(tmp_path / "moved.jsonl")})
    moved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"files": [files]})})
    same(run(recipe, "whole"), run(moved, "parts", resume=True))


def test_two_runs_in_one_folder_refuse_each_other(recipe: Recipe, run: Any, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", recipe, resume=False, keep=2) as first:
        first.claim()
        with pytest.raises(UserError, match="another run is going on in"):
            run(recipe)
    assert run(recipe).summary.stages[0].steps == 6


@pytest.mark.parametrize(("path", "problem"), [("/dev/null", "is a file"), ("/proc/oomph", "cannot be written to")])
def test_a_folder_that_cannot_be_is_told(recipe: Recipe, run: Any, path: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        run(recipe, path)


def test_a_sample_that_breaks_later_loses_nothing(
    image_recipe: Callable[..., Recipe], run: Any, Listener: Any, parts: Path, tmp_path: Path
) -> None:
    shutil.copytree(parts / "pictures", tmp_path / "pictures")
    recipe = image_recipe(run={"workers": 0})
    file = recipe.data.files[0].model_copy(update={"images": str(tmp_path / "pictures")})
    data = recipe.data.model_copy(update={"files": [file], "evaluation": []})
    recipe = recipe.model_copy(update={"data": data, "stages": recipe.stages[:1]})

    def breaks(record: Any) -> None:
        if record.step == 1:
            for picture in (tmp_path / "pictures").iterdir():
                picture.write_bytes(picture.read_bytes()[:-40])

    with pytest.raises(UserError, match=r"seen\.jsonl:\d+ \(sample '\d+\.png'\): the image"):
        run(recipe, "parts", Listener(breaks))
    assert [path.name for path in (tmp_path / "parts" / "align" / "checkpoints").iterdir()] == ["step-00000001"]


def test_weights_that_are_missing_leave_no_run_behind(text_recipe: Callable[..., Recipe], run: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(text_recipe(weights="pretrained"))
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert run(text_recipe(stage={"steps": 1})).summary.stages[0].steps == 1


def test_a_model_without_a_tokenizer_is_told(text_recipe: Callable[..., Recipe], run: Any, parts: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(parts / "language" / "config.json", tmp_path / "bare")
    with pytest.raises(UserError, match="holds no tokenizer"):
        run(text_recipe(model=str(tmp_path / "bare")))


def test_adapters_go_on_too(text_recipe: Callable[..., Recipe], run: Any, Listener: Any) -> None:
    train = {"language": "frozen", "head": "frozen", "lora": 1.0e-2}
    recipe = text_recipe(run=SAVING, stage={"train": train, "lora": {"rank": 2}, "steps": 4})
    with pytest.raises(Killed):
        run(recipe, "parts", Listener(ends_after(3)))
    whole, again = run(recipe, "whole"), run(recipe, "parts", resume=True)
    same(whole, again)
    assert whole.losses[-1] < whole.losses[0]
    assert all(record.prediction_error_bytes == 0 for record in whole.told.steps)
    assert all("lora_" in name or "rotary" in name for name in whole.weights())
