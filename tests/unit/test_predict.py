"""The replay on a card: the peaks, the verdict, what fails, and where the memory is at the worst moment."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oomph.core.allocator import Allocator, AllocatorSettings, replay
from oomph.core.closed_form import ClosedForm
from oomph.core.devices import Gpu, find_gpu, outside
from oomph.core.events import Events, Kind, Segment
from oomph.core.layout import Shape, compose, lay_out
from oomph.core.predict import LARGEST, leaves_out, owner, predict, serve, usable_bytes
from oomph.records import Choice, Prediction, Request
from oomph.units import GIB, MIB

TOKENS = 1024


def card(usable: int, gpus: int = 1) -> Gpu:
    """An A100 of which the allocator can have so many bytes."""
    whole = find_gpu("A100-SXM4-40GB")
    return replace(whole, memory_bytes=usable + outside(whole, gpus).bytes)


def choice(micro_batch: int = 2, **more: Any) -> Choice:
    return Choice(micro_batch, 2, 2 * micro_batch, **more)


def laid(form: ClosedForm, wanted: Choice) -> Events:
    return lay_out(form, wanted, TOKENS, 1)


def predicted(form: ClosedForm, wanted: Choice, gpu: Gpu) -> Prediction:
    return predict(laid(form, wanted), wanted, gpu, form.unclassified)


def test_what_fits_says_where_its_peak_is(toy: ClosedForm) -> None:
    found = predicted(toy, choice(), card(GIB))
    assert found.fits
    assert found.failing_request is None
    assert (found.usable_bytes, found.outside_bytes) == (GIB, sum(found.outside.values()))
    assert set(found.outside) == {"context"}
    assert sum(found.by_role.values()) == sum(found.by_module.values()) == found.allocated_peak_bytes
    assert found.allocated_peak_bytes >= toy.live_peak((2, TOKENS, 2), accumulates=True)
    assert found.allocated_peak_bytes <= found.reserved_peak_bytes <= GIB
    assert list(found.by_role.values()) == sorted(found.by_role.values(), reverse=True)
    assert set(found.by_role) == {"weight", "optimizer", "gradient", "workspace", "activation", "scores", "logits", "input"}


def test_the_parts_of_the_peak_are_what_lives_then(toy: ClosedForm) -> None:
    """The peak is where the second micro-batch makes its logits' gradient: two logits, one scores, one hidden state."""
    found = predicted(toy, choice(), card(GIB))
    assert found.by_role["logits"] == 2 * 2 * TOKENS * 1024 * 4
    assert found.by_role["scores"] == 2 * 4 * TOKENS * TOKENS * 4
    assert found.by_role["optimizer"] == 2 * 1024 * 256 * 2
    assert found.by_role["workspace"] == 2 * 8_519_680
    assert found.by_module["head"] == found.by_role["logits"]
    assert found.by_module["layers.*.self_attn"] == found.by_role["scores"]
    assert found.by_module["layers.*.mlp"] == 4 * 1024 * 256 * 2
    assert "outside the model's modules" in found.by_module
    sizes = [request.bytes for request in found.largest_requests]
    assert sizes == sorted(sizes, reverse=True)
    made = ("float32", "aten.scores.default", "layers.0.self_attn", "forward", "scores")
    assert found.largest_requests[0] == Request(found.by_role["scores"], (2, 4, TOKENS, TOKENS), *made)


def test_phases_are_those_of_the_training(toy: ClosedForm) -> None:
    found = predicted(toy, choice(eval_batch=2), card(GIB))
    assert [phase.phase for phase in found.phases] == ["load", "forward", "backward", "optimizer"]
    assert max(phase.allocated_peak_bytes for phase in found.phases) == found.allocated_peak_bytes
    assert found.evaluation is not None
    assert found.evaluation.phase == "evaluate"
    assert found.evaluation.allocated_peak_bytes < found.allocated_peak_bytes
    assert predicted(toy, choice(), card(GIB)).evaluation is None


def test_an_evaluation_stands_on_what_training_has_left(toy: ClosedForm) -> None:
    """Weights, moments and workspaces, and the scores of one batch; then its logits."""
    evaluation = predicted(toy, choice(eval_batch=4), card(GIB)).evaluation
    resident = (256 * 256 + 1024 * 256) * 2 + 512 + 2 * 1024 * 256 * 2 + 2 * 8_519_680
    assert evaluation is not None
    assert evaluation.allocated_peak_bytes == resident + 4 * TOKENS * 8 + 4 * 4 * TOKENS * TOKENS * 4


def test_the_request_that_fails_is_named(toy: ClosedForm) -> None:
    """There is room for the scores and the logits, but not for the logits' gradient."""
    room = 60 * MIB
    found = predicted(toy, choice(), card(room))
    logits = 2 * TOKENS * 1024 * 4
    assert not found.fits
    request = found.failing_request
    assert request is not None
    assert (request.bytes, request.shape, request.dtype) == (logits, (2 * TOKENS, 1024), "float32")
    assert (request.op, request.module, request.phase, request.role) == ("aten.logits.default", "head", "backward", "logits")
    assert request.in_use_bytes <= request.reserved_bytes <= room < request.reserved_bytes + request.bytes
    assert sum(found.by_role.values()) == sum(found.by_module.values()) == request.in_use_bytes
    assert found.by_role["logits"] == logits


def test_peaks_of_what_fails_are_as_if_there_were_room(toy: ClosedForm) -> None:
    little, much = predicted(toy, choice(), card(30 * MIB)), predicted(toy, choice(), card(GIB))
    assert not little.fits
    assert little.allocated_peak_bytes == much.allocated_peak_bytes
    assert little.reserved_peak_bytes == much.reserved_peak_bytes
    assert little.phases == much.phases
    assert little.usable_bytes == 30 * MIB < little.reserved_peak_bytes


def test_a_card_that_is_full_before_the_first_byte(toy: ClosedForm) -> None:
    found = predicted(toy, choice(), card(0))
    assert found.failing_request is not None
    assert found.failing_request.phase == "load"
    assert found.failing_request.in_use_bytes == found.failing_request.reserved_bytes == 0
    assert found.by_role == found.by_module == {}
    assert found.largest_requests == ()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.integers(1, 4), st.integers(0, 200))
def test_breakdowns_add_up_on_any_card(toy: ClosedForm, micro_batch: int, room: int) -> None:
    wanted = choice(micro_batch, eval_batch=micro_batch)
    found = predicted(toy, wanted, card(room * MIB))
    request = found.failing_request
    total = found.allocated_peak_bytes if request is None else request.in_use_bytes
    assert sum(found.by_role.values()) == sum(found.by_module.values()) == total
    assert found.fits == (request is None) == (serve(laid(toy, wanted), wanted, card(room * MIB)).failure is None)
    assert found.fits or found.reserved_peak_bytes + LARGEST > room * MIB
    assert len(found.largest_requests) <= LARGEST


def test_the_smallest_card_that_fits_is_the_reserved_peak_or_less(toy: ClosedForm) -> None:
    needed = predicted(toy, choice(), card(GIB)).reserved_peak_bytes
    assert predicted(toy, choice(), card(needed)).fits
    assert not predicted(toy, choice(), card(toy.live_peak((2, TOKENS, 2), True) - 1)).fits


def test_several_gpus_leave_less_of_each(toy: ClosedForm) -> None:
    wanted = replace(choice(), gpus=2, effective_batch=8, sharding="ddp")
    found = predicted(toy, wanted, card(GIB, gpus=2))
    assert set(found.outside) == {"context", "nccl"}
    assert found.usable_bytes == usable_bytes(wanted, card(GIB, gpus=2)) == GIB
    assert usable_bytes(wanted, card(GIB)) == GIB - found.outside["nccl"]
    assert "communicators beyond the first" in found.leaves_out
    assert "communicators beyond the first" not in predicted(toy, choice(), card(GIB)).leaves_out


def test_the_allocator_s_setting_is_the_choice_s(toy: ClosedForm) -> None:
    for expandable in (False, True):
        wanted = choice(3, expandable_segments=expandable)
        allocator = Allocator(settings=AllocatorSettings(expandable_segments=expandable))
        events = laid(toy, wanted)
        whole = replay(events.sizes, events.segments, allocator)
        assert predicted(toy, wanted, card(GIB)).reserved_peak_bytes == whole.peak_reserved
    assert predicted(toy, choice(3), card(GIB)) != predicted(toy, choice(3, expandable_segments=True), card(GIB))


def test_the_bound_is_the_largest_output_that_nobody_has_looked_at(toy: ClosedForm) -> None:
    toy.unclassified = ["aten.scores.default"]
    found = predicted(toy, choice(), card(GIB))
    assert found.error_bound == pytest.approx(0.01 + 2 * 4 * TOKENS * TOKENS * 4 / found.allocated_peak_bytes)
    assert any("aten.scores.default" in item for item in found.leaves_out)
    toy.unclassified = []
    found = predicted(toy, choice(), card(GIB))
    assert found.error_bound == pytest.approx(0.01)
    assert not any("looked at" in item for item in found.leaves_out)


def test_a_convolution_is_left_out_where_there_is_one() -> None:
    assert not any("cuDNN" in item for item in leaves_out(choice(), []))
    assert "cuDNN" in leaves_out(choice(), ["aten.convolution.default"])[0]


def test_what_is_left_out_is_said_in_few_words() -> None:
    found = leaves_out(choice(), {f"aten.op{n}": n for n in range(9)})
    assert found[-1].endswith("aten.op0, aten.op1, aten.op2, aten.op3 ...")
    assert not leaves_out(choice(), {"aten.op": 1})[-1].endswith("...")


# Evaluations of another family.


def apart(form: ClosedForm, wanted: Choice, gpu: Gpu) -> Prediction:
    """The evaluation taken from a form of its own."""
    return predict(lay_out(form, wanted, TOKENS, 1, copy.copy(form)), wanted, gpu, form.unclassified)


def test_an_evaluation_of_another_form_is_a_phase_of_its_own(toy: ClosedForm) -> None:
    wanted = choice(1, eval_batch=4)
    assert apart(toy, wanted, card(GIB)) == predicted(toy, wanted, card(GIB))
    without = predicted(toy, choice(1), card(GIB))
    found = apart(toy, wanted, card(GIB))
    assert without.evaluation is None
    assert found.evaluation is not None
    assert found.phases == without.phases
    assert found.allocated_peak_bytes == max(without.allocated_peak_bytes, found.evaluation.allocated_peak_bytes)


def test_an_evaluation_that_is_too_large_does_not_fit(toy: ClosedForm) -> None:
    wanted = choice(1, eval_batch=64)
    assert predicted(toy, choice(1), card(100 * MIB)).fits
    assert not apart(toy, wanted, card(100 * MIB)).fits


def test_an_evaluation_apart_has_the_verdict_of_the_run(toy: ClosedForm) -> None:
    """The toy runs the same operators for any batch, so that its whole run can be laid out: steps of one sample, then four."""
    wanted = choice(1, eval_batch=4)
    run = compose(toy, Shape(1, TOKENS, 1), 2, Shape(4, TOKENS, 4))
    cards = [card(room * MIB) for room in range(60, 140, 4)]
    verdicts = [serve(run, wanted, gpu).failure is None for gpu in cards]
    assert 0 < sum(verdicts) < len(verdicts)
    assert [apart(toy, wanted, gpu).fits for gpu in cards] == verdicts


def test_an_evaluation_that_fails_names_its_request(toy: ClosedForm) -> None:
    found = apart(toy, choice(1, eval_batch=64), card(100 * MIB))
    assert not found.fits
    assert found.failing_request is not None
    assert found.failing_request.phase == "evaluate"


# Names of modules.


@pytest.mark.parametrize(
    ("template", "group"),
    [
        ("", "outside the model's modules"),
        ("lm_head", "lm_head"),
        ("model.language_model.layers.{}", "model.language_model.layers.*"),
        ("model.language_model.layers.{}.self_attn", "model.language_model.layers.*.self_attn"),
        ("model.language_model.layers.{}.self_attn.q_proj", "model.language_model.layers.*.self_attn"),
        ("model.vision_tower.vision_model.embeddings.patch_embedding", "model.vision_tower.vision_model"),
        ("{}.mlp", "*.mlp"),
        ("model.layers.{}.mlp.experts.copies.0.fc1", "model.layers.*.mlp.experts"),
        ("model.layers.{}.mlp.mixture.router", "model.layers.*.mlp.mixture.router"),
        ("model.layers.{}.mlp.gate", "model.layers.*.mlp.gate"),
    ],
)
def test_modules_are_told_by_what_a_table_can_show(template: str, group: str) -> None:
    assert owner(Kind("aten.mm.default", template, "forward", "activation", "bfloat16")) == group


def test_what_a_library_holds_has_the_library_s_name() -> None:
    assert owner(Kind("zero.fp32_master", "", "load", "optimizer", "float32")) == "DeepSpeed's ZeRO"
    assert owner(Kind("ddp.bucket", "", "load", "communication", "bfloat16")) == "DistributedDataParallel"


def test_a_module_has_its_layer_s_number() -> None:
    events = Events()
    kind = Kind("op", "layers.{}.mlp", "forward", "activation", "bfloat16")
    events.add(600 * MIB, (300, MIB), kind, layer=31)
    events.segments.append(Segment("load", [0]))
    found = predict(events, choice(), card(500 * MIB), {})
    assert found.failing_request is not None
    assert found.failing_request.module == "layers.31.mlp"
    assert found.failing_request.shape == (300, MIB)
