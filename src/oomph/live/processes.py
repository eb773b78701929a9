"""Runs a function in a new process, with an allocator and peaks of its own, and outlives its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from oomph.errors import UserError

_CHANGES_ALLOCATION = (
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TORCH_CUBLASLT_UNIFIED_WORKSPACE",
)
"""Variables that make PyTorch allocate otherwise than is predicted; a new process does not get them."""

_LOG_LEVEL = "KINETO_LOG_LEVEL"


class Failed(Exception):
    """The function raised, or its process was ended; the message says it in one sentence."""


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns. It and its arguments are pickled.

    Raises:
        UserError: the function raised one.
        Failed: it raised something else, or the process ended without an answer.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    with _plain_environment(), interrupts_held():
        process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        raise Failed(_ending(process.exitcode or 0)) from None
    except BaseException:
        process.kill()
        raise
    finally:
        ours.close()
    process.join()
    if isinstance(answer, UserError | Failed):
        raise answer
    return answer


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Holds back interrupts; processes that start here begin so, until they `settle_down`.

    A new process imports for seconds, and an interrupt would end it with a traceback, were it not to wait.
    """
    resource_tracker.ensure_running()  # its start would let interrupts through again (Python 3.11, resource_tracker.py)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settle_down() -> None:
    """In a new process: what a model's code prints is no result, and an interrupt ends it without a word."""
    sys.stdout = sys.stderr
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _answer(channel: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the new process."""
    settle_down()
    try:
        channel.send(function(*arguments))
    except UserError as error:
        channel.send(error)
    except Exception as error:
        if os.environ.get("OOMPH_DEBUG") == "1":
            traceback.print_exception(error)
        channel.send(Failed(" ".join(f"{type(error).__name__}: {error}".split())[:300]))


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed, as the system does when memory runs out"
    if code < 0:
        return f"its process was ended by signal {signal.Signals(-code).name}"
    return f"its process ended with code {code}"


@contextmanager
def _plain_environment() -> Iterator[None]:
    """What a new process inherits: nothing that changes allocation, and no profiler that announces itself on stderr."""
    dropped = {name: os.environ.pop(name) for name in _CHANGES_ALLOCATION if name in os.environ}
    quiet = _LOG_LEVEL in os.environ
    os.environ.setdefault(_LOG_LEVEL, "99")
    try:
        yield
    finally:
        os.environ.update(dropped)
        if not quiet:
            del os.environ[_LOG_LEVEL]
