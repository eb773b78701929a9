"""What operators compute and move, by hand; and as formulas, which come out as they were put in or say that they do not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oomph.core.closed_form import ClosedForm, Family, constant_form, fit
from oomph.core.dimensions import Dimension, feature_table, nearest_dimension
from oomph.core.trace import NOWHERE, Operation, Stack, Trace, place
from oomph.core.unroll import UNITS, repeats
from oomph.core.work import Row, Sample, Work, fit_work
from oomph.live.work import Done, Meter

aten = torch.ops.aten
Shape = tuple[int, int, int]

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
SHAPES: list[Shape] = [(2, 2049, 4), (3, 3201, 9)]


def tensor(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run(func: Any, *args: Any, capability: tuple[int, int] | None = (8, 0), **kwargs: Any) -> Done | None:
    return Meter(capability).done(func, args, kwargs, func(*args, **kwargs))


def total(terms: Sequence[tuple[int, ...]]) -> int:
    return sum(map(prod, terms))


HEADS = {"query": (2, 8, 64, 32), "key": (2, 2, 48, 32), "value": (2, 2, 48, 16)}
SCORES = 2 * 8 * 64 * 48

IMAGES = tensor(2, 3, 28, 28), tensor(16, 3, 14, 14)

FLOPS: dict[str, tuple[Any, list[Any], int]] = {
    "mm": (aten.mm.default, [tensor(3, 5), tensor(5, 7)], 2 * 3 * 5 * 7),
    "addmm": (aten.addmm.default, [tensor(7), tensor(3, 5), tensor(5, 7)], 2 * 3 * 5 * 7),
    "addmm_": (aten.addmm_.default, [tensor(3, 7), tensor(3, 5), tensor(5, 7)], 2 * 3 * 5 * 7),
    "bmm": (aten.bmm.default, [tensor(4, 3, 5), tensor(4, 5, 7)], 4 * 2 * 3 * 5 * 7),
    "baddbmm": (aten.baddbmm.default, [tensor(4, 3, 7), tensor(4, 3, 5), tensor(4, 5, 7)], 4 * 2 * 3 * 5 * 7),
    "a convolution": (
        aten.convolution.default,
        [*IMAGES, None, [14, 14], [0, 0], [1, 1], False, [0, 0], 1],
        2 * (2 * 16 * 2 * 2) * (3 * 14 * 14),
    ),
    "a convolution's gradients": (
        aten.convolution_backward.default,
        [tensor(2, 16, 2, 2), *IMAGES, [0], [14, 14], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]],
        2 * (2 * 16 * 2 * 2) * (3 * 14 * 14),
    ),
    "a copy": (aten.clone.default, [tensor(3, 5)], 0),
}


@pytest.mark.parametrize("name", FLOPS)
def test_floating_point_operations_are_two_for_each_multiplication(name: str) -> None:
    func, args, expected = FLOPS[name]
    done = run(func, *args)
    assert done is not None
    assert total(done.flops) == expected
    assert done.dtype == "bfloat16"


def test_attention_makes_two_products_and_its_backward_five() -> None:
    query, key, value = (tensor(*shape) for shape in HEADS.values())
    forward = Meter(None).done(aten._scaled_dot_product_flash_attention.default, (query, key, value), {}, ())
    assert forward is not None
    assert total(forward.flops) == 2 * SCORES * (32 + 16)
    grad = tensor(2, 8, 64, 16)
    args = (grad, query, key, value, grad, tensor(2, 8, 64, dtype=FP32))
    backward = Meter(None).done(aten._scaled_dot_product_flash_attention_backward.default, args, {}, ())
    assert backward is not None
    assert total(backward.flops) == 2 * SCORES * (3 * 32 + 2 * 16)


GROUPS = torch.empty(4, dtype=torch.int32, device="meta")


@pytest.mark.parametrize(
    ("left", "right", "flops"),
    [
        ((96, 8), (4, 8, 16), 2 * 96 * 8 * 16),
        ((8, 96), (96, 16), 2 * 96 * 8 * 16),
        ((4, 8, 16), (16, 96), 2 * 96 * 8 * 16),
        ((4, 24, 8), (4, 8, 16), 2 * 96 * 8 * 16),
    ],
)
def test_each_row_is_multiplied_by_the_matrix_of_one_group(left: tuple[int, ...], right: tuple[int, ...], flops: int) -> None:
    for capability, launches in (((9, 0), 1), ((8, 0), 4)):
        args = (tensor(*left), tensor(*right), GROUPS)
        done = Meter(capability).done(aten._grouped_mm.default, args, {}, tensor(96, 16))
        assert done is not None
        assert (total(done.flops), done.launches) == (flops, launches)


def test_a_loop_over_groups_launches_each_product() -> None:
    rows, weight, grad = tensor(96, 8, dtype=FP32), tensor(4, 8, 16, dtype=FP32), tensor(96, 16, dtype=FP32)
    looped = torch.ops.transformers
    forward = Meter((9, 0)).done(looped.grouped_mm_fallback.default, (rows, weight, GROUPS), {}, grad)
    outputs = (rows.clone(), weight.clone())
    backward = Meter((9, 0)).done(looped.grouped_mm_fallback_backward.default, (rows, weight, GROUPS, grad), {}, outputs)
    assert forward is not None
    assert backward is not None
    assert (total(forward.flops), forward.launches) == (2 * 96 * 8 * 16, 4)
    assert (total(backward.flops), backward.launches) == (4 * 96 * 8 * 16, 8)


INDEX = tensor(10, dtype=INT64)
X = tensor(3, 5)

BYTES: dict[str, tuple[Any, list[Any], int]] = {
    "inputs and output": (aten.add.Tensor, [tensor(3, 5), tensor(3, 5)], 3 * 15 * 2),
    "one input twice": (aten.mul.Tensor, [X, X], 2 * 15 * 2),
    "an expanded input": (aten.add.Tensor, [tensor(3, 5), tensor(1, 5).expand(3, 5)], (15 + 5 + 15) * 2),
    "two dtypes": (aten.add.Tensor, [tensor(3, 5), tensor(3, 5, dtype=FP32)], 15 * (2 + 4 + 4)),
    "in place": (aten.add_.Tensor, [tensor(3, 5), tensor(3, 5)], (2 + 1) * 15 * 2),
    "in place without a look": (aten.copy_.default, [tensor(3, 5), tensor(3, 5)], 2 * 15 * 2),
    "zeros": (aten.zero_.default, [tensor(3, 5)], 15 * 2),
    "the shape alone": (aten.zeros_like.default, [tensor(3, 5)], 15 * 2),
    "two outputs": (aten.native_dropout.default, [tensor(3, 5), 0.1, True], 15 * (2 + 2 + 1)),
    "joined": (aten.cat.default, [[tensor(3, 5), tensor(4, 5)]], 2 * 35 * 2),
    "an embedding": (aten.embedding.default, [tensor(1000, 8), INDEX], 10 * 8 + 2 * 10 * 8 * 2),
    "an index": (aten.index.Tensor, [tensor(1000, 8), [INDEX]], 10 * 8 + 2 * 10 * 8 * 2),
    "rows": (aten.index_select.default, [tensor(1000, 8), 0, INDEX], 10 * 8 + 2 * 10 * 8 * 2),
    "put": (aten.index_put_.default, [tensor(1000, 8), [INDEX], tensor(10, 8)], 10 * 8 + 2 * 10 * 8 * 2),
    "put and added": (aten.index_put_.default, [tensor(1000, 8), [INDEX], tensor(10, 8), True], 10 * 8 + 3 * 10 * 8 * 2),
    "added": (aten.index_add_.default, [tensor(1000, 8), 0, INDEX, tensor(10, 8)], 10 * 8 + 3 * 10 * 8 * 2),
    "copied": (aten.index_copy_.default, [tensor(1000, 8), 0, INDEX, tensor(10, 8)], 10 * 8 + 2 * 10 * 8 * 2),
    "put into a copy": (
        aten.index_put.default,
        [tensor(1000, 8), [INDEX], tensor(10, 8)],
        10 * 8 + 2 * 10 * 8 * 2 + 2 * 8000 * 2,
    ),
    "a number scattered": (aten.scatter_.value, [tensor(1000), 0, INDEX, 1], 10 * 8 + 10 * 2),
    "the targets' losses": (aten.nll_loss_forward.default, [tensor(10, 500, dtype=FP32), INDEX, None, 2, -100], 10 * (8 + 4)),
    "the losses' gradient": (
        aten.nll_loss_backward.default,
        [tensor(dtype=FP32), tensor(10, 500, dtype=FP32), INDEX, None, 2, -100, tensor(dtype=FP32)],
        10 * 8 + 10 * 500 * 4,
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_traffic_is_what_an_ideal_kernel_moves(name: str) -> None:
    func, args, expected = BYTES[name]
    done = run(func, *args)
    assert done is not None
    assert total(done.traffic) == expected
    assert done.launches == 1


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.view.default, [tensor(3, 5), [15]]),
        (aten.t.default, [tensor(3, 5)]),
        (aten.expand.default, [tensor(1, 5), [3, 5]]),
        (aten.split.Tensor, [tensor(4, 5), 2]),
        (aten.detach.default, [tensor(3, 5)]),
        (aten._unsafe_view.default, [tensor(3, 5), [15]]),
        (aten.empty_like.default, [tensor(3, 5)]),
        (aten.new_empty.default, [tensor(3, 5), [7]]),
    ],
)
def test_views_and_allocations_launch_nothing(func: Any, args: list[Any]) -> None:
    assert run(func, *args) is None


def test_an_operator_over_lists_is_one_launch_with_a_part_for_each_position() -> None:
    weights, grads = [tensor(3, 5), tensor(7)], [tensor(3, 5), tensor(7)]
    done = run(aten._foreach_addcmul_.Scalar, weights, grads, grads)
    assert done is not None
    assert (done.launches, done.traffic) == (1, ())
    assert [part.first is weight for part, weight in zip(done.parts, weights, strict=True)] == [True, True]
    assert [total(part.traffic) for part in done.parts] == [3 * 15 * 2, 3 * 7 * 2]


def test_a_list_that_is_made_is_written() -> None:
    done = run(aten._foreach_sqrt.default, [tensor(3, 5)])
    assert done is not None
    assert [total(part.traffic) for part in done.parts] == [2 * 15 * 2]


def test_a_fused_adamw_reads_four_tensors_and_writes_three() -> None:
    lists = [[tensor(3, 5)] for _ in range(4)]
    steps = [torch.empty((), dtype=FP32, device="meta")]
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False, "maximize": False}
    done = Meter(None).done(aten._fused_adamw_.default, (*lists, [], steps), settings, None)
    assert done is not None
    assert [total(part.traffic) for part in done.parts] == [7 * 15 * 2 + 4]


# Formulas.


def operation(
    traffic: Sequence[int], flops: Sequence[int] = (), name: str = "aten.mm.default", where: int = NOWHERE
) -> Operation:
    sums = (tuple(flops),) if flops else ()
    return Operation("next", "forward", name, "bfloat16", where, 1, sums, (tuple(traffic),))


def sample(shape: Shape, *operations: Operation, trained: int = 4) -> Sample:
    return Sample(shape, trained, operations)


Dims = Callable[[int, int, int], Sequence[int]]


def fitted(dims: Dims, held_out: Dims | None = None) -> Work:
    made = [sample(shape, operation([2, *dims(*shape)], [2, *dims(*shape)])) for shape in SHAPES]
    checked = (5, 2621, 5)
    check = sample(checked, operation([2, *(held_out or dims)(*checked)], [2, *(held_out or dims)(*checked)]))
    return fit_work(made, [], 4, (check, []))


@pytest.mark.parametrize(
    "dims",
    [
        lambda b, s, n: [b, s, 64],
        lambda b, s, n: [b * s, 64],
        lambda b, s, n: [32 * b, s, s],
        lambda b, s, n: [n, 577, 64],
        lambda b, s, n: [b, s - 1, 64],
    ],
)
@given(shape=st.tuples(st.integers(2, 9), st.integers(1024, 9000), st.integers(2, 40)))
def test_formulas_hold_at_other_shapes(dims: Dims, shape: Shape) -> None:
    work = fitted(dims)
    flops, traffic = work.evaluate(shape)
    assert flops.tolist() == traffic.tolist() == [2 * prod(dims(*shape))]
    assert work.note == ""
    assert not work.constant


def test_a_dimension_without_a_formula_has_the_nearest_and_says_so() -> None:
    work = fitted(lambda b, s, n: [b, 10_000 - s])
    assert "operators with the nearest formula, since none fits: 1" in work.note
    assert "at 5 x 2621 x 5 the formulas give" in work.note
    _, traffic = work.evaluate(SHAPES[1])
    assert traffic.tolist() == [2 * 3 * (10_000 - 3201)]


def test_a_formula_that_fails_its_check_says_by_how_much() -> None:
    work = fitted(lambda b, s, n: [b, s], lambda b, s, n: [b, s, 2])
    assert work.note == "at 5 x 2621 x 5 the formulas give -50.0% floating-point operations and -50.0% bytes"


def test_operators_that_one_trace_lacks_are_left_out() -> None:
    more = [operation([2, 8]), operation([4, 8], name="aten.add.Tensor"), operation([2, 8])]
    work = fit_work([sample(SHAPES[0], *more), sample(SHAPES[1], more[0], more[2])], [], 4, None)
    assert [(row.name, row.times) for row in work.rows] == [("aten.mm.default", 2)]
    assert work.note == "operators left out, since they depend on the shape: 1"


@given(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)))
def test_the_nearest_formula_goes_through_the_last_value(values: tuple[int, int]) -> None:
    table = feature_table([(shape, 4, 0) for shape in SHAPES])
    nearest = nearest_dimension(values, table)
    at = [nearest.factor * x + nearest.offset for x in table[nearest.feature]]
    assert at[1] == values[1]
    assert abs(at[0] - values[0]) <= abs(values[1] - values[0])


def test_equal_operators_become_one_row() -> None:
    rows = [operation([2, 3, 8]), operation([2, 8, 3]), operation([2, 3, 8]), operation([2, 3, 8], name="aten.add.Tensor")]
    work = fit_work([sample(SHAPES[0], *rows)], [], 4, None)
    assert [(row.name, row.times) for row in work.rows] == [("aten.mm.default", 3), ("aten.add.Tensor", 1)]
    assert work.products == [(Dimension(0, 48, 0),)]


def test_like_terms_are_added_up() -> None:
    twice = [operation([2, *shape[:2]])._replace(traffic=((2, *shape[:2]), (4, *shape[:2]))) for shape in SHAPES]
    made = [sample(shape, added) for shape, added in zip(SHAPES, twice, strict=True)]
    work = fit_work(made, [], 4, None)
    assert len(work.products) == 1
    assert work.evaluate((7, 100, 7))[1].tolist() == [6 * 700]


STACK = Stack("layers", 1, 2, UNITS, 40, 0)


def test_a_layer_that_stands_for_many_counts_as_often() -> None:
    """A layer before the repetition, then units of two layers; the unit in the middle stands for all but four."""
    layers = [operation([2, 8], where=place(0, layer)) for layer in range(STACK.layers)]
    work = fit_work([sample(SHAPES[0], operation([2, 8]), *layers)], [STACK], 4, None)
    assert sum(row.times for row in work.rows) == 1 + STACK.full_layers
    assert repeats([STACK], place(0, 5)) == 36
    assert repeats([STACK], place(0, 0)) == repeats([STACK], place(0, 3)) == repeats([STACK], NOWHERE) == 1
    assert repeats([STACK._replace(full_units=UNITS)], place(0, 5)) == 1


def test_one_number_for_each_gradient_follows_the_depth() -> None:
    stacked = Operation("step/optimizer", "optimizer", "aten.stack.default", "bfloat16", NOWHERE, 1, (), ((4, 12),))
    work = fit_work([sample(shape, stacked, trained=12) for shape in SHAPES], [], 500, None)
    assert work.evaluate((2, 1000, 2))[1].tolist() == [4 * 500]


def test_work_survives_json() -> None:
    work = fitted(lambda b, s, n: [b, s, 64])
    work.note = "approximate"
    form = ClosedForm(work=work)
    back = ClosedForm.from_json(json.loads(json.dumps(form.to_json())))
    assert back.work == work
    assert isinstance(back.work.rows[0], Row)


def test_the_form_of_one_trace_has_its_work_at_that_shape_alone() -> None:
    trace = Trace(operations=[operation([2, 3, 8], [2, 3, 8])])
    work = constant_form(trace).work
    assert work.constant
    assert [column.tolist() for column in work.evaluate((9, 999, 9))] == [[48], [48]]


def test_work_that_is_no_formula_leaves_the_form_as_it_is() -> None:
    """Sizes in memory are exact or there is no form; what operators do may be approximate."""
    made = [(shape, Trace(operations=[operation([2, value])])) for shape, value in zip(SHAPES, (101, 57), strict=True)]
    held_out = (Family(False, 2).examples()[2], Trace(operations=[operation([2, 99])]))
    form = fit(made, held_out)
    assert "nearest formula" in form.work.note


def test_a_form_without_operators_has_no_work() -> None:
    flops, traffic = Work().evaluate((2, 100, 2))
    assert flops.tolist() == traffic.tolist() == []
