"""Who is told how a run goes: the screen, the log of the run's folder, and other tools where the recipe asks for them."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from oomph.errors import UserError
from oomph.live.watching import kernel_percent
from oomph.recipe import Recipe
from oomph.recipe.writing import plain
from oomph.run_records import EvaluationRecord, StepRecord


class Observer(Protocol):
    """Is told what a run does. Nothing of it is told before it is done."""

    def note(self, sentence: str) -> None:
        """Something noteworthy."""
        ...

    def begin(self, stage: str, steps: int, done: int) -> None:
        """A stage's steps begin, after some that were done before."""
        ...

    def step(self, record: StepRecord) -> None:
        """A step is committed; step 0 is the dry run before the first one, of which nothing stays."""
        ...

    def evaluation(self, record: EvaluationRecord) -> None:
        """The model was evaluated."""
        ...

    def end(self) -> None:
        """The stage's steps end, or the run does."""
        ...


class Log(Protocol):
    """What other tools offer for numbers."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Numbers by their names, after a step of the run."""
        ...

    def close(self) -> None:
        """No more come."""
        ...


class Busy:
    """The share of the time in which the device was busy, since it was last asked; None where nobody says it.

    On a card it is what NVML says of the last moments, on the CPU the process's time over all cores.

    Args:
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._cores = len(os.sched_getaffinity(0))
        self._since = time.perf_counter(), time.process_time()

    def share(self) -> float | None:
        """The share, from 0 to 1."""
        if self._cuda:
            percent = kernel_percent()
            return None if percent is None else percent / 100
        (before, used), self._since = self._since, (time.perf_counter(), time.process_time())
        elapsed = self._since[0] - before
        return min(1.0, (self._since[1] - used) / elapsed / self._cores) if elapsed > 0 else None


def open_logs(names: Sequence[str], recipe: Recipe, folder: Path) -> list[Log]:
    """The tools that a recipe names in `run.log_to`.

    Args:
        names: of the tools.
        recipe: its name and keys are told to them.
        folder: the run's.

    Raises:
        UserError: some of them are not installed.
    """
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(f"run.log_to names {name}, which is not installed")
    if missing:
        raise UserError(missing, f"install {', '.join(names)}, or leave it out; log.jsonl has all numbers too")
    return [_TensorBoard(folder) if name == "tensorboard" else _Tracker(name, recipe, folder) for name in names]


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """Trackio, and Weights & Biases, whose interface it has."""

    def __init__(self, name: str, recipe: Recipe, folder: Path) -> None:
        self._module: Any = importlib.import_module(name)
        own = {"dir": str(folder)} if name == "wandb" else {}
        self._module.init(project="oomph", name=folder.name, config=plain(recipe), **own)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._module.log(numbers, step=step)

    def close(self) -> None:
        self._module.finish()


def numbers_of(record: StepRecord | EvaluationRecord) -> dict[str, float]:
    """A record as numbers by name, for tools that draw them."""
    found = _evaluated(record) if isinstance(record, EvaluationRecord) else _stepped(record)
    return {f"{record.stage}/{name}": float(value) for name, value in found if value is not None}


def _evaluated(record: EvaluationRecord) -> Iterator[tuple[str, float | None]]:
    yield "evaluation loss", record.loss


def _stepped(record: StepRecord) -> Iterator[tuple[str, float | None]]:
    spent = record.seconds["data"] + record.seconds["step"]
    yield "loss", record.loss
    yield "balance loss", record.balance_loss
    yield "z-loss", record.z_loss
    yield "grad_norm", record.grad_norm
    yield "samples per second", record.samples / spent if spent > 0 else None
    yield "tokens per second", record.tokens / spent if spent > 0 else None
    yield "data wait seconds", record.seconds["data"]
    yield "memory predicted", record.predicted_peak_bytes
    yield "memory measured", record.measured_peak_bytes
    yield "recoveries", len(record.recoveries)
    yield "activity", record.activity
    yield from ((f"learning rate {name}", rate) for name, rate in record.learning_rates.items())
