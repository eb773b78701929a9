"""The sentences about what a change does to the mathematics, and that every change a search makes has them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import pytest

from oomph.core.exactness import change, exactness, is_exact
from oomph.core.space import KNOBS
from oomph.records import Choice

ASKED = Choice(
    micro_batch=8,
    accumulation=2,
    effective_batch=128,
    gpus=8,
    checkpointing="blocks",
    attention="eager-fp32",
    loss="full-shifted",
    optimizer="adamw-foreach",
    master_weights=True,
    sharding="zero2",
    eval_batch=4,
)
SAME = "the same gradient and update in exact arithmetic; in floating point, "


def other(**knobs: Any) -> Choice:
    return replace(ASKED, **knobs)


@pytest.mark.parametrize("routes", [False, True])
def test_the_configuration_itself_is_said_to_be_that(routes: bool) -> None:
    assert exactness(ASKED, ASKED, routes, False) == "the configuration itself"


@pytest.mark.parametrize(
    ("knobs", "reasons"),
    [
        ({"micro_batch": 4, "accumulation": 4}, "sums run in another order"),
        ({"loss": "chunked"}, "sums run in another order"),
        ({"loss": "chunked", "micro_batch": 16, "accumulation": 1}, "sums run in another order"),
        ({"sharding": "fsdp2"}, "sums over GPUs run in another order"),
        ({"attention": "sdpa"}, "attention rounds elsewhere"),
        ({"optimizer": "adamw-fused"}, "the optimizer's kernel rounds elsewhere"),
        ({"optimizer_offload": True}, "the optimizer's kernel rounds elsewhere"),
        ({"attention": "sdpa", "loss": "full"}, "sums run in another order and attention rounds elsewhere"),
        (
            {"attention": "sdpa", "loss": "full", "sharding": "ddp", "optimizer_offload": True},
            "sums run in another order, sums over GPUs run in another order, attention rounds elsewhere and the optimizer's "
            "kernel rounds elsewhere",
        ),
    ],
)
def test_another_order_of_sums_is_named(knobs: dict[str, Any], reasons: str) -> None:
    assert is_exact(ASKED, other(**knobs), False)
    assert exactness(ASKED, other(**knobs), False, False) == SAME + reasons


@pytest.mark.parametrize(
    "knobs",
    [{"checkpointing": "none"}, {"checkpointing": "blocks-offload"}, {"vision_checkpointing": "blocks"}, {"eval_batch": 1}],
)
def test_what_is_only_kept_elsewhere_or_computed_twice_changes_no_bit(knobs: dict[str, Any]) -> None:
    assert exactness(ASKED, other(**knobs), False, False) == "the same operations on the same numbers"
    assert exactness(ASKED, other(expandable_segments=True, **knobs), False, False) == "the same operations on the same numbers"


@pytest.mark.parametrize("knobs", [{"precision": "float32"}, {"master_weights": False}, {"effective_batch": 64}])
def test_other_mathematics_is_said_to_be_that(knobs: dict[str, Any]) -> None:
    assert not is_exact(ASKED, other(**knobs), False)
    assert exactness(ASKED, other(**knobs), False, False).startswith("another mathematics: ")


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "adamw-8bit-paged"])
def test_states_of_eight_bits_are_another_mathematics_wherever_they_lie(optimizer: Any) -> None:
    small, elsewhere = other(optimizer=optimizer), other(optimizer="adamw-8bit")
    for pair in ((ASKED, small), (small, ASKED)):
        assert not is_exact(*pair, False)
        assert exactness(*pair, False, False).startswith("another mathematics: ")
    assert is_exact(elsewhere, small, False)
    same = "the configuration itself" if small == elsewhere else "the same operations on the same numbers"
    assert exactness(elsewhere, small, False, False) == same
    moved = other(optimizer="adamw-8bit-paged")
    assert change("optimizer", elsewhere, moved).startswith("adamw-8bit becomes adamw-8bit-paged: the driver moves ")
    assert change("optimizer", moved, elsewhere) == "adamw-8bit-paged becomes adamw-8bit: all states stay on the GPU"


def test_a_token_may_take_another_expert_where_something_rounds_elsewhere() -> None:
    text = exactness(ASKED, other(attention="sdpa"), True, False)
    assert text == f"{SAME}attention rounds elsewhere; a token whose best experts are nearly equal may take another one"
    assert exactness(ASKED, other(checkpointing="none"), True, False) == "the same operations on the same numbers"


def test_dropout_draws_other_masks_where_the_batch_is_cut_otherwise() -> None:
    recut, same = other(micro_batch=4, accumulation=4), other(attention="sdpa")
    assert not is_exact(ASKED, recut, True)
    text = exactness(ASKED, recut, False, True)
    assert text.startswith("the same but for dropout, which draws other masks for other micro-batches; in floating point, ")
    assert is_exact(ASKED, same, True)
    assert exactness(ASKED, same, False, True) == exactness(ASKED, same, False, False)


def test_every_knob_is_mathematics_or_rounding_or_neither() -> None:
    """A new knob has to be thought about: this list is what has been."""
    keeps_every_bit = {"checkpointing", "vision_checkpointing", "expandable_segments", "eval_batch"}
    follows = {"nodes", "gpus", "accumulation"}
    rounds = {"micro_batch", "loss", "sharding", "attention", "optimizer", "optimizer_offload"}
    mathematics = {"effective_batch", "precision", "master_weights"}
    assert keeps_every_bit | rounds | mathematics | follows == {field.name for field in fields(Choice)}
    values = {"micro_batch": 4, **{knob: next(v for v in KNOBS[knob] if v != getattr(ASKED, knob)) for knob in KNOBS}}
    for knob in rounds:
        assert exactness(ASKED, other(**{knob: values[knob]}), False, False).startswith(SAME), knob


# Changes.


def test_a_change_says_what_was_and_what_is_and_why() -> None:
    assert change("attention", ASKED, other(attention="sdpa")) == (
        "eager-fp32 becomes sdpa: PyTorch's fused kernels never write out the scores"
    )
    assert change("optimizer_offload", ASKED, other(optimizer_offload=True)).startswith("off becomes on: AdamW's states are in")


def test_another_cut_says_how_often() -> None:
    text = change("micro_batch", ASKED, other(micro_batch=4, accumulation=4))
    assert text == "8 × 2 becomes 4 × 4, the same samples of a GPU in other pieces"


@pytest.mark.parametrize("knob", sorted(KNOBS))
def test_every_value_that_a_search_can_choose_has_its_reason(knob: str) -> None:
    """But for no sharding, which one GPU has in any case, and what the search never prefers."""
    never = {("sharding", "none"), ("loss", "full-shifted")}
    for value in KNOBS[knob]:
        before = next(v for v in KNOBS[knob] if v != value)
        text = change(knob, other(**{knob: before}), other(**{knob: value}))
        assert (": " in text) == ((knob, value) not in never), text
        assert "_" not in text


def test_every_value_of_every_knob_can_be_named() -> None:
    hints = get_type_hints(Choice)
    for knob in KNOBS:
        for value in get_args(hints[knob]) or (False, True):
            assert change(knob, ASKED, other(**{knob: value})).partition(" becomes ")[2]


def test_a_load_that_is_evened_within_micro_batches_is_another_loss_for_another_cut() -> None:
    recut = other(micro_batch=1, accumulation=ASKED.micro_batch * ASKED.accumulation)
    assert not is_exact(ASKED, recut, False, True)
    assert "the experts' load, which is evened or limited within each micro-batch" in exactness(ASKED, recut, True, False, True)
    assert " and the experts' load" in exactness(ASKED, recut, True, True, True)
    same = other(attention="sdpa")
    assert is_exact(ASKED, same, False, True)
    assert exactness(ASKED, same, True, False, True) == exactness(ASKED, same, True, False)
