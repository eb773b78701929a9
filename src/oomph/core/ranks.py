"""What the variants of sharding share: the parameter list, their settings, and edits of a timeline that keep its marks."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from oomph.core.events import Events, Kind, Segment
from oomph.core.trace import ITEM_BYTES, Parameter
from oomph.errors import UserError

FP32: Final = 4
STEP_COUNTER: Final = 4
"""Bytes of AdamW's step counter where it lives on the GPU (fused), one fp32 number for each tensor (torch/optim/adam.py)."""


@dataclass(frozen=True)
class DdpSettings:
    """Arguments of ``DistributedDataParallel`` that decide about memory; the defaults are torch's.

    Attributes:
        bucket_bytes: ``bucket_cap_mb`` in bytes.
        first_bucket_bytes: the bucket that is ready first is closed at this size (``_DEFAULT_FIRST_BUCKET_BYTES``).
        gradient_as_bucket_view: gradients live in the buckets after the reduction.
        find_unused_parameters: buckets have their final sizes from the start and are never rebuilt.
    """

    bucket_bytes: int = 25 * 1024**2
    first_bucket_bytes: int = 1024**2
    gradient_as_bucket_view: bool = False
    find_unused_parameters: bool = False


@dataclass(frozen=True)
class ZeroSettings:
    """Entries of DeepSpeed's ``zero_optimization`` that decide about memory, counted in elements.

    None is transformers' ``"auto"``: the value follows from the hidden size h (``integrations/deepspeed.py``).

    Attributes:
        reduce_bucket_elements: ``reduce_bucket_size``; auto is h². DeepSpeed's own default is 500,000,000.
        allgather_bucket_elements: ``allgather_bucket_size``.
        overlap_comm: two reduction buffers in stage 2 instead of one.
        weight_decay_groups: parameters of fewer than two dimensions form an optimizer group of their own, as biases and
            norms do with transformers' Trainer.
        rank: the rank to lay out. None is the last one: the gradients of its partition come first in the backward, so
            that it holds its gradient partition the longest.
        prefetch_elements: ``stage3_prefetch_bucket_size``; auto is 0.9 h². DeepSpeed's own default is 50,000,000.
        persistence_elements: ``stage3_param_persistence_threshold``; auto is 10 h. DeepSpeed's own default is 100,000.
        max_live_elements: ``stage3_max_live_parameters``.
        max_reuse_elements: ``stage3_max_reuse_distance``.
        sub_group_elements: ``sub_group_size``.
    """

    reduce_bucket_elements: int | None = None
    allgather_bucket_elements: int = 500_000_000
    overlap_comm: bool = True
    weight_decay_groups: bool = True
    rank: int | None = None
    prefetch_elements: int | None = None
    persistence_elements: int | None = None
    max_live_elements: int = 1_000_000_000
    max_reuse_elements: int = 1_000_000_000
    sub_group_elements: int = 1_000_000_000

    def reduce_bucket(self, parameters: Sequence[Parameter]) -> int:
        """Elements of the reduction bucket."""
        return hidden_size(parameters) ** 2 if self.reduce_bucket_elements is None else self.reduce_bucket_elements

    def prefetch(self, parameters: Sequence[Parameter]) -> int:
        """Elements that are gathered ahead of their use."""
        return int(0.9 * hidden_size(parameters) ** 2) if self.prefetch_elements is None else self.prefetch_elements

    def persistence(self, parameters: Sequence[Parameter]) -> int:
        """Elements up to which a parameter stays gathered."""
        return 10 * hidden_size(parameters) if self.persistence_elements is None else self.persistence_elements


@dataclass(frozen=True)
class FsdpSettings:
    """Which rank of those that share a copy of the model is laid out under FSDP2.

    The first has the most: chunks are rounded up, and the last ranks get what is left.
    """

    rank: int = 0


def hidden_size(parameters: Sequence[Parameter]) -> int:
    """The hidden size, read off the embedding: the second dimension of the matrix with the most rows.

    Raises:
        UserError: the model has no matrix.
    """
    matrices = [parameter.shape for parameter in parameters if len(parameter.shape) == 2]
    if not matrices:
        raise UserError(
            "the hidden size, on which DeepSpeed's automatic bucket sizes depend, is unknown: the model has no matrix",
            "give the bucket sizes as numbers of elements",
        )
    return max(matrices)[1]


def optimizer_groups(parameters: Sequence[Parameter], settings: ZeroSettings) -> list[list[int]]:
    """The trained parameters of each optimizer group, as indices in model order; no group is empty."""
    trained = [index for index, parameter in enumerate(parameters) if parameter.trainable]
    if not settings.weight_decay_groups:
        return [trained]
    decayed = [index for index in trained if len(parameters[index].shape) >= 2]
    others = [index for index in trained if len(parameters[index].shape) < 2]
    return [group for group in (decayed, others) if group]


class Edit:
    """Insertions and removals in one segment. Positions are those of the original timeline; marks move along."""

    def __init__(self, segment: Segment) -> None:
        self.timeline = [int(entry) for entry in segment.timeline]
        self._segment = segment
        self._before: dict[int, list[int]] = {}
        self._after: dict[int, list[int]] = {}
        self._dropped: set[int] = set()

    @property
    def end(self) -> int:
        """The position behind the last entry."""
        return len(self.timeline)

    def insert(self, position: int, entries: Sequence[int], opens: bool = False) -> None:
        """Puts entries before the one at `position`, and before a phase that starts there unless they open it."""
        target = self._after if opens else self._before
        target.setdefault(position, []).extend(entries)

    def drop(self, position: int) -> None:
        """Removes the entry at `position`."""
        self._dropped.add(position)

    def drop_storages(self, storages: Container[int]) -> int:
        """Removes all entries of these storages; returns the position of the first one, `end` where there is none."""
        found = [at for at, entry in enumerate(self.timeline) if (entry if entry >= 0 else ~entry) in storages]
        self._dropped.update(found)
        return found[0] if found else self.end

    def drop_frees(self, storages: Container[int]) -> int:
        """Removes the entries that free these storages; returns the position of the first one, `end` where none is."""
        found = [at for at, entry in enumerate(self.timeline) if entry < 0 and ~entry in storages]
        self._dropped.update(found)
        return found[0] if found else self.end

    def phase_start(self, phases: Container[str], otherwise: int) -> int:
        """The position of the first mark with one of the phases."""
        return min((at for at, phase in self._segment.marks if phase in phases), default=otherwise)

    def result(self, repeat: int | None = None) -> Segment:
        """The edited segment."""
        timeline: list[int] = []
        moved: dict[int, int] = {}
        start = 0
        for position in sorted({self.end, *self._before, *self._after, *self._dropped, *(at for at, _ in self._segment.marks)}):
            timeline += self.timeline[start:position]
            timeline += self._before.get(position, ())
            moved[position] = len(timeline)
            timeline += self._after.get(position, ())
            start = position + (position in self._dropped)
        marks = tuple((moved[position], phase) for position, phase in self._segment.marks)
        return Segment(self._segment.name, timeline, marks, self._segment.repeat if repeat is None else repeat)


class Arrival(NamedTuple):
    """The moment at which a parameter's gradient of one micro-batch is complete: where its hook runs.

    Attributes:
        position: the hook runs before this entry of the timeline.
        parameter: the index of the parameter.
        storages: the gradient's storages.
        freed: the position at which the traced step frees the gradient; -1 where it lives on.
    """

    position: int
    parameter: int
    storages: tuple[int, ...]
    freed: int


def arrivals(events: Events, timeline: Sequence[int], parameters: Sequence[Parameter]) -> list[Arrival]:
    """The gradients of a micro-batch in the order in which they are complete.

    A gradient that lives on is complete at the first allocation of another kind that follows its birth and the last
    allocation of its module's backward: autograd accumulates a gradient right after the node that made it. Of gradients
    that one node makes, vectors come before matrices, because the gradient of a linear layer's weight takes one more
    node, the transpose. A gradient that is added to an older one is complete when the traced step frees it.
    """
    born: dict[int, int] = {}
    freed: dict[int, int] = {}
    last_use: dict[str, int] = {}
    following = [len(timeline)] * (len(timeline) + 1)
    for position, entry in enumerate(timeline):
        if entry < 0:
            if ~entry in born:
                freed[~entry] = position
            continue
        kind = events.kinds[entry]
        if kind.role == "gradient" and events.parameters[entry] >= 0:
            born[entry] = position
        if kind.phase == "backward":
            last_use[events.module(entry)] = position
    for position in range(len(timeline) - 1, -1, -1):
        entry = timeline[position]
        other = entry >= 0 and events.kinds[entry].role != "gradient"
        following[position] = position if other else following[position + 1]
    made: dict[int, list[int]] = {}
    for storage in born:
        made.setdefault(events.parameters[storage], []).append(storage)
    found = []
    for parameter, storages in made.items():
        ends = [freed[storage] for storage in storages if storage in freed]
        living = [storage for storage in storages if storage not in freed]
        if living:
            last = max(last_use.get(parameters[parameter].module, 0), *(born[storage] for storage in living))
            position = max([following[last + 1], *ends])
            matrix = len(parameters[parameter].shape) >= 2
            found.append((position, matrix, born[living[-1]], Arrival(position, parameter, tuple(living), -1)))
        else:
            last_freed = max(storages, key=lambda storage: freed[storage])
            found.append((max(ends), False, born[last_freed], Arrival(max(ends), parameter, (last_freed,), max(ends))))
    return [found_at[-1] for found_at in sorted(found)]


def copied(events: Events) -> Events:
    """The same storages in columns of their own, and no segment."""
    return Events(
        sizes=list(events.sizes),
        shapes=list(events.shapes),
        kinds=list(events.kinds),
        layers=list(events.layers),
        parameters=list(events.parameters),
        streams=dict(events.streams),
    )


def part(segment: Segment) -> str:
    """What a segment is: ``load``, ``first``, ``next``, ``optimizer``, or another word at the end of its name."""
    return segment.name.rpartition("/")[2]


def optimizer_born(events: Events) -> set[int]:
    """Storages born in the traced optimizer step: its states and temporaries, but no library workspaces."""
    return {
        entry
        for segment in events.segments
        if part(segment) == "optimizer"
        for entry in map(int, segment.timeline)
        if entry >= 0 and events.kinds[entry].role not in ("workspace", "input")
    }


class Storages:
    """Makes the storages that sharding adds; equal requests that never live at the same time share one number."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._known: dict[tuple[object, ...], int] = {}

    def get(
        self,
        op: str,
        elements: int,
        dtype: str,
        role: str,
        phase: str,
        module: str = "",
        key: object = None,
        layer: int = -1,
        stream: int = 0,
    ) -> int:
        """The storage of a flat tensor; equal arguments give the same number."""
        kind = Kind(op, module, phase, role, dtype)
        known = (elements, kind, key, layer, stream)
        if known not in self._known:
            nbytes = elements * ITEM_BYTES[dtype]
            self._known[known] = self._events.add(nbytes, (elements,), kind, layer, stream=stream)
        return self._known[known]

    def moment(self, op: str, elements: int, dtype: str, role: str, phase: str) -> list[int]:
        """Entries of a temporary that is freed before anything else happens."""
        storage = self.get(op, elements, dtype, role, phase)
        return [storage, ~storage]

    def adamw(self, optimizer: str, elements: int, phase: str) -> list[int]:
        """Entries of the temporaries of one AdamW step on one flat fp32 tensor (torch 2.13, ``torch/optim/adam.py``).

        foreach keeps one square root of the second moment, the loop keeps it beside its quotient, fused needs nothing.
        """
        root = self.get("zero.adamw_sqrt", elements, "float32", "temporary", phase)
        if optimizer == "adamw-foreach":
            return [root, ~root]
        if optimizer == "adamw-loop":
            quotient = self.get("zero.adamw_denominator", elements, "float32", "temporary", phase)
            return [root, quotient, ~root, ~quotient]
        return []

    def adamw_states(self, optimizer: str, elements: int, key: object) -> list[int]:
        """Entries that allocate AdamW's states of one flat fp32 tensor, in the order of ``_init_group``."""
        counter = [self.get("zero.step", 1, "float32", "optimizer", "load", key=key)] if optimizer == "adamw-fused" else []
        moments = ("zero.exp_avg", "zero.exp_avg_sq")
        return counter + [self.get(op, elements, "float32", "optimizer", "load", key=key) for op in moments]
