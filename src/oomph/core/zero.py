"""ZeRO stages 1 and 2 of DeepSpeed: one rank's weights, gradients, optimizer states and transients.

Rules are those of DeepSpeed 0.9.5, ``deepspeed/runtime/zero/stage_1_and_2.py`` unless another file is named, without
offload, with ``contiguous_gradients`` in stage 2, and without its own MoE layers. Modelled:

* ``__init__``: each optimizer group becomes one flat buffer in the parameters' dtype, padded to 2 x ranks elements; the
  rank's fp32 master partition passes through a clone. ``initialize_optimizer_states`` steps once on zero gradients, so
  that AdamW's states and its temporaries exist before the first micro-batch.
* Stage 2, ``backward``: one or two reduction buffers for the length of the backward. A parameter's hook copies its
  gradient into the buffer and frees it; a gradient larger than the buffer stays until the next hook. When the buffer
  is full, gradients of the rank's partition are copied into one buffer that is sized for the whole parameters which
  touch the partition. The first micro-batch keeps that buffer as the accumulator, later ones make a second and add it.
* Stage 1, ``reduce_gradients``: whole gradients until the last micro-batch; a flat copy of each bucket at a time.
* ``step``: the overflow check's fp32 copies, the flat fp32 gradient, AdamW's temporaries, and the flat tensor into which
  ``ProcessGroupNCCL::allgather`` gathers a list of tensors.

Approximated: streams are not told apart; the weights' first copy on the GPU, which ``__init__`` moves to the host and
drops from the cache, is left out; scalars of norms and checks are left out; stage 1's reduction is put at the start of
the optimizer's segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oomph.core.events import Events
from oomph.core.ranks import (
    FP32,
    STEP_COUNTER,
    Arrival,
    Edit,
    Storages,
    ZeroSettings,
    arrivals,
    copied,
    optimizer_born,
    optimizer_groups,
    part,
)
from oomph.core.trace import Parameter
from oomph.records import Choice

ALIGNMENT = 2
"""``nccl_start_alignment_factor``: partitions start at multiples of four bytes of a 16-bit buffer."""


@dataclass(frozen=True)
class Group:
    """One optimizer group, flattened: its padded size, and what of it lies in the rank's partition.

    Attributes:
        elements: of the flat buffer, padded.
        partition: elements of one rank's partition.
        owned: (parameter, elements) of the parameters that touch the rank's partition.
    """

    elements: int
    partition: int
    owned: tuple[tuple[int, int], ...]

    @property
    def padding(self) -> int:
        """Elements of the rank's partition that no parameter fills."""
        return self.partition - sum(elements for _, elements in self.owned)


def flat_groups(parameters: Sequence[Parameter], world: int, settings: ZeroSettings) -> list[Group]:
    """The optimizer groups as the rank sees them (``align_dense_tensors``, ``get_partition_info``)."""
    rank = world - 1 if settings.rank is None else settings.rank
    groups = []
    for members in optimizer_groups(parameters, settings):
        total = sum(parameters[index].numel for index in members)
        padded = -(-total // (ALIGNMENT * world)) * ALIGNMENT * world
        partition = padded // world
        start, owned = 0, []
        for index in members:
            low = max(start, rank * partition)
            start += parameters[index].numel
            high = min(start, (rank + 1) * partition)
            if high > low:
                owned.append((index, high - low))
        groups.append(Group(padded, partition, tuple(owned)))
    return groups


def zero_static(parameters: Sequence[Parameter], choice: Choice, settings: ZeroSettings) -> dict[str, int]:
    """Resident bytes of one rank by role, when the optimizer's step begins."""
    groups = flat_groups(parameters, choice.gpus, settings)
    itemsize = next(parameter.itemsize for parameter in parameters if parameter.trainable)
    frozen = sum(parameter.nbytes for parameter in parameters if not parameter.trainable)
    owned = sum(parameters[index].numel for group in groups for index, _ in group.owned)
    counters = STEP_COUNTER * len(groups) if choice.optimizer == "adamw-fused" else 0
    if choice.sharding == "zero1":
        gradient = sum(parameter.nbytes for parameter in parameters if parameter.trainable)
    else:
        gradient = (owned + sum(group.padding for group in groups)) * itemsize
    return {
        "weight": frozen + sum(group.elements for group in groups) * itemsize,
        "gradient": gradient,
        "optimizer": 3 * FP32 * sum(group.partition for group in groups) + counters,
        "communication": 0,
    }


def shard_zero(events: Events, parameters: Sequence[Parameter], choice: Choice, settings: ZeroSettings) -> Events:
    """The events of one rank under stage 1 or 2."""
    return _Zero(events, parameters, choice, settings).run()


class _Zero:
    def __init__(self, events: Events, parameters: Sequence[Parameter], choice: Choice, settings: ZeroSettings) -> None:
        self._source, self._parameters, self._choice = events, parameters, choice
        self._out = copied(events)
        self._make = Storages(self._out)
        self._groups = flat_groups(parameters, choice.gpus, settings)
        self._owned = {index for group in self._groups for index, _ in group.owned}
        self._dtype = next(parameter.dtype for parameter in parameters if parameter.trainable)
        self._bucket = settings.reduce_bucket(parameters)
        self._gather = settings.allgather_bucket_elements
        self._order = [index for group in optimizer_groups(parameters, settings) for index in group]
        buffers = range(2 if settings.overlap_comm else 1)
        self._buffers = [
            self._make.get("zero.ipg_bucket", self._bucket, self._dtype, "communication", "backward", key=number)
            for number in buffers
        ]
        self._gradients: dict[int, tuple[int, ...]] = {}
        self._living: set[int] = set()

    def run(self) -> Events:
        gone = optimizer_born(self._source)
        gone |= {
            storage
            for storage, index in enumerate(self._source.parameters)
            if index >= 0 and self._source.kinds[storage].role == "weight" and self._parameters[index].trainable
        }
        for segment in self._source.segments:
            edit = Edit(segment)
            kind = part(segment)
            if kind in ("first", "next"):
                self._micro_batch(edit, kind == "first")
            own = edit.drop_storages(gone)
            if kind == "load":
                edit.insert(edit.end, self._load())
            if kind == "optimizer":
                own = min(own, edit.drop_frees(self._living))
                edit.insert(own, self._step(), opens=True)
            self._out.segments.append(edit.result())
        return self._out

    # Construction.

    def _load(self) -> list[int]:
        make, entries = self._make, []
        for number, group in enumerate(self._groups):
            entries.append(make.get("zero.flat_parameters", group.elements, self._dtype, "weight", "load", key=number))
            clone = make.get("zero.clone", group.partition, self._dtype, "temporary", "load", key=number)
            master = make.get("zero.fp32_master", group.partition, "float32", "optimizer", "load", key=number)
            entries += [master] if self._dtype == "float32" else [clone, master, ~clone]
        zeros = [
            make.get("zero.fp32_gradient", group.partition, "float32", "gradient", "load", key=number)
            for number, group in enumerate(self._groups)
        ]
        entries += zeros
        for number, group in enumerate(self._groups):
            entries += make.adamw_states(self._choice.optimizer, group.partition, number)
            entries += make.adamw(self._choice.optimizer, group.partition, "load")
        return entries + [~zero for zero in zeros]

    # Micro-batches.

    def _micro_batch(self, edit: Edit, first: bool) -> None:
        arrived = arrivals(self._source, edit.timeline, self._parameters)
        if first:
            self._gradients = {arrival.parameter: arrival.storages for arrival in arrived}
            self._living = {storage for arrival in arrived for storage in arrival.storages}
        if self._choice.sharding == "zero1":
            return
        start = min((arrival.position for arrival in arrived), default=edit.end)
        start = edit.phase_start(("backward", "recompute"), start)
        edit.insert(start, self._buffers, opens=True)
        bucket: list[Arrival] = []
        filled, copied_out = 0, False
        for arrival in arrived:
            numel = self._parameters[arrival.parameter].numel
            if filled + numel > self._bucket:
                copied_out = self._flush(edit, arrival.position, bucket, first, copied_out)
                filled = 0
            filled += numel
            bucket.append(arrival)
            if numel > self._bucket:
                if arrival.freed >= 0:
                    edit.drop(arrival.freed)
            elif arrival.freed < 0:
                edit.insert(arrival.position, [~storage for storage in arrival.storages])
        copied_out = self._flush(edit, edit.end, bucket, first, copied_out)
        made = self._unused(first)
        edit.insert(edit.end, made + [~buffer for buffer in self._buffers])
        if not first:
            edit.insert(edit.end, [~storage for storage in ([self._partition(first)] if copied_out else []) + made])

    def _flush(self, edit: Edit, position: int, bucket: list[Arrival], first: bool, copied_out: bool) -> bool:
        """Reduces what is in the bucket; returns whether the micro-batch's gradient partition exists by now."""
        for arrival in bucket:
            if arrival.parameter in self._owned and not copied_out:
                edit.insert(position, [self._partition(first)])
                copied_out = True
            if self._parameters[arrival.parameter].numel > self._bucket:
                edit.insert(position, [~storage for storage in arrival.storages])
        bucket.clear()
        return copied_out

    def _partition(self, first: bool) -> int:
        """``grads_in_partition``: room for the whole of every parameter that touches the rank's partition."""
        elements = sum(self._parameters[index].numel for index in self._owned)
        op = "zero.gradient_partition" if first else "zero.new_gradient_partition"
        return self._make.get(op, elements, self._dtype, "gradient", "backward")

    def _unused(self, first: bool) -> list[int]:
        """Zeros for the owned parameters without a gradient and for the padding (``get_flat_partition``)."""
        return [storage for number in range(len(self._groups)) for storage in self._unused_of(number, first)]

    def _unused_of(self, number: int, first: bool) -> list[int]:
        group = self._groups[number]
        wanted = [
            ("zero.unused_gradient", self._parameters[index].numel, index)
            for index, _ in group.owned
            if index not in self._gradients
        ]
        if group.padding:
            wanted.append(("zero.padding", group.padding, number))
        return [
            self._make.get(op, elements, self._dtype, "gradient", "backward", key=(key, first)) for op, elements, key in wanted
        ]

    # The optimizer.

    def _step(self) -> list[int]:
        entries = self._reduce_at_boundary() if self._choice.sharding == "zero1" else []
        if self._dtype != "float32":
            for group in self._groups:
                for elements in [*(elements for _, elements in group.owned), group.padding]:
                    if elements:
                        entries += self._make.moment("zero.overflow_check", elements, "float32", "temporary", "optimizer")
        for number in range(len(self._groups)):
            entries += self._step_group(number)
        for group in self._groups:
            shards = max(1, group.elements // self._gather)
            regular = group.partition // shards // ALIGNMENT * ALIGNMENT
            for shard in range(shards):
                elements = regular if shard < shards - 1 else group.partition - regular * (shards - 1)
                gathered = elements * self._choice.gpus
                entries += self._make.moment("zero.all_gather", gathered, self._dtype, "communication", "optimizer")
        return entries

    def _step_group(self, number: int) -> list[int]:
        group, make = self._groups[number], self._make
        pieces = len(group.owned) + (group.padding > 0)
        flat = make.get("zero.flat_gradient", group.partition, self._dtype, "gradient", "optimizer")
        gradient = make.get("zero.fp32_gradient", group.partition, "float32", "gradient", "optimizer")
        release = [~storage for storage in self._accumulated(number)]
        adamw = make.adamw(self._choice.optimizer, group.partition, "optimizer")
        if self._dtype == "float32":
            return [flat, *release, *adamw, ~flat] if pieces > 1 else [*adamw, *release]
        through = [flat, gradient, ~flat] if pieces > 1 else [gradient]
        return [*through, *release, *adamw, ~gradient]

    def _accumulated(self, number: int) -> list[int]:
        """The accumulated gradients that die when those of this group are no longer needed."""
        held = [index for index, _ in self._groups[number].owned if index in self._gradients]
        made = self._unused_of(number, True)
        if self._choice.sharding == "zero1":
            return [*reversed(made), *(storage for index in reversed(held) for storage in self._gradients[index])]
        later = (index for group in self._groups[number + 1 :] for index, _ in group.owned)
        last = bool(held) and not any(index in self._gradients for index in later)
        return [*reversed(made), *([self._partition(True)] if last else [])]

    def _reduce_at_boundary(self) -> list[int]:
        """Stage 1: a flat copy of one bucket of gradients at a time, then the gradients of other ranks are freed."""
        entries: list[int] = []
        tensors, filled = 0, 0
        sizes = [self._parameters[index].numel for index in self._order if index in self._gradients]
        for numel in [*sizes, self._bucket + 1]:
            if filled + numel > self._bucket:
                if tensors > 1:
                    entries += self._make.moment("zero.reduce_bucket", filled, self._dtype, "communication", "optimizer")
                tensors, filled = 0, 0
            tensors, filled = tensors + 1, filled + numel
        entries += self._unused(True)
        others = [index for index in self._order if index in self._gradients and index not in self._owned]
        return entries + [~storage for index in others for storage in self._gradients[index]]
