"""Runs of models that train in milliseconds: a text model, and a LLaVA of one block each, with data made here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from oomph.core.forms import CachedForms, FormKey, Traced
from oomph.recipe import Recipe
from oomph.run_records import EvaluationRecord, RunSummary, StepRecord

CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
WORDS = "red green blue round square small large thing on a table near the window".split()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower with several, and sums are the same every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tower, a language model with its tokenizer, pictures, and data files of lengths of all kinds."""
    folder = tmp_path_factory.mktemp("parts")
    tower = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    tower.update({"image_size": 16, "patch_size": 8, "projection_dim": 16})
    tower.save_pretrained(folder / "tower")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(vocab_size=320, **sizes).save_pretrained(folder / "language")
    LlamaConfig(vocab_size=320, attention_dropout=0.2, **sizes).save_pretrained(folder / "dropping")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    made.save_pretrained(folder / "language")
    made.save_pretrained(folder / "dropping")
    _write_data(folder)
    return folder


def _write_data(folder: Path) -> None:
    random = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    seen, told = [], []
    for number in range(12):
        name = f"{number}.png"
        Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / "pictures" / name)
        answer = " ".join(random.choice(WORDS, 2 + 5 * (number % 4)))
        seen.append({"id": name, "image": name, **talk("<image>\nWhat is it?", answer)})
        told.append(talk("What is it?", " ".join(random.choice(WORDS, 2 + 6 * (number % 5)))))
    for name, records in (("seen.jsonl", seen), ("told.jsonl", told), ("held.jsonl", told[:5])):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def talk(question: str, answer: str) -> dict[str, Any]:
    """A record in LLaVA's form."""
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


@pytest.fixture(scope="session")
def text_recipe(parts: Path) -> Callable[..., Recipe]:
    """A function that makes a recipe of one stage over the text model; sections are updated by name."""

    def made(**sections: Any) -> Recipe:
        stage = {"name": "tune", "train": {"language": 2.0e-3, "head": 1.0e-3}, "effective_batch": 4, "epochs": 2}
        recipe: dict[str, Any] = {
            "name": "talk",
            "model": str(parts / "language"),
            "weights": "random",
            "data": {"max_tokens": 256, "files": [{"path": str(parts / "told.jsonl")}], **sections.pop("data", {})},
            "hardware": {"gpu": "T4"},
            "stages": [{**stage, **sections.pop("stage", {})}],
        }
        return Recipe.model_validate({**recipe, **sections})

    return made


@pytest.fixture(scope="session")
def image_recipe(parts: Path) -> Callable[..., Recipe]:
    """A function that makes a recipe of two stages over the parts, the second with text-only samples mixed in."""

    def made(**sections: Any) -> Recipe:
        seen = {"path": str(parts / "seen.jsonl"), "images": str(parts / "pictures")}
        recipe: dict[str, Any] = {
            "name": "see and talk",
            "model": {"vision": str(parts / "tower"), "projector": "linear", "language": str(parts / "language")},
            "weights": "random",
            "data": {"max_tokens": 128, "files": [seen], "evaluation": [seen]},
            "hardware": {"gpu": "T4", "gpus": 2},
            "stages": [
                {
                    "name": "align",
                    "train": {"vision": "frozen", "projector": 1.0e-3, "language": "frozen", "head": "frozen"},
                    "effective_batch": 4,
                },
                {
                    "name": "tune",
                    "train": {"vision": "frozen", "projector": 1.0e-3, "language": 1.0e-3, "head": 1.0e-3},
                    "effective_batch": 6,
                    "data": {"files": [seen, {"path": str(parts / "told.jsonl")}]},
                    "weight_decay": 0.1,
                },
            ],
        }
        return Recipe.model_validate({**recipe, **sections})

    return made


class Listener:
    """Keeps what a run tells, and may do something after a step.

    Args:
        after: called with each record of a step that was committed.
    """

    def __init__(self, after: Callable[[StepRecord], object] = lambda record: None) -> None:
        self.notes: list[str] = []
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvaluationRecord] = []
        self._after = after

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def begin(self, stage: str, steps: int, done: int) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)
        if record.step:
            self._after(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        self.evaluations.append(record)

    def end(self) -> None:
        pass


def make_forms(keys: Sequence[FormKey], done: Callable[[FormKey, Traced], None]) -> None:
    """Makes them in this process."""
    from oomph.live.source import make_form

    for key in keys:
        done(key, make_form(key))


class Trained:
    """A run: its summary, what it told, its folder and its log."""

    def __init__(self, summary: RunSummary, told: Listener, folder: Path) -> None:
        from oomph.live.run_folder import read_log

        self.summary, self.told, self.folder = summary, told, folder
        self.log = read_log(folder)
        self.steps = [line for line in self.log if isinstance(line, StepRecord) and line.step]
        self.losses = [line.loss for line in self.steps]

    def weights(self, stage: str = "tune") -> dict[str, torch.Tensor]:
        """The tensors of a stage's last checkpoint."""
        from safetensors.torch import load_file

        newest = max((self.folder / stage / "checkpoints").iterdir())
        return load_file(newest / "model.safetensors")


def train_in(folder: Path, recipe: Recipe, told: Listener, limit: int | None = None, resume: bool = False) -> Trained:
    """Trains a recipe in a folder."""
    from oomph.live.trainer import Options, train

    return Trained(train(recipe, CachedForms(make_forms), Options(folder, resume, limit), told), told, folder)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Trained]:
    """A function that trains a recipe in a folder by its name, and gives what became of it."""

    def trained(recipe: Recipe, name: str = "run", told: Listener | None = None, **options: Any) -> Trained:
        return train_in(tmp_path / name, recipe, told or Listener(), **options)

    return trained


@pytest.fixture(scope="session")
def smallest(text_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes that a step of the text model takes at the least: one micro-batch for each sample, nothing recomputed."""
    recipe = text_recipe(memory={"micro_batch": 1}, stage={"steps": 1})
    made = train_in(tmp_path_factory.mktemp("smallest") / "run", recipe, Listener())
    return max(record.measured_peak_bytes or 0 for record in made.told.steps)


@pytest.fixture(name="Listener", scope="session")
def _listener() -> type[Listener]:
    return Listener


@pytest.fixture
def alike() -> Callable[[Any, Any], None]:
    """A function that compares two runs: losses and weights within a millionth."""

    def check(one: Trained, other: Trained, stage: str = "tune") -> None:
        assert one.losses == pytest.approx(other.losses, rel=1e-6)
        ours, theirs = one.weights(stage), other.weights(stage)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-6)

    return check
