"""What a traced training step did, as plain data: every storage's birth and death, in order, and where it happened."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from oomph.core.events import Kind

NOWHERE = -1
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_LAYERS = 1 << 16


def place(stack: int, layer: int) -> int:
    """One number for a layer of a stack of layers, so that a column of places is a column of ints."""
    return stack * _LAYERS + layer


def stack_of(where: int) -> int:
    """The stack of a place."""
    return where // _LAYERS


def layer_of(where: int) -> int:
    """The layer of a place."""
    return where % _LAYERS


class Parameter(NamedTuple):
    """A parameter of the model: its full name, shape in elements, dtype by name, whether it trains, and its part."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    part: str = ""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter."""
        return self.numel * self.itemsize

    @property
    def module(self) -> str:
        """The path of the module that owns it."""
        return self.name.rpartition(".")[0]


class Storage(NamedTuple):
    """A storage of the traced step.

    Attributes:
        nbytes: bytes asked for.
        shape: elements, of the tensor that was born with it; `nbytes` is their product times `itemsize` unless padded.
        itemsize: bytes of one element.
        kind: what it is, with ``{}`` for the layer's number.
        home: the place it belongs to: that of its module, `NOWHERE` outside the layers.
        parameter: the index of the parameter whose weight, gradient or state it is, or -1.
        size: where the bytes are no product of dimensions, the name in `kernel_sizes.SIZES` of what gives them.
        arguments: what `size` is called with.
    """

    nbytes: int
    shape: tuple[int, ...]
    itemsize: int
    kind: Kind
    home: int
    parameter: int = -1
    size: str = ""
    arguments: tuple[int, ...] = ()


class Operation(NamedTuple):
    """An operator of the traced step that launches kernels.

    `flops` and `traffic` are sums of products: each inner tuple is one product. Only products of matrices, convolutions
    and attention count as floating-point operations, two for each multiplication.

    Attributes:
        piece: the piece of the timeline in which it runs.
        phase: as a storage's.
        name: of the operator.
        dtype: in which it computes.
        place: where in the model it runs.
        launches: of kernels; 0 where it is a part of an operator that is counted elsewhere.
        flops: floating-point operations.
        traffic: bytes read and written.
    """

    piece: str
    phase: str
    name: str
    dtype: str
    place: int
    launches: int
    flops: tuple[tuple[int, ...], ...]
    traffic: tuple[tuple[int, ...], ...]


class Stack(NamedTuple):
    """A stack of layers in the model, some of whose equal units were left out of the trace.

    Layers before `prefix` and after the units are unlike the others. `units` are in the trace, `full_units` in the model;
    each has `unit` layers.
    """

    path: str
    prefix: int
    unit: int
    units: int
    full_units: int
    suffix: int

    @property
    def layers(self) -> int:
        """Layers in the trace."""
        return self.prefix + self.unit * self.units + self.suffix

    @property
    def full_layers(self) -> int:
        """Layers in the model."""
        return self.prefix + self.unit * self.full_units + self.suffix


class Piece(NamedTuple):
    """A named piece of the timeline: [start, stop)."""

    name: str
    start: int
    stop: int


@dataclass
class Trace:
    """Storages as rows; `timeline` allocates ``s`` and frees ``~s``; `places` says where each of its entries happened."""

    storages: list[Storage] = field(default_factory=list)
    timeline: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    unclassified: set[str] = field(default_factory=set)
    operations: list[Operation] = field(default_factory=list)

    def skeleton(self) -> tuple[object, ...]:
        """What must be equal for two shapes to share a closed form: everything but sizes and operations."""
        kinds = [(s.kind, s.home, s.parameter, len(s.shape), s.itemsize, s.size, len(s.arguments)) for s in self.storages]
        return kinds, self.timeline, self.places, self.pieces, self.marks
