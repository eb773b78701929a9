"""What a run writes down: a record for each step and each evaluation, and the summary of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from oomph.record import SCHEMA, Document, Record
from oomph.records import Choice, Recovery

LAST_STEPS = 50
"""Steps over which the load of experts is summed up; only those count that say it."""


@dataclass(frozen=True)
class ExpertLoad(Record):
    """How often the experts of one decoder layer were chosen in a step, by text tokens and by image tokens.

    `layer` is its number from 0; `text` and `image` have a number for each expert. A token that sees several experts counts
    for each of them, so all numbers add up to the step's tokens times top-k. Padding counts for none.
    """

    layer: int
    text: tuple[int, ...]
    image: tuple[int, ...]

    @property
    def total(self) -> tuple[int, ...]:
        """Of both kinds of tokens, for each expert."""
        return tuple(text + image for text, image in zip(self.text, self.image, strict=True))


@dataclass(frozen=True)
class StepRecord(Record):
    """A step that was committed; a line of the run's log.

    `step` counts from 1 in each stage, `epoch` says how many epochs are done with it. `loss` is the mean over the label tokens
    and None where there were none; `grad_norm` is that before clipping. `learning_rates` are those of the update, by the rules
    of the recipe. `tokens` are those of the samples without padding. `split` has the samples, padded tokens and images of each
    micro-batch. `predicted_peak_bytes` are of the whole step, its update included, as are the measured ones; the error is
    predicted less measured. `limit_bytes` are what a micro-batch was allowed to take. `seconds` are by part: waiting for
    ``data``, the ``step`` with all that was redone of it, and what came ``between`` it and the step before, as checkpoints
    and evaluations. `activity` is the share of the time in which the device was busy.

    Of a model with experts, `experts` has the load of each layer, in ascending order; lines of large models have it every few
    steps, and of the last one. `loss` is the cross-entropy alone. `balance_loss` is what the stage's balance adds, without
    its coefficient and as a mean over layers, so that 1 is an even load; `z_loss` likewise; None where the stage adds none.
    """

    stage: str
    step: int
    steps: int
    epoch: float
    loss: float | None
    grad_norm: float | None
    learning_rates: dict[str, float]
    samples: int
    tokens: int
    label_tokens: int
    choice: Choice
    split: tuple[tuple[int, ...], ...]
    predicted_peak_bytes: int | None
    measured_peak_bytes: int | None
    prediction_error_bytes: int | None
    limit_bytes: int
    recoveries: tuple[Recovery, ...]
    skipped: tuple[str, ...]
    shrunk: tuple[str, ...]
    seconds: dict[str, float]
    decode_seconds: float
    workers: int
    activity: float | None
    balance_loss: float | None = None
    z_loss: float | None = None
    experts: tuple[ExpertLoad, ...] = ()
    kind: Literal["step"] = "step"


def last_loads(steps: Sequence[StepRecord]) -> tuple[tuple[ExpertLoad, ...], float | None]:
    """The load of each layer, summed over the last steps of a stage that have one, and the mean of their balance loss.

    Args:
        steps: of one stage, in their order.
    """
    known = [step for step in steps if step.experts][-LAST_STEPS:]
    losses = [step.balance_loss for step in known if step.balance_loss is not None]
    loads = [
        ExpertLoad(
            layers[0].layer,
            tuple(map(sum, zip(*(load.text for load in layers), strict=True))),
            tuple(map(sum, zip(*(load.image for load in layers), strict=True))),
        )
        for layers in zip(*(step.experts for step in known), strict=True)
    ]
    return tuple(loads), sum(losses) / len(losses) if losses else None


@dataclass(frozen=True)
class EvaluationRecord(Record):
    """The loss over the tokens of `data.evaluation` after a step of a stage; 0 is before the first one."""

    stage: str
    step: int
    loss: float
    samples: int
    label_tokens: int
    seconds: float
    kind: Literal["evaluation"] = "evaluation"


@dataclass(frozen=True)
class StageSetup(Record):
    """What is known of a stage before it runs.

    `trained` has a sentence for each rule of what trains, `inexact` one for everything by which the cut of a step changes its
    gradient. `limit_bytes` are what its tensors may take in all.
    """

    steps: int
    choice: Choice
    limit_bytes: int
    trained: tuple[str, ...]
    inexact: tuple[str, ...]


@dataclass(frozen=True)
class RunStage(Record):
    """One stage of a run: all of its steps, those before an interruption included.

    `trained`, `inexact` and `limit_bytes` are those of its `StageSetup`. Peaks are the largest of all steps, errors predicted
    less measured as shares of the measured peak: the one that is furthest from zero, and the mean. `seconds` are the sums of
    all steps, by part. `experts` and `balance_loss` are what `last_loads` gives.
    """

    name: str
    steps: int
    planned_steps: int
    samples: int
    tokens: int
    trained: tuple[str, ...]
    inexact: tuple[str, ...]
    choice: Choice
    first_loss: float | None
    last_loss: float | None
    evaluations: tuple[EvaluationRecord, ...]
    limit_bytes: int
    predicted_peak_bytes: int | None
    measured_peak_bytes: int | None
    worst_error: float | None
    mean_error: float | None
    recoveries: tuple[Recovery, ...]
    skipped: tuple[str, ...]
    shrunk: tuple[str, ...]
    seconds: dict[str, float]
    experts: tuple[ExpertLoad, ...] = ()
    balance_loss: float | None = None

    @property
    def samples_per_second(self) -> float | None:
        """Over the steps and the waits for their data; None where no step ran."""
        spent = self.seconds.get("data", 0.0) + self.seconds.get("step", 0.0)
        return self.samples / spent if spent > 0 else None


@dataclass(frozen=True)
class RunSummary(Document):
    """`oomph train`'s answer, and its ``--json``.

    `device` is ``cuda`` or ``cpu``, `gpu` the card's name or the processor's. `model` is the folder of the last stage's model,
    empty while the run is not done. `date` is when it ended, in ISO 8601.
    """

    recipe: str
    folder: str
    device: Literal["cuda", "cpu"]
    gpu: str
    stages: tuple[RunStage, ...]
    model: str
    notes: tuple[str, ...]
    versions: dict[str, str]
    date: str
    kind: Literal["run"] = "run"
    schema: int = SCHEMA
