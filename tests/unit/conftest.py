"""Training steps small enough to be written down by hand, as closed forms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from oomph.core.choices import cuts, with_micro_batch
from oomph.core.closed_form import FEATURES, ClosedForm, Dimension, Formula
from oomph.core.events import Kind
from oomph.core.forms import FormKey, Traced
from oomph.core.trace import Parameter, Piece
from oomph.core.work import Row
from oomph.records import Choice

WIDTH, VOCABULARY, HEADS = 256, 1024, 4
WORKSPACE = 8_519_680


class Writer:
    """Writes down a form storage by storage."""

    def __init__(self) -> None:
        self.form = ClosedForm()
        self.phase = "load"

    def new(
        self,
        role: str,
        *dimensions: str | int,
        itemsize: int = 2,
        op: str = "",
        module: str = "",
        layer: int = 0,
        parameter: int = -1,
    ) -> int:
        """A new storage; a dimension is a number or the name of a feature."""
        formula = Formula(tuple(self._dimension(dimension) for dimension in dimensions), itemsize)
        dtype = {1: "uint8", 2: "bfloat16", 4: "float32", 8: "int64"}[itemsize]
        form, number = self.form, len(self.form.formula)
        form.formulas.append(formula)
        form.kinds.append(Kind(op or f"aten.{role}.default", module, self.phase, role, dtype))
        form.formula.append(number)
        form.kind.append(number)
        form.layer.append(layer if "{}" in module else -1)
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


class Size(NamedTuple):
    """How large a model of `Decoder` is: blocks of the language model and of the tower, widths, and where memory goes.

    Every operator works `work` times as much as its tensors say, so that a step is not all launches.
    """

    blocks: int = 2
    towers: int = 1
    width: int = 128
    heads: int = 4
    vocabulary: int = 1024
    inner: int = 4
    patches: int = 1
    work: int = 100


class Decoder(Writer):
    """A decoder behind a vision tower, trained in two steps of two micro-batches, with the knobs that a key has.

    Every knob does what it is there for: recomputed blocks keep their inputs, or not even these on the GPU; scores are
    there with eager attention; logits are whole, copied, or a chunk at a time; an optimizer makes temporaries or none. A
    form of an exact number of images holds for no other.
    """

    def __init__(self, size: Size, key: FormKey) -> None:
        super().__init__()
        self.size, self.key = size, key
        self.itemsize = 4 if key.precision == "float32" else 2
        self.images: str | int = "images" if key.images >= 0 else -key.images
        self.towers = size.towers if key.images else 0
        self.gradients: dict[int, int] = {}
        self.loss = -1
        self._declare()
        self.piece("load", self.load)
        self.piece("first", lambda: self.micro_batch(True))
        self.piece("next", lambda: self.micro_batch(False))
        self.piece("warmup/optimizer", lambda: self.optimizer(True))
        self.piece("step/optimizer", lambda: self.optimizer(False))
        self.piece("evaluate", self.evaluate)
        self._works()

    def _declare(self) -> None:
        """The parameters, in model order."""
        width = self.size.width
        self.declare("tower", (width, 3 * 14 * 14), "vision")
        for block in range(self.size.towers):
            self.declare(f"vision.blocks.{block}.mlp", (4 * width, width), "vision")
        self.declare("embed", (self.size.vocabulary, width), "language")
        for block in range(self.size.blocks):
            self.declare(f"layers.{block}.attention", (width, width), "language")
            self.declare(f"layers.{block}.mlp", (self.size.inner * width, width), "language")
            self.declare(f"layers.{block}.norm", (width,), "language")
        self.declare("head", (self.size.vocabulary, width), "head")

    def declare(self, module: str, shape: tuple[int, ...], part: str) -> None:
        """A parameter, which trains where the key says so of its part."""
        dtype = "float32" if self.itemsize == 4 else "bfloat16"
        self.form.parameters.append(Parameter(f"{module}.weight", shape, dtype, part in self.key.trained, part))

    def place(self, parameter: int) -> tuple[str, int]:
        """The path of a parameter's module, with ``{}`` for the block, and the block."""
        path = self.form.parameters[parameter].module.split(".")
        number = next((word for word in path if word.isdigit()), "-1")
        return ".".join("{}" if word.isdigit() else word for word in path), int(number)

    def like(self, role: str, parameter: int, op: str = "") -> int:
        """A new storage of a parameter's shape."""
        module, layer = self.place(parameter)
        shape = self.form.parameters[parameter].shape
        return self.new(role, *shape, itemsize=self.itemsize, op=op, module=module, layer=layer, parameter=parameter)

    def hidden(self, module: str, *dimensions: str | int, layer: int = -1, role: str = "activation", itemsize: int = 0) -> int:
        """A new storage in the precision of the step."""
        return self.new(role, *dimensions, itemsize=itemsize or self.itemsize, module=module, layer=layer)

    def numbers(self, part: str, block: int = -1) -> list[int]:
        """The parameters of a part that train, in the order in which a backward makes their gradients."""
        found = [n for n, p in enumerate(self.form.parameters) if p.part == part and p.trainable]
        return [n for n in reversed(found) if self.place(n)[1] == block]

    def load(self) -> None:
        """The weights, and a buffer."""
        for parameter in range(len(self.form.parameters)):
            self.like("weight", parameter, "load")
        self.new("weight", 32, itemsize=4, op="load", module="rotary")

    def workspace(self, first: bool, thread: str) -> None:
        """A library's own memory, which is taken once."""
        if first:
            self.new("workspace", WORKSPACE, itemsize=1, op=f"cublas ({thread} thread)")

    def recomputes(self, block: int) -> bool:
        """Whether a block of the language model runs again in the backward."""
        stride = {"none": 0, "every-4": 4, "every-3": 3, "every-2": 2}.get(self.key.checkpointing, 1)
        return stride > 0 and block % stride == 0

    def block(self, block: int) -> list[int]:
        """What a block keeps beside its input."""
        width, path = self.size.width, "layers.{}"
        scores = {"eager": [self.itemsize] * 2, "eager-fp32": [4] * 3}.get(self.key.attention, [])
        made = [self.hidden(f"{path}.attention", "samples", "tokens", 3 * width, layer=block)]
        for itemsize in scores:
            dimensions = ("samples", self.size.heads, "tokens", "tokens")
            made.append(self.hidden(f"{path}.attention", *dimensions, layer=block, role="scores", itemsize=itemsize))
        if not scores:
            rows = "ceil32(tokens)" if self.key.attention == "efficient" else "tokens"
            made.append(self.hidden(f"{path}.attention", "samples", self.size.heads, rows, layer=block, itemsize=4))
        return [*made, self.hidden(f"{path}.mlp", "samples", "tokens", self.size.inner * width, layer=block)]

    def see(self) -> list[list[int]]:
        """The tower's forward: what each block keeps, its input first, and at last the tower's output."""
        trains, kept = "vision" in self.key.trained, []
        seen = (self.images, self.size.patches)
        before = self.hidden("tower", *seen, self.size.width)
        for block in range(self.towers):
            inner = self.hidden("vision.blocks.{}.mlp", *seen, 8 * self.size.width, layer=block)
            after = self.hidden("vision.blocks.{}", *seen, self.size.width, layer=block)
            keeps = trains and self.key.vision_checkpointing == "none"
            self.free(*([] if keeps else [inner]), *([] if trains else [before]))
            kept.append(([before] if trains else []) + ([inner] if keeps else []))
            before = after
        return [*kept, [before]]

    def logits(self) -> list[int]:
        """The logits of all tokens, or of a chunk of them."""
        if self.key.loss == "chunked":
            return [self.hidden("head", "chunk", self.size.vocabulary, role="logits", itemsize=4)]
        whole = [self.hidden("head", "samples*tokens", self.size.vocabulary, role="logits", itemsize=4)]
        if self.key.loss == "full-shifted":
            whole.append(self.hidden("", "samples*(tokens-1)", self.size.vocabulary, role="logits", itemsize=4))
        return whole

    def micro_batch(self, first: bool) -> None:
        """Forward and backward; gradients stay, or are added to those that are there."""
        self.enter("forward")
        ids = self.new("input", "samples", "tokens", itemsize=8)
        self.workspace(first, "main")
        seen = self.see() if self.key.images else []
        path, width = "layers.{}", self.size.width
        inputs = [self.hidden("embed", "samples", "tokens", width)]
        kept: list[list[int]] = []
        for block in range(self.size.blocks):
            inner = self.block(block)
            inputs.append(self.hidden(path, "samples", "tokens", width, layer=block))
            gone = inner if self.recomputes(block) else []
            offloaded = [inputs[block]] if self.key.checkpointing == "blocks-offload" else []
            self.free(*gone, *offloaded)
            kept.append([] if gone else inner)
        logits = self.logits()
        loss = self.new("activation", itemsize=4)
        self.enter("backward")
        upstream = self.hidden("head", "samples", "tokens", width)
        self.free(*logits)
        self.workspace(first, "autograd")
        self.collect(self.numbers("head"), first)
        self.free(inputs.pop())
        for block in reversed(range(self.size.blocks)):
            upstream = self.backward(block, inputs.pop(), kept[block], upstream, first)
        self.collect(self.numbers("language"), first)
        self.see_back(seen, first)
        self.free(upstream, ids)
        if first:
            self.loss = loss
        else:
            self.free(loss)

    def backward(self, block: int, before: int, inner: list[int], upstream: int, first: bool) -> int:
        """A block's backward; the gradient of its input."""
        offloaded = self.key.checkpointing == "blocks-offload"
        if self.recomputes(block):
            self.enter("recompute")
            if offloaded:
                before = self.hidden("layers.{}", "samples", "tokens", self.size.width, layer=block)
            inner = self.block(block)
            self.enter("backward")
        gradient = self.hidden("layers.{}", "samples", "tokens", self.size.width, layer=block)
        self.free(*inner, upstream)
        self.collect(self.numbers("language", block), first)
        self.free(before)
        return gradient

    def see_back(self, seen: list[list[int]], first: bool) -> None:
        """The tower's backward, where it trains and has seen something."""
        for block, kept in reversed(list(enumerate(seen))):
            if block < self.towers and "vision" in self.key.trained:
                again = []
                if self.key.vision_checkpointing == "blocks":
                    self.enter("recompute")
                    dimensions = (self.images, self.size.patches, 8 * self.size.width)
                    again = [self.hidden("vision.blocks.{}.mlp", *dimensions, layer=block)]
                    self.enter("backward")
                self.collect(self.numbers("vision", block), first)
                self.free(*again)
            self.free(*kept)
        self.collect(self.numbers("vision") if seen else [], first)

    def collect(self, parameters: Sequence[int], first: bool) -> None:
        """New gradients of parameters."""
        for parameter in parameters:
            gradient = self.like("gradient", parameter)
            if first:
                self.gradients[parameter] = gradient
            else:
                self.free(gradient)

    def eight_bits(self, parameter: int, variant: str) -> None:
        """A parameter's states as bitsandbytes has them, and the maps with the first one that takes them."""
        (module, layer), elements = self.place(parameter), self.form.parameters[parameter].numel
        whole, managed = elements < 4096, variant == "8bit-paged" and elements >= 100_000
        if not whole and not any(kind.op == "map" for kind in self.form.kinds):
            self.new("optimizer", 2, 256, itemsize=4, op="map")
        for _ in range(0 if managed else 2):
            self.new("optimizer", elements, itemsize=4 if whole else 1, module=module, layer=layer, parameter=parameter)
        for _ in range(0 if whole else 2):
            self.new("optimizer", -(-elements // 256), itemsize=4, module=module, layer=layer, parameter=parameter)

    def optimizer(self, warmup: bool) -> None:
        """The moments that are made once, and what the kind of the optimizer makes in every step."""
        self.enter("optimizer")
        variant = self.key.optimizer.removeprefix("adamw-")
        temporaries = []
        for parameter in self.gradients:
            module, layer = self.place(parameter)
            if warmup:
                if variant == "fused":
                    self.new("optimizer", itemsize=4, module=module, layer=layer, parameter=parameter)
                if variant.startswith("8bit"):
                    self.eight_bits(parameter, variant)
                else:
                    self.like("optimizer", parameter, "aten.exp_avg")
                    self.like("optimizer", parameter, "aten.exp_avg_sq")
            if variant in ("foreach", "loop"):
                temporaries.append(self.like("temporary", parameter))
            if variant == "loop":
                self.free(temporaries.pop())
        self.free(*temporaries, *self.gradients.values())
        if warmup:
            self.free(self.loss)

    def evaluate(self) -> None:
        """A forward that keeps nothing."""
        self.enter("evaluate")
        ids = self.new("input", "samples", "tokens", itemsize=8)
        for block in range(self.size.blocks):
            self.free(*self.block(block))
        self.free(*self.logits(), ids)

    def _works(self) -> None:
        """What the operators compute and move."""
        size, width = self.size, self.size.width
        eager, chunked = self.key.attention.startswith("eager"), self.key.loss == "chunked"
        per_token = 2 * width * width * (4 + 2 * size.inner)
        scores = ("samples", "tokens", "tokens", size.heads)
        attention = [(*scores, 4 * width // size.heads)], [(*scores, 12 * self.itemsize if eager else 1)]
        block = [("samples", "tokens", per_token)], [("samples", "tokens", (12 + 4 * size.inner) * width * self.itemsize)]
        vocabulary = ("samples", "tokens", size.vocabulary)
        copies = {"full-shifted": 2, "full": 1}.get(self.key.loss, 4)
        head = [(*vocabulary, 2 * width * (3 if chunked else 1))], [(*vocabulary, 4 * copies)]
        again = sum(map(self.recomputes, range(size.blocks)))
        sees, trains = bool(self.key.images), "vision" in self.key.trained
        tower = [(self.images, 16 * width * width)], [(self.images, 40 * width)]
        for piece in ("first", "next"):
            for phase, blocks, times in (("forward", size.blocks, 1), ("recompute", again, 1), ("backward", size.blocks, 2)):
                for name, (flops, traffic) in (("aten.mm", block), ("aten.attention", attention)):
                    self.does(piece, phase, name, times * blocks, flops, traffic)
            self.does(piece, "forward", "head", 1 if chunked else 3, *head, launches=16 if chunked else 1)
            self.does(piece, "forward", "tower", self.towers * sees, *tower)
            self.does(piece, "backward", "tower", 2 * self.towers * (sees and trains), *tower)
            seen_again = sees and trains and self.key.vision_checkpointing == "blocks"
            self.does(piece, "recompute", "tower", self.towers * seen_again, *tower)
        passes, launches = {"fused": (7, 1), "foreach": (15, 12)}.get(self.key.optimizer.removeprefix("adamw-"), (15, 60))
        elements = sum(p.numel for p in self.form.parameters if p.trainable)
        self.does("step/optimizer", "optimizer", "adamw", 1, [], [(elements, passes * self.itemsize)], launches)

    def does(
        self,
        piece: str,
        phase: str,
        name: str,
        times: int,
        flops: Sequence[tuple[str | int, ...]],
        traffic: Sequence[tuple[str | int, ...]],
        launches: int = 1,
    ) -> None:
        """An operator that runs so many times."""
        work = self.form.work
        sums = []
        for terms in (flops, traffic):
            products = [tuple(self._dimension(d) for d in (*term, self.size.work)) for term in terms]
            sums.append(tuple(range(len(work.products), len(work.products) + len(products))))
            work.products += products
        if times:
            work.rows.append(Row(piece, phase, name, self.key.precision, launches, times, *sums))


class Catalogue:
    """Serves every key with the form of a `Decoder` of one size.

    Attributes:
        made: the forms that were asked for, in order.
        prepared: the keys that were asked for ahead.
    """

    SIZE = Size

    def __init__(self, size: Size | None = None, closed: bool = True, image_tokens: int = 16) -> None:
        self.size, self.closed, self.image_tokens = size or Size(), closed, image_tokens
        self.prepared: list[FormKey] = []
        self.made: dict[FormKey, Traced] = {}

    def prepare(self, keys: Sequence[FormKey]) -> None:
        """Remembers the keys."""
        self.prepared += keys

    def traced(self, key: FormKey) -> Traced:
        """The form of the key's knobs; of a key with a shape, without variables."""
        if key not in self.made:
            form = Decoder(self.size, key).form
            tokens = self.image_tokens if key.images else 0
            if key.shape is not None:
                self.made[key] = Traced(at_shape(form, key.shape), tokens, "traced at this very shape")
            else:
                self.made[key] = Traced(form if self.closed else None, tokens, "by hand")
        return self.made[key]


def at_shape(form: ClosedForm, shape: tuple[int, ...]) -> ClosedForm:
    """The form without its variables."""
    dimensions = form.dimensions(shape).tolist()
    fixed = [
        formula._replace(dimensions=tuple(Dimension(0, extent, 0) for extent in row[: len(formula.dimensions)]))
        for formula, row in zip(form.formulas, dimensions, strict=True)
    ]
    return replace(form, formulas=fixed)


@pytest.fixture(scope="session")
def by_hand() -> type[Catalogue]:
    """A source of forms that are written down by hand."""
    return Catalogue


def better_than(choice: Choice, fixed: Collection[str], eval_batch: int | str = "auto") -> Choice:
    """The same with what a search takes for better whatever the sizes, of knobs that are not fixed.

    That is each knob's best value, and the most even cut into as many micro-batches.
    """
    best: dict[str, Any] = {"attention": "sdpa", "optimizer": "adamw-fused"}
    best |= {"loss": "full"} if choice.loss == "full-shifted" else {}
    other = replace(choice, **{knob: value for knob, value in best.items() if knob not in fixed})
    if "micro_batch" in fixed:
        return other
    even = (with_micro_batch(other, cut, eval_batch) for cut in cuts(other, other.sharding, every=True))
    return min((cut for cut in even if cut.accumulation == other.accumulation), key=lambda cut: cut.micro_batch)


@pytest.fixture(scope="session")
def better() -> Callable[..., Choice]:
    """What a search looks at in a choice's place."""
    return better_than
