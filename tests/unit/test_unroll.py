"""Five units of a stack, unrolled to more, are what a trace of so many layers would have been."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomph.core.events import Kind
from oomph.core.trace import NOWHERE, Parameter, Piece, Stack, Storage, Trace, layer_of, place
from oomph.core.unroll import UNITS, NotPeriodic, unroll


@dataclass(frozen=True)
class Layer:
    """What one kind of layer does. A number is of storages.

    Attributes:
        weights: parameters, each with a gradient and two states.
        temporary: born and freed in the forward.
        saved: born in the forward, freed in the layer's own backward.
        output: freed by the next layer in the forward, by what follows the stack for the last one.
        input_kept: the next layer frees it in its backward; for the last one, the backward begins with that.
        collected: freed after the stack, as hidden states that are collected.
        recomputed: born and freed in the backward.
        handed_down: born in the backward, freed in the backward of the layer before, or after the first one's.
    """

    weights: int = 0
    temporary: int = 0
    saved: int = 0
    output: int = 0
    input_kept: int = 0
    collected: int = 0
    recomputed: int = 0
    handed_down: int = 0


@dataclass(frozen=True)
class Tower:
    """A stack of layers: some unlike the others, units that repeat, and the beginning of one more."""

    path: str
    prefix: tuple[Layer, ...]
    unit: tuple[Layer, ...]
    suffix: int
    full_units: int

    def layers(self, units: int) -> list[Layer]:
        return [*self.prefix, *self.unit * units, *self.unit[: self.suffix]]

    def stack(self, units: int) -> Stack:
        return Stack(self.path, len(self.prefix), len(self.unit), units, self.full_units, self.suffix)


Saved = dict[int, list[int]]
"""The storages that the backward of each layer frees."""


@dataclass
class Program:
    """Runs towers of layers one after the other and writes down what they allocate, with no idea of repetition."""

    towers: Sequence[Tower]
    units: Sequence[int]
    out: Trace = field(default_factory=Trace)
    where: int = NOWHERE
    phase: str = "load"

    def new(self, name: str, layer: int = NOWHERE, parameter: int = -1) -> int:
        number = len(self.out.storages)
        nbytes = 10 + len(name)
        self.out.storages.append(Storage(nbytes, (nbytes,), 1, Kind(name, "", self.phase, "", "uint8"), layer, parameter))
        self.out.timeline.append(number)
        self.out.places.append(self.where)
        return number

    def free(self, storages: Sequence[int]) -> None:
        self.out.timeline += [~storage for storage in storages]
        self.out.places += [self.where] * len(storages)

    def some(self, name: str, count: int) -> list[int]:
        return [self.new(f"{name} {n} of {count}", self.where) for n in range(count)]

    def begin(self, phase: str, piece: str = "") -> None:
        self.where, self.phase = NOWHERE, phase
        self.out.marks.append((len(self.out.timeline), phase))
        if piece:
            self.end()
            self.out.pieces.append(Piece(piece, len(self.out.timeline), -1))

    def end(self) -> None:
        if self.out.pieces and self.out.pieces[-1].stop < 0:
            self.out.pieces[-1] = self.out.pieces[-1]._replace(stop=len(self.out.timeline))

    def visit(self, tower: int, upwards: bool = True) -> Iterator[Layer]:
        """The tower's layers, each while the program is in it."""
        layers = list(enumerate(self.towers[tower].layers(self.units[tower])))
        for number, layer in layers if upwards else reversed(layers):
            self.where = place(tower, number)
            yield layer
        self.where = NOWHERE

    def run(self) -> Trace:
        self.out.stacks = [tower.stack(units) for tower, units in zip(self.towers, self.units, strict=True)]
        self.load()
        gradients = self.step("first", {})
        self.step("next", gradients)
        self.optimizer(gradients)
        self.end()
        return self.out

    def load(self) -> None:
        self.begin("load", "load")
        self.weight("embed.weight")
        for tower in range(len(self.towers)):
            for layer in self.visit(tower):
                for n in range(layer.weights):
                    self.weight(f"{self.towers[tower].path}.{layer_of(self.where)}.weight_{n}")
            self.weight(f"after_{tower}.weight")

    def weight(self, name: str) -> None:
        self.out.parameters.append(Parameter(name, (1,), "uint8", True, "language"))
        self.new("weight", self.where, len(self.out.parameters) - 1)

    def step(self, piece: str, gradients: dict[int, int]) -> dict[int, int]:
        """A forward and a backward; gradients that are there already are added to. Returns those of the first."""
        self.begin("forward", piece)
        batch = self.new("batch")
        saved: Saved = {}
        after = [self.forward(tower, saved) for tower in range(len(self.towers))]
        self.begin("backward")
        found: dict[int, int] = {}
        for tower in reversed(range(len(self.towers))):
            self.free(after[tower])
            found |= self.backward(tower, saved, bool(gradients))
        self.free([batch])
        return gradients or found

    def forward(self, tower: int, saved: Saved) -> list[int]:
        outputs: list[int] = []
        kept: list[int] = []
        collected: list[int] = []
        for layer in self.visit(tower):
            inputs = kept
            temporaries = self.some("temporary", layer.temporary)
            saved[self.where] = self.some("saved", layer.saved)[::-1] + inputs
            handed = self.some("output", layer.output)
            kept = self.some("kept", layer.input_kept)
            collected += self.some("collected", layer.collected)
            self.free([*temporaries, *outputs])
            outputs = handed
        head = self.new("after the stack")
        self.free([*outputs, *collected, head])
        return kept

    def backward(self, tower: int, saved: Saved, accumulates: bool) -> dict[int, int]:
        handed: list[int] = []
        found: dict[int, int] = {}
        for layer in self.visit(tower, upwards=False):
            recomputed = self.some("recomputed", layer.recomputed)
            down = self.some("handed down", layer.handed_down)
            for parameter in self.parameters_here(tower):
                found[parameter] = self.new("gradient", self.where, parameter)
                if accumulates:
                    self.free([found[parameter]])
            self.free([*recomputed, *saved[self.where], *handed])
            handed = down
        self.free(handed)
        return found

    def parameters_here(self, tower: int) -> list[int]:
        stem = f"{self.towers[tower].path}.{layer_of(self.where)}."
        return [number for number, parameter in enumerate(self.out.parameters) if parameter.name.startswith(stem)]

    def optimizer(self, gradients: dict[int, int]) -> None:
        self.begin("optimizer", "optimizer")
        homes = {parameter: self.out.storages[storage].home for parameter, storage in gradients.items()}
        norm = self.new("norm")
        for parameter in sorted(gradients):
            self.where = homes[parameter]
            self.new("moment", self.where, parameter)
            root = self.new("root", self.where)
            self.free([root])
        self.where = NOWHERE
        self.free([norm])
        for parameter in sorted(gradients):
            self.where = homes[parameter]
            self.free([gradients[parameter]])


Row = tuple[Storage, int, str]
"""A storage with its layer in the model and the name of its parameter."""


def row(storage: Storage, layer: int, parameters: Sequence[Parameter], parameter: int) -> Row:
    return storage._replace(home=0, parameter=0), layer, parameters[parameter].name if parameter >= 0 else ""


def whole(trace: Trace) -> list[Row]:
    """The storages of a trace that left nothing out."""
    return [row(s, -1 if s.home == NOWHERE else layer_of(s.home), trace.parameters, s.parameter) for s in trace.storages]


def unrolled(trace: Trace) -> list[Row]:
    """The storages of a trace that is unrolled first."""
    out = unroll(trace)
    return [row(trace.storages[copy.source], copy.layer, out.parameters, copy.parameter) for copy in out.copies]


def assert_same(short: Trace, long: Trace) -> None:
    out = unroll(short)
    assert out.parameters == long.parameters
    assert unrolled(short) == whole(long)
    assert out.timeline == long.timeline
    assert out.pieces == long.pieces
    assert out.marks == long.marks


def both(*towers: Tower) -> tuple[Trace, Trace]:
    """A program as it is traced with five units, and as it is at its full depth."""
    return Program(towers, [UNITS] * len(towers)).run(), Program(towers, [tower.full_units for tower in towers]).run()


ONE = Layer(weights=2, temporary=1, saved=2, output=1, input_kept=1, recomputed=1, handed_down=1)
TWO = Layer(weights=1, temporary=2, saved=1, output=2, handed_down=2)


@pytest.mark.parametrize(
    "towers",
    [
        (Tower("layers", (), (ONE,), 0, 7),),
        (Tower("layers", (TWO,), (ONE,), 0, 7),),
        (Tower("model.layers", (), (ONE, TWO), 0, 7),),
        (Tower("model.layers", (TWO, Layer()), (ONE, TWO), 1, 9),),
        (Tower("vision.layers", (), (Layer(saved=1, output=1, collected=1),), 0, 6), Tower("text.layers", (), (ONE,), 0, 12)),
    ],
    ids=["alone", "prefix", "units of two", "prefix, units of two and a half", "two stacks"],
)
def test_five_units_stand_for_all(towers: tuple[Tower, ...]) -> None:
    short, long = both(*towers)
    assert len(short.timeline) < len(long.timeline)
    assert_same(short, long)


kinds = st.builds(Layer, **{name: st.integers(0, 2) for name in Layer.__dataclass_fields__ if name != "collected"})


@st.composite
def towers(draw: st.DrawFn) -> Tower:
    """Any tower. One layer of a unit at most leaves something to what follows the stack: the order of two is not kept."""
    unit = draw(st.lists(kinds, min_size=1, max_size=3))
    if draw(st.booleans()):
        unit[-1] = replace(unit[-1], collected=1)
    prefix = draw(st.lists(kinds, max_size=2))
    return Tower("layers", tuple(prefix), tuple(unit), draw(st.integers(0, len(unit) - 1)), draw(st.integers(UNITS, UNITS + 4)))


@given(st.lists(towers(), min_size=1, max_size=2))
def test_any_program_of_five_units_unrolls_to_itself_with_more(found: list[Tower]) -> None:
    named = [replace(tower, path=f"part_{number}.layers") for number, tower in enumerate(found)]
    short, long = both(*named)
    assert_same(short, long)


def test_nothing_is_changed_where_nothing_was_left_out() -> None:
    short, long = both(Tower("layers", (), (ONE,), 0, UNITS))
    assert short == long
    assert_same(short, long)


def test_a_stack_that_is_there_as_a_whole_is_left_alone() -> None:
    """Beside a stack that is unrolled: one with too few layers to leave any out."""
    few = Tower("few", (ONE, TWO, ONE), (TWO,), 0, 0)
    many = Tower("many", (), (ONE,), 0, 8)
    assert_same(Program([few, many], [0, UNITS]).run(), Program([few, many], [0, 8]).run())


# By hand.


def traced(entries: Sequence[tuple[int, int]], homes: Sequence[int], stack: Stack, parameters: int = 0) -> Trace:
    """A trace of (entry, layer) pairs; a storage has the layer that `homes` says, and as many first ones are weights."""
    rows = [
        Storage(8, (8,), 1, Kind("op", "layers.{}", "", "", ""), _home(layer), n if n < parameters else -1)
        for n, layer in enumerate(homes)
    ]
    named = [Parameter(f"layers.{homes[n]}.weight", (8,), "uint8", True, "language") for n in range(parameters)]
    timeline = [entry for entry, _ in entries]
    places = [_home(layer) for _, layer in entries]
    return Trace(rows, timeline, places, [Piece("all", 0, len(entries))], [(0, "forward")], [stack], named)


def _home(layer: int) -> int:
    return NOWHERE if layer < 0 else place(0, layer)


SEVEN = Stack("layers", 0, 1, UNITS, 7, 0)
BORN = [(n, n) for n in range(UNITS)]


def test_a_small_trace_written_out() -> None:
    """Weights 0 to 4. Layer n saves 5 + 2n for its backward, and hands 6 + 2n on to the next one."""
    forward = [
        *[(5, 0), (6, 0)],
        *[(7, 1), (8, 1), (~6, 1)],
        *[(9, 2), (10, 2), (~8, 2)],
        *[(11, 3), (12, 3), (~10, 3)],
        *[(13, 4), (14, 4), (~12, 4), (~14, -1)],
    ]
    backward = [(~13, 4), (~11, 3), (~9, 2), (~7, 1), (~5, 0)]
    homes = [*range(UNITS), *(layer for layer in range(UNITS) for _ in range(2))]
    out = unroll(traced([*BORN, *forward, *backward], homes, SEVEN, UNITS))
    assert out.timeline == [
        *range(7),
        *(7, 8),
        *(9, 10, ~8),
        *(11, 12, ~10),
        *(13, 14, ~12),
        *(15, 16, ~14),
        *(17, 18, ~16),
        *(19, 20, ~18),
        ~20,
        *(~19, ~17, ~15, ~13, ~11, ~9, ~7),
    ]
    assert [copy.layer for copy in out.copies] == [*range(7), *(layer for layer in range(7) for _ in range(2))]
    assert [copy.parameter for copy in out.copies] == [*range(7), *[-1] * 14]
    assert [copy.source for copy in out.copies[:7]] == [0, 1, 2, 2, 2, 3, 4]
    assert [parameter.name for parameter in out.parameters] == [f"layers.{n}.weight" for n in range(7)]
    assert out.pieces == [Piece("all", 0, len(out.timeline))]
    assert out.marks == [(0, "forward")]


def test_marks_and_pieces_move_along() -> None:
    entries = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (~4, 4), (~3, 3), (~2, 2), (~1, 1), (~0, 0)]
    trace = traced(entries, range(5), SEVEN)
    trace.marks, trace.pieces = [(0, "forward"), (5, "backward")], [Piece("first", 0, 5), Piece("next", 5, 10)]
    out = unroll(trace)
    assert out.marks == [(0, "forward"), (7, "backward")]
    assert out.pieces == [Piece("first", 0, 7), Piece("next", 7, 14)]


def test_a_parameter_keeps_its_place_in_the_model() -> None:
    """Names behind the repeated layers move, those outside the stack do not, and the order stays the model's."""
    def names(layers: int) -> list[str]:
        return ["embed.weight", *(f"layers.{n}.weight" for n in range(layers)), "norm.weight"]

    named = [Parameter(name, (), "uint8", True, "language") for name in names(11)]
    trace = Trace(stacks=[Stack("layers", 0, 2, UNITS, 8, 1)], parameters=named)
    assert [parameter.name for parameter in unroll(trace).parameters] == names(17)


NOT_PERIODIC = {
    "one layer allocates more than the others": (
        [*BORN[:3], (5, 2), *BORN[3:]],
        [0, 1, 2, 3, 4, 2],
        "the layers of layers do not allocate alike",
    ),
    "one layer allocates less than the others": (
        [*BORN, (5, 0), (6, 1), (7, 3), (8, 4)],
        [0, 1, 2, 3, 4, 0, 1, 3, 4],
        "the layers of layers do not allocate alike",
    ),
    "a layer frees what was there before the stack": (
        [(0, -1), (1, 0), (2, 1), (3, 2), (~0, 2), (4, 3), (5, 4)],
        [-1, 0, 1, 2, 3, 4],
        "frees what does not belong to a layer",
    ),
    "a layer frees what one that is not its neighbour made": (
        [*BORN[:3], (~0, 2), *BORN[3:]],
        [0, 1, 2, 3, 4],
        "frees what does not belong to a layer",
    ),
    "the layers run in no order": (
        [(0, 1), (1, 3), (2, 0), (3, 2), (4, 4)],
        [1, 3, 0, 2, 4],
        "the layers of layers do not run in order",
    ),
}


@pytest.mark.parametrize("case", NOT_PERIODIC)
def test_what_does_not_repeat_is_refused(case: str) -> None:
    entries, homes, words = NOT_PERIODIC[case]
    with pytest.raises(NotPeriodic, match=words):
        unroll(traced(entries, homes, SEVEN))


def test_a_storage_of_another_layer_s_parameter_is_refused() -> None:
    """A weight that is loaded outside its layer would have to be loaded there for every layer."""
    trace = traced(BORN, range(UNITS), SEVEN, UNITS)
    trace.storages[2] = trace.storages[2]._replace(home=NOWHERE)
    with pytest.raises(NotPeriodic, match=r"layers\.2\.weight has no counterpart"):
        unroll(trace)


def test_a_layer_that_frees_what_is_not_born_yet_is_refused() -> None:
    """Layer 3 frees what layer 1 made, before layer 2 runs: layer 5 of seven would free what layer 3 has not made yet."""
    with pytest.raises(NotPeriodic):
        unroll(traced([*BORN[:2], (~1, 3), *BORN[2:]], range(UNITS), SEVEN))
