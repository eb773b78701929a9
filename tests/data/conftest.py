"""Small tokenizers, model folders, pictures and data files, all made here."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from oomph.recipe import Recipe

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    # The content is stripped, and there is no generation prompt (Llama-2's form).
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set first = '<<SYS>>\n' + "
        "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set first = '' %}{% endif %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (first if loop.first else '') + "
        "m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "vicuna": (
        "{{ bos_token }}A chat.{% for m in messages %}{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'] }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    ),
    "marked": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # The last answer alone gets its thoughts, empty ones here (Qwen3's form).
    "thinking": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Contents are lists of parts, and an image is written with what stands around it (Qwen2-VL's form).
    "parts": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
CORPUS = [
    "A chat between a curious user and an assistant. USER: What is in the picture? ASSISTANT: A small brown dog on a lawn.",
    "user assistant system the quick brown fox jumps over the lazy dog. Describe the image. It shows three trees and a house.",
    "Wie heißt das? Ein Haus. où est le chat? 猫在哪里? 答案在这里。",
] * 3


@functools.cache
def _bpe(family: str) -> str:
    """A trained tokenizer as JSON: of bytes as GPT-2's, or of characters with a mark for spaces as Llama's."""
    tokenizer = Tokenizer(models.BPE(unk_token=None if family == "bytes" else "<unk>", fuse_unk=family != "bytes"))
    if family == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = []
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if family == "spaces":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer.to_str()


def make_tokenizer(style: str | None = "chatml", family: str = "bytes") -> Any:
    """A fast tokenizer with one of `TEMPLATES`, or with none."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(family)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if style is not None:
        made.chat_template = TEMPLATES[style]
    return made


class Workshop:
    """A folder with a small model in parts, pictures and data files, and recipes for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = folder / "pictures"
        self.pictures.mkdir()

    def save_model(self, style: str | None = "chatml", family: str = "bytes") -> None:
        """The parts: a tower of 16 patches, and a language model with its tokenizer."""
        tower = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        tower.update({"image_size": 32, "patch_size": 8, "projection_dim": 32})
        tower.save_pretrained(self.folder / "tower")
        text = LlamaConfig(vocab_size=520, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        text.save_pretrained(self.folder / "language")
        make_tokenizer(style, family).save_pretrained(self.folder / "language")

    def picture(self, name: str, size: tuple[int, int] = (40, 30), color: tuple[int, int, int] = (200, 30, 30)) -> str:
        """A picture of one colour, (width, height)."""
        Image.new("RGB", size, color).save(self.pictures / name)
        return name

    def noise(self, name: str, size: tuple[int, int], seed: int = 0) -> str:
        """A picture of noise, (width, height)."""
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(self.pictures / name)
        return name

    def write(self, name: str, records: Sequence[Any]) -> str:
        """A data file: JSONL by its name, else a JSON list."""
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        text = "\n".join(lines) + "\n" if name.endswith(".jsonl") else "[" + ",\n ".join(lines) + "]"
        (self.folder / name).write_text(text, encoding="utf-8")
        return name

    def recipe(self, *files: str | dict[str, Any], text_only: bool = False, **data: Any) -> Recipe:
        """A recipe of one stage over data files, by name or as the recipe's own entries."""
        entries = [
            {"path": str(self.folder / file), "images": str(self.pictures)} if isinstance(file, str) else file for file in files
        ]
        parts = {"vision": str(self.folder / "tower"), "projector": "linear", "language": str(self.folder / "language")}
        return Recipe.model_validate(
            {
                "name": "small",
                "model": parts["language"] if text_only else parts,
                "data": {"max_tokens": 512, "files": entries, **data},
                "hardware": {"gpu": "A100-SXM4-40GB"},
                "stages": [{"name": "tune", "train": {"language": 1.0e-4}, "effective_batch": 4}],
            }
        )


def talk(*texts: str, system: str | None = None, **more: Any) -> dict[str, Any]:
    """A record in LLaVA's form: question and answer in turn."""
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"conversations": ([{"from": "system", "value": system}] if system else []) + turns, **more}


@pytest.fixture(name="make_tokenizer", scope="session")
def _make_tokenizer() -> Callable[..., Any]:
    return make_tokenizer


@pytest.fixture(name="talk", scope="session")
def _talk() -> Callable[..., dict[str, Any]]:
    return talk


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """An empty workshop with a model."""
    made = Workshop(tmp_path)
    made.save_model()
    return made


@pytest.fixture
def open_data() -> Callable[..., Any]:
    """Opens the data of a recipe's one stage, and drops what is said beside it."""

    def opened(recipe: Recipe, notes: list[str] | None = None, **options: Any) -> Any:
        from oomph.live.data.dataset import open_dataset

        return open_dataset(recipe, recipe.stages[0], (notes if notes is not None else []).append, **options)

    return opened


@pytest.fixture(scope="session")
def new_workshop() -> Callable[[Path], Workshop]:
    """Makes workshops without a model."""
    return Workshop
