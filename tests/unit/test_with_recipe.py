"""A message explained with a recipe: the step is made to fail, the message is written from the failure, and found again."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from oomph.core.allocator import Allocator, rounded, segment_bytes
from oomph.core.allocator import replay as run
from oomph.core.curing import cures
from oomph.core.devices import find_gpu
from oomph.core.diagnosing import Explained, Subject, card_by_memory, explain_with
from oomph.core.events import Events
from oomph.core.explaining import Run, explain_run
from oomph.core.layout import Shape, lay_out
from oomph.core.matching import best_match
from oomph.core.stage import StageModel
from oomph.diagnosis_records import Cause, Cure, Diagnosis, OomMessage
from oomph.errors import UserError
from oomph.recipe import Recipe
from oomph.records import Choice
from oomph.units import GIB

PARTS = {"vision": "clip-vit-large-patch14-336-vision", "projector": "mlp2x_gelu", "language": "phi-2"}
MIB_100 = GIB // 100


def recipe(micro_batch: Any = 8, model: Any = PARTS, stages: tuple[str, ...] = ("tune",), **data: Any) -> Recipe:
    rates = {"vision": "frozen", "language": 1e-4, "head": 1e-4}
    return Recipe.model_validate(
        {
            "name": "small",
            "model": model,
            "data": {"max_tokens": 2047, "image_tokens_count": False, **data},
            "hardware": {"gpu": "A100-SXM4-40GB", "gpus": 4},
            "memory": {
                "micro_batch": micro_batch,
                "eval_batch": "none",
                "checkpointing": "blocks",
                "attention": "eager-fp32",
                "loss": "full-shifted",
                "optimizer": "adamw-foreach",
                "sharding": "zero2",
            },
            "stages": [{"name": name, "train": rates, "effective_batch": 64} for name in stages],
        }
    )


@pytest.fixture(scope="module")
def source(by_hand: Any) -> Any:
    """Forms of a model with four blocks, whose scores are what is largest."""
    return by_hand(by_hand.SIZE(blocks=4, width=1024, heads=16, vocabulary=8192))


@pytest.fixture
def without_cures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the search for what helps."""
    monkeypatch.setattr("oomph.core.diagnosing.cures", lambda *arguments: ())


@pytest.fixture(scope="module")
def model(source: Any) -> StageModel:
    asked = recipe()
    return StageModel(asked, asked.stages[0], find_gpu(asked.hardware.gpu), source)


def written(nbytes: int, in_use: int | None, **more: Any) -> OomMessage:
    """A message as PyTorch prints it: the segment's size with two decimals, in GiB or MiB."""
    unit = GIB if nbytes >= GIB else GIB // 1024
    shown = round(segment_bytes(rounded(nbytes)) / unit, 2)
    low, high = round((shown - 0.005) * unit), round((shown + 0.005) * unit)
    sizes = {"requested_bytes": round(shown * unit), "requested_low": low, "requested_high": high}
    return OomMessage("cuda allocator", "as printed", 1, allocated_bytes=in_use, **{**sizes, **more})


def events_at(model: StageModel, choice: Choice, tokens: int) -> Events:
    shape = Shape(choice.micro_batch, tokens, choice.micro_batch * model.images)
    return lay_out(model.form(choice, shape), replace(choice, eval_batch=None), tokens, model.images)


@pytest.mark.parametrize("tokens", [2062, 1999, 1501, 901])
@pytest.mark.parametrize("share", [0.97, 0.85])
def test_the_request_that_failed_is_found(model: StageModel, tokens: int, share: float) -> None:
    choice = model.first
    events = events_at(model, choice, tokens)
    peak = run(events.sizes, events.segments, Allocator(), streams=events.streams).peak_allocated
    failed = run(events.sizes, events.segments, Allocator(capacity_bytes=int(share * peak)), streams=events.streams).failure
    assert failed is not None
    nbytes = events.sizes[failed.storage]
    match = best_match(model, choice, written(nbytes, failed.allocated))
    assert match is not None
    assert match.span[0] <= tokens <= match.span[1]
    assert match.in_use == pytest.approx(failed.allocated, rel=0.02)
    # In blocks that are equal but for their number, the same tensor is made with nearly the same bytes in use.
    assert match.events.kinds[match.storage] == events.kinds[failed.storage]


def test_only_the_token_counts_of_the_span_print_so(model: StageModel) -> None:
    choice, tokens = model.first, 1777
    message = written(choice.micro_batch * 16 * tokens * tokens * 4, None)
    match = best_match(model, choice, message)
    assert match is not None
    assert message.requested_low is not None
    assert message.requested_high is not None
    first, last = match.span
    assert first <= tokens <= last

    def prints_so(count: int) -> bool:
        nbytes = segment_bytes(rounded(choice.micro_batch * 16 * count * count * 4))
        return bool(message.requested_low <= nbytes <= message.requested_high)  # type: ignore[operator]

    assert [prints_so(count) for count in (first - 1, first, last, last + 1)] == [False, True, True, False]


def test_a_smaller_last_micro_batch_is_found(model: StageModel) -> None:
    choice = model.first
    small = replace(choice, micro_batch=5)
    events = events_at(model, small, model.tokens)
    alone = run(events.sizes, events.segments, Allocator(), streams=events.streams).peak_allocated
    failed = run(events.sizes, events.segments, Allocator(capacity_bytes=alone - GIB // 10), streams=events.streams).failure
    assert failed is not None
    match = best_match(model, choice, written(events.sizes[failed.storage], failed.allocated))
    assert match is not None
    assert (match.shape.samples, match.shape.tokens) == (5, model.tokens)


def test_without_formulas_the_longest_samples_are_looked_at(by_hand: Any) -> None:
    asked = recipe()
    fixed = by_hand(by_hand.SIZE(blocks=2, width=1024, heads=16, vocabulary=8192), closed=False)
    alone = StageModel(asked, asked.stages[0], find_gpu(asked.hardware.gpu), fixed)
    match = best_match(alone, alone.first, written(8 * 16 * 2062 * 2062 * 4, None))
    assert match is not None
    assert (match.shape.tokens, match.span) == (2062, (2062, 2062))


def explained(source: Any, message: OomMessage, asked: Recipe | None = None) -> Explained:
    asked = asked or recipe()
    return explain_with(message, [Subject(asked, stage) for stage in asked.stages], source)


def at_full_length(model: StageModel) -> OomMessage:
    """The message of the full-length sample's last scores, what is in use being 1 % less than predicted."""
    events = model.lay_out(model.first).events
    match = best_match(model, model.first, written(max(events.sizes), None))
    assert match is not None
    return written(max(events.sizes), round(0.99 * match.in_use))


@pytest.mark.usefixtures("without_cures")
def test_the_explanation_says_which_samples_and_when(source: Any, model: StageModel) -> None:
    answer = explained(source, at_full_length(model))
    assert answer.event is not None
    assert answer.event.shape == (8, 16, 2062, 2062)
    assert sum(answer.alive.values()) == pytest.approx(answer.event.in_use_bytes, rel=0.01)
    text = " ".join(answer.why_now)
    assert "Only a micro-batch of 8 whose longest sample has 2,0" in text
    assert "2,062 is a text cut to 2,047 tokens, 1 of which stands for an image, with 16 tokens an image" in text
    assert re.search(r"[012]\.\d % apart", text)
    assert f"{100 * (1 - 0.999**64):.2g} % of the steps" in text


@pytest.mark.usefixtures("without_cures")
def test_a_message_of_another_run_is_not_matched(source: Any, model: StageModel) -> None:
    answer = explained(source, written(9 * GIB, 20 * GIB))
    assert answer.event is None
    assert "No request of stage tune is of 9.00 GiB at any sample length up to 2,062 tokens" in answer.why_now[0]
    assert "less" in answer.why_now[0]
    much = replace(at_full_length(model), allocated_bytes=60 * GIB)
    answer = explained(source, much)
    assert answer.event is None
    assert "less than reported" in answer.why_now[0]


def test_the_phase_of_the_traceback_decides_between_equal_sizes(model: StageModel) -> None:
    nbytes = 8 * 16 * 2062 * 2062 * 4
    for phase in ("forward", "recompute"):
        message = written(nbytes, None, phase=phase, capacity_bytes=model.gpu.memory_bytes)
        match = best_match(model, model.first, message)
        assert match is not None
        assert match.events.kinds[match.storage].phase == phase


@pytest.mark.usefixtures("without_cures")
def test_the_stage_that_is_most_like_the_message_is_taken(source: Any, model: StageModel) -> None:
    asked = recipe(stages=("short", "long"))
    short = asked.stages[0].model_copy(update={"data": asked.stages[0].data.model_copy(update={"max_tokens": 101})})
    fields = short.data.model_fields_set | {"max_tokens"}
    short = short.model_copy(update={"data": type(short.data).model_validate({"max_tokens": 101})})
    assert "max_tokens" in fields
    both = asked.model_copy(update={"stages": (short, asked.stages[1])})
    answer = explained(source, at_full_length(model), both)
    assert answer.stage == "long"
    assert "of the stages, long has" in answer.notes[0]


# What helps.


@functools.cache
def found_cures(model: StageModel) -> tuple[Cure, ...]:
    return cures(model, model.first, None)


def test_half_the_batch_is_valued_whatever_it_is_worth(model: StageModel) -> None:
    (own,) = [cure for cure in found_cures(model) if cure.asked]
    assert own.choice is not None
    assert (own.choice.micro_batch, own.choice.accumulation) == (4, 4)
    assert own.change == "micro-batch 4 and accumulation 4"
    prediction = model.predict(own.choice)
    assert own.allocated_peak_bytes == prediction.allocated_peak_bytes
    assert (own.fits, own.exact) == (prediction.fits, True)


def test_cures_are_predictions_of_what_they_say(model: StageModel) -> None:
    found = found_cures(model)
    kept = [cure for cure in found if cure.exact]
    assert all(cure.choice and cure.choice.effective_batch == 64 for cure in kept)
    lean = next(cure for cure in kept if cure.choice == replace(model.first, attention="efficient"))
    assert lean.change == "attention efficient"
    order = [(not cure.fits, -(cure.samples_per_second or 0)) for cure in kept]
    assert order == sorted(order)


def test_cutting_after_the_splice_is_marked_as_another_training(model: StageModel, source: Any) -> None:
    last = found_cures(model)[-1]
    assert last.exact is False
    assert "data.image_tokens_count=true" in last.change
    assert last.allocated_peak_bytes is not None
    assert last.allocated_peak_bytes < model.predict(model.first).allocated_peak_bytes
    asked = recipe(image_tokens_count=True)
    other = StageModel(asked, asked.stages[0], model.gpu, source)
    assert not any("image_tokens_count" in cure.change for cure in found_cures(other))


def test_a_micro_batch_of_one_has_no_half(source: Any) -> None:
    asked = recipe(micro_batch=1)
    one = StageModel(asked, asked.stages[0], find_gpu(asked.hardware.gpu), source)
    assert not any(cure.asked for cure in found_cures(one))


def test_a_tensor_that_goes_is_saved_whole(source: Any, model: StageModel) -> None:
    answer = explained(source, at_full_length(model))
    assert answer.event is not None
    by_choice: dict[Choice | None, Cure] = {cure.choice: cure for cure in answer.cures}
    assert by_choice[replace(model.first, attention="efficient")].saves_bytes == answer.event.bytes
    (own,) = [cure for cure in answer.cures if cure.asked]
    assert own.saves_bytes == answer.event.bytes // 2


# Around it.


def test_the_hosts_memory_is_no_matter_of_a_recipe(source: Any) -> None:
    answer = explained(source, OomMessage("linux oom killer", "Killed process", 1))
    assert (answer.event, answer.cures) == (None, ())
    assert "host" in answer.why_now[0]


@pytest.mark.usefixtures("without_cures")
def test_without_a_size_the_predicted_failure_is_shown(source: Any) -> None:
    answer = explained(source, OomMessage("cublas", "CUBLAS_STATUS_ALLOC_FAILED", 1))
    assert "The message gives no size" in answer.why_now[0]


@pytest.mark.usefixtures("without_cures")
def test_a_message_of_another_card_says_so(source: Any, model: StageModel) -> None:
    answer = explained(source, replace(at_full_length(model), capacity_bytes=79 * GIB))
    assert any("the message is of a card with 79.00 GiB" in note for note in answer.notes)


def test_advice_against_other_causes_stays(source: Any, model: StageModel) -> None:
    message = at_full_length(model)
    cause = Cause("fragmentation", "memory lay in pieces", {}, (), "likely", 1)
    own = Cure("turn on expandable segments", "pieces can be joined")
    plain = Diagnosis("text", (message,), 0, (), (cause,), cures=(own,))
    whole = explained(source, message).added_to(plain)
    assert whole.cures[0] == own
    assert whole.cures[1:]
    assert whole.recipe == "small, stage tune"
    need = replace(plain, causes=(replace(cause, name="real need"),))
    assert own not in explained(source, message).added_to(need).cures


@pytest.mark.parametrize(("gib", "name"), [(39.39, "A100-SXM4-40GB"), (14.56, "T4"), (79.11, "H100-SXM5-80GB")])
def test_a_card_is_known_by_its_memory(gib: float, name: str) -> None:
    found = find_gpu(card_by_memory(int(gib * GIB)))
    assert found.memory_bytes == pytest.approx(find_gpu(name).memory_bytes, rel=0.01)


@pytest.mark.parametrize("nbytes", [None, 5 * GIB])
def test_an_unknown_card_has_to_be_named(nbytes: int | None) -> None:
    with pytest.raises(UserError) as caught:
        card_by_memory(nbytes)
    assert "--gpu" in caught.value.hint


@pytest.mark.parametrize(
    "asked",
    [
        Run(recipe="a", script="b"),
        Run(gpu="T4"),
        Run(settings=("micro_batch=1",)),
        Run(recipe="moe-llava/phi2-clip336", gpus="x"),
    ],
)
def test_what_does_not_go_together_is_refused(asked: Run, source: Callable[..., Any]) -> None:
    message = OomMessage("cuda allocator", "", 1)
    with pytest.raises(UserError):
        explain_run(Diagnosis("text", (message,), 0, (), ()), asked, source)  # type: ignore[arg-type]
