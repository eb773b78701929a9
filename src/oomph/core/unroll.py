"""From a trace of a few layers to the whole model: the layers that were left out do what their neighbours did.

Of every stack the trace holds five equal units (one layer each, or a short pattern of layers), numbered 0 to 4. Units
0, 1, 3 and 4 become the model's first two and last two; unit 2 stands for all between them. Wherever unit 2 runs, its
part of the timeline is repeated, in the order in which its neighbours ran: upwards in the forward, downwards in the
backward. A storage that unit 2 frees belongs to itself or to a neighbour, and the copy frees that of its own neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from oomph.core.trace import NOWHERE, Parameter, Piece, Stack, Trace, layer_of, place, stack_of

TEMPLATE = 2
UNITS = 5


class NotPeriodic(Exception):
    """The layers do not repeat in the way the unrolling needs; the model has to be traced at its full depth."""


class Copy(NamedTuple):
    """A storage of the whole model: the traced storage it is a copy of, its layer, its parameter (each -1 for none)."""

    source: int
    layer: int
    parameter: int


@dataclass
class Unrolled:
    """The whole model's storages and timeline, in the trace's terms."""

    copies: list[Copy] = field(default_factory=list)
    timeline: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)


class _Run(NamedTuple):
    """Consecutive entries of the timeline that happened in one unit of one stack, or outside (`unit` -1)."""

    start: int
    stop: int
    stack: int
    unit: int


class _Slot(NamedTuple):
    """The same storage in every unit: the n-th birth in the unit's t-th run that has any."""

    stack: int
    run: int
    birth: int


def repeats(stacks: list[Stack], where: int) -> int:
    """How often what happened at a place of the trace happens in the model at its full depth."""
    number, unit = _unit(stacks, where)
    return stacks[number].full_units - UNITS + 1 if unit == TEMPLATE else 1


def unroll(trace: Trace) -> Unrolled:
    """The trace of the model at its full depth.

    Raises:
        NotPeriodic: a storage lives in a way that the repetition cannot express.
    """
    if all(stack.units == stack.full_units for stack in trace.stacks):
        return _as_it_is(trace)
    return _Unroller(trace).result()


def _as_it_is(trace: Trace) -> Unrolled:
    copies = [Copy(n, _layer(trace.stacks, s.home), s.parameter) for n, s in enumerate(trace.storages)]
    return Unrolled(copies, list(trace.timeline), list(trace.pieces), list(trace.marks), list(trace.parameters))


def _layer(stacks: list[Stack], home: int) -> int:
    """The number in the model of the layer at `home`."""
    if home == NOWHERE:
        return -1
    stack, layer = stacks[stack_of(home)], layer_of(home)
    return layer if layer < stack.layers - stack.suffix else layer + stack.full_layers - stack.layers


def _unit(stacks: list[Stack], where: int) -> tuple[int, int]:
    """The stack and the repeated unit of a place; (-1, -1) outside of them."""
    if where == NOWHERE:
        return -1, -1
    number = stack_of(where)
    stack = stacks[number]
    unit = (layer_of(where) - stack.prefix) // stack.unit if layer_of(where) >= stack.prefix else -1
    return (number, unit) if stack.units < stack.full_units and 0 <= unit < stack.units else (-1, -1)


class _Unroller:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.out = Unrolled(parameters=_parameters(trace))
        self._names = {parameter.name: number for number, parameter in enumerate(self.out.parameters)}
        self._units = {where: _unit(trace.stacks, where) for where in set(trace.places) | {s.home for s in trace.storages}}
        self._runs = self._find_runs()
        self._born: dict[int, tuple[_Slot, int]] = {}
        self._slots: dict[tuple[_Slot, int], int] = {}
        self._find_slots()
        self._ids: dict[tuple[int, int], int] = {}

    def result(self) -> Unrolled:
        position = {0: 0}
        for index, run in enumerate(self._runs):
            for instance in self._instances(index):
                self._emit(run, instance, position)
            position[run.stop] = len(self.out.timeline)
        self.out.pieces = [Piece(p.name, position[p.start], position[p.stop]) for p in self.trace.pieces]
        self.out.marks = [(position[at], phase) for at, phase in self.trace.marks]
        return self.out

    def _find_runs(self) -> list[_Run]:
        """Splits the timeline where the unit changes, and where a piece or a phase begins."""
        cuts = {0, len(self.trace.timeline), *(at for at, _ in self.trace.marks)}
        cuts |= {edge for piece in self.trace.pieces for edge in (piece.start, piece.stop)}
        units = [self._units[where] for where in self.trace.places]
        cuts |= {n for n in range(1, len(units)) if units[n] != units[n - 1]}
        edges = sorted(cuts)
        return [_Run(a, b, *units[a]) for a, b in pairwise(edges)]

    def _find_slots(self) -> None:
        """Finds for every birth in a middle unit the births in the other middle units that correspond to it."""
        runs: dict[tuple[int, int], int] = {}
        births: dict[tuple[int, int, int], int] = {}
        for run in self._runs:
            born = [s for s in self.trace.timeline[run.start : run.stop] if s >= 0]
            if not born or not 1 <= run.unit <= UNITS - 2:
                continue
            number = runs[run.stack, run.unit] = runs.get((run.stack, run.unit), -1) + 1
            births[run.stack, number, run.unit] = len(born)
            for n, storage in enumerate(born):
                slot = _Slot(run.stack, number, n)
                self._born[storage] = slot, run.unit
                self._slots[slot, run.unit] = storage
        for (stack, number, _), count in births.items():
            if any(births.get((stack, number, unit)) != count for unit in range(1, UNITS - 1)):
                raise NotPeriodic(f"the layers of {self.trace.stacks[stack].path} do not allocate alike")

    def _instances(self, index: int) -> list[int]:
        """The units of the model that a run of the trace stands for, in the order in which they ran; [-1] outside."""
        run = self._runs[index]
        if run.unit < 0:
            return [-1]
        full = self.trace.stacks[run.stack].full_units
        if run.unit != TEMPLATE:
            return [run.unit if run.unit < TEMPLATE else run.unit + full - UNITS]
        middle = list(range(TEMPLATE, full - 2))
        return middle if self._upwards(index) else middle[::-1]

    def _upwards(self, index: int) -> bool:
        stack = self._runs[index].stack
        for neighbours, upwards in (
            (reversed(self._runs[:index]), {TEMPLATE - 1: True, TEMPLATE + 1: False}),
            (iter(self._runs[index + 1 :]), {TEMPLATE - 1: False, TEMPLATE + 1: True}),
        ):
            unit = next((run.unit for run in neighbours if run.stack == stack and run.unit != TEMPLATE), -1)
            if unit in upwards:
                return upwards[unit]
        raise NotPeriodic(f"the layers of {self.trace.stacks[stack].path} do not run in order")

    def _emit(self, run: _Run, instance: int, position: dict[int, int]) -> None:
        for at in range(run.start, run.stop):
            entry = self.trace.timeline[at]
            if entry >= 0:
                self.out.timeline.append(self._birth(entry, run, instance))
                continue
            try:
                self.out.timeline += [~number for number in self._deaths(~entry, run, instance)]
            except KeyError:
                raise NotPeriodic("a repeated layer frees what is not born yet") from None

    def _birth(self, storage: int, run: _Run, instance: int) -> int:
        row = self.trace.storages[storage]
        layer = self._layer_at(row.home, run, instance)
        parameter = row.parameter
        if parameter >= 0:
            traced = self.trace.parameters[parameter].name
            home = self._names.get(_renumber(traced, self.trace.stacks, layer))
            if home is None:
                raise NotPeriodic(f"{traced} has no counterpart")
            parameter = home
        number = len(self.out.copies)
        self.out.copies.append(Copy(storage, layer, parameter))
        self._ids[storage, instance if run.unit == TEMPLATE else -1] = number
        return number

    def _layer_at(self, home: int, run: _Run, instance: int) -> int:
        """The layer of the model that `home` is, seen from a run that stands for the unit `instance`."""
        number, unit = self._units[home]
        if unit < 0:
            return _layer(self.trace.stacks, home)
        stack = self.trace.stacks[number]
        if run.stack == number and run.unit == TEMPLATE:
            units = instance - TEMPLATE
        else:
            units = 0 if unit <= TEMPLATE else stack.full_units - stack.units
        return layer_of(home) + units * stack.unit

    def _deaths(self, storage: int, run: _Run, instance: int) -> list[int]:
        """The storages of the model that die where the trace's `storage` did."""
        born = self._born.get(storage)
        if born is None:
            if run.unit == TEMPLATE:
                raise NotPeriodic("a repeated layer frees what does not belong to a layer")
            return [self._ids[storage, -1]]
        slot, unit = born
        full = self.trace.stacks[slot.stack].full_units
        if run.stack != slot.stack:
            middle = range(TEMPLATE, full - 2) if unit == TEMPLATE else [-1]
            return [self._ids[storage, n] for n in middle]
        target = instance + unit - run.unit
        if not 1 <= target <= full - 2:
            raise NotPeriodic("a repeated layer frees what belongs to a layer far away")
        if target in (1, full - 2):
            return [self._ids[self._slots[slot, 1 if target == 1 else UNITS - 2], -1]]
        return [self._ids[self._slots[slot, TEMPLATE], target]]


def _renumber(name: str, stacks: list[Stack], layer: int) -> str:
    for stack in stacks:
        if name.startswith(f"{stack.path}."):
            rest = name[len(stack.path) + 1 :].partition(".")[2]
            return f"{stack.path}.{layer}.{rest}"
    return name


def _parameters(trace: Trace) -> list[Parameter]:
    """The parameters of the model at its full depth, in the model's order."""
    result: list[Parameter] = []
    group: list[Parameter] = []
    current: tuple[int, int] = (-1, -1)
    for parameter in trace.parameters:
        number, layer = _layer_in_name(parameter.name, trace.stacks)
        unit = _unit(trace.stacks, place(number, layer)) if number >= 0 else (-1, -1)
        if unit != current:
            result += _repeat(group, trace.stacks, current)
            group, current = [], unit
        group.append(parameter)
    return result + _repeat(group, trace.stacks, current)


def _repeat(group: list[Parameter], stacks: list[Stack], unit: tuple[int, int]) -> list[Parameter]:
    def moved(parameter: Parameter, shift: int) -> Parameter:
        number, layer = _layer_in_name(parameter.name, stacks)
        return parameter if number < 0 else parameter._replace(name=_renumber(parameter.name, stacks, layer + shift))

    stack = stacks[unit[0]] if unit[0] >= 0 else None
    if stack is None:
        return [_moved_suffix(p, stacks) for p in group]
    missing = (stack.full_units - stack.units) * stack.unit
    if unit[1] < TEMPLATE:
        return list(group)
    if unit[1] > TEMPLATE:
        return [moved(p, missing) for p in group]
    return [moved(p, n * stack.unit) for n in range(stack.full_units - UNITS + 1) for p in group]


def _moved_suffix(parameter: Parameter, stacks: list[Stack]) -> Parameter:
    number, layer = _layer_in_name(parameter.name, stacks)
    if number < 0 or layer < stacks[number].prefix:
        return parameter
    stack = stacks[number]
    return parameter._replace(name=_renumber(parameter.name, stacks, layer + stack.full_layers - stack.layers))


def _layer_in_name(name: str, stacks: list[Stack]) -> tuple[int, int]:
    for number, stack in enumerate(stacks):
        if name.startswith(f"{stack.path}."):
            return number, int(name[len(stack.path) + 1 :].partition(".")[0])
    return -1, -1
