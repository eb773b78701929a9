"""What the samples of a file cost, measured once and kept: reading, checking and counting all of them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oomph.core.forms import cache_folder
from oomph.live.data.encoding import Cost, Encoder
from oomph.live.data.pictures import Size, locate, read_header
from oomph.live.data.problems import Problems
from oomph.live.data.reading import Index, Numbers, Source
from oomph.live.data.resources import usable_cores
from oomph.live.data.samples import BadSample, Sample, parse

CHUNK = 512
_HEADERS_A_CORE = 4
"""Threads that open images, for each core: they mostly wait for the disk."""
_COLUMNS = len(Cost._fields)
_ARRAYS = ("starts", "ends", "numbers", "costs", "cut")


@dataclass(frozen=True)
class Measured:
    """The samples of one file.

    Attributes:
        costs: [samples, columns of `Cost`].
        cut: [samples]; tokens that the limit took away.
        repeated_ids: how many samples have the id of an earlier one.
    """

    costs: Numbers
    cut: Numbers
    repeated_ids: int


def measure(source: Source, encoder: Encoder, problems: Problems) -> Measured:
    """Reads and checks all samples of a file; those with problems are noted and left out of what is returned.

    Raises:
        OSError: the file cannot be read any more.
    """
    source.scan()
    if source.problem:
        problems.add(source.name, source.problem)
    elif not len(source):
        problems.add(source.name, "it holds no samples")
    costs, cut, seen, repeated = [], [], set[int](), 0
    with ThreadPoolExecutor(_HEADERS_A_CORE * usable_cores()) as pool:
        for first in range(0, len(source), CHUNK):
            bad: list[tuple[_Item, BadSample]] = []
            items = _parsed(source, first, encoder, bad)
            for item in items:
                repeated += bool(item.sample.id) and hash(item.sample.id) in seen
                seen.add(hash(item.sample.id))
            items = _with_sizes(source, items, pool, bad)
            encoded = encoder.encode([item.sample for item in items], [item.sizes for item in items])
            for item, result in zip(items, encoded, strict=True):
                if isinstance(result, BadSample):
                    bad.append((item, result))
                else:
                    costs.append(result.cost)
                    cut.append(result.cut_tokens)
            for item, error in sorted(bad, key=lambda pair: pair[0].number):
                for problem in error.problems:
                    problems.add(item.place, problem)
    return Measured(np.array(costs, np.int64).reshape(-1, _COLUMNS), np.array(cut, np.int64), repeated)


class _Item(NamedTuple):
    """A record on its way, with its number in the file and its place in words."""

    number: int
    place: str
    sample: Sample
    sizes: list[Size]


_NOTHING = Sample("", (), ())


def named(place: str, name: str) -> str:
    """A place with the sample's own name."""
    return f"{place} (sample {name!r})" if name else place


def _parsed(source: Source, first: int, encoder: Encoder, bad: list[tuple[_Item, BadSample]]) -> list[_Item]:
    """The good samples of a chunk; the others are added to `bad`."""
    items = []
    for number, record in enumerate(source.records(first, first + CHUNK), start=first):
        item = _Item(number, source.place(number), _NOTHING, [])
        try:
            sample = parse(record)
            item = item._replace(place=named(item.place, sample.id), sample=sample)
            encoder.check(sample)
        except BadSample as error:
            bad.append((item._replace(place=named(source.place(number), error.id or item.sample.id)), error))
        else:
            items.append(item)
    return items


def _with_sizes(source: Source, items: list[_Item], pool: Executor, bad: list[tuple[_Item, BadSample]]) -> list[_Item]:
    """The samples whose images are all there, with the images' sizes; the others are added to `bad`."""

    def size(name: str) -> Size | BadSample:
        try:
            return read_header(locate(source.images, name))
        except BadSample as error:
            return error

    found: Iterator[Size | BadSample] = pool.map(size, (name for item in items for name in item.sample.images))
    good = []
    for item in items:
        sizes = [next(found) for _ in item.sample.images]
        right = [size for size in sizes if not isinstance(size, BadSample)]
        bad += [(item, error) for error in sizes if isinstance(error, BadSample)]
        if len(right) == len(sizes):
            good.append(item._replace(sizes=right))
    return good


class Kept:
    """What was measured, on the disk: named by all that it depends on. What is not whole is measured again.

    Args:
        source: the file, hashed.
        encoder: what its samples are made into.
        notify: told in a sentence when something cannot be kept.
    """

    def __init__(self, source: Source, encoder: Encoder, notify: Callable[[str], None]) -> None:
        key = json.dumps([source.sha256, encoder.digest(), str(source.images.resolve())])
        folder = cache_folder().parent / "data"
        self._path, self._notify = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz", notify

    def read(self, source: Source) -> Measured | None:
        """What is kept, and the file's index with it; None where nothing is."""
        try:
            with open(self._path, "rb") as file, np.load(file, allow_pickle=False) as kept:
                starts, ends, numbers, costs, cut = (kept[name].astype(np.int64) for name in _ARRAYS)
                is_list, repeated = kept["flags"].tolist()
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        count = len(starts)
        if any(len(array) != count for array in (ends, numbers, costs, cut)) or costs.shape != (count, _COLUMNS):
            return None
        source.index = Index(starts, ends, numbers, bool(is_list))
        return Measured(costs, cut, int(repeated))

    def write(self, source: Source, measured: Measured) -> None:
        """Keeps what was measured of a file without problems. A full disk costs no more than measuring it again."""
        arrays: dict[str, Any] = dict(zip(_ARRAYS, (*source.index[:3], measured.costs, measured.cut), strict=True))
        temporary: Path | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("wb", dir=self._path.parent, suffix=".part", delete=False) as file:
                temporary = Path(file.name)
                np.savez(file, **arrays, flags=np.array([source.index.is_list, measured.repeated_ids], np.int64))
            os.replace(temporary, self._path)
        except OSError as error:
            self._notify(f"what the samples of {source.name} cost is not kept: {error.strerror or error}")
            if temporary is not None:
                temporary.unlink(missing_ok=True)
