"""FSDP2 in a step that may run out of memory on some ranks.

Within a micro-batch FSDP2 gathers and reduces group by group, in an order that the model and the settings fix. That order is
learnt from one small micro-batch. A rank that fails then issues, on buffers of zeros, what of it is left: the others get
through theirs, with numbers that are dropped, to the vote at its end. Nothing is asked of anybody before.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel

from oomph.live.batch import images_of
from oomph.live.ranks.group import Ranks
from oomph.live.ranks.parallel import OutOfStepError
from oomph.live.ranks.torch_private import DefaultAllGather, DefaultReduceScatter, drop_partial, has_run
from oomph.live.recover import drop_gradients
from oomph.live.step import Batch, Loss
from oomph.live.tensors import tensors_in

_HINT = "the last checkpoint is good: start again from it"


class Call(NamedTuple):
    """A collective: ``gather``, ``scatter`` or ``reduce``, elements that go in and come out, their dtype, where and how."""

    kind: str
    given: int
    got: int
    dtype: torch.dtype
    group: dist.ProcessGroup | None
    op: Any


class Shards:
    """A model that FSDP2 divides among ranks.

    Args:
        model: `fully_shard` was applied to all of its layers, then to itself.
        ranks: the processes.
        replicas: how often the whole model is there: the nodes, in hybrid sharding.
        replicated: the group that sums what the replicas have; none without replicas.
    """

    in_step = True

    def __init__(
        self, model: PreTrainedModel, ranks: Ranks, replicas: int = 1, replicated: dist.ProcessGroup | None = None
    ) -> None:
        self.ranks, root = ranks, cast(Any, model)
        self._model = root
        self._replicas, self._replicated = replicas, replicated
        self._schedules: dict[str, tuple[Call, ...] | None] = {}
        self._issued: list[Call] = []
        self._name: str | None = None
        self._learns = False
        self._squares = 0.0
        gather, scatter = _Gather(self._note), _Scatter(self._note)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(gather)
                module.set_custom_reduce_scatter(scatter)
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                if replicas > 1:
                    module.set_all_reduce_hook(self._reduced)
        root.oomph_loss = types.MethodType(_whole_loss, model)
        register_fsdp_forward_method(model, "oomph_loss")
        self._images = images_of(model.config, (1, 1))

    def close(self) -> None:
        """Lets go of the process groups, before they are ended."""
        self._schedules.clear()
        self._issued.clear()
        self._replicated = None

    # A micro-batch.

    def loss(self, loss: Loss) -> Loss:
        """The loss as one forward of the root: its weights stay whole until the head has run, in chunks or not."""

        def of_root(model: PreTrainedModel, batch: Batch, num_tokens: int) -> Tensor:
            dummy: Batch | None = None
            if self._images is not None and "pixel_values" not in batch:
                inputs = self._images.inputs(1, _pixels_dtype(model))
                dummy = {name: _white(value, batch["input_ids"].device) for name, value in inputs.items()}
            value: Tensor = self._model.oomph_loss(loss, batch, num_tokens, dummy)
            return value

        return of_root

    def knows(self, name: str) -> bool:
        """Whether its collectives are learnt."""
        return name in self._schedules

    def begin(self, name: str, learns: bool = False) -> None:
        """From now on collectives are noted."""
        self._name, self._learns = name, learns
        self._issued.clear()

    def end(self) -> None:
        """Learns, or compares. A micro-batch that issued something else than others of its name did cannot be drained."""
        assert self._name is not None
        if self._learns:
            self._schedules[self._name] = tuple(self._issued)
        elif self._schedules[self._name] != tuple(self._issued):
            self._schedules[self._name] = None
        self._name = None

    def drain(self) -> None:
        """Issues what is left of the micro-batch's collectives.

        Raises:
            OutOfStepError: they are not known, or there is no memory for them.
        """
        name, self._name = self._name, None
        self._reset_here()
        if name is None:
            return
        schedule = self._schedules.get(name)
        if schedule is None or list(schedule[: len(self._issued)]) != self._issued:
            raise OutOfStepError("memory ran out where it is not known what the other ranks wait for", _HINT)
        try:
            for call in schedule[len(self._issued) :]:
                self._issue(call)
        except torch.OutOfMemoryError:
            raise OutOfStepError("there is no memory to go through what the other ranks wait for", _HINT) from None

    def reset(self) -> None:
        """Shards the model again, and drops all gradients, whole ones too."""
        self._name = None
        self._reset_here()

    # The gradients of the step.

    def ready(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """The squared norm of what this rank has of the gradients."""
        if max_norm is not None:
            gradients = _local_gradients(optimizer)
            norms = torch._foreach_norm(gradients, 2, torch.float32) if gradients else ()
            self._squares = float(torch.stack(list(norms)).double().square().sum()) if norms else 0.0

    def clip(
        self, optimizer: torch.optim.Optimizer, max_norm: float | None, scaler: torch.amp.GradScaler | None
    ) -> float | None:
        """Scales what each rank has of the gradients by the norm of them all, as ``torch.nn.utils.clip_grad_norm_`` does."""
        assert scaler is None, "choices.clashes refuses a scaled loss with FSDP2"
        if max_norm is None:
            return None
        (squares,) = self.ranks.sums([self._squares])
        norm = float((squares / self._replicas) ** 0.5)
        gradients = _local_gradients(optimizer)
        if gradients:
            torch._foreach_mul_(gradients, min(1.0, max_norm / (norm + 1e-6)))
        return norm

    def _reset_here(self) -> None:
        if has_run(self._model):
            self._model.reset_iter_state()
            drop_partial(self._model)
        drop_gradients(self._model)

    def _note(self, call: Call) -> None:
        if self._name is not None:
            self._issued.append(call)

    def _reduced(self, output: Tensor) -> None:
        self._note(Call("reduce", output.numel(), output.numel(), output.dtype, self._replicated, dist.ReduceOp.SUM))

    def _issue(self, call: Call) -> None:
        got = torch.zeros(call.got, dtype=call.dtype, device=self.ranks.device)
        if call.kind == "reduce":
            dist.all_reduce(got, call.op, group=call.group)
            return
        given = torch.zeros(call.given, dtype=call.dtype, device=self.ranks.device)
        if call.kind == "gather":
            dist.all_gather_single(got, given, group=call.group)
        else:
            dist.reduce_scatter_single(got, given, op=call.op, group=call.group)


class _Gather(DefaultAllGather):  # type: ignore[misc]
    """The default all-gather, noted once it is issued."""

    def __init__(self, note: Any) -> None:
        self._note = note

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        work: dist.Work | None = super().__call__(output_tensor, input_tensor, group, async_op)
        self._note(Call("gather", input_tensor.numel(), output_tensor.numel(), output_tensor.dtype, group, None))
        return work


class _Scatter(DefaultReduceScatter):  # type: ignore[misc]
    """The default reduce-scatter, noted once it is issued."""

    def __init__(self, note: Any) -> None:
        self._note = note

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        work: dist.Work | None = super().__call__(output_tensor, input_tensor, group, op, async_op)
        self._note(Call("scatter", input_tensor.numel(), output_tensor.numel(), output_tensor.dtype, group, op))
        return work


class _Inside:
    """The root within its own forward: a call of it runs the model's forward alone, without FSDP2's hooks once more."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _whole_loss(model: PreTrainedModel, loss: Loss, batch: Batch, num_tokens: int, dummy: Batch | None) -> Tensor:
    """The loss of a micro-batch. One without images runs the tower on a white one, so that it gathers what others do.

    The tower runs first, as it does where there are images, so the backward goes through it last and reduces in the same order.
    """
    inside: Any = _Inside(model)
    if dummy is None:
        return loss(inside, batch, num_tokens)
    features: Any = inside.get_image_features(**dummy)
    read = [features.pooler_output, getattr(features, "deepstack_features", ())]
    nothing = [0 * feature.float().sum() for feature in tensors_in(read) if feature.requires_grad]
    return functools.reduce(torch.add, nothing, loss(inside, batch, num_tokens))


def _local_gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What this rank has of the gradients; chunks without elements are left out."""
    parameters: Sequence[Any] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    local = [parameter.grad.to_local() for parameter in parameters if parameter.grad is not None]
    return [gradient for gradient in local if gradient.numel()]


def _pixels_dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _white(value: Tensor, device: torch.device) -> Tensor:
    """Ones for pixels, as some models leave out images of zeros; the same numbers for sizes."""
    return torch.ones_like(value, device=device) if value.is_floating_point() else value.to(device)
