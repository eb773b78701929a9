"""One exact step: cut as predicted, tried, redone smaller where memory runs out, committed once.

    remember random states and buffers
    until the gradients of all samples are there:
        cut the samples into micro-batches that are predicted to fit, with the first of the rungs that has such a cut
        forward and backward of each, clip: where memory runs out, drop everything, note it, put everything back
    update the parameters

What is done after that (schedules, logs, checkpoints) is the caller's. A step that was redone gives what a step gives that was
cut like this at once. docs/exact-step.md says what is exact.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oomph.core.admission import Cost, Split, TooLargeError
from oomph.core.rungs import live_rungs, recomputed
from oomph.errors import RunError
from oomph.live.budget import Memory
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.precision import arithmetic_of
from oomph.live.recover import DeviceLostError, Failure, Place, Snapshot, attempt, kind_of, materialise
from oomph.live.step import LOSSES, Batch, accumulate, clip, update
from oomph.records import Choice, Recovery
from oomph.units import size

TooLarge = Literal["fail", "skip", "shrink"]
"""What is done with a sample that does not fit by itself on any rung."""

_LAST_IS_GOOD = "the last checkpoint is good: resume from it"


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


S = TypeVar("S", bound=Sample)
T = TypeVar("T")


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


class _Plan(NamedTuple):
    """A way to run the step: the rung, its admission, the split, and the split in positions of the step's samples."""

    rung: int
    choice: Choice
    admission: Admits
    split: Split
    micro_batches: tuple[tuple[int, ...], ...]


class _Gradients(NamedTuple):
    """The gradients are there: the loss that they are of, their norm, and the allocator's retries before."""

    loss: Tensor
    norm: float | None
    retries: int


class _Failed(NamedTuple):
    """A plan that failed, with what was allowed and taken then."""

    plan: _Plan
    failure: Failure
    limit_bytes: int
    measured_bytes: int | None


@dataclass
class _Work(Generic[S]):
    """The step as it stands: samples by their positions, what went wrong, what became of samples that do not fit."""

    number: int
    samples: dict[int, S]
    recoveries: list[Recovery] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    shrunk: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(sample.cost.label_tokens for sample in self.samples.values())


class Engine(Generic[S]):
    """Runs steps.

    Args:
        model: on its device, in training mode. How its blocks are recomputed is chosen here.
        optimizer: over its trainable parameters. Its states are made here where they are missing.
        choice: the configuration to run; micro-batch and accumulation of it are not used.
        admit: makes what cuts the steps of a choice.
        collate: makes the micro-batch of some samples, with ``labels``, padded to at least so many tokens; always the same.
        memory: counts what is taken; none on a CPU where nobody asks for it.
        rungs: choices to change to for a step with a sample that does not fit by itself, the fastest first, as a ladder has
            them. Only those count that differ from `choice` in what is recomputed.
        max_grad_norm: the largest norm of the gradient; none to leave it as it is.
        too_large: what is done with a sample that fits on none of them: ``fail`` ends the run, ``skip`` leaves it out of its
            step, whose loss is then the mean over the other samples' tokens, ``shrink`` asks `smaller` for it.
        smaller: the sample with smaller images; None where they cannot be any smaller.

    Attributes:
        scaler: of the loss; None where the precision has none.

    Raises:
        RunError: there is no memory for the optimizer's states.
        UserError: transformers cannot recompute this model's blocks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        choice: Choice,
        admit: Callable[[Choice], Admits],
        collate: Callable[[Sequence[S], int], Batch],
        memory: Memory | None = None,
        *,
        rungs: Sequence[Choice] = (),
        max_grad_norm: float | None = 1.0,
        too_large: TooLarge = "fail",
        smaller: Callable[[S], S | None] = lambda sample: None,
    ) -> None:
        self._model, self._optimizer, self._admit, self._collate, self._memory = model, optimizer, admit, collate, memory
        self._max_grad_norm, self._too_large, self._smaller = max_grad_norm, too_large, smaller
        self._device = next(model.parameters()).device
        self._arithmetic = arithmetic_of(choice.precision)
        self.scaler = self._arithmetic.make_scaler(self._device.type)
        self._around_forward = functools.partial(self._arithmetic.around_forward, self._device.type)
        self._rungs = live_rungs(choice, rungs)
        self._admissions: dict[int, Admits] = {}
        self._place, self._snapshot = Place(), Snapshot(model, self._device, self.scaler)
        self._applied: tuple[str, str] | None = None
        self._change_to(choice)
        self._make_states()

    def step(self, number: int, samples: Sequence[S]) -> StepResult:
        """Trains on some samples once.

        A step without label tokens, as where all its samples were skipped, updates nothing: no parameter decays, and the
        optimizer does not count it.

        Args:
            number: of the step, for messages and records.
            samples: all of the step.

        Raises:
            RunError: a sample does not fit, memory ran out in the update, or the device does not work any more. Whatever is
                raised before the update begins, an interrupt too, all is as it was before the step.
        """
        return self._run(number, samples, commits=True)

    def rehearse(self, number: int, samples: Sequence[S]) -> StepResult:
        """Does what `step` does but for the update, and puts everything back. What was learnt of memory stays.

        Raises:
            RunError: as `step`.
        """
        return self._run(number, samples, commits=False)

    def state(self) -> dict[str, Any]:
        """What later steps depend on beside model, optimizer and random states: plain numbers."""
        admissions = {recomputed(self._rungs[rung]): admission.state() for rung, admission in self._admissions.items()}
        return {"admissions": admissions, "scaler": None if self.scaler is None else self.scaler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave, also of an engine with other rungs."""
        for rung, choice in enumerate(self._rungs):
            if recomputed(choice) in state["admissions"]:
                self._admission(rung).restore(state["admissions"][recomputed(choice)])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _run(self, number: int, samples: Sequence[S], commits: bool) -> StepResult:
        begun = time.perf_counter()
        self._snapshot.take()
        work = _Work(number, dict(enumerate(samples)))
        try:
            plan, gradients = self._gradients(work)
            if gradients is not None and commits:
                self._update(number)
            if not commits:
                self._snapshot.restore()
        except DeviceLostError:
            raise
        except BaseException:
            self._snapshot.restore()
            raise
        return self._result(work, plan, gradients, begun)

    def _gradients(self, work: _Work[S]) -> tuple[_Plan | None, _Gradients | None]:
        """Tries until the gradients of all samples are there; nothing and None where there is nothing to learn from."""
        failed: _Failed | None = None
        while True:
            plan = self._plan(work)
            if failed is not None:
                assert plan is None or plan[3:] != failed.plan[3:] or plan.rung != failed.plan.rung, "admitted again"
                work.recoveries.append(self._recovery(work.number, failed, plan))
            if plan is None:
                return None, None
            outcome = self._try(work, plan)
            if not isinstance(outcome, Failure):
                return plan, outcome
            failed = _Failed(plan, outcome, plan.admission.limit_bytes, self._peak())
            plan.admission.failed(plan.split, outcome.micro_batch)
            self._snapshot.restore()

    def _plan(self, work: _Work[S]) -> _Plan | None:
        """The first rung that admits the step; None where the step has no label tokens."""
        while work.num_tokens:
            positions = list(work.samples)
            costs = [sample.cost for sample in work.samples.values()]
            for rung, choice in enumerate(self._rungs):
                admission = self._admission(rung)
                try:
                    split = admission.split(costs)
                except TooLargeError as error:
                    at, needed, limit = positions[error.position], error.peak_bytes, error.limit_bytes
                else:
                    micro_batches = tuple(tuple(positions[p] for p in piece) for piece in split.micro_batches)
                    return _Plan(rung, choice, admission, split, micro_batches)
            self._make_room(work, at, needed, limit)
        return None

    def _make_room(self, work: _Work[S], position: int, needed: int, limit: int) -> None:
        """Does what the policy says with a sample that does not fit by itself."""
        sample = work.samples[position]
        smaller = self._smaller(sample) if self._too_large == "shrink" else None
        if smaller is not None:
            work.samples[position] = smaller
            if sample.name not in work.shrunk:
                work.shrunk.append(sample.name)
        elif self._too_large == "skip":
            work.skipped.append(sample.name)
            del work.samples[position]
        else:
            cost = sample.cost
            raise RunError(
                f"{sample.name} does not fit by itself: its {cost.tokens:,} tokens and {cost.images} images take "
                f"{size(needed)}, and there are {size(limit)}",
                "lower data.max_tokens, give it more memory, or let the run skip what does not fit (run.too_large=skip)",
            )

    def _try(self, work: _Work[S], plan: _Plan) -> _Gradients | Failure:
        """Forward and backward of all micro-batches, and the clipping of the gradient."""
        self._change_to(plan.choice)
        if self._memory is not None:
            self._memory.reset_peak()
        retries = self._retries()
        pieces = [[work.samples[position] for position in piece] for piece in plan.micro_batches]
        tokens = [shape.tokens for shape in plan.split.shapes]
        run = functools.partial(
            accumulate,
            self._model,
            [functools.partial(self._batch, *micro_batch) for micro_batch in zip(pieces, tokens, strict=True)],
            LOSSES[plan.choice.loss],
            work.num_tokens,
            self._place,
            self._around_forward,
            self.scaler,
        )
        loss = agreed(attempt(run, self._model, self._place, self._device))
        if isinstance(loss, Failure):
            return loss
        self._place("clip", plan.split.peak_bytes.index(max(plan.split.peak_bytes)))
        norm = agreed(attempt(self._clip, self._model, self._place, self._device))
        return norm if isinstance(norm, Failure) else _Gradients(loss, norm, retries)

    def _clip(self) -> float | None:
        """Waits for the gradients, so that what goes wrong with them does so before the update."""
        norm = clip(self._optimizer, self._max_grad_norm, self.scaler)
        return None if norm is None else float(norm)

    def _update(self, number: int) -> None:
        try:
            update(self._optimizer, self.scaler)
        except Exception as error:
            if kind_of(error) is None:
                raise
            message = str(error).partition("\n")[0]
            raise RunError(
                f"memory ran out in the update of step {number}, of which a part may be done: {message}", _LAST_IS_GOOD
            ) from None

    def _result(self, work: _Work[S], plan: _Plan | None, gradients: _Gradients | None, begun: float) -> StepResult:
        peak = self._peak() if plan is not None else None
        if plan is not None and gradients is not None:
            self._learn(work, plan, gradients)
        return StepResult(
            loss=None if gradients is None else float(gradients.loss),
            grad_norm=None if gradients is None else gradients.norm,
            num_tokens=work.num_tokens,
            choice=self._rungs[0] if plan is None else plan.choice,
            split=None if plan is None else plan.split._replace(micro_batches=plan.micro_batches),
            predicted_peak_bytes=None if plan is None else max(plan.split.peak_bytes),
            measured_peak_bytes=peak,
            recoveries=tuple(work.recoveries),
            skipped=tuple(work.skipped),
            shrunk=tuple(work.shrunk),
            seconds=time.perf_counter() - begun,
        )

    def _learn(self, work: _Work[S], plan: _Plan, gradients: _Gradients) -> None:
        """Lets the next steps take less where the allocator had to give memory back, and more after many clean ones."""
        more = self._retries() - gradients.retries
        if more:
            message = f"the allocator gave back what it kept for later {more} times"
            failure = Failure("allocator", message, "step", "", plan.split.peak_bytes.index(max(plan.split.peak_bytes)))
            failed = _Failed(plan, failure, plan.admission.limit_bytes, self._peak())
            plan.admission.shrink()
            work.recoveries.append(replace(self._recovery(work.number, failed, plan), kind="retries"))
        elif not work.recoveries:
            for rung in range(plan.rung + 1):
                self._admission(rung).committed()

    def _recovery(self, number: int, failed: _Failed, plan: _Plan | None) -> Recovery:
        before, failure = failed.plan, failed.failure
        return Recovery(
            step=number,
            micro_batch=failure.micro_batch,
            kind=failure.kind,
            phase=failure.phase,
            module=failure.module,
            message=failure.message,
            predicted_bytes=before.split.peak_bytes[failure.micro_batch],
            limit_bytes=failed.limit_bytes,
            measured_bytes=failed.measured_bytes,
            from_choice=before.choice,
            to_choice=before.choice if plan is None else plan.choice,
            from_split=before.micro_batches,
            to_split=() if plan is None else plan.micro_batches,
        )

    def _batch(self, samples: Sequence[S], tokens: int) -> Batch:
        """The micro-batch on the device."""
        batch = self._collate(samples, tokens)
        return {name: v.to(self._device, non_blocking=True) if isinstance(v, Tensor) else v for name, v in batch.items()}

    def _change_to(self, choice: Choice) -> None:
        wanted = choice.checkpointing, choice.vision_checkpointing
        if wanted != self._applied:
            apply_checkpointing(self._model, *wanted)
            self._applied = wanted

    def _admission(self, rung: int) -> Admits:
        if rung not in self._admissions:
            self._admissions[rung] = self._admit(self._rungs[rung])
        return self._admissions[rung]

    def _make_states(self) -> None:
        try:
            materialise(self._optimizer)
        except Exception as error:
            if kind_of(error) is None:
                raise
            message = str(error).partition("\n")[0]
            hint = "choose another optimizer, or train fewer parameters"
            raise RunError(f"there is no memory for the optimizer's states: {message}", hint) from None

    def _peak(self) -> int | None:
        return None if self._memory is None else self._memory.peak_bytes

    def _retries(self) -> int:
        return 0 if self._memory is None else self._memory.retries


def agreed(outcome: T | Failure) -> T | Failure:
    """What all processes agree on before any of them goes on: a failure, if one of them failed. A single one does."""
    return outcome
