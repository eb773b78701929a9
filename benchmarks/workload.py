"""What the trainer is measured on: a LLaVA with random weights, and conversations that are as unequal as LLaVA's.

The model has the shapes of CLIP and LLaMA, scaled down; the tokenizer knows the few words that the conversations are made of.
Lengths are spread evenly on a logarithmic scale, from captions of a few tokens to dialogues that are cut at the limit. Every
second sample has a picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from oomph.core.forms import CachedForms, FormKey, Traced
from oomph.recipe import Recipe
from oomph.run_records import EvaluationRecord, StepRecord

CHAT = "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
WORDS = [" red", " green", " blue", " round", " square", " small", " large", " thing", " table", " window", " near"]
CUT = 1.25
"""How many times as long as the limit the longest conversation is before it is cut."""
PICTURES = 16


class Sizes(NamedTuple):
    """Sizes of a model: of its blocks, how many, and the words that it could know; an image is `side` patches wide."""

    width: int
    layers: int
    vocabulary: int
    side: int


class Work(NamedTuple):
    """What is trained and on what.

    Attributes:
        sizes: of the model.
        longest: tokens of the longest sample.
        shortest: words of the shortest answer; as many as `longest` where all samples are to be equally long.
        samples: of the data.
        batch: samples of a step.
    """

    sizes: Sizes
    longest: int
    shortest: int
    samples: int
    batch: int


def make(folder: Path, work: Work, **sections: Any) -> Recipe:
    """Writes model, tokenizer, pictures and conversations into a folder, and makes the recipe that trains one epoch.

    Args:
        folder: exists and is empty.
        work: what to make.
        sections: of the recipe, in place of those here.
    """
    _write_model(folder, work.sizes)
    write_data(folder, work)
    rate, file = 1.0e-3, {"path": str(folder / "data.jsonl"), "images": str(folder / "pictures")}
    stage: dict[str, Any] = {
        "name": "finetune",
        "train": {"vision": "frozen", "projector": rate, "language": rate, "head": rate},
        "effective_batch": work.batch,
        "weight_decay": 0.1,
        "warmup": 0.1,
    }
    made: dict[str, Any] = {
        "name": "mixed lengths",
        "model": {"vision": str(folder / "tower"), "projector": "mlp2x_gelu", "language": str(folder / "language")},
        "weights": "random",
        "data": {"max_tokens": work.longest, "files": [file]},
        "hardware": {"gpu": "T4"},
        "run": {"workers": 0},
        "stages": [stage],
    }
    return Recipe.model_validate({**made, **sections})


def _write_model(folder: Path, sizes: Sizes) -> None:
    blocks = {"hidden_size": sizes.width, "intermediate_size": 2 * sizes.width, "num_attention_heads": 4}
    tower = CLIPVisionConfig(**blocks, num_hidden_layers=2, image_size=8 * sizes.side, patch_size=8)
    tower.save_pretrained(folder / "tower")
    LlamaConfig(**blocks, num_hidden_layers=sizes.layers, vocab_size=sizes.vocabulary).save_pretrained(folder / "language")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    known = ["user", "assistant", ":", "?", *WORDS]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["".join(known)] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    made.save_pretrained(folder / "language")


def write_data(folder: Path, work: Work) -> None:
    """Writes ``data.jsonl`` and ``pictures``: conversations of one question, or of several where they are long."""
    random = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        pixels = random.integers(0, 256, (8 * work.sizes.side, 10 * work.sizes.side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    equal = work.shortest == work.longest
    span = np.log([work.shortest, work.longest * CUT])
    wanted = np.full(work.samples, 2 * work.longest) if equal else np.exp(random.uniform(*span, work.samples))
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for number, words in enumerate(wanted.astype(int).tolist()):
            sees = number % 2 == 0
            turns = _turns(random, words, "<image>\n" if sees else "")
            seen = {"image": f"{number % PICTURES}.png"} if sees else {}
            file.write(json.dumps({"id": str(number), **seen, "conversations": turns}) + "\n")


def _turns(random: np.random.Generator, words: int, before: str) -> list[dict[str, str]]:
    """A dialogue of about so many words, in answers of 64 at most."""
    turns = []
    for first in range(0, words, 64):
        answer = "".join(random.choice(WORDS, min(64, words - first)))
        turns += [{"from": "human", "value": f"{'' if first else before}what?"}, {"from": "gpt", "value": answer}]
    return turns


def forms() -> CachedForms:
    """A source of closed forms, which are made in this process."""
    return CachedForms(_make_forms)


def _make_forms(keys: Sequence[FormKey], done: Callable[[FormKey, Traced], None]) -> None:
    from oomph.live.source import make_form

    for key in keys:
        done(key, make_form(key))


class Listener:
    """Keeps the records of a run's steps.

    Args:
        after: called with each as soon as the step is done.
    """

    def __init__(self, after: Callable[[StepRecord], object] = lambda record: None) -> None:
        self.steps: list[StepRecord] = []
        self.notes: list[str] = []
        self._after = after

    def note(self, sentence: str) -> None:
        """Something noteworthy."""
        self.notes.append(sentence)

    def begin(self, stage: str, steps: int, done: int) -> None:
        """The steps begin."""

    def step(self, record: StepRecord) -> None:
        """A step is done; step 0 is the dry run."""
        if record.step:
            self.steps.append(record)
            self._after(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Nothing is evaluated."""

    def end(self) -> None:
        """The steps end."""
