"""docs/chat-and-eval.md: its screens, with a small model that has learned four colours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from oomph.core.forms import FormKey
from oomph.live.data.dataset import open_dataset
from oomph.live.export import SETTINGS, save_model
from oomph.live.weights import build_stage_model, parameter_groups
from oomph.recipe import Recipe

PAGE = "docs/chat-and-eval.md"
COLORS = ("red", "blue", "green", "black")
CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def record(color: str, answer: str) -> dict[str, Any]:
    question = {"from": "human", "value": "<image>\nWhat colour is it?"}
    return {"image": f"{color}.png", "conversations": [question, {"from": "gpt", "value": f"It is {answer}."}]}


@pytest.fixture
def reader_with_model(reader: Any, plain_key: FormKey) -> Iterator[Any]:
    folder, threads = reader.folder, torch.get_num_threads()
    torch.set_num_threads(1)
    for color in COLORS:
        Image.new("RGB", (64, 48), color).save(folder / f"{color}.png")
    (folder / "train.jsonl").write_text("".join(json.dumps(record(color, color)) + "\n" for color in COLORS), encoding="utf-8")
    asked = [*((color, color) for color in COLORS[:2]), ("green", "yellow"), ("black", "black"), ("blue", "blue")]
    (folder / "held-out.jsonl").write_text("".join(json.dumps(record(*pair)) + "\n" for pair in asked), encoding="utf-8")
    CLIPVisionConfig(image_size=32, patch_size=8, **SIZES).save_pretrained(folder / "tower")
    LlamaConfig(vocab_size=300, **SIZES).save_pretrained(folder / "language")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant What colour is it? It is red. blue. green. black."] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    made.save_pretrained(folder / "language")
    teach(folder, plain_key)
    yield reader
    torch.set_num_threads(threads)


def teach(folder: Any, plain_key: FormKey) -> None:
    train = {"vision": 2e-3, "projector": 2e-3, "language": 2e-3, "head": 2e-3}
    parts = {"vision": str(folder / "tower"), "projector": "mlp2x_gelu", "language": str(folder / "language")}
    content = {"name": "colors", "model": parts, "weights": "random", "hardware": {"gpu": "T4"}}
    content["data"] = {"max_tokens": 128, "files": [{"path": str(folder / "train.jsonl")}]}
    content["stages"] = [{"name": "tune", "train": train, "effective_batch": 4}]
    recipe = Recipe.model_validate(content)
    named = {**parts, "vision_feature_layer": -2, "vision_feature_select": "patch", "trained": tuple(train)}
    model = build_stage_model(replace(plain_key, **named, precision="float32"), recipe)
    dataset = open_dataset(recipe, recipe.stages[0], lambda sentence: None)
    batch = dataset.collate([dataset.prepare(index) for index in range(len(dataset))])
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.stages[0]))
    for _ in range(150):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, folder / "colors", recipe, dataset.encoder)


def test_the_page_shows_what_is_printed(
    reader_with_model: Any, pages: dict[str, Any], follow: Callable[[Any, Any], None]
) -> None:
    assert len(pages[PAGE].commands()) == 2
    follow(reader_with_model, pages[PAGE])
    assert f"`{SETTINGS}`" in pages[PAGE].text
