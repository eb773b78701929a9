"""What a step computes and moves, as formulas in the shape of the micro-batch: the input of an estimate of its time.

The operators of a few traces are paired, every dimension is fitted as those of storages are, and operators with equal
formulas become one row with a count; a layer that stands for many counts as often. Unlike sizes in memory, work may be
approximate: where a formula does not hold, the nearest one is taken and `Work.note` says so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from oomph.core.dimensions import Dimension, Load, NotClosed, feature_table, features, fit_dimension, nearest_dimension
from oomph.core.trace import Operation, Stack
from oomph.core.unroll import repeats

Array = npt.NDArray[np.float64]
Product = tuple[Dimension, ...]
Polynomial = tuple[Product, ...]
"""A sum of products."""

_PER_PARAMETER = {"aten.stack.default", "aten.linalg_vector_norm.default"}
"""Operators of the optimizer that move one number for each gradient."""


class Row(NamedTuple):
    """Operators that do the same: `flops` and `traffic` are numbers of the products that make up the two sums.

    `times` is how many there are of them at the model's full depth; `launches` are those of one.
    """

    piece: str
    phase: str
    name: str
    dtype: str
    launches: int
    times: int
    flops: tuple[int, ...]
    traffic: tuple[int, ...]


class Sample(NamedTuple):
    """The operators of a trace, and its shape (samples, tokens, images) and number of parameters with a gradient."""

    shape: Sequence[int]
    trained: int
    operations: Sequence[Operation]


@dataclass
class Work:
    """The operators of a step by piece and phase.

    Attributes:
        products: each the product of its dimensions.
        rows: the operators.
        trained: how many parameters get a gradient.
        note: why the figures are approximate, in words; empty where they are exact.
        load: of experts with a capacity.
    """

    products: list[Product] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    trained: int = 0
    note: str = ""
    load: Load | None = None

    def evaluate(self, shape: Sequence[int]) -> tuple[Array, Array]:
        """Floating-point operations and bytes of each row, of one operator, at (samples, tokens, images)."""
        values = np.array(list(features(shape, self.trained, load=self.load).values()), dtype=np.float64)
        index, factor, offset = self._columns
        sizes = (values[index] * factor + offset).prod(axis=1)
        return _sums(self._flops, sizes, len(self.rows)), _sums(self._traffic, sizes, len(self.rows))

    @cached_property
    def constant(self) -> bool:
        """Whether nothing depends on the shape: the work of a trace at one shape."""
        return all(dimension.feature == 0 for product in self.products for dimension in product)

    @cached_property
    def _columns(self) -> tuple[npt.NDArray[np.int64], Array, Array]:
        width = max(map(len, self.products), default=1)
        rows = [product + (Dimension(0, 1, 0),) * (width - len(product)) for product in self.products]
        table = np.array(rows, dtype=np.int64).reshape(len(rows), width, 3)
        return table[:, :, 0].copy(), table[:, :, 1].astype(np.float64), table[:, :, 2].astype(np.float64)

    @cached_property
    def _flops(self) -> npt.NDArray[np.int64]:
        return _pairs(row.flops for row in self.rows)

    @cached_property
    def _traffic(self) -> npt.NDArray[np.int64]:
        return _pairs(row.traffic for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        columns = {"products": self.products, "rows": self.rows, "trained": self.trained, "note": self.note}
        return {**columns, "load": self.load}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Work:
        """What `to_json` wrote.

        Raises:
            TypeError, ValueError, KeyError: the data was not written by `to_json`.
        """
        products = [tuple(Dimension(*d) for d in product) for product in data["products"]]
        rows = [Row(*row)._replace(flops=tuple(row[6]), traffic=tuple(row[7])) for row in data["rows"]]
        load = None if data["load"] is None else Load(*data["load"])
        return cls(products, rows, data["trained"], data["note"], load)


def _pairs(columns: Iterable[tuple[int, ...]]) -> npt.NDArray[np.int64]:
    """The number of the row and of the product for each term of each row's sum: [2, terms]."""
    pairs = [(row, product) for row, products in enumerate(columns) for product in products]
    return np.array(pairs, dtype=np.int64).reshape(len(pairs), 2).T.copy()


def _sums(terms: npt.NDArray[np.int64], sizes: Array, rows: int) -> Array:
    result: Array = np.bincount(terms[0], weights=sizes[terms[1]], minlength=rows).astype(np.float64)
    return result


def fit_work(
    samples: Sequence[Sample],
    stacks: list[Stack],
    trained: int,
    check: tuple[Sample, list[Stack]] | None,
    load: Load | None = None,
) -> Work:
    """The work of traces at several shapes as formulas, at the model's full depth.

    Args:
        samples: of traces with the same layers.
        stacks: the stacks of layers of these traces.
        trained: how many parameters get a gradient at the model's full depth.
        check: a sample that takes no part, and the stacks that bring the others to its depth; the formulas are compared
            with it.
        load: of experts with a capacity, if the model has such.

    Returns:
        The work. Its note says what does not agree: operators that are not in every sample, which are left out;
        dimensions without a formula, for which the nearest is taken; the difference from the checked sample.
    """
    notes = []
    paired, unpaired = _pair([sample.operations for sample in samples])
    if unpaired:
        notes.append(f"operators left out, since they depend on the shape: {unpaired}")
    table = feature_table([(sample.shape, sample.trained, 0) for sample in samples], load)
    fitter = _Fitter(table)
    formulas = [fitter.polynomials(row) for row in paired]
    if fitter.unfit:
        notes.append(f"operators with the nearest formula, since none fits: {fitter.unfit}")
    first = [row[0] for row in paired]
    work = replace(_assemble(first, formulas, stacks, trained), load=load)
    if check is not None:
        sample, deep = check
        notes += _compare(replace(_assemble(first, formulas, deep, sample.trained), load=load), sample)
    work.note = "; ".join(notes)
    return work


def _pair(columns: Sequence[Sequence[Operation]]) -> tuple[list[tuple[Operation, ...]], int]:
    """The operators that correspond to each other, and how many have no counterpart in another trace."""
    keys = [[(op.piece, op.phase, op.name, op.dtype, op.place, op.launches) for op in column] for column in columns]
    if all(other == keys[0] for other in keys[1:]):
        return list(zip(*columns, strict=True)), 0
    numbered = [_numbered(column, names) for column, names in zip(columns, keys, strict=True)]
    common = [key for key in numbered[0] if all(key in other for other in numbered[1:])]
    return [tuple(column[key] for column in numbered) for key in common], max(map(len, columns)) - len(common)


def _numbered(operations: Sequence[Operation], keys: Sequence[Any]) -> dict[tuple[Any, int], Operation]:
    """Operators by their key and by how many of the same key came before."""
    seen: defaultdict[Any, int] = defaultdict(int)
    result = {}
    for operation, key in zip(operations, keys, strict=True):
        result[key, seen[key]] = operation
        seen[key] += 1
    return result


class _Fitter:
    """Makes formulas from the same operator at several shapes, each once."""

    def __init__(self, table: list[list[int]]) -> None:
        self._table = table
        self._known: dict[Any, tuple[Polynomial, Polynomial]] = {}
        self._unfit: set[Any] = set()
        self.unfit = 0

    def polynomials(self, row: tuple[Operation, ...]) -> tuple[Polynomial, Polynomial]:
        """The formulas of `flops` and `traffic`."""
        per_parameter = row[0].name in _PER_PARAMETER and row[0].phase == "optimizer"
        key = (per_parameter, tuple((op.flops, op.traffic) for op in row))
        if key not in self._known:
            try:
                self._known[key] = (
                    self._fit([op.flops for op in row], per_parameter),
                    self._fit([op.traffic for op in row], per_parameter),
                )
            except NotClosed:
                self._unfit.add(key)
                self._known[key] = self._nearest([op.flops for op in row]), self._nearest([op.traffic for op in row])
        self.unfit += key in self._unfit
        return self._known[key]

    def _fit(self, sums: list[tuple[tuple[int, ...], ...]], per_parameter: bool) -> Polynomial:
        """Term by term, like terms added up. The first factor of a term is a number of bytes or operations."""
        if len({tuple(map(len, terms)) for terms in sums}) > 1:
            raise NotClosed("the number of dimensions depends on the shape")
        factors: dict[Product, int] = {}
        for terms in zip(*sums, strict=True):
            columns = enumerate(zip(*terms, strict=True))
            fitted = [fit_dimension(column, self._table, per_parameter and n > 0, "an operator") for n, column in columns]
            varying = tuple(sorted(d if d.offset else d._replace(factor=1) for d in fitted if d.feature))
            factors[varying] = factors.get(varying, 0) + prod(d.factor for d in fitted if not d.offset)
        return tuple((Dimension(0, factor, 0), *varying) for varying, factor in sorted(factors.items()))

    def _nearest(self, sums: list[tuple[tuple[int, ...], ...]]) -> Polynomial:
        totals = tuple(_total(terms) for terms in sums)
        return ((nearest_dimension(totals, self._table),),) if any(totals) else ()


def _total(terms: tuple[tuple[int, ...], ...]) -> int:
    return sum(map(prod, terms))


def _assemble(
    operations: Sequence[Operation], formulas: Sequence[tuple[Polynomial, Polynomial]], stacks: list[Stack], trained: int
) -> Work:
    counts: Counter[tuple[Any, ...]] = Counter()
    for op, (flops, traffic) in zip(operations, formulas, strict=True):
        counts[op.piece, op.phase, op.name, op.dtype, op.launches, flops, traffic] += repeats(stacks, op.place)
    numbers: dict[Product, int] = {}

    def numbered(polynomial: Polynomial) -> tuple[int, ...]:
        return tuple(numbers.setdefault(product, len(numbers)) for product in polynomial)

    rows = [
        Row(piece, phase, name, dtype, launches, times, numbered(flops), numbered(traffic))
        for (piece, phase, name, dtype, launches, flops, traffic), times in counts.items()
    ]
    return Work(list(numbers), rows, trained)


def _compare(work: Work, sample: Sample) -> list[str]:
    """What the formulas give otherwise than the trace of the sample, in words."""
    flops, traffic = (column.round().astype(np.int64).tolist() for column in work.evaluate(sample.shape))
    made: Counter[tuple[Any, ...]] = Counter()
    for row, flop, nbytes in zip(work.rows, flops, traffic, strict=True):
        made[(*row[:5], flop, nbytes)] += row.times
    seen = Counter(
        (op.piece, op.phase, op.name, op.dtype, op.launches, _total(op.flops), _total(op.traffic)) for op in sample.operations
    )
    if made == seen:
        return []
    flops_off, bytes_off = (_total_of(made, at) / max(1, _total_of(seen, at)) - 1 for at in (5, 6))
    at = " x ".join(map(str, sample.shape))
    return [f"at {at} the formulas give {flops_off:+.1%} floating-point operations and {bytes_off:+.1%} bytes"]


def _total_of(counts: Counter[tuple[Any, ...]], column: int) -> int:
    return sum(int(key[column]) * times for key, times in counts.items())
