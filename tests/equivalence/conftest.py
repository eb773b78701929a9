"""One training step twice, on fake tensors and for real on the CPU, as sequences of births and deaths of storages.

The real step runs under PyTorch's profiler from before the model's weights exist: the profiler knows only storages that
were born under it. A whole step precedes the compared one, so that what is made once is there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PretrainedConfig, PreTrainedModel

from oomph.core.closed_form import constant_form
from oomph.core.events import Events
from oomph.core.layout import Shape, lay_out
from oomph.live.batch import Images, images_of
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.model import build, part_finder
from oomph.live.optimizers import make_optimizer
from oomph.live.precision import Arithmetic, arithmetic_of
from oomph.live.simulate import Setup, Simulator
from oomph.live.step import LOSSES, train_step
from oomph.records import Choice

MICRO_BATCHES = 2
WHOLE = 1 << 20
MARK = "mark: "


class Event(NamedTuple):
    """A storage is born (`nbytes` > 0) or dies (< 0).

    `op` is the operator that made it, without overload; empty where none did. `module` is known of traced ones only.
    `inside`: born and dead inside one call of the operator, which only a real run can show.
    """

    nbytes: int
    op: str
    module: str = ""
    inside: bool = False


@dataclass(frozen=True)
class Step:
    """One step: the bytes alive when it begins, the events of its phases in order, and those of an evaluation after it."""

    before: int
    phases: dict[str, list[Event]]
    evaluation: list[Event]

    def evaluated(self) -> Step:
        """The evaluation as if it were a step of one phase."""
        after = self.before + sum(event.nbytes for events in self.phases.values() for event in events)
        return Step(after, {"evaluate": self.evaluation}, [])

    def peaks(self) -> dict[str, int]:
        """The largest number of bytes alive in each phase."""
        found, alive = dict[str, int](), self.before
        for name, events in self.phases.items():
            running = list(accumulate((event.nbytes for event in events), initial=alive))
            found[name], alive = max(running), running[-1]
        return found


@dataclass(frozen=True)
class Case:
    """What is trained: a configuration, the parts that are frozen, the knobs, the micro-batch's shape."""

    config: PretrainedConfig
    frozen: tuple[str, ...]
    setup: Setup
    shape: Shape

    def model(self) -> PreTrainedModel:
        """The model on the ``meta`` device."""
        model = build(self.config, self.arithmetic.frozen, self.setup.attention)
        part = part_finder(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part(name) not in self.frozen)
        self.arithmetic.lift(model, part)
        return model

    @property
    def arithmetic(self) -> Arithmetic:
        """What the step computes in."""
        return arithmetic_of(self.setup.precision)

    def images(self) -> Images | None:
        """How the model takes images."""
        return images_of(self.config, None) if self.shape.images else None


@pytest.fixture(scope="session")
def make_case() -> type[Case]:
    """Makes a `Case`."""
    return Case


@pytest.fixture(scope="session")
def run_twice() -> Callable[[Case], tuple[Step, Step]]:
    """A function from a `Case` to its step as traced and as measured."""

    def run(case: Case) -> tuple[Step, Step]:
        with _reproducible():
            return _traced_step(case), _measured_step(case)

    return run


@pytest.fixture(scope="session")
def measure() -> Callable[[Callable[[], Callable[[], None]]], Step]:
    """A function from what makes a step to its second run for real, as one phase, ``step``."""

    def run(make: Callable[[], Callable[[], None]]) -> Step:
        def two_steps() -> None:
            step = make()
            for number in range(2):
                _mark(number, "step", 0)
                step()
            _mark(1, "evaluate", 0)
            _mark(1, "end", 0)

        with _reproducible():
            return _measured(two_steps)

    return run


@pytest.fixture(scope="session")
def reproducible() -> Callable[[], AbstractContextManager[None]]:
    """A context in which a step on the CPU allocates the same each time."""
    return _reproducible


@contextmanager
def _reproducible() -> Iterator[None]:
    """One thread, since kernels take scratch for each; no oneDNN, whose scratch depends on the CPU; no garbage collector."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    onednn = torch.backends.mkldnn.set_flags(_enabled=False)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=onednn)
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


# Traced.


def _traced_step(case: Case) -> Step:
    """The second step of the events that a prediction replays: CUDA rules off, every layer traced, nothing rounded."""
    model = case.model()
    trace = Simulator(model, case.setup, WHOLE, case.images()).trace(case.shape)
    samples, tokens, images = case.shape
    choice = Choice(samples, MICRO_BATCHES, MICRO_BATCHES * samples, eval_batch=samples)
    events = lay_out(constant_form(trace), choice, tokens, images // samples)
    before, phases = 0, dict[str, list[Event]]()
    for segment in events.segments:
        made = [_traced_event(events, entry) for entry in segment.timeline]
        if segment.name.startswith(("load", "warmup/")):
            before += segment.repeat * sum(event.nbytes for event in made)
            continue
        edges = [0, *(at for at, _ in segment.marks[1:]), len(made)]
        for (_, phase), start, end in zip(segment.marks, edges, edges[1:], strict=False):
            number = {"step/first": " 1", "step/next": " 2"}.get(segment.name, "")
            phases[phase + number] = [event for event in made[start:end] if event.nbytes]
    evaluation = phases.pop("evaluate")
    return Step(before, phases, evaluation)


def _traced_event(events: Events, entry: int) -> Event:
    storage = entry if entry >= 0 else ~entry
    kind = events.kinds[storage]
    op = "aten::empty" if kind.role == "input" else "::".join(kind.op.split(".")[:2])
    return Event(events.sizes[storage] if entry >= 0 else -events.sizes[storage], op, events.module(storage))


# Measured.


def _measured_step(case: Case) -> Step:
    """The second of two real steps, as PyTorch's profiler reports it."""
    return _measured(lambda: _two_steps(case))


def _measured(two_steps: Callable[[], None]) -> Step:
    """The second of two real steps that a function runs and marks."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        two_steps()
    rows = sorted(_rows(profiler), key=lambda row: row.time)
    assert len({row.thread for row in rows}) == 1, "the backward ran on a thread of its own"
    return _second_step(rows)


def _two_steps(case: Case) -> None:
    model = case.model().to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=random)
        for buffer in model.buffers():
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    apply_checkpointing(model, case.setup.checkpointing, case.setup.vision_checkpointing)
    optimizer = make_optimizer(model, case.setup.optimizer)
    around_forward, scaler = partial(case.arithmetic.around_forward, "cpu"), case.arithmetic.make_scaler("cpu")
    images, samples, tokens = case.images(), case.shape.samples, case.shape.tokens
    last = case.config.get_text_config().vocab_size - 1

    def collate() -> dict[str, Tensor]:
        names, size = ("input_ids", "labels"), (samples, tokens)
        batch = {name: torch.empty(size, dtype=torch.long).random_(0, last, generator=random) for name in names}
        if images is not None:
            batch["input_ids"][:, : images.tokens * case.shape.images // samples] = last
            batch |= images.inputs(case.shape.images, case.arithmetic.inputs)
            batch["pixel_values"].normal_(generator=random)
        return batch

    for step in range(2):
        batches, count = [collate] * MICRO_BATCHES, MICRO_BATCHES * samples * tokens
        settings: dict[str, Any] = {"around_forward": around_forward, "scaler": scaler}
        loss = LOSSES[case.setup.loss]
        train_step(model, optimizer, batches, loss, count, on=lambda *at, step=step: _mark(step, *at), **settings)
    _mark(1, "evaluate", 0)
    model.eval()
    with torch.no_grad(), around_forward():
        LOSSES[case.setup.loss](model, collate(), samples * tokens)
    _mark(1, "end", 0)


def _mark(step: int, phase: str, index: int) -> None:
    number = f" {index + 1}" if phase in ("forward", "backward") else ""
    with record_function(f"{MARK}{step} {phase}{number}"):
        pass


class _Row(NamedTuple):
    """An allocation, a release (`nbytes` < 0) or a mark (0). `name` and `call` are the operator's and that of its call."""

    time: int
    thread: int
    nbytes: int
    address: int
    name: str
    call: int


def _rows(profiler: Any) -> Iterator[_Row]:
    def visit(event: Any, name: str, call: int) -> Iterator[_Row]:
        extra = event.extra_fields
        if hasattr(extra, "alloc_size"):
            yield _Row(event.start_time_ns, event.start_tid, extra.alloc_size, extra.ptr, name, call)
        elif event.name.startswith(MARK):
            yield _Row(event.start_time_ns, event.start_tid, 0, 0, event.name.removeprefix(MARK), 0)
        elif not call and _reaches_a_tracer(event.name) and not _calls_itself(event):
            name, call = event.name, event.id
        for child in event.children:
            yield from visit(child, name, call)

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        yield from visit(root, "", 0)


def _calls_itself(event: Any) -> bool:
    """Whether the event calls the operator anew: autocast does, once it has cast the arguments, and one overload another."""
    return any(child.name == event.name for child in event.children)


@cache
def _reaches_a_tracer(name: str) -> bool:
    """Whether a tracer sees calls of the operator; composite ones are taken apart before it sees anything."""
    schemas = torch._C._jit_get_schemas_for_operator(name) if "::" in name else []
    overloads = [f"{s.name}.{s.overload_name}" if s.overload_name else s.name for s in schemas if "out" not in s.overload_name]
    known = [overload for overload in overloads if torch._C._dispatch_has_kernel(overload)]
    key = "CompositeImplicitAutograd"
    return any(not torch._C._dispatch_has_kernel_for_dispatch_key(overload, key) for overload in known)


def _second_step(rows: list[_Row]) -> Step:
    alive: dict[int, int] = {}
    inside = set[int]()
    for at, row in enumerate(rows):
        if row.nbytes > 0:
            alive[row.address] = at
        elif row.nbytes < 0:
            birth = alive.pop(row.address)
            if row.call and rows[birth].call == row.call:
                inside |= {birth, at}
            rows[at] = row._replace(name=rows[birth].name)
    start = next(at for at, row in enumerate(rows) if row.nbytes == 0 and row.name.startswith("1 "))
    phases = dict[str, list[Event]]()
    for at, row in enumerate(rows[start:], start):
        if row.nbytes == 0:
            phases[row.name.removeprefix("1 ")] = events = []
        else:
            events.append(Event(row.nbytes, row.name, inside=at in inside))
    del phases["end"]
    evaluation = phases.pop("evaluate")
    return Step(sum(row.nbytes for row in rows[:start]), phases, evaluation)
