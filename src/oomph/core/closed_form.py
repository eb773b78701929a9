"""The size of everything a training step allocates, as a formula in the shape of the micro-batch.

A few traces at different shapes agree in everything but sizes. Every dimension of every storage is then a feature of the
shape (samples, tokens, images, their products, tokens rounded up as attention kernels round them) times an integer plus
an integer; a size is the product of its dimensions. The formulas are checked on a trace at a shape, and with a number
of layers, that they were not made from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from oomph.core.dimensions import (
    FEATURES,
    LOSS_CHUNKS,
    Dimension,
    Load,
    NotClosed,
    feature_table,
    features,
    fit_dimension,
    round_up,
)
from oomph.core.events import Kind
from oomph.core.kernel_sizes import SIZES
from oomph.core.trace import Parameter, Piece, Stack, Storage, Trace
from oomph.core.unroll import Unrolled, unroll
from oomph.core.work import Sample, Work, fit_work
from oomph.errors import UserError

__all__ = [
    "FEATURES",
    "LEAST_ROWS",
    "LOSS_CHUNKS",
    "ClosedForm",
    "Dimension",
    "Family",
    "Formula",
    "Load",
    "NotClosed",
    "constant_form",
    "features",
    "fit",
]

_MOST_BYTES = 1 << 62


class Family(NamedTuple):
    """Shapes that run the same operators.

    One sample is a case of its own, and so are no image and one image. Where the model's code loops over images, `images`
    is their exact number, and negative; else 2 stands for any larger number.
    """

    one_sample: bool
    images: int

    @classmethod
    def of(cls, shape: Sequence[int], loops_over_images: bool = False) -> Family:
        """The family of (samples, tokens, images)."""
        images = -shape[2] if loops_over_images and shape[2] > 1 else min(shape[2], 2)
        return cls(shape[0] == 1, images)

    def examples(self, image_tokens: int = 0) -> list[tuple[int, int, int]]:
        """Shapes to trace: two to make the formulas from and one to check them on, with room for their images' tokens.

        The tokens of the first two are one above a multiple of 128, so that every rounding up gives another value; whatever
        room is added, they are not as 2 to 3, which the samples are, as they stand or rounded up.
        """
        samples = (1, 1, 1) if self.one_sample else (2, 3, 5)
        per_sample = (2, 3, 4) if self.one_sample else (2, 3, 1)
        images = [abs(self.images) if self.images < 2 else b * n for b, n in zip(samples, per_sample, strict=True)]
        room = max(round_up(-(-n // b) * image_tokens, 128) for b, n in zip(samples, images, strict=True))
        return [(b, s + room, n) for b, s, n in zip(samples, (2049, 2945, 2621), images, strict=True)]


LEAST_ROWS = LOSS_CHUNKS * LOSS_CHUNKS
"""With fewer tokens in a micro-batch, the loss has fewer chunks than `LOSS_CHUNKS`, and no form is made."""


_CEIL8 = FEATURES.index("ceil8(tokens)")
_CHUNKS = {FEATURES.index("chunk"), FEATURES.index("last chunk")}


_PER_PARAMETER = {"aten.stack.default", "aten._foreach_norm.Scalar:output_per_tensor"}
"""Operators of the optimizer whose output has a row for each gradient, where their norm is computed."""


class Formula(NamedTuple):
    """A storage's size: the product of its dimensions times the bytes of an element, or `size` of the dimensions."""

    dimensions: tuple[Dimension, ...]
    itemsize: int
    size: str = ""


@dataclass
class ClosedForm:
    """The whole model's step: formulas, storages as columns that refer to them, and the timeline.

    `formula`, `kind`, `layer` and `parameter` have one entry for each storage; -1 stands for none. `work` is what the step
    computes and moves, `load` that of experts with a capacity.
    """

    formulas: list[Formula] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    formula: list[int] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    layer: list[int] = field(default_factory=list)
    parameter: list[int] = field(default_factory=list)
    timeline: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    unclassified: list[str] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    load: Load | None = None

    @functools.cached_property
    def pads_masks(self) -> bool:
        """Whether a mask is padded to a multiple of 8 tokens, which is not done where the tokens are one already."""
        padded = {n for n, f in enumerate(self.formulas) if any(d.feature == _CEIL8 for d in f.dimensions)}
        pads = {n for n, kind in enumerate(self.kinds) if kind.op == "aten.constant_pad_nd.default"}
        return any(f in padded and k in pads for f, k in zip(self.formula, self.kind, strict=True))

    @functools.cached_property
    def chunks(self) -> bool:
        """Whether the loss is computed in chunks, of which there are fewer with less than `LEAST_ROWS` tokens."""
        return any(dimension.feature in _CHUNKS for formula in self.formulas for dimension in formula.dimensions)

    @functools.cached_property
    def reached(self) -> frozenset[int]:
        """The parameters that get a gradient; one that is trained but not used gets none."""
        gradients = {number for number, kind in enumerate(self.kinds) if kind.role == "gradient"}
        return frozenset(p for p, kind in zip(self.parameter, self.kind, strict=True) if kind in gradients and p >= 0)

    @property
    def trained(self) -> int:
        """How many parameters get a gradient."""
        return len(self.reached)

    @functools.cached_property
    def wide(self) -> int:
        """How many parameters get a gradient in float32."""
        gradients = {n for n, kind in enumerate(self.kinds) if kind.role == "gradient" and kind.dtype == "float32"}
        return len({p for p, kind in zip(self.parameter, self.kind, strict=True) if kind in gradients and p >= 0})

    def features(self, shape: Sequence[int]) -> list[int]:
        """What dimensions are proportional to, in the order of `FEATURES`, at (samples, tokens, images)."""
        return list(features(shape, self.trained, self.wide, self.load).values())

    def dimensions(self, shape: Sequence[int]) -> npt.NDArray[np.int64]:
        """Every formula's dimensions at (samples, tokens, images), padded with ones: [formulas, 6]."""
        numbers = self.features(shape)
        if max(numbers) > _MOST_BYTES:
            raise _too_large(shape)
        values = np.array(numbers, dtype=np.int64)
        index, factor, offset = self._columns
        return values[index] * factor + offset

    def sizes(self, shape: Sequence[int]) -> npt.NDArray[np.int64]:
        """Every formula's bytes at (samples, tokens, images).

        Raises:
            UserError: a tensor has more bytes than any address space.
        """
        dimensions = self.dimensions(shape)
        products = dimensions.astype(np.float64).prod(axis=1) * self._itemsizes
        products[[number for number, _, _ in self._functions]] = 0
        if products.max(initial=0) > _MOST_BYTES:
            raise _too_large(shape)
        result: npt.NDArray[np.int64] = dimensions.prod(axis=1) * self._itemsizes
        for number, function, width in self._functions:
            result[number] = function(*dimensions[number, :width].tolist())
        return result

    def live_peak(self, shape: Sequence[int], accumulates: bool) -> int:
        """The most bytes alive at one time in the first step, each storage rounded up to 512 bytes.

        A lower bound of what one GPU without sharding allocates: the allocator adds what it cannot split off.

        Args:
            shape: (samples, tokens, images) of a micro-batch.
            accumulates: whether the step has more than one micro-batch.
        """
        rounded = -(-self.sizes(shape) // 512) * 512
        storages, signs = self._several if accumulates else self._single
        return int((rounded[storages] * signs).cumsum().max())

    @functools.cached_property
    def _several(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return self._step("load", "first", "next", "warmup/optimizer")

    @functools.cached_property
    def _single(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return self._step("load", "first", "warmup/optimizer")

    def _step(self, *names: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The formula and the sign of each event of some pieces: +1 for a birth, -1 for a death."""
        pieces = [self.timeline[piece.start : piece.stop] for piece in self.pieces if piece.name in names]
        timeline = np.concatenate([np.array(piece, dtype=np.int64) for piece in pieces])
        births = timeline >= 0
        return np.array(self.formula)[np.where(births, timeline, ~timeline)], np.where(births, 1, -1)

    @functools.cached_property
    def _functions(self) -> list[tuple[int, Callable[..., int], int]]:
        """The formulas that a function evaluates: number, function, arguments."""
        return [(n, SIZES[f.size], len(f.dimensions)) for n, f in enumerate(self.formulas) if f.size]

    @functools.cached_property
    def _columns(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        width = max((len(f.dimensions) for f in self.formulas), default=1)
        rows = [f.dimensions + (Dimension(0, 1, 0),) * (width - len(f.dimensions)) for f in self.formulas]
        table = np.array(rows, dtype=np.int64).reshape(len(rows), width, 3)
        return table[:, :, 0].copy(), table[:, :, 1].copy(), table[:, :, 2].copy()

    @functools.cached_property
    def _itemsizes(self) -> npt.NDArray[np.int64]:
        return np.array([f.itemsize for f in self.formulas], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """The form as plain JSON values."""
        return {column.name: getattr(self, column.name) for column in fields(self)} | {"work": self.work.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ClosedForm:
        """The form that `to_json` wrote.

        Raises:
            TypeError, ValueError, KeyError: the data was not written by `to_json`.
        """
        made = {
            "formulas": [Formula(tuple(Dimension(*d) for d in dims), *rest) for dims, *rest in data["formulas"]],
            "kinds": [Kind(*kind) for kind in data["kinds"]],
            "pieces": [Piece(*piece) for piece in data["pieces"]],
            "marks": [(int(at), str(phase)) for at, phase in data["marks"]],
            "parameters": [Parameter(p[0], tuple(p[1]), *p[2:]) for p in data["parameters"]],
            "work": Work.from_json(data["work"]),
            "load": None if data["load"] is None else Load(*data["load"]),
        }
        return cls(**{**data, **made})


def _too_large(shape: Sequence[int]) -> UserError:
    samples, tokens, images = shape
    return UserError(f"a micro-batch of {samples} samples, {tokens} tokens and {images} images needs more than 4 EiB")


def fit(
    traces: Sequence[tuple[Sequence[int], Trace]], check: tuple[Sequence[int], Trace] | None, load: Load | None = None
) -> ClosedForm:
    """The closed form of traces at several shapes, checked on one more.

    Args:
        traces: pairs of (samples, tokens, images) and the trace at that shape, all with the same layers.
        check: a pair that takes no part in making the formulas; its trace may have more layers.
        load: of experts with a capacity, if the model has such.

    Raises:
        NotClosed: the traces differ in more than sizes, a size fits no formula, or the check does not come out equal.
        NotPeriodic: the trace leaves layers out and cannot be unrolled.
    """
    first = traces[0][1]
    for _, other in traces[1:]:
        if other.skeleton() != first.skeleton():
            raise NotClosed("the operators depend on the shape")
    table = feature_table([(shape, _trained(trace), _trained(trace, wide=True)) for shape, trace in traces], load)
    rows = zip(*(trace.storages for _, trace in traces), strict=True)
    found: dict[Any, Formula] = {}
    formulas = []
    for row in rows:
        key = (row[0].itemsize, row[0].kind.op, row[0].size, tuple((s.nbytes, s.shape, s.arguments) for s in row))
        if key not in found:
            found[key] = _formula(row, table)
        formulas.append(found[key])
    form = replace(_assemble(first, unroll(first), formulas), load=load)
    if check is not None:
        _check(first, formulas, check, load)
    form.work = _fit_work(traces, check, form.trained, load)
    return form


def _fit_work(
    traces: Sequence[tuple[Sequence[int], Trace]],
    check: tuple[Sequence[int], Trace] | None,
    trained: int,
    load: Load | None,
) -> Work:
    first = traces[0][1]
    made = [Sample(shape, _trained(trace), trace.operations) for shape, trace in traces]
    if check is None:
        return fit_work(made, first.stacks, trained, None, load)
    shape, trace = check
    deep = Sample(shape, _trained(trace), trace.operations), _as_deep(first, trace)
    return fit_work(made, first.stacks, trained, deep, load)


def _trained(trace: Trace, wide: bool = False) -> int:
    gradients = (s for s in trace.storages if s.kind.role == "gradient" and s.parameter >= 0)
    return len({s.parameter for s in gradients if not wide or s.kind.dtype == "float32"})


def _check(first: Trace, formulas: list[Formula], check: tuple[Sequence[int], Trace], load: Load | None) -> None:
    """The formulas, unrolled to the layers of the checked trace, must give that trace."""
    shape, trace = check
    shallow = Trace(**{**vars(first), "stacks": _as_deep(first, trace)})
    form = replace(_assemble(shallow, unroll(shallow), formulas), load=load)
    if form.timeline != trace.timeline:
        raise NotClosed("the operators depend on the shape or on the number of layers")
    sizes = form.sizes(shape)
    for storage, formula in zip(trace.storages, form.formula, strict=True):
        if storage.nbytes != sizes[formula]:
            raise NotClosed(f"{storage.kind.op} in {storage.kind.module} has {storage.nbytes} bytes, not {sizes[formula]}")


def _as_deep(first: Trace, trace: Trace) -> list[Stack]:
    return [
        shallow._replace(full_units=(deep.layers - shallow.prefix - shallow.suffix) // shallow.unit)
        if shallow.units < shallow.full_units
        else shallow
        for shallow, deep in zip(first.stacks, trace.stacks, strict=True)
    ]


def _assemble(trace: Trace, whole: Unrolled, formulas: list[Formula]) -> ClosedForm:
    form = ClosedForm(
        timeline=whole.timeline,
        pieces=whole.pieces,
        marks=whole.marks,
        parameters=whole.parameters,
        unclassified=sorted(trace.unclassified),
    )
    formula_numbers: dict[Formula, int] = {}
    kind_numbers: dict[Kind, int] = {}
    for copy in whole.copies:
        form.formula.append(formula_numbers.setdefault(formulas[copy.source], len(formula_numbers)))
        form.kind.append(kind_numbers.setdefault(trace.storages[copy.source].kind, len(kind_numbers)))
        form.layer.append(copy.layer)
        form.parameter.append(copy.parameter)
    form.formulas, form.kinds = list(formula_numbers), list(kind_numbers)
    return form


def constant_form(trace: Trace) -> ClosedForm:
    """A trace at one shape as a form without variables, for models whose sizes are not closed."""
    return fit([((1, 1, 0), trace)], None)


def _formula(row: Sequence[Storage], table: list[list[int]]) -> Formula:
    first = row[0]
    per_parameter = first.kind.op in _PER_PARAMETER and first.kind.phase == "optimizer"

    def fitted(columns: Iterable[tuple[int, ...]]) -> tuple[Dimension, ...]:
        what = f"{first.kind.op} in {first.kind.module}"
        return tuple(fit_dimension(column, table, per_parameter, what) for column in columns)

    if first.size:
        return Formula(fitted(zip(*(s.arguments for s in row), strict=True)), 1, first.size)
    if all(s.nbytes == math.prod(s.shape) * s.itemsize for s in row):
        return Formula(fitted(zip(*(s.shape for s in row), strict=True)), first.itemsize)
    return Formula(fitted(zip(*((s.nbytes // s.itemsize,) for s in row), strict=True)), first.itemsize)
