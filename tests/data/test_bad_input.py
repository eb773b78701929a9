"""Every mistake that data can have is an error that names the file, the line or number, and the sample."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oomph.errors import UserError
from oomph.live.data.pictures import MAX_PIXELS


def problems_of(open_data: Callable[..., Any], recipe: Any, **options: Any) -> list[str]:
    with pytest.raises(UserError) as refused:
        open_data(recipe, **options)
    return refused.value.problems


@pytest.fixture
def refused(workshop: Any, open_data: Callable[..., Any]) -> Callable[..., str]:
    """What is said of one record, without the file's name; the records around it are good ones."""

    def check(record: Any, text_only: bool = False, **data: Any) -> str:
        good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
        name = workshop.write("data.jsonl", [good, record, good])
        [problem] = problems_of(open_data, workshop.recipe(name, text_only=text_only, **data))
        place = f"{workshop.folder / name}:2"
        assert problem.startswith(place), problem
        return problem.removeprefix(place).removeprefix(": ")

    return check


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has hardly a pixel."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0" * 9), b"IEND"]
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_images_that_are_not_there_or_no_images(workshop: Any, refused: Callable[..., str], talk: Any) -> None:
    ask = ("<image>\nWhat?", "A dog.")
    said = refused(talk(*ask, id="s1", image="gone.png"))
    assert said == f" (sample 's1'): the image 'gone.png' is not in the folder {workshop.pictures}"
    (workshop.pictures / "text.png").write_text("this is no picture")
    assert "'text.png' cannot be read" in refused(talk(*ask, image="text.png"))
    whole = workshop.pictures / workshop.noise("whole.png", (64, 64))
    (workshop.pictures / "cut.png").write_bytes(whole.read_bytes()[:2000])
    assert "'cut.png' cannot be read" in refused(talk(*ask, image="cut.png"))
    side = int(MAX_PIXELS**0.5) + 1
    for factor in (1, 2, 100):
        (workshop.pictures / "bomb.png").write_bytes(png_header(side * factor, side))
        assert "'bomb.png' has more than 89,478,485 pixels" in refused(talk(*ask, image="bomb.png"))
    (workshop.pictures / "folder.png").mkdir()
    assert "'folder.png' is not in the folder" in refused(talk(*ask, image="folder.png"))


def test_images_stay_in_their_folder(workshop: Any, refused: Callable[..., str], talk: Any, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    (workshop.pictures / workshop.picture("in.png")).rename(outside)
    (workshop.pictures / "link.png").symlink_to(outside)
    (workshop.pictures / "loop.png").symlink_to("loop.png")
    for name in ("../outside.png", str(outside), "a/../../outside.png", "a\\b.png", "a\0b"):
        assert "is no path inside the folder" in refused(talk("<image>", "A dog.", image=name))
    assert "is a link that leads out of the folder" in refused(talk("<image>", "A dog.", image="link.png"))
    assert "loop.png" in refused(talk("<image>", "A dog.", image="loop.png"))


def test_images_and_tags_that_do_not_match(workshop: Any, refused: Callable[..., str], talk: Any) -> None:
    one, two = workshop.picture("a.png"), workshop.picture("b.png")
    assert "1 image and 0 <image> tags" in refused(talk("What?", "A dog.", image=one))
    assert "0 images and 1 <image> tag" in refused(talk("<image> What?", "A dog."))
    assert "2 images and 1 <image> tag" in refused(talk("<image> What?", "A dog.", image=[one, two]), images_per_sample=2)
    assert "2 images, more than data.images_per_sample 1" in refused(talk("<image><image>", "Two.", image=[one, two]))
    assert "1 image, and the model reads text alone" in refused(talk("<image>", "A dog.", image=one), text_only=True)


def test_conversations_without_anything_to_learn(refused: Callable[..., str], talk: Any) -> None:
    assert "turn 1 is an empty answer" in refused(talk("What?", " \n"))
    assert "no turn of the assistant" in refused(talk("What?"))
    assert "it has no `conversations`" in refused({"id": "x", "text": "hello"})
    assert "it has no `conversations`" in refused({"conversations": []})
    unknown = {"conversations": [{"from": "bard", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert "turn 0 is of 'bard', where human, gpt or system is expected" in refused(unknown)
    assert "turn 0 is of 'tool', where user, assistant or system is expected" in refused(
        {"messages": [{"role": "tool", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    )
    assert "turn 1 has no text in `value`" in refused({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt"}]})
    assert "turn 0 is a text" in refused({"conversations": ["Hi", {"from": "gpt", "value": "Hello"}]})
    assert "a sample is a JSON object, not a list" in refused([1, 2])
    assert "videos are not trained on" in refused(talk("<video>", "A dog.", video="a.mp4"))
    assert "its id is an object" in refused(talk("Hi", "Hello", id={}))
    assert "`image` is a file's name or a list" in refused(talk("<image>", "Hello", image=[1]))


def test_limits_that_leave_nothing(workshop: Any, refused: Callable[..., str], talk: Any) -> None:
    name = workshop.picture("a.png")
    said = refused(talk("word " * 40, "A dog."), max_tokens=32)
    assert "cut to data.max_tokens 32, nothing of an answer is left of its" in said
    images = talk("<image><image><image>", "A dog.", image=[name] * 3)
    said = refused(images, max_tokens=40, images_per_sample=3)
    assert said == "its images alone are 48 tokens, more than data.max_tokens 40"


def test_files_that_cannot_be_read(workshop: Any, open_data: Callable[..., Any], talk: Any) -> None:
    def said(name: str, content: bytes) -> list[str]:
        (workshop.folder / name).write_bytes(content)
        found = problems_of(open_data, workshop.recipe(name))
        assert all(problem.startswith(str(workshop.folder / name)) for problem in found)
        return [problem.removeprefix(str(workshop.folder / name)) for problem in found]

    good = json.dumps(talk("Hi", "Hello")).encode()
    assert said("empty.json", b"") == [": it holds no samples"]
    assert said("blank.jsonl", b"\n \n") == [": it holds no samples"]
    assert said("none.json", b"[ ]") == [": it holds no samples"]
    assert said("broken.jsonl", good + b"\n{'a': 1}\n" + good) == [
        ":2: it is not valid JSON: Expecting property name enclosed in double quotes at column 2"
    ]
    assert said("broken.json", b"[" + good + b",\n {]") == [
        ": it is not valid JSON: Expecting property name enclosed in double quotes, line 2 column 3"
    ]
    assert said("open.json", b"[" + good) == [
        f": it is not valid JSON: Expecting ',' or ']' after a sample, line 1 column {len(good) + 2}"
    ]
    assert said("more.json", b"[" + good + b"] x") == [
        f": it is not valid JSON: Extra data after the list, line 1 column {len(good) + 4}"
    ]
    assert said("comma.json", b"[" + good + b",]") == [
        f": it is not valid JSON: Expecting value, line 1 column {len(good) + 3}"
    ]
    assert "is a lone brace" in said("object.json", b"{\n" + good[1:])[0]
    assert "it begins with '<html>'" in said("page.json", b"<html>\n")[0]
    assert said("deep.jsonl", b'{"a":' * 100_000 + b"\n" + good) == [":1: it is nested too deeply"]
    latin = good.replace(b"Hello", "Hellö".encode("latin-1"))
    assert "it is not UTF-8 text" in said("latin.jsonl", good + b"\n" + latin)[0]
    assert said("latin.json", b"[" + good + b"," + latin + b"]")[0].startswith("[1]: it is not UTF-8 text")
    [missing] = problems_of(open_data, workshop.recipe("gone.json"))
    assert "cannot be read: No such file" in missing
    assert "names no file" in problems_of(open_data, workshop.recipe())[0]
    there = {"path": str(workshop.folder / workshop.write("a.jsonl", [talk("Hi", "Hello")])), "images": "./nowhere"}
    assert "its images' folder nowhere is not there" in problems_of(open_data, workshop.recipe(there))[0]


def test_all_problems_come_at_once_and_no_more_than_can_be_read(
    workshop: Any, open_data: Callable[..., Any], talk: Any
) -> None:
    first = workshop.write("first.json", [talk("Hi", "", id=str(number)) for number in range(15)])
    second = workshop.write("second.jsonl", [talk("Hi", id=str(number)) for number in range(15)])
    found = problems_of(open_data, workshop.recipe(first, second))
    assert len(found) == 21
    assert found[0] == f"{workshop.folder / first}[0] (sample '0'): turn 1 is an empty answer"
    assert found[15].startswith(f"{workshop.folder / second}:1 (sample '0')")
    assert found[-1] == "and 10 more problems of the data"


def test_a_repeated_id_is_said_and_no_mistake(workshop: Any, open_data: Callable[..., Any], talk: Any) -> None:
    notes: list[str] = []
    name = workshop.write("a.json", [talk("Hi", "Hello", id=7), talk("Hi", "Ho", id="7"), talk("Hi", "Hu"), talk("Hi", "Ha")])
    assert len(open_data(workshop.recipe(name, text_only=True), notes)) == 4
    assert notes == [f"{workshop.folder / name}: samples with the id of an earlier one: 1; all are trained on"]


def test_models_without_what_data_needs(workshop: Any, open_data: Callable[..., Any], talk: Any) -> None:
    name = workshop.write("a.json", [talk("Hi", "Hello")])
    recipe = workshop.recipe(name)
    bare = workshop.folder / "bare"
    bare.mkdir()
    assert "holds no tokenizer" in problems_of(open_data, recipe.model_copy(update={"tokenizer": str(bare)}))[0]
    (bare / "tokenizer.json").write_text("{}")
    assert "cannot read the tokenizer" in problems_of(open_data, recipe.model_copy(update={"tokenizer": str(bare)}))[0]
    assert (
        "llava model: its tower takes one shape" in problems_of(open_data, workshop.recipe(name, image_aspect_ratio="any"))[0]
    )
    (workshop.folder / "language" / "chat_template.jinja").unlink()
    assert "has no chat template" in problems_of(open_data, recipe)[0]
    for file in (workshop.folder / "language").glob("*token*"):
        os.unlink(file)
    assert "holds no tokenizer" in problems_of(open_data, recipe)[0]
