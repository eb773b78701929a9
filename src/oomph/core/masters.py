"""Float32 master weights without sharding and under DDP: what ``oomph.live.masters`` allocates in place of AdamW.

The traced step updates the parameters themselves. Master weights make it another one:

* At the end of ``load`` each trained parameter gets its master, unless it is float32 itself, AdamW's step counter (on the GPU
  with ``adamw-fused`` alone) and two float32 moments: of parameters without a gradient too.
* In the optimizer's segments the clipping stays. What follows it, AdamW over all parameters and the end of their gradients,
  becomes one parameter after the other: its gradient in float32, the end of the gradient, AdamW's float32 temporaries, the
  end of the float32 gradient.

DDP wraps the model before the optimizer is made, so its buckets come first. With `Choice.optimizer_offload` master weights
lie in host memory, and nothing of them is here. ZeRO and FSDP2 have master weights of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from oomph.core.events import Events, Kind
from oomph.core.offload import offload_optimizer
from oomph.core.ranks import FP32, STEP_COUNTER, Edit, copied, optimizer_born, part
from oomph.core.trace import Parameter
from oomph.records import Choice, Optimizer

_TEMPORARIES: Final[dict[Optimizer, tuple[str, ...]]] = {
    "adamw-fused": (),
    "adamw-foreach": ("masters.adamw_sqrt",),
    "adamw-loop": ("masters.adamw_sqrt", "masters.adamw_denominator"),
}
"""What AdamW makes in float32 to update one parameter (torch 2.13, ``torch/optim/adam.py``), in order of birth and of death."""


def has_masters(choice: Choice) -> bool:
    """Whether a choice has master weights on the GPU that no sharding divides."""
    return choice.master_weights and not choice.optimizer_offload and choice.sharding in ("none", "ddp")


def master_bytes(parameters: Sequence[Parameter], choice: Choice) -> int:
    """Bytes of master weights, moments and step counters on the GPU, of all trained parameters."""
    trained = [parameter for parameter in parameters if parameter.trainable]
    counters = STEP_COUNTER * len(trained) if choice.optimizer == "adamw-fused" else 0
    return counters + sum((2 + _is_copied(parameter)) * FP32 * parameter.numel for parameter in trained)


def add_masters(events: Events, parameters: Sequence[Parameter], choice: Choice) -> Events:
    """The events of a GPU whose choice has master weights; the same events where it has none. The input is not changed.

    Args:
        events: with the segments of `layout.compose`, sharded by DDP or not at all.
        parameters: in model order; a storage's parameter is its index here, or -1.
        choice: the sharding, the optimizer, and whether there are master weights.
    """
    return _Masters(events, parameters, choice).run() if has_masters(choice) else events


def _is_copied(parameter: Parameter) -> bool:
    return parameter.dtype != "float32"


class _Masters:
    def __init__(self, events: Events, parameters: Sequence[Parameter], choice: Choice) -> None:
        self._parameters, self._choice = parameters, choice
        self._without_states = offload_optimizer(events)
        self._out = copied(events)
        kinds, of = events.kinds, events.parameters
        self._weights = {of[storage]: storage for storage, kind in enumerate(kinds) if kind.role == "weight"}
        self._updates = {
            index: self._update(index)
            for index in sorted({of[storage] for storage in optimizer_born(events) if kinds[storage].role == "optimizer"})
        }

    def run(self) -> Events:
        for segment in self._without_states.segments:
            edit = Edit(segment)
            if part(segment) == "load":
                trained = [index for index, parameter in enumerate(self._parameters) if parameter.trainable]
                edit.insert(edit.end, [state for index in trained for state in self._states(index)])
            elif part(segment) == "optimizer":
                self._step(edit)
            self._out.segments.append(edit.result())
        return self._out

    def _step(self, edit: Edit) -> None:
        """Takes the gradients' ends into the updates of their parameters."""
        ends: dict[int, list[int]] = {index: [] for index in self._updates}
        for entry in edit.timeline:
            index = self._out.parameters[~entry] if entry < 0 else -1
            if index in ends and self._out.kinds[~entry].role == "gradient":
                ends[index].append(entry)
        start = edit.drop_frees({~entry for entries in ends.values() for entry in entries})
        for index, (gradient, temporaries) in self._updates.items():
            update = [*gradient, *ends[index], *temporaries, *(~storage for storage in gradient)]
            edit.insert(start, update if gradient else [*temporaries, *ends[index]], opens=True)

    def _states(self, index: int) -> list[int]:
        shape, fused = self._parameters[index].shape, self._choice.optimizer == "adamw-fused"
        wanted = [("masters.exp_avg", shape), ("masters.exp_avg_sq", shape)]
        wanted = [("masters.step", ()), *wanted] if fused else wanted
        wanted = [("masters.weight", shape), *wanted] if _is_copied(self._parameters[index]) else wanted
        return [self._new(op, index, "optimizer", "load", shape) for op, shape in wanted]

    def _update(self, index: int) -> tuple[list[int], list[int]]:
        """A parameter's gradient in float32, none where it is that already, and entries of AdamW's temporaries."""
        parameter = self._parameters[index]
        wanted = ["masters.gradient"] if _is_copied(parameter) else []
        gradient = [self._new(op, index, "gradient", "optimizer", parameter.shape) for op in wanted]
        temporaries = _TEMPORARIES[self._choice.optimizer]
        made = [self._new(op, index, "temporary", "optimizer", parameter.shape) for op in temporaries]
        return gradient, [*made, *(~storage for storage in made)]

    def _new(self, op: str, index: int, role: str, phase: str, shape: tuple[int, ...]) -> int:
        weight = self._weights[index]
        kind = Kind(op, self._out.kinds[weight].module, phase, role, "float32")
        return self._out.add(math.prod(shape) * FP32, shape, kind, self._out.layers[weight], index)
