"""What a dimension of a tensor can be in the shape of the micro-batch: a feature of it, times an integer, plus an integer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LOSS_CHUNKS = 16


class NotClosed(Exception):
    """The model's sizes are not formulas of this kind; each shape has to be traced by itself."""


class Dimension(NamedTuple):
    """`factor` times a feature (its number in `FEATURES`) plus `offset`."""

    feature: int
    factor: int
    offset: int


class Load(NamedTuple):
    """Experts of a layer that take so many tokens each: `share` times an even load of one choice for each token."""

    experts: int
    share: float


def capacity(tokens: int, load: Load) -> int:
    """Tokens that an expert may take.

    In float32, as DeepSpeed computes it (v0.9.5, moe/sharded_moe.py, ``_capacity``), where `share` is twice the factor
    for two choices.
    """
    return int(np.ceil(np.float32(tokens / load.experts) * np.float32(load.share)))


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def features(shape: Sequence[int], trained: int, wide: int = 0, load: Load | None = None) -> dict[str, int]:
    """What a dimension can be proportional to.

    Args:
        shape: (samples, tokens, images).
        trained: how many parameters get a gradient, tensors and not elements.
        wide: how many of these gradients are float32.
        load: of experts with a capacity, none where there are no such experts.
    """
    samples, tokens, images = shape
    rows = samples * tokens
    chunk = -(-rows // LOSS_CHUNKS)
    return {
        "1": 1,
        "samples": samples,
        "tokens": tokens,
        "images": images,
        "samples*tokens": rows,
        "samples*(tokens-1)": rows - samples,
        "images/samples": images // samples if images % samples == 0 else 0,
        **{f"ceil{n}(tokens)": round_up(tokens, n) for n in (8, 16, 32, 64, 128)},
        **{f"samples*ceil{n}(tokens)": samples * round_up(tokens, n) for n in (8, 16, 32, 64, 128)},
        "tokens²": tokens * tokens,
        "samples*tokens²": rows * tokens,
        "capacity": capacity(rows, load) if load else 0,
        "chunk": chunk,
        "last chunk": rows - (LOSS_CHUNKS - 1) * chunk,
        "trained": trained,
        "trained in float32": wide,
        "trained in 16 bits": trained - wide,
    }


FEATURES = tuple(features((2, 3, 4), 5))
_TRAINED = FEATURES.index("trained")


def feature_table(shapes: Sequence[tuple[Sequence[int], int, int]], load: Load | None = None) -> list[list[int]]:
    """The features of several (shape, trained, wide), see `features`: one row for each feature, one column for each shape."""
    values = [features(*row, load).values() for row in shapes]
    return [list(column) for column in zip(*values, strict=True)]


def fit_dimension(values: tuple[int, ...], table: list[list[int]], per_parameter: bool, what: str) -> Dimension:
    """The simplest formula through the values: the smallest offset, and of those the first feature.

    Args:
        values: the dimension at each shape.
        table: the features at each shape, as `feature_table` gives them.
        per_parameter: whether the tensor may have a row for each parameter with a gradient, or each of one dtype.
        what: the tensor, for the message.

    Raises:
        NotClosed: no formula goes through the values.
    """
    for number in range(_TRAINED, len(table)) if per_parameter else ():
        if all(n and v % n == 0 for v, n in zip(values, table[number], strict=True)):
            return Dimension(number, values[0] // table[number][0], 0)
    if len(set(values)) == 1:
        return Dimension(0, values[0], 0)
    best: Dimension | None = None
    for number, column in enumerate(table[:_TRAINED]):
        if len(set(column)) == 1 or 0 in column:
            continue
        factor, rest = divmod(values[0] - values[1], column[0] - column[1])
        offset = values[0] - factor * column[0]
        if rest or factor < 1 or any(factor * x + offset != v for x, v in zip(column, values, strict=True)):
            continue
        if best is None or abs(offset) < abs(best.offset):
            best = Dimension(number, factor, offset)
    if best is None:
        raise NotClosed(f"{what} has a dimension of {values}")
    return best


def nearest_dimension(values: tuple[int, ...], table: list[list[int]]) -> Dimension:
    """A formula for values that none goes through: equal to the last value, and closest to the first at its shape."""
    last = values[-1]
    candidates = [Dimension(0, last, 0)]
    for number, column in enumerate(table[:_TRAINED]):
        if column[-1] > 0 and last >= column[-1]:
            candidates.append(Dimension(number, *divmod(last, column[-1])))
    return min(candidates, key=lambda d: abs(d.factor * table[d.feature][0] + d.offset - values[0]))
