"""What the steps of a stage are made of: the session that all stages share, data, forms, and what is said of the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from oomph.core.admission import Admission
from oomph.core.admitting import Forms, admission, admission_of_evaluation
from oomph.core.layout import Shape
from oomph.core.running import Planned
from oomph.errors import UserError
from oomph.live.budget import uncounted
from oomph.live.data.collating import Prepared
from oomph.live.data.dataset import Dataset
from oomph.live.data.encoding import Cost
from oomph.live.exactness import exactness_of
from oomph.live.interrupts import Interrupts
from oomph.live.precision import arithmetic_of
from oomph.live.run_folder import RunFolder
from oomph.live.step import Batch
from oomph.live.watch import Log, Observer
from oomph.live.weights import trained_parts
from oomph.recipe import Recipe, Stage
from oomph.records import Choice
from oomph.run_records import StageSetup
from oomph.units import count

_PINNED = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


@dataclass(frozen=True)
class Session:
    """What all stages of a run share.

    Attributes:
        recipe: as it runs here.
        folder: the run's.
        device: where it runs.
        limit_bytes: what the user allows; none for all there is.
        observer: the screen.
        logs: other tools.
        interrupts: whether the user wants it to end.
        begun: called as soon as a stage's model is there, from when on the folder holds a run.
    """

    recipe: Recipe
    folder: RunFolder
    device: torch.device
    limit_bytes: int | None
    observer: Observer
    logs: Sequence[Log]
    interrupts: Interrupts
    begun: Callable[[], None]


@dataclass(frozen=True)
class StageData:
    """The data of a stage: what it trains on, and what it is evaluated on, if anything."""

    trained: Dataset
    evaluated: Dataset | None

    def steps(self, stage: Stage, seed: int) -> int:
        """How many steps the stage has."""
        steps = self.trained.order(seed).steps(stage.epochs, stage.effective_batch)
        return steps if stage.steps is None else min(steps, stage.steps)

    def kinds(self) -> Iterator[Cost]:
        """What samples cost that are trained on, each different cost once."""
        return (Cost(*row) for row in np.unique(self.trained.costs, axis=0).tolist())

    def check_unchanged(self, before: Sequence[Sequence[Any]]) -> None:
        """Compares the files with those of a checkpoint.

        Raises:
            UserError: some of them have changed.
        """
        now = self.trained.fingerprints()
        problems = [
            f"the data file {own.path} has changed since the checkpoint was made"
            for own, (_, digest, samples, weight) in zip(now, before, strict=False)
            if (own.sha256, own.samples, own.weight) != (digest, samples, weight)
        ]
        if len(now) != len(before):
            problems.append(f"the checkpoint was made with {len(before)} data files, and there are {len(now)}")
        if problems:
            raise UserError(problems, "put back what it was trained on, or start a new run with another --output")


class StageForms:
    """What is predicted of a stage's micro-batches, for each choice that its steps run on.

    Args:
        planned: the stage.
        data: its data.
        grow_after: steps without running out of memory after which more is tried again.
    """

    def __init__(self, planned: Planned, data: StageData, grow_after: int) -> None:
        self._planned, self._data, self._grow_after = planned, data, grow_after
        self._forms: dict[Choice, Forms] = {}
        self._admissions: dict[Choice, Admission] = {}

    def of(self, choice: Choice) -> Forms:
        """The forms of a choice; those that its steps may need are made."""
        if choice not in self._forms:
            planned = self._planned
            self._forms[choice] = Forms(planned.model, choice, planned.granularity)
            self._forms[choice].prepare(self._data.kinds(), planned.model.stage.effective_batch)
        return self._forms[choice]

    def admit(self, choice: Choice) -> Admission:
        """The admission of a choice's steps, which is one and the same."""
        if choice not in self._admissions:
            self._admissions[choice] = admission(self._planned, choice, self.of(choice), self._grow_after)
        return self._admissions[choice]

    def admit_evaluation(self) -> Admission:
        """A new admission of evaluations."""
        return admission_of_evaluation(self._planned, self._planned.choice, self.of(self._planned.choice))

    def largest(self, number: int) -> list[int]:
        """The samples that take most memory by themselves, the largest first; some several times where there are too few."""
        data, forms = self._data.trained, self.of(self._planned.choice)
        costs = data.costs[:, [Cost._fields.index("tokens"), Cost._fields.index("images")]]
        kinds, which = np.unique(costs, axis=0, return_inverse=True)
        peaks = np.array([forms.peak(Shape(1, *kind)) for kind in kinds.tolist()])
        found: list[int] = np.resize(np.argsort(-peaks[which.ravel()], kind="stable"), number).tolist()
        return found


def collator(data: Dataset, choice: Choice, device: torch.device) -> Callable[[Sequence[Prepared], int], Batch]:
    """Makes micro-batches for a device, padded to so many tokens at the least.

    For a card they are in pinned memory; on the CPU they count as the copies do that a card gets.
    """
    inputs = arithmetic_of(choice.precision).inputs
    made: Callable[[Tensor], Tensor] = Tensor.clone if device.type == "cpu" else Tensor.pin_memory

    def collate(samples: Sequence[Prepared], tokens: int = 0) -> Batch:
        with uncounted():
            batch = data.collate(samples, inputs, tokens)
        return {name: made(value) if isinstance(value, Tensor) else value for name, value in batch.items()}

    return collate


def settings(choice: Choice, device: torch.device) -> AbstractContextManager[object]:
    """What a choice sets of the device: its allocator, from now on, and in the block the kernel of attention.

    The CPU has one of each.
    """
    if device.type == "cuda":
        torch.cuda.memory._set_allocator_settings(f"expandable_segments:{choice.expandable_segments}")
    pinned = _PINNED.get(choice.attention) if device.type == "cuda" else None
    return nullcontext() if pinned is None else sdpa_kernel([pinned])


def setup_of(model: PreTrainedModel, planned: Planned, steps: int) -> StageSetup:
    """What is known of a stage before it runs."""
    trained = [
        f"{part.pattern} trains at {part.rate:g}: {count(part.parameters)} parameters in {part.tensors:,} "
        f"tensor{'' if part.tensors == 1 else 's'}"
        for part in trained_parts(model, planned.model.stage)
    ]
    return StageSetup(steps, planned.choice, planned.limit_bytes, tuple(trained), tuple(exactness_of(model)))


def seed_everything(seed: int) -> None:
    """Sets the generators of random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
