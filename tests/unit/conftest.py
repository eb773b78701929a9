"""A training step small enough to be worked out by hand, as a closed form."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from oomph.core.closed_form import FEATURES, ClosedForm, Dimension, Formula
from oomph.core.events import Kind
from oomph.core.trace import Parameter, Piece

WIDTH, VOCABULARY, HEADS = 256, 1024, 4
WORKSPACE = 8_519_680


class Writer:
    """Writes down a form storage by storage."""

    def __init__(self) -> None:
        self.form = ClosedForm()
        self.phase = "load"

    def new(
        self, role: str, *dimensions: str | int, itemsize: int = 2, op: str = "", module: str = "", parameter: int = -1
    ) -> int:
        """A new storage; a dimension is a number or the name of a feature."""
        formula = Formula(tuple(self._dimension(dimension) for dimension in dimensions), itemsize)
        dtype = {1: "uint8", 2: "bfloat16", 4: "float32", 8: "int64"}[itemsize]
        form, number = self.form, len(self.form.formula)
        form.formulas.append(formula)
        form.kinds.append(Kind(op or f"aten.{role}.default", module, self.phase, role, dtype))
        form.formula.append(number)
        form.kind.append(number)
        form.layer.append(0 if "{}" in module else -1)
        form.parameter.append(parameter)
        form.timeline.append(number)
        return number

    @staticmethod
    def _dimension(dimension: str | int) -> Dimension:
        if isinstance(dimension, int):
            return Dimension(0, dimension, 0)
        return Dimension(FEATURES.index(dimension), 1, 0)

    def free(self, *storages: int) -> None:
        """These storages end here."""
        self.form.timeline += [~storage for storage in storages]

    def enter(self, phase: str) -> None:
        """Another phase begins."""
        self.phase = phase
        self.form.marks.append((len(self.form.timeline), phase))

    def piece(self, name: str, write: Callable[[], None]) -> None:
        """What `write` writes is a piece of that name."""
        start = len(self.form.timeline)
        write()
        self.form.pieces.append(Piece(name, start, len(self.form.timeline)))


class Toy(Writer):
    """One decoder layer behind a frozen tower: two micro-batches, two optimizer steps, an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.form.parameters = [
            Parameter("tower.weight", (WIDTH, WIDTH), "bfloat16", False, "vision"),
            Parameter("layers.0.weight", (VOCABULARY, WIDTH), "bfloat16", True, "language"),
        ]
        self.gradient = self.loss = -1
        self.piece("load", self.load)
        self.piece("first", lambda: self.micro_batch(True))
        self.piece("next", lambda: self.micro_batch(False))
        self.piece("warmup/optimizer", lambda: self.optimizer(True))
        self.piece("step/optimizer", lambda: self.optimizer(False))
        self.piece("evaluate", self.evaluate)
        self.form.unclassified = ["aten.conv.default"]

    def load(self) -> None:
        """A frozen weight, a trained one and a buffer."""
        self.new("weight", WIDTH, WIDTH, op="load", module="tower", parameter=0)
        self.new("weight", VOCABULARY, WIDTH, op="load", module="layers.{}.mlp.fc", parameter=1)
        self.new("weight", 32, itemsize=4, op="load", module="rotary")

    def workspace(self, first: bool, thread: str) -> None:
        """A library's own memory, which is taken once."""
        if first:
            self.new("workspace", WORKSPACE, itemsize=1, op=f"cublas ({thread} thread)")

    def micro_batch(self, first: bool) -> None:
        """Scores, logits and their gradient; the weight's gradient stays, or is added to the one that is there."""
        self.enter("forward")
        ids = self.new("input", "samples", "tokens", itemsize=8)
        self.workspace(first, "main")
        image = self.new("activation", "images", WIDTH, module="tower")
        hidden = self.new("activation", "samples", "tokens", WIDTH, module="layers.{}")
        scores = self.new("scores", "samples", HEADS, "tokens", "tokens", itemsize=4, module="layers.{}.self_attn")
        self.free(image)
        logits = self.new("logits", "samples*tokens", VOCABULARY, itemsize=4, module="head")
        loss = self.new("activation", itemsize=4)
        self.enter("backward")
        upstream = self.new("logits", "samples*tokens", VOCABULARY, itemsize=4, module="head")
        self.free(logits)
        self.workspace(first, "autograd")
        gradient = self.new("gradient", VOCABULARY, WIDTH, module="layers.{}.mlp.fc", parameter=1)
        self.free(upstream, scores, hidden, ids)
        if first:
            self.gradient, self.loss = gradient, loss
        else:
            self.free(gradient, loss)

    def optimizer(self, warmup: bool) -> None:
        """The norm, the moments that are made once, a temporary; the gradient ends, and once what the step has left."""
        self.enter("optimizer")
        norm = self.new("temporary", itemsize=4)
        if warmup:
            self.new("optimizer", VOCABULARY, WIDTH, module="layers.{}.mlp.fc", parameter=1)
            self.new("optimizer", VOCABULARY, WIDTH, module="layers.{}.mlp.fc", parameter=1)
        root = self.new("temporary", VOCABULARY, WIDTH, module="layers.{}.mlp.fc", parameter=-1)
        self.free(norm, root, self.gradient)
        if warmup:
            self.free(self.loss)

    def evaluate(self) -> None:
        """A forward that keeps nothing."""
        self.enter("evaluate")
        ids = self.new("input", "samples", "tokens", itemsize=8)
        scores = self.new("scores", "samples", HEADS, "tokens", "tokens", itemsize=4, module="layers.{}.self_attn")
        self.free(scores)
        logits = self.new("logits", "samples*tokens", VOCABULARY, itemsize=4, module="head")
        self.free(logits, ids)


@pytest.fixture
def toy() -> ClosedForm:
    """The form of the step that `Toy` writes down: of any number of samples, tokens and images."""
    return Toy().form
