"""ZeRO stage 3 of DeepSpeed: sharded weights that are gathered where the timeline uses them.

Rules are those of DeepSpeed 0.9.5, ``deepspeed/runtime/zero``: ``stage3.py``, ``parameter_offload.py``,
``partition_parameters.py``, ``partitioned_param_coordinator.py``, without offload. Modelled:

* Each parameter, trained or frozen, is split into ranks equal pieces, the last one padded. The trained pieces move into
  one flat buffer; each sub-group of an optimizer group has fp32 master, moments and, at its step, an fp32 gradient.
* The reduction bucket and the flat gradient partition exist from the start to the end of the run.
* ``fetch_sub_module`` and ``release_sub_module`` run around every visit to a module. One parameter is gathered in place;
  several are gathered into a flat tensor and copied out, and the flat tensor lives until the last of them has been waited
  for. From the second micro-batch of a run on, the recorded order of visits drives prefetching (up to the prefetch bucket
  at each call, bounded by ``max_live_parameters``) and keeps what is used again within ``max_reuse_distance``. Small
  parameters persist from then on; the step releases everything and gathers them again. A module whose inputs need no
  gradient (the embedding) is not released after its backward.
* A gradient is copied into the bucket by its hook, or kept if it does not fit; the reduction interleaves the bucket's
  gradients in a padded flat copy, except for a single one that the ranks divide evenly.
* ``step``: the overflow check over the flat gradients, the norm's fp64 copies, the fp32 gradient of one sub-group at a
  time, AdamW's temporaries, and the gathering of the persistent parameters again.

Approximated: a visit lasts from the first to the last allocation of the module in one stretch of a phase, since hooks
are not in the timeline, and modules that allocate nothing are not seen; a recomputed block is visited forward, then
backward, as reentrant checkpointing does; a module that uses another module's parameter (tied embeddings) does not gather
it; the weights are not unsharded while they are loaded, as under ``zero.Init``; ``memory_efficient_linear`` is taken to
be on, without the inputs that it saves for frozen layers; streams and ``record_stream`` are not told apart.
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
    threshold = settings.persistence(parameters)
    persistent = [parameter for parameter in parameters if parameter.numel <= threshold]
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
    """One stretch of the timeline, [start, stop), in which a module uses its parameters.

    `ends` is false for a backward that makes nothing but gradients of parameters: the hook that releases a module after
    its backward hangs on its inputs, and does not run where they need no gradient.
    """

    start: int
    stop: int
    members: tuple[int, ...]
    phase: str
    ends: bool = True


def visits(events: Events, timeline: Sequence[int], owners: dict[str, tuple[int, ...]]) -> list[Visit]:
    """The calls of modules in the order of their starts.

    A module that owns parameters has at most one visit in each stretch of a phase. Other modules appear as visits
    without members wherever the timeline enters them, because their hooks prefetch too.
    """
    found: list[Visit] = []
    open_at: dict[str, tuple[int, int, bool]] = {}
    phase, inside = "", ""
    known: set[str] = set()

    def close() -> None:
        for name, (start, last, more) in open_at.items():
            found.append(Visit(start, last + 1, owners[name], phase, more or phase != "backward"))
        open_at.clear()

    for position, entry in enumerate(timeline):
        if entry < 0 or events.kinds[entry].phase not in _COMPUTING:
            continue
        kind = events.kinds[entry]
        if kind.role in ("input", "workspace"):
            continue
        module = events.module(entry)
        if kind.phase != phase:
            close()
            # A block that is recomputed, or goes backward after that, is entered again; the modules around it are not.
            rerun = kind.phase == "recompute" or phase == "recompute"
            known = set(_path(module)[: _depth_of_block(module)]) if rerun else set()
            phase, inside = kind.phase, "?"
        if module != inside:
            path = _path(module)
            entered = [name for name in path if name not in known and name not in owners and not _is_list(name, module)]
            found.extend(Visit(position, position, (), phase) for _ in entered)
            inside, known = module, set(path)
        if module in owners:
            start, _, more = open_at.get(module, (position, position, False))
            open_at[module] = (start, position, more or kind.role != "gradient")
    close()
    return sorted(found)


def _path(module: str) -> list[str]:
    """The module and those around it, the root first: ``["", "model", "model.norm"]``."""
    names = module.split(".") if module else []
    return [".".join(names[:depth]) for depth in range(len(names) + 1)]


def _depth_of_block(module: str) -> int:
    """How many modules lie around the first numbered one."""
    names = module.split(".")
    return next((depth + 1 for depth, name in enumerate(names) if name.isdigit()), 0)


def _is_list(name: str, module: str) -> bool:
    """Whether a module around another is a ``ModuleList``, which is never called: its child is a number."""
    return module[len(name) + 1 if name else 0 :].partition(".")[0].isdigit() and name != module


class _Gather:
    """One all-gather: of one parameter in place, or of several through a flat tensor."""

    def __init__(self, members: Sequence[int], flat: int | None) -> None:
        self.members, self.flat, self.copied_out = members, flat, flat is None
        self.waiting = set(members)


class _Coordinator:
    """``PartitionedParameterCoordinator`` for one micro-batch; every method returns entries of the timeline."""

    def __init__(
        self,
        zero: _Zero3,
        visited: Sequence[Visit],
        recorded: bool,
        held: dict[int, int],
        available: int,
        decided: dict[tuple[int, int], set[int]],
    ) -> None:
        self._zero, self._visited, self._recorded, self._decided = zero, visited, recorded, decided
        self._order = [(index, step) for step, visit in enumerate(visited) for index in visit.members]
        self._uses: dict[int, list[int]] = {}
        for index, step in self._order:
            self._uses.setdefault(index, []).append(step)
        sizes = [sum(zero.parameters[index].numel for index in visit.members) for visit in visited]
        self._traversed = [0, *accumulate(sizes)]
        self._next, self._fetched, self._available = 0, 0, available
        self._fetched_for: dict[int, int] = {}
        self._held = dict(held)
        self._flying: dict[int, _Gather] = {}
        self._active: dict[int, int] = {}

    def fetch(self, step: int) -> list[int]:
        visit = self._visited[step]
        entries = self._gather([index for index in visit.members if not self._there(index)], visit.phase)
        for index in visit.members:
            self._active[index] = self._active.get(index, 0) + 1
            if index in self._flying:
                entries += self._wait(index, visit.phase)
        if self._recorded:
            entries += self._prefetch(step, visit)
        self._fetched += 1
        return entries

    def release(self, step: int) -> list[int]:
        visit = self._visited[step]
        if not visit.ends:
            return []
        leaving = set(visit.members)
        if self._recorded:
            # The decision is cached for the run (``lru_cache``), whatever the later micro-batches have prefetched.
            fresh = {index for index in visit.members if not self._stays(index)}
            leaving = self._decided.setdefault((step, self._fetched), fresh)
        entries = []
        for index in visit.members:
            self._active[index] -= 1
            if index in leaving and not self._active[index] and index in self._held:
                entries.append(~self._held.pop(index))
                self._available -= self._zero.parameters[index].numel
        return entries

    def drain(self) -> tuple[list[int], dict[int, int]]:
        """Frees what was gathered for nobody; also what stays gathered: persistent and not yet released parameters."""
        flats = {gather.flat for gather in self._flying.values() if gather.flat is not None}
        staying = {
            index: storage
            for index, storage in self._held.items()
            if self._active.get(index) or (self._recorded and index in self._zero.persistent)
        }
        leaving = [storage for index, storage in self._held.items() if index not in staying]
        return [~storage for storage in [*leaving, *sorted(flats)]], staying

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
            if index not in chosen and not self._there(index):
                chosen.append(index)
                elements += self._zero.parameters[index].numel
        return self._gather(chosen, visit.phase)

    def _stays(self, index: int) -> bool:
        """Whether it is persistent, or a later use is marked as fetched or within reach (``__params_to_release``)."""
        if index in self._zero.persistent or self._fetched_for.get(index, -1) > self._fetched:
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
        self._held: dict[int, int] = {}
        self._recorded, self._released = False, 0
        self._decided: dict[tuple[int, int], set[int]] = {}
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
        for segment in self._source.segments:
            kind, left = part(segment), segment.repeat
            while left:
                edit, before = Edit(segment), self._held
                if kind in ("first", "next"):
                    self._use_weights(edit, -self._released, self._decided)
                    self._reduce_gradients(edit, kind == "first")
                    self._recorded, self._released = True, 0
                elif kind not in ("load", "optimizer"):
                    self._use_weights(edit, 0, {})
                own = edit.drop_storages(gone)
                if kind == "load":
                    edit.insert(edit.end, self._load())
                elif kind == "optimizer":
                    own = min(own, edit.drop_frees(self._gradients))
                    edit.insert(own, self._step(), opens=True)
                repeat = left if before == self._held else 1
                self._out.segments.append(edit.result(repeat))
                left -= repeat
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
        return [*entries, ~zeros, bucket, partition]

    def _use_weights(self, edit: Edit, available: int, decided: dict[tuple[int, int], set[int]]) -> None:
        visited = visits(self._source, edit.timeline, self._owners)
        coordinator = _Coordinator(self, visited, self._recorded, self._held, available, decided)
        moments = [(visit.start, 1, step) for step, visit in enumerate(visited)]
        moments += [(visit.stop, 0, step) for step, visit in enumerate(visited)]
        for position, fetches, step in sorted(moments):
            if fetches:
                edit.insert(position, coordinator.fetch(step), opens=True)
            else:
                edit.insert(position, coordinator.release(step))
        entries, self._held = coordinator.drain()
        edit.insert(edit.end, entries)

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
        entries = [~storage for storage in self._held.values()]
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
        # The coordinator counts these releases, but not the gathering that follows.
        self._released = sum(self.parameters[index].numel for index in self._held)
        self._held = {index: self.gathered(index, "optimizer", padded=True) for index in sorted(self.persistent)}
        return [*entries, *self._held.values()]


def _flattened(groups: Iterable[Iterable[int]]) -> list[int]:
    return [index for group in groups for index in group]
