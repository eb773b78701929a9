"""PyTorch's CUDA caching allocator, simulated: allocated and reserved bytes of a sequence of requests, to the byte.

`Allocator` follows ``DeviceCachingAllocator`` of ``c10/cuda/CUDACachingAllocator.cpp``, torch 2.13; what it holds from
the driver is in `oomph.core.reserve`. `replay` runs the timeline of a training step on it. Not modelled: private pools
of CUDA graphs, blocks used on a second stream (``record_stream``) and ``garbage_collection_threshold``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from operator import itemgetter
from typing import NamedTuple

from oomph.core.events import Segment, by_stream
from oomph.core.reserve import (
    DEFAULT_SETTINGS,
    MIN_BLOCK,
    SMALL_REQUEST,
    SMALL_SEGMENT,
    UNLIMITED,
    AddressPolicy,
    AllocatorSettings,
    DriverAddresses,
    Pool,
    Reserve,
    Trail,
    rounded,
    segment_bytes,
)
from oomph.records import PhasePeak

__all__ = [
    "AddressPolicy",
    "Allocator",
    "AllocatorSettings",
    "DriverAddresses",
    "Failure",
    "Moment",
    "OutOfMemory",
    "Replay",
    "State",
    "Storages",
    "Trail",
    "live_at",
    "replay",
    "rounded",
    "segment_bytes",
]


class OutOfMemory(Exception):
    """No cached block fits, and there is no room for a new one even after the cache was released.

    Attributes:
        requested: bytes asked for.
        allocated: bytes in use.
        reserved: bytes held from the driver, after the release.
        capacity: the most that may be reserved.
    """

    def __init__(self, requested: int, allocated: int, reserved: int, capacity: int) -> None:
        self.requested = requested
        self.allocated = allocated
        self.reserved = reserved
        self.capacity = capacity
        super().__init__(f"{requested} bytes requested, {allocated} allocated, {reserved} of {capacity} reserved")


class Storages:
    """The storages of a timeline: bytes asked for, bytes of the smallest block, and the address of each live one.

    `streams` has the CUDA streams of those that are not allocated on the stream of the run.
    """

    def __init__(
        self, sizes: Sequence[int], settings: AllocatorSettings = DEFAULT_SETTINGS, streams: Mapping[int, int] | None = None
    ) -> None:
        self.sizes, self.streams = sizes, streams or {}
        self.rounded = list(map(rounded, sizes, repeat(settings.roundup_power2_divisions)))
        self.placed: dict[int, int] = {}

    def requested(self) -> int:
        """Bytes asked for by the live storages."""
        return sum(map(self.sizes.__getitem__, self.placed))

    def num_blocks(self) -> int:
        """Live storages that have a block, which those of 0 bytes have not."""
        return sum(map(bool, self.placed.values()))


class State(NamedTuple):
    """A copy of what an allocator holds; its free blocks follow from it. See `Allocator.state`."""

    blocks: dict[int, int]
    segments: dict[int, int]
    segments_made: int
    unmapped: list[dict[int, int]]


class Allocator(Reserve):
    """The allocator of one device.

    Attributes:
        allocated: bytes of the blocks in use, with what they hold beyond their requests (``allocated_bytes``).
        requested: bytes asked for by the blocks in use (``requested_bytes``).
        peak_allocated: the most that `allocated` has been since the start or the last `reset_peaks`.
    """

    def __init__(
        self,
        capacity_bytes: int | None = None,
        settings: AllocatorSettings = DEFAULT_SETTINGS,
        address_policy: AddressPolicy | None = None,
    ) -> None:
        super().__init__(capacity_bytes, settings, address_policy)
        self.allocated = self.requested = self.peak_allocated = 0
        expandable = settings.expandable_segments
        self._unlimited = self._max_split == UNLIMITED
        self._plain = self._unlimited and not expandable
        self._split_limit = UNLIMITED if expandable else self._max_split
        self._large_rest = MIN_BLOCK if expandable else SMALL_REQUEST + 1
        self._live: dict[int, int] = {}
        self._handles: dict[int, tuple[Storages, int]] = {}

    @property
    def blocks(self) -> dict[int, int]:
        """Address to bytes of the blocks in use."""
        return dict(self._live)

    def state(self) -> State:
        """All that decides what requests do: if a repetition of events leaves it as it was, so will the next."""
        return State(self.blocks, self.segments, self._segments_made, [dict(pool.unmapped) for pool in self._pools.values()])

    def reset_peaks(self) -> None:
        """``torch.cuda.reset_peak_memory_stats``."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def malloc(self, nbytes: int, stream: int = 0) -> int:
        """The address of a block for `nbytes` bytes; 0, and no block, for 0 bytes.

        Raises:
            OutOfMemory: the capacity has no room for it.
        """
        storages = Storages((nbytes,), self.settings)
        self.run((0,), storages, Trail(), stream)
        address = storages.placed[0]
        if address:
            self._handles[address] = storages, stream
        return address

    def free(self, address: int) -> None:
        """Gives back the block at an address that `malloc` returned; nothing happens at 0.

        Raises:
            KeyError: there is no such block.
        """
        if address:
            storages, stream = self._handles.pop(address)
            self.run((~0,), storages, Trail(), stream)

    def adopt(self, segments: Iterable[tuple[int, int]], blocks: Iterable[tuple[int, int, int]]) -> None:
        """Takes over the state that a memory snapshot shows: one stream, no expandable segments.

        Args:
            segments: address and bytes of each segment; one of 2 MiB belongs to the small pool.
            blocks: address, block bytes and requested bytes of each block in use. `free` takes their addresses.
        """
        blocks_of = sorted(blocks)
        for base, nbytes in segments:
            pool = self._pool(0, nbytes == SMALL_SEGMENT)
            self._segments[base] = nbytes
            self._reserve(nbytes)
            position = base
            for address, size, requested in (block for block in blocks_of if base <= block[0] < base + nbytes):
                self._add_free(pool, position, address)
                position = address + size
                storages = Storages((requested,), self.settings)
                storages.placed[0] = address
                self._handles[address] = storages, 0
                self._live[address] = size
                self.allocated += size
                self.requested += requested
            self._add_free(pool, position, base + nbytes)
        self.reset_peaks()

    def run(self, timeline: Iterable[int], storages: Storages, trail: Trail, stream: int = 0) -> None:
        """Runs events: ``s`` allocates storage ``s``, ``~s`` frees it.

        Args:
            timeline: the events.
            storages: the sizes, and the live storages, which the run updates.
            trail: takes an entry for every event. Events that it already holds count as the ones before these.
            stream: the CUDA stream of storages that name none; each stream has pools of its own.

        Raises:
            OutOfMemory: in the event whose position is ``len(trail.allocated)``. It changed nothing but the cache, and
                the run can go on from there.
            KeyError: an event freed a storage that was not alive. The allocator is of no more use then.
            ValueError: an event allocated a storage that was alive. Likewise.
        """
        self._trail = trail
        requested, untracked = storages.requested(), len(self._live) - storages.num_blocks()
        try:
            for events, own in by_stream(timeline, storages.streams, stream):
                self._run(events, storages, trail, self._pool(own, True), self._pool(own, False))
        finally:
            self.requested += storages.requested() - requested
            self.peak_allocated = max(self.peak_allocated, max(trail.allocated, default=0))
        if len(self._live) - storages.num_blocks() != untracked:
            raise ValueError("the timeline allocates a storage that is alive")

    def _run(self, timeline: Iterable[int], storages: Storages, trail: Trail, small: Pool, large: Pool) -> None:
        """The inner loop: ``malloc``, ``get_free_block``, ``should_split``, ``alloc_found_block`` and ``free_block``."""
        small_blocks, large_blocks, sizes, placed = small.addresses, large.addresses, storages.rounded, storages.placed
        starts, ends, live, segments = self._starts, self._ends, self._live, self._segments
        plain, unlimited, split_limit, large_rest = self._plain, self._unlimited, self._split_limit, self._large_rest
        allocated, record = self.allocated, trail.allocated.append
        for event in timeline:
            if event >= 0:
                size = sizes[event]
                if size > SMALL_REQUEST:
                    pool, addresses, least_rest = large, large_blocks, large_rest
                elif size:
                    pool, addresses, least_rest = small, small_blocks, MIN_BLOCK
                else:
                    placed[event] = 0
                    record(allocated)
                    continue
                block = size if addresses.get(size) else pool.size_of_fit(size)
                if block and (plain or (unlimited and pool.is_best(block))):
                    address = addresses[block].pop(0)
                else:
                    self.allocated = allocated
                    address = self._find(pool, size, storages.sizes[event])
                    block = starts[address]
                del starts[address]
                if (rest := block - size) >= least_rest and size < split_limit:
                    cut = address + size
                    starts[cut] = ends[address + block] = rest
                    if rest in addresses:
                        insort(addresses[rest], cut)
                    else:
                        addresses[rest] = [cut]
                        insort(pool.sizes, rest)
                    block = size
                else:
                    del ends[address + block]
                placed[event] = address
                live[address] = block
                allocated += block
            elif address := placed.pop(~event):
                size = live.pop(address)
                allocated -= size
                pool, addresses = (large, large_blocks) if size > SMALL_REQUEST else (small, small_blocks)
                end = address + size
                if end in starts and end not in segments:
                    rest = starts.pop(end)
                    del addresses[rest][bisect_left(addresses[rest], end)]
                    end += rest
                if address in ends and address not in segments:
                    rest = ends.pop(address)
                    address -= rest
                    del addresses[rest][bisect_left(addresses[rest], address)]
                starts[address] = ends[end] = size = end - address
                if size in addresses:
                    insort(addresses[size], address)
                else:
                    addresses[size] = [address]
                    insort(pool.sizes, size)
            record(allocated)
        self.allocated = allocated

    def _find(self, pool: Pool, size: int, requested: int) -> int:
        """A free block, cached or new, taken out of the pool (``malloc`` and its retries); returns its address."""
        address = self._best_fit(pool, size)
        if address is None:
            address = self._allocate(pool, size)
        if address is None and self._release_oversize(pool, size):
            address = self._allocate(pool, size)
        if address is None:
            self._release_cached()
            address = self._allocate(pool, size)
        if address is None:
            raise OutOfMemory(requested, self.allocated, self.reserved, self.capacity_bytes or 0)
        pool.take(address, self._starts[address])
        return address


class Failure(NamedTuple):
    """The first request that could not be served, and the bytes allocated and reserved at that moment."""

    segment: int
    repetition: int
    position: int
    storage: int
    allocated: int
    reserved: int


class Moment(NamedTuple):
    """The time just after the event at `position` of the timeline of segment number `segment`."""

    segment: int
    position: int


@dataclass(frozen=True)
class Replay:
    """What a timeline needs.

    Attributes:
        peak_allocated: the most bytes allocated.
        peak_reserved: the most bytes reserved.
        peak_at: when `peak_allocated` is first reached; None if no event exceeds what was allocated before the first.
        failure: None if every request was served.
        phases: the peaks of each phase, in the order in which they first start. A phase lasts from its mark to the next
            one, also across segments, and starts with what the one before it left. Before the first mark it is ``load``.
        block_sizes: storage to bytes of its block for the storages alive at the failure or, without one, at `peak_at`.
            Their sum is what was allocated then, less the blocks that the allocator held before the replay.
        allocated: bytes allocated at the end.
        reserved: bytes reserved at the end.
        series: (allocated, reserved) over time: the maxima of equally many events each, of the repetitions that ran.
    """

    peak_allocated: int
    peak_reserved: int
    peak_at: Moment | None
    failure: Failure | None
    phases: tuple[PhasePeak, ...]
    block_sizes: dict[int, int]
    allocated: int
    reserved: int
    series: tuple[tuple[int, int], ...]


def replay(
    sizes: Sequence[int],
    segments: Sequence[Segment],
    allocator: Allocator,
    *,
    streams: Mapping[int, int] | None = None,
    stop_on_failure: bool = True,
    points: int = 0,
    watch: Callable[[int, Trail], object] = lambda index, trail: None,
) -> Replay:
    """Runs all segments.

    A repetition that leaves the allocator, the storages and the phase exactly as they were before it is the last of its
    segment: all later ones would do the same again.

    Args:
        sizes: bytes of each storage; one of 0 bytes allocates nothing.
        segments: the timeline.
        allocator: a new one, as a rule. It is changed.
        streams: the CUDA streams of the storages that are not allocated on the default one (`Events.streams`).
        stop_on_failure: whether the first failure ends the replay. Otherwise it lifts the capacity, and the replay goes
            on from there.
        points: the most points that the series may have; 0 for none.
        watch: called after every repetition, with the number of its segment and its trail.

    Raises:
        KeyError: a storage is freed that is not alive.
        ValueError: a storage is allocated that is alive.
    """
    storages, record = Storages(sizes, allocator.settings, streams), _Record(allocator, points)
    for index, segment in enumerate(segments):
        for repetition in range(segment.repeat):
            phase, placed, state = record.phase, dict(storages.placed), allocator.state()
            trail = Trail()
            try:
                allocator.run(segment.timeline, storages, trail)
            except OutOfMemory as error:
                position = len(trail.allocated)
                storage = segment.timeline[position]
                record.failure = Failure(index, repetition, position, storage, error.allocated, error.reserved)
                record.block_sizes = _block_sizes(storages.placed, allocator.blocks)
                if not stop_on_failure:
                    allocator.capacity_bytes = None
                    allocator.run(segment.timeline[position:], storages, trail)
            record.add(index, segment, trail, placed, state.blocks)
            watch(index, trail)
            if record.failure and stop_on_failure:
                return record.finish(allocator)
            if (phase, placed, state) == (record.phase, storages.placed, allocator.state()):
                break
    return record.finish(allocator)


def live_at(segments: Sequence[Segment], segment_index: int, position: int) -> list[int]:
    """The storages alive just after an event, in the order of their allocation; those of 0 bytes are among them.

    Args:
        segments: the timeline.
        segment_index: number of the segment. In each of its repetitions, the same storages are alive.
        position: of the event in the segment's timeline; -1 for the time before its first event.

    Raises:
        KeyError: a storage is freed that is not alive.
    """
    alive: dict[int, None] = {}
    timelines = [segment.timeline for segment in segments[: segment_index + 1]]
    timelines[-1] = timelines[-1][: position + 1]
    for timeline in timelines:
        for event in timeline:
            if event >= 0:
                alive[event] = None
            else:
                del alive[~event]
    return list(alive)


def _block_sizes(placed: dict[int, int], blocks: dict[int, int]) -> dict[int, int]:
    return {storage: blocks[address] for storage, address in placed.items() if address}


class _Record:
    """What a replay keeps of its repetitions, one after the other."""

    def __init__(self, allocator: Allocator, points: int) -> None:
        self.phase = "load"
        self.failure: Failure | None = None
        self.block_sizes: dict[int, int] = {}
        self._allocated = self._peak_allocated = allocator.allocated
        self._reserved = self._peak_reserved = allocator.reserved
        self._peak_at: Moment | None = None
        self._before_peak: tuple[dict[int, int], list[int], list[int]] = {}, [], []
        self._phases: dict[str, tuple[int, int]] = {}
        self._points = points
        self._series: list[tuple[int, int]] = []

    def add(self, index: int, segment: Segment, trail: Trail, placed: dict[int, int], blocks: dict[int, int]) -> None:
        """Adds a repetition. `placed` and `blocks` are the addresses of the storages and the blocks before it."""
        levels = [self._allocated, *trail.allocated]
        peak = max(levels)
        if peak > self._peak_allocated:
            position = levels.index(peak)
            self._peak_allocated, self._peak_at = peak, Moment(index, position - 1)
            self._before_peak = _block_sizes(placed, blocks), list(segment.timeline[:position]), levels
        if self._points:
            self._add_series(levels, trail.reserved)
        self._add_phases(segment, levels, trail.reserved)
        self._allocated = levels[-1]

    def _add_phases(self, segment: Segment, levels: list[int], changes: list[tuple[int, int]]) -> None:
        ran = len(levels) - 1
        end_of_all = min(ran + 1, len(segment.timeline)), ""
        marks = sorted((mark for mark in segment.marks if mark[0] <= ran), key=itemgetter(0))
        first_mark, _ = [*marks, end_of_all][0]
        before = [(0, self.phase)] if first_mark else []
        for (start, phase), (end, _) in pairwise([*before, *marks, end_of_all]):
            first, last = (bisect_left(changes, position, key=itemgetter(0)) for position in (start, end))
            reserved = [self._reserved, *map(itemgetter(1), changes[first:last])]
            allocated_peak, reserved_peak = self._phases.get(phase, (0, 0))
            self._phases[phase] = max(allocated_peak, max(levels[start : end + 1])), max(reserved_peak, *reserved)
            self._peak_reserved = max(self._peak_reserved, *reserved)
            self._reserved, self.phase = reserved[-1], phase

    def _add_series(self, levels: list[int], changes: list[tuple[int, int]]) -> None:
        reserved, changed = self._reserved, dict(changes)
        for event, allocated in enumerate(levels[1:]):
            reserved = changed.get(event, reserved)
            self._series.append((allocated, reserved))

    def finish(self, allocator: Allocator) -> Replay:
        """The result, once the last repetition was added."""
        width = max(1, -(-len(self._series) // max(1, self._points)))
        chunks = [self._series[start : start + width] for start in range(0, len(self._series), width)]
        return Replay(
            peak_allocated=self._peak_allocated,
            peak_reserved=self._peak_reserved,
            peak_at=self._peak_at,
            failure=self.failure,
            phases=tuple(PhasePeak(phase, *peaks) for phase, peaks in self._phases.items()),
            block_sizes=self.block_sizes if self.failure else self._blocks_at_peak(),
            allocated=allocator.allocated,
            reserved=allocator.reserved,
            series=tuple((max(chunk)[0], max(map(itemgetter(1), chunk))) for chunk in chunks),
        )

    def _blocks_at_peak(self) -> dict[int, int]:
        """The block of a storage is as large as the step that its event made in the bytes allocated."""
        sizes, timeline, levels = self._before_peak
        for event, (before, after) in zip(timeline, pairwise(levels), strict=False):
            if event < 0:
                sizes.pop(~event, None)
            elif after > before:
                sizes[event] = after - before
        return sizes
