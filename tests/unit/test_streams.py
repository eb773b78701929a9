"""Storages on several CUDA streams: each stream has pools of its own, and the rest of the allocator is one."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from oomph.core.allocator import Allocator, AllocatorSettings, replay
from oomph.core.events import Segment, by_stream
from oomph.units import MIB


def test_the_gradient_chunks_of_a_stream_do_not_fit_into_free_blocks_of_another():
    sizes = [4 * MIB, 4 * MIB]
    segments = [Segment("s", [0, ~0, 1])]
    assert replay(sizes, segments, Allocator()).peak_reserved == 20 * MIB
    assert replay(sizes, segments, Allocator(), streams={1: 2}).peak_reserved == 40 * MIB
    expandable = Allocator(settings=AllocatorSettings(expandable_segments=True))
    assert replay(sizes, segments, expandable, streams={1: 2}).peak_reserved == 40 * MIB


timelines = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 24 * MIB)), max_size=40)


@st.composite
def streamed(draw):
    """Sizes, a timeline, and a stream for some storages."""
    sizes, timeline, live = [], [], []
    for pick, nbytes in draw(timelines):
        if live and pick < 3:
            timeline.append(~live.pop(pick % len(live)))
        else:
            timeline.append(len(sizes))
            live.append(len(sizes))
            sizes.append(nbytes)
    streams = {storage: draw(st.integers(1, 2)) for storage in range(len(sizes)) if draw(st.booleans())}
    return sizes, timeline, streams


@settings(max_examples=60)
@given(case=streamed(), expandable=st.booleans(), capacity=st.one_of(st.none(), st.integers(20, 120)))
def test_a_replay_of_streams_is_what_single_requests_on_them_are(case, expandable, capacity):
    sizes, timeline, streams = case
    made = AllocatorSettings(expandable_segments=expandable)
    limit = None if capacity is None else capacity * MIB
    whole, single = Allocator(limit, made), Allocator(limit, made)
    result = replay(sizes, [Segment("s", timeline)], whole, streams=streams)
    addresses, ran = {}, timeline if result.failure is None else timeline[: result.failure.position]
    for entry in ran:
        if entry >= 0:
            addresses[entry] = single.malloc(sizes[entry], streams.get(entry, 0))
        else:
            single.free(addresses.pop(~entry))
    assert Counter(whole.blocks.values()) == Counter(single.blocks.values())
    if result.failure is None:
        assert (whole.reserved, whole.allocated) == (single.reserved, single.allocated)
        assert Counter(whole.free_blocks.values()) == Counter(single.free_blocks.values())


@given(case=streamed())
def test_stretches_of_one_stream_are_the_timeline(case):
    _, timeline, streams = case
    stretches = [(list(entries), stream) for entries, stream in by_stream(timeline, streams)]
    assert [entry for entries, _ in stretches for entry in entries] == timeline
    assert all(streams.get(max(entry, ~entry), 0) == stream for entries, stream in stretches for entry in entries)


def test_a_request_on_another_stream_that_cannot_be_served_is_the_failure():
    sizes, timeline = [4 * MIB, 4 * MIB, 512], [0, ~0, 1, 2]
    full = Allocator(20 * MIB)
    # The first stream's segment is free when the second one asks, and goes back to the driver for it.
    assert replay(sizes, [Segment("s", timeline)], full, streams={1: 1}).failure.storage == 2
    small = replay(sizes, [Segment("s", [0, 1, 2])], Allocator(20 * MIB), streams={1: 1}, stop_on_failure=False)
    assert (small.failure.storage, small.failure.position, small.allocated) == (1, 1, 8 * MIB + 512)


def test_a_repeated_segment_of_streams_is_its_first_repetition_again():
    sizes, segment = [3 * MIB, 5 * MIB, 2 * MIB], [0, 1, ~0, 2, ~1, ~2]
    once = replay(sizes, [Segment("s", segment)], Allocator(), streams={1: 1})
    often = replay(sizes, [Segment("s", segment, (), 50)], Allocator(), streams={1: 1})
    assert (once.peak_reserved, once.peak_allocated) == (often.peak_reserved, often.peak_allocated)
