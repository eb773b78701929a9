"""What other mathematics would save, against the arithmetic by hand and against predictions of stages that have it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oomph.core.choices import resolve
from oomph.core.devices import Gpu, find_gpu, outside
from oomph.core.forms import CachedForms, FormKey
from oomph.core.stage import StageModel
from oomph.core.suggest import RANK, suggestions
from oomph.recipe import Recipe
from oomph.records import Choice, Prediction, Suggestion
from oomph.units import GIB, MIB

A100 = find_gpu("A100-SXM4-40GB")
PARTS = {"vision": "clip-vit-large-patch14-336-vision", "projector": "mlp2x_gelu", "language": "phi-2"}
TEXT, LOOPS = "llama-3.1-8b", "qwen2.5-vl-7b-instruct"
LARGE = {"blocks": 4, "width": 1024, "vocabulary": 4096}
EVERYTHING = {"language": 1e-4, "vision": 1e-4, "projector": "frozen", "head": 1e-4}


def recipe(model: Any = PARTS, gpus: int = 1, batch: int = 16, data: Any = None, train: Any = None, **memory: Any) -> Recipe:
    trains = train or {"language": 1e-4, "vision": "frozen", "projector": "frozen", "head": 1e-4}
    return Recipe.model_validate(
        {
            "name": "small",
            "model": model,
            "data": {"max_tokens": 1024, **(data or {})},
            "hardware": {"gpu": A100.name, "gpus": gpus},
            "memory": {"micro_batch": 2, "eval_batch": "none", **memory},
            "stages": [{"name": "tune", "train": trains, "effective_batch": batch}],
        }
    )


def card(usable: int, gpus: int = 1) -> Gpu:
    """A card of which the allocator can have so many bytes."""
    return replace(A100, name="small", memory_bytes=usable + outside(A100, gpus).bytes)


def planned(wanted: Recipe, source: Any, gpu: Gpu = A100) -> tuple[StageModel, Choice, Prediction]:
    model = StageModel(wanted, wanted.stages[0], gpu, source)
    choice = resolve(wanted.stages[0], wanted, gpu)[0]
    return model, choice, model.predict(choice)


def suggested(wanted: Recipe, source: Any, gpu: Gpu = A100) -> dict[str, Suggestion]:
    """By name; of shorter samples that with the fewest tokens."""
    found = sorted(suggestions(*planned(wanted, source, gpu)), key=lambda one: one.saves_bytes)
    return {one.name: one for one in found}


@pytest.mark.parametrize("usable", [4 * GIB, 90 * MIB])
def test_suggestions_add_up_and_come_by_what_they_save(by_hand: Any, usable: int) -> None:
    model, choice, prediction = planned(recipe(), by_hand(by_hand.SIZE(**LARGE)), card(usable))
    found = suggestions(model, choice, prediction)
    assert [one.name for one in found].count("shorter samples") == 2
    assert {one.name for one in found} == {"lora", "8-bit optimizer", "shorter samples"}
    assert [one.saves_bytes for one in found] == sorted((one.saves_bytes for one in found), reverse=True)
    for one in found:
        assert one.saves_bytes > 0
        assert one.allocated_peak_bytes == prediction.allocated_peak_bytes - one.saves_bytes
        assert one.fits or not prediction.fits
        assert not one.fits or one.allocated_peak_bytes <= usable


@pytest.mark.parametrize("source", ["text", "images"])
def test_shorter_samples_are_predicted_exactly(by_hand: Any, source: str) -> None:
    wanted = recipe(TEXT) if source == "text" else recipe(data={"images_per_sample": 2})
    model, choice, prediction = planned(wanted, by_hand())
    shorter = [one for one in suggestions(model, choice, prediction) if one.name == "shorter samples"]
    for one, tokens in zip(shorter, (512, 768), strict=True):
        data = {"max_tokens": tokens, "images_per_sample": 2}
        whole = planned(recipe(TEXT if source == "text" else PARTS, data=data), by_hand())[2]
        assert (one.allocated_peak_bytes, one.fits, one.basis) == (whole.allocated_peak_bytes, whole.fits, "exact")
        assert f"max_tokens {tokens}" in one.change


def test_samples_are_not_cut_below_their_images(by_hand: Any) -> None:
    found = suggestions(*planned(recipe(data={"images_per_sample": 50}), by_hand()))
    assert [one.change for one in found if one.name == "shorter samples"] == []
    assert "shorter samples" not in suggested(recipe(TEXT, data={"max_tokens": 150}), by_hand())


def test_shorter_samples_take_no_trace(by_hand: Any) -> None:
    source = by_hand()
    model, choice, prediction = planned(recipe(TEXT), source)
    before = len(source.made)
    suggestions(model, choice, prediction)
    assert len(source.made) == before


# LoRA.


ADAPTERS = LARGE["blocks"] * RANK * (2 * LARGE["width"] + 5 * LARGE["width"])
"""Elements of the adapters: an attention of [width, width] and an MLP of [4 width, width] in each block."""


@pytest.mark.parametrize(
    ("gpus", "more", "bytes_of_an_element"),
    [
        (1, {}, 2 + 2 + 4),
        (1, {"master_weights": True}, 2 + 2 + 12),
        (1, {"optimizer_offload": True}, 2 + 2),
        (1, {"precision": "float32"}, 4 + 4 + 8),
        (2, {"sharding": "ddp"}, 2 + 2 + 4 + 2),
        (2, {"sharding": "zero1"}, 2 + 2 + 6),
        (4, {"sharding": "fsdp2"}, 2),
    ],
    ids=["one", "masters", "offloaded", "float32", "ddp", "zero1", "fsdp2"],
)
def test_lora_takes_what_the_stage_takes_with_a_frozen_language_model(
    by_hand: Any, gpus: int, more: dict[str, Any], bytes_of_an_element: float
) -> None:
    """With what the adapters take: weights, gradients, states, and what a sharding holds of them once more.

    Buffers of a sharding that are there for a moment are not taken off, so that it may say too much.
    """
    size = by_hand.SIZE(**LARGE)
    wanted = recipe(gpus=gpus, train=EVERYTHING, **more)
    lora = suggested(wanted, by_hand(size))["lora"]
    frozen = EVERYTHING | {"language": "frozen", "head": "frozen"}
    prediction = planned(recipe(gpus=gpus, train=frozen, **more), by_hand(size))[2]
    expected = prediction.allocated_peak_bytes + bytes_of_an_element * ADAPTERS
    assert 0.97 * expected <= lora.allocated_peak_bytes <= 1.15 * expected
    assert lora.basis == "arithmetic on resident bytes"


def test_lora_is_for_language_models_that_train(by_hand: Any) -> None:
    towers = {"language": "frozen", "vision": 1e-4, "projector": "frozen", "head": "frozen"}
    assert "lora" not in suggested(recipe(train=towers), by_hand())
    assert "lora" in suggested(recipe(), by_hand(by_hand.SIZE(**LARGE)))


# States in eight bits.


def in_eight_bits(elements: float) -> float:
    return 2 * (elements + 4 * math.ceil(elements / 256))


@pytest.mark.parametrize(
    ("gpus", "more", "itemsize"),
    [
        (1, {}, 2),
        (1, {"precision": "float32"}, 4),
        (1, {"master_weights": True}, 4),
        (2, {"sharding": "ddp"}, 2),
        (4, {"sharding": "zero1", "master_weights": True}, 4),
        (4, {"sharding": "zero3", "master_weights": True}, 4),
        (4, {"sharding": "fsdp2"}, 2),
        (4, {"sharding": "fsdp2", "master_weights": True}, 4),
    ],
)
def test_states_in_eight_bits_take_two_bytes_and_a_little(by_hand: Any, gpus: int, more: dict[str, Any], itemsize: int) -> None:
    wanted = recipe(gpus=gpus, **more)
    model, choice, prediction = planned(wanted, by_hand(by_hand.SIZE(**LARGE)))
    trained = sum(p.numel for p in model.lay_out(choice).form.parameters if p.trainable)
    own = trained / (1 if choice.sharding in ("none", "ddp") else gpus)
    (found,) = (one for one in suggestions(model, choice, prediction) if one.name == "8-bit optimizer")
    assert found.saves_bytes == pytest.approx(2 * itemsize * own - in_eight_bits(own), rel=0.002)


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "adamw-8bit-paged"])
def test_states_of_eight_bits_are_not_suggested_to_who_has_them(by_hand: Any, optimizer: str) -> None:
    found = suggested(recipe(optimizer=optimizer), by_hand(by_hand.SIZE(**LARGE)))
    assert "8-bit optimizer" not in found
    assert "lora" in found


def test_states_in_host_memory_need_no_eight_bits(by_hand: Any) -> None:
    assert "8-bit optimizer" not in suggested(recipe(optimizer_offload=True), by_hand())


# Images and experts.


def test_smaller_images_are_for_models_that_take_any_size(by_hand: Any) -> None:
    data = {"images_per_sample": 8}
    assert "smaller images" not in suggested(recipe(data=data), by_hand())
    assert "smaller images" not in suggested(recipe(LOOPS, data={"images_per_sample": 0}), by_hand())
    found = suggested(recipe(LOOPS, data=data), by_hand(image_tokens=100))["smaller images"]
    half = planned(recipe(LOOPS, data={"images_per_sample": 8, "max_tokens": 1024 - 8 * 50}), by_hand(image_tokens=64))[2]
    assert found.allocated_peak_bytes == pytest.approx(half.allocated_peak_bytes, rel=0.02)
    assert found.basis.startswith("estimate")


def test_half_of_the_experts_of_a_real_model_take_what_is_estimated(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from oomph.live.source import make_form

    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(vocab_size=512, num_hidden_layers=2, **sizes).save_pretrained(tmp_path)

    def make(keys: Sequence[FormKey], done: Any) -> None:
        for key in keys:
            done(key, make_form(key))

    source = CachedForms(make, folder=tmp_path / "traces")
    rules = {"language": 1e-4, "experts": 1e-4, "router": 1e-4, "head": "frozen"}
    found = {}
    for count in (16, 8):
        wanted = recipe(str(tmp_path), train=rules, data={"max_tokens": 300})
        experts = {"count": count, "top_k": 2, "layers": "all"}
        data = wanted.model_dump(exclude_unset=True)
        data["stages"] = [{**stage, "experts": experts} for stage in data["stages"]]
        found[count] = planned(Recipe.model_validate(data), source)
    (fewer,) = (one for one in suggestions(*found[16]) if one.name == "fewer experts")
    assert fewer.change == "8 experts instead of 16"
    exact = found[16][2].allocated_peak_bytes - found[8][2].allocated_peak_bytes
    assert fewer.saves_bytes == pytest.approx(exact, rel=0.05)
