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
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oomph.core.admission import Cost, Split, Together, TooLargeError
from oomph.core.rungs import live_rungs, recomputed
from oomph.errors import RunError
from oomph.live.balance import GROUPS, LENGTHS, Routed, Shares, routers_of
from oomph.live.budget import Memory
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.precision import arithmetic_of
from oomph.live.ranks.parallel import Alone, Failures, Parallel, together
from oomph.live.ranks.spreading import joined, spread
from oomph.live.recover import DeviceLostError, Failure, Place, Snapshot, attempt, kind_of, materialise
from oomph.live.step import IGNORED, LOSSES, Batch, accumulate, update
from oomph.live.step_parts import Admits, Sample, StepResult, TooLarge
from oomph.records import Choice, Recovery
from oomph.units import size

_LAST_IS_GOOD = "the last checkpoint is good: resume from it"


S = TypeVar("S", bound=Sample)
T = TypeVar("T")
ALONE = Alone()


class _Plan(NamedTuple):
    """A way to run the step: the rung, its admission, and the split of each rank in positions of the step's samples."""

    rung: int
    choice: Choice
    admission: Admits
    splits: tuple[Split, ...]

    @property
    def split(self) -> Split:
        """The micro-batches of all ranks."""
        return joined(self.splits)

    def number(self, rank: int, micro_batch: int) -> int:
        """A rank's micro-batch among those of all ranks; the largest of them where it had none of that number."""
        if micro_batch < len(self.splits[rank].micro_batches):
            return sum(len(split.micro_batches) for split in self.splits[:rank]) + micro_batch
        return self.largest

    @property
    def largest(self) -> int:
        """The micro-batch with the highest predicted peak."""
        peaks = self.split.peak_bytes
        return peaks.index(max(peaks))


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
        parallel: how the ranks share the model, as `ranks.apply.share` gives it. With several, each is given all samples of a
            step and collates its own: what collating needs of a sample can be made when it is asked for.
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
        parallel: Parallel = ALONE,
        *,
        rungs: Sequence[Choice] = (),
        max_grad_norm: float | None = 1.0,
        too_large: TooLarge = "fail",
        smaller: Callable[[S], S | None] = lambda sample: None,
    ) -> None:
        self._model, self._optimizer, self._admit, self._collate, self._memory = model, optimizer, admit, collate, memory
        self._parallel = parallel
        self._max_grad_norm, self._too_large, self._smaller = max_grad_norm, too_large, smaller
        self._device = next(model.parameters()).device
        self._arithmetic = arithmetic_of(choice.precision)
        self.scaler = self._arithmetic.make_scaler(self._device.type)
        self._around_forward = functools.partial(self._arithmetic.around_forward, self._device.type)
        self._rungs = live_rungs(choice, rungs)
        self._admissions: dict[int, Admits] = {}
        self._place, self._snapshot = Place(), Snapshot(model, self._device, self.scaler)
        self._routers = routers_of(model)
        self._applied: tuple[str, str] | None = None
        self._change_to(choice)
        together(parallel, self._make_states)

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
        return self._result(work, plan, gradients, commits, begun)

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
            if not isinstance(outcome, Failures):
                return plan, outcome
            failed = self._noted(plan, outcome)
            self._snapshot.restore()

    def _noted(self, plan: _Plan, failures: Failures) -> _Failed:
        """Admits less from now on, as every rank does. What is told of is the failure of the first rank that had one."""
        limit, ranks, split = plan.admission.limit_bytes, self._parallel.ranks, plan.split
        numbers = {rank: plan.number(rank, failure.micro_batch) for rank, failure in failures.by_rank.items()}
        for number in numbers.values():
            plan.admission.failed(split, number)
        rank, failure = min(failures.by_rank.items())
        message = failure.message if ranks.size == 1 else f"rank {rank}: {failure.message}"
        told = replace(failure, message=message, micro_batch=numbers[rank])
        return _Failed(plan, told, limit, self._peak() if rank == ranks.rank else None)

    def _plan(self, work: _Work[S]) -> _Plan | None:
        """The first rung that admits the step; None where the step has no label tokens."""
        while work.num_tokens:
            units = self._units(work)
            costs = [_cost([work.samples[position] for position in unit]) for unit in units]
            for rung, choice in enumerate(self._rungs):
                admission = self._admission(rung)
                try:
                    splits = spread(admission.split, costs, self._parallel.ranks.size)
                except TooLargeError as error:
                    unit, needed, limit = units[error.position], error.peak_bytes, error.limit_bytes
                else:
                    return _Plan(rung, choice, admission, tuple(_at(split, units) for split in splits))
            self._make_room(work, unit, needed, limit)
        return None

    def _units(self, work: _Work[S]) -> list[tuple[int, ...]]:
        """The positions of the samples that have to be in one micro-batch: of each alone, or of each group to be balanced."""
        units: dict[int, tuple[int, ...]] = {}
        for position in work.samples:
            group = position // self._routers.group
            units[group] = (*units.get(group, ()), position)
        return list(units.values())

    def _make_room(self, work: _Work[S], unit: Sequence[int], needed: int, limit: int) -> None:
        """Does what the policy says with a sample that does not fit by itself; of several, with the longest."""
        position = max(unit, key=lambda at: (work.samples[at].cost.tokens, work.samples[at].cost.images))
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
            if len(unit) > 1:
                raise RunError(
                    f"the {len(unit)} samples of the group of {sample.name} do not fit together: they take {size(needed)}, and "
                    f"there are {size(limit)}; the loss that balances a group has to see all of it at once",
                    "make balance.group smaller, or balance each sample (balance.kind=sequence)",
                )
            raise RunError(
                f"{sample.name} does not fit by itself: its {cost.tokens:,} tokens and {cost.images} images take "
                f"{size(needed)}, and there are {size(limit)}",
                "lower data.max_tokens, give it more memory, or let the run skip what does not fit (run.too_large=skip)",
            )

    def _try(self, work: _Work[S], plan: _Plan) -> _Gradients | Failures:
        """Forward and backward of all micro-batches, and the clipping of the gradient."""
        self._change_to(plan.choice)
        if not self._parallel.knows(recomputed(plan.choice)):
            self._show(work, plan)
        if self._memory is not None:
            self._memory.reset_peak()
        retries = self._retries()
        loss = self._accumulate(work, plan)
        if isinstance(loss, Failures):
            return loss
        peaks = plan.splits[self._parallel.ranks.rank].peak_bytes
        self._place("clip", peaks.index(max(peaks)) if peaks else 0)
        made = self._together(functools.partial(self._parallel.ready, self._optimizer, self._max_grad_norm))
        if isinstance(made, Failures):
            return made
        norm = self._together(functools.partial(self._parallel.clip, self._optimizer, self._max_grad_norm, self.scaler))
        return norm if isinstance(norm, Failures) else _Gradients(loss, norm, retries)

    def _accumulate(self, work: _Work[S], plan: _Plan) -> Tensor | Failures:
        """This rank's micro-batches. Where ranks wait for each other, one that has no more goes on with empty ones."""
        own, total = plan.splits[self._parallel.ranks.rank], None
        tokens = sum(sample.cost.tokens for sample in work.samples.values())
        shares = Shares(len(work.samples), len(self._units(work)), len(plan.split.micro_batches), tokens)
        self._routers.begin(self._model, shares)
        for number in range(max(len(split.micro_batches) for split in plan.splits)):
            run = functools.partial(self._micro_batch, plan, work, number, number < len(own.micro_batches))
            loss = self._together(run)
            if isinstance(loss, Failures):
                return loss
            if loss is not None:
                total = loss if total is None else total.add_(loss)
            del loss  # its number would be alive beside the next micro-batch, where no prediction has it
        return torch.zeros((), device=self._device) if total is None else total

    def _micro_batch(self, plan: _Plan, work: _Work[S], number: int, own: bool, learns: bool = False) -> Tensor | None:
        """Forward and backward of one of the rank's micro-batches; of an empty one, where others have one more."""
        if not own and not self._parallel.in_step:
            return None
        collate = self._piece if own else self._empty
        self._parallel.begin(recomputed(plan.choice), learns)
        loss = accumulate(
            self._model,
            [functools.partial(collate, plan, work, number)],
            self._parallel.loss(LOSSES[plan.choice.loss]),
            work.num_tokens,
            lambda phase, _: self._place(phase, number),
            self._around_forward,
            self.scaler,
        )
        self._parallel.end()
        return loss

    def _show(self, work: _Work[S], plan: _Plan) -> None:
        """Lets the ranks learn what they wait for in a micro-batch, from an empty one. Nothing else stays of it."""
        failures = self._together(functools.partial(self._micro_batch, plan, work, 0, False, True))
        if isinstance(failures, Failures):
            raise RunError("memory ran out in an empty micro-batch", "give it more memory, or divide the model over more GPUs")
        self._parallel.reset()
        self._snapshot.restore()

    def _together(self, run: Callable[[], T]) -> T | Failures:
        return together(self._parallel, functools.partial(attempt, run, self._model, self._place, self._device))

    def _update(self, number: int) -> None:
        together(self._parallel, functools.partial(self._commit, number))

    def _commit(self, number: int) -> None:
        try:
            update(self._optimizer, self.scaler)
        except Exception as error:
            if kind_of(error) is None:
                raise
            message = str(error).partition("\n")[0]
            raise RunError(
                f"memory ran out in the update of step {number}, of which a part may be done: {message}", _LAST_IS_GOOD
            ) from None

    def _result(
        self, work: _Work[S], plan: _Plan | None, gradients: _Gradients | None, commits: bool, begun: float
    ) -> StepResult:
        peak = self._peak() if plan is not None else None
        routed = self._routed() if gradients is not None and commits else Routed()
        if plan is not None and gradients is not None:
            self._learn(work, plan, gradients)
        return StepResult(
            loss=None if gradients is None else self._parallel.ranks.sums([float(gradients.loss)])[0],
            grad_norm=None if gradients is None else gradients.norm,
            num_tokens=work.num_tokens,
            choice=self._rungs[0] if plan is None else plan.choice,
            split=None if plan is None else plan.split,
            predicted_peak_bytes=None if plan is None else max(plan.split.peak_bytes),
            measured_peak_bytes=peak,
            recoveries=tuple(work.recoveries),
            skipped=tuple(work.skipped),
            shrunk=tuple(work.shrunk),
            seconds=time.perf_counter() - begun,
            routed=routed,
        )

    def _routed(self) -> Routed:
        """What the routers of all ranks did in the step that was just committed; biases that balance experts move by it."""
        if not self._routers:
            return Routed()
        return self._routers.conclude(self._model, self._parallel.ranks.sums(self._routers.totals(self._model)))

    def _learn(self, work: _Work[S], plan: _Plan, gradients: _Gradients) -> None:
        """Lets the next steps take less where the allocator had to give memory back, and more after many clean ones."""
        (more,) = self._parallel.ranks.most([self._retries() - gradients.retries])
        if more:
            message = f"the allocator gave back what it kept for later {more} times"
            failure = Failure("allocator", message, "step", "", plan.largest)
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
            from_split=before.split.micro_batches,
            to_split=() if plan is None else plan.split.micro_batches,
        )

    def _piece(self, plan: _Plan, work: _Work[S], number: int) -> Batch:
        """One of the rank's micro-batches."""
        own = plan.splits[self._parallel.ranks.rank]
        positions = own.micro_batches[number]
        samples = [work.samples[position] for position in positions]
        told: Batch = {}
        if self._routers:
            told[LENGTHS] = torch.tensor([sample.cost.tokens for sample in samples])
        if self._routers.group > 1:
            groups = [position // self._routers.group for position in positions]
            told[GROUPS] = torch.tensor([sorted(set(groups)).index(group) for group in groups])
        return self._batch(samples, own.shapes[number].tokens, told)

    def _empty(self, plan: _Plan, work: _Work[S], number: int) -> Batch:
        """A micro-batch of no weight: the smallest sample of the step, without labels."""
        smallest = min(work.samples.values(), key=lambda sample: (sample.cost.tokens, sample.cost.images))
        told: Batch = {LENGTHS: torch.zeros(1, dtype=torch.int64)} if self._routers else {}
        batch = self._batch([smallest], min(shape.tokens for shape in plan.split.shapes), told)
        return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}

    def _batch(self, samples: Sequence[S], tokens: int, told: Batch) -> Batch:
        """The micro-batch on the device, with what routers are told of it."""
        batch = {**self._collate(samples, tokens), **told}
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


def _at(split: Split, units: Sequence[tuple[int, ...]]) -> Split:
    """A split of what has to be together, in positions of the step's samples."""
    pieces = (sorted(position for unit in piece for position in units[unit]) for piece in split.micro_batches)
    return split._replace(micro_batches=tuple(map(tuple, pieces)))


def _cost(samples: Sequence[Sample]) -> Cost:
    """What samples cost that have to be in one micro-batch."""
    costs = [sample.cost for sample in samples]
    if len(costs) == 1:
        return costs[0]
    return Together(max(cost.tokens for cost in costs), sum(cost.images for cost in costs), len(costs))
