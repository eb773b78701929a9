"""`oomph train`: the recipe's stages, each from the last one's weights, in one folder that a run can go on in.

Recipe, data and folder are checked and every stage is planned before anything is trained. Then each stage whose model is not
there yet runs what is left of it; at the end the log is summed up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oomph.core.forms import FormKey, Source, Traced
from oomph.core.measuring import Machine
from oomph.core.run_summary import sum_up
from oomph.core.running import Ground, Planned, keep_states, plan_run, prepare_ground
from oomph.errors import UserError
from oomph.live.budget import uncounted
from oomph.live.data.dataset import Dataset, open_dataset
from oomph.live.data.encoding import Cost
from oomph.live.hardware import machine as machine_at_hand
from oomph.live.interrupts import Interrupts
from oomph.live.run_folder import Line, RunFolder
from oomph.live.run_stage import StageRun, Stopped
from oomph.live.saving import read_state
from oomph.live.stage_parts import Session, StageData
from oomph.live.watch import Log, Observer, open_logs
from oomph.recipe import Recipe, Stage
from oomph.recipe.routing import check_dispatch
from oomph.recipe.rules import parse_pattern
from oomph.records import Choice, Plan
from oomph.run_records import RunSummary

_SEEING = {"vision", "projector"}
"""Parts that only images reach."""


@dataclass(frozen=True)
class Options:
    """How a run is run.

    Attributes:
        output: its folder; else ``runs/`` and the recipe's name.
        resume: whether to go on with a run that is there.
        limit_bytes: the memory that it may take; none for all there is.
    """

    output: Path | None = None
    resume: bool = False
    limit_bytes: int | None = None

    def folder(self, recipe: Recipe) -> Path:
        """The run's folder."""
        return self.output or Path("runs") / recipe.name.replace("/", "-")


class Interrupted(KeyboardInterrupt):
    """The run was ended by the user; the folder holds all of it.

    Attributes:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


Draw = Callable[[Sequence[Line], str, Path], object]
"""Draws a run's log, under the run's name, into a folder."""


def train(
    recipe: Recipe, source: Source, options: Options, observer: Observer, draw: Draw = lambda lines, name, folder: None
) -> RunSummary:
    """Trains a recipe's stages.

    Args:
        recipe: what is wanted.
        source: where closed forms come from.
        options: where to, and within what memory.
        observer: told how it goes.
        draw: called at the end, however the run ends once it has begun.

    Raises:
        UserError: what is asked for cannot be done; nothing was trained.
        RunError: the run could not go on.
        Interrupted: the user ended it, and it is saved.
    """
    check_dispatch(recipe.stages)
    path = options.folder(recipe)
    with RunFolder(path, recipe, options.resume, recipe.run.keep) as folder:
        if options.resume and not folder.exists:
            observer.note(f"{path} holds no run yet: it begins")
        if folder.exists:
            folder.claim()
            folder.compare(observer.note)
        ground = prepare_ground(_as_begun(recipe, folder, observer.note), machine_at_hand(), options.limit_bytes)
        for note in ground.notes:
            observer.note(note)
        data = _open_data(ground.recipe, observer.note)
        plan, planned = plan_run(ground, _Uncounted(source))
        folder.claim()
        logs = open_logs(recipe.run.log_to, recipe, path)
        try:
            _run(ground, plan, planned, data, folder, observer, logs)
        except Stopped:
            raise Interrupted(path) from None
        finally:
            observer.end()
            draw(folder.lines(), recipe.name, path)
            for log in logs:
                log.close()
        found = _sum_up(ground, folder)
        folder.write_summary(found)
        return found


class _Uncounted:
    """A source whose traces, which take host memory, do not count as the run's, whenever they are made.

    Args:
        source: makes them.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def traced(self, key: FormKey) -> Traced:
        """The form of a key."""
        with uncounted():
            return self._source.traced(key)

    def prepare(self, keys: Sequence[FormKey]) -> None:
        """Makes several at once."""
        with uncounted():
            self._source.prepare(keys)


def _as_begun(recipe: Recipe, folder: RunFolder, notify: Callable[[str], None]) -> Recipe:
    """The recipe with the kinds of tensors that the checkpoint to go on from has."""
    stage = next((stage.name for stage in recipe.stages if not folder.model(stage.name).is_dir()), None)
    checkpoint = folder.checkpoints(stage).newest(notify) if folder.exists and stage is not None else None
    if checkpoint is None or stage is None:
        return recipe
    return keep_states(recipe, stage, Choice.from_json(read_state(checkpoint)["choice"]))


def _open_data(recipe: Recipe, notify: Callable[[str], None]) -> list[StageData]:
    """The data of all stages, checked.

    Raises:
        UserError: with the problems of all stages.
    """
    found: list[StageData] = []
    problems: list[str] = []
    hint, told = "", set[str]()

    def once(sentence: str) -> None:
        if sentence not in told:
            told.add(sentence)
            notify(sentence)

    for stage in recipe.stages:
        try:
            trained = open_dataset(recipe, stage, once)
            _check_reached(stage, trained)
            held_out = trained.encoder.data.evaluation
            found.append(StageData(trained, open_dataset(recipe, stage, once, evaluation=True) if held_out else None))
        except UserError as error:
            problems, hint = problems + error.problems, error.hint
    if problems:
        raise UserError(list(dict.fromkeys(problems)), hint)
    return found


def _check_reached(stage: Stage, data: Dataset) -> None:
    """Whether every sample has something to teach the stage: its text alone does not reach the tower and the projector.

    Raises:
        UserError: some have not.
    """
    trains = {parse_pattern(text).part for text, rate in stage.train.items() if rate != "frozen"}
    blind = np.flatnonzero(data.costs[:, Cost._fields.index("images")] == 0)
    if trains <= _SEEING and len(blind):
        raise UserError(
            f"stage {stage.name} trains {' and '.join(sorted(trains))} alone, which learns nothing from samples without "
            f"images; there are {len(blind):,}, the first is {data.place(int(blind[0]))}",
            f"give the stage files of its own in stages.{stage.name}.data.files, or let more of the model train",
        )


def _run(
    ground: Ground,
    plan: Plan,
    planned: Sequence[Planned],
    data: Sequence[StageData],
    folder: RunFolder,
    observer: Observer,
    logs: Sequence[Log],
) -> None:
    """Runs the stages that are not done, and links the last one's model."""
    device = torch.device(ground.machine.device)
    previous: Path | None = None
    before = 0

    def begun() -> None:
        folder.write_down(plan, _environment(ground))

    with Interrupts() as interrupts:
        session = Session(ground.recipe, folder, device, ground.limit_bytes, observer, logs, interrupts, begun)
        for stage, own in zip(planned, data, strict=True):
            name = stage.model.stage.name
            if not folder.model(name).is_dir():
                StageRun(session, stage, own, previous, before).run()
            previous = folder.model(name)
            before += own.steps(stage.model.stage, ground.recipe.run.seed)
    folder.finish(ground.recipe.stages[-1].name)


def _environment(ground: Ground) -> dict[str, Any]:
    machine = ground.machine
    return {**machine.to_json(), "memory_limit_bytes": ground.limit_bytes, "notes": list(ground.notes)}


def _sum_up(ground: Ground, folder: RunFolder) -> RunSummary:
    """What there is to say of a run that is done."""
    lines = folder.lines()
    machine: Machine = ground.machine
    return RunSummary(
        recipe=ground.asked.name,
        folder=str(folder.path),
        device=machine.device,
        gpu=ground.gpu.name,
        stages=tuple(sum_up(stage.name, folder.setup(stage.name), lines) for stage in ground.recipe.stages),
        model=str(folder.path / "final"),
        notes=ground.notes,
        versions=machine.versions,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
