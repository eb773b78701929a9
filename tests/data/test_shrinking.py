"""Samples with smaller images: fewer image tokens at each step, the same text, until there is nothing smaller."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from oomph.live.data.shrinking import Shrinker


@pytest.fixture
def grids(workshop: Any, make_tokenizer: Any) -> Callable[..., Any]:
    """A function that makes a recipe of a small Qwen2.5-VL."""
    tokenizer = make_tokenizer("parts")
    ids = {"image_token_id": "image_pad", "vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    numbers = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in ids.items()}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 520}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    vision |= {"temporal_patch_size": 2, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    folder = workshop.folder / "model"
    Qwen2_5_VLConfig(text_config=text, vision_config=vision, **numbers).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=10**6)
    processor.save_pretrained(folder)

    def made(file: str, **data: Any) -> Any:
        return workshop.recipe(file, **data).model_copy(update={"model": str(folder)})

    return made


@pytest.mark.parametrize("how", ["pad", "any"])
def test_images_become_smaller_until_they_cannot(grids: Any, workshop: Any, talk: Any, open_data: Any, how: str) -> None:
    file = workshop.write("a.json", [talk("<image>What is it?", "A dog.", image=workshop.noise("a.png", (64, 64)))])
    recipe = grids(file, image_size=64, image_aspect_ratio=how)
    data = open_data(recipe)
    smaller = Shrinker(data, recipe, recipe.stages[0])
    sample, seen = data.prepare(0), []
    while sample is not None:
        seen.append(sample)
        sample = smaller(sample)
    tokens = [one.cost.image_tokens for one in seen]
    assert tokens[0] == 64
    assert tokens == sorted(set(tokens), reverse=True)
    assert tokens[-1] == 1
    assert len({(one.name, one.cost.text_tokens, one.cost.label_tokens) for one in seen}) == 1
    for one, other in itertools.pairwise(seen):
        assert other.cost.image_tokens >= one.cost.image_tokens / 4
        assert len(other.images[0]["pixel_values"]) == other.cost.patches
    assert [one.cost.image_tokens for one in (smaller(seen[0]), smaller(seen[1]))] == tokens[1:3]


def test_where_the_tower_takes_one_shape_nothing_is_smaller(workshop: Any, talk: Any, open_data: Any) -> None:
    records = [talk("<image>What is it?", "A dog.", image=workshop.noise("a.png", (64, 64))), talk("Hi", "Ho")]
    recipe = workshop.recipe(workshop.write("a.json", records))
    data = open_data(recipe)
    smaller = Shrinker(data, recipe, recipe.stages[0])
    assert smaller(data.prepare(0)) is None
    assert smaller(data.prepare(1)) is None
