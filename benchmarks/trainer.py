"""Trains one model twice, here and in ``transformers.Trainer``, on the same samples with the same settings.

The two runs take their steps by turns, in one process and on one thread. A turn is everything from the end of a step to the end
of the next: reading and encoding its samples, forward and backward, clipping, the update, what is logged. Times are the
processor's, which other programs change little. The first steps, in which much is made once, are left out.

Samples of equal length are trained on in equal micro-batches, once as they are and once without the counting of memory, which
on the CPU is done in Python and on a card by its allocator. Of samples whose lengths differ, the other trainer takes fixed
micro-batches in their order, padded, and ours cuts each step itself, under a limit on memory that just holds two of the longest
samples. There is a row for each fixed micro-batch that never breaks the limit, by what is predicted for it.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from run import machine
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from workload import Listener, Sizes, Work, forms, make, write_data

from oomph.core.admitting import Forms
from oomph.core.layout import Shape
from oomph.core.running import Planned, plan_run, prepare_ground
from oomph.live.data.collating import Prepared
from oomph.live.data.dataset import Dataset, open_dataset
from oomph.live.hardware import machine as machine_at_hand
from oomph.live.step import IGNORED
from oomph.live.trainer import Options, train
from oomph.live.weights import build_stage_model
from oomph.recipe import Recipe
from oomph.run_records import StepRecord

__all__ = ["Sizes", "Work", "write_data"]
OURS, THEIRS = "oomph", "Trainer"
LEFT_OUT, EQUAL = 3, 4
SIZES = {"256 wide, 6 layers": Sizes(256, 6, 2048, 4), "64 wide, 2 layers": Sizes(64, 2, 1024, 4)}


class Turns:
    """Two loops in threads of their own, of which one runs at a time, a step each.

    Attributes:
        seconds: of the processor, by loop and by step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
        self._turn, self._left = OURS, set[str]()
        self._changed = threading.Condition()
        self._begun = time.process_time()

    def begin(self, name: str) -> None:
        """Waits for the first turn."""
        with self._changed:
            self._wait(name)

    def done(self, name: str) -> None:
        """A step is done; returns when the next may begin."""
        with self._changed:
            self.seconds[name].append(time.process_time() - self._begun)
            self._pass_on(name)
            self._wait(name)

    def leave(self, name: str) -> None:
        """The loop takes no more turns."""
        with self._changed:
            self._left.add(name)
            self._pass_on(name)

    def _pass_on(self, name: str) -> None:
        other = THEIRS if name == OURS else OURS
        if other not in self._left:
            self._turn = other
        self._changed.notify_all()

    def _wait(self, name: str) -> None:
        self._changed.wait_for(lambda: self._turn == name or len(self._left) > 0)
        self._begun = time.process_time()


class _Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Our data set in our order, read when it is asked for, as it is here."""

    def __init__(self, data: Dataset, order: Sequence[int]) -> None:
        self._data, self._order = data, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, at: int) -> Prepared:  # type: ignore[override]
        return self._data.prepare(self._order[at])


def _collate(samples: Sequence[Prepared]) -> dict[str, torch.Tensor]:
    """Padded on the right, with a mask, as LLaVA's scripts do."""
    ids = [sample.ids for sample in samples]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=0),
        "labels": pad_sequence([sample.labels for sample in samples], batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
    images = [image["pixel_values"] for sample in samples for image in sample.images]
    return {**batch, "pixel_values": torch.cat(images)} if images else batch


class _Theirs(Trainer):
    """Adds up the losses of each step's micro-batches, which the log rounds."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.losses = [0.0]

    def training_step(self, *inputs: Any, **named: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*inputs, **named)
        self.losses[-1] += float(loss)
        return loss


class _AtStepEnd(TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self._turns, self.trainer = turns, None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.losses.append(0.0)  # type: ignore[attr-defined]
        self._turns.done(THEIRS)


class Compared(NamedTuple):
    """What became of the two runs.

    Attributes:
        losses: of ours and theirs, step by step.
        seconds: of the processor, of ours and theirs, step by step.
        steps: what ours tells of each.
    """

    losses: tuple[list[float], list[float]]
    seconds: tuple[list[float], list[float]]
    steps: list[StepRecord]


def compare(folder: Path, recipe: Recipe, micro_batch: int, limit_bytes: int | None = None) -> Compared:
    """Trains a recipe of one stage and one epoch both ways.

    Args:
        folder: for what the runs write.
        recipe: what `workload.make` made.
        micro_batch: samples that the other trainer takes at a time; divides the effective batch.
        limit_bytes: for ours.
    """
    data, planned, turns = open_data(recipe), plan(recipe, limit_bytes), Turns()
    steps = ordered(data, recipe)
    samples = _Samples(data, [index for step in steps for index in step])
    model = build_stage_model(planned.model.keys(planned.choice)[0], recipe, None, "cpu", recipe.run.seed)
    at_end = _AtStepEnd(turns)
    at_end.trainer = theirs = _Theirs(
        model=model,
        args=_arguments(folder, recipe, micro_batch, len(steps)),
        train_dataset=samples,
        data_collator=_collate,
        callbacks=[at_end],
    )
    theirs.remove_callback(PrinterCallback)
    failed: list[BaseException] = []

    def run_theirs() -> None:
        try:
            torch.set_num_threads(torch.get_num_threads())
            turns.begin(THEIRS)
            theirs.train()
        except BaseException as error:
            failed.append(error)
        finally:
            turns.leave(THEIRS)

    thread, ours = threading.Thread(target=run_theirs), Listener(lambda record: turns.done(OURS))
    thread.start()
    try:
        train(recipe, forms(), Options(folder / "run", False, limit_bytes), ours)
    finally:
        turns.leave(OURS)
        thread.join()
    if failed:
        raise failed[0]
    losses = [float(record.loss or 0.0) for record in ours.steps], theirs.losses[:-1]
    return Compared(losses, (turns.seconds[OURS], turns.seconds[THEIRS]), ours.steps)


def _arguments(folder: Path, recipe: Recipe, micro_batch: int, steps: int) -> TrainingArguments:
    (stage,) = recipe.stages
    return TrainingArguments(
        output_dir=str(folder / "theirs"),
        use_cpu=True,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=stage.effective_batch // micro_batch,
        num_train_epochs=1,
        learning_rate=float(stage.train["language"]),
        weight_decay=stage.weight_decay,
        lr_scheduler_type=stage.schedule,
        warmup_steps=math.ceil(stage.warmup * steps),
        max_grad_norm=float(stage.max_grad_norm),
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def open_data(recipe: Recipe) -> Dataset:
    """The data of the recipe's only stage."""
    return open_dataset(recipe, recipe.stages[0], lambda sentence: None)


def ordered(data: Dataset, recipe: Recipe) -> list[list[int]]:
    """The samples of each step."""
    (stage,), order = recipe.stages, data.order(recipe.run.seed)
    steps = order.steps(stage.epochs, stage.effective_batch)
    return [order.step(step, stage.effective_batch, stage.epochs) for step in range(steps)]


def plan(recipe: Recipe, limit_bytes: int | None = None) -> Planned:
    """The recipe's only stage as it is planned on the CPU."""
    (planned,) = plan_run(prepare_ground(recipe, machine_at_hand(), limit_bytes), forms())[1]
    return planned


def pinned(recipe: Recipe, micro_batch: int) -> Recipe:
    """The recipe with a micro-batch of a size."""
    return recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"micro_batch": micro_batch})})


def fixed_peak(recipe: Recipe, micro_batch: int) -> int:
    """Bytes that are predicted for the worst step that is cut into micro-batches of a size in the samples' order."""
    planned, data = plan(recipe), open_data(recipe)
    predicted, worst = Forms(planned.model, planned.choice, planned.granularity), 0
    for step in ordered(data, recipe):
        costs = [data.cost(index) for index in step]
        pieces = [costs[at : at + micro_batch] for at in range(0, len(costs), micro_batch)]
        shapes = [Shape(len(piece), max(c.tokens for c in piece), sum(c.images for c in piece)) for piece in pieces]
        worst = max(worst, predicted.step_peak(shapes))
    return worst


def limit_for(recipe: Recipe) -> int:
    """Bytes that just hold a micro-batch of two of the longest samples, with an image each."""
    planned = plan(recipe)
    predicted = Forms(planned.model, planned.choice, planned.granularity)
    longest = int(open_data(recipe).costs[:, 0].max())
    return max(predicted.peak(Shape(2, longest, 2)), predicted.peak_of_first(Shape(2, longest, 2)))


def furthest(compared: Compared) -> float:
    """The largest relative difference between the losses of a step."""
    return max(abs(ours - theirs) / theirs for ours, theirs in zip(*compared.losses, strict=True))


def row(name: str, compared: Compared, batch: int) -> str:
    """What there is to say of two runs, as a line."""
    ours, theirs = (seconds[LEFT_OUT:] for seconds in compared.seconds)
    ratios = [other / own for own, other in zip(ours, theirs, strict=True)]
    rates = [len(seconds) * batch / sum(seconds) for seconds in (ours, theirs)]
    numbers = f"{rates[0]:8.1f} {rates[1]:8.1f} {rates[0] / rates[1]:6.2f} {statistics.median(ratios):6.2f}"
    return f"{name:44} {numbers} {furthest(compared):9.1e}"


def memory(compared: Compared) -> str:
    """What our steps took and were predicted to take, as a line."""
    errors = [abs(step.prediction_error_bytes or 0) / (step.measured_peak_bytes or 1) for step in compared.steps]
    recoveries = sum(len(step.recoveries) for step in compared.steps)
    pieces = [len(step.split) for step in compared.steps]
    return (
        f"    ours: {recoveries} recoveries in {len(pieces)} steps, predicted peaks off by {max(errors):.2%} at most, "
        f"{min(pieces)} to {max(pieces)} micro-batches a step"
    )


def _uncounted(*_: object) -> AbstractContextManager[None]:
    """In place of the counting of memory, which a card's allocator does for nothing."""
    return nullcontext()


def measure(folder: Path, name: str, work: Work) -> Iterator[str]:
    """Trains on one kind of data, and yields lines about it as they are known."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    (folder / "work").mkdir()
    recipe = make(folder / "work", work)
    if work.shortest == work.longest:
        for told, around in (("", nullcontext()), (", not counted", patch("oomph.live.run_stage.memory_limit", _uncounted))):
            with tempfile.TemporaryDirectory(dir=folder) as own, around:
                found = compare(Path(own), pinned(recipe, EQUAL), EQUAL)
            yield row(f"{name}, equal, {EQUAL} each{told}", found, work.batch)
        return
    limit = limit_for(recipe)
    for micro_batch in (1, 2, 4, 8):
        needed = fixed_peak(recipe, micro_batch)
        if needed > limit:
            yield f"    {micro_batch} each would take {needed / 2**20:.1f} MiB of {limit / 2**20:.1f} MiB"
            continue
        (folder / str(micro_batch)).mkdir()
        compared = compare(folder / str(micro_batch), recipe, micro_batch, limit)
        yield row(f"{name}, mixed, theirs {micro_batch} each", compared, work.batch)
    yield memory(compared)


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help=f"steps, of which {LEFT_OUT} are left out (default 40)")
    steps, batch = parser.parse_args().steps, 8
    torch.set_num_threads(1)
    for line in machine():
        print(line)
    print(f"\n{'':44} {'samples per second':>17} {'ratio':>13}")
    print(f"{'':44} {OURS:>8} {THEIRS:>8} {'all':>6} {'median':>6} {'losses':>9}")
    for name, sizes in SIZES.items():
        for shortest, longest in ((128, 128), (4, 512)):
            with tempfile.TemporaryDirectory() as folder:
                for line in measure(Path(folder), name, Work(sizes, longest, shortest, steps * batch, batch)):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
