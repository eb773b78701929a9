"""docs/data.md: its recipe, its data and its screens, with a small model in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from oomph.live.data.pictures import MAX_PIXELS

PAGE = "docs/data.md"
FILES = ("train.jsonl", "talk.jsonl")
CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


@pytest.fixture
def folder(reader: Any, pages: dict[str, Any]) -> Any:
    """The reader's folder with what the page speaks of."""
    (reader.folder / "pictures").mkdir()
    for name, color in (("cat", "red"), ("dog", "blue")):
        Image.new("RGB", (64, 48), color).save(reader.folder / "pictures" / f"{name}.png")
    for name, block in zip(FILES, pages[PAGE].blocks("jsonl"), strict=True):
        (reader.folder / name).write_text(block.text, encoding="utf-8")
    tower = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tower.update({"image_size": 32, "patch_size": 8})
    tower.save_pretrained(reader.folder / "tower")
    text = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(**text).save_pretrained(reader.folder / "language")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant What is this? A red cat. A blue dog."] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    made.save_pretrained(reader.folder / "language")
    return reader


def test_the_page_shows_what_is_printed(folder: Any, pages: dict[str, Any], follow: Callable[[Any, Any], None]) -> None:
    shown = [command.output for command in pages[PAGE].commands()]
    assert len(shown) == 2
    assert all(shown)
    follow(folder, pages[PAGE])


def test_the_largest_image_is_the_one_that_is_decoded(pages: dict[str, Any]) -> None:
    assert f"{MAX_PIXELS:,} pixels" in " ".join(pages[PAGE].text.split())
