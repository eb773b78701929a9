"""PyTorch's FSDP2 (``fully_shard``): one rank's sharded parameters, gathered groups, reductions and optimizer.

Rules are those of torch 2.13, ``torch/distributed/fsdp/_fully_shard``: ``_fsdp_param_group.py``, ``_fsdp_state.py``,
``_fsdp_collectives.py`` and ``_fsdp_param.py``. Which groups there are and when their hooks run is in
``oomph.core.fsdp_hooks``. Modelled:

* Every parameter, trained or frozen, is cut along its first dimension; each rank holds a padded chunk. With master
  weights the chunks of trained parameters are float32, and ``MixedPrecisionPolicy`` gathers them in the traced dtype and
  reduces gradients in float32. Each rank makes only its chunks (``meta`` device, ``to_empty``).
* A group is gathered by the hooks before its forward and, if it was resharded since, before its backward: into one
  buffer, which is copied out into the parameters. In the forward a buffer lives until the next group has been gathered
  and copied out; in the backward it dies after its own copy, and the group that ran before is gathered ahead. A group
  that is gathered ahead in vain (a frozen tower) keeps its buffer until the backward ends.
* Layers are resharded after their forward (not with ``fsdp2-no-reshard``), the root is not. After its backward a group is
  resharded, the input of the reduction before is freed, and its gradients are copied into the input of its own reduction.
  Groups whose inputs need no gradient do that at the end of the backward, the root first.
* Every micro-batch reduces. Chunks of gradients are views into the output of the first reduction of a step; outputs of
  later ones are added to it. With ``fsdp2-hybrid`` those live to the end of the backward
  (``FSDPParamGroup._all_reduce_state``).
* Buffers of all-gathers and outputs of reductions belong to streams of their own.
* The optimizer's segment is the traced one, on chunks; the norm of the gradients is reduced over ranks.

Approximated: the root's forward is the whole loss function, except that of ``full-shifted``. What an evaluation leaves
gathered until the next backward is freed at its end. The metadata of ``split_with_sizes_copy`` on the GPU (tens of
kilobytes, by the number of its multiprocessors) is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from typing import Final

from oomph.core.events import Events
from oomph.core.fsdp_hooks import ROOT, Hook, Moment, Schedule, find_groups
from oomph.core.ranks import FP32, STEP_COUNTER, Edit, FsdpSettings, Storages, arrivals, copied, optimizer_born, part
from oomph.core.trace import ITEM_BYTES, Parameter
from oomph.records import Choice

GATHER_STREAM: Final = 1
"""``FSDPCommContext.all_gather_copy_in_stream``, on which inputs and outputs of all-gathers are allocated."""
REDUCE_STREAM: Final = 2
"""``FSDPCommContext.reduce_scatter_stream``, on which outputs of reductions are allocated."""

_NORM_CHUNK: Final = 65536
"""Elements of one partial norm (``kChunkSize`` of ``aten/src/ATen/native/cuda/MultiTensorApply.cuh``)."""
_CAT_BLOCK: Final = 2048
"""Bytes that one block of threads copies in ``_chunk_cat`` (``aten/src/ATen/native/cuda/TensorShape.cu``)."""


def ranks_of_a_shard(choice: Choice) -> int:
    """Ranks over which parameters are cut: all of them, or those of one node with ``fsdp2-hybrid``."""
    return choice.gpus // choice.nodes if choice.sharding == "fsdp2-hybrid" else choice.gpus


def padded(parameter: Parameter, world: int) -> int:
    """Elements of a parameter's chunk on every rank, padded (``padded_sharded_param_size``)."""
    return -(-parameter.shape[0] // world) * prod(parameter.shape[1:])


def chunk(shape: tuple[int, ...], world: int, rank: int) -> tuple[int, ...]:
    """The shape of what a rank has of a tensor, without padding (``torch.chunk`` along the first dimension)."""
    rows = -(-shape[0] // world)
    return max(0, min(rows, shape[0] - rank * rows)), *shape[1:]


def chunk_bytes(parameter: Parameter, choice: Choice) -> int:
    """Bytes of one element of a parameter's chunk."""
    return FP32 if choice.master_weights and parameter.trainable else parameter.itemsize


def fsdp_static(parameters: Sequence[Parameter], choice: Choice, settings: FsdpSettings, reached: set[int]) -> dict[str, int]:
    """Resident bytes of one rank by role, when the optimizer's step begins; `reached` are those that have gradients."""
    world = ranks_of_a_shard(choice)
    trained = [(parameters[index], chunk_bytes(parameters[index], choice)) for index in sorted(reached)]
    counters = STEP_COUNTER * len(trained) if choice.optimizer == "adamw-fused" else 0
    moments = 2 * sum(prod(chunk(parameter.shape, world, settings.rank)) * itemsize for parameter, itemsize in trained)
    return {
        "weight": sum(padded(parameter, world) * chunk_bytes(parameter, choice) for parameter in parameters),
        "gradient": sum(padded(parameter, world) * itemsize for parameter, itemsize in trained),
        "optimizer": 0 if choice.optimizer_offload else moments + counters,
        "communication": 0,
    }


def shard_fsdp(events: Events, parameters: Sequence[Parameter], choice: Choice, settings: FsdpSettings) -> Events:
    """The events of one rank under FSDP2."""
    return _Fsdp(events, parameters, choice, settings).run()


class _Pass:
    """``FSDPCommContext`` and the states of the groups in one micro-batch or evaluation.

    Every method returns entries of the timeline.

    Args:
        layout: makes the storages.
        gradients: the storages of each group's gradients, by parameter and in the order of the group's members.
        first: whether the outputs of the reductions are the step's gradients, rather than being added to them.
    """

    def __init__(self, layout: _Fsdp, gradients: dict[int, dict[int, tuple[int, ...]]], first: bool) -> None:
        self._layout, self._gradients, self._first = layout, gradients, first
        self.phase = ""
        self._unsharded: dict[int, list[int]] = {}
        self._gathered: dict[int, int] = {}
        self._previous: list[int] = []
        self._order: list[int] = []
        self._calls: dict[int, list[int]] = defaultdict(list)
        self._reduced: list[int] = []
        self._all_reduced: dict[int, int] = {}
        self._done: set[int] = set()

    def run(self, moment: Moment) -> list[int]:
        """What a hook does."""
        hooks = (self._post_forward, self._post_backward, self._pre_forward, self._pre_backward)
        return hooks[moment.hook](moment.group)

    def finish(self) -> list[int]:
        """``_root_post_backward_final_callback``."""
        entries = []
        for group in range(len(self._layout.groups)):
            if group not in self._done:
                entries += self._post_backward(group)
            entries += [~held[group] for held in (self._gathered, self._all_reduced) if group in held]
        return entries + [~storage for storage in self._reduced]

    def reshard(self) -> list[int]:
        """What ``FSDPModule.reshard`` frees of all groups."""
        return [entry for group in list(self._unsharded) for entry in self._reshard(group)]

    def _pre_forward(self, group: int) -> list[int]:
        entries = self._unshard(group)
        if group in self._gathered:
            output = self._gathered.pop(group)
            # A local variable of `wait_for_unshard` holds on to the buffer of the group before.
            entries += [*self._copy_out(group), *(~storage for storage in self._previous)]
            self._previous = [output]
        return entries

    def _post_forward(self, group: int) -> list[int]:
        self._calls[group].append(len(self._order))
        self._order.append(group)
        if group != ROOT:
            return self._reshard(group) if self._layout.reshards else []
        entries = [~storage for storage in self._previous]
        self._previous = []
        return entries

    def _pre_backward(self, group: int) -> list[int]:
        entries = self._unshard(group)
        if group in self._gathered:
            output = self._gathered.pop(group)
            entries += [*self._copy_out(group), ~output]
        current = self._calls[group].pop() if self._calls[group] else 0
        return entries + (self._unshard(self._order[current - 1]) if current else [])

    def _post_backward(self, group: int) -> list[int]:
        self._done.add(group)
        entries = [*self._reshard(group), *(~storage for storage in self._reduced)]
        self._reduced = []
        gradients = self._gradients.get(group)
        if not gradients:
            return entries
        source, metadata, output = self._layout.reduction(group, tuple(gradients), self._first)
        # `foreach_reduce` looks at the gradients in a loop whose variable holds on to the last of them.
        *others, last = ([~storage for storage in storages] for storages in gradients.values())
        entries += [source, metadata, ~metadata, *(entry for freed in others for entry in freed), output, *last]
        self._reduced = [source]
        if not self._first:
            if self._layout.hybrid:
                self._all_reduced[group] = output
            else:
                entries.append(~output)
        return entries

    def _unshard(self, group: int) -> list[int]:
        if group in self._gathered or group in self._unsharded or not self._layout.groups[group].members:
            return []
        inputs, self._gathered[group] = self._layout.gather(group, self.phase)
        return [*inputs, self._gathered[group], *(~storage for storage in inputs)]

    def _copy_out(self, group: int) -> list[int]:
        self._unsharded[group] = self._layout.unsharded(group, self.phase)
        return self._unsharded[group]

    def _reshard(self, group: int) -> list[int]:
        return [~storage for storage in self._unsharded.pop(group, ())]


class _Fsdp:
    def __init__(self, events: Events, parameters: Sequence[Parameter], choice: Choice, settings: FsdpSettings) -> None:
        self.groups = find_groups(events.kinds, parameters)
        self.reshards, self.hybrid = choice.sharding != "fsdp2-no-reshard", choice.sharding == "fsdp2-hybrid"
        self._source, self._parameters, self._choice = events, parameters, choice
        self._world, self._rank = ranks_of_a_shard(choice), settings.rank
        self._traced_dtype = next(parameter.dtype for parameter in parameters if parameter.trainable)
        self._out = copied(events)
        self._make = Storages(self._out)
        self._schedule = Schedule(events, parameters, self.groups, outside=choice.loss == "full-shifted")
        self._home = {index: number for number, group in enumerate(self.groups) for index in group.members}
        self._chunks = [padded(parameter, self._world) for parameter in parameters]
        self._sharded: dict[int, list[int]] = {}

    def run(self) -> Events:
        self._cut_weights()
        self._cut_optimizer()
        for segment in self._source.segments:
            edit, kind = Edit(segment), part(segment)
            if kind in ("first", "next"):
                self._micro_batch(edit, kind == "first")
            elif kind == "optimizer":
                self._step(edit)
            elif kind != "load":
                self._evaluate(edit)
            self._out.segments.append(edit.result())
        return self._out

    # Storages.

    def gather(self, group: int, phase: str) -> tuple[list[int], int]:
        """The casts of a group's chunks, if any, and the buffer into which all ranks' chunks are gathered."""
        members = [(self._parameters[index], self._chunks[index]) for index in self.groups[group].members]
        cast = [elements for member, elements in members if chunk_bytes(member, self._choice) != member.itemsize]
        dtypes = {member.dtype for member, _ in members}
        dtype = dtypes.pop() if len(dtypes) == 1 else "uint8"
        gathered = self._world * sum(elements * member.itemsize for member, elements in members) // ITEM_BYTES[dtype]
        inputs = [self._buffer("fsdp2.cast", sum(cast), self._traced_dtype, group, phase, GATHER_STREAM)] if cast else []
        return inputs, self._buffer("fsdp2.all_gather", gathered, dtype, group, phase, GATHER_STREAM)

    def unsharded(self, group: int, phase: str) -> list[int]:
        """The storages of a group's whole parameters, padded (``all_gather_outputs``)."""
        made, home = [], self.groups[group]
        for index in home.members:
            parameter, elements = self._parameters[index], self._chunks[index] * self._world
            op, role, module = "fsdp2.unsharded_parameter", "communication", home.template(parameter.module)
            made.append(self._make.get(op, elements, parameter.dtype, role, phase, module, index, home.layer))
        return made

    def reduction(self, group: int, members: Sequence[int], first: bool) -> tuple[int, int, int]:
        """The input of a group's reduction, what the copy into it needs on the GPU, and its output."""
        chunks = [self._chunks[index] for index in members]
        dtype = "float32" if self._choice.master_weights else self._traced_dtype
        blocks = sum(-(-elements * ITEM_BYTES[dtype] // _CAT_BLOCK) for elements in chunks)
        op = "fsdp2.sharded_gradient" if first else "fsdp2.new_sharded_gradient"
        return (
            self._buffer("fsdp2.reduce_scatter", sum(chunks) * self._world, dtype, group, "backward"),
            self._buffer("fsdp2.chunk_cat", 6 * len(chunks) + 2 + blocks, "int64", group, "backward"),
            self._buffer(op, sum(chunks), dtype, group, "backward", REDUCE_STREAM, "gradient"),
        )

    def _buffer(
        self, op: str, elements: int, dtype: str, group: int, phase: str, stream: int = 0, role: str = "communication"
    ) -> int:
        home = self.groups[group]
        return self._make.get(op, elements, dtype, role, phase, home.module, None, home.layer, stream)

    # What is cut.

    def _cut_weights(self) -> None:
        for storage, index in enumerate(self._source.parameters):
            if index >= 0 and self._source.kinds[storage].role == "weight":
                parameter = self._parameters[index]
                rows = -(-parameter.shape[0] // self._world)
                self._resize(storage, (rows, *parameter.shape[1:]), chunk_bytes(parameter, self._choice) != parameter.itemsize)

    def _cut_optimizer(self) -> None:
        """States and temporaries that have the shape of a trained parameter get that of its chunk."""
        shapes = {parameter.shape for parameter in self._parameters if parameter.trainable}
        for storage in optimizer_born(self._source):
            kind, shape = self._source.kinds[storage], self._source.shapes[storage]
            if kind.op == "aten._foreach_norm.Scalar:output_per_tensor":
                tensors = shape[0] // max(_partial_norms(prod(whole)) for whole in shapes)
                shape = (tensors * max(_partial_norms(prod(chunk(whole, self._world, self._rank))) for whole in shapes),)
            elif shape in shapes:
                shape = chunk(shape, self._world, self._rank)
            self._resize(storage, shape, self._choice.master_weights and kind.dtype == self._traced_dtype)

    def _resize(self, storage: int, shape: tuple[int, ...], upcast: bool) -> None:
        kind = self._source.kinds[storage]
        dtype = "float32" if upcast else kind.dtype
        if shape != self._source.shapes[storage] or upcast:
            self._out.sizes[storage] = prod(shape) * ITEM_BYTES[dtype]
        self._out.shapes[storage] = shape
        self._out.kinds[storage] = kind._replace(dtype=dtype)

    # Segments.

    def _micro_batch(self, edit: Edit, first: bool) -> None:
        found: dict[int, dict[int, tuple[int, ...]]] = defaultdict(dict)
        for arrival in arrivals(self._source, edit.timeline, self._parameters):
            found[self._home[arrival.parameter]][arrival.parameter] = arrival.storages
            if arrival.freed >= 0:
                edit.drop(arrival.freed)
        gradients = {
            group: {index: made[index] for index in self.groups[group].members if index in made}
            for group, made in found.items()
        }
        if first:
            outputs = ((self.reduction(group, tuple(made), True)[-1], made) for group, made in gradients.items())
            self._sharded = {output: [storage for one in made.values() for storage in one] for output, made in outputs}
        running = _Pass(self, gradients, first)
        self._hook(edit, running, "forward")
        edit.insert(edit.end, running.finish())

    def _evaluate(self, edit: Edit) -> None:
        running = _Pass(self, {}, True)
        self._hook(edit, running, "evaluate")
        edit.insert(edit.end, running.reshard())

    def _hook(self, edit: Edit, running: _Pass, forward: str) -> None:
        for moment in self._schedule.moments(edit.timeline):
            running.phase = forward if moment.hook in (Hook.PRE_FORWARD, Hook.POST_FORWARD) else "backward"
            edit.insert(moment.position, running.run(moment), opens=moment.hook.precedes)

    def _step(self, edit: Edit) -> None:
        whole = {storage: output for output, storages in self._sharded.items() for storage in storages}
        dropped = dict.fromkeys(self._sharded, edit.end)
        for position, entry in enumerate(edit.timeline):
            if ~entry in whole:
                edit.drop(position)
                dropped[whole[~entry]] = position
            elif entry >= 0 and self._source.kinds[entry].op == "aten.stack.default":
                edit.insert(position + 1, self._total_norm(entry))
        for output, position in dropped.items():
            edit.insert(position, [~output])

    def _total_norm(self, norms: int) -> list[int]:
        """The vector of norms to the power, the sum of that over ranks and its root (``_NormPartial`` in DTensor)."""
        dtype, (elements,) = self._out.kinds[norms].dtype, self._out.shapes[norms]
        power, total, root = (
            self._make.get("fsdp2.norm", elements, dtype, "temporary", "optimizer", key=number) for number in range(3)
        )
        return [power, total, root, ~power, ~total, ~root]


def _partial_norms(elements: int) -> int:
    return -(-elements // _NORM_CHUNK)
