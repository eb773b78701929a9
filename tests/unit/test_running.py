"""Where a run runs, and what it is planned with there; what is asked of its forms at every step. With forms by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from oomph.core.admission import TooLargeError
from oomph.core.admitting import Forms, admission
from oomph.core.closed_form import LEAST_ROWS
from oomph.core.devices import find_gpu, outside
from oomph.core.events import Events, Kind, Segment
from oomph.core.footprint import live_footprint
from oomph.core.layout import Shape
from oomph.core.live_plan import live_prediction
from oomph.core.measuring import INTERPRETER, Machine
from oomph.core.running import Planned, keep_states, plan_run, prepare_ground
from oomph.errors import UserError
from oomph.live.data.encoding import Cost
from oomph.recipe import Recipe
from oomph.records import Choice
from oomph.units import GIB, MIB

CARD = "NVIDIA A100-SXM4-40GB"
DATE = "2026-01-02T03:04:05"


def machine(device: Any, free: int) -> Machine:
    if device == "cpu":
        return Machine("cpu", "EPYC", "", "", free, free, (), 2, {"torch": "2.13.0"}, DATE)
    return Machine("cuda", CARD, "580.1", "13.0", free, free, (8, 0), 108, {"torch": "2.13.0"}, DATE)


def recipe(gpu: str = "A100-SXM4-40GB", gpus: int = 1, **memory: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "model": "llama-3.1-8b",
            "data": {"max_tokens": 512},
            "hardware": {"gpu": gpu, "gpus": gpus},
            "memory": memory,
            "stages": [{"name": "tune", "train": {"language": 1e-4, "head": 1e-4}, "effective_batch": 8}],
        }
    )


def cost(tokens: int) -> Cost:
    return Cost(tokens, 0, tokens, 0, 0, 1)


@pytest.fixture
def source(by_hand: Any) -> Any:
    return by_hand()


def planned(source: Any, asked: Recipe, at: Machine, limit: int | None = None) -> Planned:
    _, (stage,) = plan_run(prepare_ground(asked, at, limit), source)
    return stage


def test_on_the_cpu_time_is_scarcer_than_memory(source: Any) -> None:
    stage = planned(source, recipe(), machine("cpu", 64 * GIB))
    choice = stage.choice
    assert (choice.precision, choice.checkpointing, choice.loss, choice.attention) == ("float32", "none", "full", "sdpa")
    assert choice.micro_batch == 8
    assert stage.limit_bytes == 64 * GIB - INTERPRETER
    assert (stage.margin_bytes, stage.granularity, stage.pinned) == (0, 1, None)
    assert [(rung.checkpointing, rung.loss) for rung in stage.rungs] == [("blocks", "full"), ("blocks", "chunked")]
    assert {key.capability for key in source.made} == {()}
    assert stage.plan.reasons["loss"].startswith("on the CPU")
    assert stage.plan.speed is None


def test_on_the_cpu_pins_stay_but_for_cudas_kernels(source: Any) -> None:
    pins = {"checkpointing": "every-2", "loss": "chunked", "precision": "bfloat16", "attention": "flash", "micro_batch": 2}
    stage = planned(source, recipe(**pins), machine("cpu", 64 * GIB))
    assert {knob: getattr(stage.choice, knob) for knob in pins} == {**pins, "attention": "sdpa"}
    assert stage.pinned == 2
    assert {(rung.checkpointing, rung.loss) for rung in stage.rungs} == {("every-2", "chunked")}
    assert stage.plan.reasons["loss"].startswith("pinned by")


def test_on_the_cpu_the_plan_is_within_the_limit(source: Any) -> None:
    whole = planned(source, recipe(), machine("cpu", 64 * GIB)).plan.prediction
    limit = whole.allocated_peak_bytes * 2 // 3
    stage = planned(source, recipe(), machine("cpu", 64 * GIB), limit)
    assert stage.limit_bytes == limit
    assert 1 <= stage.choice.micro_batch < 8
    assert stage.plan.prediction.fits
    assert stage.plan.prediction.allocated_peak_bytes <= limit
    small = planned(source, recipe(micro_batch=8), machine("cpu", 64 * GIB), limit).plan.prediction
    assert not small.fits
    assert small.failing_request is not None
    assert small.failing_request.in_use_bytes <= limit < small.failing_request.in_use_bytes + small.failing_request.bytes


def test_on_a_card_the_fastest_rung_runs_with_the_allocators_margin(source: Any) -> None:
    total = find_gpu("A100-SXM4-40GB").memory_bytes
    stage = planned(source, recipe(), machine("cuda", total))
    assert stage.choice == stage.plan.ladder[0].choice
    predicted = stage.plan.prediction
    assert stage.margin_bytes == predicted.reserved_peak_bytes - predicted.allocated_peak_bytes > 0
    assert stage.limit_bytes == predicted.usable_bytes
    assert stage.granularity == 512
    assert {key.capability for key in source.made} == {(8, 0)}


def test_a_limit_makes_the_card_smaller(source: Any) -> None:
    gpu = find_gpu("A100-SXM4-40GB")
    ground = prepare_ground(recipe(), machine("cuda", gpu.memory_bytes), 300 * MIB)
    assert ground.gpu.memory_bytes == 300 * MIB + outside(gpu, 1).bytes
    _, (stage,) = plan_run(ground, source)
    assert stage.limit_bytes == 300 * MIB
    larger = prepare_ground(recipe(), machine("cuda", gpu.memory_bytes), 1 << 50)
    assert larger.gpu.memory_bytes == gpu.memory_bytes


def test_what_is_otherwise_than_the_recipe_has_it_is_said(source: Any) -> None:
    asked = recipe("T4", 4, sharding="zero1")
    ground = prepare_ground(asked, machine("cuda", 40 * GIB), None)
    assert ["the recipe names T4" in ground.notes[0], "4 GPUs" in ground.notes[1]] == [True, True]
    _, (stage,) = plan_run(ground, source)
    assert (stage.choice.gpus, stage.choice.sharding, stage.choice.effective_batch) == (1, "none", 8)
    assert prepare_ground(recipe(), machine("cpu", GIB), None).notes == ()
    with pytest.raises(UserError, match="adamw-8bit runs on a GPU alone"):
        prepare_ground(recipe(optimizer="adamw-8bit"), machine("cpu", GIB), None)


def test_a_resumed_stage_keeps_the_kinds_of_its_tensors() -> None:
    before = Choice(1, 1, 1, precision="bfloat16-mixed", optimizer="adamw-loop", master_weights=False)
    kept = keep_states(recipe(), "tune", before).stages[0].memory
    assert (kept.precision, kept.optimizer, kept.master_weights) == ("bfloat16-mixed", "adamw-loop", False)
    assert keep_states(recipe(optimizer="adamw-fused"), "tune", before).stages[0].memory.optimizer == "adamw-fused"
    for pins, problem in (
        ({"precision": "float32"}, "memory.precision is float32, and the checkpoint was made with bfloat16-mixed"),
        ({"optimizer": "adamw-8bit"}, "memory.optimizer is adamw-8bit, and the checkpoint was made with adamw-loop"),
        ({"master_weights": True}, "memory.master_weights is true, and the checkpoint was made with false"),
    ):
        with pytest.raises(UserError) as raised:
            keep_states(recipe(**pins), "tune", before)
        assert raised.value.problems == [problem]


# Live storages.


def test_the_peak_of_live_storages_is_told_by_what_is_alive_then() -> None:
    kinds = [Kind("load", "m", "load", "weight", "float32"), Kind("aten.mm.default", "n", "forward", "activation", "float32")]
    events = Events()
    for number, nbytes in enumerate((100, 40, 70, 50)):
        events.add(nbytes, (nbytes,), kinds[number > 0])
    events.segments = [Segment("load", [0]), Segment("step", [1, ~1, 2, 3, ~3, ~2], ((0, "forward"),))]
    found = live_prediction(events, 1000)
    assert found.allocated_peak_bytes == live_footprint(events).allocated_peak_bytes == 220
    assert (found.by_role, found.by_module) == ({"activation": 120, "weight": 100}, {"n": 120, "m": 100})
    assert found.fits
    assert [request.bytes for request in found.largest_requests] == [100, 70, 50]
    tight = live_prediction(events, 219)
    assert not tight.fits
    assert tight.failing_request is not None
    assert (tight.failing_request.bytes, tight.failing_request.in_use_bytes) == (50, 170)
    assert sum(tight.by_role.values()) == 170
    assert not live_prediction(events, 99).fits
    assert live_prediction(events, 220).fits


# What is asked at every step.


def forms(source: Any, **memory: Any) -> tuple[Planned, Forms]:
    stage = planned(source, recipe(**memory), machine("cpu", 64 * GIB))
    return stage, Forms(stage.model, stage.choice, 1)


def test_a_pinned_micro_batch_is_never_exceeded_and_never_doubted(source: Any) -> None:
    stage, found = forms(source, micro_batch=3)
    small = stage._replace(limit_bytes=found.peak(Shape(1, 600, 0)))
    cut = admission(small, stage.choice, found, 50).split([cost(500)] * 8)
    assert sorted(map(len, cut.micro_batches)) == [2, 3, 3]
    assert max(cut.peak_bytes) > small.limit_bytes
    free = small._replace(pinned=None)
    assert max(admission(free, stage.choice, found, 50).split([cost(500)] * 8).peak_bytes) <= small.limit_bytes
    with pytest.raises(TooLargeError):
        admission(free, stage.choice, found, 50).split([cost(5000)])


def test_the_margin_is_not_given_away(source: Any) -> None:
    stage, found = forms(source)
    needed = found.peak_of_first(Shape(2, 500, 0))
    roomy = stage._replace(limit_bytes=needed + 10, margin_bytes=10)
    tight = roomy._replace(margin_bytes=11)
    assert admission(roomy, stage.choice, found, 50).limit_bytes == needed
    assert len(admission(roomy, stage.choice, found, 50).split([cost(500)] * 2).micro_batches) == 1
    assert len(admission(tight, stage.choice, found, 50).split([cost(500)] * 2).micro_batches) == 2


def test_short_micro_batches_of_a_chunked_loss_are_asked_about_with_enough_rows(source: Any) -> None:
    _, found = forms(source, loss="chunked")
    assert found.peak(Shape(2, 5, 0)) == found.peak(Shape(2, LEAST_ROWS // 2, 0)) < found.peak(Shape(2, LEAST_ROWS, 0))
    found.seconds(Shape(1, 1, 0))
    found.evaluation_peak(Shape(1, 1, 0))
    assert all(key.shape is None for key in source.made)


def test_sizes_that_are_no_formulas_are_bounded_by_few_traces(by_hand: Any) -> None:
    source = by_hand(closed=False)
    _, found = forms(source, micro_batch=2)
    before = len(source.made)
    peaks = [found.peak(Shape(samples, tokens, 0)) for samples in (3, 4) for tokens in (10, 99, 512)]
    assert len(set(peaks)) == 1
    assert {key.shape for key in list(source.made)[before:] if key.shape} == {(4, 512, 0)}


def test_forms_of_all_that_may_come_are_made_at_once(source: Any) -> None:
    stage, found = forms(source)
    source.prepared.clear()
    found.prepare([cost(10), replace_images(1)], stage.choice.effective_batch)
    families = {(key.one_sample, key.images) for key in source.prepared}
    assert families == {(True, 0), (True, 1), (False, 0), (False, 1), (False, 2)}
    source.prepared.clear()
    found.prepare([replace_images(1)], 8)
    assert {(key.one_sample, key.images) for key in source.prepared} == {(True, 1), (False, 2)}
    source.prepared.clear()
    found.prepare([cost(10)], 1)
    assert {(key.one_sample, key.images) for key in source.prepared} == {(True, 0)}


def replace_images(images: int) -> Cost:
    return cost(50)._replace(images=images)


def test_an_evaluation_takes_less_than_a_step(source: Any) -> None:
    stage, found = forms(source)
    shape = Shape(4, 500, 0)
    assert found.evaluation_peak(shape) < found.peak(shape)
    laid = stage.model.lay_out(replace(stage.choice, micro_batch=4, accumulation=2, eval_batch=4))
    peaks = {phase.phase: phase.allocated_peak_bytes for phase in live_footprint(laid.events).phases}
    assert found.evaluation_peak(Shape(4, stage.model.tokens, 0)) == peaks["evaluate"]
