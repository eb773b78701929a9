"""The cache of traces: what is whole is used, what is not is made again, and nothing that it depends on is forgotten."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from oomph.core import forms
from oomph.core.catalogue import model_folder
from oomph.core.closed_form import ClosedForm
from oomph.core.forms import CachedForms, FormKey, Traced, cache_folder
from oomph.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    return model


@pytest.fixture
def key(plain_key: FormKey, folder: Path) -> FormKey:
    return dataclasses.replace(plain_key, model=str(folder))


class Maker:
    """Makes one form for every key, and remembers what was asked for and said."""

    def __init__(self, form: ClosedForm | None, folder: Path) -> None:
        self.form, self.folder = form, folder
        self.asked: list[FormKey] = []
        self.said: list[str] = []

    def make(self, keys: Sequence[FormKey], done: Callable[[FormKey, Traced], None]) -> None:
        for key in keys:
            self.asked.append(key)
            done(key, self.result())

    def result(self) -> Traced:
        return Traced(self.form, 576, "by hand")

    def cache(self) -> CachedForms:
        """A cache as a new process has it."""
        return CachedForms(self.make, self.said.append, self.folder)

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def maker(toy: ClosedForm, tmp_path: Path) -> Maker:
    return Maker(toy, tmp_path / "cache" / "traces")


def test_what_is_missing_is_made_once(maker: Maker, key: FormKey) -> None:
    cache = maker.cache()
    assert cache.traced(key) == cache.traced(key) == maker.result()
    assert maker.asked == [key]
    assert not maker.said


def test_what_was_made_is_read(maker: Maker, key: FormKey) -> None:
    maker.cache().traced(key)
    found = maker.cache().traced(key)
    assert found == maker.result()
    assert found.form is not None
    assert found.form.sizes((2, 64, 2)).tolist() == maker.result().form.sizes((2, 64, 2)).tolist()  # type: ignore[union-attr]
    assert maker.asked == [key]
    assert [path.suffix for path in maker.files()] == [".json"]
    assert not maker.said


def test_that_there_is_no_form_is_kept_too(maker: Maker, key: FormKey) -> None:
    maker.form = None
    maker.cache().traced(key)
    assert maker.cache().traced(key) == Traced(None, 576, "by hand")
    assert maker.asked == [key]


def test_several_are_made_together_and_each_once(maker: Maker, key: FormKey) -> None:
    other = dataclasses.replace(key, one_sample=True)
    cache = maker.cache()
    cache.prepare([key, other, key])
    assert maker.asked == [key, other]
    cache.prepare([other])
    maker.cache().prepare([key, other])
    assert maker.asked == [key, other]


def test_only_the_missing_ones_are_made(maker: Maker, key: FormKey) -> None:
    maker.cache().traced(key)
    other = dataclasses.replace(key, attention="eager")
    maker.cache().prepare([key, other])
    assert maker.asked == [key, other]


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _sealed(body: str) -> bytes:
    return f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}".encode()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "the checksum alone": lambda data: data.partition(b"\n")[0],
    "a byte flipped in the checksum": lambda data: _flip(data, 3),
    "a byte flipped in the middle": lambda data: _flip(data, len(data) // 2),
    "a byte more": lambda data: data + b" ",
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "not UTF-8 further on": lambda data: data[:100] + b"\xff" + data[101:],
    "zeros": lambda data: bytes(len(data)),
    "other JSON": lambda data: b"{}",
    "whole, of other contents": lambda data: _sealed("{}"),
    "whole, no object": lambda data: _sealed("[1]"),
    "whole, no form": lambda data: _sealed('{"form": {"formulas": 1}, "image_tokens": 1, "how": ""}'),
    "whole, no JSON": lambda data: _sealed("hello"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_made_again(maker: Maker, key: FormKey, damage: str) -> None:
    maker.cache().traced(key)
    (path,) = maker.files()
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    assert maker.cache().traced(key) == maker.result()
    assert maker.asked == [key, key]
    assert path.read_bytes() == whole
    assert len(maker.said) <= 1
    assert maker.cache().traced(key) == maker.result()
    assert maker.asked == [key, key]


def test_damage_is_said(maker: Maker, key: FormKey) -> None:
    maker.cache().traced(key)
    (path,) = maker.files()
    path.write_bytes(path.read_bytes()[:-1])
    maker.cache().traced(key)
    assert maker.said == ["a cached trace is damaged; tracing again"]


# A cache that cannot be used costs time and nothing else.


def test_a_file_where_the_folder_should_be(maker: Maker, key: FormKey) -> None:
    maker.folder.parent.mkdir()
    maker.folder.write_text("not a folder")
    cache = maker.cache()
    assert cache.traced(key) == cache.traced(key) == maker.result()
    assert maker.asked == [key]
    (sentence,) = maker.said
    assert sentence.startswith("the trace is not kept: ")
    assert maker.folder.read_text() == "not a folder"


def test_a_file_above_the_folder(maker: Maker, key: FormKey) -> None:
    maker.folder.parent.write_text("not a folder")
    assert maker.cache().traced(key) == maker.result()
    assert len(maker.said) == 1


def test_a_folder_where_the_file_should_be(maker: Maker, key: FormKey) -> None:
    (maker.folder / f"{key.digest()}.json").mkdir(parents=True)
    assert maker.cache().traced(key) == maker.result()
    assert len(maker.said) == 1
    assert [path.is_dir() for path in maker.files()] == [True]


def test_a_full_disk(maker: Maker, key: FormKey, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert maker.cache().traced(key) == maker.result()
    assert maker.said == ["the trace is not kept: No space left on device"]
    assert not maker.files()


def test_an_interruption_keeps_what_was_made(maker: Maker, key: FormKey) -> None:
    other = dataclasses.replace(key, one_sample=True)

    def interrupted(keys: Sequence[FormKey], done: Callable[[FormKey, Traced], None]) -> None:
        done(keys[0], maker.result())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CachedForms(interrupted, maker.said.append, maker.folder).prepare([key, other])
    maker.cache().prepare([key, other])
    assert maker.asked == [other]


def test_an_interrupted_writing_leaves_no_half_file(maker: Maker, key: FormKey, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            maker.cache().traced(key)
    assert not [path for path in maker.files() if path.suffix == ".json"]
    maker.cache().traced(key)
    assert maker.asked == [key, key]


def test_an_error_of_the_maker_is_passed_on_and_nothing_kept(maker: Maker, key: FormKey) -> None:
    def refuses(keys: Sequence[FormKey], done: Callable[[FormKey, Traced], None]) -> None:
        raise UserError("no such model", "take another")

    with pytest.raises(UserError, match="no such model"):
        CachedForms(refuses, maker.said.append, maker.folder).traced(key)
    assert not maker.folder.exists()


def _write_often(maker: Maker, key: FormKey, barrier: Any, times: int) -> None:
    barrier.wait()
    for _ in range(times):
        cache = maker.cache()
        cache._write(key, maker.result())
        assert cache._read(key) == maker.result()
    assert not maker.said


def test_two_writers_at_once(maker: Maker, key: FormKey) -> None:
    """Whoever reads while others write finds a whole file."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    writers = [context.Process(target=_write_often, args=(maker, key, barrier, 40)) for _ in range(2)]
    for writer in writers:
        writer.start()
    _write_often(maker, key, barrier, 40)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in maker.files()] == [f"{key.digest()}.json"]
    maker.cache().traced(key)
    assert not maker.asked


# The key.

CHANGES: dict[str, Any] = {
    "projector": "linear",
    "vision_feature_layer": -1,
    "vision_feature_select": "full",
    "experts": '{"count": 4, "top_k": 2, "layers": "all"}',
    "balance": '{"kind": "sequence"}',
    "lora": '{"rank":8}',
    "quantization": '{"kind":"nf4"}',
    "trained": ("language",),
    "frozen": ("head",),
    "attention": "eager",
    "loss": "chunked",
    "optimizer": "adamw-loop",
    "checkpointing": "blocks",
    "vision_checkpointing": "blocks",
    "precision": "float32",
    "capability": (9, 0),
    "image_size": (448, 448),
    "one_sample": True,
    "images": 2,
    "shape": (1, 128, 0),
    "periodic": True,
}


def test_everything_in_the_key_makes_another_name(key: FormKey) -> None:
    changed = [dataclasses.replace(key, **{name: value}) for name, value in CHANGES.items()]
    assert set(CHANGES) | {"model", "vision", "language"} == {field.name for field in dataclasses.fields(key)}
    assert len({one.digest() for one in [key, *changed]}) == 1 + len(changed)
    assert len({dataclasses.replace(key, images=images).digest() for images in (0, 1, 2, -2, -3)}) == 5


def test_the_name_is_that_of_the_contents_and_not_of_the_folder(key: FormKey, folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    (moved / "model.safetensors").write_bytes(b"weights")
    assert dataclasses.replace(key, model=str(moved)).digest() == key.digest()
    (moved / "config.json").write_text('{"num_hidden_layers":   2, "model_type": "llama"}')
    assert dataclasses.replace(key, model=str(moved)).digest() == key.digest()


def test_another_configuration_has_another_name(key: FormKey, folder: Path) -> None:
    before = key.digest()
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    assert key.digest() != before


def test_parts_are_told_apart(key: FormKey, folder: Path) -> None:
    as_vision = dataclasses.replace(key, model=None, vision=str(folder))
    as_language = dataclasses.replace(key, model=None, language=str(folder))
    assert len({key.digest(), as_vision.digest(), as_language.digest()}) == 3


def test_other_libraries_and_other_code_have_other_names(key: FormKey, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {key.digest()}
    current = forms.versions(key.libraries())
    for library in current:
        with monkeypatch.context() as patch:
            patch.setattr(forms, "versions", lambda _, newer=library: current | {newer: "99.0"})
            names.add(key.digest())
    monkeypatch.setattr(forms, "code_digest", lambda: "other code")
    names.add(key.digest())
    assert len(names) == 2 + len(current)


def test_libraries_are_those_whose_code_is_traced(key: FormKey) -> None:
    assert key.libraries() == ("torch", "transformers")
    assert dataclasses.replace(key, lora='{"rank": 8}').libraries() == ("torch", "transformers", "peft")
    assert dataclasses.replace(key, quantization='{"kind": "nf4"}').libraries()[2:] == ("peft", "bitsandbytes")
    assert dataclasses.replace(key, optimizer="adamw-8bit").libraries()[2:] == ("bitsandbytes",)
    assert forms.versions(["torch", "no-such-library"]).keys() == {"torch"}


def test_names_are_those_of_files(key: FormKey) -> None:
    assert len(key.digest()) == 32
    assert set(key.digest()) <= set("0123456789abcdef")


def test_a_key_without_its_configuration_has_no_name(key: FormKey, folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match="config"):
        key.digest()
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        key.digest()


def test_a_key_survives_json(key: FormKey) -> None:
    for one in (key, dataclasses.replace(key, **CHANGES)):
        copy = FormKey.from_json(json.loads(json.dumps(one.to_json())))
        assert copy == one
        assert hash(copy) == hash(one)
        assert copy.digest() == one.digest()


def test_what_was_traced_survives_json(toy: ClosedForm) -> None:
    for traced in (Traced(toy, 576, "by hand"), Traced(None, 0, "no closed form")):
        assert Traced.from_json(json.loads(json.dumps(traced.to_json()))) == traced


def test_the_cache_lies_where_the_desktop_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/oomph/traces")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/nobody")
    assert cache_folder() == Path("/nobody/.cache/oomph/traces")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/nobody/.cache/oomph/traces")


# Several processes.


@pytest.mark.parametrize("processes", [1, 2])
def test_a_user_s_mistake_comes_back_as_it_is(key: FormKey, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """A vision tower by itself generates no text; it is asked for twice, so that two processes have something to do."""
    from oomph.live.workers import make_forms

    monkeypatch.setattr(os, "cpu_count", lambda: processes)
    tower = dataclasses.replace(key, model=str(model_folder("clip-vit-large-patch14-336-vision")))
    made: list[FormKey] = []
    with pytest.raises(UserError) as caught:
        make_forms([tower, dataclasses.replace(tower, one_sample=True)], lambda key, _: made.append(key))
    assert caught.value.problems == ["clip_vision_model is not a language model or a vision-language model"]
    assert "model that is made of parts" in caught.value.hint
    assert not made
