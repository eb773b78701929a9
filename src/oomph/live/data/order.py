"""Which samples a step trains on: a pure function, so that nothing else has to be saved for a run to go on.

The samples of all epochs stand in one row, epoch after epoch, each in an order of its own. Step k takes the k-th piece of
this row. Neither the number of workers, nor the micro-batch, nor the number of GPUs has a part in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Indices = NDArray[np.int64]

# The constants of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014). numpy's own
# permutations may change from version to version (NEP 19), and the order of a run must not.
_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Part(NamedTuple):
    """One file's share: how many samples it has, and how often an epoch holds each."""

    samples: int
    weight: float


class Order:
    """The order of samples.

    Args:
        parts: the files, whose samples are numbered through in their order.
        seed: another one gives another order.
        shuffle: False takes the samples as they stand.

    Attributes:
        epoch_samples: how many samples one epoch has.
    """

    def __init__(self, parts: Sequence[Part], seed: int = 0, shuffle: bool = True) -> None:
        self._parts, self._seed, self._shuffle = tuple(parts), seed, shuffle
        self.epoch_samples = sum(whole * part.samples + more for part in parts for whole, more in [_times(part)])
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def total_samples(self, epochs: float) -> int:
        """How many samples a number of epochs has, at least one."""
        return max(1, round(epochs * self.epoch_samples))

    def steps(self, epochs: float, effective_batch: int) -> int:
        """How many steps they make. The last one has what is left."""
        return -(-self.total_samples(epochs) // effective_batch)

    def step(self, step: int, effective_batch: int, epochs: float = math.inf) -> list[int]:
        """The samples of one step, `effective_batch` of them but for the last step of a number of epochs.

        A step may hold the end of an epoch and the beginning of the next.
        """
        last = math.inf if math.isinf(epochs) else self.total_samples(epochs)
        first, end = step * effective_batch, min((step + 1) * effective_batch, last)
        pieces: list[int] = []
        while first < end:
            epoch, at = divmod(first, self.epoch_samples)
            taken = self._epoch(epoch)[at : at + int(end) - first]
            pieces += taken.tolist()
            first += len(taken)
        return pieces

    def epoch(self, epoch: int) -> Indices:
        """All samples of an epoch in their order."""
        return self._epoch(epoch).copy()

    def _make_epoch(self, epoch: int) -> Indices:
        pieces, first = [], 0
        for number, part in enumerate(self._parts):
            whole, more = _times(part)
            pieces += [np.arange(part.samples, dtype=np.int64) + first] * whole
            if more:
                # A window moves over the file from epoch to epoch, so that all samples come equally often in the long run.
                window = (np.arange(more) + epoch * more) % part.samples
                row = _shuffled(part.samples, self._seed, 1, number) if self._shuffle else np.arange(part.samples)
                pieces.append(row[window] + first)
            first += part.samples
        samples = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
        return samples[_shuffled(len(samples), self._seed, 0, epoch)] if self._shuffle else samples


def _times(part: Part) -> tuple[int, int]:
    """How often each sample comes in an epoch, and how many of them come once more."""
    whole = math.floor(part.weight)
    return whole, round((part.weight - whole) * part.samples)


def _shuffled(count: int, *keys: int) -> Indices:
    """The numbers below `count`, sorted by a hash of the keys and themselves."""
    start = 0
    for key in keys:
        start = _mixed_one(start ^ (key & _MASK))
    hashes = _mixed(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(start))
    return np.argsort(hashes, kind="stable")


def _mixed(values: Keys) -> Keys:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mixed_one(value: int) -> int:
    return int(_mixed(np.array([(value + _GAMMA) & _MASK], np.uint64))[0])
