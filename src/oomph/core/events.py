"""What one rank of a training run asks of the allocator, in order: the output of the layout, the input of the replay.

A storage is a number. Columns indexed by it say how large it is and where it came from. A segment is a piece of the
timeline in which ``s`` (zero or more) allocates storage ``s`` and ``~s`` (negative) frees it; a segment may repeat, as
the micro-batches after the first do.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass
class Events:
    """The storages of one rank as columns, and the segments that allocate and free them."""

    sizes: list[int] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def add(self, nbytes: int, shape: tuple[int, ...], kind: Kind, layer: int = -1, parameter: int = -1) -> int:
        """A new storage; returns its number. ``layer`` and ``parameter`` are -1 where there is none."""
        self.sizes.append(nbytes)
        self.shapes.append(shape)
        self.kinds.append(kind)
        self.layers.append(layer)
        self.parameters.append(parameter)
        return len(self.sizes) - 1

    def module(self, storage: int) -> str:
        """The path of the module that asked for the storage, with the layer's number."""
        return self.kinds[storage].module.replace("{}", str(self.layers[storage]))

    def request(self, storage: int) -> Request:
        """The storage as a record."""
        kind = self.kinds[storage]
        size, shape = self.sizes[storage], self.shapes[storage]
        return Request(size, shape, kind.dtype, kind.op, self.module(storage), kind.phase, kind.role)
