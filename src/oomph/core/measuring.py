"""The climb of `oomph measure`: which micro-batches are run, where it ends, and what was predicted for each.

What runs a rung is handed in, so nothing here needs torch or a card.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from oomph.core import predict
from oomph.core.choices import cuts, resolve, with_micro_batch
from oomph.core.devices import Gpu, OutsideLine, find_gpu
from oomph.core.eight_bit import EIGHT_BIT
from oomph.core.footprint import live_footprint, of_prediction
from oomph.core.forms import FormKey, Source, Traced
from oomph.core.layout import Shape
from oomph.core.machine import Constant, remember
from oomph.core.stage import StageModel
from oomph.errors import UserError
from oomph.recipe import Recipe, Stage, memory_of, stage_of
from oomph.records import Choice, Footprint, MeasuredRung, MeasuredStage, Measurement, Record
from oomph.units import GIB, MIB, size

CPU_LARGEST = 4
"""Where a climb on the CPU ends, unless the recipe pins a larger micro-batch: more of them show nothing new."""
MICRO_BATCHES = 2
"""Micro-batches of a measured step at most; those after the second do what the second did."""
_CONTEXT = 600 * MIB
INTERPRETER = GIB
"""What a process of ours takes of a machine's memory beside the storages: libraries, scratch of the CPU's kernels."""


@dataclass(frozen=True)
class Machine(Record):
    """Where rungs are run.

    `name` is the device as its maker calls it. `total_bytes` are the card's as CUDA reports them, `free_bytes` what other
    processes leave of them; on the CPU both are those of the machine, or of the control group that limits it. `capability`
    is empty on the CPU.
    """

    device: Literal["cuda", "cpu"]
    name: str
    driver: str
    cuda: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, ...]
    cores: int
    versions: dict[str, str]
    date: str


class Job(NamedTuple):
    """A rung to run: what the model is, the knobs, the shape of a micro-batch, and the images' tokens in it."""

    key: FormKey
    choice: Choice
    shape: Shape
    device: Literal["cuda", "cpu"]


class Reading(NamedTuple):
    """What running a rung showed; the fields are those of `records.MeasuredRung`."""

    measured: Footprint | None
    process_peak_bytes: int | None = None
    outside_bytes: int | None = None
    step_seconds: float | None = None
    utilisation: float | None = None
    sm_activity: float | None = None
    failure: str = ""


class WithoutCudaRules:
    """A source whose traces are those of the CPU, whatever card they are asked for.

    Args:
        source: makes the traces.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def traced(self, key: FormKey) -> Traced:
        """The form of a key with CUDA's rules off."""
        return self._source.traced(replace(key, capability=()))

    def prepare(self, keys: Sequence[FormKey]) -> None:
        """Makes several at once."""
        self._source.prepare([replace(key, capability=()) for key in keys])


def measure(
    recipe: Recipe,
    source: Source,
    machine: Machine,
    run: Callable[[Job], Reading],
    stages: Sequence[str] | None = None,
    done: Callable[[Measurement], None] = lambda measurement: None,
    notify: Callable[[str], None] = lambda sentence: None,
) -> Measurement:
    """Runs micro-batches of growing size, and sets what they took beside what was predicted.

    Args:
        recipe: what is wanted; its GPUs are replaced by the one at hand.
        source: where closed forms come from.
        machine: where `run` runs.
        run: runs one rung.
        stages: names; None for the first.
        done: called with each rung as soon as it has run, as a measurement of its own.
        notify: told in a sentence what is being done.

    Raises:
        UserError: as planning does; or the CPU cannot run the stage, or has not the memory for it.
    """
    card, gpu = card_at_hand(recipe, machine)
    here, notes = _here(recipe, card, machine)
    blank = Measurement(
        recipe.name, machine.device, card, machine.driver, machine.cuda, (), notes, machine.versions, machine.date
    )
    asked = [stage_of(here, name) for name in stages] if stages else [here.stages[0]]
    if machine.device == "cpu":
        refuse_on_the_cpu(here, asked)
        source = WithoutCudaRules(source)
    climbs = [_Climb(StageModel(here, stage, gpu, source), machine) for stage in asked]
    measured = []
    for climb in climbs:
        rungs: list[MeasuredRung] = []
        for choice in climb.choices():
            predicted, bound = climb.predicted(choice)
            notify(f"{climb.name}, micro-batch {choice.micro_batch}: {size(predicted.allocated_peak_bytes)} predicted ...")
            rungs.append(climb.rung(choice, predicted, bound, run(climb.job(choice))))
            _remember(card, machine, rungs[-1], notify)
            done(replace(blank, stages=(climb.stage(rungs[-1:]),)))
            if rungs[-1].failure:
                climb.stopped = f"micro-batch {choice.micro_batch} failed"
                break
        measured.append(climb.stage(rungs))
    return replace(blank, stages=tuple(measured))


def _remember(card: str, machine: Machine, rung: MeasuredRung, notify: Callable[[str], None]) -> None:
    """Keeps for later plans what the process held of the card outside its allocator."""
    if machine.device == "cpu" or rung.outside_bytes is None:
        return
    seen = rung.outside_bytes
    try:
        remember(Constant(card, machine.driver, machine.versions["torch"], "context", 1, seen, seen, machine.date))
    except OSError as error:
        notify(f"the size of the CUDA context is not kept: {error.strerror or error}")


class _Climb:
    """One stage's rungs."""

    def __init__(self, model: StageModel, machine: Machine) -> None:
        self._model, self._machine = model, machine
        self.name, self.stopped = model.stage.name, ""
        self._memory = memory_of(model.recipe, model.stage)
        self._choice, _ = resolve(model.stage, model.recipe, model.gpu)

    def choices(self) -> Iterator[Choice]:
        """The rungs that the device has room for, the smallest first; says in `stopped` why there is none after the last."""
        pinned = self._memory.micro_batch != "auto"
        sizes = cuts(self._choice, self._choice.sharding)[::-1]
        largest = self._choice.micro_batch if pinned else sizes[-1]
        if self._machine.device == "cpu" and not pinned:
            largest = min(largest, CPU_LARGEST)
        reached, micro_batch = 0, 1
        while micro_batch <= largest:
            if self._lack(micro_batch):
                micro_batch = self._largest(sizes, reached, micro_batch)
                if micro_batch > reached:
                    yield self._of(micro_batch)
                return
            yield self._of(micro_batch)
            reached = micro_batch
            micro_batch = min(2 * micro_batch, largest) if micro_batch < largest else largest + 1
        whose = "all samples of the effective batch" if not pinned else "the recipe's micro-batch"
        if self._machine.device == "cpu" and not pinned and largest == CPU_LARGEST < sizes[-1]:
            whose = "as many as are run on the CPU unless micro_batch asks for more"
        self.stopped = f"micro-batch {largest}: {whose}"

    def _largest(self, sizes: list[int], fits: int, does_not: int) -> int:
        """The largest cut for which there is room, of those from one that fits to one that does not."""
        low, high = fits, does_not
        while between := sizes[bisect_right(sizes, low) : bisect_left(sizes, high)]:
            middle = between[len(between) // 2]
            if self._lack(middle):
                high = middle
            else:
                low = middle
        self.stopped = self._lack(high)
        return low

    def _of(self, micro_batch: int) -> Choice:
        """A step of at most two micro-batches of a size."""
        choice = with_micro_batch(self._choice, micro_batch, self._memory.eval_batch)
        accumulation = min(choice.accumulation, MICRO_BATCHES)
        return replace(choice, accumulation=accumulation, effective_batch=micro_batch * accumulation)

    def _lack(self, micro_batch: int) -> str:
        """Why a micro-batch is not run; empty where there is room for it and for the error bound."""
        choice = self._of(micro_batch)
        predicted, bound = self.predicted(choice)
        usable = self._usable(choice)
        if predicted.reserved_peak_bytes + bound <= usable:
            return ""
        needs = f"{size(predicted.reserved_peak_bytes)} and the error bound, {size(bound)}"
        return f"micro-batch {micro_batch} is predicted to need {needs}, of {size(max(usable, 0))} usable"

    def _usable(self, choice: Choice) -> int:
        if self._machine.device == "cpu":
            return self._machine.free_bytes - INTERPRETER
        return self._model.usable_bytes(choice)

    def predicted(self, choice: Choice) -> tuple[Footprint, int]:
        """What a rung is predicted to take, and the error bound in bytes."""
        if self._machine.device == "cuda":
            prediction = self._model.predict(choice)
            return of_prediction(prediction), prediction.bound_bytes
        footprint = live_footprint(self._model.lay_out(choice).events)
        return footprint, round(predict.UNMEASURED * footprint.allocated_peak_bytes)

    def job(self, choice: Choice) -> Job:
        """What there is to run for a rung."""
        images = choice.micro_batch * self._model.images
        key = replace(self._model.keys(choice)[0], capability=self._machine.capability)
        return Job(key, choice, Shape(choice.micro_batch, self._model.tokens, images), self._machine.device)

    def rung(self, choice: Choice, predicted: Footprint, bound: int, reading: Reading) -> MeasuredRung:
        """A rung that has run."""
        rate = 0.0 if not reading.step_seconds else choice.effective_batch / reading.step_seconds
        return MeasuredRung(
            choice=choice,
            predicted=predicted,
            bound_bytes=bound,
            samples_per_second=rate or None,
            tokens_per_second=rate * self._model.tokens or None,
            **reading._asdict(),
        )

    def stage(self, rungs: Sequence[MeasuredRung]) -> MeasuredStage:
        """The stage with rungs that have run.

        Raises:
            UserError: on the CPU, there is room for none.
        """
        if not rungs and self._machine.device == "cpu":
            raise UserError(
                f"stage {self.name} does not fit into this machine's memory: {self.stopped}",
                "measure a smaller model, or fewer tokens, or on a machine with a GPU; `oomph plan` needs neither",
            )
        return MeasuredStage(self.name, self._model.tokens, self._model.images, tuple(rungs), self.stopped)


def card_at_hand(recipe: Recipe, machine: Machine) -> tuple[str, Gpu]:
    """The name of the device, and the card to plan for: the one at hand, or, on the CPU, the recipe's."""
    if machine.device == "cpu":
        return machine.name, find_gpu(recipe.hardware.gpu)
    try:
        known = find_gpu(machine.name)
    except UserError:
        context = OutsideLine("context", _CONTEXT, _CONTEXT, _CONTEXT, "estimated", "a card that is not in the catalogue")
        known = replace(find_gpu("T4"), name=machine.name, context=context)
    major, minor = machine.capability
    return known.name, replace(known, memory_bytes=machine.free_bytes, compute_capability=(major, minor))


def _here(recipe: Recipe, card: str, machine: Machine) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe on one device without sharding, and in words what was changed for it."""
    notes = []
    hardware = recipe.hardware
    if machine.device == "cuda" and find_gpu(hardware.gpu).name != card:
        notes.append(f"the recipe names {hardware.gpu}; the card at hand is {card}, and the predictions are for it")
    if machine.device == "cuda" and machine.free_bytes < machine.total_bytes:
        notes.append(f"other processes hold {size(machine.total_bytes - machine.free_bytes)} of the card")
    if machine.device == "cpu":
        notes.append("CPU: checks the step, not CUDA's kernels. Bytes are those of live storages; nothing is cached or rounded")
    if hardware.gpus == 1:
        return recipe, tuple(notes)
    notes.append(f"the recipe has {hardware.gpus} GPUs; measured is the share of one of them, without sharding")
    alone = recipe.memory.model_copy(update={"sharding": "auto"})
    stages = tuple(_alone(stage, hardware.gpus) for stage in recipe.stages)
    here = {"hardware": hardware.model_copy(update={"gpus": 1, "nodes": 1}), "memory": alone, "stages": stages}
    return recipe.model_copy(update=here), tuple(notes)


def _alone(stage: Stage, gpus: int) -> Stage:
    """The stage with one GPU's share of the batch."""
    share = {"effective_batch": -(-stage.effective_batch // gpus)}
    if "sharding" not in stage.memory.model_fields_set:
        return stage.model_copy(update=share)
    return stage.model_copy(update={**share, "memory": stage.memory.model_copy(update={"sharding": "auto"})})


def refuse_on_the_cpu(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Settings whose kernels are CUDA's alone, or that mean nothing where the host is the device.

    Raises:
        UserError: with all of them.
    """
    problems = []
    for stage in stages:
        memory = memory_of(recipe, stage)
        if stage.quantization is not None:
            problems.append(f"stage {stage.name}: quantized weights run on a GPU alone, and none is here")
        if memory.optimizer in EIGHT_BIT:
            problems.append(f"stage {stage.name}: optimizer {memory.optimizer} runs on a GPU alone, and none is here")
        if memory.optimizer_offload is True:
            problems.append(f"stage {stage.name}: optimizer_offload has no meaning on the CPU, where all memory is the host's")
    if problems:
        raise UserError(problems, "measure on a machine with a GPU, or another stage; `oomph plan` predicts it anywhere")
