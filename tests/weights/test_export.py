"""What a saved folder is: transformers loads it without us, it computes the same, and takes prompts as training did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from oomph.live.data.image_token import place_image_token
from oomph.live.data.pictures import decode
from oomph.live.data.samples import Sample, Turn
from oomph.live.export import save_model
from oomph.live.model import read_config

ALIGN = {"vision": "frozen", "language": "frozen", "head": "frozen", "projector": 1e-3}
QUESTION = "What is this?"
ALONE = """
import sys
sys.modules["oomph"] = None
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

picture, *folders = sys.argv[1:]
for folder in folders:
    options = {"trust_remote_code": True} if "pool_" in folder else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": "<image>\\nWhat is this?"}], add_generation_prompt=True, tokenize=False
    )
    made = processor(images=Image.open(picture).convert("RGB"), text=prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model(**load_file(folder + "/given")).logits.float()
        answer = model.generate(**made, max_new_tokens=6, do_sample=False)
    tensors = {"logits": logits, "ids": made["input_ids"], "pixels": made["pixel_values"], "answer": answer}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder + "/found")
"""


def trained(shop: Any, recipe: Any, **options: Any) -> Any:
    """A model whose trained weights are no longer those that it began with."""
    model = shop.build(recipe, **options)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def prompt_of(encoder: Any, size: tuple[int, int] = (30, 40)) -> torch.Tensor:
    """The tokens that an answer would follow."""
    turns = (Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", "Yes"))
    [encoded] = encoder.encode([Sample("", ("a",), turns)], [[size]])
    return torch.from_numpy(encoded.ids[: int((encoded.labels != -100).argmax())])


def test_transformers_alone_loads_it_and_computes_the_same(
    shop: Any, encoder_of: Any, tmp_path: Path, logits: Callable[..., torch.Tensor]
) -> None:
    shop.save_language("as-narrow", hidden_size=32)
    picture = shop.picture("wide.png", "red", (64, 48))
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for kind, shape in {"mlp2x_gelu": "pad", "linear": "square", "identity": "pad", "pool_mlp3x_gelu": "pad"}.items():
        whole = kind == "identity"
        language, train = ("as-narrow", {**ALIGN, "language": 1e-4}) if whole else ("language", dict(ALIGN))
        if whole:
            del train["projector"]
        recipe = shop.recipe(train, projector=kind, language=language, data={"image_aspect_ratio": shape})
        model, encoder, folder = trained(shop, recipe), encoder_of(recipe), tmp_path / kind
        save_model(model, folder, recipe, encoder)
        image_token = model.config.image_token_id
        ids = torch.arange(80).view(2, 40) + 10
        ids[0, : encoder.vision.cost((32, 32)).tokens] = image_token
        torch.manual_seed(5)
        save_file({"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}, folder / "given")
        pixels = encoder.vision.tensors(decode(picture))["pixel_values"]
        expected[kind] = {"logits": logits(model, image_token), "ids": prompt_of(encoder, (48, 64)), "pixels": pixels}
    command = [sys.executable, "-c", ALONE, str(picture), *(str(tmp_path / kind) for kind in expected)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, wanted in expected.items():
        found = load_file(tmp_path / kind / "found")
        torch.testing.assert_close(found["logits"], wanted["logits"], rtol=0, atol=1e-6)
        assert torch.equal(found["ids"][0], wanted["ids"])
        torch.testing.assert_close(found["pixels"], wanted["pixels"], rtol=0, atol=1e-6)
        assert len(found["answer"][0]) > len(found["ids"][0])


@pytest.mark.parametrize("shape", ["pad", "square"])
@pytest.mark.parametrize("size", [(64, 48), (33, 90), (32, 32)])
def test_the_processor_makes_of_pictures_what_training_makes(
    shop: Any, encoder_of: Any, shape: str, size: tuple[int, int], tmp_path: Path
) -> None:
    recipe = shop.recipe(ALIGN, data={"image_aspect_ratio": shape})
    encoder = encoder_of(recipe)
    save_model(shop.build(recipe), tmp_path / "model", recipe, encoder)
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    smooth = np.stack([x, y, x * y], axis=-1) * 255
    picture = Image.fromarray(smooth.astype(np.uint8))
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    theirs = processor(images=picture, text="<image>", return_tensors="pt")["pixel_values"]
    ours = encoder.vision.tensors(picture)["pixel_values"]
    assert theirs.shape == ours.shape
    # Cutting out before or after resizing moves the picture by less than a pixel.
    tolerance = 1e-6 if shape == "pad" or size[0] == size[1] else 0.3
    assert (theirs - ours).abs().max() < tolerance


def test_what_transformers_has_no_class_for_is_refused_by_it(shop: Any, encoder_of: Any, tmp_path: Path) -> None:
    recipe = shop.recipe(ALIGN, projector="mlp3x_gelu")
    save_model(shop.build(recipe), tmp_path / "model", recipe, encoder_of(recipe))
    for auto in (AutoConfig, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match="trust_remote_code"):
            auto.from_pretrained(tmp_path / "model", trust_remote_code=False)
    assert read_config(tmp_path / "model").projector == "mlp3x_gelu"
    assert "trust_remote_code=True" in (tmp_path / "model" / "README.md").read_text()


def test_a_saved_folder_is_a_model_that_can_be_trained_on(
    shop: Any, encoder_of: Any, tmp_path: Path, logits: Callable[..., torch.Tensor]
) -> None:
    for kind in ("linear", "pool_linear"):
        recipe = shop.recipe(ALIGN, projector=kind)
        model = trained(shop, recipe)
        save_model(model, tmp_path / kind, recipe, encoder_of(recipe))
        following = shop.recipe(ALIGN, model=str(tmp_path / kind))
        again = shop.build(following)
        image_token = model.config.image_token_id
        assert again.config.image_token_id == encoder_of(following).vision.token_id == image_token
        torch.testing.assert_close(logits(again, image_token), logits(model, image_token))
        save_model(again, tmp_path / f"{kind}-again", following, encoder_of(following))
        assert shop.key(following).configurations()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_are_merged_and_lie_beside(
    shop: Any, encoder_of: Any, tmp_path: Path, precision: str, logits: Callable[..., torch.Tensor]
) -> None:
    base = shop.recipe(ALIGN)
    save_model(trained(shop, base), tmp_path / "base", base, encoder_of(base))
    train = {**ALIGN, "lora": 1e-4}
    recipe = shop.recipe(train, lora={"rank": 4, "alpha": 16, "target_modules": "all-linear"})
    model = trained(shop, recipe, previous=tmp_path / "base", precision=precision)
    image_token = model.config.image_token_id
    save_model(model, tmp_path / "model", recipe, encoder_of(recipe), tmp_path / "base")
    expected = logits(model.float(), image_token)
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before = logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32), image_token)
    assert (expected - before).abs().max() > 0.1
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[precision]
    torch.testing.assert_close(logits(merged, image_token), expected, rtol=0, atol=tolerance)
    assert not [name for name in load_file(tmp_path / "model" / "model.safetensors") if "lora" in name or "base_layer" in name]
    whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=getattr(torch, precision))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for attributes that have other names by now
        adapted = PeftModel.from_pretrained(whole, tmp_path / "model" / "adapter").float()
    torch.testing.assert_close(logits(adapted, image_token), expected, rtol=0, atol=1e-5)
    assert str(tmp_path / "base") in (tmp_path / "model" / "README.md").read_text()


def test_quantized_weights_are_saved_as_what_they_stand_for(
    shop: Any, encoder_of: Any, tmp_path: Path, logits: Callable[..., torch.Tensor]
) -> None:
    for kind in ("nf4", "int8"):
        sections = {"lora": {"rank": 4}, "quantization": {"kind": kind}}
        recipe = shop.recipe(
            {"language": "frozen", "head": "frozen", "lora": 1e-2}, model=str(shop.folder / "language"), **sections
        )
        model = trained(shop, recipe)
        expected = logits(model)
        save_model(model, tmp_path / kind, recipe, encoder_of(recipe))
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["use_cache"]
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        tolerance = 1e-5 if kind == "nf4" else 0.02  # int8 layers also round their inputs
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_frozen_weights_keep_their_precision_and_trained_ones_theirs(shop: Any, encoder_of: Any, tmp_path: Path) -> None:
    recipe = shop.recipe(ALIGN)
    save_model(shop.build(recipe, precision="bfloat16-mixed"), tmp_path / "model", recipe, encoder_of(recipe))
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if "projector" in name else torch.bfloat16), name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"


def test_an_adapter_on_a_tied_head_unties_it(shop: Any, encoder_of: Any, tmp_path: Path, logits: Any) -> None:
    shop.save_language("tied-too", tie_word_embeddings=True)
    lora = {"rank": 4, "target_modules": ["lm_head", "q_proj"]}
    recipe = shop.recipe({"language": "frozen", "lora": 1e-4}, model=str(shop.folder / "tied-too"), lora=lora)
    model = trained(shop, recipe)
    save_model(model, tmp_path / "model", recipe, encoder_of(recipe))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(model))


def test_answers_end_where_the_template_ends_turns(shop: Any, encoder_of: Any, tmp_path: Path) -> None:
    recipe = shop.recipe({"language": 1e-4, "head": 1e-4}, model=str(shop.folder / "language"))
    save_model(shop.build(recipe), tmp_path / "model", recipe, encoder_of(recipe))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, tokenizer.convert_tokens_to_ids("<|end|>")]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<|user|>Hi<|end|>"


@pytest.mark.parametrize("room", [20, 0, -5])
def test_the_image_tag_gets_a_number_that_the_model_has(make_tokenizer: Any, room: int, tmp_path: Path) -> None:
    tokenizer, before = make_tokenizer(), make_tokenizer()
    size = len(before)
    config = LlavaConfig(text_config=LlamaConfig(vocab_size=size + room, hidden_size=32, num_attention_heads=2))
    displaced = place_image_token(config, tokenizer)
    number = config.image_token_id
    assert number < size + room
    assert tokenizer.convert_tokens_to_ids("<image>") == number
    assert tokenizer("<image>", add_special_tokens=False)["input_ids"] == [number]
    assert (displaced == "") == (room > 0)
    text = "What is this? A red cat. A blue dog. Zürich 猫"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert number not in ids
    kept = [token for token in before.get_vocab() if before.get_vocab()[token] != number]
    assert all(tokenizer.convert_tokens_to_ids(token) == before.get_vocab()[token] for token in kept)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(f"<image>{text}", add_special_tokens=False)["input_ids"] == [number, *ids]
    place_image_token(config, again)
    assert config.image_token_id == number
