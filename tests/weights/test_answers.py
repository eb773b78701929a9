"""Answers: the most likely tokens, the same however many are asked at a time, judged as VQA judges, shown as they come."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from oomph import cli
from oomph.errors import UserError
from oomph.live.data.samples import Turn
from oomph.live.export import save_model
from oomph.live.generate import Conversation, open_answerer
from oomph.live.questions import describe, evaluate, normalised, vqa_accuracy


def uncached(answerer: Any, prompt: Any, count: int) -> list[int]:
    """The most likely tokens, each from the whole text anew."""
    found: list[int] = []
    for _ in range(count):
        ids = torch.cat([prompt.ids, torch.tensor(found, dtype=torch.long)])
        longer = type(prompt)(-1, "", ids, torch.zeros_like(ids), prompt.images, prompt.cost)
        inputs = {name: tensor for name, tensor in answerer.collate([longer]).items() if name != "labels"}
        with torch.no_grad():
            found.append(int(answerer._model(**inputs).logits[0, -1].argmax()))
    return found


def qwen(shop: Any, folder: Path) -> Path:
    """A small Qwen2.5-VL with weights, whose tokens have three positions each."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
    text |= {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32, "patch_size": 8}
    vision |= {"fullatt_block_indexes": [1], "window_size": 32}
    ids = {"image_token_id": 306, "video_token_id": 307, "vision_start_token_id": 304, "vision_end_token_id": 305}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3 if parameter.dim() > 1 else 1
    model.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=8, merge_size=2).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shop.folder / "language")
    names = [f"<|{number}|>" for number in range(len(tokenizer), 304)]
    tokenizer.add_tokens([*names, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{% if m['content'] is string %}"
        "{{ m['content'] }}{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(shop: Any, lesson: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "llava": lesson.model,
        "text": shop.folder / "language",
        "qwen2_5_vl": qwen(shop, tmp_path_factory.mktemp("qwen")),
    }


@pytest.mark.parametrize("kind", ["llava", "text", "qwen2_5_vl"])
def test_answers_are_the_most_likely_tokens(kind: str, folders: dict[str, Path], shop: Any) -> None:
    answerer = open_answerer(str(folders[kind]), 2, lambda sentence: None)
    picture = shop.picture(f"{kind}.png", "red", (64, 48))
    conversation = Conversation(answerer, [] if kind == "text" else [picture, picture])
    answerer._ends = frozenset()
    for question in ("What is this?", "Why?"):
        prompt = conversation._prompt([*conversation._turns, conversation_turn(conversation, question, kind)])
        answerer_limit, expected = 12, uncached(answerer, prompt, 12)
        assert answerer.answers([prompt], answerer_limit) == [expected]
        pieces: list[str] = []
        answerer.room = len(prompt.ids) + 12
        answer = conversation.ask(question, pieces.append)
        assert answer == answerer.text(expected).strip()
        assert answer.startswith("".join(pieces).strip())
        answerer.room = 10_000


def conversation_turn(conversation: Any, text: str, kind: str) -> Any:
    tags = "" if kind == "text" or conversation._turns else "<image>\n" * 2
    return Turn("user", tags + text)


def test_it_agrees_with_transformers_own_generation(lesson: Any, shop: Any) -> None:
    model = AutoModelForImageTextToText.from_pretrained(lesson.model)
    processor = AutoProcessor.from_pretrained(lesson.model)
    messages = [{"role": "user", "content": "<image>\nWhat colour is it?"}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    answerer = open_answerer(str(lesson.model), 1, lambda sentence: None)
    for color in lesson.COLORS:
        path = lesson.folder / f"{color}.png"
        inputs = processor(images=Image.open(path), text=prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        theirs = processor.decode(ids, skip_special_tokens=True).strip()
        assert Conversation(answerer, [path]).ask("What colour is it?", lambda piece: None) == theirs == f"It is {color}."


def test_every_answer_is_asked_for_whatever_the_batch(lesson: Any) -> None:
    found = [evaluate(str(lesson.model), str(lesson.file), batch=batch) for batch in (1, 2, 3, 64)]
    assert all(evaluation == found[0] for evaluation in found)
    assert [answer.place.rpartition(":")[2] for answer in found[0].answers] == ["1", "2", "2", "3", "4"]
    assert [answer.question for answer in found[0].answers][1:3] == ["What colour is it?", "Is it a cat?"]
    assert found[0].exact_match == found[0].accuracy == 1
    assert [answer.answer for answer in found[0].answers if "colour" in answer.question] == [
        f"It is {color}." for color in lesson.COLORS
    ]


def test_an_untaught_model_says_the_same_whatever_the_batch(shop: Any, lesson: Any, encoder_of: Any, tmp_path: Path) -> None:
    recipe = shop.recipe({"vision": 1e-3, "projector": 1e-3, "language": 1e-3, "head": 1e-3})
    save_model(shop.build(recipe), tmp_path / "model", recipe, encoder_of(recipe))
    words = ["What", "is", "this?", "A", "red", "cat.", "Where", "is", "the", "blue", "dog?"]
    records = []
    for number in range(12):
        text = " ".join(words[: 2 + number % 4 * 3])
        talk = [{"from": "human", "value": text}, {"from": "gpt", "value": words[number % 11]}]
        image = {"image": f"{lesson.COLORS[number % 4]}.png"} if number % 3 else {}
        if image:
            talk[0]["value"] = f"<image>\n{text}"
        records.append({**image, "conversations": talk})
    (tmp_path / "data.json").write_text(json.dumps(records))
    options = {"images": str(lesson.folder)}
    found = [evaluate(str(tmp_path / "model"), str(tmp_path / "data.json"), batch=batch, **options) for batch in (1, 5, 12)]
    assert found[0] == found[1] == found[2]
    assert len({answer.answer for answer in found[0].answers}) > 3
    assert found[0].exact_match < 1
    text = describe(found[0])
    assert text.startswith("exact match ")
    assert text.count("\n") == 5 + 5


def test_answers_of_several_people_count_as_in_vqa(lesson: Any, tmp_path: Path) -> None:
    records = [json.loads(line) for line in lesson.file.read_text().splitlines()]
    records[0]["answers"] = ["it is red"] * 2 + ["It's pink"] * 8
    records[2]["answers"] = [{"answer": "It is green"}] * 10
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = evaluate(str(lesson.model), str(tmp_path / "data.jsonl"), str(lesson.folder))
    assert found.exact_match == 1
    assert [answer.accuracy for answer in found.answers] == [pytest.approx((8 * 2 / 3 + 2 / 3) / 10), 1, 1, 1, 1]
    assert "VQA accuracy" in describe(found)


@given(st.lists(st.sampled_from(["red", "blue", "two", "2"]), min_size=2, max_size=10), st.sampled_from(["red", "2", "x"]))
def test_vqa_accuracy_is_the_mean_over_all_but_one(references: list[str], answer: str) -> None:
    scores = [
        min(1, Counter(map(normalised, others))[normalised(answer)] / 3)
        for others in combinations(references, len(references) - 1)
    ]
    assert vqa_accuracy(answer, references) == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("A red cat.", "red cat"),
        ("red,blue", "red blue"),
        ("It's 1,000!", "its 1000"),
        ("3.5 m", "3.5 m"),
        ("Two dogs", "2 dogs"),
        (" well-known ", "well known"),
        ("the", "the"),
        ("...", "..."),
    ],
)
def test_texts_are_compared_by_their_words(text: str, same: str) -> None:
    assert normalised(text) == same
    assert normalised(normalised(text)) == same


def test_different_numbers_stay_different() -> None:
    assert len({normalised(text) for text in ("-3", "3", "3.5", "35", "1.000", "1,000")}) == 6


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What somebody types at a terminal; an exception in the end is what ends it."""

    def type_in(*lines: str, end: BaseException) -> None:
        rest: Iterator[str] = iter(lines)

        def read(prompt: str = "") -> str:
            line = next(rest, None)
            if line is None:
                raise end
            return line

        monkeypatch.setattr("builtins.input", read)

    return type_in


def test_one_prompt_is_answered(lesson: Any, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(lesson.folder / "blue.png")
    assert cli.run(["chat", str(lesson.model), "--image", picture, "--prompt", "What colour is it?"]) == 0
    assert capsys.readouterr().out == "It is blue.\n"


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
def test_a_conversation_ends_cleanly(
    lesson: Any, typed: Callable[..., None], end: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    typed("What colour is it?", "", "Is it a cat?", end=end)
    assert cli.run(["chat", str(lesson.model), "--image", str(lesson.folder / "blue.png")]) == 0
    assert capsys.readouterr().out == "It is blue.\nNo.\n"


def test_somebody_at_a_terminal_may_try_again(
    lesson: Any, typed: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    typed("<image> or <image>?", "What " * 400, "What colour is it?", end=EOFError())
    assert cli.run(["chat", str(lesson.model), "--image", str(lesson.folder / "red.png")]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("It is red.\n\n"), printed
    assert "it has 1 image and 2 <image> tags in its text" in printed.err
    assert "and the model takes 256 with its answer" in printed.err


def test_evaluation_on_the_command_line(lesson: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = lesson.file.read_text().replace("It is green.", "It is yellow.")
    (tmp_path / "data.jsonl").write_text(text)
    command = ["eval", str(lesson.model), str(tmp_path / "data.jsonl"), "--images", str(lesson.folder)]
    assert cli.run(command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("exact match    80.0%   4 of 5 answers\n")
    assert "What colour is it?                  It is green.              It is yellow.\n" in shown
    assert cli.run([*command, "--json", "--batch", "3"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["questions"], content["exact_match"], content["accuracy"]) == (5, 0.8, 0.8)
    assert [answer["exact"] for answer in content["answers"]] == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["eval", "MODEL", "FOLDER/none.json"], "none.json: it cannot be read"),
        (["eval", "FOLDER", "FILE"], "holds no config.json"),
        (["eval", "MODEL", "FILE", "--batch", "0"], "greater than or equal to 1"),
        (["chat", "MODEL", "--image", "FOLDER/none.png", "--prompt", "Hi"], "the image 'none.png' cannot be read"),
        (["chat", "MODEL", "--prompt", "What is <image> this?"], "it has 0 images and 1 <image> tag in its text"),
        (["chat", "MODEL", "--prompt", " "], "--prompt is empty"),
        (["chat", "TEXT", "--image", "FOLDER/red.png", "--prompt", "Hi"], "the model reads text alone"),
    ],
)
def test_wrong_use_is_told(change: list[str], said: str, lesson: Any, shop: Any, capsys: Any) -> None:
    places = {"MODEL": lesson.model, "FILE": lesson.file, "FOLDER": lesson.folder, "TEXT": shop.folder / "language"}
    words = []
    for word in change:
        head, slash, rest = word.partition("/")
        words.append(f"{places.get(head, head)}{slash}{rest}")
    assert cli.run(words) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


def test_a_folder_that_lost_its_settings_says_so(lesson: Any, tmp_path: Path) -> None:
    shutil.copytree(lesson.model, tmp_path / "model")
    settings = tmp_path / "model" / "oomph.json"
    for text in ("{", '{"data": 3}', '{"data": {"image_aspect_ratio": "round"}}'):
        settings.write_text(text)
        with pytest.raises(UserError, match="is not what oomph writes"):
            open_answerer(str(tmp_path / "model"), 1, lambda sentence: None)
    settings.unlink()
    answerer = open_answerer(str(tmp_path / "model"), 1, lambda sentence: None)
    assert answerer.encoder.data.image_aspect_ratio == "pad"


def test_another_kind_of_model_keeps_its_processor(folders: Any, shop: Any, encoder_of: Any, tmp_path: Path) -> None:
    train = {"vision": "frozen", "projector": 1e-4, "language": 1e-4, "head": 1e-4}
    data = {"image_size": 64, "image_aspect_ratio": "any"}
    recipe = shop.recipe(train, model=str(folders["qwen2_5_vl"]), data=data)
    encoder = encoder_of(recipe)
    save_model(shop.build(recipe), tmp_path / "model", recipe, encoder)
    picture = shop.picture("tall.png", "blue", (30, 90))
    answers = []
    for folder in (folders["qwen2_5_vl"], tmp_path / "model"):
        answerer = open_answerer(str(folder), 1, lambda sentence: None)
        assert answerer.encoder.vision is not None
        answers.append(Conversation(answerer, [picture]).ask("What is this?", lambda piece: None))
    assert answerer.encoder.data.image_size == 64
    assert answerer.encoder.vision.cost((90, 30)) == encoder.vision.cost((90, 30))
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.config.image_token_id == 306
    assert answers[0]
