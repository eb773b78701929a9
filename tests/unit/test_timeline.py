"""Memory over the steps in few points: the roles add up at every one, and no peak of any phase is lost."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from oomph.core.closed_form import ClosedForm
from oomph.core.devices import Gpu, find_gpu, outside
from oomph.core.events import Events, Kind, Segment
from oomph.core.footprint import live_footprint
from oomph.core.layout import lay_out
from oomph.core.predict import predict, serve
from oomph.core.timeline import BUCKETS, live_timeline, timeline
from oomph.records import Choice, Timeline
from oomph.units import MIB

CARD = find_gpu("A100-SXM4-40GB")
FEW = 2 * BUCKETS + 100


def at(found: Timeline, place: int) -> dict[str, int]:
    return {line.role: line.bytes[place] for line in found.by_role if line.bytes[place]}


def card(choice: Choice, usable: int) -> Gpu:
    return replace(CARD, memory_bytes=usable + outside(CARD, choice.gpus).bytes)


choices = st.builds(
    lambda micro, more, evaluated, expandable: Choice(
        micro, more, micro * more, eval_batch=evaluated, expandable_segments=expandable
    ),
    st.integers(1, 9),
    st.integers(1, 4),
    st.none() | st.integers(1, 20),
    st.booleans(),
)


def laid_out(form: ClosedForm, choice: Choice, tokens: int) -> Events:
    return lay_out(form, choice, tokens, 1)


def test_roles_add_up_and_every_phase_s_peak_is_kept(toy: ClosedForm) -> None:
    @settings(max_examples=40)
    @given(choices, st.integers(8, 700))
    def check(choice: Choice, tokens: int) -> None:
        events = laid_out(toy, choice, tokens)
        found, prediction = timeline(events, choice, None), predict(events, choice, CARD, [])
        assert all(sum(at(found, place).values()) == whole for place, whole in enumerate(found.allocated_bytes))
        assert found.allocated_bytes[found.peak] == max(found.allocated_bytes) == prediction.allocated_peak_bytes
        assert at(found, found.peak) == {role: nbytes for role, nbytes in prediction.by_role.items() if nbytes}
        peaks = {phase.allocated_peak_bytes for phase in prediction.phases}
        peaks |= {prediction.evaluation.allocated_peak_bytes} if prediction.evaluation else set()
        assert peaks <= {*found.allocated_bytes, 0}
        assert list(found.events) == sorted(set(found.events))
        assert found.events[0] == 0
        assert found.events[-1] == found.total_events - 1
        assert Timeline.from_json(found.to_json()) == found

    check()


def test_parts_are_in_order_and_name_what_is_done(toy: ClosedForm) -> None:
    choice = Choice(2, 2, 4, eval_batch=4)
    found = timeline(laid_out(toy, choice, 300), choice, None)
    assert [(part.during, part.phase) for part in found.parts] == [
        ("load", "load"),
        *[("first step", phase) for phase in ("forward", "backward", "forward", "backward", "optimizer")],
        *[("later step", phase) for phase in ("forward", "backward", "forward", "backward", "optimizer")],
        ("evaluation", "evaluate"),
    ]
    starts = [part.start for part in found.parts]
    assert starts == sorted(set(starts))
    assert {*starts[1:]} <= {*range(found.total_events)}


def test_the_place_of_the_request_that_fails_is_the_prediction_s(toy: ClosedForm) -> None:
    choice = Choice(8, 2, 16)
    events = laid_out(toy, choice, 700)
    whole = predict(events, choice, CARD, [])
    for share in (0.3, 0.6, 0.9, 0.99):
        small = card(choice, int(share * whole.allocated_peak_bytes))
        prediction, failure = predict(events, choice, small, []), serve(events, choice, small).failure
        found = timeline(events, choice, failure)
        assert prediction.failing_request is not None
        assert found.fails is not None
        before = found.fails - 1
        assert found.events[found.fails] == found.events[before] + 1
        assert found.allocated_bytes[before] == prediction.failing_request.in_use_bytes
        assert found.allocated_bytes[found.fails] >= found.allocated_bytes[before] + prediction.failing_request.bytes
        assert at(found, before) == {role: nbytes for role, nbytes in prediction.by_role.items() if nbytes}


def test_a_long_timeline_has_few_points_and_keeps_every_spike_of_its_stretch() -> None:
    kind = {role: Kind("op", "", "", role, "uint8") for role in ("weight", "scores")}
    events = Events()
    weight = events.add(MIB, (MIB,), kind["weight"])
    body: list[int] = []
    for number in range(40_000):
        storage = events.add(MIB * (50 if number == 31_337 else 1 + number % 7), (1,), kind["scores"])
        body += [storage, ~storage]
    events.segments = [Segment("load", [weight]), Segment("step/first", body, ((0, "forward"),), 3)]
    choice = Choice(1, 1, 1)
    found = timeline(events, choice, None)
    assert len(found.events) <= FEW
    assert found.total_events == 1 + 2 * len(body)  # the first one reserves, the second changes nothing, and so no third
    assert found.events[found.peak] == 1 + 2 * 31_337
    assert at(found, found.peak) == {"weight": MIB, "scores": 50 * MIB}
    spikes = [nbytes for nbytes in found.allocated_bytes if nbytes > MIB]
    assert set(spikes) == {8 * MIB, 51 * MIB}


def test_without_an_allocator_it_is_what_is_alive(toy: ClosedForm) -> None:
    @settings(max_examples=40)
    @given(choices, st.integers(8, 700))
    def check(choice: Choice, tokens: int) -> None:
        events = laid_out(toy, choice, tokens)
        footprint = live_footprint(events)
        found = live_timeline(events, footprint.allocated_peak_bytes)
        assert found.fails is None
        assert found.allocated_bytes[found.peak] == footprint.allocated_peak_bytes
        assert all(sum(at(found, place).values()) == whole for place, whole in enumerate(found.allocated_bytes))
        full = live_timeline(events, footprint.allocated_peak_bytes - 1)
        assert full.fails is not None
        assert full.allocated_bytes[full.fails] == footprint.allocated_peak_bytes

    check()
