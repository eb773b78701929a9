"""The events of one rank: what a single GPU's training step becomes under DDP, FSDP2 and ZeRO.

``shard`` takes the events of one GPU and returns those of one of several ranks. The input has the segments ``load``,
``warmup/first``, ``warmup/next``, ``warmup/optimizer``, ``step/first``, ``step/next`` and ``step/optimizer``; ``next`` is
there where gradients accumulate, other segments (``evaluate``) are forward passes. Names, marks and repetitions survive.

DDP is that of torch 2.13 (``torch/nn/parallel/distributed.py``, ``torch/csrc/distributed/c10d/reducer.cpp``), with
``no_sync`` around all micro-batches but the last:

* The constructor broadcasts the parameters through flat copies of 250 MiB, two at a time, then allocates the buckets, one
  for each dtype; with ``find_unused_parameters`` at their final sizes.
* The forward after the first reduction frees them and allocates buckets in the order in which gradients came, the first
  closed at 1 MiB and others at 25 MiB. That is put at the end of the warm-up step, so that a step can be repeated.
* Gradients are copied into the buckets and back, so buckets are a second copy of the gradients. With
  ``gradient_as_bucket_view`` a gradient is freed when its hook has copied it into its bucket in the last micro-batch.

Left out of DDP: the flat copies in which the model's buffers are broadcast, the map of unused parameters.
FSDP2 is in ``oomph.core.fsdp``, ZeRO in ``oomph.core.zero`` (stages 1 and 2) and ``oomph.core.zero3``; they say what they
model and approximate.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Final

from oomph.core.eight_bit import EIGHT_BIT, state_bytes
from oomph.core.events import Events, Segment
from oomph.core.fsdp import fsdp_static, ranks_of_a_shard, shard_fsdp
from oomph.core.masters import master_bytes
from oomph.core.ranks import (
    STEP_COUNTER,
    DdpSettings,
    Edit,
    FsdpSettings,
    Storages,
    ZeroSettings,
    arrivals,
    copied,
    hidden_size,
    part,
)
from oomph.core.trace import ITEM_BYTES, Parameter
from oomph.core.zero import shard_zero, zero_static
from oomph.core.zero3 import shard_zero3, zero3_static
from oomph.errors import UserError
from oomph.records import Choice
from oomph.units import MIB

_BROADCAST_BYTES: Final = 250 * MIB

Settings = ZeroSettings | DdpSettings | FsdpSettings
"""What a sharding leaves to settle beside the Choice."""

__all__ = [
    "DdpSettings",
    "FsdpSettings",
    "Parameter",
    "Settings",
    "ZeroSettings",
    "ddp_buckets",
    "hidden_size",
    "shard",
    "static_bytes",
]


_PACKED = {"uint8", "int8"}
"""Dtypes of quantized weights."""


def shard(events: Events, parameters: Sequence[Parameter], choice: Choice, settings: Settings | None = None) -> Events:
    """The events of one rank under `choice.sharding` over `choice.gpus` ranks; the input is not changed.

    Args:
        events: of a single GPU; a storage's parameter is its index in `parameters`, or -1.
        parameters: in model order, each once.
        choice: the sharding, the number of ranks, the optimizer.
        settings: of the sharding chosen; its defaults where None.

    Raises:
        UserError: fewer than two ranks, nothing to train, or a parameter list that the variant refuses.
        TypeError: settings of another variant.
    """
    if choice.sharding == "none":
        return events
    _check(parameters, choice, settings)
    if choice.sharding == "ddp":
        return _Ddp(events, parameters, _ddp_settings(settings)).run()
    if choice.sharding.startswith("fsdp2"):
        return shard_fsdp(events, parameters, choice, _fsdp_settings(settings))
    run = shard_zero3 if choice.sharding == "zero3" else shard_zero
    return run(events, parameters, choice, _zero_settings(settings))


def static_bytes(
    parameters: Sequence[Parameter],
    choice: Choice,
    settings: Settings | None = None,
    reached: Collection[int] | None = None,
) -> dict[str, int]:
    """Resident bytes of one rank by role: what is alive when the optimizer's step begins, in closed arithmetic.

    Keys are ``weight``, ``gradient``, ``optimizer`` (master weights, moments, step counters on the GPU) and
    ``communication`` (buckets, gathered weights that persist). Buffers of the model, activations, library workspaces and
    gathered weights that stage 3 happens not to have released are not counted, so no layout keeps less.
    Without sharding and under DDP, unless there are master weights, the moments have the parameters' dtype, as AdamW makes
    them, or those of bitsandbytes.

    Args:
        parameters: in model order, each once.
        choice: the sharding, the number of ranks, the optimizer.
        settings: of the sharding chosen; its defaults where None.
        reached: indices of the trained parameters that get a gradient; all of them where None. AdamW makes no states for
            the others, a trained layer for instance whose output nothing uses.

    Raises:
        UserError: as `shard` does.
    """
    if choice.sharding != "none":
        _check(parameters, choice, settings)
    got = {index for index, parameter in enumerate(parameters) if parameter.trainable}
    if reached is not None:
        got &= set(reached)
    if choice.sharding in ("zero1", "zero2"):
        kept = zero_static(parameters, choice, _zero_settings(settings))
        whole = {"gradient": sum(parameters[index].nbytes for index in got)}
        return kept | whole if choice.sharding == "zero1" else kept
    if choice.sharding == "zero3":
        return zero3_static(parameters, choice, _zero_settings(settings))
    if choice.sharding.startswith("fsdp2"):
        return fsdp_static(parameters, choice, _fsdp_settings(settings), got)
    gradients = [parameters[index].nbytes for index in got]
    ddp = _ddp_settings(settings) if choice.sharding == "ddp" else None
    buckets = sum(gradients)
    if ddp is not None and ddp.find_unused_parameters:
        buckets = sum(parameter.nbytes for parameter in parameters if parameter.trainable)
    return {
        "weight": sum(parameter.nbytes for parameter in parameters),
        "gradient": 0 if ddp is not None and ddp.gradient_as_bucket_view else sum(gradients),
        "optimizer": 0 if choice.optimizer_offload else _whole_states(parameters, choice, got),
        "communication": 0 if ddp is None else buckets,
    }


def _whole_states(parameters: Sequence[Parameter], choice: Choice, got: Collection[int]) -> int:
    """Bytes of the optimizer's states on a GPU that has all of them; `got` are the parameters that get a gradient."""
    if choice.master_weights:
        return master_bytes(parameters, choice)
    if choice.optimizer in EIGHT_BIT:
        return state_bytes((parameters[index] for index in got), choice.optimizer)
    counters = STEP_COUNTER * len(got) if choice.optimizer == "adamw-fused" else 0
    return 2 * sum(parameters[index].nbytes for index in got) + counters


def ddp_buckets(parameters: Sequence[Parameter], order: Sequence[int], limits: Sequence[int]) -> list[list[int]]:
    """Buckets of parameters in a given order (``compute_bucket_assignment_by_size``).

    A bucket holds one dtype and is closed when its bytes reach its limit; a dtype's buckets take the limits in turn and
    then the last one. Buckets still open at the end follow, in the order in which their dtypes appeared.

    Args:
        parameters: all of them.
        order: indices of those that have a gradient.
        limits: bytes.
    """
    closed: list[list[int]] = []
    waiting: dict[str, list[int]] = {}
    filled: dict[str, int] = {}
    used: dict[str, int] = {}
    for index in order:
        dtype = parameters[index].dtype
        waiting.setdefault(dtype, []).append(index)
        filled[dtype] = filled.get(dtype, 0) + parameters[index].nbytes
        turn = used.setdefault(dtype, 0)
        if filled[dtype] >= limits[turn]:
            closed.append(waiting[dtype])
            waiting[dtype], filled[dtype] = [], 0
            used[dtype] = min(turn + 1, len(limits) - 1)
    return closed + [bucket for bucket in waiting.values() if bucket]


def _ddp_settings(settings: Settings | None) -> DdpSettings:
    if isinstance(settings, ZeroSettings | FsdpSettings):
        raise TypeError("DDP is laid out with DdpSettings")
    return settings or DdpSettings()


def _fsdp_settings(settings: Settings | None) -> FsdpSettings:
    if isinstance(settings, ZeroSettings | DdpSettings):
        raise TypeError("FSDP2 is laid out with FsdpSettings")
    return settings or FsdpSettings()


def _zero_settings(settings: Settings | None) -> ZeroSettings:
    if isinstance(settings, DdpSettings | FsdpSettings):
        raise TypeError("ZeRO is laid out with ZeroSettings")
    return settings or ZeroSettings()


def _check(parameters: Sequence[Parameter], choice: Choice, settings: Settings | None) -> None:
    problems, hints = [], []
    name, ranks = choice.sharding, choice.gpus
    if choice.gpus < 2:
        problems.append(f"sharding {name} spreads the model over several GPUs, but gpus is {choice.gpus}")
        hints.append("ask for 2 GPUs or more, or for sharding none")
    elif name == "fsdp2-hybrid":
        ranks = ranks_of_a_shard(choice)
        if choice.nodes < 2 or ranks < 2 or choice.gpus % choice.nodes:
            given = f"gpus is {choice.gpus} and nodes is {choice.nodes}"
            problems.append(f"sharding {name} takes several nodes of several GPUs each, but {given}")
            hints.append("ask for fsdp2, which divides over all GPUs wherever they are")
    unknown = sorted({parameter.dtype for parameter in parameters if parameter.dtype not in ITEM_BYTES})
    if unknown:
        problems.append(f"the size of a parameter is unknown for dtype {', '.join(unknown)}")
    trained = {parameter.dtype for parameter in parameters if parameter.trainable}
    if not trained:
        problems.append(f"sharding {name} has nothing to reduce, since no parameter is trained")
        hints.append("train at least one part of the model")
    if name != "ddp" and len(trained) > 1:
        dtypes = ", ".join(sorted(trained))
        problems.append(f"sharding {name} reduces trained parameters together, but their dtypes are {dtypes}")
        hints.append("train all parameters in one dtype, or use ddp")
    adapted = {parameter.part for parameter in parameters} & {"lora"} or {parameter.dtype for parameter in parameters} & _PACKED
    if name != "ddp" and adapted:
        problems.append(f"sharding {name} of adapters or quantized weights beside other weights is not laid out")
        hints.append("use ddp, in which each GPU has them all")
    scalars = [parameter.name for parameter in parameters if not parameter.shape]
    if name.startswith("fsdp2") and scalars:
        problems.append(f"sharding {name} cuts parameters along a dimension, and {', '.join(scalars)} has none")
        hints.append("use ddp")
    rank = None if settings is None or isinstance(settings, DdpSettings) else settings.rank
    if rank is not None and not 0 <= rank < max(ranks, 1):
        problems.append(f"rank {rank} is not one of the {ranks} ranks, which count from 0")
    if problems:
        raise UserError(problems, "; ".join(hints))


class _Ddp:
    def __init__(self, events: Events, parameters: Sequence[Parameter], settings: DdpSettings) -> None:
        self._source, self._parameters, self._settings = events, parameters, settings
        self._out = copied(events)
        self._make = Storages(self._out)
        self._gradients: dict[int, tuple[int, ...]] = {}

    def run(self) -> Events:
        names = [segment.name for segment in self._source.segments]
        initial, rebuilt = self._initial(), self._rebuilt()
        for segment in self._source.segments:
            edit = Edit(segment)
            kind = part(segment)
            if kind == "load":
                edit.insert(edit.end, [*self._broadcast(), *initial])
            if segment.name == "warmup/optimizer" and not self._settings.find_unused_parameters:
                edit.insert(edit.end, [*(~bucket for bucket in initial), *rebuilt])
            if self._settings.gradient_as_bucket_view and kind in ("first", "next", "optimizer"):
                accumulates = f"{segment.name.rpartition('/')[0]}/next" in names
                self._out.segments += self._views(segment, edit, accumulates)
            else:
                self._out.segments.append(edit.result())
        return self._out

    def _broadcast(self) -> list[int]:
        """``broadcast_coalesced`` in c10d/comm.cpp: a flat copy of each bucket of several parameters, two at a time."""
        everything = range(len(self._parameters))
        buckets = sorted(ddp_buckets(self._parameters, everything, [_BROADCAST_BYTES]), key=min)
        entries: list[int] = []
        flying: list[list[int]] = []
        for number, bucket in enumerate(buckets):
            if len(flying) == 2:
                entries += [~flat for flat in flying.pop(0)]
            elements = sum(self._parameters[index].numel for index in bucket)
            dtype = self._parameters[bucket[0]].dtype
            flat = self._make.get("ddp.broadcast", elements, dtype, "communication", "load", key=number)
            flying.append([flat] if len(bucket) > 1 else [])
            entries += flying[-1]
        return entries + [~flat for flats in flying for flat in flats]

    def _initial(self) -> list[int]:
        trained = [index for index, parameter in enumerate(self._parameters) if parameter.trainable]
        limits = self._limits() if self._settings.find_unused_parameters else [sys.maxsize]
        return self._buckets(sorted(ddp_buckets(self._parameters, trained, limits), key=min, reverse=True), "load")

    def _rebuilt(self) -> list[int]:
        """Buckets in the order of the gradients of the warm-up's last micro-batch, whose reduction rebuilds them."""
        last = [segment for segment in self._source.segments if segment.name in ("warmup/first", "warmup/next")][-1:]
        order = [
            arrival.parameter
            for segment in last
            for arrival in arrivals(self._source, [int(entry) for entry in segment.timeline], self._parameters)
        ]
        return self._buckets(ddp_buckets(self._parameters, order, self._limits()), "optimizer")

    def _limits(self) -> list[int]:
        return [self._settings.first_bucket_bytes, self._settings.bucket_bytes]

    def _buckets(self, members: Sequence[Sequence[int]], phase: str) -> list[int]:
        return [
            self._make.get(
                "ddp.bucket",
                sum(self._parameters[index].numel for index in bucket),
                self._parameters[bucket[0]].dtype,
                "communication",
                phase,
                key=number,
            )
            for number, bucket in enumerate(members)
        ]

    def _views(self, segment: Segment, edit: Edit, accumulates: bool) -> list[Segment]:
        """Frees each gradient when it has been copied into its bucket, in the last micro-batch of the step."""
        kind = part(segment)
        if kind == "optimizer":
            edit.drop_frees({storage for storages in self._gradients.values() for storage in storages})
            return [edit.result()]
        arrived = arrivals(self._source, edit.timeline, self._parameters)
        if kind == "first":
            self._gradients = {arrival.parameter: arrival.storages for arrival in arrived}
        earlier = [edit.result(segment.repeat - 1)] if kind == "next" and segment.repeat > 1 else []
        if kind == "next" or not accumulates:
            for arrival in arrived:
                behind = arrival.position + (arrival.freed >= 0)
                edit.insert(behind, [~storage for storage in self._gradients[arrival.parameter]])
        return [*earlier, edit.result(1)]
