"""One stage of a run: the model, a dry run, the steps, evaluations and checkpoints, and the model as a folder."""

from __future__ import annotations

import hashlib
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedModel

from oomph.core.running import Planned
from oomph.core.schedule import rate_factor
from oomph.errors import UserError
from oomph.live.budget import Memory, memory_limit, resident, uncounted
from oomph.live.checkpoint import step_of
from oomph.live.data.collating import Prepared
from oomph.live.data.loading import Loaded, Loader, Setting, machine_limits
from oomph.live.data.shrinking import Shrinker
from oomph.live.engine import Engine
from oomph.live.evaluating import Evaluator
from oomph.live.export import save_model
from oomph.live.optimizers import optimizer_over
from oomph.live.precision import arithmetic_of
from oomph.live.saving import load_model, load_optimizer, load_random, read_state, save_state
from oomph.live.stage_parts import Session, StageData, StageForms, collator, seed_everything, settings, setup_of
from oomph.live.step_parts import StepResult
from oomph.live.watch import Busy, numbers_of
from oomph.live.weights import build_stage_model, parameter_groups
from oomph.recipe.writing import to_yaml
from oomph.run_records import EvaluationRecord, ExpertLoad, StepRecord

_SHORT = 128
"""Experts, over all layers, up to which each step's line of the log has their loads."""


class Stopped(Exception):
    """The user wants the run to end, and what was trained is saved."""


class StageRun:
    """Runs a stage from where its latest checkpoint is, else from its beginning.

    Args:
        session: the run.
        planned: the stage's plan.
        data: its data.
        previous: the folder of the model that the stage before has saved; none for the first stage.
        steps_before: of the stages before it.

    Raises:
        UserError: a data file has changed since the checkpoint.
    """

    def __init__(
        self, session: Session, planned: Planned, data: StageData, previous: Path | None, steps_before: int
    ) -> None:
        self._session, self._planned, self._data, self._previous = session, planned, data, previous
        self._stage, self._run, self._steps_before = planned.model.stage, session.recipe.run, steps_before
        self._order, self._steps = data.trained.order(self._run.seed), data.steps(self._stage, self._run.seed)
        self._checkpoints = session.folder.checkpoints(self._stage.name)
        self._from = self._checkpoints.newest(session.observer.note)
        if self._from is not None:
            data.check_unchanged(read_state(self._from)["data"])
        self._forms = StageForms(planned, data, self._run.grow_after)
        self._busy, self._ended = Busy(session.device.type), time.perf_counter()
        self._step, self._saved, self._evaluated = 0, -1, -1

    def run(self) -> None:
        """Trains what is left of the stage, and saves its model.

        Raises:
            Stopped: the user wants it to end.
            RunError: it cannot go on.
        """
        session = self._session
        with ExitStack() as stack:
            stack.enter_context(settings(self._planned.choice, session.device))
            self._model = self._build()
            memory = stack.enter_context(memory_limit(session.limit_bytes, session.device, resident(self._model)))
            self._optimizer = self._make_optimizer(self._model)
            self._engine = self._make_engine(memory)
            if self._from is None:
                session.folder.rewind(self._stage.name, -1)
            if self._from is None or step_of(self._from) < self._steps:
                self._rehearse()
            if self._from is not None:
                self._take_up(self._from)
            stack.callback(session.observer.end)
            session.observer.begin(self._stage.name, self._steps, self._step)
            self._train()
        encoder = self._data.trained.encoder
        session.folder.save_model(
            self._stage.name, lambda path: save_model(self._model, path, session.recipe, encoder, self._previous)
        )

    # What runs.

    def _build(self) -> PreTrainedModel:
        """The model as the stage finds it, or as its checkpoint left it; and what there is to say of it."""
        session, name = self._session, self._stage.name
        key, note = self._planned.model.keys(self._planned.choice)[0], session.observer.note
        model = build_stage_model(key, session.recipe, self._previous, session.device, self._run.seed, note)
        if self._from is not None:
            load_model(self._from, model)
        session.begun()
        setup = setup_of(model, self._planned, self._steps)
        session.folder.write_setup(name, setup)
        for sentence in setup.trained:
            note(f"{name}: {sentence}")
        for sentence in setup.inexact:
            note(f"{name}: not exact: {sentence}")
        if not setup.inexact:
            note(f"{name}: exact: another cut of a step changes nothing but the order of sums")
        numbers = {stage.name: number for number, stage in enumerate(session.recipe.stages)}
        seed_everything(self._run.seed + numbers[name])
        return model

    def _make_optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        choice, groups = self._planned.choice, parameter_groups(model, self._stage)
        optimizer = optimizer_over(groups, choice.optimizer, choice.optimizer_offload, choice.master_weights)
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        return optimizer

    def _make_engine(self, memory: Memory) -> Engine[Prepared]:
        norm = self._stage.max_grad_norm
        return Engine(
            self._model,
            self._optimizer,
            self._planned.choice,
            self._forms.admit,
            collator(self._data.trained, self._planned.choice, self._session.device),
            memory,
            rungs=self._planned.rungs if self._model.supports_gradient_checkpointing else (),
            max_grad_norm=None if norm == "none" else norm,
            too_large=self._run.too_large,
            smaller=Shrinker(self._data.trained, self._session.recipe, self._stage),
        )

    def _rehearse(self) -> None:
        """A dry run of a step of the samples that take most memory. Nothing of it stays but what is learnt of memory."""
        number = len(self._samples(0))
        with uncounted():
            samples = [self._data.trained.prepare(index) for index in self._forms.largest(number)]
        result = self._engine.rehearse(0, samples)
        record = self._record(Loaded(0, samples, 0.0, 0.0), result, 0)
        if self._from is None:
            self._session.folder.append(record)
        self._session.observer.step(record)

    def _take_up(self, checkpoint: Path) -> None:
        """Makes everything as it was when the checkpoint was saved."""
        session, name = self._session, self._stage.name
        with uncounted():
            load_optimizer(checkpoint, self._model, self._optimizer)
        self._engine.restore(read_state(checkpoint)["engine"])
        load_random(checkpoint)
        self._step = self._saved = step_of(checkpoint)
        self._evaluated = session.folder.rewind(name, self._step)
        session.observer.note(f"{name}: goes on after step {self._step:,} of {self._steps:,}")

    # The steps.

    def _train(self) -> None:
        workers = self._run.workers
        setting = Setting(1 if workers == "auto" else workers, 2 * self._stage.effective_batch)
        limits, evaluator = machine_limits(), self._make_evaluator()
        loader = Loader(self._data.trained.prepare, self._samples, self._step, self._steps, setting)
        try:
            self._pause(evaluator)
            while self._step < self._steps:
                loaded = self._load(loader)
                spent = self._train_on(loaded, loader.setting.workers)
                if workers == "auto":
                    loader.adapt(loaded, spent, limits)
                self._pause(evaluator)
        finally:
            loader.close()

    def _samples(self, step: int) -> list[int]:
        """The samples of a step, by its number from 0."""
        return self._order.step(step, self._stage.effective_batch, self._stage.epochs)

    def _load(self, loader: Loader) -> Loaded:
        """The samples of the next step. Where one cannot be had, what was trained is saved before the run ends."""
        try:
            with uncounted():
                return loader.next()
        except UserError:
            self._save()
            raise

    def _train_on(self, loaded: Loaded, workers: int) -> float:
        """Trains on a step's samples; returns the seconds that it took."""
        factor = rate_factor(self._stage.schedule, self._stage.warmup, self._step, self._steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        result = self._engine.step(self._step + 1, loaded.samples)
        self._step += 1
        record = self._record(loaded, result, workers)
        self._session.folder.append(record)
        self._session.observer.step(record)
        self._tell(record)
        return result.seconds

    def _record(self, loaded: Loaded, result: StepResult, workers: int) -> StepRecord:
        """What there is to say of a step, or of the dry run, which has no update and so no peak of one."""
        now, costs = time.perf_counter(), [sample.cost for sample in loaded.samples]
        between = max(0.0, now - self._ended - loaded.wait_seconds - result.seconds)
        self._ended = now
        split, measured, predicted = result.split, result.measured_peak_bytes, result.predicted_peak_bytes
        if self._step and split is not None:
            predicted = self._forms.of(result.choice).step_peak(split.shapes)
        done = min(self._step * self._stage.effective_batch, self._order.total_samples(self._stage.epochs))
        rates = {str(group["name"]): float(group["lr"]) for group in self._optimizer.param_groups}
        return StepRecord(
            stage=self._stage.name,
            step=self._step,
            steps=self._steps,
            epoch=done / self._order.epoch_samples,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rates=rates,
            samples=len(costs),
            tokens=sum(cost.tokens for cost in costs),
            label_tokens=result.num_tokens,
            choice=result.choice,
            split=() if split is None else tuple(map(tuple, split.shapes)),
            predicted_peak_bytes=predicted,
            measured_peak_bytes=measured,
            prediction_error_bytes=None if predicted is None or measured is None else predicted - measured,
            limit_bytes=self._forms.admit(result.choice).limit_bytes,
            recoveries=result.recoveries,
            skipped=result.skipped,
            shrunk=result.shrunk,
            seconds={"data": loaded.wait_seconds, "step": result.seconds, "between": between},
            decode_seconds=loaded.decode_seconds,
            workers=workers,
            activity=self._busy.share(),
            balance_loss=result.routed.balance_loss,
            z_loss=result.routed.z_loss,
            experts=self._loads(result),
        )

    def _loads(self, result: StepResult) -> tuple[ExpertLoad, ...]:
        """The loads that are written down: of each step where they are short, else of every tenth and of the last one."""
        loads = result.routed.experts
        written = sum(len(load.text) for load in loads) <= _SHORT or self._step in (1, self._steps) or self._step % 10 == 0
        return loads if written else ()

    def _tell(self, record: StepRecord | EvaluationRecord) -> None:
        for log in self._session.logs:
            log.log(numbers_of(record), self._steps_before + record.step)

    # Between steps.

    def _pause(self, evaluator: Evaluator | None) -> None:
        """Evaluates and saves where it is time for it, and ends where the user wants it."""
        run, last = self._run, self._step == self._steps
        if evaluator is not None and self._evaluated != self._step and (last or _due(self._step, run.evaluate_every)):
            self._evaluate(evaluator)
        stops = self._session.interrupts.came
        if last or stops or _due(self._step, run.save_every):
            self._save()
        if stops:
            raise Stopped

    def _make_evaluator(self) -> Evaluator | None:
        data, choice = self._data.evaluated, self._planned.choice
        if data is None:
            return None
        collate = collator(data, choice, self._session.device)
        admitted, arithmetic = self._forms.admit_evaluation(), arithmetic_of(choice.precision)
        return Evaluator(self._model, choice.loss, arithmetic, admitted, collate, self._stage.effective_batch)

    def _evaluate(self, evaluator: Evaluator) -> None:
        data = self._data.evaluated
        assert data is not None
        found = evaluator.evaluate(data.prepare, len(data), lambda: self._session.interrupts.came)
        if found is None:
            return
        loss, tokens, seconds = found
        record = EvaluationRecord(self._stage.name, self._step, loss, len(data), tokens, seconds)
        self._evaluated = self._step
        self._session.folder.append(record)
        self._session.observer.evaluation(record)
        self._tell(record)

    def _save(self) -> None:
        """Saves a checkpoint, unless there is one of this step or nothing was trained yet."""
        if self._step in (0, self._saved):
            return
        state = {
            "stage": self._stage.name,
            "step": self._step,
            "choice": self._planned.choice.to_json(),
            "engine": self._engine.state(),
            "data": self._data.trained.fingerprints(),
            "recipe": hashlib.sha256(to_yaml(self._session.recipe).encode()).hexdigest(),
        }
        with uncounted():
            self._checkpoints.save(self._step, lambda folder: save_state(folder, self._model, self._optimizer, state))
        self._saved = self._step


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0
