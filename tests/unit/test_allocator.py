"""The allocator against an oracle that works everything out anew; the replay against requests made one by one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomph.core.allocator import (
    Allocator,
    AllocatorSettings,
    DriverAddresses,
    Failure,
    Moment,
    OutOfMemory,
    Replay,
    Storages,
    Trail,
    live_at,
    replay,
    rounded,
    segment_bytes,
)
from oomph.core.events import Segment
from oomph.records import PhasePeak
from oomph.units import KIB, MIB

Pool = tuple[int, bool]


@dataclass
class Oracle:
    """The rules of `CUDACachingAllocator.cpp` on plain lists: free blocks are what the live ones leave over."""

    capacity: int | None
    settings: AllocatorSettings
    segments: list[tuple[Pool, int, int]] = field(default_factory=list)
    pages: dict[Pool, set[int]] = field(default_factory=dict)
    live: dict[tuple[Pool, int], tuple[int, int]] = field(default_factory=dict)
    addresses: DriverAddresses = field(default_factory=DriverAddresses)
    peak_allocated: int = 0
    peak_reserved: int = 0

    @property
    def allocated(self) -> int:
        return sum(size for size, _ in self.live.values())

    @property
    def requested(self) -> int:
        return sum(nbytes for _, nbytes in self.live.values())

    @property
    def reserved(self) -> int:
        mapped = sum(len(pages) * self.page(pool) for pool, pages in self.pages.items())
        return mapped + sum(end - start for _, start, end in self.segments)

    def page(self, pool: Pool) -> int:
        return 2 * MIB if pool[1] else 20 * MIB

    def held(self, pool: Pool) -> Iterable[tuple[int, int]]:
        """Start and end of each segment, or of each uninterrupted row of mapped pages."""
        yield from ((start, end) for owner, start, end in self.segments if owner == pool)
        pages, page = self.pages.get(pool, set()), self.page(pool)
        for first in sorted(number for number in pages if number - 1 not in pages):
            last = next(number for number in itertools.count(first) if number not in pages)
            yield first * page, last * page

    def gaps(self, pool: Pool) -> list[tuple[int, int]]:
        """(size, address) of the free blocks, in order."""
        taken = sorted((address, address + size) for (owner, address), (size, _) in self.live.items() if owner == pool)
        found = []
        for start, end in self.held(pool):
            inside = [(a, b) for a, b in taken if start <= a < end]
            edges = [start, *itertools.chain.from_iterable(inside), end]
            found += [(b - a, a) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
        return sorted(found)

    def round(self, nbytes: int) -> int:
        divisions, floor = self.settings.roundup_power2_divisions, 1
        if divisions < 2 or nbytes <= 512 * divisions:
            return max(512, nbytes + -nbytes % 512)
        while 2 * floor <= nbytes:
            floor *= 2
        return min(size for k in range(divisions + 1) if (size := floor + k * (floor // divisions)) >= nbytes)

    def fit(self, pool: Pool, size: int) -> int | None:
        fits = [gap for gap in self.gaps(pool) if gap[0] >= size]
        if not fits:
            return None
        place, limit = 0, self.settings.max_split_size_bytes or 1 << 60
        if self.settings.expandable_segments:
            while place + 1 < len(fits) and self.grown(pool, fits[place + 1]) < self.grown(pool, fits[place]):
                place += 1
        block, address = fits[place]
        too_large = block >= limit if size < limit else block >= size + 20 * MIB
        return None if too_large else address

    def grown(self, pool: Pool, gap: tuple[int, int]) -> int:
        size, address = gap
        page, pages = self.page(pool), self.pages[pool]
        if (address + size) % page or (address + size) // page in pages:
            return size
        after = [number * page for number in pages if number * page > address + size]
        return min(after, default=1 << 60) - address

    def make(self, pool: Pool, size: int) -> int | None:
        if self.settings.expandable_segments:
            return self.map(pool, size)
        nbytes = 2 * MIB if size <= MIB else 20 * MIB if size < 10 * MIB else size + -size % (2 * MIB)
        if not self.has_room(nbytes):
            return None
        start = self.addresses(nbytes)
        self.segments.append((pool, start, start + nbytes))
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return start

    def map(self, pool: Pool, size: int) -> int | None:
        page, pages = self.page(pool), self.pages.setdefault(pool, set())
        gaps = {address + free: address for free, address in self.gaps(pool)}
        holes = [number for number in range(max(pages, default=-1) + 2) if number not in pages and number - 1 in {-1, *pages}]
        for hole in holes:
            start = gaps.get(hole * page, hole * page)
            blocks = [(address, address + block) for (owner, address), (block, _) in self.live.items() if owner == pool]
            if not any(a < start + size and start < b for a, b in blocks):
                break
        missing = [number for number in range(start // page, -(-(start + size) // page)) if number not in pages]
        for _, row in itertools.groupby(enumerate(missing), lambda item: item[1] - item[0]):
            numbers = {number for _, number in row}
            if not self.has_room(len(numbers) * page):
                return None
            pages |= numbers
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        return start

    def has_room(self, nbytes: int) -> bool:
        return self.capacity is None or self.reserved + nbytes <= self.capacity

    def release_oversize(self, pool: Pool, size: int) -> bool:
        limit = self.settings.max_split_size_bytes
        if limit is None or self.settings.expandable_segments:
            return False
        oversize = [gap for gap in self.gaps(pool) if gap[0] >= limit]
        needed = max(size, limit)
        for block, address in [gap for gap in oversize if gap[0] >= needed][:1] or reversed(oversize):
            if needed > 0:
                self.segments.remove((pool, address, address + block))
                needed -= block
        return needed <= 0

    def empty_cache(self) -> None:
        self.segments = [
            (pool, start, end)
            for pool, start, end in self.segments
            if any(owner == pool and start <= address < end for owner, address in self.live)
        ]
        for pool, pages in self.pages.items():
            page, gaps = self.page(pool), self.gaps(pool)
            pages -= {n for n in pages if any(a <= n * page and (n + 1) * page <= a + size for size, a in gaps)}

    def malloc(self, nbytes: int, stream: int) -> tuple[Pool, int] | None:
        size = self.round(nbytes)
        pool = (stream, size <= MIB)
        address = self.fit(pool, size)
        if address is None:
            address = self.make(pool, size)
        if address is None and self.release_oversize(pool, size):
            address = self.make(pool, size)
        if address is None:
            self.empty_cache()
            address = self.make(pool, size)
        if address is None:
            return None
        rest = dict((a, b) for b, a in self.gaps(pool))[address] - size
        limit = self.settings.max_split_size_bytes or 1 << 60
        split = rest >= 512 if pool[1] or self.settings.expandable_segments else rest > MIB and size < limit
        self.live[pool, address] = (size if split else size + rest, nbytes)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return pool, address


BOUNDARIES = [512, 10 * KIB, MIB, 2 * MIB, 10 * MIB, 20 * MIB, 24 * MIB]
SIZES = st.one_of(
    st.integers(0, 3 * KIB),
    st.builds(lambda size, shift: size + shift, st.sampled_from(BOUNDARIES), st.integers(-1, 1)),
    st.integers(1, 3 * MIB),
    st.integers(MIB, 45 * MIB),
)
SETTINGS = st.builds(
    AllocatorSettings,
    expandable_segments=st.booleans(),
    max_split_size_bytes=st.sampled_from([None, None, 20 * MIB, 23 * MIB]),
    roundup_power2_divisions=st.sampled_from([0, 0, 1, 4, 16]),
)
CAPACITIES = st.sampled_from([None, 50 * MIB, 64 * MIB, 101 * MIB])
MALLOC = st.tuples(st.just("malloc"), SIZES, st.sampled_from([0, 0, 0, 7]))
FREE = st.tuples(st.just("free"), st.integers(0, 40), st.just(0))
EMPTY = st.just(("empty", 0, 0))
OPERATIONS = st.lists(st.one_of(MALLOC, MALLOC, FREE, FREE, FREE, EMPTY), max_size=60)


@dataclass
class Pair:
    """The allocator and the oracle, doing the same."""

    allocator: Allocator
    oracle: Oracle
    live: list[tuple[int, tuple[Pool, int]]] = field(default_factory=list)
    bases: dict[Pool, int] = field(default_factory=dict)

    def do(self, kind: str, value: int, stream: int) -> None:
        if kind == "malloc" and value:
            self.malloc(value, stream)
        elif kind == "malloc":
            assert self.allocator.malloc(0, stream) == 0
        elif kind == "free" and self.live:
            address, place = self.live.pop(value % len(self.live))
            self.allocator.free(address)
            del self.oracle.live[place]
        elif kind == "empty":
            self.allocator.empty_cache()
            self.oracle.empty_cache()

    def malloc(self, nbytes: int, stream: int) -> None:
        place = self.oracle.malloc(nbytes, stream)
        if place is None:
            with pytest.raises(OutOfMemory) as caught:
                self.allocator.malloc(nbytes, stream)
            error = caught.value
            assert (error.requested, error.allocated, error.reserved) == (nbytes, self.oracle.allocated, self.oracle.reserved)
            assert error.capacity == self.oracle.capacity
        else:
            address = self.allocator.malloc(nbytes, stream)
            self.live.append((address, place))
            # The oracle has an address range that starts at 0 for each pool of expandable segments.
            self.bases.setdefault(place[0], address - place[1] if self.oracle.settings.expandable_segments else 0)
            assert address == self.bases[place[0]] + place[1]

    def check(self) -> None:
        allocator, oracle = self.allocator, self.oracle
        assert allocator.allocated == oracle.allocated
        assert allocator.reserved == oracle.reserved
        assert allocator.requested == oracle.requested
        assert allocator.peak_allocated == oracle.peak_allocated
        assert allocator.peak_reserved == oracle.peak_reserved
        assert allocator.num_segments == len(oracle.segments)
        assert allocator.segments == {start: end - start for _, start, end in oracle.segments}
        blocks = {self.bases[pool] + address: size for (pool, address), (size, _) in oracle.live.items()}
        assert allocator.blocks == blocks
        gaps = [(self.bases.get(pool, 0), *gap) for pool in self.pools() for gap in oracle.gaps(pool)]
        if all(pool in self.bases for pool in self.pools()):
            assert allocator.free_blocks == {base + address: size for base, size, address in gaps}

    def pools(self) -> set[Pool]:
        return {owner for owner, _, _ in self.oracle.segments} | set(self.oracle.pages)


@given(OPERATIONS, SETTINGS, CAPACITIES)
def test_it_agrees_with_the_oracle_in_every_statistic(
    operations: list[tuple[str, int, int]], settings: AllocatorSettings, capacity: int | None
) -> None:
    pair = Pair(Allocator(capacity, settings), Oracle(capacity, settings))
    for operation in operations:
        pair.do(*operation)
        pair.check()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(AllocatorSettings(expandable_segments=True), id="expandable"),
        pytest.param(AllocatorSettings(max_split_size_bytes=22 * MIB), id="split limit"),
        pytest.param(AllocatorSettings(roundup_power2_divisions=4), id="powers of two"),
    ],
)
def test_it_agrees_with_the_oracle_when_memory_is_short(settings: AllocatorSettings, seed: int) -> None:
    choose = random.Random(seed)
    capacity = choose.choice([80, 100, 120]) * MIB
    pair = Pair(Allocator(capacity, settings), Oracle(capacity, settings))
    for _ in range(80):
        # Whole MiB, so that sizes, limits and the capacity often meet exactly.
        size = choose.choice([2 * KIB, MIB // 2, MIB, 2 * MIB, 9 * MIB, 10 * MIB, 19 * MIB, 22 * MIB, 24 * MIB, 42 * MIB])
        kind = choose.choice(["malloc", "malloc", "free", "free", "free"])
        pair.do(kind, choose.randrange(40) if kind == "free" else size, choose.choice([0, 0, 0, 7]))
        pair.check()


@given(OPERATIONS, SETTINGS, CAPACITIES)
def test_blocks_never_overlap_and_no_byte_is_lost(
    operations: list[tuple[str, int, int]], settings: AllocatorSettings, capacity: int | None
) -> None:
    pair = Pair(Allocator(capacity, settings), Oracle(capacity, settings))
    allocator = pair.allocator
    for operation in operations:
        pair.do(*operation)
        ranges = sorted([*allocator.blocks.items(), *allocator.free_blocks.items()])
        assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(ranges))
        assert sum(allocator.blocks.values()) == allocator.allocated
        assert sum(size for _, size in ranges) == allocator.reserved
        assert allocator.requested <= allocator.allocated <= allocator.reserved
        assert capacity is None or allocator.peak_reserved <= capacity


@given(OPERATIONS, SETTINGS)
def test_when_all_is_freed_the_cache_is_whole_and_can_be_emptied(
    operations: list[tuple[str, int, int]], settings: AllocatorSettings
) -> None:
    pair = Pair(Allocator(None, settings), Oracle(None, settings))
    allocator = pair.allocator
    for operation in operations:
        pair.do(*operation)
    for address, _ in pair.live:
        allocator.free(address)
    assert (allocator.allocated, allocator.requested, allocator.blocks) == (0, 0, {})
    if not settings.expandable_segments:
        assert allocator.free_blocks == allocator.segments
    assert sum(allocator.free_blocks.values()) == allocator.reserved
    allocator.empty_cache()
    assert (allocator.reserved, allocator.num_segments, allocator.free_blocks) == (0, 0, {})


@given(OPERATIONS, st.sampled_from([50 * MIB, 64 * MIB, 101 * MIB]))
def test_out_of_memory_is_raised_only_where_nothing_fits(operations: list[tuple[str, int, int]], capacity: int) -> None:
    allocator = Allocator(capacity)
    live: list[int] = []
    for kind, value, _ in operations:
        if kind == "free" and live:
            allocator.free(live.pop(value % len(live)))
        elif kind == "malloc":
            size = rounded(value)
            try:
                live.append(allocator.malloc(value))
            except OutOfMemory:
                assert allocator.reserved + segment_bytes(size) > capacity
                for start, nbytes in allocator.segments.items():
                    assert any(start <= address < start + nbytes for address in allocator.blocks), "a free segment is left"
                    if (nbytes == 2 * MIB) == (size <= MIB):
                        free = [n for address, n in allocator.free_blocks.items() if start <= address < start + nbytes]
                        assert max(free, default=0) < size


@pytest.mark.parametrize(
    ("nbytes", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (21 * MIB - 1, 21 * MIB, 22 * MIB),
    ],
)
def test_blocks_are_rounded_and_segments_sized_as_pytorch_documents(nbytes: int, block: int, segment: int) -> None:
    allocator = Allocator()
    allocator.malloc(nbytes)
    rest = segment - block
    assert rounded(nbytes) == block
    assert segment_bytes(block) == allocator.reserved == segment
    # What remains of a large block is cut off only if it is more than 1 MiB, and counts as allocated otherwise.
    assert allocator.allocated == (block if block <= MIB or rest > MIB else segment)


def test_requests_are_rounded_to_a_division_of_a_power_of_two() -> None:
    # The example of PyTorch's documentation, in KiB: four divisions make 1024, 1280, 1536 and 1792 of 1024 to 2048.
    assert [rounded(n * KIB, 4) for n in (1024, 1025, 1200, 1280, 1793)] == [n * KIB for n in (1024, 1280, 1280, 1280, 2048)]
    assert rounded(2048, 4) == 2048
    assert rounded(1200 * KIB + 1, 1) == rounded(1200 * KIB + 1) == 1200 * KIB + 512


def test_settings_that_pytorch_refuses_are_refused() -> None:
    with pytest.raises(ValueError, match="max_split_size_bytes"):
        AllocatorSettings(max_split_size_bytes=20 * MIB - 1)
    with pytest.raises(ValueError, match="roundup_power2_divisions"):
        AllocatorSettings(roundup_power2_divisions=3)


def test_small_segments_take_ascending_addresses_and_large_ones_descending() -> None:
    addresses = DriverAddresses()
    small = [addresses(nbytes) for nbytes in (2 * MIB, 20 * MIB, 14 * MIB)]
    large = [addresses(nbytes) for nbytes in (22 * MIB, 100 * MIB)]
    assert small == sorted(small)
    assert large == sorted(large, reverse=True)
    assert max(large) < min(small)


def test_a_cached_block_serves_its_own_stream_only() -> None:
    allocator = Allocator()
    first = allocator.malloc(MIB, stream=0)
    allocator.free(first)
    assert allocator.malloc(MIB, stream=1) != first
    assert allocator.malloc(MIB, stream=0) == first
    assert allocator.num_segments == 2


def test_the_peaks_start_anew_when_they_are_reset() -> None:
    allocator = Allocator()
    large = allocator.malloc(30 * MIB)
    allocator.malloc(MIB)
    allocator.free(large)
    allocator.empty_cache()
    assert (allocator.peak_allocated, allocator.peak_reserved) == (31 * MIB, 32 * MIB)
    allocator.reset_peaks()
    assert (allocator.peak_allocated, allocator.peak_reserved) == (MIB, 2 * MIB)


def test_misuse_is_refused() -> None:
    allocator = Allocator()
    with pytest.raises(KeyError):
        allocator.free(12345)
    allocator.free(0)
    with pytest.raises(KeyError):
        replay([512], [Segment("s", [0, ~0, ~0])], allocator)
    with pytest.raises(ValueError, match="alive"):
        replay([512], [Segment("s", [0, 0])], Allocator())


@st.composite
def timelines(draw: st.DrawFn) -> tuple[list[int], list[Segment]]:
    """Sizes, and segments that hold some storages throughout, replace some, and allocate and free others."""
    count = draw(st.integers(2, 12))
    sizes = draw(st.lists(SIZES, min_size=count, max_size=count))
    held = range(draw(st.integers(0, count)))
    segments = [Segment("load", list(held), repeat=1)]
    for name in draw(st.lists(st.sampled_from("abc"), max_size=3)):
        timeline: list[int] = []
        live = set(held)
        for storage in draw(st.lists(st.integers(0, count - 1), max_size=25)):
            timeline.append(~storage if storage in live else storage)
            live ^= {storage}
        timeline += [storage if storage in held else ~storage for storage in sorted(live ^ set(held))]
        positions = draw(st.lists(st.integers(0, len(timeline)), max_size=3))
        marks = tuple((position, draw(st.sampled_from(["forward", "backward", "load"]))) for position in sorted(positions))
        segments.append(Segment(name, timeline, marks, repeat=draw(st.integers(1, 5))))
    return sizes, segments


def unrolled(segments: Sequence[Segment]) -> tuple[list[Segment], list[tuple[int, int]]]:
    """Every repetition as a segment, and (segment, repetition) of each."""
    origins = [(index, k) for index, segment in enumerate(segments) for k in range(segment.repeat)]
    return [replace(segments[index], repeat=1) for index, _ in origins], origins


def one_by_one(sizes: list[int], segments: Sequence[Segment], allocator: Allocator, stop: bool) -> Replay:
    """The replay, by `malloc` and `free`, with the peaks reset around every event."""
    addresses: dict[int, int] = {}
    peaks: dict[str, list[int]] = {}
    phase, peak, reserved_peak = "load", 0, 0
    peak_at, failure, at_peak, at_failure = None, None, {}, {}
    expanded, origins = unrolled(segments)

    def note() -> None:
        kept = peaks.setdefault(phase, [0, 0])
        kept[:] = max(kept[0], allocator.peak_allocated), max(kept[1], allocator.peak_reserved)

    def blocks() -> dict[int, int]:
        return {storage: allocator.blocks[address] for storage, address in addresses.items() if address}

    for segment, (index, repetition) in zip(expanded, origins, strict=True):
        for position in range(len(segment.timeline) + 1):
            for mark, name in segment.marks:
                if mark == position:
                    phase = name
                    allocator.reset_peaks()
                    note()
            if position == len(segment.timeline):
                break
            event = segment.timeline[position]
            allocator.reset_peaks()
            if event < 0:
                allocator.free(addresses.pop(~event))
            else:
                try:
                    addresses[event] = allocator.malloc(sizes[event])
                except OutOfMemory as error:
                    failure = Failure(index, repetition, position, event, error.allocated, error.reserved)
                    at_failure = blocks()
                    if stop:
                        note()
                        break
                    allocator.capacity_bytes = None
                    addresses[event] = allocator.malloc(sizes[event])
            note()
            if allocator.allocated > peak:
                peak, peak_at, at_peak = allocator.allocated, Moment(index, position), blocks()
        if failure and stop:
            break
    phases = tuple(PhasePeak(name, *values) for name, values in peaks.items())
    reserved_peak = max((values[1] for values in peaks.values()), default=0)
    kept = at_failure if failure else at_peak
    return Replay(peak, reserved_peak, peak_at, failure, phases, kept, allocator.allocated, allocator.reserved, ())


@given(timelines(), SETTINGS, CAPACITIES, st.booleans())
def test_the_replay_agrees_with_requests_made_one_by_one(
    timeline: tuple[list[int], list[Segment]], settings: AllocatorSettings, capacity: int | None, stop: bool
) -> None:
    sizes, segments = timeline
    result = replay(sizes, segments, Allocator(capacity, settings), stop_on_failure=stop)
    assert result == one_by_one(sizes, segments, Allocator(capacity, settings), stop)


@given(timelines(), SETTINGS, CAPACITIES)
def test_leaving_out_equal_repetitions_changes_nothing(
    timeline: tuple[list[int], list[Segment]], settings: AllocatorSettings, capacity: int | None
) -> None:
    sizes, segments = timeline
    expanded, origins = unrolled(segments)
    allocators = Allocator(capacity, settings), Allocator(capacity, settings)
    stopping, complete = replay(sizes, segments, allocators[0]), replay(sizes, expanded, allocators[1])
    at, failure = complete.peak_at, complete.failure
    if at is not None:
        at = at._replace(segment=origins[at.segment][0])
    if failure is not None:
        index, repetition = origins[failure.segment]
        failure = failure._replace(segment=index, repetition=repetition)
    assert stopping == replace(complete, peak_at=at, failure=failure)
    assert allocators[0].state() == allocators[1].state()
    assert allocators[0].free_blocks == allocators[1].free_blocks


@given(timelines(), SETTINGS, CAPACITIES)
def test_the_blocks_at_the_peak_or_the_failure_add_up(
    timeline: tuple[list[int], list[Segment]], settings: AllocatorSettings, capacity: int | None
) -> None:
    sizes, segments = timeline
    result = replay(sizes, segments, Allocator(capacity, settings))
    if result.failure:
        moment, total = Moment(result.failure.segment, result.failure.position - 1), result.failure.allocated
    else:
        moment, total = result.peak_at or Moment(0, -1), result.peak_allocated
    assert sum(result.block_sizes.values()) == total
    alive = live_at(segments, *moment)
    assert set(result.block_sizes) == {storage for storage in alive if sizes[storage]}
    assert all(size >= sizes[storage] for storage, size in result.block_sizes.items())
    assert max((peak.allocated_peak_bytes for peak in result.phases), default=0) == result.peak_allocated
    assert max((peak.reserved_peak_bytes for peak in result.phases), default=0) == result.peak_reserved


class Counting(Allocator):
    """Counts its runs."""

    runs = 0

    def run(self, timeline: Iterable[int], storages: Storages, trail: Trail, stream: int = 0) -> None:
        self.runs += 1
        super().run(timeline, storages, trail, stream)


def test_repetitions_stop_at_the_first_that_changes_nothing() -> None:
    allocator = Counting()
    replay([3 * MIB, 5 * MIB], [Segment("step", [0, 1, ~0, ~1], repeat=1000)], allocator)
    # The first makes the segment, the second finds and leaves it.
    assert allocator.runs == 2


def test_repetitions_go_on_while_the_phase_at_their_start_changes() -> None:
    segments = [Segment("fill", [0, ~0]), Segment("s", [0, ~0, 1, ~1], marks=((2, "backward"),), repeat=4)]
    result = replay([3 * MIB, 2 * MIB], segments, Allocator())
    # From the second repetition on, the first two events belong to the phase in which the one before it ended.
    assert [(peak.phase, peak.allocated_peak_bytes) for peak in result.phases] == [("load", 3 * MIB), ("backward", 3 * MIB)]


def test_repetitions_go_on_while_storages_change_places() -> None:
    # Storages 0 and 1 change their blocks in every repetition; the set of the blocks in use stays the same.
    sizes, load, end = [30 * MIB] * 4, Segment("load", [0, 1, 2, ~2]), Segment("end", [~0])
    left = {}
    for repeat in (0, 1, 2):
        allocator = Allocator()
        replay(sizes, [load, Segment("swap", [2, ~1, 3, ~0, 1, ~3, 0, ~2], repeat=repeat), end], allocator)
        left[repeat] = allocator.blocks
    assert left[0] == left[2] != left[1]


@pytest.mark.parametrize("settings", [AllocatorSettings(), AllocatorSettings(expandable_segments=True)])
def test_the_state_is_another_once_memory_was_taken_from_the_driver(settings: AllocatorSettings) -> None:
    allocator = Allocator(settings=settings)
    allocator.free(allocator.malloc(MIB))
    filled = allocator.state()
    allocator.free(allocator.malloc(MIB))
    assert allocator.state() == filled
    allocator.empty_cache()
    emptied = allocator.state()
    assert emptied != filled
    allocator.free(allocator.malloc(MIB))
    allocator.empty_cache()
    # The next segment's address may depend on how many there have been; that of an expandable range does not.
    assert (allocator.state() == emptied) == settings.expandable_segments


def test_a_failure_can_be_passed_to_see_what_would_have_been_needed() -> None:
    sizes, segments = [30 * MIB, 40 * MIB, 50 * MIB], [Segment("s", [0, 1, 2, ~0, ~1, ~2])]
    stopped = replay(sizes, segments, Allocator(64 * MIB))
    assert stopped.failure == Failure(0, 0, 1, 1, allocated=30 * MIB, reserved=30 * MIB)
    assert (stopped.peak_allocated, stopped.block_sizes) == (30 * MIB, {0: 30 * MIB})
    passed = replay(sizes, segments, Allocator(64 * MIB), stop_on_failure=False)
    assert passed.failure == stopped.failure
    assert (passed.peak_allocated, passed.peak_at, passed.allocated) == (120 * MIB, Moment(0, 2), 0)


def test_the_series_keeps_the_maxima() -> None:
    sizes, segments = [30 * MIB, 40 * MIB], [Segment("s", [0, ~0, 1, ~1, 0, ~0], repeat=2)]
    full = replay(sizes, segments, Allocator(), points=100).series
    assert [allocated // MIB for allocated, _ in full] == [30, 0, 40, 0, 30, 0] * 2
    assert [reserved // MIB for _, reserved in full] == [30, 30, 70, 70, 70, 70] + [70] * 6
    coarse = replay(sizes, segments, Allocator(), points=5).series
    assert [tuple(max(pair) for pair in zip(*full[k : k + 3], strict=True)) for k in range(0, 12, 3)] == list(coarse)
    assert replay(sizes, segments, Allocator()).series == ()
