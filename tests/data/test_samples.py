"""Forms in which samples are written, and how limits cut them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomph.core.choices import sample_tokens
from oomph.errors import UserError
from oomph.live.data.encoding import Cost, Encoded, open_encoder
from oomph.live.data.samples import BadSample, Sample, Turn, parse
from oomph.live.step import IGNORED

IMAGE_TOKENS = 16


def test_chat_messages_are_read_as_llava_data_is() -> None:
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "<image>A<image>"}, {"from": "gpt", "value": "B"}]
    expected = parse({"id": 3, "image": ["x.png", "y.png"], "conversations": turns})
    assert expected == Sample(
        "3", ("x.png", "y.png"), (Turn("system", "S"), Turn("user", "<image>A<image>"), Turn("assistant", "B"))
    )
    first = {"role": "system", "content": "S"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "B"}]}
    parts = [{"type": "image"}, {"type": "text", "text": "A"}, {"type": "image"}]
    beside = {"id": "3", "images": ["x.png", "y.png"], "messages": [first, {"role": "user", "content": parts}, answer]}
    assert parse(beside) == expected
    named = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "A"}, {"type": "image", "path": "y.png"}]
    assert parse({"id": "3", "messages": [first, {"role": "user", "content": named}, answer]}) == expected
    assert parse({"image": None, "conversations": turns[1:]}).images == ()
    with pytest.raises(BadSample, match="named in the turns and beside them"):
        parse({"image": "x.png", "messages": [first, {"role": "user", "content": named}, answer]})


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("spaced", [False, True])
def test_records_are_found_by_their_bytes(
    workshop: Any, open_data: Callable[..., Any], talk: Any, name: str, spaced: bool
) -> None:
    texts = ["Hello", "Grüße 猫 🐈", 'a "quoted" ] [ } , line\nbreak', "\u2028 end"]
    records = [talk("Hi", text, id=text) for text in texts]
    workshop.write(name, records)
    if spaced:
        content = (workshop.folder / name).read_bytes()
        opened = b"\xef\xbb\xbf \r\n" + (content.replace(b"\n", b"\r\n\r\n") if name.endswith("l") else content) + b" \n"
        (workshop.folder / name).write_bytes(opened)
    data = open_data(workshop.recipe(name))
    assert [data.sample(number).turns[1].text for number in range(len(data))] == texts
    places = [data.place(number).removeprefix(str(workshop.folder / name)) for number in range(4)]
    lines = [":2", ":4", ":6", ":8"] if spaced else [":1", ":2", ":3", ":4"]
    assert places == (lines if name.endswith("l") else ["[0]", "[1]", "[2]", "[3]"])


def reference(encoder: Any, turns: tuple[Turn, ...], images: int, most: int, count: bool) -> tuple[list[int], list[int], int]:
    """Ids, labels and images of a sample, token by token."""
    whole = encoder.tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in turns], return_dict=True, return_assistant_tokens_mask=True
    )
    tag = encoder.tokenizer.convert_tokens_to_ids("<image>")
    tokens = [(i, i if said else IGNORED, -1) for i, said in zip(whole["input_ids"], whole["assistant_masks"], strict=True)]
    if not count:
        tokens = tokens[:most]
    spliced: list[tuple[int, int, int]] = []
    seen = 0
    for number, label, _ in tokens:
        if number == tag:
            spliced += [(encoder.vision.token_id, IGNORED, seen)] * IMAGE_TOKENS
            seen += 1
        else:
            spliced.append((number, label, -1))
    total = len(spliced if count else whole["input_ids"])
    if count and len(spliced) > most:
        broken = {image for _, _, image in spliced[most:] if image >= 0}
        spliced = spliced[:most]
        while spliced and spliced[-1][2] in broken:
            spliced.pop()
    if total > most:
        while spliced and spliced[-1][1] == IGNORED:
            spliced.pop()
    kept = {image for _, _, image in spliced if image >= 0}
    return [token[0] for token in spliced], [token[1] for token in spliced], len(kept)


@given(
    words=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=4),
    most=st.integers(8, 140),
    count=st.booleans(),
)
@settings(max_examples=120)
def test_samples_are_cut_behind_the_splice_and_never_inside_an_image(
    encoders: Callable[..., Any], words: list[tuple[int, int, int]], most: int, count: bool
) -> None:
    turns = []
    for images, asked, said in words:
        turns += [Turn("user", "<image>" * images + "why " * asked), Turn("assistant", "so " * said)]
    images = sum(item[0] for item in words)
    encoder = encoders(most, count)
    [encoded] = encoder.encode([Sample("", ("a",) * images, tuple(turns))], [[(4, 4)] * images])
    ids, labels, kept = reference(encoder, tuple(turns), images, most, count)
    learned = sum(label != IGNORED for label in labels[1:])
    if images * (IMAGE_TOKENS if count else 1) > most or not learned:
        assert isinstance(encoded, BadSample)
        return
    assert isinstance(encoded, Encoded)
    assert encoded.ids.tolist() == ids
    assert encoded.labels.tolist() == labels
    image_tokens = kept * IMAGE_TOKENS
    assert encoded.cost == Cost(len(ids) - image_tokens, image_tokens, len(ids), kept, kept * 16, learned)
    assert len(ids) <= most + (0 if count else kept * (IMAGE_TOKENS - 1))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Encoders of one model with different limits."""
    workshop = request.getfixturevalue("new_workshop")(tmp_path_factory.mktemp("encoders"))
    workshop.save_model("marked")
    made: dict[tuple[int, bool], Any] = {}

    def encoder(most: int, count: bool) -> Any:
        if (most, count) not in made:
            recipe = workshop.recipe(max_tokens=most, image_tokens_count=count, images_per_sample=12)
            made[most, count] = open_encoder(recipe, recipe.stages[0], lambda sentence: None)
        return made[most, count]

    return encoder


def test_what_the_assistant_shows_is_not_learned(encoders: Callable[..., Any]) -> None:
    turns = (Turn("user", "Show it."), Turn("assistant", "Here: <image>."))
    for count in (True, False):
        [encoded] = encoders(100, count).encode([Sample("", ("a",), turns)], [[(4, 4)]])
        assert encoded.cost.image_tokens == IMAGE_TOKENS
        said = encoders(100, count).tokenizer.decode([label for label in encoded.labels.tolist() if label != IGNORED])
        assert said == "Here: .<|im_end|>"


def test_the_longest_sample_of_moe_llava_is_as_long_as_the_planner_says(encoders: Callable[..., Any]) -> None:
    """2048 tokens with one image of 576 in them make 2623 there (llava_arch.py: prepare_inputs_labels_for_multimodal)."""
    encoder = encoders(40, False)
    turns = (Turn("user", "<image>" + "why " * 5), Turn("assistant", "so " * 90))
    [encoded] = encoder.encode([Sample("", ("a",), turns)], [[(4, 4)]])
    one = encoder.data.model_copy(update={"images_per_sample": 1})
    assert encoded.cost.tokens == 40 + IMAGE_TOKENS - 1 == sample_tokens(one, IMAGE_TOKENS)
    assert encoded.cut_tokens > 0


def test_tokens_without_an_embedding_are_refused(workshop: Any, open_data: Callable[..., Any], talk: Any) -> None:
    config = json.loads((workshop.folder / "language" / "config.json").read_text())
    (workshop.folder / "language" / "config.json").write_text(json.dumps(config | {"vocab_size": 120}))
    name = workshop.write("a.json", [talk("Hi", "The quick brown fox. Ein Haus.")])
    with pytest.raises(UserError, match=r"its token \d+ is beyond the model's vocabulary of 120"):
        open_data(workshop.recipe(name))


def test_costs_are_kept_until_something_changes(
    workshop: Any, open_data: Callable[..., Any], talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = workshop.picture("a.png")
    name = workshop.write("a.json", [talk("<image>", "Hello", image=image, id="x"), talk("Hi", "Ho", id="x")])
    first = open_data(workshop.recipe(name))
    (workshop.pictures / image).rename(workshop.pictures / "b.png")
    notes: list[str] = []
    again = open_data(workshop.recipe(name), notes)
    assert np.array_equal(first.costs, again.costs)
    assert any("samples with the id of an earlier one: 1" in note for note in notes)
    assert first.fingerprints() == again.fingerprints()
    with pytest.raises(UserError, match=r"a.json\[0\] \(sample 'x'\): the image 'a.png' is not in the folder"):
        again.prepare(0)
    with pytest.raises(UserError, match=r"a.png"):
        open_data(workshop.recipe(name), fresh=True)
    with pytest.raises(UserError, match=r"a.png"):
        open_data(workshop.recipe(name, max_tokens=500))
    workshop.write(name, [talk("Hi", "Ho", id="x"), talk("Hi", "Ho ho", id="x")])
    changed = open_data(workshop.recipe(name))
    assert changed.fingerprints() != first.fingerprints()
    assert changed.cost(0).images == 0
    with pytest.raises(UserError, match=r"a.json\[1\]: it is not valid JSON") as gone:
        again.prepare(1)
    assert "has the file changed?" in gone.value.hint


def test_a_damaged_cache_is_made_again(
    workshop: Any, open_data: Callable[..., Any], talk: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = workshop.write("a.json", [talk("Hi", "Hello")])
    costs = open_data(workshop.recipe(name)).costs
    [kept] = (tmp_path / "cache" / "oomph" / "data").iterdir()
    for content in (b"", b"PK\x03\x04 no archive", kept.read_bytes()[:-40]):
        kept.write_bytes(content)
        assert np.array_equal(open_data(workshop.recipe(name)).costs, costs)
    (tmp_path / "cache" / "oomph" / "data").joinpath(kept.name).unlink()
    (tmp_path / "cache" / "oomph" / "data").rmdir()
    (tmp_path / "cache" / "oomph" / "data").write_text("in the way")
    notes: list[str] = []
    assert np.array_equal(open_data(workshop.recipe(name), notes).costs, costs)
    assert any("is not kept" in note for note in notes)
