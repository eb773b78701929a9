"""What the CUDA caching allocator holds from the driver: segments, expandable ranges, and the free blocks in them.

Every rule names its source: functions of ``c10/cuda/CUDACachingAllocator.cpp`` and constants of
``c10/core/AllocatorConfig.h``, torch 2.13.

A pool keeps the addresses of its free blocks by size, which is the order of ``BlockComparatorSize``: by size, then by
address. Two dictionaries give the size of the free block that starts, or ends, at an address.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from oomph.units import MIB

MIN_BLOCK: Final = 512
SMALL_REQUEST: Final = MIB
SMALL_SEGMENT: Final = 2 * MIB
LARGE_SEGMENT: Final = 20 * MIB
MIN_LARGE_REQUEST: Final = 10 * MIB
LARGE_ROUNDING: Final = 2 * MIB

UNLIMITED: Final = 1 << 62
_FIRST_ADDRESS: Final = 1 << 47
_RANGE: Final = LARGE_SEGMENT << 24

AddressPolicy = Callable[[int], int]
"""Bytes of a new segment to its address, never 0: what ``cudaMalloc`` decides. Segments must not overlap."""


def rounded(nbytes: int, divisions: int = 0) -> int:
    """Bytes of the smallest block for a request (``round_size``, ``roundup_power2_next_division``); 0 for 0 bytes.

    `divisions` above 1 cuts the way from each power of two to the next into that many steps, and rounds up to a step.
    """
    if divisions > 1 and nbytes > MIN_BLOCK * divisions:
        step = (1 << (nbytes.bit_length() - 1)) // divisions
        return -(-nbytes // step) * step
    return (nbytes + MIN_BLOCK - 1) & -MIN_BLOCK


def segment_bytes(size: int) -> int:
    """Bytes of the new segment for a rounded request (``get_allocation_size``)."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < MIN_LARGE_REQUEST:
        return LARGE_SEGMENT
    return -(-size // LARGE_ROUNDING) * LARGE_ROUNDING


@dataclass(frozen=True)
class AllocatorSettings:
    """The entries of ``PYTORCH_ALLOC_CONF`` that are modelled, with PyTorch's defaults.

    Attributes:
        expandable_segments: grow one address range per pool and stream by pages instead of allocating segments.
        max_split_size_bytes: blocks of at least this size are never split; None for no limit.
        roundup_power2_divisions: see `rounded`; 0 and 1 turn it off.

    Raises:
        ValueError: a value that ``AcceleratorAllocatorConfig::parseArgs`` refuses.
    """

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    roundup_power2_divisions: int = 0

    def __post_init__(self) -> None:
        if self.max_split_size_bytes is not None and self.max_split_size_bytes < LARGE_SEGMENT:
            raise ValueError(f"max_split_size_bytes is {self.max_split_size_bytes}, less than {LARGE_SEGMENT}")
        if self.roundup_power2_divisions < 0 or self.roundup_power2_divisions.bit_count() > 1:
            raise ValueError(f"roundup_power2_divisions is {self.roundup_power2_divisions}, not a power of two")


DEFAULT_SETTINGS: Final = AllocatorSettings()


class DriverAddresses:
    """Segments of up to 20 MiB take ascending addresses, larger ones descending addresses below them.

    The driver's choice is no part of PyTorch. It decides between free blocks of equal size, and thereby which later
    request finds one. This order is the one that reproduces reserved bytes measured on a Tesla T4. Drivers differ: in
    memory snapshots of other GPUs, segments of 20 MiB descend as well.
    """

    def __init__(self) -> None:
        self._above = self._below = _FIRST_ADDRESS

    def __call__(self, nbytes: int) -> int:
        """The address of a new segment of `nbytes` bytes."""
        if nbytes <= LARGE_SEGMENT:
            self._above += nbytes
            return self._above - nbytes
        self._below -= nbytes
        return self._below


@dataclass
class Trail:
    """What a run saw: bytes allocated after each event, and each change of reserved as (event under way, bytes)."""

    allocated: list[int] = field(default_factory=list)
    reserved: list[tuple[int, int]] = field(default_factory=list)


class Pool:
    """``BlockPool`` of one stream.

    Attributes:
        addresses: size to the ascending addresses of the free blocks of that size; some lists are empty.
        sizes: the keys of `addresses`, ascending.
        page_bytes: what is mapped at once with expandable segments.
        unmapped: start to end of the parts of the pool's address range that are not mapped.
    """

    def __init__(self, page_bytes: int, unmapped: dict[int, int]) -> None:
        self.addresses: dict[int, list[int]] = {}
        self.sizes: list[int] = []
        self.page_bytes = page_bytes
        self.unmapped = unmapped

    def put(self, address: int, size: int) -> None:
        """Adds a free block."""
        if size in self.addresses:
            insort(self.addresses[size], address)
        else:
            self.addresses[size] = [address]
            insort(self.sizes, size)

    def take(self, address: int, size: int) -> None:
        """Removes a free block."""
        addresses = self.addresses[size]
        del addresses[bisect_left(addresses, address)]

    def size_of_fit(self, size: int) -> int:
        """The smallest size, from `size` on, of which there is a free block; 0 for none."""
        index = bisect_left(self.sizes, size)
        while index < len(self.sizes):
            if self.addresses[self.sizes[index]]:
                return self.sizes[index]
            del self.addresses[self.sizes.pop(index)]
        return 0

    def is_best(self, size: int) -> bool:
        """Whether the first free block of a size that fits is the best fit: it cannot grow, or there is no other."""
        addresses = self.addresses[size]
        return addresses[0] + size not in self.unmapped or (len(addresses) == 1 and not self.size_of_fit(size + 1))

    def free_from(self, size: int) -> Iterator[tuple[int, int]]:
        """Address and size of the free blocks of at least `size` bytes, in order."""
        while block := self.size_of_fit(size):
            for address in self.addresses[block]:
                yield address, block
            size = block + 1


class Reserve:
    """The memory held from the driver, and the free blocks in it.

    Attributes:
        capacity_bytes: the most that may be reserved; None for no limit.
        settings: the settings it was made with.
        reserved: bytes held from the driver (``reserved_bytes``).
        peak_reserved: the most that `reserved` has been since the start or the last `reset_peaks`.
    """

    def __init__(
        self,
        capacity_bytes: int | None = None,
        settings: AllocatorSettings = DEFAULT_SETTINGS,
        address_policy: AddressPolicy | None = None,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.settings = settings
        self.reserved = self.peak_reserved = 0
        self._address_policy = address_policy or DriverAddresses()
        self._max_split = settings.max_split_size_bytes or UNLIMITED
        self._pools: dict[tuple[int, bool], Pool] = {}
        self._segments: dict[int, int] = {}
        self._segments_made = 0
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._trail = Trail()

    @property
    def num_segments(self) -> int:
        """Segments held from the driver, expandable ranges not counted (``segment``)."""
        return len(self._segments)

    @property
    def segments(self) -> dict[int, int]:
        """Address to bytes of the segments held from the driver, expandable ranges left out."""
        return dict(self._segments)

    @property
    def free_blocks(self) -> dict[int, int]:
        """Address to bytes of the cached blocks."""
        return dict(self._starts)

    def empty_cache(self) -> None:
        """``torch.cuda.empty_cache``: gives every wholly free segment or page back to the driver."""
        self._trail = Trail()
        self._release_cached()

    def _pool(self, stream: int, small: bool) -> Pool:
        """``get_pool``. With expandable segments, each pool has an address range of its own that never ends."""
        if (stream, small) not in self._pools:
            base = _RANGE * (len(self._pools) + 1)
            unmapped = {base: base + _RANGE} if self.settings.expandable_segments else {}
            self._pools[stream, small] = Pool(SMALL_SEGMENT if small else LARGE_SEGMENT, unmapped)
        return self._pools[stream, small]

    def _best_fit(self, pool: Pool, size: int) -> int | None:
        """The address of the smallest free block that may serve the request (``get_free_block``).

        With a split limit, requests below it take no block above it, and the others none that is 20 MiB or more too
        large.
        """
        block = pool.size_of_fit(size)
        if not block:
            return None
        address = pool.addresses[block][0]
        if not pool.is_best(block):
            address = self._least_growing(pool, size)
            block = self._starts[address]
        if size < self._max_split <= block or (size >= self._max_split and block >= size + LARGE_SEGMENT):
            return None
        return address

    def _least_growing(self, pool: Pool, size: int) -> int:
        """The best fit where a block counts as large as it can grow by mapping the pages after it."""
        best, least = 0, UNLIMITED
        for address, block in pool.free_from(size):
            end = address + block
            grown = block + pool.unmapped.get(end, end) - end
            if grown >= least:
                break
            best, least = address, grown
        return best

    def _allocate(self, pool: Pool, size: int) -> int | None:
        """The address of a new free block; None if the capacity has no room for it (``alloc_block``)."""
        if self.settings.expandable_segments:
            return self._expand(pool, size)
        nbytes = segment_bytes(size)
        if not self._has_room(nbytes):
            return None
        address = self._address_policy(nbytes)
        self._segments[address] = nbytes
        self._segments_made += 1
        self._reserve(nbytes)
        self._add_free(pool, address, address + nbytes)
        return address

    def _expand(self, pool: Pool, size: int) -> int | None:
        """Maps pages where `size` bytes fit at the lowest address (``try_allocate_expandable_block``)."""
        starts = (hole - self._ends.get(hole, 0) for hole in sorted(pool.unmapped))
        start = next(start for start in starts if self._is_unused(pool, start, size))
        while (mapped := self._starts.get(start, 0)) < size:
            hole = start + mapped
            if not self._map(pool, hole, min(size - mapped, pool.unmapped[hole] - hole)):
                return None
        return start

    def _is_unused(self, pool: Pool, start: int, size: int) -> bool:
        """Whether `size` bytes from `start` are free or not mapped (``find_expandable_block``)."""
        position = start
        while position < start + size:
            if position in self._starts:
                position += self._starts[position]
            elif position in pool.unmapped:
                position = pool.unmapped[position]
            else:
                return False
        return True

    def _map(self, pool: Pool, start: int, size: int) -> bool:
        """Maps whole pages from `start` on; False if the capacity has no room for them (``map_block``)."""
        end = start + -(-size // pool.page_bytes) * pool.page_bytes
        if not self._has_room(end - start):
            return False
        hole_end = pool.unmapped.pop(start)
        if end < hole_end:
            pool.unmapped[end] = hole_end
        self._reserve(end - start)
        self._add_free(pool, start, end)
        return True

    def _unmap(self, pool: Pool, address: int, size: int) -> None:
        """Unmaps the whole pages inside a free block (``unmap_block``)."""
        page, end = pool.page_bytes, address + size
        first, last = -(-address // page) * page, end // page * page
        if first >= last:
            return
        self._remove_free(pool, address, size)
        self._add_free(pool, address, first)
        self._add_free(pool, last, end)
        hole = next((start for start, stop in pool.unmapped.items() if stop == first), first)
        pool.unmapped[hole] = pool.unmapped.pop(last, last)
        self._reserve(first - last)

    def _release_cached(self) -> None:
        """Gives wholly free segments and pages back to the driver (``release_cached_blocks``)."""
        for pool in self._pools.values():
            for address, size in list(pool.free_from(MIN_BLOCK)):
                if self.settings.expandable_segments:
                    self._unmap(pool, address, size)
                elif self._segments.get(address) == size:
                    self._release_segment(pool, address, size)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Gives back cached segments above the split limit, no more than needed (``release_available_cached_blocks``).

        Returns:
            Whether they make room for the request, taken as no smaller than the limit.
        """
        if self.settings.expandable_segments:
            return False
        needed = max(size, self._max_split)
        oversize = list(pool.free_from(self._max_split))
        smallest_enough = [(address, block) for address, block in oversize if block >= needed][:1]
        for address, block in smallest_enough or reversed(oversize):
            if needed > 0:
                self._release_segment(pool, address, block)
                needed -= block
        return needed <= 0

    def _release_segment(self, pool: Pool, address: int, size: int) -> None:
        """``release_block``: cudaFree of a segment that is one free block."""
        self._remove_free(pool, address, size)
        del self._segments[address]
        self._reserve(-size)

    def _has_room(self, nbytes: int) -> bool:
        return self.capacity_bytes is None or self.reserved + nbytes <= self.capacity_bytes

    def _reserve(self, nbytes: int) -> None:
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._trail.reserved.append((len(self._trail.allocated), self.reserved))

    def _add_free(self, pool: Pool, start: int, end: int) -> None:
        """Adds a free block, unless it is empty, and merges it with its free neighbours (``try_merge_blocks``)."""
        if start == end:
            return
        if end in self._starts and end not in self._segments:
            end += self._remove_free(pool, end, self._starts[end])
        if start in self._ends and start not in self._segments:
            size = self._ends[start]
            start -= self._remove_free(pool, start - size, size)
        self._starts[start] = self._ends[end] = end - start
        pool.put(start, end - start)

    def _remove_free(self, pool: Pool, address: int, size: int) -> int:
        """Removes a free block; returns its size."""
        pool.take(address, size)
        del self._starts[address], self._ends[address + size]
        return size
