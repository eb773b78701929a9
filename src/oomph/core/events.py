"""What one rank of a training run asks of the allocator, in order: the output of the layout, the input of the replay.

A storage is a number. Columns indexed by it say how large it is and where it came from. A segment is a piece of the
timeline in which ``s`` (zero or more) allocates storage ``s`` and ``~s`` (negative) frees it; a segment may repeat, as
the micro-batches after the first do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from oomph.records import Request


class Kind(NamedTuple):
    """What a storage is, whatever the batch and the layer: ``module`` holds ``{}`` where the layer's number goes."""

    op: str
    module: str
    phase: str
    role: str
    dtype: str


@dataclass(frozen=True)
class Segment:
    """A piece of the timeline, run ``repeat`` times. ``marks`` are (position, phase): the phase starts there."""

    name: str
    timeline: Sequence[int]
    marks: tuple[tuple[int, str], ...] = ()
    repeat: int = 1


def by_stream(timeline: Iterable[int], streams: Mapping[int, int], default: int = 0) -> Iterator[tuple[Iterable[int], int]]:
    """The timeline cut into stretches of one stream, each with its stream; the storages not in `streams` are on `default`."""
    if not streams:
        yield timeline, default
        return
    entries = list(timeline)
    others = {entry: stream for storage, stream in streams.items() for entry in (storage, ~storage)}
    start = 0
    for position in [position for position, entry in enumerate(entries) if entry in others]:
        yield entries[start:position], default
        yield entries[position : position + 1], others[entries[position]]
        start = position + 1
    yield entries[start:], default


@dataclass
class Events:
    """The storages of one rank as columns, and the segments that allocate and free them.

    `streams` has the CUDA stream of storages that are not allocated on the default one, which is 0. A stream's blocks come
    from pools of its own.
    """

    sizes: list[int] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    streams: dict[int, int] = field(default_factory=dict)

    def add(
        self, nbytes: int, shape: tuple[int, ...], kind: Kind, layer: int = -1, parameter: int = -1, stream: int = 0
    ) -> int:
        """A new storage; returns its number. ``layer`` and ``parameter`` are -1 where there is none."""
        self.sizes.append(nbytes)
        self.shapes.append(shape)
        self.kinds.append(kind)
        self.layers.append(layer)
        self.parameters.append(parameter)
        number = len(self.sizes) - 1
        if stream:
            self.streams[number] = stream
        return number

    def module(self, storage: int) -> str:
        """The path of the module that asked for the storage, with the layer's number."""
        return self.kinds[storage].module.replace("{}", str(self.layers[storage]))

    def request(self, storage: int) -> Request:
        """The storage as a record."""
        kind = self.kinds[storage]
        size, shape = self.sizes[storage], self.shapes[storage]
        return Request(size, shape, kind.dtype, kind.op, self.module(storage), kind.phase, kind.role)
