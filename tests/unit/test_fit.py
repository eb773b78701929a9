"""What a stage would take: what is said to fit fits, and the next smaller card and the next larger number do not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomph.core import predict
from oomph.core.choices import clashes, cuts, micro_batch_sizes, resolve, with_micro_batch
from oomph.core.closed_form import FEATURES, LEAST_ROWS, Dimension, Formula
from oomph.core.devices import Gpu, catalogue, find_gpu, outside
from oomph.core.fit import COUNTS, fit, limits, smallest_cards, with_settings
from oomph.core.forms import FormKey, Traced
from oomph.core.stage import StageModel
from oomph.recipe import Recipe
from oomph.records import Card, Choice, Limit
from oomph.units import GIB, MIB

A100 = find_gpu("A100-SXM4-40GB")
CARDS = sorted((gpu for gpu in catalogue() if gpu.compute_capability), key=lambda gpu: (gpu.memory_bytes, gpu.name))
TEXT, LOOPS = "llama-3.1-8b", "qwen2.5-vl-7b-instruct"
PARTS = {"vision": "clip-vit-large-patch14-336-vision", "projector": "mlp2x_gelu", "language": "phi-2"}
BYTES = r"[\d.,]+ (?:GiB|MiB|KiB|B)"
BILLIONS = {"blocks": 24, "width": 4096, "vocabulary": 32000}


def recipe(
    model: Any = PARTS, gpus: int = 1, nodes: int = 1, batch: int = 8, data: Any = None, train: Any = None, **memory: Any
) -> Recipe:
    trains = train or {"language": 1e-4, "vision": "frozen", "projector": "frozen", "head": 1e-4}
    return Recipe.model_validate(
        {
            "name": "small",
            "model": model,
            "data": {"max_tokens": 1024, **(data or {})},
            "hardware": {"gpu": A100.name, "gpus": gpus, "nodes": nodes},
            "memory": memory,
            "stages": [{"name": "tune", "train": trains, "effective_batch": batch}],
        }
    )


def card(usable: int, gpus: int = 1) -> Gpu:
    """A card of which the allocator can have so many bytes."""
    return replace(A100, name="small", memory_bytes=usable + outside(A100, gpus).bytes)


def stage_of(wanted: Recipe, source: Any, gpu: Gpu = A100) -> tuple[StageModel, Choice]:
    """The recipe's stage with the choice that it makes by itself."""
    model = StageModel(wanted, wanted.stages[0], gpu, source)
    return model, resolve(wanted.stages[0], wanted, gpu)[0]


# Cards.


def lean(choice: Choice, gpu: Gpu, wanted: Recipe) -> list[Choice]:
    """Whatever needs little memory, by brute force: the leanest settings with every sharding and every use of the host."""
    found = []
    kinds = ("none",) if choice.gpus == 1 else ("ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2-hybrid")
    hardware = wanted.hardware.model_copy(update={"gpus": choice.gpus, "nodes": choice.nodes})
    for kept, offload, sharding in itertools.product(("blocks", "blocks-offload"), (False, True), kinds):
        one = replace(choice, checkpointing=kept, optimizer_offload=offload, sharding=sharding)  # type: ignore[arg-type]
        if not clashes(vars(one), gpu, hardware):
            found += [with_micro_batch(one, cut, "auto") for cut in cuts(one, sharding, every=True)[-1:]]
    return [replace(one, expandable_segments=segments) for one in found for segments in (False, True)]


def check_cards(model: StageModel, choice: Choice, cards: Sequence[Card]) -> None:
    for found in cards:
        gpu = find_gpu(found.gpu)
        prediction = with_settings(model, found.choice, gpu).predict(found.choice)
        assert prediction.fits
        assert (found.reserved_peak_bytes, found.usable_bytes) == (prediction.reserved_peak_bytes, prediction.usable_bytes)
        kept = ("effective_batch", "precision", "master_weights")
        assert [getattr(found.choice, name) for name in kept] == [getattr(choice, name) for name in kept]
        assert {sum(map(sum, micro_batch_sizes(found.choice)))} == {choice.effective_batch}
        for smaller in CARDS[: CARDS.index(gpu)]:
            for other in lean(found.choice, smaller, model.recipe):
                assert not with_settings(model, other, smaller).fits(other), (smaller.name, other)
    ranks = [CARDS.index(find_gpu(found.gpu)) for found in cards]
    assert ranks == sorted(set(ranks), reverse=True)
    assert [found.choice.gpus for found in cards] == sorted({found.choice.gpus for found in cards})


@pytest.mark.parametrize(
    ("size", "more"),
    [
        ({}, {"batch": 64}),
        (BILLIONS, {"batch": 64}),
        (BILLIONS, {"batch": 64, "master_weights": True, "gpus": 8}),
        (BILLIONS, {"batch": 6, "gpus": 6, "precision": "float32"}),
        (BILLIONS | {"width": 8192}, {"batch": 64, "gpus": 8, "master_weights": True, "data": {"max_tokens": 4096}}),
    ],
    ids=["small", "one", "masters", "float32", "large"],
)
def test_a_card_fits_and_no_smaller_one_does(by_hand: Any, size: dict[str, int], more: dict[str, Any]) -> None:
    model, choice = stage_of(recipe(**more), by_hand(by_hand.SIZE(**size)))
    cards = smallest_cards(model, choice)
    assert cards
    check_cards(model, choice, cards)
    for found in cards:
        assert found.choice.gpus in {*COUNTS, choice.gpus}
        assert found.choice.nodes == max(found.choice.gpus // 8, 1)


def test_every_number_of_gpus_that_brings_a_smaller_card_is_there(by_hand: Any) -> None:
    wanted = recipe(batch=64, gpus=8, master_weights=True)
    model, choice = stage_of(wanted, by_hand(by_hand.SIZE(**BILLIONS | {"width": 8192})))
    cards = smallest_cards(model, choice)
    assert len(cards) > 1
    listed = {found.choice.gpus for found in cards}
    for gpus in set(COUNTS) - listed:
        before = [CARDS.index(find_gpu(found.gpu)) for found in cards if found.choice.gpus < gpus]
        least = min(before, default=len(CARDS))
        shared = replace(choice, gpus=gpus, nodes=max(gpus // 8, 1), attention="sdpa", loss="chunked")
        for smaller in CARDS[:least]:
            for other in lean(shared, smaller, wanted):
                assert not with_settings(model, other, smaller).fits(other), (gpus, smaller.name)


def test_bfloat16_takes_a_card_that_has_it(by_hand: Any) -> None:
    found = {}
    for precision in ("bfloat16", "float32"):
        model, choice = stage_of(recipe(precision=precision), by_hand())
        (found[precision],) = smallest_cards(model, choice)
    assert (found["float32"].gpu, found["bfloat16"].gpu) == ("T4", "A10")


def test_host_memory_is_used_only_where_it_has_to_be(by_hand: Any) -> None:
    model, choice = stage_of(recipe(batch=64), by_hand(by_hand.SIZE(**BILLIONS)))
    for found in smallest_cards(model, choice):
        plain = replace(found.choice, checkpointing="blocks", optimizer_offload=False)
        gpu = find_gpu(found.gpu)
        used = found.choice != plain
        assert used == (not with_settings(model, plain, gpu).fits(plain))


class Stacked:
    """A source whose wide layers are stacks of four, as experts are, which FSDP2 cuts into four pieces at the most."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def prepare(self, keys: Sequence[FormKey]) -> None:
        self._source.prepare(keys)

    def traced(self, key: FormKey) -> Traced:
        found = self._source.traced(key)
        given = found.form.parameters
        stacks = [p._replace(shape=(4, p.shape[0] // 4, *p.shape[1:])) if ".mlp" in p.name else p for p in given]
        return replace(found, form=replace(found.form, parameters=stacks))


def test_stacks_that_fsdp2_cannot_divide_are_divided_otherwise(by_hand: Any) -> None:
    source = Stacked(by_hand(by_hand.SIZE(**BILLIONS | {"width": 8192})))
    model, choice = stage_of(recipe(batch=64, gpus=8, master_weights=True, eval_batch="none"), source)
    cards = smallest_cards(model, choice)
    many = [found for found in cards if found.choice.gpus > 8]
    assert many
    for found in many:
        assert found.choice.sharding == "zero3"
        padded = replace(found.choice, sharding="fsdp2", optimizer_offload=True)
        assert not with_settings(model, padded, find_gpu(found.gpu)).fits(padded)
    check_cards(model, choice, cards)


def test_a_batch_too_small_to_share_ends_the_list(by_hand: Any) -> None:
    model, choice = stage_of(recipe(batch=2), by_hand(by_hand.SIZE(**BILLIONS | {"width": 8192})))
    assert {found.choice.gpus for found in smallest_cards(model, choice)} <= {1, 2}


def test_what_no_card_holds_has_no_cards(by_hand: Any) -> None:
    model, choice = stage_of(recipe(batch=1), by_hand(by_hand.SIZE(**BILLIONS | {"width": 1 << 17})))
    assert smallest_cards(model, choice) == ()


def test_settings_of_the_recipe_do_not_bind_the_cards(by_hand: Any) -> None:
    """What is pinned for one number of GPUs may be impossible for another."""
    source = by_hand(by_hand.SIZE(**BILLIONS))
    free, pinned = recipe(batch=64, gpus=8), recipe(batch=64, gpus=8, sharding="ddp", attention="eager", micro_batch=4)
    assert smallest_cards(*stage_of(pinned, source)) == smallest_cards(*stage_of(free, source))


def test_few_forms_are_made_and_few_steps_replayed(by_hand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forms of the asked card's kernels, and for each card that is an answer, or was close to one, two more."""
    replays = []
    whole = predict.replay
    monkeypatch.setattr(predict, "replay", lambda *args, **more: replays.append(1) or whole(*args, **more))
    source = by_hand(by_hand.SIZE(**BILLIONS | {"width": 8192}))
    model, choice = stage_of(recipe(batch=64, gpus=8, master_weights=True), source)
    model.predict(choice)
    made = len(source.made)
    cards = fit(model, choice).cards
    assert len(replays) < 60
    kinds = {key.capability for key in list(source.made)[made:]} - {(8, 0)}
    assert len(source.made) - made <= 2 * (len(kinds) + 2)
    assert len(kinds) <= len({find_gpu(found.gpu).compute_capability for found in cards}) + 2


# Limits.


def named(found: Sequence[Limit]) -> dict[str, Limit]:
    return {limit.name: limit for limit in found}


def fits_at(model: StageModel, choice: Choice, name: str, value: int) -> bool:
    """Whether the stage fits with another limit, asked of a stage that knows nothing else."""
    data = model.data
    if name == "micro_batch":
        whole = value * choice.gpus * max(-(-choice.effective_batch // choice.gpus // value), 1)
        possible = value in cuts(choice, choice.sharding, every=True)
        choice = with_micro_batch(choice if possible else replace(choice, effective_batch=whole), value, "auto")
    elif name == "max_tokens":
        data = data.model_copy(update={"max_tokens": value})
    else:
        each = 16 if data.image_tokens_count else 1
        more = (value - data.images_per_sample) * each
        data = data.model_copy(update={"images_per_sample": value, "max_tokens": data.max_tokens + more})
    return model.on(model.gpu, data=data).predict(choice).fits


def check_limits(model: StageModel, choice: Choice, found: Sequence[Limit]) -> None:
    least = {"max_tokens": -(-LEAST_ROWS // choice.micro_batch), "micro_batch": 1, "images_per_sample": 1}
    for limit in found:
        if limit.value:
            assert fits_at(model, choice, limit.name, limit.value), limit
        beyond = max(limit.value + 1, least[limit.name])
        assert not fits_at(model, choice, limit.name, beyond), limit
        assert re.search(rf"asks for {BYTES} at once \(\w+, \w+\), (?:where|and the) {BYTES} (?:that )?is free", limit.beyond)


memories = st.fixed_dictionaries(
    {
        "attention": st.sampled_from(["sdpa", "eager"]),
        "checkpointing": st.sampled_from(["none", "every-2", "blocks", "blocks-offload"]),
        "loss": st.sampled_from(["full", "chunked"]),
        "eval_batch": st.sampled_from(["auto", "none"]),
    }
)


@settings(max_examples=25)
@given(
    st.sampled_from([(1, "none"), (2, "ddp"), (4, "fsdp2"), (4, "zero2")]),
    st.sampled_from([1, 3, 8]),
    st.integers(300, 3000),
    st.integers(1, 3),
    st.booleans(),
    st.floats(0.7, 6.0),
    memories,
)
def test_a_limit_fits_and_the_next_does_not(
    by_hand: Any,
    cluster: tuple[int, str],
    samples: int,
    tokens: int,
    images: int,
    count: bool,
    room: float,
    memory: dict[str, Any],
) -> None:
    gpus, sharding = cluster
    data = {"max_tokens": tokens, "images_per_sample": images, "image_tokens_count": count}
    masters = {"master_weights": True} if sharding == "zero2" else {}
    wanted = recipe(gpus=gpus, batch=8 * gpus * samples, data=data, sharding=sharding, micro_batch=samples, **masters, **memory)
    source = by_hand()
    model, choice = stage_of(wanted, source)
    small = card(int(room * model.predict(choice).reserved_peak_bytes), gpus)
    model = model.on(small)
    found = limits(model, choice)
    assert [limit.name for limit in found] == ["micro_batch", "max_tokens", "images_per_sample"]
    check_limits(model, choice, found)


def test_a_text_model_has_no_limit_of_images(by_hand: Any) -> None:
    model, choice = stage_of(recipe(TEXT, micro_batch=2), by_hand(), card(200 * MIB))
    found = named(limits(model, choice))
    assert set(found) == {"micro_batch", "max_tokens"}
    check_limits(model, choice, tuple(found.values()))


def test_images_that_the_recipe_leaves_out_have_a_limit(by_hand: Any) -> None:
    data = {"images_per_sample": 0}
    model, choice = stage_of(recipe(micro_batch=2, data=data), by_hand(), card(300 * MIB))
    images = named(limits(model, choice))["images_per_sample"]
    assert images.value > 1
    assert f"max_tokens {1024 + 16 * images.value:,}" in images.beyond
    check_limits(model, choice, [images])


def test_more_samples_than_the_effective_batch_are_said_to_take_a_larger_one(by_hand: Any) -> None:
    model, choice = stage_of(recipe(TEXT, batch=8), by_hand(), card(4 * GIB))
    limit = named(limits(model, choice))["micro_batch"]
    assert limit.value > 8
    assert limit.beyond.startswith(f"an effective batch of {limit.value:,}; {limit.value + 1:,} asks for")
    exact = named(limits(model, replace(choice, effective_batch=limit.value * 4)))["micro_batch"]
    assert "effective batch" not in exact.beyond or exact.value != limit.value


def test_tokens_on_top_of_the_limit_are_named(by_hand: Any) -> None:
    data = {"images_per_sample": 2, "image_tokens_count": False}
    model, choice = stage_of(recipe(micro_batch=2, data=data), by_hand(), card(300 * MIB))
    limit = named(limits(model, choice))["max_tokens"]
    assert limit.beyond.startswith(f"{limit.value + 2 * 15:,} with the image tokens on top; ")


def test_where_nothing_fits_the_limits_are_nothing(by_hand: Any) -> None:
    model, choice = stage_of(recipe(micro_batch=1), by_hand(), card(20 * MIB))
    found = named(limits(model, choice))
    assert {name: limit.value for name, limit in found.items()} == dict.fromkeys(found, 0)
    assert found["micro_batch"].beyond.startswith("not even 1 has room: it asks for ")
    assert found["images_per_sample"].beyond.startswith("not even 1 has room: it asks for ")
    assert found["max_tokens"].beyond.startswith("not even 257 has room: it asks for ")


@pytest.mark.parametrize("samples", [1, 2])
def test_each_number_of_images_with_kernels_of_its_own_is_not_traced(by_hand: Any, samples: int) -> None:
    source = by_hand()
    model, choice = stage_of(recipe(LOOPS, micro_batch=samples), source, card(4 * GIB))
    found = named(limits(model, choice))
    assert {key.images for key in source.made} <= {1, -2}
    check_limits(model, choice, [found["max_tokens"]])
    for name in ("micro_batch", "images_per_sample"):
        assert found[name].value > 2
        assert "an estimate" in found[name].beyond
        assert fits_at(model, choice, name, found[name].value)
        assert not fits_at(model, choice, name, found[name].value * 5 // 4)


def test_an_estimate_is_not_below_what_is_known_to_fit(by_hand: Any) -> None:
    model, choice = stage_of(recipe(LOOPS, micro_batch=8), by_hand())
    needed = model.predict(choice).reserved_peak_bytes
    found = {usable: named(limits(model.on(card(usable)), choice)) for usable in (needed, needed - 20 * MIB)}
    assert found[needed]["micro_batch"].value >= 8
    assert found[needed]["images_per_sample"].value >= 1
    assert 0 < found[needed - 20 * MIB]["micro_batch"].value < 8


def test_a_model_without_formulas_has_cards_and_no_limits(by_hand: Any) -> None:
    source = by_hand(closed=False)
    model, choice = stage_of(recipe(micro_batch=2), source, card(300 * MIB))
    found = fit(model, choice)
    check_cards(model, choice, found.cards)
    assert found.limits == ()
    assert {key.shape for key in source.made} <= {None, (2, 1024, 2), (1, 1024, 1)}


class Masks:
    """A source whose forms pad a mask of the attention, but for the shapes that are traced by themselves and need none."""

    def __init__(self, source: Any) -> None:
        self._source = source

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [key.shape for key in self._source.made if key.shape is not None]

    def prepare(self, keys: Sequence[FormKey]) -> None:
        self._source.prepare(keys)

    def traced(self, key: FormKey) -> Traced:
        found = self._source.traced(key)
        if key.shape is not None:
            return found
        form = found.form
        number = form.timeline[form.pieces[1].start + 1]
        ceiling = Dimension(FEATURES.index("ceil8(tokens)"), 1, 0)
        kinds = [*form.kinds, form.kinds[form.kind[number]]._replace(op="aten.constant_pad_nd.default")]
        formulas = [*form.formulas, Formula((ceiling, ceiling), 2)]
        kind, formula = list(form.kind), list(form.formula)
        kind[number], formula[number] = len(kinds) - 1, len(formulas) - 1
        return replace(found, form=replace(form, kinds=kinds, formulas=formulas, kind=kind, formula=formula))


def test_shapes_that_pad_no_mask_are_traced_by_themselves_only_at_the_end(by_hand: Any) -> None:
    source = Masks(by_hand())
    model, choice = stage_of(recipe(TEXT, micro_batch=2), source, card(400 * MIB))
    found = limits(model, choice)
    assert len(source.shapes) <= 8
    check_limits(model, choice, found)


# A real model.


def test_a_real_model_has_cards_and_limits(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from oomph.core.forms import CachedForms
    from oomph.live.source import make_form

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    config.save_pretrained(tmp_path)
    made = []

    def make(keys: Sequence[FormKey], done: Any) -> None:
        for key in keys:
            made.append(key)
            done(key, make_form(key))

    wanted = recipe(str(tmp_path), micro_batch=4, data={"max_tokens": 300}, train={"language": 1e-4, "head": 1e-4})
    small = replace(card(64 * MIB), compute_capability=find_gpu("A10").compute_capability)
    model, choice = stage_of(wanted, CachedForms(make, folder=tmp_path / "traces"), small)
    found = fit(model, choice)
    assert [(one.gpu, one.choice.gpus, one.choice.micro_batch) for one in found.cards] == [("A10", 1, 1)]
    check_cards(model, choice, found.cards)
    check_limits(model, choice, found.limits)
    assert all(limit.value for limit in found.limits)
    assert len(made) == 2
