"""Small models in folders: towers, language models with tokenizers, and recipes that train them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from oomph.core.forms import FormKey
from oomph.live.data.dataset import open_dataset
from oomph.live.data.encoding import Encoder, open_encoder
from oomph.live.export import save_model
from oomph.live.weights import build_stage_model, parameter_groups
from oomph.recipe import Recipe, Stage

CHAT = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
TOWER |= {"patch_size": 8, "projection_dim": 16}
TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 256}
FROZEN = {"vision": "frozen", "language": "frozen", "head": "frozen"}


def make_tokenizer(size: int = 300) -> Any:
    """A tokenizer of bytes with a few merges, `size` tokens in all, and a chat template."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    text = "What is this? A red cat. A blue dog. What colour is it? The cat is red, the dog blue."
    made.train_from_iterator([text] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    return fast


class Shop:
    """A folder with a tower and a language model, with weights."""

    def __init__(self, folder: Path, plain_key: FormKey) -> None:
        self.folder, self._plain = folder, plain_key
        torch.manual_seed(1)
        self.tower = CLIPVisionModel(CLIPVisionConfig(**TOWER)).eval()
        self.tower.save_pretrained(folder / "tower")
        self.language = self.save_language("language")

    def save_language(self, name: str, tokens: int = 300, kind: type[Any] = LlamaConfig, **changes: Any) -> Any:
        """Saves a language model with its tokenizer, and returns it."""
        model = AutoModelForCausalLM.from_config(kind(**(TEXT | changes))).eval()
        model.save_pretrained(self.folder / name)
        make_tokenizer(tokens).save_pretrained(self.folder / name)
        return model

    def save_whole_clip(self, name: str) -> Any:
        """Saves a tower inside the CLIP that it comes with, and returns the tower."""
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
        clip = CLIPModel(CLIPConfig(text_config=text | {"bos_token_id": 1, "eos_token_id": 2}, vision_config=TOWER))
        clip.save_pretrained(self.folder / name)
        return clip.vision_model

    def picture(self, name: str, color: str, size: tuple[int, int] = (40, 30)) -> Path:
        """Saves a picture of one colour, (width, height)."""
        Image.new("RGB", size, color).save(self.folder / name)
        return self.folder / name

    def recipe(self, train: Mapping[str, Any], **changes: Any) -> Recipe:
        """A recipe of one stage; some of the changes are those of its model or of the stage, the rest its own."""
        kind = changes.pop("projector", "mlp2x_gelu")
        parts = {
            "vision": str(self.folder / changes.pop("vision", "tower")),
            "projector": "mlp2x_gelu",
            "language": str(self.folder / changes.pop("language", "language")),
        }
        stage = {"name": "tune", "train": dict(train), "effective_batch": 2}
        sections = ("balance", "experts", "lora", "quantization", "weight_decay")
        stage |= {name: changes.pop(name) for name in sections if name in changes}
        recipe = Recipe.model_validate(
            {
                "name": "small",
                "model": changes.pop("model", parts),
                "data": {"max_tokens": 200, **changes.pop("data", {})},
                "hardware": {"gpu": "T4"},
                "stages": [stage],
                **changes,
            }
        )
        if isinstance(recipe.model, str):
            return recipe
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"projector": kind})})

    def key(self, recipe: Recipe, precision: Any = "float32") -> FormKey:
        """The key of a recipe's stage."""
        stage, parts = recipe.stages[0], recipe.model
        named: dict[str, Any] = {"model": parts}
        if not isinstance(parts, str):
            layer, select = parts.vision_feature_layer, parts.vision_feature_select
            named = {"vision": parts.vision, "language": parts.language, "projector": parts.projector}
            named |= {"vision_feature_layer": layer, "vision_feature_select": select}
        return replace(
            self._plain,
            **named,
            experts="" if stage.experts is None else stage.experts.model_dump_json(),
            balance="" if stage.balance is None else stage.balance.model_dump_json(),
            lora="" if stage.lora is None else stage.lora.model_dump_json(),
            quantization="" if stage.quantization is None else stage.quantization.model_dump_json(),
            trained=tuple(text for text, rate in stage.train.items() if rate != "frozen"),
            frozen=tuple(text for text, rate in stage.train.items() if rate == "frozen"),
            precision=precision,
        )

    def build(self, recipe: Recipe, previous: Path | None = None, precision: Any = "float32", **options: Any) -> Any:
        """The model of a recipe's stage."""
        return build_stage_model(self.key(recipe, precision), recipe, previous, **options)


class Lesson:
    """A data file of pictures in one colour, and a model that has learned them by heart.

    Attributes:
        file: the data; its pictures lie beside it.
        model: the folder of the model.
    """

    COLORS = ("red", "blue", "green", "black")

    def __init__(self, shop: Shop, folder: Path) -> None:
        self.folder, self.file, self.model = folder, folder / "colors.jsonl", folder / "model"
        records = []
        for color in self.COLORS:
            Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
            question = {"from": "human", "value": "<image>\nWhat colour is it?"}
            answer = {"from": "gpt", "value": f"It is {color}."}
            more = [{"from": "human", "value": "Is it a cat?"}, {"from": "gpt", "value": "No."}]
            talk = [question, answer, *(more if color == "blue" else [])]
            records.append({"id": color, "image": f"{color}.png", "conversations": talk})
        self.file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        train = {"vision": 2e-3, "projector": 2e-3, "language": 2e-3, "head": 2e-3}
        recipe = shop.recipe(train, weights="random", data={"files": [{"path": str(self.file)}]})
        self._learn(recipe, shop.build(recipe))

    def _learn(self, recipe: Recipe, model: Any) -> None:
        dataset = open_dataset(recipe, recipe.stages[0], lambda sentence: None)
        batch = dataset.collate([dataset.prepare(index) for index in range(len(dataset))])
        optimizer = torch.optim.AdamW(parameter_groups(model, recipe.stages[0]))
        for _ in range(120):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if loss.item() < 0.01:
                break
        save_model(model, self.model, recipe, dataset.encoder)


@pytest.fixture(scope="session")
def lesson(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    """A model that knows four colours."""
    return Lesson(shop, tmp_path_factory.mktemp("lesson"))


def encoder_of(recipe: Recipe, stage: Stage | None = None) -> Encoder:
    """The encoder of a recipe's stage."""
    return open_encoder(recipe, stage or recipe.stages[0], lambda sentence: None)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors this small are computed fastest by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(name="encoder_of", scope="session")
def _encoder_of() -> Callable[..., Encoder]:
    return encoder_of


@pytest.fixture(name="make_tokenizer", scope="session")
def _make_tokenizer() -> Callable[..., Any]:
    return make_tokenizer


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, plain_key: FormKey) -> Shop:
    """A tower and a language model that nobody changes; names that tests add are their own."""
    return Shop(tmp_path_factory.mktemp("shop"), plain_key)


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """A function from a model to its logits for two rows of tokens, the first with an image where it sees images."""

    def run(model: Any, image_token: int | None = None) -> torch.Tensor:
        ids = torch.arange(80).view(2, 40) + 10
        inputs: dict[str, Any] = {"input_ids": ids}
        if image_token is not None:
            pooled = str(getattr(model.config, "projector", "")).startswith("pool_")
            ids[0, : 4 if pooled else 16] = image_token
            torch.manual_seed(5)
            inputs["pixel_values"] = torch.randn(1, 3, 32, 32)
        training = model.training
        with torch.no_grad():
            result: torch.Tensor = model.eval()(**inputs).logits.float()
        model.train(training)
        return result

    return run


@pytest.fixture(scope="session")
def read_json() -> Callable[[Path], Any]:
    """Reads a JSON file."""
    return lambda path: json.loads(path.read_text(encoding="utf-8"))
