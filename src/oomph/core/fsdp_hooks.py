"""FSDP2's groups of parameters, and the moments of a timeline at which its hooks run.

``fully_shard`` is taken to be applied to every layer of every stack of layers, then to the model, whose own group, the
root, has all other parameters (torch 2.13, ``torch/distributed/fsdp/_fully_shard``: ``_fsdp_init.py``, ``_fsdp_state.py``).

Hooks are not in the timeline. The forward of a layer lasts from its first to its last allocation, its backward from its
first allocation in backward or recomputation to its last one; consecutive calls of one layer are one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import groupby
from typing import Final, NamedTuple

from oomph.core.events import Events, Kind
from oomph.core.trace import Parameter

ROOT: Final = 0
"""The root's number among the groups."""

_FORWARD: Final = ("forward", "evaluate")
_BACKWARD: Final = ("recompute", "backward")
_SEES: Final = {"vision": {"vision"}, "projector": {"vision", "projector"}}
"""The parts of the model whose outputs reach a part; the others see everything that ran before."""


class Group(NamedTuple):
    """The parameters that are gathered and reduced together: those of one call of ``fully_shard``.

    Attributes:
        module: the path of the layer with ``{}`` for its number; empty for the root.
        layer: its number, -1 for the root.
        members: indices of its parameters, in the order of ``_get_managed_states``: those of children first.
    """

    module: str
    layer: int
    members: tuple[int, ...]

    def template(self, path: str) -> str:
        """The path of a module in the group with ``{}`` for the layer's number."""
        return self.module + path[len(self.module.replace("{}", str(self.layer))) :]


def find_groups(kinds: Iterable[Kind], parameters: Sequence[Parameter]) -> list[Group]:
    """The root's group, then those of the layers that have parameters, in model order (``FSDPStateContext.all_states``)."""
    stacks = {module.partition("{}")[0] for module in {kind.module for kind in kinds} if "{}" in module}
    members: dict[tuple[str, int], list[tuple[int, str]]] = {("", -1): []}
    for index, parameter in enumerate(parameters):
        place, rest = ("", -1), parameter.name
        for stack in stacks:
            number, _, inside = parameter.name.removeprefix(stack).partition(".")
            if parameter.name.startswith(stack) and number.isdigit():
                place, rest = (f"{stack}{{}}", int(number)), inside
        members.setdefault(place, []).append((index, rest))
    return [Group(module, layer, tuple(_children_first(named))) for (module, layer), named in members.items()]


def _children_first(named: Sequence[tuple[int, str]]) -> Iterator[int]:
    """Indices of parameters with dotted names, those of a module after those of the modules in it."""
    children: dict[str, list[tuple[int, str]]] = {}
    own = []
    for index, name in named:
        child, dot, rest = name.partition(".")
        if dot:
            children.setdefault(child, []).append((index, rest))
        else:
            own.append(index)
    for inside in children.values():
        yield from _children_first(inside)
    yield from own


class Hook(IntEnum):
    """The hooks of ``FSDPState``: those that follow a module's operators come before those that precede a module's."""

    POST_FORWARD = 0
    POST_BACKWARD = 1
    PRE_FORWARD = 2
    PRE_BACKWARD = 3

    @property
    def precedes(self) -> bool:
        """Whether it runs before its module does."""
        return self in (Hook.PRE_FORWARD, Hook.PRE_BACKWARD)


class Moment(NamedTuple):
    """A hook of a group runs before the entry at `position`."""

    position: int
    hook: Hook
    group: int


class _Seen(NamedTuple):
    """An allocation that an operator of the model makes."""

    position: int
    kind: Kind
    layer: int
    group: int


class _Call(NamedTuple):
    """A stretch of the timeline, [start, stop), in which a layer runs forward or backward."""

    start: int
    stop: int
    group: int
    backward: bool


class Schedule:
    """Finds the hooks of a model's timelines.

    Args:
        events: of a single GPU.
        parameters: in model order.
        groups: as `find_groups` gives them.
        outside: whether the loss is computed outside of the root's forward, by operators without a module.
    """

    def __init__(self, events: Events, parameters: Sequence[Parameter], groups: Sequence[Group], outside: bool) -> None:
        self._events, self._parameters, self._groups, self._outside = events, parameters, groups, outside
        self._numbers = {(group.module, group.layer): number for number, group in enumerate(groups)}
        self._homes = {index: group for group in groups for index in group.members}

    def moments(self, timeline: Sequence[int]) -> list[Moment]:
        """The hooks of all groups in the order in which they run.

        A group whose inputs need no gradient has no hook after its backward.
        """
        seen = list(self._seen(timeline))
        calls = _calls(seen)
        reached = self._with_gradient_of_inputs(seen, calls)
        births = [position for position, entry in enumerate(timeline) if entry >= 0]
        found = list(self._of_root(seen))
        for call in calls:
            found.append(Moment(call.start, Hook.PRE_BACKWARD if call.backward else Hook.PRE_FORWARD, call.group))
            if not call.backward or call.group in reached:
                # What the last operator leaves behind dies before the hook runs.
                following = bisect_left(births, call.stop)
                position = births[following] if following < len(births) else len(timeline)
                found.append(Moment(position, Hook.POST_BACKWARD if call.backward else Hook.POST_FORWARD, call.group))
        return sorted(found, key=_in_order)

    def _seen(self, timeline: Sequence[int]) -> Iterator[_Seen]:
        kinds, layers = self._events.kinds, self._events.layers
        homes: dict[tuple[str, int], int] = {}
        for position, entry in enumerate(timeline):
            if entry < 0:
                continue
            kind, layer = kinds[entry], layers[entry]
            if kind.phase in (*_FORWARD, *_BACKWARD) and kind.role not in ("input", "workspace"):
                place = kind.module, layer
                if place not in homes:
                    stack, layered, _ = kind.module.partition("{}")
                    homes[place] = self._numbers.get((stack + layered, layer), ROOT) if layered else ROOT
                yield _Seen(position, kind, layer, homes[place])

    def _of_root(self, seen: Sequence[_Seen]) -> Iterator[Moment]:
        inside = [(at.position, at.kind.phase in _BACKWARD) for at in seen if at.kind.module or not self._outside]
        forward = [position for position, backward in inside if not backward]
        backward = [position for position, backward in inside if backward]
        if forward:
            yield Moment(forward[0], Hook.PRE_FORWARD, ROOT)
            yield Moment(forward[-1] + 1, Hook.POST_FORWARD, ROOT)
        if backward:
            # The first allocation of the backward is the gradient of the loss; the root's hook hangs on that.
            yield Moment(backward[0] + (not self._outside), Hook.PRE_BACKWARD, ROOT)

    def _with_gradient_of_inputs(self, seen: Sequence[_Seen], calls: Sequence[_Call]) -> set[int]:
        """The groups before which something ran that trains and leads to them."""
        ran: dict[tuple[str, int], int] = {}
        for at in seen:
            if at.kind.phase in _FORWARD:
                ran.setdefault((at.kind.module, at.layer), at.position)
        first: dict[str, int] = {}
        for index, parameter in enumerate(self._parameters):
            home = self._homes[index]
            position = ran.get((home.template(parameter.module), home.layer))
            if parameter.trainable and position is not None:
                first[parameter.part] = min(position, first.get(parameter.part, position))
        reached = set()
        for call in calls:
            own = self._parameters[self._groups[call.group].members[0]].part
            before = [part for part, position in first.items() if position < call.start]
            if not call.backward and any(part in _SEES.get(own, first) for part in before):
                reached.add(call.group)
        return reached


def _calls(seen: Sequence[_Seen]) -> list[_Call]:
    inside = [at for at in seen if at.group != ROOT]
    runs = groupby(inside, key=lambda at: (at.group, at.kind.phase in _BACKWARD))
    return [_Call(*_stretch(run), group, backward) for (group, backward), run in runs]


def _stretch(run: Iterable[_Seen]) -> tuple[int, int]:
    positions = [at.position for at in run]
    return positions[0], positions[-1] + 1


def _in_order(moment: Moment) -> tuple[int, int, int]:
    """Inner modules end first and begin last."""
    return moment.position, moment.hook, moment.group if moment.hook.precedes else -moment.group
