"""What a way of sharing a model among ranks has to do in a step, and how ranks agree on how a part of it went.

    every micro-batch, on every rank, between `Parallel.begin` and `Parallel.end`:
        forward and backward
        where it fails: the rank issues what the others still wait for (`Parallel.drain`)
        one vote; where one failed, all drop what they have (`Parallel.reset`) and tell each other what it was
    `Parallel.ready`, a vote, `Parallel.clip`, a vote
    update, a vote

So memory may run out on any rank at any place up to the update, and nobody waits for somebody who is not coming.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from oomph.errors import RunError
from oomph.live.ranks.group import Ranks
from oomph.live.recover import DeviceLostError, Failure
from oomph.live.step import Loss, clip

T = TypeVar("T")

_WELL, _RAN_OUT, _BROKE = range(3)


class OutOfStepError(RunError):
    """This rank cannot do what the others wait for. They wait until they are told otherwise, or until it has ended."""


@dataclass(frozen=True)
class Failures:
    """Memory ran out on some ranks, in one part of a step.

    Attributes:
        by_rank: what happened, by the rank.
    """

    by_rank: dict[int, Failure]


class Parallel(Protocol):
    """A way of sharing a model among ranks."""

    @property
    def ranks(self) -> Ranks:
        """The processes."""
        ...

    @property
    def in_step(self) -> bool:
        """Whether ranks wait for each other within a micro-batch, so that each needs one whenever another has one."""
        ...

    def loss(self, loss: Loss) -> Loss:
        """The loss function that the step calls instead of one of `step.LOSSES`."""
        ...

    def knows(self, name: str) -> bool:
        """Whether a rank that fails can be drained with what a micro-batch of this name does."""
        ...

    def begin(self, name: str, learns: bool = False) -> None:
        """A micro-batch begins; all micro-batches of a name issue the same collectives.

        Args:
            name: of what runs.
            learns: whether this one shows what they are.
        """
        ...

    def end(self) -> None:
        """It is through."""
        ...

    def drain(self) -> None:
        """This rank failed: what the others still wait for in this micro-batch is issued, with nothing of worth in it.

        Raises:
            OutOfStepError: it is not known what they wait for, or there is no memory for it.
        """
        ...

    def reset(self) -> None:
        """Some rank failed: the gradients of this step are dropped, and whatever else its micro-batches left behind."""
        ...

    def ready(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """Takes the memory that `clip` needs, and computes what one rank can by itself."""
        ...

    def clip(
        self, optimizer: torch.optim.Optimizer, max_norm: float | None, scaler: torch.amp.GradScaler | None
    ) -> float | None:
        """Sums the gradients over ranks, where that is not done yet, unscales and clips them: `step.clip` of all ranks.

        Returns:
            The norm of the whole gradient; none where there is no largest norm.
        """
        ...


class Silent:
    """Micro-batches communicate nothing: there is nothing to learn of them, to watch, or to drain."""

    in_step = False

    def loss(self, loss: Loss) -> Loss:
        """The same."""
        return loss

    def knows(self, name: str) -> bool:
        """There is nothing to know."""
        return True

    def begin(self, name: str, learns: bool = False) -> None:
        """Nothing is watched."""

    def end(self) -> None:
        """Nothing was watched."""

    def drain(self) -> None:
        """Nobody waits within a micro-batch."""


class Alone(Silent):
    """One process. Nothing is shared."""

    ranks = Ranks()

    def reset(self) -> None:
        """Nothing is left behind."""

    def ready(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """Nothing is needed."""

    def clip(
        self, optimizer: torch.optim.Optimizer, max_norm: float | None, scaler: torch.amp.GradScaler | None
    ) -> float | None:
        """`step.clip`."""
        return clipped(optimizer, max_norm, scaler)


def clipped(optimizer: torch.optim.Optimizer, max_norm: float | None, scaler: torch.amp.GradScaler | None) -> float | None:
    """`step.clip`, and waits for the norm, so that what goes wrong with the gradients does so before the update."""
    norm = clip(optimizer, max_norm, scaler)
    return None if norm is None else float(norm)


def together(parallel: Parallel, run: Callable[[], T | Failure]) -> T | Failures:
    """Runs a part of a step on every rank, and agrees on how it went.

    Args:
        parallel: how the ranks share the model.
        run: gives a `Failure` where memory runs out, as `recover.attempt` does.

    Returns:
        What it gave; where memory ran out on one rank at least, the failures, on all ranks.

    Raises:
        RunError: something else went wrong on another rank. On the rank where it did, its exception is raised.
        DeviceLostError: this rank cannot issue anything any more, and the others wait for it.
        OutOfStepError: likewise.
    """
    ranks = parallel.ranks
    if ranks.size == 1:
        alone = run()
        return Failures({0: alone}) if isinstance(alone, Failure) else alone
    broken: Exception | None = None
    try:
        outcome: T | Failure | None = run()
    except DeviceLostError:
        raise
    except Exception as error:
        broken, outcome = error, None
    failure = outcome if isinstance(outcome, Failure) else None
    level = _BROKE if broken is not None else _RAN_OUT if failure is not None else _WELL
    if level != _WELL:
        parallel.drain()
    (worst,) = ranks.most([level])
    if worst == _WELL:
        assert not isinstance(outcome, Failure)
        return outcome  # type: ignore[return-value]
    del outcome
    parallel.reset()
    told = ranks.exchange(failure if broken is None else f"{type(broken).__name__}: {broken}".partition("\n")[0])
    if broken is not None:
        raise broken
    for rank, words in enumerate(told):
        if isinstance(words, str):
            raise RunError(f"rank {rank} failed: {words}", "see what that rank has written")
    return Failures({rank: told_one for rank, told_one in enumerate(told) if isinstance(told_one, Failure)})
