"""Whole runs on the CPU: stages one after the other, memory as predicted, recovery that changes nothing but the split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from oomph.errors import RunError, UserError
from oomph.recipe import Recipe, load
from oomph.records import Plan
from oomph.report.curves import draw
from oomph.report.reading import read_record
from oomph.run_records import EvaluationRecord, RunSummary, StepRecord


def test_stages_run_one_after_the_other(image_recipe: Callable[..., Recipe], run: Any) -> None:
    recipe = image_recipe(run={"evaluate_every": 2, "save_every": 2})
    made = run(recipe)
    align, tune = made.summary.stages
    assert (align.steps, tune.steps) == (3, 4)
    assert (align.samples, tune.samples) == (12, 24)
    assert tune.last_loss < align.first_loss
    assert [line.step for line in align.evaluations] == [2, 3]
    assert [line.step for line in tune.evaluations] == [2, 4]
    assert tune.evaluations[0].samples == 12
    assert align.trained == ("projector trains at 0.001: 272 parameters in 2 tensors",)
    assert "2 GPUs" in made.summary.notes[0]
    for record in made.told.steps:
        assert record.prediction_error_bytes == 0, record
    final = AutoModelForImageTextToText.from_pretrained(made.folder / "final")
    assert final.config.text_config.vocab_size == 320
    saved = dict(final.named_parameters())
    for name, tensor in made.weights("tune").items():
        if name in saved:
            assert (saved[name] == tensor).all(), name


def test_the_folder_says_what_was_asked_planned_and_done(text_recipe: Callable[..., Recipe], run: Any, tmp_path: Path) -> None:
    recipe = text_recipe(stage={"steps": 3, "memory": {"checkpointing": "none"}, "max_grad_norm": "none"})
    made = run(recipe)
    assert load(made.folder / "recipe.yaml") == recipe
    assert load(made.folder / "recipe.yaml").stages[0].memory.model_fields_set == {"checkpointing"}
    plan = read_record(str(made.folder / "plan.json"))
    assert isinstance(plan, Plan)
    assert plan.fits
    assert plan.stages[0].choice == made.steps[0].choice
    environment = json.loads((made.folder / "environment.json").read_text())
    assert environment["device"] == "cpu"
    assert read_record(str(made.folder / "run.json")) == made.summary
    assert RunSummary.from_json(made.summary.to_json()) == made.summary
    assert [StepRecord.from_json(json.loads(json.dumps(line.to_json()))) for line in made.steps] == made.steps
    assert all(record.grad_norm is None for record in made.steps)
    assert [line.step for line in made.log] == [0, 1, 2, 3]
    pictures = draw(made.log, "a $ run", tmp_path)
    assert [picture.read_bytes()[:4] for picture in pictures] == [b"\x89PNG"] * 2


def test_learning_rates_follow_the_schedule_and_the_rules(text_recipe: Callable[..., Recipe], run: Any) -> None:
    made = run(text_recipe(stage={"schedule": "linear", "warmup": 0.3}))
    rates = [record.learning_rates["language"] / 2.0e-3 for record in made.steps]
    assert rates == pytest.approx([0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4])
    assert all(r.learning_rates["head"] == pytest.approx(r.learning_rates["language"] / 2) for r in made.steps)


def test_under_a_limit_steps_are_cut_and_give_the_same(
    text_recipe: Callable[..., Recipe], run: Any, alike: Any, smallest: int
) -> None:
    whole = run(text_recipe(), "whole")
    assert all(len(record.split) == 1 for record in whole.steps)
    limit = smallest + (max(record.measured_peak_bytes for record in whole.steps) - smallest) // 2
    cut = run(text_recipe(), "cut", limit=limit)
    assert any(len(record.split) > 1 for record in cut.steps)
    assert {len(record.split) for record in cut.steps} != {4}
    for record in cut.steps:
        assert record.measured_peak_bytes <= record.limit_bytes == limit
        assert record.prediction_error_bytes == 0
        assert not record.recoveries
    alike(whole, cut)


def test_a_pinned_micro_batch_that_does_not_fit_is_recovered_from(
    text_recipe: Callable[..., Recipe], run: Any, alike: Any, smallest: int
) -> None:
    whole = run(text_recipe(), "whole")
    recipe = text_recipe(memory={"micro_batch": 4}, run={"grow_after": 2})
    redone = run(recipe, "redone", limit=smallest + 100_000)
    found = [recovery for record in redone.told.steps for recovery in record.recoveries]
    assert found
    assert redone.told.steps[0].recoveries, "the dry run has the largest samples"
    assert found[0].kind == "allocator"
    assert found[0].predicted_bytes > smallest + 100_000
    assert [position for piece in found[0].to_split for position in piece] != []
    assert redone.summary.stages[0].recoveries == tuple(found)
    alike(whole, redone)


def test_a_single_sample_too_large_changes_the_rung(text_recipe: Callable[..., Recipe], run: Any, alike: Any) -> None:
    alone = {"effective_batch": 1, "epochs": 1}
    whole = run(text_recipe(stage=alone), "whole")
    lean = run(text_recipe(stage={**alone, "steps": 1}, memory={"checkpointing": "blocks", "loss": "chunked"}), "lean")
    needed, wanted = (max(record.measured_peak_bytes for record in made.told.steps) for made in (lean, whole))
    assert needed < wanted
    squeezed = run(text_recipe(stage=alone), "squeezed", limit=(needed + wanted) // 2)
    taken = {(record.choice.checkpointing, record.choice.loss) for record in squeezed.steps}
    assert taken > {("none", "full")}
    assert not any(record.recoveries for record in squeezed.steps)
    alike(whole, squeezed)


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_sample_that_fits_nowhere_is_named(text_recipe: Callable[..., Recipe], run: Any, policy: str, smallest: int) -> None:
    pinned = {"checkpointing": "none", "loss": "full"}
    recipe = text_recipe(memory=pinned, run={"too_large": policy}, stage={"steps": 3, "effective_batch": 12})
    limit = smallest - 20_000
    if policy == "fail":
        with pytest.raises(RunError, match=r"told\.jsonl:5 does not fit by itself: its \d+ tokens and 0 images take") as raised:
            run(recipe, limit=limit)
        assert "run.too_large=skip" in raised.value.hint
        return
    made = run(recipe, limit=limit)
    (stage,) = made.summary.stages
    assert {name.rpartition(":")[2] for name in stage.skipped} == {"5"}
    assert stage.steps == 2
    assert all(record.label_tokens for record in made.steps)


def test_nothing_to_learn_is_an_error_before_anything_runs(image_recipe: Callable[..., Recipe], run: Any, parts: Path) -> None:
    recipe = image_recipe()
    align = recipe.stages[0].model_copy(update={"data": recipe.stages[1].data})
    with pytest.raises(UserError, match=r"stage align trains projector alone, which learns nothing .* there are 12"):
        run(recipe.model_copy(update={"stages": (align,)}))


def test_evaluations_do_not_change_what_is_trained(text_recipe: Callable[..., Recipe], run: Any, parts: Path) -> None:
    held = {"evaluation": [{"path": str(parts / "held.jsonl")}]}
    plain, watched = run(text_recipe(), "plain"), run(text_recipe(data=held, run={"evaluate_every": 1}), "watched")
    assert plain.losses == watched.losses
    found = [line for line in watched.log if isinstance(line, EvaluationRecord)]
    assert [line.step for line in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1].loss < found[0].loss
    assert found == list(watched.summary.stages[0].evaluations)


def test_the_evaluated_loss_is_that_of_a_forward(text_recipe: Callable[..., Recipe], run: Any, parts: Path) -> None:
    told = {"evaluation": [{"path": str(parts / "told.jsonl")}]}
    recipe = text_recipe(data=told, stage={"effective_batch": 12, "warmup": 0.5, "epochs": 2})
    made = run(recipe.model_copy(update={"run": recipe.run.model_copy(update={"evaluate_every": 1})}))
    evaluated = [line.loss for line in made.log if isinstance(line, EvaluationRecord)]
    assert made.steps[0].learning_rates["language"] == 0
    assert evaluated[0] == pytest.approx(made.steps[0].loss, rel=1e-6)


def test_tools_that_are_asked_for_get_the_numbers(
    text_recipe: Callable[..., Recipe], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Tool:
        def init(self, **settings: Any) -> None:
            calls.append(settings["name"])

        def log(self, numbers: dict[str, float], step: int) -> None:
            calls.append((step, numbers["tune/loss"]))

        def finish(self) -> None:
            calls.append("finished")

    monkeypatch.setitem(__import__("sys").modules, "trackio", Tool())
    made = run(text_recipe(run={"log_to": ["trackio"]}, stage={"steps": 2}), "told")
    assert calls == ["told", (1, made.losses[0]), (2, made.losses[1]), "finished"]


def test_a_tool_that_is_not_installed_is_told_before_training(
    text_recipe: Callable[..., Recipe], run: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"run\.log_to names wandb, which is not installed"):
        run(text_recipe(run={"log_to": ["wandb"]}))
    assert not (tmp_path / "run" / "recipe.yaml").exists()
