"""A closed form laid out: a warm-up step, a step like all later ones, an evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oomph.core.allocator import Allocator, replay
from oomph.core.closed_form import ClosedForm
from oomph.core.events import Events, Segment
from oomph.core.layout import Shape, compose, evaluation_shape, lay_out, timelines
from oomph.records import Choice, Sharding

TOKENS, IMAGES = 96, 1
STEP = ("step/first", "step/next", "step/optimizer")


def choice(micro_batch: int = 2, accumulation: int = 3, eval_batch: int | None = None, sharding: Sharding = "none") -> Choice:
    gpus = 1 if sharding == "none" else 2
    batch = micro_batch * accumulation * gpus
    return Choice(micro_batch, accumulation, batch, gpus, sharding=sharding, eval_batch=eval_batch)


def segment(events: Events, name: str) -> Segment:
    (found,) = (segment for segment in events.segments if segment.name == name)
    return found


def levels(events: Events, segments: Iterable[Segment], start: int = 0) -> list[int]:
    """Bytes alive after every event."""
    entries = [entry for piece in segments for entry in list(piece.timeline) * piece.repeat]
    return list(accumulate((events.sizes[e] if e >= 0 else -events.sizes[~e] for e in entries), initial=start))


def alive(segments: Iterable[Segment], before: Iterable[int] = ()) -> set[int]:
    """The storages that live after the segments; each is born when it is dead and dies when it is alive."""
    living = set(before)
    for piece in segments:
        for entry in list(piece.timeline) * piece.repeat:
            if entry >= 0:
                assert entry not in living
                living.add(entry)
            else:
                living.remove(~entry)
    return living


def roles(events: Events, storages: Iterable[int]) -> list[str]:
    return sorted(events.kinds[storage].role for storage in storages)


def of_step(events: Events, step: str) -> list[Segment]:
    return [segment for segment in events.segments if segment.name.startswith(f"{step}/")]


def test_a_run_is_load_two_steps_and_an_evaluation(toy: ClosedForm) -> None:
    events = lay_out(toy, choice(eval_batch=4), TOKENS, IMAGES)
    assert [(piece.name, piece.repeat) for piece in events.segments] == [
        ("load", 1),
        ("warmup/first", 1),
        ("warmup/next", 2),
        ("warmup/optimizer", 1),
        ("step/first", 1),
        ("step/next", 2),
        ("step/optimizer", 1),
        ("evaluate", 1),
    ]


def test_without_accumulation_and_evaluation_there_is_neither(toy: ClosedForm) -> None:
    events = lay_out(toy, choice(accumulation=1), TOKENS, IMAGES)
    names = [piece.name for piece in events.segments]
    assert names == ["load", "warmup/first", "warmup/optimizer", "step/first", "step/optimizer"]


def test_sizes_are_those_of_the_micro_batch(toy: ClosedForm) -> None:
    events = lay_out(toy, choice(3, 2), TOKENS, 2)
    sizes, shapes = toy.sizes((3, TOKENS, 6)), toy.dimensions((3, TOKENS, 6))
    assert events.sizes == [sizes[number] for number in toy.formula]
    for storage, shape in enumerate(events.shapes):
        assert list(shape) == shapes[toy.formula[storage]][: len(shape)].tolist()
    image = next(s for s, kind in enumerate(events.kinds) if kind.module == "tower" and kind.role == "activation")
    assert events.shapes[image] == (6, 256)


@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_what_a_step_makes_ends_with_it(toy: ClosedForm, accumulation: int) -> None:
    events = lay_out(toy, choice(accumulation=accumulation), TOKENS, IMAGES)
    loaded = alive([segment(events, "load")])
    resident = alive(of_step(events, "warmup"), loaded)
    assert roles(events, loaded) == ["weight", "weight", "weight"]
    assert roles(events, resident - loaded) == ["optimizer", "optimizer", "workspace", "workspace"]
    assert alive(of_step(events, "step"), resident) == resident
    assert alive([*of_step(events, "step")] * 3, resident) == resident


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_later_step_is_the_same(toy: ClosedForm, accumulation: int) -> None:
    events = lay_out(toy, choice(accumulation=accumulation), TOKENS, IMAGES)
    more = [*events.segments, *of_step(events, "step"), *of_step(events, "step")]
    once = replay(events.sizes, events.segments, Allocator())
    often = replay(events.sizes, more, Allocator())
    assert often.peak_allocated == once.peak_allocated
    assert often.peak_reserved == once.peak_reserved
    assert often.allocated == once.allocated
    before = levels(events, events.segments[:-3] if accumulation > 1 else events.segments[:-2])[-1]
    step = levels(events, of_step(events, "step"), before)
    assert step == levels(events, of_step(events, "step"), step[-1])


def test_workspaces_are_made_once_and_phases_keep_their_places(toy: ClosedForm) -> None:
    events = lay_out(toy, choice(), TOKENS, IMAGES)
    warmup, step = segment(events, "warmup/first"), segment(events, "step/first")
    (main, autograd) = timelines(toy).persistent
    assert roles(events, [main, autograd]) == ["workspace", "workspace"]
    assert [entry for entry in warmup.timeline if entry not in (main, autograd)] == step.timeline
    for piece in (warmup, step):
        assert [phase for _, phase in piece.marks] == ["forward", "backward"]
        starts = [piece.timeline[at] for at, _ in piece.marks]
        assert roles(events, starts) == ["input", "logits"]
    assert step.marks[1][0] == warmup.marks[1][0] - 1


def test_what_the_first_micro_batch_leaves_ends_with_the_step(toy: ClosedForm) -> None:
    """The loss is a storage of the trace's first step alone, which later steps make again."""
    events = lay_out(toy, choice(), TOKENS, IMAGES)
    (loss,) = timelines(toy).left
    assert events.shapes[loss] == ()
    assert segment(events, "step/optimizer").timeline[-1] == ~loss
    assert ~loss not in segment(events, "step/first").timeline


def test_an_evaluation_has_its_own_batch(toy: ClosedForm) -> None:
    events = lay_out(toy, choice(2, eval_batch=5), TOKENS, IMAGES)
    evaluated = [entry for entry in segment(events, "evaluate").timeline if entry >= 0]
    sizes = toy.sizes((5, TOKENS, 5))
    births = [entry for entry in timelines(toy).pieces["evaluate"][0] if entry >= 0]
    assert [events.sizes[storage] for storage in evaluated] == [sizes[toy.formula[storage]] for storage in births]
    assert events.shapes[evaluated[1]] == (5, 4, TOKENS, TOKENS)
    trained = lay_out(toy, choice(2), TOKENS, IMAGES)
    rest = set(range(len(events.sizes))) - set(evaluated)
    assert all(events.sizes[storage] == trained.sizes[storage] for storage in rest)


def test_an_evaluation_ends_nothing_of_the_run(toy: ClosedForm) -> None:
    events = lay_out(toy, choice(2, eval_batch=5), TOKENS, IMAGES)
    resident = alive(events.segments[:-1])
    assert alive([segment(events, "evaluate")], resident) == resident


@pytest.mark.parametrize(("micro_batch", "eval_batch"), [(1, 4), (4, 1)])
def test_an_evaluation_of_another_family_takes_its_own_form(toy: ClosedForm, micro_batch: int, eval_batch: int) -> None:
    """One sample runs other operators than several, so that its form is another; here it needs twice the bytes."""
    other = ClosedForm.from_json(toy.to_json())
    other.formulas = [formula._replace(itemsize=2 * formula.itemsize) for formula in other.formulas]
    wanted = choice(micro_batch, eval_batch=eval_batch)
    plain, events = lay_out(toy, wanted, TOKENS, IMAGES), lay_out(toy, wanted, TOKENS, IMAGES, other)
    assert events.segments[:-1] == plain.segments[:-1]
    evaluated = [e for e in segment(events, "evaluate").timeline if e >= 0]
    assert [events.sizes[e] for e in evaluated] == [2 * plain.sizes[e] for e in segment(plain, "evaluate").timeline if e >= 0]
    scores = next(e for e in evaluated if events.kinds[e].role == "scores")
    assert events.shapes[scores] == (eval_batch, 4, TOKENS, TOKENS)


def test_no_evaluation_has_no_shape() -> None:
    assert evaluation_shape(choice(), TOKENS, IMAGES) is None
    assert evaluation_shape(choice(eval_batch=3), TOKENS, 2) == Shape(3, TOKENS, 6)


@pytest.mark.parametrize("sharding", ["ddp", "zero1", "zero2", "zero3"])
def test_sharding_keeps_the_segments(toy: ClosedForm, sharding: Sharding) -> None:
    alone = lay_out(toy, choice(eval_batch=2), TOKENS, IMAGES)
    shared = lay_out(toy, choice(eval_batch=2, sharding=sharding), TOKENS, IMAGES)
    assert list(dict.fromkeys(piece.name for piece in shared.segments)) == [piece.name for piece in alone.segments]
    assert "communication" in {shared.kinds[e].role for piece in shared.segments for e in piece.timeline if e >= 0}
    resident = alive([piece for piece in shared.segments if piece.name.startswith(("load", "warmup/"))])
    assert alive(of_step(shared, "step"), resident) == resident


def test_composing_leaves_the_form_as_it_is(toy: ClosedForm) -> None:
    before = toy.to_json()
    timeline = list(toy.timeline)
    compose(toy, Shape(2, TOKENS, 2), 3, Shape(4, TOKENS, 4))
    assert toy.timeline == timeline
    assert toy.to_json() == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9), st.integers(1, 500), st.integers(0, 3), st.integers(1, 4), st.none() | st.integers(1, 9))
def test_any_shape_is_conserved(
    toy: ClosedForm, samples: int, tokens: int, images: int, accumulation: int, eval_batch: int | None
) -> None:
    events = lay_out(toy, choice(samples, accumulation, eval_batch), tokens, images)
    allocator = Allocator()
    result = replay(events.sizes, events.segments, allocator)
    resident = alive([piece for piece in events.segments if piece.name.startswith(("load", "warmup/"))])
    assert alive(events.segments) == resident
    assert allocator.requested == sum(events.sizes[storage] for storage in resident)
    assert result.peak_allocated >= toy.live_peak((samples, tokens, samples * images), accumulation > 1)


def test_the_peak_of_live_bytes_is_that_of_the_steps(toy: ClosedForm) -> None:
    """Rounded to 512 bytes: load, workspaces, and what lives while the second micro-batch makes its logits' gradient."""
    shape = (2, 96, 2)
    weights = (256 * 256 + 1024 * 256) * 2 + 512
    hidden, scores, logits, ids = 2 * 96 * 256 * 2, 2 * 4 * 96 * 96 * 4, 2 * 96 * 1024 * 4, 2 * 96 * 8
    kept = weights + 2 * 8_519_680 + 1024 * 256 * 2 + 512
    alive_then = hidden + scores + 2 * logits + 512 + ids
    assert toy.live_peak(shape, accumulates=True) == kept + alive_then
    first = weights + 8_519_680 + alive_then
    later = weights + 2 * 8_519_680 + hidden + scores + logits + 512 + ids + 1024 * 256 * 2
    states = weights + 2 * 8_519_680 + 4 * 1024 * 256 * 2 + 512 + 512
    assert toy.live_peak(shape, accumulates=False) == max(first, later, states)
