"""The allocator against an oracle that works everything out anew, and against the sizes that PyTorch documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomph.core.allocator import (
    Allocator,
    AllocatorSettings,
    DriverAddresses,
    OutOfMemory,
    Storages,
    Trail,
    rounded,
    segment_bytes,
)
from oomph.units import GIB, KIB, MIB

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
