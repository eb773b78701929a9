"""Runs the training step on fake tensors and returns its trace: no weights, no GPU, almost no memory."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from oomph.core.eight_bit import EIGHT_BIT
from oomph.core.layout import Shape
from oomph.core.trace import Trace
from oomph.errors import UserError
from oomph.live.batch import Batch, Images, text_inputs
from oomph.live.capacity import CapacityMixture
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.cuda_rules import CudaFunctions, CudaRules, Device, cuda_autocast
from oomph.live.eight_bit import on_a_gpu
from oomph.live.fake import WorstCase, answering
from oomph.live.layers import arrange, drop_layers, owners
from oomph.live.memo import Memo
from oomph.live.model import part_finder, to_fake
from oomph.live.optimizers import make_optimizer, states_of
from oomph.live.precision import arithmetic_of, scaler_states
from oomph.live.quantization import quantized_run
from oomph.live.step import LOSSES, commit, train_step
from oomph.live.trace import Recorder, recording
from oomph.live.untraceable import untraceable
from oomph.records import Attention, Precision


@dataclass(frozen=True)
class Setup:
    """What of the Choice changes the trace.

    `capability` is the card's, (major, minor); none switches the CUDA rules off, and `without` those that it names.
    """

    attention: Attention
    loss: str
    optimizer: str
    checkpointing: str
    vision_checkpointing: str
    capability: tuple[int, int] | None
    optimizer_offload: bool = False
    precision: Precision = "bfloat16"
    without: frozenset[str] = frozenset()


@functools.cache
def fake_mode() -> tuple[FakeTensorMode, Memo]:
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
        then: how many of them are traced after `shorten`.

    Raises:
        UserError: the model's blocks cannot be checkpointed.
    """

    def __init__(
        self, model: PreTrainedModel, setup: Setup, units: int, images: Images | None, then: int | None = None
    ) -> None:
        self._model, self._setup, self._images = model, setup, images
        self._arithmetic = arithmetic_of(setup.precision)
        self._around_forward = functools.partial(self._arithmetic.around_forward, "cpu")
        self.mode, self._memo = fake_mode()
        apply_checkpointing(model, setup.checkpointing, setup.vision_checkpointing)
        self._stacks, self._fewer = arrange(model, units, units if then is None else then)
        drop_layers(model, self._stacks)
        to_fake(model, self.mode)

    def shorten(self) -> None:
        """Leaves out more of the equal layers, so that `then` units of them stay."""
        self._stacks = self._fewer
        drop_layers(self._model, self._stacks)

    def trace(self, shape: Shape) -> Trace:
        """A step of two micro-batches, the commit of a second step, and an evaluation, at one shape of the micro-batch.

        Raises:
            UntraceableError: the model's code fails, for example since it asks for values that fake tensors do not have.
            UserError: the optimizer is bitsandbytes', which is not installed.
        """
        without = self._setup.without
        rules = CudaRules(Device(self._setup.capability), self._setup.attention, without) if self._setup.capability else None
        recorder = Recorder(self._model, self._stacks, rules, self._memo.run)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(answering(without))
            if self._setup.optimizer in EIGHT_BIT:
                stack.enter_context(on_a_gpu(self._setup.optimizer))
            stack.enter_context(self.mode)
            stack.enter_context(WorstCase())
            stack.enter_context(quantized_run(self._model))
            recorder.start("load")
            recorder.load(self._model, part_finder(self._model))
            stack.enter_context(recording(recorder, self._model))
            if rules is not None:
                if "autocast" not in without:
                    stack.enter_context(cuda_autocast())
                stack.enter_context(CudaFunctions(rules))
            try:
                self._run(recorder, shape)
            except UserError:
                raise
            except Exception as error:
                raise untraceable(error, self._model, recorder.whereabouts()) from error
        name_roles(recorder.trace, self._model.config.get_text_config(), shape, self._dispatching())
        return recorder.trace

    def _dispatching(self) -> set[str]:
        """The modules whose own code is a dispatch over dense tensors, with ``{}`` for the layer's number."""
        owned = owners(self._model, self._stacks)
        return {owned[path].template for path, module in self._model.named_modules() if isinstance(module, CapacityMixture)}

    def _run(self, recorder: Recorder, shape: Shape) -> None:
        optimizer = make_optimizer(self._model, self._setup.optimizer, self._setup.optimizer_offload)
        numbers = {id(p): number for number, p in enumerate(self._model.parameters())}
        scaler = self._arithmetic.make_scaler("cpu")
        recorder.assign(((-1, tensor) for tensor in scaler_states(scaler)), "optimizer")

        def collate() -> Batch:
            with recorder.making_inputs():
                batch: Batch = dict(text_inputs(self._model.config, shape, self._images))
                if self._images is not None and shape.images:
                    batch |= self._images.inputs(shape.images, self._arithmetic.inputs)
                return batch

        loss, on = LOSSES[self._setup.loss], _announcer(recorder)
        train_step(
            self._model, optimizer, [collate, collate], loss, 1, on=on, around_forward=self._around_forward, scaler=scaler
        )
        recorder.assign(states_of(optimizer, numbers), "optimizer")
        recorder.start("step/optimizer")
        recorder.enter("optimizer")
        for parameter in optimizer.state:
            recorder.revive(numbers[id(parameter)], parameter)
        commit(optimizer, scaler=scaler)
        self._evaluate(recorder, collate)
        recorder.finish()

    def _evaluate(self, recorder: Recorder, collate: Callable[[], Batch]) -> None:
        recorder.start("evaluate")
        recorder.enter("evaluate")
        self._model.eval()
        with torch.no_grad(), self._around_forward():
            LOSSES[self._setup.loss](self._model, collate(), 1)
        self._model.train()


def _announcer(recorder: Recorder) -> Callable[[str, int], None]:
    def on(phase: str, index: int) -> None:
        if phase == "forward":
            recorder.start("first" if index == 0 else "next")
        elif phase == "optimizer":
            recorder.start("warmup/optimizer")
        recorder.enter(phase)

    return on


def name_roles(trace: Trace, config: PretrainedConfig, shape: Shape, dispatching: Collection[str] = ()) -> None:
    """Tells logits, attention scores and the dispatch to experts from other activations.

    Args:
        trace: whose storages are renamed, in place.
        config: of the language model; logits and scores are known by their shapes.
        shape: of the micro-batch.
        dispatching: the modules that hold nothing but the dispatch.
    """
    for number, storage in enumerate(trace.storages):
        if storage.kind.role not in ("activation", "temporary"):
            continue
        dims = storage.shape
        role = ""
        if storage.kind.module in dispatching:
            role = "dispatch"
        elif len(dims) >= 2 and dims[-1] == config.vocab_size and dims != (config.vocab_size, config.hidden_size):
            role = "logits"
        elif len(dims) >= 3 and dims[-1] == dims[-2] == shape.tokens:
            role = "scores"
        if role:
            trace.storages[number] = storage._replace(kind=storage.kind._replace(role=role))
