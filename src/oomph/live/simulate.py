"""Runs the training step on fake tensors and returns its trace: no weights, no GPU, almost no memory."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from transformers import PretrainedConfig, PreTrainedModel

from oomph.core.layout import Shape
from oomph.core.trace import Trace
from oomph.errors import UntraceableError, UserError
from oomph.live.batch import Batch, Images, text_inputs
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.cuda_rules import CudaFunctions, CudaRules, Device
from oomph.live.fake import WorstCase, answering
from oomph.live.layers import shorten
from oomph.live.memo import Memo
from oomph.live.model import part_finder, to_fake
from oomph.live.offload import HostOptimizer
from oomph.live.step import LOSSES, commit, train_step
from oomph.live.trace import Recorder, recording
from oomph.records import Attention

_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
)


@dataclass(frozen=True)
class Setup:
    """What of the Choice changes the trace. `capability` is the card's, (major, minor); none switches the CUDA rules off."""

    attention: Attention
    loss: str
    optimizer: str
    checkpointing: str
    vision_checkpointing: str
    capability: tuple[int, int] | None
    optimizer_offload: bool = False


@functools.cache
def _fake_mode() -> tuple[FakeTensorMode, Memo]:
    """The process's fake tensors: what one model's operators gave is known for the next one."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return mode, Memo(mode)


class Simulator:
    """A model on fake tensors whose training step can be traced at any shape.

    Args:
        model: on the ``meta`` device, with all of its layers. It is changed: its blocks are checkpointed, layers that repeat
            are left out, its parameters and buffers become fake tensors.
        setup: the knobs.
        units: how many of the units of equal layers are traced.
        images: how the model takes images, none for a text model.

    Raises:
        UserError: the model's blocks cannot be checkpointed.
    """

    def __init__(self, model: PreTrainedModel, setup: Setup, units: int, images: Images | None) -> None:
        self._model, self._setup, self._images = model, setup, images
        self.mode, self._memo = _fake_mode()
        apply_checkpointing(model, setup.checkpointing, setup.vision_checkpointing)
        self._stacks = shorten(model, units)
        to_fake(model, self.mode)

    def trace(self, shape: Shape) -> Trace:
        """A step of two micro-batches, the commit of a second step, and an evaluation, at one shape of the micro-batch.

        Raises:
            UntraceableError: the model's code fails, for example since it asks for values that fake tensors do not have.
        """
        rules = CudaRules(Device(self._setup.capability), self._setup.attention) if self._setup.capability else None
        recorder = Recorder(self._model, self._stacks, rules, self._memo.run)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(answering())
            stack.enter_context(self.mode)
            stack.enter_context(WorstCase())
            recorder.start("load")
            recorder.load(self._model, part_finder(self._model))
            stack.enter_context(recording(recorder, self._model))
            if rules is not None:
                stack.enter_context(CudaFunctions(rules))
            try:
                self._run(recorder, shape)
            except UserError:
                raise
            except Exception as error:
                raise _untraceable(recorder, error) from error
        name_roles(recorder.trace, self._model.config.get_text_config(), shape)
        return recorder.trace

    def _run(self, recorder: Recorder, shape: Shape) -> None:
        optimizer = make_optimizer(self._model, self._setup.optimizer, self._setup.optimizer_offload)
        numbers = {id(p): number for number, p in enumerate(self._model.parameters())}

        def collate() -> Batch:
            with recorder.making_inputs():
                batch: Batch = dict(text_inputs(self._model.config, shape, self._images))
                if self._images is not None and shape.images:
                    batch |= self._images.inputs(shape.images, next(self._model.parameters()).dtype)
                return batch

        train_step(self._model, optimizer, [collate, collate], LOSSES[self._setup.loss], 1, on=_announcer(recorder))
        for parameter, state in optimizer.state.items():
            tensors = [(numbers[id(parameter)], value) for value in state.values() if isinstance(value, Tensor)]
            recorder.assign(tensors, "optimizer")
        recorder.start("step/optimizer")
        recorder.enter("optimizer")
        for parameter in optimizer.state:
            recorder.revive(numbers[id(parameter)], parameter)
        commit(optimizer)
        self._evaluate(recorder, collate)
        recorder.finish()

    def _evaluate(self, recorder: Recorder, collate: Callable[[], Batch]) -> None:
        recorder.start("evaluate")
        recorder.enter("evaluate")
        self._model.eval()
        with torch.no_grad():
            LOSSES[self._setup.loss](self._model, collate(), 1)
        self._model.train()


def _untraceable(recorder: Recorder, error: Exception) -> UntraceableError:
    """What the model's own code says, and where."""
    reason = str(error).splitlines()[0] if str(error) else "no reason given"
    hint = "if the model trains for real with such a batch, its code is one that fake tensors cannot run: please report it"
    if isinstance(error, _VALUES):
        hint = "its operators need sizes that depend on values, or have no meta kernel (torch.library.register_fake adds one)"
    return UntraceableError(f"{recorder.whereabouts()} cannot be traced: {type(error).__name__}: {reason}", hint)


def _announcer(recorder: Recorder) -> Callable[[str, int], None]:
    def on(phase: str, index: int) -> None:
        if phase == "forward":
            recorder.start("first" if index == 0 else "next")
        elif phase == "optimizer":
            recorder.start("warmup/optimizer")
        recorder.enter(phase)

    return on


def make_optimizer(model: nn.Module, kind: str, offload: bool = False) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, in the implementation that the Choice names; on the host with `offload`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if offload:
        return HostOptimizer(trained, lr=1e-4)
    variant = kind.removeprefix("adamw-")
    return torch.optim.AdamW(trained, lr=1e-4, foreach=variant == "foreach", fused=variant == "fused")


def name_roles(trace: Trace, config: PretrainedConfig, shape: Shape) -> None:
    """Tells logits and attention scores from other activations, by their shapes."""
    for number, storage in enumerate(trace.storages):
        if storage.kind.role not in ("activation", "temporary"):
            continue
        dims = storage.shape
        role = ""
        if len(dims) >= 2 and dims[-1] == config.vocab_size and dims != (config.vocab_size, config.hidden_size):
            role = "logits"
        elif len(dims) >= 3 and dims[-1] == dims[-2] == shape.tokens:
            role = "scores"
        if role:
            trace.storages[number] = storage._replace(kind=storage.kind._replace(role=role))
