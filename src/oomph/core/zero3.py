"""ZeRO stage 3 of DeepSpeed: sharded weights that are gathered where the timeline uses them.

Rules are those of DeepSpeed 0.9.5, ``deepspeed/runtime/zero``: ``stage3.py``, ``parameter_offload.py``,
``partition_parameters.py``, ``partitioned_param_coordinator.py``, without offload. Modelled:

* Each parameter, trained or frozen, is split into ranks equal pieces, the last one padded. The trained pieces move into
  one flat buffer; each sub-group of an optimizer group has fp32 master, moments and, at its step, an fp32 gradient.
* The reduction bucket and the flat gradient partition exist from the start to the end of the run.
* ``fetch_sub_module`` and ``release_sub_module`` run around every visit to a module that owns parameters. One parameter is
  gathered in place; several are gathered into a flat tensor and copied out, and the flat tensor lives until the last of
  them has been waited for. From the second micro-batch of a run on, the recorded order of visits drives prefetching (up to
  the prefetch bucket, bounded by ``max_live_parameters``) and keeps what is used again within ``max_reuse_distance``.
* A gradient is copied into the bucket by its hook, or kept if it does not fit; the reduction interleaves the bucket's
  gradients in a padded flat copy, except for a single one that the ranks divide evenly.
* ``step``: the overflow check over the flat gradients, the norm's fp64 copies, the fp32 gradient of one sub-group at a
  time, AdamW's temporaries, and the gathering of the persistent parameters again.

Approximated: a visit lasts from the first to the last allocation of the module in one stretch of a phase, since hooks
are not in the timeline; a module that uses another module's parameter (tied embeddings) does not gather it; persistent
parameters are there from the start; all others are released at the end of a micro-batch (DeepSpeed keeps those of
modules whose inputs need no gradient, the embedding for one, until the step); streams and ``record_stream`` are not
told apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from oomph.core.events import Events
from oomph.core.ranks import (
    FP32,
    STEP_COUNTER,
    Arrival,
    Edit,
    Parameter,
    Storages,
    ZeroSettings,
    arrivals,
    copied,
    optimizer_born,
    optimizer_groups,
    part,
)
from oomph.records import Choice

_COMPUTING = ("forward", "recompute", "backward", "evaluate")


def piece(parameter: Parameter, world: int) -> int:
    """Elements of one rank's piece of a parameter (``_aligned_size`` over the ranks)."""
    return -(-parameter.numel // world)


def sub_groups(parameters: Sequence[Parameter], world: int, settings: ZeroSettings) -> list[list[int]]:
    """The optimizer groups cut into sub-groups of ``sub_group_size`` elements of pieces (``_create_fp16_sub_groups``)."""
    result: list[list[int]] = []
    for members in optimizer_groups(parameters, settings):
        current: list[int] = []
        filled = 0
        for index in members:
            current.append(index)
            filled += piece(parameters[index], world)
            if filled >= settings.sub_group_elements:
                result.append(current)
                current, filled = [], 0
        if current:
            result.append(current)
    return result


def zero3_static(parameters: Sequence[Parameter], choice: Choice, settings: ZeroSettings) -> dict[str, int]:
    """Resident bytes of one rank by role, when the optimizer's step begins."""
    world = choice.gpus
    trained = [parameter for parameter in parameters if parameter.trainable]
    pieces = sum(piece(parameter, world) for parameter in trained)
    persistent = [parameter for parameter in parameters if parameter.numel <= settings.persistence(parameters)]
    counters = len(sub_groups(parameters, world, settings)) if choice.optimizer == "adamw-fused" else 0
    return {
        "weight": sum(piece(parameter, world) * parameter.itemsize for parameter in parameters),
        "gradient": pieces * trained[0].itemsize,
        "optimizer": 3 * FP32 * pieces + STEP_COUNTER * counters,
        "communication": settings.reduce_bucket(parameters) * trained[0].itemsize
        + sum(piece(parameter, world) * world * parameter.itemsize for parameter in persistent),
    }


def shard_zero3(events: Events, parameters: Sequence[Parameter], choice: Choice, settings: ZeroSettings) -> Events:
    """The events of one rank under stage 3."""
    return _Zero3(events, parameters, choice, settings).run()


class Visit(NamedTuple):
    """One stretch of the timeline, [start, stop), in which a module uses its parameters."""

    start: int
    stop: int
    members: tuple[int, ...]
    phase: str


def visits(events: Events, timeline: Sequence[int], owners: dict[str, tuple[int, ...]]) -> list[Visit]:
    """The visits to parameter-owning modules in the order of their starts: at most one for each stretch of a phase."""
    found: list[Visit] = []
    open_at: dict[str, list[int]] = {}
    current = ""

    def close() -> None:
        found.extend(Visit(start, last + 1, owners[module], current) for module, (start, last) in open_at.items())
        open_at.clear()

    for position, entry in enumerate(timeline):
        if entry < 0 or events.kinds[entry].phase not in _COMPUTING:
            continue
        kind = events.kinds[entry]
        if kind.phase != current:
            close()
            current = kind.phase
        module = events.module(entry)
        if module in owners and kind.role not in ("input", "workspace"):
            open_at.setdefault(module, [position, position])[1] = position
    close()
    return sorted(found)


class _Gather:
    """One all-gather: of one parameter in place, or of several through a flat tensor."""

    def __init__(self, members: Sequence[int], flat: int | None) -> None:
        self.members, self.flat, self.copied_out = members, flat, flat is None
        self.waiting = set(members)


class _Coordinator:
    """``PartitionedParameterCoordinator`` for one micro-batch; every method returns entries of the timeline."""

    def __init__(self, zero: _Zero3, visited: Sequence[Visit], recorded: bool) -> None:
        self._zero, self._visited, self._recorded = zero, visited, recorded
        self._order = [(index, step) for step, visit in enumerate(visited) for index in visit.members]
        self._uses: dict[int, list[int]] = {}
        for index, step in self._order:
            self._uses.setdefault(index, []).append(step)
        sizes = [sum(zero.parameters[index].numel for index in visit.members) for visit in visited]
        self._traversed = [0, *accumulate(sizes)]
        self._next, self._fetched, self._available = 0, 0, 0
        self._fetched_for: dict[int, int] = {}
        self._held: dict[int, int] = {}
        self._flying: dict[int, _Gather] = {}
        self._active: dict[int, int] = {}

    def fetch(self, step: int) -> list[int]:
        visit = self._visited[step]
        needed = [index for index in visit.members if index not in self._zero.persistent]
        entries = self._gather([index for index in needed if not self._there(index)], visit.phase)
        for index in needed:
            self._active[index] = self._active.get(index, 0) + 1
            if index in self._flying:
                entries += self._wait(index, visit.phase)
        if self._recorded:
            entries += self._prefetch(step, visit)
        self._fetched += 1
        return entries

    def release(self, step: int) -> list[int]:
        entries = []
        for index in self._visited[step].members:
            if index in self._zero.persistent:
                continue
            self._active[index] -= 1
            if self._active[index] == 0 and index in self._held and not (self._recorded and self._used_soon(index)):
                entries.append(~self._held.pop(index))
                self._available -= self._zero.parameters[index].numel
        return entries

    def drain(self) -> list[int]:
        """Frees what is still gathered or under way."""
        flats = {gather.flat for gather in self._flying.values() if gather.flat is not None}
        return [~storage for storage in [*self._held.values(), *sorted(flats)]]

    def _there(self, index: int) -> bool:
        return index in self._held or index in self._flying

    def _gather(self, members: Sequence[int], phase: str) -> list[int]:
        if not members:
            return []
        self._available += sum(self._zero.parameters[index].numel for index in members)
        members = sorted(members)
        if len(members) == 1:
            self._held[members[0]] = self._zero.gathered(members[0], phase, padded=True)
            self._flying[members[0]] = _Gather(members, None)
            return [self._held[members[0]]]
        flat = self._zero.flat(members, phase)
        gather = _Gather(members, flat)
        self._flying.update(dict.fromkeys(members, gather))
        return [flat]

    def _wait(self, index: int, phase: str) -> list[int]:
        gather = self._flying.pop(index)
        gather.waiting.discard(index)
        entries = []
        if not gather.copied_out:
            gather.copied_out = True
            for member in gather.members:
                self._held[member] = self._zero.gathered(member, phase, padded=False)
                entries.append(self._held[member])
        if gather.flat is not None and not gather.waiting:
            entries.append(~gather.flat)
        return entries

    def _prefetch(self, step: int, visit: Visit) -> list[int]:
        new = {index for index in visit.members if self._fetched_for.get(index, -1) < step}
        seen: set[int] = set()
        while self._next < len(self._order) and len(seen) < len(new):
            index, last = self._order[self._next]
            self._next += 1
            self._fetched_for[index] = last
            seen.add(index)
        limit = min(self._zero.max_live - self._available, self._zero.prefetch)
        chosen: list[int] = []
        elements = 0
        while self._next < len(self._order) and elements < limit:
            index, last = self._order[self._next]
            self._next += 1
            self._fetched_for[index] = max(self._fetched_for.get(index, -1), last)
            if index not in self._zero.persistent and index not in chosen and not self._there(index):
                chosen.append(index)
                elements += self._zero.parameters[index].numel
        return self._gather(chosen, visit.phase)

    def _used_soon(self, index: int) -> bool:
        """Whether a later use is already marked as fetched or lies within ``max_reuse_distance`` (``__params_to_release``)."""
        if self._fetched_for.get(index, -1) > self._fetched:
            return True
        uses = self._uses[index]
        later = bisect_left(uses, self._fetched)
        if later == len(uses):
            return False
        return self._traversed[uses[later]] - self._traversed[self._fetched] < self._zero.max_reuse


class _Zero3:
    def __init__(self, events: Events, parameters: Sequence[Parameter], choice: Choice, settings: ZeroSettings) -> None:
        self.parameters, self.max_live, self.max_reuse = parameters, settings.max_live_elements, settings.max_reuse_elements
        self.prefetch = settings.prefetch(parameters)
        self._source, self._choice, self._world = events, choice, choice.gpus
        threshold = settings.persistence(parameters)
        self.persistent = {index for index, parameter in enumerate(parameters) if parameter.numel <= threshold}
        self._out = copied(events)
        self._make = Storages(self._out)
        self._dtype = next(parameter.dtype for parameter in parameters if parameter.trainable)
        self._bucket = settings.reduce_bucket(parameters)
        self._groups = sub_groups(parameters, self._world, settings)
        self._pieces = [sum(piece(parameters[index], self._world) for index in group) for group in self._groups]
        owners: dict[str, list[int]] = {}
        for index, parameter in enumerate(parameters):
            owners.setdefault(parameter.module, []).append(index)
        self._owners = {module: tuple(members) for module, members in owners.items()}
        self._kept = [self.gathered(index, "load", padded=True) for index in sorted(self.persistent)]
        self._gradients: set[int] = set()

    def gathered(self, index: int, phase: str, padded: bool) -> int:
        """The storage of a gathered parameter, padded where it was gathered alone."""
        parameter = self.parameters[index]
        elements = piece(parameter, self._world) * self._world if padded else parameter.numel
        return self._make.get(
            "zero.gathered_parameter", elements, parameter.dtype, "communication", phase, parameter.module, key=index
        )

    def flat(self, members: Sequence[int], phase: str) -> int:
        """The storage into which several parameters are gathered at once."""
        elements = sum(piece(self.parameters[index], self._world) for index in members) * self._world
        dtype = self.parameters[members[0]].dtype
        return self._make.get("zero.all_gather", elements, dtype, "communication", phase, key=tuple(members))

    def run(self) -> Events:
        gone = optimizer_born(self._source)
        gone |= {
            storage
            for storage, index in enumerate(self._source.parameters)
            if index >= 0 and self._source.kinds[storage].role == "weight"
        }
        recorded = False
        for segment in self._source.segments:
            edit = Edit(segment)
            kind = part(segment)
            if kind in ("first", "next"):
                self._use_weights(edit, recorded)
                self._reduce_gradients(edit, kind == "first")
                recorded = True
            own = edit.drop_storages(gone)
            if kind == "load":
                edit.insert(edit.end, self._load())
            elif kind == "optimizer":
                for position, entry in enumerate(edit.timeline):
                    if entry < 0 and ~entry in self._gradients:
                        edit.drop(position)
                        own = min(own, position)
                edit.insert(own, self._step(), opens=True)
            elif kind not in ("first", "next"):
                self._use_weights(edit, recorded)
            self._out.segments.append(edit.result())
        return self._out

    def _load(self) -> list[int]:
        make, entries = self._make, []
        for index, parameter in enumerate(self.parameters):
            if not parameter.trainable:
                elements = piece(parameter, self._world)
                entries.append(make.get("zero.shard", elements, parameter.dtype, "weight", "load", parameter.module, key=index))
        total = sum(self._pieces)
        entries.append(make.get("zero.flat_parameters", total, self._dtype, "weight", "load"))
        for number, elements in enumerate(self._pieces):
            clone = make.get("zero.clone", elements, self._dtype, "temporary", "load", key=number)
            master = make.get("zero.fp32_master", elements, "float32", "optimizer", "load", key=number)
            entries += [master] if self._dtype == "float32" else [clone, master, ~clone]
        zeros = make.get("zero.fp32_gradient", max(self._pieces), "float32", "gradient", "load")
        entries.append(zeros)
        for number, elements in enumerate(self._pieces):
            entries += make.adamw_states(self._choice.optimizer, elements, number)
            entries += make.adamw(self._choice.optimizer, elements, "load")
        bucket = make.get("zero.ipg_bucket", self._bucket, self._dtype, "communication", "load")
        partition = make.get("zero.gradient_partition", total, self._dtype, "gradient", "load")
        return [*entries, ~zeros, bucket, partition, *self._kept]

    def _use_weights(self, edit: Edit, recorded: bool) -> None:
        visited = visits(self._source, edit.timeline, self._owners)
        coordinator = _Coordinator(self, visited, recorded)
        moments = [(visit.start, 1, step) for step, visit in enumerate(visited)]
        moments += [(visit.stop, 0, step) for step, visit in enumerate(visited)]
        for position, fetches, step in sorted(moments):
            if fetches:
                edit.insert(position, coordinator.fetch(step), opens=True)
            else:
                edit.insert(position, coordinator.release(step))
        edit.insert(edit.end, coordinator.drain())

    def _reduce_gradients(self, edit: Edit, first: bool) -> None:
        arrived = arrivals(self._source, edit.timeline, self.parameters)
        if first:
            self._gradients = {storage for arrival in arrived for storage in arrival.storages}
        bucket: list[Arrival] = []
        kept: list[int] = []
        filled = 0
        for arrival in arrived:
            numel = self.parameters[arrival.parameter].numel
            if filled and filled + numel > self._bucket:
                edit.insert(arrival.position, self._reduced(bucket, kept))
                filled = 0
            if filled + numel >= self._bucket:
                kept += arrival.storages
                if arrival.freed >= 0:
                    edit.drop(arrival.freed)
            elif arrival.freed < 0:
                edit.insert(arrival.position, [~storage for storage in arrival.storages])
            filled += numel
            bucket.append(arrival)
        edit.insert(edit.end, self._reduced(bucket, kept))

    def _reduced(self, bucket: list[Arrival], kept: list[int]) -> list[int]:
        """``reduce_scatter_coalesced`` of the bucket, after which its gradients are freed."""
        members = [self.parameters[arrival.parameter] for arrival in bucket]
        alone = len(members) == 1 and members[0].numel % self._world == 0
        entries = [~storage for storage in kept]
        if members and not alone:
            elements = sum(piece(parameter, self._world) for parameter in members) * self._world
            flat = self._make.get("zero.reduce_scatter", elements, self._dtype, "communication", "backward")
            entries = [flat, *entries, ~flat]
        bucket.clear()
        kept.clear()
        return entries

    def _step(self) -> list[int]:
        make, total = self._make, sum(self._pieces)
        absolute = make.get("zero.overflow_check", total, self._dtype, "temporary", "optimizer")
        flags = make.get("zero.overflow_flags", total, "bool", "temporary", "optimizer")
        entries = [~storage for storage in self._kept]
        entries += [absolute, flags, ~absolute, ~flags, flags, ~flags]
        for index in _flattened(self._groups):
            entries += make.moment("zero.norm", piece(self.parameters[index], self._world), "float64", "temporary", "optimizer")
        for group, elements in zip(self._groups, self._pieces, strict=True):
            flat = make.get("zero.flat_gradient", elements, self._dtype, "gradient", "optimizer")
            gradient = make.get("zero.fp32_gradient", elements, "float32", "gradient", "optimizer")
            adamw = make.adamw(self._choice.optimizer, elements, "optimizer")
            if self._dtype == "float32":
                entries += [flat, *adamw, ~flat] if len(group) > 1 else adamw
            else:
                entries += [flat, gradient, ~flat] if len(group) > 1 else [gradient]
                entries += [*adamw, ~gradient]
        return entries + self._kept


def _flattened(groups: Iterable[Iterable[int]]) -> list[int]:
    return [index for group in groups for index in group]
