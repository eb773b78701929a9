"""Makes several closed forms side by side. Importing this imports no torch: the processes that trace do.

They are started afresh and not forked: a fork of a process that has run torch has its locks and not the threads that hold
them, and waits for ever. To start one takes longer than to make a form, so each makes one after the other, and what it
has learnt of operators (`memo`) serves all of them.
"""

from __future__ import annotations

import functools
import gc
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from oomph.core.forms import FormKey, Traced
from oomph.live.processes import interrupts_held, settle_down


def make_forms(keys: Sequence[FormKey], done: Callable[[FormKey, Traced], None]) -> None:
    """Makes the forms of several keys, in as many processes as there are cores, and hands each to `done` in this one.

    Raises:
        UserError: as `source.make_form` does.
    """
    workers = min(len(keys), os.cpu_count() or 1)
    if workers < 2:
        for key in keys:
            done(key, _make(key))
        return
    longest_first = sorted(keys, key=_traced_layers, reverse=True)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), settle_down) as pool:
        with interrupts_held():
            futures = {pool.submit(_make_beside_others, key): key for key in longest_first}
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _traced_layers(key: FormKey) -> int:
    """How many layers of the language model a key's traces hold, in multiples of what they hold without a pattern."""
    alternating = 2 if key.experts else 1
    stride = int(key.checkpointing.removeprefix("every-")) if key.checkpointing.startswith("every-") else 1
    return math.lcm(alternating, stride)


def _make(key: FormKey) -> Traced:
    from oomph.live.source import make_form

    return make_form(key)


def _make_beside_others(key: FormKey) -> Traced:
    """`_make` in a process that does nothing else."""
    _settle()
    return _make(key)


@functools.cache
def _settle() -> None:
    """Imports what makes forms, and takes it out of the garbage collector's rounds, which look at all of it else."""
    import oomph.live.source  # noqa: F401

    gc.freeze()
