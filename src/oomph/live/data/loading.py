"""Samples ahead of time: workers prepare them while the model computes, and the order stays the plan's.

Workers are threads. Pillow decodes and resizes without Python's global lock, and so do numpy and the tokenizer, so threads
use all cores, and what they make needs no copy from another process.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from oomph.live.data.collating import Prepared
from oomph.live.data.resources import free_bytes, usable_cores

_SPARE = 1.25
"""Workers for each one that the steps keep busy on average: samples differ."""
_WAITING = 0.01
"""The share of a step that may be spent on waiting for data before something is done about it."""
_MEMORY = 0.1
"""The share of the free host memory that prepared samples may fill."""


class Loaded(NamedTuple):
    """The samples of one step, and how long the step waited for them.

    Attributes:
        step: its number.
        samples: in the plan's order.
        wait_seconds: from asking to having all of them.
        decode_seconds: that workers spent on them, added up.
    """

    step: int
    samples: list[Prepared]
    wait_seconds: float
    decode_seconds: float


class Limits(NamedTuple):
    """What loading may take: worker threads, and bytes of prepared samples (None where the system does not say)."""

    workers: int
    bytes: int | None


class Setting(NamedTuple):
    """How samples are loaded: by how many workers, and how many samples ahead of the step that asks.

    Without workers, samples are prepared when they are asked for.
    """

    workers: int
    ahead: int


def machine_limits() -> Limits:
    """What this process may take of the machine."""
    free = free_bytes()
    return Limits(usable_cores(), None if free is None else int(free * _MEMORY))


def advise(now: Setting, loaded: Loaded, compute_seconds: float, limits: Limits) -> Setting:
    """The setting for the next steps, from what one step took.

    Args:
        now: the setting that the step was loaded with.
        loaded: the step's samples.
        compute_seconds: what the step took beside waiting for data.
        limits: never more than these.
    """
    count = len(loaded.samples)
    busy = loaded.decode_seconds / compute_seconds if compute_seconds > 0 else math.inf
    needed = limits.workers if math.isinf(busy) else max(1, math.ceil(busy * _SPARE))
    waits = loaded.wait_seconds > _WAITING * (loaded.wait_seconds + compute_seconds)
    if waits:
        workers = max(needed, now.workers + 1)
    else:
        workers = now.workers if needed <= now.workers <= 2 * needed else needed
    workers = min(workers, limits.workers)
    ahead = 2 * max(count, workers)
    if limits.bytes is not None:
        largest = max((sample.nbytes for sample in loaded.samples), default=0)
        ahead = min(ahead, limits.bytes // max(1, largest))
    return Setting(workers, max(ahead, count, 1))


class Loader:
    """Goes through the steps of a plan and gives each step's samples.

    Args:
        prepare: makes a sample ready; called in the workers.
        plan: the samples of a step, by its number.
        first: the step to begin with.
        end: the step before which it ends.
        setting: how samples are loaded, until `change` or `adapt` sets it otherwise.
    """

    def __init__(
        self,
        prepare: Callable[[int], Prepared],
        plan: Callable[[int], Sequence[int]],
        first: int,
        end: int,
        setting: Setting | None = None,
    ) -> None:
        self._prepare, self._plan, self._step, self._end = prepare, plan, first, end
        self.setting = setting or Setting(1, max(1, 2 * len(plan(first)) if first < end else 1))
        self._pool = ThreadPoolExecutor(max(1, self.setting.workers), "data")
        self._coming = itertools.chain.from_iterable(plan(step) for step in range(first, end))
        self._started: deque[Future[tuple[Prepared, float]] | int] = deque()

    def __iter__(self) -> Iterator[Loaded]:
        """The steps that are left."""
        while self._step < self._end:
            yield self.next()

    def next(self) -> Loaded:
        """The samples of the next step. Its wait is reported with it, and samples further ahead are begun.

        Raises:
            UserError: a sample cannot be prepared; it is named.
        """
        asked = time.perf_counter()
        samples, decoding = [], 0.0
        for _ in self._plan(self._step):
            self._start()
            started = self._started.popleft()
            sample, seconds = self._timed(started) if isinstance(started, int) else started.result()
            samples.append(sample)
            decoding += seconds
        self._start()
        self._step += 1
        return Loaded(self._step - 1, samples, time.perf_counter() - asked, decoding)

    def change(self, setting: Setting) -> None:
        """Loads from now on with another setting. What has begun ends as it began, and the order stays."""
        if setting.workers != self.setting.workers:
            self._pool.shutdown(wait=False)
            self._pool = ThreadPoolExecutor(max(1, setting.workers), "data")
        self.setting = setting

    def adapt(self, loaded: Loaded, compute_seconds: float, limits: Limits) -> bool:
        """Changes the setting to what a step showed to be needed; says whether it is another one."""
        advised = advise(self.setting, loaded, compute_seconds, limits)
        changed = advised != self.setting
        self.change(advised)
        return changed

    def close(self) -> None:
        """Ends the workers; samples that have not begun are dropped."""
        for started in self._started:
            if not isinstance(started, int):
                started.cancel()
        self._started.clear()
        self._pool.shutdown(wait=True)

    def _start(self) -> None:
        """Begins samples until as many are on their way as the setting says."""
        for index in itertools.islice(self._coming, max(0, self.setting.ahead - len(self._started))):
            self._started.append(self._pool.submit(self._timed, index) if self.setting.workers else index)

    def _timed(self, index: int) -> tuple[Prepared, float]:
        begin = time.perf_counter()
        sample = self._prepare(index)
        return sample, time.perf_counter() - begin
