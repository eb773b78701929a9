"""Makes the data of `digits.yaml`: pictures of handwritten digits, conversations about them, and a tokenizer.

    python recipes/demo/make_data.py [FOLDER] [--digits N] [--seed N]

The digits are scikit-learn's 1,797 of 8 × 8 pixels. One in six is held out: no picture of it is trained on. Of each of the
others there are some more pictures, a little turned, moved and scaled. All of it follows from the seed.

    FOLDER/pictures/            train-0000-0.png ..., test-0005.png ...
    FOLDER/captions.json        a picture and what it shows, for the stage that aligns
    FOLDER/conversations.json   questions about a picture, for the stage that fine-tunes
    FOLDER/talk.jsonl           the same questions without pictures
    FOLDER/test.json            one question about each digit that is held out
    FOLDER/tokenizer/           trained on these texts, with a chat template
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Record = dict[str, Any]
Ink = NDArray[np.float64]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 32
"""Pixels of a side of the pictures: those of the tower."""
HELD_OUT = 6
"""One digit in so many is held out."""
VARIANTS = 3
"""Pictures of each digit that is trained on, the plain one among them."""
VOCABULARY = 511
"""The most tokens: the language model has an embedding more, for the image."""
LONG = 0.01
"""The share of conversations with all questions."""

CAPTION = "A handwritten {}."
DIGIT = ("Which digit is this?", "What digit do you see?", "Read the digit.", "Which number is written here?")
MORE: tuple[tuple[str, Callable[[int], str]], ...] = (
    ("Write {} as a figure.", str),
    ("Is {} even or odd?", lambda digit: "Odd." if digit % 2 else "Even."),
    ("Which number comes after {}?", lambda digit: f"{(*NAMES, 'ten')[digit + 1].capitalize()}."),
    ("Which digit comes before {}?", lambda digit: f"{NAMES[digit - 1].capitalize()}." if digit else "None does."),
    ("Is {} larger than four?", lambda digit: "Yes." if digit > 4 else "No."),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>")


def main() -> None:
    """Reads the command line and makes the data."""
    parser = argparse.ArgumentParser(description="Make the data of digits.yaml.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/demo"), help="where it goes (build/demo)")
    parser.add_argument("--digits", type=int, help="how many to take; else all 1,797")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    arguments = parser.parse_args()
    made = make(arguments.folder, arguments.seed, arguments.digits)
    print(", ".join(f"{number:,} {what}" for what, number in made.items()) + f" in {arguments.folder}")


def make(folder: Path, seed: int = 0, number: int | None = None) -> dict[str, int]:
    """Makes all of the data, the same for the same seed.

    Args:
        folder: is made where it is missing; files of the same names are replaced.
        seed: of the digits that are held out, of the variants and of the questions.
        number: of digits, the first ones; none for all.

    Returns:
        How many there are of what.
    """
    digits = load_digits()
    images, labels = digits.images[:number], digits.target[:number].tolist()
    draw = random.Random(seed)
    held_out = choose(draw, len(images))
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    captions, conversations, test = [], [], []
    for which, (ink, label) in enumerate(zip(images, labels, strict=True)):
        if which in held_out:
            name = _draw(folder, f"test-{which:04}", ink)
            test.append(_record(name, [(draw.choice(DIGIT), _said(label))]))
            continue
        for variant in range(VARIANTS):
            name = _draw(folder, f"train-{which:04}-{variant}", ink, draw if variant else None)
            captions.append(_record(name, [("", CAPTION.format(NAMES[label]))]))
            conversations.append(_record(name, _questions(label, draw)))
    talk = list(_talk())
    for file, records in {"captions": captions, "conversations": conversations, "test": test}.items():
        (folder / f"{file}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    (folder / "talk.jsonl").write_text("".join(json.dumps(record) + "\n" for record in talk), encoding="utf-8")
    texts = [turn["value"] for record in [*captions, *conversations, *talk] for turn in record["conversations"]]
    make_tokenizer(texts).save_pretrained(folder / "tokenizer")
    return {"pictures to train on": len(captions), "held out": len(test), "texts without a picture": len(talk)}


def choose(draw: random.Random, number: int) -> set[int]:
    """Which of so many digits are held out."""
    return set(draw.sample(range(number), number // HELD_OUT))


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on some texts, whose chat template marks what the assistant says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    made.chat_template = CHAT_TEMPLATE
    return made


def _draw(folder: Path, name: str, ink: Ink, draw: random.Random | None = None) -> str:
    """Writes the picture of a digit, dark on white; turned, moved and scaled a little where something is drawn."""
    picture = Image.fromarray((255 - ink * (255 / 16)).round().astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if draw is not None:
        scale = round(SIDE * draw.uniform(0.9, 1.1))
        turned = picture.rotate(draw.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=255).resize((scale, scale))
        picture = Image.new("L", (SIDE, SIDE), 255)
        left, top = ((SIDE - scale) // 2 + draw.randint(-2, 2) for _ in range(2))
        picture.paste(turned, (left, top))
    picture.convert("RGB").save(folder / "pictures" / f"{name}.png")
    return f"{name}.png"


def _said(label: int) -> str:
    return f"{'An' if label == 8 else 'A'} {NAMES[label]}."


def _questions(label: int, draw: random.Random) -> list[tuple[str, str]]:
    """What is asked about a picture: the digit, then often nothing, at times one thing more, and rarely all there is."""
    if draw.random() < LONG:
        more = draw.sample(MORE, len(MORE))
    else:
        more = draw.sample(MORE, draw.choice((0, 0, 1)))
    return [(draw.choice(DIGIT), _said(label)), *((text.format("it"), answer(label)) for text, answer in more)]


def _record(picture: str, turns: Sequence[tuple[str, str]]) -> Record:
    """A conversation in LLaVA's form about a picture."""
    (question, answer), *rest = turns
    return {
        "id": Path(picture).stem,
        "image": picture,
        "conversations": _conversation([(f"<image>\n{question}".strip(), answer), *rest]),
    }


def _conversation(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]


def _talk() -> Iterator[Record]:
    """Questions without a picture, each digit by its name."""
    for label, name in enumerate(NAMES):
        for number, (text, answer) in enumerate(MORE):
            question = text.format(name)
            yield {"id": f"talk-{name}-{number}", "conversations": _conversation([(question, answer(label))])}


if __name__ == "__main__":
    main()
