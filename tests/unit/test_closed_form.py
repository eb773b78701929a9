"""Formulas from a few traces: they come out as they were put in, and what is no formula is refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomph.core.closed_form import (
    FEATURES,
    LEAST_ROWS,
    LOSS_CHUNKS,
    ClosedForm,
    Dimension,
    Family,
    Formula,
    NotClosed,
    constant_form,
    features,
    fit,
)
from oomph.core.dimensions import feature_table, fit_dimension
from oomph.core.events import Kind
from oomph.core.kernel_sizes import SIZES
from oomph.core.trace import NOWHERE, Parameter, Piece, Stack, Storage, Trace, place
from oomph.core.unroll import UNITS, NotPeriodic
from oomph.errors import UserError
from oomph.live import step

Shape = tuple[int, int, int]
Dims = Callable[[int, int, int], Sequence[int]]

MANY, ONE = Family(False, 2), Family(True, 2)
OTHERS: dict[Family, list[Shape]] = {
    MANY: [(2, 300, 2), (4, 1000, 8), (7, 2623, 7), (8, 4096, 24), (64, 1023, 64)],
    ONE: [(1, 256, 2), (1, 1000, 3), (1, 2623, 7), (1, 8192, 40)],
}


def kind(op: str = "aten.mm.default") -> Kind:
    return Kind(op, "model", "forward", "activation", "bfloat16")


def trace_of(*rows: Storage, stacks: Sequence[Stack] = ()) -> Trace:
    """A trace that allocates the rows one after the other, none of them in a layer."""
    numbers = list(range(len(rows)))
    return Trace(list(rows), numbers, [NOWHERE] * len(rows), [Piece("first", 0, len(rows))], [(0, "forward")], list(stacks))


def tensor(dims: Sequence[int], itemsize: int = 2, op: str = "aten.mm.default") -> Storage:
    return Storage(math.prod(dims) * itemsize, tuple(dims), itemsize, kind(op), NOWHERE)


def fitted(dims: Dims, family: Family = MANY, checked: bool = True) -> ClosedForm:
    """The form of one tensor, whose dimensions are a function of samples, tokens and images."""
    *made, held_out = [(shape, trace_of(tensor(dims(*shape)))) for shape in family.examples()]
    return fit(made, held_out if checked else None)


def assert_exact(form: ClosedForm, dims: Dims, shapes: Sequence[Shape]) -> None:
    for shape in shapes:
        expected = list(dims(*shape))
        assert form.dimensions(shape)[0].tolist()[: len(expected)] == expected, shape
        assert form.sizes(shape).tolist() == [math.prod(expected) * 2], shape


def feature(name: str) -> Dims:
    return lambda *shape: [features(shape, 0)[name]]


PER_SAMPLE = "images/samples"
VARYING = [name for name in FEATURES if name not in ("1", "trained", PER_SAMPLE, "capacity")]
ONE_SAMPLE = [name for name in VARYING if name != "samples"]


@pytest.mark.parametrize("name", VARYING)
def test_every_feature_is_found(name: str) -> None:
    assert_exact(fitted(feature(name)), feature(name), OTHERS[MANY])


@pytest.mark.parametrize("name", ONE_SAMPLE)
def test_every_feature_is_found_from_one_sample(name: str) -> None:
    assert_exact(fitted(feature(name), ONE), feature(name), OTHERS[ONE])


@pytest.mark.parametrize(
    ("name", "shape", "value"),
    [
        ("1", (3, 100, 4), 1),
        ("samples", (3, 100, 4), 3),
        ("tokens", (3, 100, 4), 100),
        ("images", (3, 100, 4), 4),
        ("samples*tokens", (3, 100, 4), 300),
        ("samples*(tokens-1)", (3, 100, 4), 297),
        ("images/samples", (3, 100, 6), 2),
        ("images/samples", (3, 100, 4), 0),
        ("ceil8(tokens)", (3, 100, 4), 104),
        ("ceil16(tokens)", (3, 100, 4), 112),
        ("ceil32(tokens)", (3, 100, 4), 128),
        ("ceil64(tokens)", (3, 128, 4), 128),
        ("ceil128(tokens)", (3, 129, 4), 256),
        ("samples*ceil128(tokens)", (3, 129, 4), 768),
        ("tokens²", (3, 100, 4), 10_000),
        ("samples*tokens²", (3, 100, 4), 30_000),
        ("chunk", (3, 100, 4), 19),
        ("last chunk", (3, 100, 4), 15),
        ("trained", (3, 100, 4), 9),
    ],
)
def test_a_feature_is_what_its_name_says(name: str, shape: Shape, value: int) -> None:
    assert features(shape, trained=9)[name] == value


def test_chunks_are_those_of_the_loss() -> None:
    assert LOSS_CHUNKS == step.LOSS_CHUNKS
    for rows in (LEAST_ROWS, LEAST_ROWS + 1, 3 * 2623):
        found = features((1, rows, 0), 0)
        assert found["chunk"] * (LOSS_CHUNKS - 1) + found["last chunk"] == rows
        assert 0 < found["last chunk"] <= found["chunk"]


@pytest.mark.parametrize(
    "dims",
    [
        lambda b, s, n: [b, 32, s, s],
        lambda b, s, n: [b, s, 4 * 2560],
        lambda b, s, n: [b * s, 51200],
        lambda b, s, n: [n, 577, 1024],
        lambda b, s, n: [n * 576],
        lambda b, s, n: [b, 1, s, s + 1],
        lambda b, s, n: [b * 32, s, -(-s // 8) * 8],
        lambda b, s, n: [51200, 2560],
        lambda b, s, n: [b, s - 1],
        lambda b, s, n: [],
    ],
    ids=["scores", "activation", "rows", "images", "image tokens", "offset", "padded", "weight", "shifted", "a number"],
)
@pytest.mark.parametrize("family", [MANY, ONE], ids=["many samples", "one sample"])
def test_tensors_of_a_step_come_out_as_they_are(dims: Dims, family: Family) -> None:
    assert_exact(fitted(dims, family), dims, OTHERS[family])


@given(st.sampled_from(VARYING), st.integers(1, 1 << 20), st.integers(-2, 31))
def test_a_form_that_passes_its_check_is_the_right_one(name: str, factor: int, offset: int) -> None:
    """Many formulas go through two points; one more point tells whether the simplest was meant."""

    def dims(*shape: int) -> list[int]:
        return [features(shape, 0)[name] * factor + offset]

    try:
        form = fitted(dims)
    except NotClosed:
        return
    assert_exact(form, dims, OTHERS[MANY])


@given(st.sampled_from(VARYING), st.integers(1, 1 << 20))
def test_a_multiple_is_always_found(name: str, factor: int) -> None:
    def dims(*shape: int) -> list[int]:
        return [features(shape, 0)[name] * factor]

    assert_exact(fitted(dims), dims, OTHERS[MANY])


@pytest.mark.parametrize(
    "dims",
    [
        lambda b, s, n: [(b * s).bit_length()],
        lambda b, s, n: [s // 3],
        lambda b, s, n: [max(b * 1000, s)],
        lambda b, s, n: [10_000 - s],
    ],
    ids=["logarithm", "rounded down", "the larger of two", "falling"],
)
def test_a_dimension_that_is_no_formula_is_refused(dims: Dims) -> None:
    with pytest.raises(NotClosed, match=r"aten\.mm\.default in model has"):
        fitted(dims)


def test_the_check_finds_what_two_traces_do_not_show() -> None:
    """A dimension that is the tokens at the two shapes of the traces, and something else at the third."""
    samples, tokens, _ = held_out = MANY.examples()[2]

    def dims(*shape: int) -> list[int]:
        return [shape[1] + 576 * (shape[0] == samples)]

    assert fitted(dims, checked=False).sizes(held_out).tolist() == [2 * tokens]
    with pytest.raises(NotClosed, match=f"has {2 * (tokens + 576)} bytes, not {2 * tokens}"):
        fitted(dims)


def test_traces_that_ran_other_operators_are_refused() -> None:
    first, second, _ = MANY.examples()
    one, other = trace_of(tensor([first[1]])), trace_of(tensor([second[1]], op="aten.add.Tensor"))
    with pytest.raises(NotClosed, match="the operators depend on the shape"):
        fit([(first, one), (second, other)], None)


def test_a_check_that_ran_other_operators_is_refused() -> None:
    *made, third = [(shape, trace_of(tensor([shape[1]]))) for shape in MANY.examples()]
    more = trace_of(*third[1].storages, tensor([3]))
    with pytest.raises(NotClosed, match="the operators depend on the shape or on the number of layers"):
        fit(made, (third[0], more))


def test_bytes_that_are_no_product_are_a_formula_of_their_own() -> None:
    """A padded storage: more bytes than its tensor has."""

    def padded(samples: int, tokens: int, images: int) -> Trace:
        return trace_of(tensor([samples, tokens])._replace(nbytes=samples * (-(-tokens // 32) * 32) * 2))

    *made, held_out = [(shape, padded(*shape)) for shape in MANY.examples()]
    form = fit(made, held_out)
    assert form.sizes((4, 2623, 4)).tolist() == [4 * 2624 * 2]


def test_a_size_may_be_a_function_of_formulas() -> None:
    def scratch(samples: int, tokens: int, images: int) -> Trace:
        arguments = (80, samples * tokens, 51200)
        return trace_of(Storage(SIZES["index_sort"](*arguments), (), 1, kind(), NOWHERE, -1, "index_sort", arguments))

    *made, held_out = [(shape, scratch(*shape)) for shape in MANY.examples()]
    form = fit(made, held_out)
    for samples, tokens, images in OTHERS[MANY]:
        assert form.sizes((samples, tokens, images)).tolist() == [SIZES["index_sort"](80, samples * tokens, 51200)]


# Layers.


def layered(shape: Shape, units: int, full_units: int, collected: int = 1) -> Trace:
    """A stack of layers, each with a gradient; each keeps activations, which are freed after the stack, and has a norm.

    The norms of all gradients are stacked in the end, as where gradients are clipped.
    """
    rows: list[Storage] = []
    timeline: list[int] = []
    places: list[int] = []
    for layer in range(units):
        for n in range(1 + collected):
            timeline.append(len(rows))
            places.append(place(0, layer))
            row = tensor([shape[0], shape[1], 64]) if n else tensor([64, 64])
            role = row.kind if n else row.kind._replace(role="gradient")
            rows.append(row._replace(kind=role, home=place(0, layer), parameter=-1 if n else layer))
    kept = [number for number, row in enumerate(rows) if row.parameter < 0]
    timeline += [len(rows), *(~number for number in kept)]
    places += [NOWHERE] * (1 + len(kept))
    norms = tensor([units], 4, "aten.stack.default")
    rows.append(norms._replace(kind=norms.kind._replace(phase="optimizer")))
    parameters = [Parameter(f"layers.{n}.weight", (64, 64), "bfloat16", True, "language") for n in range(units)]
    stack = Stack("layers", 0, 1, units, full_units, 0)
    return Trace(rows, timeline, places, [Piece("first", 0, len(timeline))], [(0, "forward")], [stack], parameters)


def deep(full_units: int, collected: int = 1) -> ClosedForm:
    *made, held_out = MANY.examples()
    traces = [(shape, layered(shape, UNITS, full_units, collected)) for shape in made]
    return fit(traces, (held_out, layered(held_out, UNITS + 1, full_units, collected)))


def test_layers_that_were_left_out_are_there() -> None:
    form, shape = deep(32), (8, 2623, 8)
    whole = layered(shape, 32, 32)
    assert form.timeline == whole.timeline
    assert [form.sizes(shape)[n] for n in form.formula] == [row.nbytes for row in whole.storages]
    assert form.layer == [layer for layer in range(32) for _ in range(2)] + [-1]
    assert form.parameters == whole.parameters
    assert form.trained == 32
    assert len(form.formulas) == 3


def test_layers_that_end_in_another_order_are_refused() -> None:
    """Each layer leaves two storages, which are freed layer by layer; the unrolling would free all of one kind first."""
    with pytest.raises(NotClosed, match="the operators depend on the shape or on the number of layers"):
        deep(32, collected=2)


def test_layers_that_do_not_repeat_are_refused() -> None:
    *made, held_out = MANY.examples()
    traces = [(shape, layered(shape, UNITS, 32)) for shape in made]
    for _, trace in traces:
        trace.places[0] = place(0, 2)
    with pytest.raises(NotPeriodic):
        fit(traces, (held_out, layered(held_out, UNITS + 1, 32)))


def test_a_row_for_each_trained_parameter_grows_with_the_layers() -> None:
    form = deep(40)
    assert form.sizes((2, 100, 2))[form.formula[-1]] == 40 * 4
    assert form.formulas[form.formula[-1]].dimensions == (Dimension(FEATURES.index("trained"), 1, 0),)


def test_trained_parameters_without_a_gradient_have_no_row() -> None:
    """LLaVA trains a tower whose last layer is never run: the last two of the parameters have no gradient to be clipped."""
    *made, held_out = MANY.examples()

    def trace(shape: Shape, units: int) -> Trace:
        found = layered(shape, units, 32)
        found.parameters += [Parameter(f"post.{n}", (64,), "bfloat16", True, "vision") for n in range(2)]
        return found

    form = fit([(shape, trace(shape, UNITS)) for shape in made], (held_out, trace(held_out, UNITS + 1)))
    assert form.sizes((2, 100, 2))[form.formula[-1]] == 32 * 4


# The form by itself.


def form_of(*formulas: Formula, parameters: Sequence[Parameter] = ()) -> ClosedForm:
    numbers, none = list(range(len(formulas))), [-1] * len(formulas)
    return ClosedForm(list(formulas), [kind()], numbers, [0] * len(formulas), none, none, numbers, parameters=list(parameters))


def dimension(name: str, factor: int = 1, offset: int = 0) -> Dimension:
    return Dimension(FEATURES.index(name), factor, offset)


def test_dimensions_and_sizes_of_formulas() -> None:
    frozen = Parameter("w", (2,), "bfloat16", False, "vision")
    form = form_of(
        Formula((dimension("samples"), dimension("1", 32), dimension("tokens", 1, -1), dimension("tokens")), 4),
        Formula((dimension("images", 576), dimension("trained", 2, 1)), 2),
        Formula((), 8),
        Formula((dimension("1", 80), dimension("samples*tokens"), dimension("1", 5)), 1, "index_sort"),
        parameters=[frozen, frozen._replace(trainable=True)],
    )
    form.kinds.append(kind()._replace(role="gradient"))
    form.kind[1], form.parameter[1] = 1, 1
    assert form.dimensions((2, 10, 3)).tolist() == [[2, 32, 9, 10], [3 * 576, 3, 1, 1], [1, 1, 1, 1], [80, 20, 5, 1]]
    assert form.sizes((2, 10, 3)).tolist() == [2 * 32 * 9 * 10 * 4, 3 * 576 * 3 * 2, 8, SIZES["index_sort"](80, 20, 5)]
    assert form.sizes((2, 10, 0)).tolist()[1] == 0


def test_a_form_without_formulas_has_no_sizes() -> None:
    assert form_of().sizes((1, 1, 0)).tolist() == []


def test_sizes_are_exact_far_beyond_any_card() -> None:
    """A million tokens, eager: 2^61 bytes are still whole numbers."""
    form = form_of(Formula((dimension("samples"), dimension("1", 64), dimension("tokens"), dimension("tokens")), 4))
    assert form.sizes((64, 1_000_000, 0)).tolist() == [64 * 64 * 10**12 * 4]


@pytest.mark.parametrize("tokens", [10**9, 10**10])
def test_sizes_that_no_integer_of_64_bits_holds_are_refused(tokens: int) -> None:
    form = form_of(Formula((dimension("samples"), dimension("1", 64), dimension("tokens"), dimension("tokens")), 4))
    with pytest.raises(UserError, match="needs more than 4 EiB"):
        form.sizes((8, tokens, 0))


def test_numbers_that_are_no_bytes_may_be_large() -> None:
    """Memory-efficient attention of Phi-2 on 20,000 tokens: nine numbers whose product is beyond 2^63, for 2.5 GiB."""
    tokens = dimension("tokens")
    heads, *rest = (Dimension(0, number, 0) for number in (32, 80, 80, 128, 128, 1))
    form = form_of(Formula((dimension("samples"), heads, tokens, tokens, *rest), 1, "efficient_workspace"))
    expected = SIZES["efficient_workspace"](8, 32, 20_000, 20_000, 80, 80, 128, 128, 1)
    assert 0 < expected < 1 << 40
    assert form.sizes((8, 20_000, 0)).tolist() == [expected]


def test_a_form_survives_json() -> None:
    form = deep(12)
    assert form.sizes((2, 512, 2)).size
    copy = ClosedForm.from_json(json.loads(json.dumps(form.to_json())))
    assert copy == form
    assert copy.sizes((3, 700, 3)).tolist() == form.sizes((3, 700, 3)).tolist()
    assert copy.to_json() == form.to_json()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("formulas"),
        lambda data: data.update(surplus=1),
        lambda data: data.update(kinds=[["one word"]]),
        lambda data: data.update(parameters=[["w"]]),
        lambda data: data.update(marks=[["late", "forward"]]),
    ],
    ids=["missing", "surplus", "short kind", "short parameter", "no number"],
)
def test_what_is_no_form_is_not_read(damage: Callable[[dict[str, object]], object]) -> None:
    data = deep(8).to_json()
    damage(data)
    with pytest.raises((TypeError, ValueError, KeyError, IndexError)):
        ClosedForm.from_json(data)


def test_a_trace_at_one_shape_is_a_form_without_variables() -> None:
    trace = trace_of(tensor([2, 100, 64]), tensor([2, 100])._replace(nbytes=512), tensor([]))
    form = constant_form(trace)
    for shape in [(2, 100, 0), (8, 3000, 9)]:
        assert form.sizes(shape)[form.formula].tolist() == [2 * 100 * 64 * 2, 512, 2]
    assert form.dimensions((8, 3000, 9))[form.formula[0]].tolist() == [2, 100, 64]


# Families.


@pytest.mark.parametrize(
    ("shape", "loops", "family"),
    [
        ((1, 100, 0), False, Family(True, 0)),
        ((1, 100, 1), False, Family(True, 1)),
        ((1, 100, 2), False, Family(True, 2)),
        ((1, 100, 9), False, Family(True, 2)),
        ((2, 100, 0), False, Family(False, 0)),
        ((9, 100, 9), False, Family(False, 2)),
        ((9, 100, 9), True, Family(False, -9)),
        ((1, 100, 1), True, Family(True, 1)),
        ((1, 100, 0), True, Family(True, 0)),
    ],
)
def test_a_shape_has_a_family(shape: Shape, loops: bool, family: Family) -> None:
    assert Family.of(shape, loops) == family


@given(st.booleans(), st.sampled_from([0, 1, 2, -2, -3, -8]), st.integers(0, 5000))
def test_the_examples_of_a_family_belong_to_it(one_sample: bool, images: int, image_tokens: int) -> None:
    family = Family(one_sample, images)
    shapes = family.examples(image_tokens)
    assert len({shape[1] for shape in shapes}) == 3
    for samples, tokens, count in shapes:
        assert Family.of((samples, tokens, count), images < 0) == family
        most = -(-count // samples)
        assert tokens > most * image_tokens
        assert samples * tokens >= LEAST_ROWS
    for _, tokens, _ in shapes[:2]:
        assert tokens % 128 == 1


def alike(family: Family, image_tokens: int) -> set[tuple[str, str]]:
    """Features that, at the two shapes that formulas are made from, are a multiple of an earlier one that they are not."""
    first, second, _ = family.examples(image_tokens)
    other = (first[0], first[1] + 777, first[2])
    one, two, three = (features(shape, 0) for shape in (first, second, other))
    found = set()
    for name, earlier in itertools.combinations(VARYING[::-1], 2):
        if one[name] == two[name] or one[earlier] in (0, two[earlier]) or one[name] % one[earlier]:
            continue
        factor = one[name] // one[earlier]
        multiple = two[name] == factor * two[earlier]
        if multiple and not (family.one_sample and three[name] == factor * three[earlier]):
            found.add((name, earlier))
    return found


FAMILIES = [Family(False, images) for images in (0, 2, -2, -8)] + [Family(True, images) for images in (0, 1, 2, -2, -8)]


def test_the_examples_tell_all_features_apart() -> None:
    """Whatever the tokens of an image: a formula that is found by mistake fails its check, and the model has no form."""
    image_tokens = [*range(0, 1200, 7), 2048, 2880, 4096]
    found = {(family, tokens): alike(family, tokens) for family in FAMILIES for tokens in image_tokens}
    assert not {at: names for at, names in found.items() if names}


@pytest.mark.parametrize(
    ("rows", "feature"), [(14, "trained"), (28, "trained"), (10, "trained in float32"), (4, "trained in 16 bits"), (9, "1")]
)
def test_rows_for_gradients_of_one_dtype_go_with_their_number(rows: int, feature: str) -> None:
    table = feature_table([((2, 8, 0), 14, 10), ((3, 9, 0), 14, 10)])
    found = fit_dimension((rows, rows), table, True, "norms")
    assert FEATURES[found.feature] == feature
    assert found.factor * features((5, 7, 0), 14, 10)[feature] == rows
    assert FEATURES[fit_dimension((rows, rows), table, False, "others").feature] == "1"
