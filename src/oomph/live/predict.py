"""Predicts the memory of somebody's own training step with their own model: `oomph.predict`."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._pytree import tree_leaves

from oomph.core import predict as core
from oomph.core.closed_form import ClosedForm, constant_form, fit
from oomph.core.devices import find_gpu
from oomph.core.layout import as_traced
from oomph.core.trace import Trace
from oomph.core.unroll import UNITS
from oomph.errors import UntraceableError, UserError
from oomph.live.cuda_rules import CudaFunctions, CudaRules, Device, cuda_autocast
from oomph.live.eight_bit import on_a_gpu
from oomph.live.fake import answering
from oomph.live.layers import shorten
from oomph.live.phases import StepRecorder
from oomph.live.simulate import fake_mode
from oomph.live.stand_in import copy_batch, copy_model
from oomph.live.surroundings import Surroundings, Values, as_real
from oomph.live.trace import recording
from oomph.live.untraceable import explain, note
from oomph.records import Choice, Prediction
from oomph.units import size

Layers = Literal["all", "equal"]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
_WHOLE = 1 << 20
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_ANY = (1, 1, 0)


@dataclass(frozen=True)
class Task:
    """A step to trace, as `predict` is given it. `capability` is the card's; none switches the CUDA rules off."""

    step: Callable[..., Any]
    model: nn.Module
    batch: Any
    optimizer: MakeOptimizer | None = None
    capability: tuple[int, int] | None = None
    steps: int = 2
    worst_case: bool = False


@dataclass(frozen=True)
class Traced:
    """A trace whose pieces are ``load`` and the steps, and what it leaves out, in words."""

    trace: Trace
    leaves_out: tuple[str, ...]


def predict(
    step: Callable[..., Any],
    model: nn.Module,
    example_batch: Any,
    *,
    gpu: str,
    optimizer: MakeOptimizer | None = None,
    steps: int = 2,
    layers: Layers = "all",
    worst_case: bool = False,
    expandable_segments: bool = False,
) -> Prediction:
    """What `oomph.predict` says.

    Raises:
        UserError: an argument cannot be taken, or the step uses what it is not given.
        UntraceableError: the step cannot run on fake tensors.
    """
    card = find_gpu(gpu)
    _check(step, optimizer, steps, layers)
    task = Task(step, model, example_batch, optimizer, card.compute_capability, steps, worst_case)
    traced, form = _form(task, layers)
    events = as_traced(form, _ANY)
    choice = Choice(1, 1, 1, expandable_segments=expandable_segments)
    prediction = core.predict(events, choice, card, form.unclassified)
    others = core.leaves_out(choice, set(form.unclassified) - {core.CONVOLUTION})
    return replace(prediction, leaves_out=(*traced.leaves_out, *others))


def _check(step: Any, optimizer: Any, steps: int, layers: str) -> None:
    problems = []
    if not callable(step):
        problems.append(f"the step is a {type(step).__name__}, not a function")
    if isinstance(optimizer, torch.optim.Optimizer):
        problems.append(
            "the optimizer is one already, over your model's own parameters: pass a function that makes it, for example "
            f"lambda parameters: {type(optimizer).__name__}(parameters, lr=1e-4)"
        )
    elif optimizer is not None and not callable(optimizer):
        problems.append(f"the optimizer is a {type(optimizer).__name__}, not a function from parameters to an optimizer")
    if steps < 2:
        problems.append(f"steps is {steps}, and memory peaks in the second step or later: take 2 or more")
    if layers not in ("all", "equal"):
        problems.append(f'layers is {layers!r}: write "all", or "equal" to trace a few of equal layers')
    if problems:
        raise UserError(problems)


def _form(task: Task, layers: Layers) -> tuple[Traced, ClosedForm]:
    """The whole model's trace as a form, unrolled from a few layers where that is asked for and comes out right."""
    if layers == "equal":
        try:
            few, more = (trace_steps(task, units) for units in (UNITS, UNITS + 1))
            return few, fit([(_ANY, few.trace)], (_ANY, more.trace))
        except Exception:  # what a step raises that counts on all of its layers, and NotClosed and NotPeriodic
            pass
    traced = trace_steps(task)
    return traced, constant_form(traced.trace)


def trace_steps(task: Task, units: int = _WHOLE) -> Traced:
    """Runs the step on fake tensors and records it.

    Args:
        task: what to trace.
        units: how many of the units of equal layers are traced.

    Raises:
        UserError: the step uses what it is not given, or ends before it is complete.
        UntraceableError: the step cannot run on fake tensors.
    """
    mode, memo = fake_mode()
    model = copy_model(task.model, mode)
    stacks = shorten(model, units)
    rules = CudaRules(Device(task.capability), "sdpa") if task.capability else None
    recorder = StepRecorder(model, mode, stacks, rules, memo.run)
    values = Values(task.worst_case)
    surroundings = Surroundings(recorder, values, rules is not None)
    with ExitStack() as stack:
        stack.enter_context(_undisturbed())
        stack.enter_context(answering())
        if "bitsandbytes" in sys.modules:
            stack.enter_context(on_a_gpu("adamw-8bit"))
        stack.enter_context(as_real(rules is not None))
        stack.enter_context(mode)
        stack.enter_context(values)
        recorder.start("load")
        recorder.load(model, lambda name: "")
        stack.enter_context(recorder.watching_optimizers())
        stack.enter_context(recording(recorder, model))
        stack.enter_context(surroundings)
        if rules is not None:
            stack.enter_context(cuda_autocast())
            stack.enter_context(CudaFunctions(rules))
        try:
            growth = _run(task, model, recorder)
        except UserError:
            raise
        except Exception as error:
            ours = _explained(error, task, model, recorder)
            if ours is None:
                note(error, model, "the step")
                raise
            raise ours from error
    if not recorder.backwards:
        _evaluates(recorder.trace)
    fused = any(isinstance(module, _FUSED) and not module.training for module in model.modules())
    return Traced(recorder.trace, tuple(_leaves_out(recorder, values, surroundings, fused, growth)))


def _explained(error: Exception, task: Task, model: nn.Module, recorder: StepRecorder) -> UntraceableError | None:
    """What to say where fake tensors are the reason of an error; None where it is the step's own."""
    operator = recorder.failed[1] if recorder.failed[0] is error else ""
    ours = explain(error, model, "the step", operator)
    if ours and isinstance(error, DynamicOutputShapeException) and not task.worst_case:
        ours.hint += "; worst_case=True predicts the case in which every element is selected"
    return ours


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random states, the gradient mode and what is logged are afterwards as before; warnings of the step are not shown."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level, python = log.level, random.getstate()
    numpy = sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None else None
    log.setLevel(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numbers)


def _run(task: Task, model: nn.Module, recorder: StepRecorder) -> int:
    """Runs the steps; returns the bytes by which the last one left more than the one before."""
    given: list[Any] = [model]
    if task.optimizer is not None:
        given.append(_made_optimizer(task.optimizer, model))
    alive = [0]
    for number in range(1, task.steps + 1):
        recorder.start(f"step {number}")
        recorder.enter("forward")
        result = task.step(*given, _inputs(task.batch, recorder))
        if not recorder.backwards and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
            raise UserError(
                "the step returns a tensor with a graph and never calls backward",
                "call loss.backward() in the step, or run it under torch.no_grad() where it only evaluates",
            )
        del result
        alive.append(recorder.live_bytes())
    if task.optimizer is not None and not recorder.optimizer_steps:
        raise UserError(
            f"the optimizer never stepped in {task.steps} steps, so that its states are unknown",
            "call optimizer.step() in the step; where only every n-th call does so, pass steps=2 * n",
        )
    recorder.finish()
    return alive[-1] - alive[-2]


def _inputs(batch: Any, recorder: StepRecorder) -> Any:
    with recorder.making_inputs():
        return copy_batch(batch, recorder.take_in)


def _made_optimizer(make: MakeOptimizer, model: nn.Module) -> torch.optim.Optimizer:
    made = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(f"optimizer= gave a {type(made).__name__}, not a torch.optim.Optimizer")
    return made


def _evaluates(trace: Trace) -> None:
    """Calls the forward of a step without a backward what it is."""
    trace.marks = [(at, "evaluate" if phase == "forward" else phase) for at, phase in trace.marks]
    for number, storage in enumerate(trace.storages):
        if storage.kind.phase == "forward":
            trace.storages[number] = storage._replace(kind=storage.kind._replace(phase="evaluate"))


def _leaves_out(recorder: StepRecorder, values: Values, surroundings: Surroundings, fused: bool, growth: int) -> Iterator[str]:
    """What the prediction does not know, in words."""
    if any("convolution" in operator for operator in recorder.trace.unclassified):
        yield "the workspaces that cuDNN picks for convolutions"
    if surroundings.recurrent:
        yield "what cuDNN keeps for recurrent layers: a loop over their steps in time is traced in its place"
    if fused:
        yield "torch's fused evaluation of nn.MultiheadAttention and nn.TransformerEncoderLayer: their plain code is traced"
    if values.selected:
        yield "how many elements satisfy conditions on values that nobody knows: the worst case is taken, that all do"
    if values.read:
        yield "what depends on values that the step reads from floating-point tensors: each is taken to be 1.0, and finite"
    if growth > 0:
        yield f"steps after the last traced one: each keeps {size(growth)} more than the one before"
