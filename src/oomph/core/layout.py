"""From a closed form to the events of one rank: a warm-up step, a step as all later ones are, and an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from oomph.core.closed_form import ClosedForm, Family
from oomph.core.events import Events, Segment
from oomph.core.sharding import shard
from oomph.records import Choice


class Shape(NamedTuple):
    """What a micro-batch's memory depends on: samples, tokens of the longest sample, images in all samples together."""

    samples: int
    tokens: int
    images: int


def lay_out(form: ClosedForm, choice: Choice, tokens: int, images_per_sample: int) -> Events:
    """The events of one rank of the choice, every sample of `tokens` tokens and `images_per_sample` images.

    The evaluation is part of it where its batch runs the same operators as the micro-batch; `lay_out_evaluation` gives
    it where it does not.

    Raises:
        UserError: the sharding cannot hold these parameters.
    """
    shape = Shape(choice.micro_batch, tokens, choice.micro_batch * images_per_sample)
    evaluated = evaluation_shape(choice, tokens, images_per_sample)
    if evaluated is not None and Family.of(evaluated) != Family.of(shape):
        evaluated = None
    return shard(compose(form, shape, choice.accumulation, evaluated), form.parameters, choice)


def lay_out_evaluation(form: ClosedForm, choice: Choice, tokens: int, images_per_sample: int) -> Events:
    """An evaluation after a step of its own size, for one whose batch runs other operators than the micro-batch."""
    shape = evaluation_shape(choice, tokens, images_per_sample)
    assert shape is not None
    return shard(compose(form, shape, 1, shape), form.parameters, choice)


def evaluation_shape(choice: Choice, tokens: int, images_per_sample: int) -> Shape | None:
    """The shape of an evaluated batch; none where the run does not evaluate."""
    if choice.eval_batch is None:
        return None
    return Shape(choice.eval_batch, tokens, choice.eval_batch * images_per_sample)


class _Timelines(NamedTuple):
    """The pieces of a form's timeline, with what has to change where a piece runs again."""

    pieces: dict[str, tuple[list[int], tuple[tuple[int, str], ...]]]
    persistent: frozenset[int]
    left: tuple[int, ...]


def timelines(form: ClosedForm) -> _Timelines:
    """Cuts the timeline into its pieces.

    `persistent` are the storages that a micro-batch allocates once for the whole run, library workspaces for instance;
    `left` are those that the first micro-batch leaves to the end of its step, besides gradients.
    """
    pieces = {}
    for piece in form.pieces:
        marks = tuple((at - piece.start, phase) for at, phase in form.marks if piece.start <= at < piece.stop)
        pieces[piece.name] = form.timeline[piece.start : piece.stop], marks
    freed = _freed(pieces["first"][0]) | _freed(pieces["next"][0]) | _freed(pieces["warmup/optimizer"][0])
    born = [s for s in pieces["first"][0] if s >= 0]
    late = _freed(pieces["warmup/optimizer"][0]) - _freed(pieces["step/optimizer"][0])
    return _Timelines(pieces, frozenset(s for s in born if s not in freed), tuple(s for s in born if s in late))


def _freed(timeline: Iterable[int]) -> set[int]:
    return {~entry for entry in timeline if entry < 0}


def compose(form: ClosedForm, shape: Shape, accumulation: int, evaluated: Shape | None) -> Events:
    """The events of one GPU without sharding.

    Args:
        form: of the shape's family.
        shape: of a micro-batch.
        accumulation: micro-batches of a step.
        evaluated: the shape of an evaluated batch, of the same family; none to leave the evaluation out.
    """
    cut = timelines(form)
    first, first_marks = cut.pieces["first"]
    optimizer, optimizer_marks = cut.pieces["step/optimizer"]
    segments = [Segment("load", *cut.pieces["load"])]
    for step in ("warmup", "step"):
        again = step == "step"
        gone = cut.persistent if again else frozenset()
        segments.append(Segment(f"{step}/first", *_without(first, first_marks, gone)))
        if accumulation > 1:
            segments.append(Segment(f"{step}/next", *cut.pieces["next"], accumulation - 1))
        ending = ([*optimizer, *(~s for s in cut.left)], optimizer_marks) if again else cut.pieces["warmup/optimizer"]
        segments.append(Segment(f"{step}/optimizer", *ending))
    if evaluated is not None:
        segments.append(Segment("evaluate", *cut.pieces["evaluate"]))
    return _columns(form, shape, evaluated, segments)


def _without(
    timeline: Sequence[int], marks: tuple[tuple[int, str], ...], gone: frozenset[int]
) -> tuple[list[int], tuple[tuple[int, str], ...]]:
    kept = [entry for entry in timeline if entry not in gone]
    dropped = [position for position, entry in enumerate(timeline) if entry in gone]
    return kept, tuple((at - sum(position < at for position in dropped), phase) for at, phase in marks)


def _columns(form: ClosedForm, shape: Shape, evaluated: Shape | None, segments: list[Segment]) -> Events:
    sizes = form.sizes(shape)
    nbytes = sizes[np.array(form.formula)].tolist()
    shapes = _shapes(form, form.dimensions(shape).tolist(), sizes.tolist())
    rows = [shapes[number] for number in form.formula]
    if evaluated is not None and evaluated != shape:
        other = form.sizes(evaluated).tolist()
        other_shapes = _shapes(form, form.dimensions(evaluated).tolist(), other)
        for storage in (s for s in segments[-1].timeline if s >= 0):
            nbytes[storage], rows[storage] = other[form.formula[storage]], other_shapes[form.formula[storage]]
    kinds = [form.kinds[number] for number in form.kind]
    return Events(nbytes, rows, kinds, list(form.layer), list(form.parameter), segments)


def _shapes(form: ClosedForm, dimensions: list[list[int]], sizes: list[int]) -> list[tuple[int, ...]]:
    """The shape of each formula's storage; one of as many bytes where a function gives its size."""
    return [
        (nbytes,) if formula.size else tuple(row[: len(formula.dimensions)])
        for row, formula, nbytes in zip(dimensions, form.formulas, sizes, strict=True)
    ]
