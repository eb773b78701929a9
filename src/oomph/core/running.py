"""The plan of a run where it runs: on one card or on the CPU, within its memory or within less of it, if so asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from oomph.core.choices import resolve
from oomph.core.devices import Gpu, find_gpu, outside
from oomph.core.footprint import live_footprint
from oomph.core.forms import Source, versions
from oomph.core.live_plan import live_prediction
from oomph.core.measuring import INTERPRETER, Machine, WithoutCudaRules, card_at_hand, refuse_on_the_cpu
from oomph.core.plan import searched, stage_plan
from oomph.core.stage import StageModel
from oomph.errors import UserError
from oomph.recipe import Memory, Recipe, Stage, memory_of, stage_of
from oomph.recipe.routing import check_dispatch
from oomph.records import Choice, Plan, StagePlan

_CPU_CAPABILITY: Final = (8, 0)
"""With it, no setting is refused that the CPU computes as well."""
_CPU_FLOPS, _CPU_BANDWIDTH = 1e11, 2e10
"""Of a few cores, per second. They are fixed, as a measured rate would cut the same step otherwise from run to run."""
_CPU_KNOBS: Final[dict[str, Any]] = {
    "precision": "float32",
    "checkpointing": "none",
    "vision_checkpointing": "none",
    "loss": "full",
}
"""What is left to us on the CPU, which computes float32 best, and for which time is scarcer than memory."""
_TIME = "on the CPU time is scarcer than memory, and steps that need it recompute"
_CPU_REASONS: Final[dict[str, str]] = {**dict.fromkeys(_CPU_KNOBS, _TIME), "precision": "the CPU computes float32 best"}
_LEANER: Final[dict[str, str]] = {"checkpointing": "blocks", "vision_checkpointing": "blocks", "loss": "chunked"}
_STATES: Final = ("precision", "optimizer", "master_weights")
"""The knobs on which the tensors of a checkpoint depend."""
_ALIKE: Final = {"adamw-fused", "adamw-foreach", "adamw-loop"}
"""Optimizers that read each other's states."""
_BLOCK: Final = 512
"""Bytes that CUDA's caching allocator rounds requests up to."""


class Ground(NamedTuple):
    """Where a run runs.

    Attributes:
        asked: the recipe as it was given.
        recipe: as it is run there: one device, nothing sharded.
        gpu: the card to plan for; of the CPU, a stand-in for estimates of time.
        machine: the device.
        limit_bytes: what the user allows; none for all there is.
        notes: in words, what is otherwise than the recipe has it.
    """

    asked: Recipe
    recipe: Recipe
    gpu: Gpu
    machine: Machine
    limit_bytes: int | None
    notes: tuple[str, ...]


class Planned(NamedTuple):
    """A stage that can run.

    Attributes:
        model: its forms.
        plan: what is written down of it.
        rungs: choices for steps with a sample that does not fit by itself.
        limit_bytes: what tensors may take in all.
        margin_bytes: of them, what no micro-batch may be predicted to take: what the allocator reserves beside what it is
            asked for.
        granularity: bytes that a storage is rounded up to.
        pinned: the micro-batch that the recipe pins.
    """

    model: StageModel
    plan: StagePlan
    rungs: tuple[Choice, ...]
    limit_bytes: int
    margin_bytes: int
    granularity: int
    pinned: int | None

    @property
    def choice(self) -> Choice:
        """The configuration that runs."""
        return self.plan.choice


def keep_states(recipe: Recipe, name: str, before: Choice) -> Recipe:
    """The recipe for going on with a stage: what its tensors depend on stays as it was where the recipe leaves it open.

    Raises:
        UserError: the recipe pins something else.
    """
    problems: list[str] = []
    stages = []
    for stage in recipe.stages:
        if stage.name == name:
            memory = memory_of(recipe, stage)
            for knob in _STATES:
                given, value = getattr(memory, knob), getattr(before, knob)
                if given not in ("auto", value) and not {given, value} <= _ALIKE:
                    made = str(value).lower()
                    problems.append(f"memory.{knob} is {str(given).lower()}, and the checkpoint was made with {made}")
            kept = {knob: getattr(before, knob) for knob in _STATES if getattr(memory, knob) == "auto"}
            stage = stage.model_copy(update={"memory": memory.model_copy(update=kept)})
        stages.append(stage)
    if problems:
        raise UserError(problems, "what is in the checkpoint is of another kind: go on with what it was made with")
    return recipe.model_copy(update={"stages": tuple(stages)})


def prepare_ground(recipe: Recipe, machine: Machine, limit_bytes: int | None) -> Ground:
    """Decides what of a recipe is otherwise where it runs.

    Raises:
        UserError: the CPU cannot run some of its stages, some are planned only, or the recipe's card is not known.
    """
    check_dispatch(recipe.stages)
    card, gpu = card_at_hand(recipe, machine)
    notes, cpu = [], machine.device == "cpu"
    if cpu:
        refuse_on_the_cpu(recipe, recipe.stages)
        gpu = replace(
            gpu,
            name=machine.name,
            compute_capability=_CPU_CAPABILITY,
            bandwidth=_CPU_BANDWIDTH,
            peak_flops={"float32": _CPU_FLOPS},
        )
    elif find_gpu(recipe.hardware.gpu).name != card:
        notes.append(f"the recipe names {recipe.hardware.gpu}; the card at hand is {card}, and the run is planned for it")
    if not cpu and limit_bytes is not None:
        gpu = replace(gpu, memory_bytes=min(gpu.memory_bytes, limit_bytes + outside(gpu, 1).bytes))
    if recipe.hardware.gpus > 1:
        notes.append(f"the recipe has {recipe.hardware.gpus} GPUs; one runs it all, with the same effective batch")
    alone = recipe.hardware.model_copy(update={"gpus": 1, "nodes": 1})
    stages = tuple(_here(recipe, stage, cpu) for stage in recipe.stages)
    here = recipe.model_copy(update={"hardware": alone, "stages": stages})
    return Ground(recipe, here, gpu, machine, limit_bytes, tuple(notes))


def _here(recipe: Recipe, stage: Stage, cpu: bool) -> Stage:
    """The stage with all of its knobs, on one device."""
    memory = memory_of(recipe, stage)
    changed: dict[str, Any] = {"sharding": "auto"}
    if cpu:
        changed |= {knob: value for knob, value in _CPU_KNOBS.items() if getattr(memory, knob) == "auto"}
        if memory.attention in ("flash", "efficient"):
            changed["attention"] = "sdpa"
    return stage.model_copy(update={"memory": memory.model_copy(update=changed)})


def plan_run(ground: Ground, source: Source) -> tuple[Plan, tuple[Planned, ...]]:
    """Plans all stages.

    Raises:
        UserError: as planning does.
    """
    cpu = ground.machine.device == "cpu"
    source = WithoutCudaRules(source) if cpu else source
    models = [StageModel(ground.recipe, stage, ground.gpu, source) for stage in ground.recipe.stages]
    source.prepare([key for model in models for key in model.first_keys()])
    planned = tuple((_on_the_cpu if cpu else _on_the_card)(ground, model) for model in models)
    libraries = dict.fromkeys(name for model in models for key in model.first_keys() for name in key.libraries())
    name = ground.machine.name if cpu else ground.gpu.name
    return Plan(ground.asked.name, name, 1, tuple(stage.plan for stage in planned), versions(list(libraries))), planned


def _on_the_cpu(ground: Ground, model: StageModel) -> Planned:
    free = ground.machine.free_bytes - INTERPRETER
    limit = max(free, 0) if ground.limit_bytes is None else ground.limit_bytes

    def fits(choice: Choice) -> bool:
        return live_footprint(model.lay_out(choice).events).allocated_peak_bytes <= limit

    choice, reasons = resolve(model.stage, ground.recipe, ground.gpu, fits)
    asked = _asked(ground, model)
    reasons |= {knob: reason for knob, reason in _CPU_REASONS.items() if getattr(asked, knob) == "auto"}
    plan = stage_plan(model, choice, reasons, live_prediction(model.lay_out(choice).events, limit))
    return Planned(model, plan, _rungs(asked, choice, ()), limit, 0, 1, _pinned(asked))


def _on_the_card(ground: Ground, model: StageModel) -> Planned:
    plan = searched(model)
    asked, predicted = _asked(ground, model), plan.prediction
    margin = predicted.reserved_peak_bytes - predicted.allocated_peak_bytes
    ladder = [rung.choice for rung in plan.ladder if not rung.changes]
    limit = model.usable_bytes(plan.choice)
    return Planned(model, plan, _rungs(asked, plan.choice, ladder), limit, margin, _BLOCK, _pinned(asked))


def _asked(ground: Ground, model: StageModel) -> Memory:
    return memory_of(ground.asked, stage_of(ground.asked, model.stage.name))


def _pinned(asked: Memory) -> int | None:
    return None if asked.micro_batch == "auto" else asked.micro_batch


def _rungs(asked: Memory, choice: Choice, ladder: Sequence[Choice]) -> tuple[Choice, ...]:
    """The ladder's choices, and those that recompute all that the recipe leaves open."""
    free = {knob: value for knob, value in _LEANER.items() if getattr(asked, knob) == "auto"}
    blocks = {knob: value for knob, value in free.items() if knob != "loss"}
    return (*ladder, replace(choice, **blocks), replace(choice, **free))  # type: ignore[arg-type]
