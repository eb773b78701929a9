"""What a step is given and what it gives: samples, what cuts them into micro-batches, what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from oomph.core.admission import Cost, Split
from oomph.live.balance import Routed
from oomph.records import Choice, Recovery

TooLarge = Literal["fail", "skip", "shrink"]
"""What is done with a sample that does not fit by itself on any rung."""


class SampleCost(Cost, Protocol):
    """What the step has to know of a sample."""

    @property
    def label_tokens(self) -> int:
        """Tokens that the loss is computed on."""
        ...


class Sample(Protocol):
    """A sample that is ready to be collated."""

    @property
    def name(self) -> str:
        """Where it comes from, for messages."""
        ...

    @property
    def cost(self) -> SampleCost:
        """What it costs."""
        ...


class Admits(Protocol):
    """Cuts steps into micro-batches that fit; `core.admission.Admission` does."""

    @property
    def limit_bytes(self) -> int:
        """What a micro-batch may take now."""
        ...

    def split(self, costs: Sequence[Cost]) -> Split:
        """A split that is predicted to fit.

        Raises:
            TooLargeError: a sample does not fit by itself.
        """
        ...

    def failed(self, split: Split, micro_batch: int) -> None:
        """Memory ran out in a micro-batch: nothing with its predicted peak is admitted from now on."""
        ...

    def committed(self) -> None:
        """A step ran clean."""
        ...

    def shrink(self) -> None:
        """The next steps take less."""
        ...

    def state(self) -> dict[str, int]:
        """What was learnt."""
        ...

    def restore(self, state: dict[str, int]) -> None:
        """Takes over what was learnt."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean over the step's label tokens; None where there were none, and nothing was updated.
        grad_norm: before it was clipped; None also where gradients are not clipped.
        num_tokens: label tokens.
        choice: the rung that the step ran on.
        split: in positions of the step's samples; None where nothing ran.
        predicted_peak_bytes: of the split.
        measured_peak_bytes: of the step as it was committed, its update included; None where nobody counts.
        recoveries: what went wrong before, in order.
        skipped: names of samples that were left out, since they do not fit.
        shrunk: names of samples that were made smaller.
        seconds: of all of it.
        routed: what became of its routing; nothing where nothing was updated.
    """

    loss: float | None
    grad_norm: float | None
    num_tokens: int
    choice: Choice
    split: Split | None
    predicted_peak_bytes: int | None
    measured_peak_bytes: int | None
    recoveries: tuple[Recovery, ...]
    skipped: tuple[str, ...]
    shrunk: tuple[str, ...]
    seconds: float
    routed: Routed = field(default_factory=Routed)
