"""Bounds are below what a replay gives, for every sharding, and close enough to be of use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from oomph.core.choices import cuts, resolve, with_micro_batch
from oomph.core.devices import find_gpu
from oomph.core.eight_bit import EIGHT_BIT
from oomph.core.events import Events
from oomph.core.space import KNOBS
from oomph.core.stage import StageModel
from oomph.errors import UserError
from oomph.recipe import Recipe
from oomph.records import Choice

A100 = find_gpu("A100-SXM4-40GB")
PARTS = {"vision": "clip-vit-large-patch14-336-vision", "projector": "mlp2x_gelu", "language": "phi-2"}
KINDS = {**KNOBS, "optimizer": ("adamw-fused", "adamw-foreach", "adamw-loop"), "precision": ("bfloat16", "float32")}


class Wanted(NamedTuple):
    """A stage with definite settings, as a recipe and as the choice that it makes."""

    recipe: Recipe
    choice: Choice

    def model(self, source: Any) -> StageModel:
        return StageModel(self.recipe, self.recipe.stages[0], A100, source)


def wanted(gpus: int, nodes: int, batch: int, tokens: int, images: int, train: dict[str, Any], **memory: Any) -> Wanted:
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "model": PARTS,
            "data": {"max_tokens": tokens, "images_per_sample": images},
            "hardware": {"gpu": A100.name, "gpus": gpus, "nodes": nodes},
            "memory": memory,
            "stages": [{"name": "tune", "train": train, "effective_batch": batch}],
        }
    )
    return Wanted(recipe, resolve(recipe.stages[0], recipe, A100)[0])


rates = st.sampled_from(["frozen", 1e-4])


CLUSTERS = [(1, 1), (2, 1), (3, 1), (4, 2), (8, 2), (8, 8)]


@st.composite
def stages(draw: st.DrawFn, clusters: Sequence[tuple[int, int]] = CLUSTERS, **fixed: Any) -> Wanted:
    """Any knobs that can stand together, some of them fixed; any parts that train."""
    gpus, nodes = draw(st.sampled_from(clusters))
    memory = {knob: draw(st.sampled_from(values)) for knob, values in KINDS.items()}
    memory |= {"master_weights": draw(st.booleans()), **fixed}
    if (memory["sharding"] == "none") != (gpus == 1):
        memory["sharding"] = "ddp" if gpus > 1 else "none"
    train = {"language": draw(rates), "vision": draw(rates), "projector": "frozen", "head": draw(rates)}
    tokens, images = draw(st.integers(64, 700)), draw(st.integers(0, 3))
    assume(any(rate != "frozen" for rate in train.values()))
    try:
        made = wanted(gpus, nodes, draw(st.integers(gpus, 4 * gpus + 2)), tokens, images, train, **memory)
    except UserError:
        assume(False)
    every = cuts(made.choice, made.choice.sharding, every=True)
    return made._replace(choice=with_micro_batch(made.choice, draw(st.sampled_from(every)), "none"))


sizes = st.fixed_dictionaries(
    {
        "blocks": st.integers(1, 3),
        "towers": st.integers(0, 2),
        "width": st.sampled_from([24, 64, 100, 512]),
        "heads": st.integers(1, 5),
        "vocabulary": st.integers(2, 9000),
        "inner": st.integers(1, 5),
    }
)


TOWER_ALONE: dict[str, Any] = {"language": "frozen", "vision": 1e-4, "projector": "frozen", "head": 1e-4}
UNSEEN = {"checkpointing": "blocks", "vision_checkpointing": "none", "loss": "chunked"}


@settings(max_examples=150)
@given(stages(), sizes)
@example(wanted(1, 1, 4, 256, 0, TOWER_ALONE, **UNSEEN), {"width": 512, "vocabulary": 600})
@example(wanted(8, 2, 8, 64, 0, TOWER_ALONE, **UNSEEN), {"width": 24, "vocabulary": 2, "towers": 0, "blocks": 1})
def test_a_bound_is_never_above_what_is_allocated(by_hand: Any, stage: Wanted, size: dict[str, int]) -> None:
    """The examples train a tower that sees no image: it gets neither gradients nor states."""
    model = stage.model(by_hand(by_hand.SIZE(**size)))
    assert model.bound(stage.choice) <= model.predict(stage.choice).allocated_peak_bytes


def live_peak(events: Events) -> int:
    """The most bytes alive at one time, in blocks of 512, whatever the allocator makes of them."""
    alive = most = 0
    for segment in events.segments:
        for entry in segment.timeline * min(segment.repeat, 2):
            block = -(-events.sizes[entry if entry >= 0 else ~entry] // 512) * 512
            alive += block if entry >= 0 else -block
            most = max(most, alive)
    return most


ALONE: dict[str, Any] = {"clusters": [(1, 1)], "master_weights": False, "eval_batch": "none"}
without_sharding = st.one_of(
    stages(**ALONE, optimizer="adamw-fused"),
    *(stages(**ALONE, optimizer=optimizer, optimizer_offload=False) for optimizer in EIGHT_BIT),
)


@settings(max_examples=60)
@given(without_sharding, sizes)
def test_a_bound_without_sharding_is_what_lives(by_hand: Any, stage: Wanted, size: dict[str, int]) -> None:
    """But for what an optimizer's step makes for the moment, and for rounding up small parameters and states."""
    model = stage.model(by_hand(by_hand.SIZE(**size)))
    laid = model.lay_out(stage.choice)
    rounding = 512 * (5 * len(laid.form.parameters) + 3)
    assert 0 <= live_peak(laid.events) - model.bound(stage.choice) <= rounding


SPLIT = {"language": 1e-4, "vision": "frozen", "projector": "frozen", "head": 1e-4}


def bound(source: Any, gpus: int = 4, nodes: int = 1, micro_batch: int = 2, **memory: Any) -> int:
    """A bound of a stage in which everything trains, one micro-batch a step unless the recipe says otherwise."""
    memory = {"checkpointing": "blocks", "loss": "chunked", **memory}
    stage = wanted(gpus, nodes, 4 * gpus, 128, 0, SPLIT, micro_batch=micro_batch, **memory)
    return stage.model(source).bound(stage.choice)


def test_bounds_know_what_is_divided(by_hand: Any) -> None:
    """Large weights and few activations: the more is divided, the less is left on a rank."""
    source = by_hand(by_hand.SIZE(width=512, vocabulary=8192))
    divided = ["zero1", "zero2", "zero3"]
    zero = [bound(source, sharding=sharding, precision="float32") for sharding in divided]
    assert zero == sorted(zero, reverse=True)
    assert bound(source, sharding="ddp") > bound(source, sharding="fsdp2")
    assert bound(source, sharding="fsdp2-hybrid", nodes=2) > bound(source, sharding="fsdp2", nodes=2)
    assert bound(source, gpus=8, sharding="fsdp2") < bound(source, gpus=4, sharding="fsdp2")


@pytest.mark.parametrize(("gpus", "sharding"), [(1, "none"), (4, "ddp"), (4, "fsdp2"), (4, "fsdp2-no-reshard")])
def test_states_in_host_memory_are_not_counted(by_hand: Any, gpus: int, sharding: str) -> None:
    source = by_hand(by_hand.SIZE(width=512, vocabulary=8192))
    here, there = (bound(source, gpus, sharding=sharding, optimizer_offload=offload) for offload in (False, True))
    (traced, *_) = source.made.values()
    weights = sum(parameter.nbytes for parameter in traced.form.parameters if parameter.trainable)
    ranks = 1 if sharding in ("none", "ddp") else gpus
    assert 2 * weights // ranks <= here - there <= 2 * weights // ranks + 4096


def test_gradients_that_accumulate_are_counted_where_they_are_divided(by_hand: Any) -> None:
    source = by_hand(by_hand.SIZE(width=512, vocabulary=8192))
    once, twice = (bound(source, sharding="fsdp2", micro_batch=micro_batch) for micro_batch in (4, 2))
    assert twice > once


def test_bounds_of_masters_count_float32(by_hand: Any) -> None:
    source = by_hand(by_hand.SIZE(width=512, vocabulary=8192))
    plain, masters = (bound(source, sharding="fsdp2", master_weights=masters) for masters in (False, True))
    assert masters > plain
