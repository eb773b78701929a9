"""docs/train.md: its recipe, what a run prints, what it refuses; numbers that differ from machine to machine stand for any."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from oomph import cli

PAGE = "docs/train.md"
CHAT = "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"


@pytest.fixture
def folder(reader: Any, pages: dict[str, Any]) -> Any:
    """The reader's folder with what the page's recipe names."""
    (reader.folder / "pictures").mkdir()
    records = []
    for number, color in enumerate(("red", "green", "blue", "white", "black", "grey", "pink", "brown")):
        name = f"{color}.png"
        Image.new("RGB", (20 + number, 30), color).save(reader.folder / "pictures" / name)
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"A {color} cat."}]
        records.append(json.dumps({"id": color, "image": name, "conversations": turns}) + "\n")
    (reader.folder / "seen.jsonl").write_text("".join(records), encoding="utf-8")
    (reader.folder / "held-out.jsonl").write_text("".join(records[:1]), encoding="utf-8")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPVisionConfig(**{**sizes, "hidden_size": 16})
    tower.update({"image_size": 32, "patch_size": 8})
    tower.save_pretrained(reader.folder / "tower")
    LlamaConfig(vocab_size=300, **sizes).save_pretrained(reader.folder / "language")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant What is this? A red cat."] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    made.save_pretrained(reader.folder / "language")
    return reader


def alike(text: str) -> str:
    """The text with any number for each number, on one line."""
    return " ".join(re.sub(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?", "#", text).split()).replace(" ms a step", " s a step")


def quoted(output: str) -> Iterator[str]:
    """What stands between the cuts."""
    yield from (piece for piece in output.split("[...]\n") if piece.strip())


@pytest.mark.slow
def test_the_page_shows_what_a_run_prints(
    folder: Any, pages: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(folder._environment, "CUDA_VISIBLE_DEVICES", "")
    folder.save(pages[PAGE])
    trained, *refused = pages[PAGE].commands()
    printed = folder.run(trained.command)
    found = alike(printed)
    for piece in quoted(trained.output):
        assert alike(piece) in found, f"line {trained.line}: this is not printed:\n{piece}\nbut\n{printed}"
    assert len(refused) == 2
    monkeypatch.chdir(folder.folder)
    for shown in refused:
        assert cli.run(shlex.split(shown.command)[1:]) == 2
        assert capsys.readouterr().err == shown.output
    files = {path.name for path in (folder.folder / "runs" / "animals").iterdir() if path.name != ".lock"}
    named = {name for row in pages[PAGE].table("The folder") for name in re.findall(r"`([\w./]+)`", row[0])}
    assert files == {name.partition("/")[0] for name in named} - {"STAGE"} | {"align", "tune"}
