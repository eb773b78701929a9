"""Micro-batches: the inputs that the tracer gives the model, with the pixels that the model's own processor makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3Config,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    SiglipImageProcessorPil,
)

from oomph.core.layout import Shape
from oomph.errors import UserError
from oomph.live.batch import images_of, text_inputs
from oomph.live.simulate import fake_mode
from oomph.live.step import IGNORED, full_loss
from oomph.recipe import Recipe


def described(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}


def expected_of(config: Any, shape: Shape, size: tuple[int, int] | None = None, dtype: Any = torch.float32) -> dict[str, Any]:
    """The inputs of a traced step."""
    images = images_of(config, size)
    with fake_mode()[0]:
        batch = dict(text_inputs(config, shape, images))
        return described(batch | (images.inputs(shape.images, dtype) if images is not None and shape.images else {}))


def test_llava_from_parts_gets_what_is_traced(workshop: Any, open_data: Callable[..., Any], talk: Any) -> None:
    names = [workshop.noise("a.png", (50, 20)), workshop.noise("b.jpg", (32, 32)), workshop.noise("c.png", (7, 90))]
    records = [talk("<image>\nWhat?", "A dog." * (number + 1), image=name) for number, name in enumerate(names)]
    data = open_data(workshop.recipe(workshop.write("a.json", [*records, talk("Hi", "Ho")])))
    samples = [data.prepare(number) for number in range(4)]
    config = data.encoder.config
    for dtype in (torch.float32, torch.bfloat16):
        longest = max(len(sample.ids) for sample in samples[:3])
        batch = data.collate(samples[:3], dtype)
        assert described(batch) == expected_of(config, Shape(3, longest, 3), dtype=dtype)
        mixed = data.collate([samples[3], samples[0]], dtype)
        assert described(mixed) == expected_of(config, Shape(2, len(samples[0].ids), 1), dtype=dtype)
    alone = data.collate([samples[3]])
    assert described(alone) == expected_of(config, Shape(1, len(samples[3].ids), 0))
    assert batch["labels"][0, len(samples[0].ids) :].tolist() == [IGNORED] * (longest - len(samples[0].ids))
    assert torch.equal(data.prepare(0).images[0]["pixel_values"], samples[0].images[0]["pixel_values"])


def test_a_text_model_gets_what_is_traced(workshop: Any, open_data: Callable[..., Any], talk: Any) -> None:
    records = [talk("Hi", "Ho " * number) for number in (1, 5, 3)]
    data = open_data(workshop.recipe(workshop.write("a.json", records), text_only=True))
    samples = [data.prepare(number) for number in range(3)]
    batch = data.collate(samples)
    assert described(batch) == expected_of(data.encoder.config, Shape(3, len(samples[1].ids), 0))
    assert samples[1].nbytes == 16 * len(samples[1].ids)


def test_padding_and_company_change_no_loss(workshop: Any, open_data: Callable[..., Any], talk: Any) -> None:
    names = [workshop.noise(f"{number}.png", (40, 30), number) for number in range(3)]
    records = [
        talk("<image>\nWhat?", "A dog." * number, "<image> And?", "No", image=[name] * 2)
        for number, name in enumerate(names, 1)
    ]
    records.append(talk("Hi", "Ho"))
    data = open_data(workshop.recipe(workshop.write("a.json", records), images_per_sample=2))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(data.encoder.config, attn_implementation="sdpa").eval()
    samples = [data.prepare(number) for number in range(4)]
    with torch.no_grad():
        together = full_loss(model, data.collate(samples), 1)
        alone = [full_loss(model, data.collate([sample]), 1) for sample in samples]
    assert together.item() == pytest.approx(sum(loss.item() for loss in alone), rel=1e-5)
    learned = sum(sample.cost.label_tokens for sample in samples)
    assert together.item() / learned == pytest.approx(np.log(520), rel=0.2)


@pytest.mark.parametrize("how", ["pad", "square"])
@pytest.mark.parametrize("processor", [CLIPImageProcessorPil, SiglipImageProcessorPil, None])
def test_pixels_are_those_of_the_towers_processor(
    workshop: Any, open_data: Callable[..., Any], talk: Any, how: str, processor: Any
) -> None:
    """Of the square that pad or square makes, the tower's own processor makes the same values."""
    name, notes = workshop.noise("a.png", (50, 20)), list[str]()
    if processor is None:
        own = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    elif processor is CLIPImageProcessorPil:
        own = processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        own.save_pretrained(workshop.folder / "tower")
    else:
        own = processor(size={"height": 32, "width": 32})
        own.save_pretrained(workshop.folder / "tower")
    data = open_data(
        workshop.recipe(workshop.write("a.json", [talk("<image>", "Ho", image=name)]), image_aspect_ratio=how), notes
    )
    assert len(notes) == (processor is None)
    image = Image.open(workshop.pictures / name)
    if how == "pad":
        square = Image.new("RGB", (50, 50), tuple(int(value * 255) for value in own.image_mean))
        square.paste(image, (0, 15))
    else:
        square = image.crop((15, 0, 35, 20))
    expected = own(images=square, return_tensors="pt")["pixel_values"]
    assert torch.equal(data.prepare(0).images[0]["pixel_values"], expected.float())


QWEN_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_TEXT |= {"num_key_value_heads": 2, "vocab_size": 520, "head_dim": 8}
IDS = {"image_token_id": 6, "video_token_id": 500, "vision_start_token_id": 5, "vision_end_token_id": 7}


def qwen(kind: str) -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    vision |= {"temporal_patch_size": 2, "out_hidden_size": 32}
    if kind == "qwen3_vl":
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        return Qwen3VLConfig(text_config=QWEN_TEXT | {"rope_parameters": rope}, vision_config=vision, **IDS)
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(text_config=QWEN_TEXT | {"rope_parameters": rope}, vision_config=vision, **IDS)


def model_recipe(workshop: Any, config: Any, tokenizer: Any, files: list[str], **data: Any) -> Recipe:
    """A recipe for one model in a folder of its own."""
    folder = workshop.folder / "model"
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = workshop.recipe(*files, **data)
    return recipe.model_copy(update={"model": str(folder)})


@pytest.mark.parametrize("how", ["pad", "square", "any"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_models_with_grids_get_what_is_traced(
    workshop: Any, open_data: Callable[..., Any], talk: Any, make_tokenizer: Any, kind: str, how: str
) -> None:
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=10**6)
    processor.save_pretrained(workshop.folder / "model")
    names = [workshop.noise("a.png", (50, 20)), workshop.noise("b.png", (24, 64), 1), workshop.noise("c.png", (9, 9), 2)]
    records = [
        talk("<image>\nWhat? <image>", "A dog.", image=names[:2]),
        talk("What?", "A dog.", "And <image>?", "A cat.", image=names[2]),
        talk("Hi", "Ho"),
    ]
    limits = {"image_size": [24, 32], "image_aspect_ratio": how, "images_per_sample": 2}
    recipe = model_recipe(workshop, qwen(kind), make_tokenizer("parts"), [workshop.write("a.json", records)], **limits)
    data = open_data(recipe)
    samples = [data.prepare(number) for number in range(3)]
    batch = data.collate(samples)
    config, longest = data.encoder.config, max(len(sample.ids) for sample in samples)
    expected = expected_of(config, Shape(3, longest, 3), (24, 32))
    if how == "any":
        assert {name: kind for name, (_, kind) in described(batch).items()} == {
            name: kind for name, (_, kind) in expected.items()
        }
        assert [cost[4] for cost in data.costs] == [sum(len(i["pixel_values"]) for i in sample.images) for sample in samples]
        assert (batch["image_grid_thw"].prod(1) * 16 <= 24 * 32).all()
    else:
        assert described(batch) == expected
        assert batch["image_grid_thw"].tolist() == [[1, 6, 8]] * 3
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    kinds = (batch["input_ids"] == config.image_token_id).int()
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], mm_token_type_ids=kinds, image_grid_thw=batch["image_grid_thw"]
    )
    assert torch.equal(batch["position_ids"], positions)
    with torch.no_grad():
        together = full_loss(model, batch, 1).item()
        alone = [full_loss(model, data.collate([sample]), 1).item() for sample in samples]
    assert together == pytest.approx(sum(alone), rel=1e-4)
    if how == "any":
        workshop.noise("c.png", (40, 16), 2)
        with pytest.raises(UserError, match=r"a.json\[1\]: it has \d+ tokens now and had \d+ when it was measured"):
            data.prepare(1)
    text = data.encoder.tokenizer.decode(samples[0].ids.tolist())
    pads = "<|image_pad|>" * data.encoder.vision.cost((20, 50)).tokens
    assert f"user\n<|vision_start|>{pads}<|vision_end|>What? <|vision_start|>" in text


def test_gemma_gets_what_is_traced(workshop: Any, open_data: Callable[..., Any], talk: Any, make_tokenizer: Any) -> None:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    ids = {"boi_token_index": 5, "image_token_index": 6, "eoi_token_index": 7}
    config = Gemma3Config(text_config=text | {"vocab_size": 520}, vision_config=vision, mm_tokens_per_image=4, **ids)
    name = workshop.noise("a.png", (50, 20))
    records = [talk("<image>What?", "A dog.", image=name), talk("Hi", "Ho")]
    data = open_data(model_recipe(workshop, config, make_tokenizer("chatml"), [workshop.write("a.json", records)]))
    samples = [data.prepare(0), data.prepare(1)]
    batch = data.collate(samples)
    assert described(batch) == expected_of(data.encoder.config, Shape(2, len(samples[0].ids), 1))
    assert batch["token_type_ids"].sum() == 4
    written = data.encoder.tokenizer.decode(samples[0].ids.tolist())
    assert "user\n\n\n<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>\n\nWhat?" in written


def test_models_and_processors_that_do_not_go_together(
    workshop: Any, open_data: Callable[..., Any], talk: Any, make_tokenizer: Any
) -> None:
    name = workshop.write("a.json", [talk("<image>", "Ho", image=workshop.noise("a.png", (30, 30)))])
    recipe = model_recipe(workshop, qwen("qwen3_vl"), make_tokenizer("parts"), [name])
    with pytest.raises(UserError, match="describes no image processor"):
        open_data(recipe)
    Qwen2VLImageProcessorPil(patch_size=8, merge_size=2).save_pretrained(workshop.folder / "model")
    with pytest.raises(UserError, match=r"the image processor makes .* and the model takes"):
        open_data(recipe)
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2).save_pretrained(workshop.folder / "model")
    Image.new("RGB", (1000, 2)).save(workshop.pictures / "a.png")
    with pytest.raises(UserError, match="refuses an image of 1000 × 2 pixels: absolute aspect ratio"):
        open_data(workshop.recipe(name, image_aspect_ratio="any").model_copy(update={"model": recipe.model}))
    config = json.loads((workshop.folder / "model" / "config.json").read_text())
    (workshop.folder / "model" / "config.json").write_text(json.dumps(config | {"image_token_id": 519}))
    with pytest.raises(UserError, match="has no token 519"):
        open_data(recipe)
