"""What a search looks at: everything of the same mathematics, less what something else beats at whatever size."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from oomph.core.choices import clashes, cuts, micro_batch_sizes, resolve, with_micro_batch
from oomph.core.devices import find_gpu
from oomph.core.events import Events
from oomph.core.space import KNOBS, Space, space
from oomph.core.stage import StageModel
from oomph.errors import UserError
from oomph.recipe import Hardware, Recipe, load, stage_of
from oomph.records import Choice

A100 = find_gpu("A100-SXM4-40GB")
T4 = find_gpu("T4")
PARTS = {"vision": "clip-vit-large-patch14-336-vision", "projector": "mlp2x_gelu", "language": "phi-2"}


def recipe(gpus: int = 1, nodes: int = 1, batch: int = 6, vision: Any = "frozen", **memory: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "model": PARTS,
            "data": {"max_tokens": 512},
            "hardware": {"gpu": A100.name, "gpus": gpus, "nodes": nodes},
            "memory": memory,
            "stages": [
                {
                    "name": "tune",
                    "train": {"language": 1e-4, "head": 1e-4, "projector": "frozen", "vision": vision},
                    "effective_batch": batch,
                }
            ],
        }
    )


def asked(wanted: Recipe, gpu: Any = A100) -> Choice:
    return resolve(wanted.stages[0], wanted, gpu)[0]


def everything(choice: Choice, hardware: Hardware, fixed: dict[str, Any], eval_batch: Any = "auto") -> list[Choice]:
    """Every configuration, by trying each value of each knob and each micro-batch."""
    domains = [[fixed[knob]] if knob in fixed else dict.fromkeys([getattr(choice, knob), *KNOBS[knob]]) for knob in KNOBS]
    found = []
    for values in itertools.product(*domains):
        other = replace(choice, **dict(zip(KNOBS, values, strict=True)))
        if not clashes(vars(other), A100, hardware):
            sizes = [fixed["micro_batch"]] if "micro_batch" in fixed else range(1, choice.effective_batch + 1)
            every = cuts(other, other.sharding, every=True)
            found += [with_micro_batch(other, size, eval_batch) for size in sizes if size in every]
    return found


knobs = st.dictionaries(st.sampled_from(sorted(KNOBS)), st.integers(0, 9), min_size=4, max_size=8)
clusters = st.sampled_from([(1, 1), (2, 1), (4, 2)])


@settings(max_examples=25)
@given(clusters, st.integers(4, 9), knobs, st.booleans(), st.integers(0, 9))
def test_a_space_is_everything_but_what_is_beaten(
    better: Any, cluster: tuple[int, int], batch: int, fixes: dict[str, int], masters: bool, cut: int
) -> None:
    fixed = {knob: KNOBS[knob][number % len(KNOBS[knob])] for knob, number in fixes.items()}
    try:
        wanted = recipe(*cluster, batch, master_weights=masters, **fixed)
        choice = asked(wanted)
    except UserError:
        assume(False)
    if cut:
        fixed["micro_batch"] = cuts(choice, choice.sharding)[cut % len(cuts(choice, choice.sharding))]
    found = space(choice, fixed, A100, wanted.hardware, "auto")
    every = everything(choice, wanted.hardware, fixed)
    assert found.considered == len(every) == len(set(every))
    assert len(set(found.choices)) == len(found.choices)
    assert set(found.choices) == {better(other, fixed) for other in every}
    for other in found.choices:
        assert all(getattr(other, knob) == value for knob, value in fixed.items())
        assert (other.precision, other.master_weights) == (choice.precision, choice.master_weights)
        assert sum(map(sum, micro_batch_sizes(other))) == batch


# What is beaten.


def live_peak(events: Events) -> int:
    """The most bytes alive at one time, in blocks of 512, whatever the allocator makes of them."""
    alive = most = 0
    for segment in events.segments:
        for entry in segment.timeline * min(segment.repeat, 2):
            block = -(-events.sizes[entry if entry >= 0 else ~entry] // 512) * 512
            alive += block if entry >= 0 else -block
            most = max(most, alive)
    return most


@settings(max_examples=40)
@given(
    clusters,
    st.integers(4, 9),
    st.fixed_dictionaries({knob: st.sampled_from(values) for knob, values in KNOBS.items()}),
    st.fixed_dictionaries({"vocabulary": st.sampled_from([512, 8192]), "work": st.sampled_from([1, 100])}),
    st.integers(0, 9),
    st.booleans(),
)
def test_what_beats_another_needs_no_more_bytes_and_no_more_time(
    by_hand: Any,
    better: Any,
    cluster: tuple[int, int],
    batch: int,
    pins: dict[str, Any],
    size: dict[str, int],
    cut: int,
    masters: bool,
) -> None:
    """But for AdamW's step counters, which the fused kernel has on the GPU: a block of 512 bytes for each tensor."""
    try:
        wanted = recipe(*cluster, batch, 1e-4, master_weights=masters, **pins)
        choice = asked(wanted)
    except UserError:
        assume(False)
    every = cuts(choice, choice.sharding, every=True)
    choice = with_micro_batch(choice, every[cut % len(every)], "auto")
    best = better(choice, {})
    assume(best != choice)
    model = StageModel(wanted, wanted.stages[0], A100, by_hand(by_hand.SIZE(**size)))
    worse, laid = model.lay_out(choice), model.lay_out(best)
    counters = 512 * sum(parameter.trainable for parameter in laid.form.parameters)
    assert live_peak(laid.events) <= live_peak(worse.events) + counters
    assert model.speed(best).step_seconds <= model.speed(choice).step_seconds * (1 + 1e-9)


# The spaces of some recipes.


def space_of(name: str, stage: str, **fixed: Any) -> Space:
    wanted = load(name)
    choice, _ = resolve(stage_of(wanted, stage), wanted, A100)
    return space(choice, fixed, A100, wanted.hardware, "auto")


def test_the_published_fine_tuning_has_more_than_ten_thousand_configurations() -> None:
    found = space_of("moe-llava/phi2-clip336-as-published", "finetune", vision_checkpointing="blocks")
    assert found.considered >= 10_000
    assert len(found.choices) < 1000
    assert all(choice.master_weights for choice in found.choices)
    assert {choice.attention for choice in found.choices} == {"sdpa"}
    assert {choice.sharding for choice in found.choices} >= {"zero1", "zero2", "zero3", "fsdp2", "fsdp2-no-reshard"}


def test_a_pinned_value_that_nothing_searches_for_is_in_its_space() -> None:
    wanted = recipe(checkpointing="every-3", attention="flash", optimizer="adamw-loop")
    choice = asked(wanted)
    fixed = {"checkpointing": "every-3", "attention": "flash", "optimizer": "adamw-loop"}
    found = space(choice, fixed, A100, wanted.hardware, "auto")
    assert {(c.checkpointing, c.attention, c.optimizer) for c in found.choices} == {("every-3", "flash", "adamw-loop")}
    free = {c.checkpointing for c in space(choice, {}, A100, wanted.hardware, "auto").choices}
    assert free == {"every-3", *KNOBS["checkpointing"]}


@pytest.mark.parametrize("gpus", [1, 4])
def test_states_of_eight_bits_and_others_are_not_exchanged(gpus: int) -> None:
    def optimizers(**memory: Any) -> tuple[set[str], Space]:
        wanted = recipe(gpus, 1, 8, master_weights=False, **memory)
        found = space(asked(wanted), {}, A100, wanted.hardware, "auto")
        return {choice.optimizer for choice in found.choices}, found

    whole = {"adamw-8bit", "adamw-8bit-paged"}
    for own in sorted(whole):
        kinds, found = optimizers(optimizer=own)
        assert kinds == whole
        assert {choice.sharding for choice in found.choices} == {"none" if gpus == 1 else "ddp"}
        assert not any(choice.optimizer_offload for choice in found.choices)
    assert optimizers()[0] == optimizers(optimizer="adamw-foreach")[0] == {"adamw-fused"}


def test_what_the_card_or_the_cluster_lacks_is_not_considered() -> None:
    wanted = recipe(4, 1, 8, precision="float32")
    every = space(asked(wanted), {}, A100, wanted.hardware, "auto").choices
    assert not {"none", "fsdp2-hybrid"} & {choice.sharding for choice in every}
    assert not any(choice.optimizer_offload for choice in every if choice.sharding.startswith("zero"))
    alone = recipe(1, 1, 8, precision="float32")
    assert {choice.sharding for choice in space(asked(alone, T4), {}, T4, alone.hardware, "auto").choices} == {"none"}


def test_the_evaluation_follows_the_micro_batch_or_stays() -> None:
    wanted = recipe(batch=6)
    follows = space(asked(wanted), {}, A100, wanted.hardware, "auto").choices
    assert all(choice.eval_batch == choice.micro_batch for choice in follows)
    pinned = recipe(batch=6, eval_batch=3)
    assert {choice.eval_batch for choice in space(asked(pinned), {}, A100, pinned.hardware, 3).choices} == {3}
