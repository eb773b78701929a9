"""Runs the step that the tracer records, for real: on the CUDA card at hand or, where there is none, on the CPU.

The weights have the real shapes and random values. What runs is what a prediction is made of: the model is loaded, a warm-up
step and a step of the same micro-batches follow, then an evaluation. Steps for the clock come after what is measured.
"""

from __future__ import annotations

import functools
import gc
import importlib
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from oomph.core.layout import Shape
from oomph.core.measuring import Job, Reading
from oomph.live.batch import Batch, images_of, random_batch
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.meters import Meter, make_meter
from oomph.live.optimizers import make_optimizer
from oomph.live.precision import arithmetic_of
from oomph.live.processes import Failed, in_new_process
from oomph.live.quantization import HeldWeight
from oomph.live.source import build_model, read_model_config
from oomph.live.step import LOSSES, train_step
from oomph.live.watching import Activity, Sampler, bytes_in_use, card_bytes, resident_bytes
from oomph.records import Footprint

_STEPS = 2
_SPREAD = 0.02
"""Standard deviation of random weights."""
_TIMED_STEPS, _TIMED_SECONDS, _MOST_STEPS = 3, 1.0, 50
_PINNED = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def measure_apart(job: Job) -> Reading:
    """Runs a rung in a new process, whose allocator, workspaces and peaks are its own. Its end is a failure of the rung.

    Raises:
        UserError: as `measure_here` does.
    """
    try:
        reading: Reading = in_new_process(measure_here, job)
    except Failed as failure:
        return Reading(None, failure=str(failure))
    return reading


def measure_here(job: Job) -> Reading:
    """Runs a rung in this process. Running out of memory is a failure of the rung.

    Raises:
        UserError: the model cannot be built, or its blocks cannot be checkpointed.
    """
    if job.device == "cuda":
        segments = "True" if job.choice.expandable_segments else "False"
        torch.cuda.memory._set_allocator_settings(f"expandable_segments:{segments}")
        torch.cuda.init()
    run = _Run(job)
    with ExitStack() as stack:
        enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        if enabled:
            stack.callback(gc.enable)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        held = stack.enter_context(Sampler(bytes_in_use)) if job.device == "cuda" else None
        try:
            measured = run.measured()
            seconds, activity = run.timed()
        except torch.OutOfMemoryError as error:
            return Reading(None, failure=f"out of memory in phase {run.phase}: {str(error).partition('. GPU')[0]}")
        if held is None:
            return Reading(measured, resident_bytes(), None, seconds, activity.utilisation)
        own = card_bytes()
        outside = None if own is None else own - torch.cuda.memory_reserved()
    return Reading(measured, max(held.values), outside, seconds, activity.utilisation, activity.sm_activity)


class _Run:
    """One rung: the model on the device, the optimizer, batches in host memory that each micro-batch is copied from.

    Attributes:
        phase: the one that runs, for messages.
    """

    def __init__(self, job: Job) -> None:
        self.phase, self._job, self._choice = "load", job, job.choice
        self._device = torch.device(job.device)
        self._arithmetic = arithmetic_of(job.choice.precision)
        config = read_model_config(job.key)
        self._model = build_model(job.key, config)
        size = (job.key.image_size[0], job.key.image_size[1]) if job.key.image_size else None
        self._images = images_of(config, size) if job.shape.images else None
        torch.manual_seed(0)
        self._batch = self._host_batch(job.shape)
        each = job.shape.images // job.shape.samples
        evaluated = self._choice.eval_batch
        self._evaluated = self._host_batch(Shape(evaluated, job.shape.tokens, evaluated * each)) if evaluated else None

    def _host_batch(self, shape: Shape) -> Batch:
        return random_batch(self._model.config, shape, self._images, self._arithmetic.inputs)

    def measured(self) -> Footprint:
        """The footprint of loading, two steps and an evaluation."""
        meter = make_meter(self._job.device)
        with meter, self._attention():
            self._load()
            for _ in range(_STEPS):
                self._step(meter)
            if self._evaluated is not None:
                self._enter(meter, "evaluate")
                self._evaluate(self._evaluated)
        return meter.footprint()

    def timed(self) -> tuple[float, Activity]:
        """The median time of a step in seconds, and how busy the device was."""
        seconds: list[float] = []
        with self._attention(), Activity(self._job.device) as activity:
            while len(seconds) < _MOST_STEPS and (len(seconds) < _TIMED_STEPS or sum(seconds) < _TIMED_SECONDS):
                begun = time.perf_counter()
                self._step(None)
                self._synchronize()
                seconds.append(time.perf_counter() - begun)
                if sum(seconds) > _TIMED_SECONDS * _MOST_STEPS:
                    break
        return statistics.median(seconds), activity

    def _load(self) -> None:
        choice, model = self._choice, self._model
        apply_checkpointing(model, choice.checkpointing, choice.vision_checkpointing)
        materialise(model, self._device)
        self._optimizer = make_optimizer(model, choice.optimizer, choice.optimizer_offload, choice.master_weights)
        self._scaler = self._arithmetic.make_scaler(self._job.device)

    def _step(self, meter: Meter | None) -> None:
        samples, tokens, _ = self._job.shape
        accumulation = self._choice.accumulation
        train_step(
            self._model,
            self._optimizer,
            [functools.partial(self._collate, self._batch)] * accumulation,
            LOSSES[self._choice.loss],
            samples * tokens * accumulation,
            on=lambda phase, _: self._enter(meter, phase),
            around_forward=functools.partial(self._arithmetic.around_forward, self._job.device),
            scaler=self._scaler,
        )

    def _evaluate(self, batch: Batch) -> None:
        self._model.eval()
        with torch.no_grad(), self._arithmetic.around_forward(self._job.device):
            LOSSES[self._choice.loss](self._model, self._collate(batch), batch["labels"].numel())
        self._model.train()

    def _collate(self, batch: Batch) -> Batch:
        """A copy on the device, tensor by tensor in the order in which the tracer's collator makes them."""
        return {name: torch.empty_like(tensor, device=self._device).copy_(tensor) for name, tensor in batch.items()}

    def _attention(self) -> Any:
        """The kernel that the choice pins. The CPU has one fused kernel, whatever is pinned."""
        pinned = _PINNED.get(self._choice.attention) if self._job.device == "cuda" else None
        return nullcontext() if pinned is None else sdpa_kernel([pinned])

    def _enter(self, meter: Meter | None, phase: str) -> None:
        self.phase = phase
        if meter is not None:
            meter.enter(phase)

    def _synchronize(self) -> None:
        if self._job.device == "cuda":
            torch.cuda.synchronize()


def materialise(model: nn.Module, device: torch.device) -> None:
    """Gives parameters and buffers on the ``meta`` device memory and values, in place; tied ones stay tied.

    They are allocated as the tracer's recorder does it: children before parents, in each module parameters before buffers.
    Matrices become small random numbers, vectors ones, biases zeros, whole numbers positions: activations stay finite.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in _children_first(model):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = tensor, _real(tensor, device)
                    tensors[name] = made[id(tensor)][1]  # type: ignore[assignment]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter)
        for _, buffer in model.named_buffers():
            if buffer.is_floating_point() or buffer.dtype == torch.bool:
                buffer.fill_(1)
            else:
                torch.arange(buffer.numel(), out=buffer.view(-1))


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module


def _real(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory on the device for a parameter or a buffer."""
    if isinstance(tensor, HeldWeight):
        return _quantized(tensor, device)
    empty = torch.empty_like(tensor, device=device, requires_grad=False)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _quantized(held: Any, device: torch.device) -> Tensor:
    """The parameter of bitsandbytes that is held, with random values, which it quantizes on its way to the device."""
    layers: Any = importlib.import_module("bitsandbytes.nn")
    state = getattr(held, "quant_state", None)
    if state is None:
        source = torch.empty(held.shape, dtype=torch.float16).normal_(std=_SPREAD)
        parameter: Tensor = layers.Int8Params(source, requires_grad=False, has_fp16_weights=False)
    else:
        source = torch.empty(state.shape, dtype=state.dtype).normal_(std=_SPREAD)
        settings = {name: getattr(held, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
        parameter = layers.Params4bit(source, requires_grad=False, **settings)
    return parameter.to(device)


def _fill(name: str, parameter: Tensor) -> None:
    if not parameter.is_floating_point():
        if type(parameter) is nn.Parameter:
            parameter.zero_()
    elif parameter.dim() > 1:
        parameter.normal_(std=_SPREAD)
    else:
        parameter.fill_(0 if name.endswith("bias") else 1)
