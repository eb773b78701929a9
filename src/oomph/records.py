"""The records that travel between the parts: frozen, JSON round-trip, one schema number.

Bytes are ints. Shapes are in elements. A ``Choice`` is handed unchanged to the predictor and to the trainer, so the two
cannot disagree about what was meant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oomph.record import SCHEMA as SCHEMA
from oomph.record import Document
from oomph.record import Record as Record

Phase = Literal["load", "forward", "recompute", "backward", "optimizer", "evaluate"]
Role = Literal[
    "weight",
    "gradient",
    "optimizer",
    "activation",
    "scores",
    "logits",
    "dispatch",
    "input",
    "temporary",
    "workspace",
    "communication",
]
Checkpointing = Literal["none", "every-4", "every-3", "every-2", "blocks", "blocks-offload"]
VisionCheckpointing = Literal["none", "blocks"]
Attention = Literal["sdpa", "flash", "efficient", "eager", "eager-fp32"]
Loss = Literal["full", "full-shifted", "chunked"]
Precision = Literal["bfloat16", "float16", "float32", "bfloat16-mixed", "float16-mixed"]
Optimizer = Literal["adamw-fused", "adamw-foreach", "adamw-loop", "adamw-8bit", "adamw-8bit-paged"]
Quantized = Literal["nf4", "int8"]
Sharding = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2-no-reshard", "fsdp2-hybrid"]


@dataclass(frozen=True)
class Choice(Record):
    """The memory knobs of one stage, each with one definite value. `effective_batch` counts samples over all GPUs."""

    micro_batch: int
    accumulation: int
    effective_batch: int
    gpus: int = 1
    nodes: int = 1
    checkpointing: Checkpointing = "none"
    vision_checkpointing: VisionCheckpointing = "none"
    attention: Attention = "sdpa"
    loss: Loss = "full"
    precision: Precision = "bfloat16"
    optimizer: Optimizer = "adamw-fused"
    optimizer_offload: bool = False
    master_weights: bool = False
    sharding: Sharding = "none"
    expandable_segments: bool = False
    eval_batch: int | None = None


@dataclass(frozen=True)
class Request(Record):
    """One request to the allocator, with what made it. `bytes` is what was asked for, before any rounding."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    module: str
    phase: str
    role: str


@dataclass(frozen=True)
class FailingRequest(Request):
    """The request that cannot be served, and the bytes allocated at that moment."""

    in_use_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class PhasePeak(Record):
    """The peaks of one phase of the step."""

    phase: str
    allocated_peak_bytes: int
    reserved_peak_bytes: int


@dataclass(frozen=True)
class Footprint(Record):
    """Allocated and reserved bytes over one training step. Simulated and measured footprints have this one type."""

    allocated_peak_bytes: int
    reserved_peak_bytes: int
    phases: tuple[PhasePeak, ...]
    by_role: dict[str, int] = field(default_factory=dict)
    by_module: dict[str, int] = field(default_factory=dict)
    peak_phase: str = ""
    peak_module: str = ""


@dataclass(frozen=True)
class Prediction(Record):
    """What one GPU of the stage needs, its evaluation included, and whether the card has it.

    `by_role` and `by_module` are the blocks alive at the allocated peak; where the step fails, at the failing request.
    `outside` names the parts of `outside_bytes`, which are not the allocator's. `error_bound` is a fraction of
    `allocated_peak_bytes`; `leaves_out` says in words what is not counted.
    """

    fits: bool
    allocated_peak_bytes: int
    reserved_peak_bytes: int
    outside_bytes: int
    usable_bytes: int
    phases: tuple[PhasePeak, ...]
    by_role: dict[str, int]
    by_module: dict[str, int]
    failing_request: FailingRequest | None
    largest_requests: tuple[Request, ...]
    error_bound: float
    leaves_out: tuple[str, ...]
    outside: dict[str, int] = field(default_factory=dict)
    evaluation: PhasePeak | None = None

    @property
    def bound_bytes(self) -> int:
        """The error bound in bytes."""
        return round(self.error_bound * self.allocated_peak_bytes)


@dataclass(frozen=True)
class Speed(Record):
    """How fast a choice is, as a roofline estimates it: good for comparing choices, not for promising times.

    Samples and tokens are those of all GPUs together, every sample being as long as the longest. `flop_utilisation` is the
    model's own floating-point operations (recomputation not counted) over what the cards could do at their dense peak.
    `gpu_hours` is for the whole stage; None where the recipe does not say how many samples the data has. `seconds` divides
    `step_seconds` by cause: ``compute``, ``recompute``, ``optimizer``, ``communication``, ``offload``: the last two are what
    is not hidden behind the others.
    """

    step_seconds: float
    samples_per_second: float
    tokens_per_second: float
    flop_utilisation: float
    gpu_hours: float | None
    seconds: dict[str, float]


@dataclass(frozen=True)
class Rung(Speed):
    """A choice with the effective batch that was asked for, what it needs, how fast it is and what it changes.

    `changes` has a sentence for every setting of the recipe that the choice replaces, by the name of the knob; empty where it
    keeps them all. `exact` is whether a step gives the same gradient and update as the choice as asked, in exact
    arithmetic; `exactness` says it in words. `named` are the titles that the rung holds: ``as asked``, ``fastest``,
    ``least change``, ``least memory``.
    """

    choice: Choice
    prediction: Prediction
    changes: dict[str, str]
    exact: bool
    exactness: str
    named: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suggestion(Record):
    """A change of the mathematics, which is never made unasked, and what it would save of the allocated peak.

    `name` is one of ``lora``, ``8-bit optimizer``, ``shorter samples``, ``smaller images``, ``fewer experts``. `fits` is
    whether the stage would fit on the card with it, all else being as in the plan.
    """

    name: str
    change: str
    saves_bytes: int
    allocated_peak_bytes: int
    fits: bool
    basis: str


@dataclass(frozen=True)
class Limit(Record):
    """The most of something that fits on the card, with the choice of the plan's fastest rung: ``micro_batch`` and so on."""

    name: str
    value: int
    unit: str
    beyond: str


@dataclass(frozen=True)
class Card(Record):
    """A card and the number of GPUs on which the stage fits, with the choice that does."""

    gpu: str
    choice: Choice
    reserved_peak_bytes: int
    usable_bytes: int


@dataclass(frozen=True)
class Fit(Record):
    """What a stage would take: the smallest cards by number of GPUs, and the limits of the card that was asked for."""

    cards: tuple[Card, ...]
    limits: tuple[Limit, ...]


@dataclass(frozen=True)
class Search(Record):
    """How the ladder came about.

    `considered` configurations; of them those that were `dominated`, as another one is at least as good whatever the sizes,
    those that a bound dropped, and those that were replayed through the allocator.
    """

    considered: int
    dominated: int
    bounded: int
    replayed: int


@dataclass(frozen=True)
class TimelinePart(Record):
    """A stretch of a timeline, from event `start` on: of ``load``, ``first step``, ``later step`` or ``evaluation``.

    Recomputed blocks are part of the ``backward`` phase.
    """

    during: str
    phase: str
    start: int


@dataclass(frozen=True)
class RoleBytes(Record):
    """The bytes of one role at every point of a timeline."""

    role: str
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class Timeline(Record):
    """What is allocated after each of some events, in their order: of the load, a first step, a later one, an evaluation.

    An event is a request or a release; micro-batches that do as the one before them are left out. `events` has the numbers,
    out of `total_events`, of the most and the least allocated of equally many events each, and of the most of every phase.
    `by_role` sums up to `allocated_bytes` everywhere. `peak` is the place in `events` of the most of all, `fails` of the
    request that cannot be served, None where all are; what follows it is as if there were room.
    """

    events: tuple[int, ...]
    total_events: int
    allocated_bytes: tuple[int, ...]
    by_role: tuple[RoleBytes, ...]
    parts: tuple[TimelinePart, ...]
    peak: int
    fails: int | None = None


@dataclass(frozen=True)
class StagePlan(Record):
    """One stage of the recipe: what was chosen, with the reason of every derived value, and what it needs.

    `ladder` has rungs that fit, the fastest first. They keep what the recipe pins as long as anything fits with it; then
    `unpinned` is the fastest configuration without pins, if it is faster. `nearest` is the choice that needs least where
    nothing fits. `made` says in words what the stage makes of the model before it trains. `timeline` is that of `choice`.
    """

    name: str
    choice: Choice
    reasons: dict[str, str]
    prediction: Prediction
    trainable_parameters: int
    total_parameters: int
    samples_tokens: int
    image_tokens: int
    traced: str
    speed: Speed | None = None
    ladder: tuple[Rung, ...] = ()
    unpinned: Rung | None = None
    nearest: Rung | None = None
    suggestions: tuple[Suggestion, ...] = ()
    search: Search | None = None
    fit: Fit | None = None
    made: tuple[str, ...] = ()
    timeline: Timeline | None = None


@dataclass(frozen=True)
class Plan(Document):
    """`oomph plan`'s answer, and its ``--json``."""

    recipe: str
    gpu: str
    gpus: int
    stages: tuple[StagePlan, ...]
    versions: dict[str, str]
    schema: int = SCHEMA

    @property
    def fits(self) -> bool:
        """Whether every stage fits as it was asked for."""
        return all(stage.prediction.fits for stage in self.stages)


@dataclass(frozen=True)
class MeasuredRung(Record):
    """A micro-batch that was run: what was predicted, what was measured, and what else was seen meanwhile.

    `predicted` and `measured` have the peaks over the whole run: loading, warm-up step, step and evaluation. `measured` is
    None where the run failed, which `failure` says in words. `process_peak_bytes` is the process's own peak: of the card's
    memory as the driver counts it, on the CPU of resident memory. `outside_bytes` of the card are the process's and not the
    allocator's. `utilisation` is the share of the time in which the device was busy, `sm_activity` the share of its
    multiprocessors that were, both over the timed steps.
    """

    choice: Choice
    predicted: Footprint
    bound_bytes: int
    measured: Footprint | None
    process_peak_bytes: int | None = None
    outside_bytes: int | None = None
    step_seconds: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    utilisation: float | None = None
    sm_activity: float | None = None
    failure: str = ""

    @property
    def within(self) -> bool:
        """Whether both peaks are no further from the prediction than its error bound."""
        if self.measured is None:
            return False
        pairs = (
            (self.predicted.allocated_peak_bytes, self.measured.allocated_peak_bytes),
            (self.predicted.reserved_peak_bytes, self.measured.reserved_peak_bytes),
        )
        return all(abs(predicted - measured) <= self.bound_bytes for predicted, measured in pairs)


@dataclass(frozen=True)
class MeasuredStage(Record):
    """One stage's rungs, the smallest micro-batch first, and why there are no more of them."""

    name: str
    samples_tokens: int
    images_per_sample: int
    rungs: tuple[MeasuredRung, ...]
    stopped: str


@dataclass(frozen=True)
class Measurement(Document):
    """`oomph measure`'s answer, and its ``--json``.

    `device` is ``cuda`` or ``cpu``. `gpu` is the card that was measured, by its name in the catalogue where that has it; on the
    CPU, the processor. `notes` say where what was measured is not what the recipe names. `date` is ISO 8601.
    """

    recipe: str
    device: Literal["cuda", "cpu"]
    gpu: str
    driver: str
    cuda: str
    stages: tuple[MeasuredStage, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    date: str
    kind: Literal["measurement"] = "measurement"
    schema: int = SCHEMA

    @property
    def within(self) -> bool:
        """Whether every stage was measured, and every rung is within its error bound."""
        return all(stage.rungs and all(rung.within for rung in stage.rungs) for stage in self.stages)


@dataclass(frozen=True)
class Recovery(Record):
    """Memory ran out in a step, and what was done about it: a prediction that was wrong, and by how much.

    `kind` is who ran out: the ``allocator``, or the ``accelerator``'s runtime or a library; ``retries`` where the allocator
    served every request, but had to give back first what it kept for later, so that the next step takes less and this one is
    not redone. `phase` is ``forward``, ``recompute``, ``backward``, ``clip`` or ``step``. `predicted_bytes` are those of the
    micro-batch, `limit_bytes` what it might have taken, `measured_bytes` the most that was taken until then, where it is
    counted. Splits have positions in the step's samples; `to_split` is empty where nothing was left to train on.
    """

    step: int
    micro_batch: int
    kind: Literal["allocator", "accelerator", "retries"]
    phase: str
    module: str
    message: str
    predicted_bytes: int
    limit_bytes: int
    measured_bytes: int | None
    from_choice: Choice
    to_choice: Choice
    from_split: tuple[tuple[int, ...], ...]
    to_split: tuple[tuple[int, ...], ...]
