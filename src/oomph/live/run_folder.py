"""The folder of a run: whose it is, what lies where in it, and its log.

``recipe.yaml``, ``plan.json`` and ``environment.json`` say what was asked for, what was planned and where it runs;
``log.jsonl`` has a line for each step and each evaluation, ``run.json`` sums it up. Each stage has a folder with
``checkpoints`` and, when it is done, ``model``; ``final`` is the last stage's model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from oomph.errors import RunError, UserError
from oomph.live.checkpoint import Checkpoints
from oomph.live.saving import disk_errors
from oomph.recipe import Recipe, load
from oomph.recipe.writing import differences, to_yaml
from oomph.records import Plan
from oomph.run_records import EvaluationRecord, RunSummary, StageSetup, StepRecord

RECIPE = "recipe.yaml"
_LOCK, _SETUP, _LOG = ".lock", "stage.json", "log.jsonl"
_UNFINISHED = ".unfinished-"
_FREE = ("name", "memory.", "hardware.", "run.", "data.samples", "data.evaluation")
"""Keys that may be another at a resume: what they change is not what a step learns."""
_BOUND = ("run.seed",)
_FILES = ("path", "images")
"""Of data files these may be others, as their contents are compared."""

Line = StepRecord | EvaluationRecord


class RunFolder:
    """A run's folder, which one process has at a time while its block runs.

    Args:
        path: where it is, or will be.
        recipe: the run's.
        resume: whether to go on with a run that is there.
        keep: checkpoints of a stage that stay.

    Raises:
        UserError: there is something, and it is not to be gone on with; or it belongs to another recipe.
    """

    def __init__(self, path: Path, recipe: Recipe, resume: bool, keep: int) -> None:
        self.path, self._recipe, self._keep = path, recipe, keep
        self._lock: int | None = None
        try:
            found = sorted(entry.name for entry in path.iterdir() if entry.name != _LOCK)
        except FileNotFoundError:
            found = []
        except NotADirectoryError:
            raise UserError(f"{path} is a file, where a run needs a folder", "choose another --output") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}", "choose another --output") from None
        self.exists = RECIPE in found and self._trained()
        if self.exists and not resume:
            raise UserError(
                f"{path} holds a run already", "--resume goes on with it, and another --output or name starts a new one"
            )
        if found and RECIPE not in found and not all(name.startswith(_UNFINISHED) for name in found):
            raise UserError(f"{path} is not empty, and holds no run", "choose another --output")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _trained(self) -> bool:
        """Whether anything was trained, so that the run is one; else there is nothing to lose."""
        kept = [*self.path.glob("*/checkpoints/step-*"), *self.path.glob("*/model")]
        return bool(kept) or any(isinstance(line, StepRecord) and line.step for line in self.lines())

    def claim(self) -> None:
        """Makes the folder, and keeps other runs out of it until the block ends.

        Raises:
            UserError: another one is in it, or it cannot be written to.
        """
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is going on in {self.path}", "wait for it, or choose another --output") from None
        except OSError as error:
            hint = "choose another --output, where you may write"
            raise UserError(f"{self.path} cannot be written to: {error.strerror}", hint) from None

    def compare(self, notify: Callable[[str], None]) -> None:
        """Compares the recipe with that of the run that is there.

        Args:
            notify: told of what differs and may.

        Raises:
            UserError: it differs in something that the run depends on.
        """
        changed = differences(load(self.path / RECIPE), self._recipe)
        told = {key: f"{key} was {_shown(before)} and is {_shown(after)}" for key, (before, after) in changed.items()}
        bound = [sentence for key, sentence in told.items() if not _may_change(key)]
        if bound:
            raise UserError(
                [f"{self.path} belongs to another recipe: {sentence}" for sentence in bound],
                "go on with the recipe that it was made with, or choose another --output",
            )
        for sentence in told.values():
            notify(f"{sentence}: taken over")

    def write_down(self, plan: Plan, environment: dict[str, Any]) -> None:
        """Saves what was asked for, what was planned and where it runs. The recipe, which makes the folder a run's, comes last.

        Raises:
            RunError: the disk is full, or cannot be written to.
        """
        _write(self.path / "plan.json", json.dumps(plan.to_json(), indent=2) + "\n")
        _write(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        _write(self.path / RECIPE, to_yaml(self._recipe))

    def write_setup(self, stage: str, setup: StageSetup) -> None:
        """Saves what is known of a stage before it runs.

        Raises:
            RunError: the disk is full, or cannot be written to.
        """
        path = self.path / stage / _SETUP
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
        _write(path, json.dumps(setup.to_json(), indent=2) + "\n")

    def setup(self, stage: str) -> StageSetup:
        """What was known of a stage that has begun.

        Raises:
            RunError: the file that says it is gone or damaged.
        """
        path = self.path / stage / _SETUP
        try:
            return StageSetup.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None

    def checkpoints(self, stage: str) -> Checkpoints:
        """The checkpoints of a stage."""
        return Checkpoints(self.path / stage / "checkpoints", self._keep)

    def model(self, stage: str) -> Path:
        """The folder of a stage's model; it is there once the stage is done."""
        return self.path / stage / "model"

    def save_model(self, stage: str, save: Callable[[Path], None]) -> None:
        """Saves a stage's model so that it is there whole or not at all.

        Raises:
            RunError: the disk is full, or cannot be written to.
        """
        final = self.model(stage)
        temporary = final.with_name(f"{_UNFINISHED}{final.name}")
        with _writing(final):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save(temporary)
            _flush(temporary)
            temporary.rename(final)
            _flush(final.parent)

    def finish(self, stage: str) -> Path:
        """Makes `final` the model of the last stage: a link, or a copy where there are none.

        Raises:
            RunError: the disk is full, or cannot be written to.
        """
        final, model = self.path / "final", self.model(stage)
        if final.is_symlink() or final.exists():
            return final
        with _writing(final):
            try:
                final.symlink_to(model.relative_to(self.path), target_is_directory=True)
            except OSError:
                shutil.copytree(model, final)
        return final

    def write_summary(self, summary: RunSummary) -> None:
        """Saves the summary as ``run.json``.

        Raises:
            RunError: the disk is full, or cannot be written to.
        """
        _write(self.path / "run.json", json.dumps(summary.to_json(), indent=2) + "\n")

    def append(self, line: Line) -> None:
        """Adds a line to the log.

        Raises:
            RunError: the disk is full, or cannot be written to.
        """
        with _writing(self.path / _LOG), open(self.path / _LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(line.to_json()) + "\n")

    def lines(self) -> list[Line]:
        """The log."""
        return read_log(self.path)

    def rewind(self, stage: str, step: int) -> int:
        """Takes out of the log what came after a step of a stage, as it is done again; before its first one with -1.

        Returns:
            The last step of the stage after which the model was evaluated; -1 where there is none.
        """
        rows = _rows(self.path)
        stages = [item.name for item in self._recipe.stages]
        kept = [row for row in rows if (stages.index(row["stage"]), row["step"]) <= (stages.index(stage), step)]
        if rows:
            _write(self.path / _LOG, "".join(json.dumps(row) + "\n" for row in kept))
        return max((row["step"] for row in kept if row["kind"] == "evaluation" and row["stage"] == stage), default=-1)


def read_log(folder: Path) -> list[Line]:
    """The log of a run's folder, but for lines that are not whole, as the last one of a run that was killed."""
    found: list[Line] = []
    for row in _rows(folder):
        with contextlib.suppress(ValueError):
            found.append(StepRecord.from_json(row) if row["kind"] == "step" else EvaluationRecord.from_json(row))
    return found


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log as they were written."""
    try:
        text = (folder / _LOG).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _may_change(key: str) -> bool:
    own = key.split(".", 2)[2] if key.startswith("stages.") and key.count(".") > 1 else key
    if own.startswith("data.files.") and own.rpartition(".")[2] in _FILES:
        return True
    return own.startswith(_FREE) and own not in _BOUND


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _write(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    temporary = path.with_name(f"{_UNFINISHED}{path.name}")
    with _writing(path):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What cannot be written is an error of the run."""
    try:
        with disk_errors():
            yield
    except OSError as error:
        hint = "make room, and go on with --resume; checkpoints are as they were"
        raise RunError(f"{path} cannot be written: {error.strerror or error}", hint) from error
