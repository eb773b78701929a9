"""Makes several closed forms side by side. Importing this imports no torch: the processes that trace do.

They are started afresh and not forked: a fork of a process that has run torch has its locks and not the threads that hold
them, and waits for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from oomph.core.forms import FormKey, Traced


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
    longest_first = sorted(keys, key=lambda key: -key.expert_count)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin) as pool:
        futures = {pool.submit(_make, key): key for key in longest_first}
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a new process: what a model's code prints is no result, and an interrupt ends it without a word."""
    sys.stdout = sys.stderr
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _make(key: FormKey) -> Traced:
    from oomph.live.source import make_form

    return make_form(key)
