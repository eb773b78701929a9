"""Numbers, names and lists on the pages are those of the code."""

from __future__ import annotations

import gzip
import json
import re
import typing
from typing import Any

import pytest

from oomph.core import reserve
from oomph.core.allocator import AllocatorSettings, segment_bytes
from oomph.core.catalogue import MODELS
from oomph.core.closed_form import FEATURES, LEAST_ROWS, LOSS_CHUNKS, ClosedForm, Dimension, Family, Formula
from oomph.core.devices import catalogue
from oomph.core.events import Events, Kind
from oomph.core.layout import lay_out
from oomph.core.predict import LARGEST
from oomph.core.stage import LOOPS_OVER_IMAGES
from oomph.core.trace import Piece
from oomph.core.unroll import UNITS
from oomph.records import Choice, Phase, Role

WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}


def flat(text: str) -> str:
    """Running text on one line."""
    return " ".join(text.split())


def number(text: str, pattern: str) -> int:
    """The number, in digits or as a word, that stands in a sentence."""
    found = re.search(pattern, flat(text))
    assert found, pattern
    return WORDS.get(found[1]) or int(found[1].replace(",", ""))


def test_the_catalogue_lists_every_model(pages: dict[str, Any]) -> None:
    wanted = [[name, model.hub_id or "-", f"{model.parameters:,}"] for name, model in sorted(MODELS.items())]
    assert pages["docs/catalogue.md"].table("Models") == wanted


def test_the_catalogue_lists_every_card(pages: dict[str, Any]) -> None:
    first = pages["docs/catalogue.md"].section("Cards").strip().split("\n\n")[0]
    assert re.findall(r"`([^`]+)`", first) == [gpu.name for gpu in catalogue() if gpu.compute_capability]


def test_features_of_the_closed_form(pages: dict[str, Any]) -> None:
    section = pages["docs/prediction.md"].section("The closed form")
    block = next(part for part in re.findall(r"(?:^    .+\n)+", section, re.MULTILINE) if "samples" in part)
    roundings = re.search(r"rounded up to ([\d, ]+) or (\d+)", flat(section))
    assert roundings
    rounded = [*roundings[1].split(", "), roundings[2]]
    listed = {*flat(block).split(", ")} | {f"{prefix}ceil{n}(tokens)" for prefix in ("", "samples*") for n in rounded}
    assert listed == set(FEATURES)
    assert number(section, r"one of the (\d+) pieces") == LOSS_CHUNKS


def test_families_are_traced_where_the_page_says(pages: dict[str, Any]) -> None:
    for row, one in zip(pages["docs/prediction.md"].table("Families of shapes"), (True, False), strict=True):
        *made, checked = [f"{samples} × {tokens}" for samples, tokens, _ in Family(one, 0).examples()]
        assert row[1:] == [", ".join(made), checked]


def test_models_that_loop_over_images_are_named(pages: dict[str, Any]) -> None:
    section = pages["docs/prediction.md"].section("Families of shapes")
    assert set(re.findall(r"\b\w+_\w+\b", section)) == LOOPS_OVER_IMAGES


def test_numbers_of_layers(pages: dict[str, Any]) -> None:
    from oomph.live.layers import MAX_UNIT

    page = pages["docs/prediction.md"]
    assert number(page.section("Layers"), r"The trace holds (\w+) units") == UNITS
    assert number(page.section("Layers"), r"pattern of layers that repeats: (\w+) at most") == MAX_UNIT
    verified = page.section("What is verified each time")
    assert (number(verified, r"(\w+) units of layers"), number(verified, r"in place of (\w+)\.")) == (UNITS + 1, UNITS)
    assert number(verified, r"below (\d+) tokens") == LEAST_ROWS


def test_segments_of_the_events(pages: dict[str, Any]) -> None:
    names = ("load", "first", "next", "warmup/optimizer", "step/optimizer", "evaluate")
    form = ClosedForm(
        formulas=[Formula((Dimension(0, 1, 0),), 2)],
        kinds=[Kind("load", "", "load", "weight", "bfloat16")],
        formula=[0],
        kind=[0],
        layer=[-1],
        parameter=[-1],
        timeline=[0],
        pieces=[Piece(name, int(name != "load"), 1) for name in names],
    )
    events = lay_out(form, Choice(2, 3, 6, eval_batch=2), 300, 0)
    documented = re.findall(r"`([a-z/]+)`", " ".join(row[0] for row in pages["docs/prediction.md"].table("The events")))
    assert documented == [segment.name for segment in events.segments]


def test_roles_and_phases_are_explained(pages: dict[str, Any]) -> None:
    rows = [row[0].strip("`") for row in pages["docs/tracing.md"].table("What is recorded")]
    assert rows[: len(typing.get_args(Phase))] == list(typing.get_args(Phase))
    assert [row for row in rows[len(typing.get_args(Phase)) :] if row in typing.get_args(Role)] == list(typing.get_args(Role))


def test_model_types_that_the_pages_name(pages: dict[str, Any]) -> None:
    from oomph.live import batch

    tokens = [word for row in pages["docs/catalogue.md"].table("Images") for word in row[0].split(", ")]
    assert set(tokens) == {"llava", "internvl", "gemma3", "idefics3", "smolvlm", *batch._GRIDS}
    named = re.search(r"as their collators do: ([\w, ]+)\.", flat(pages["docs/tracing.md"].section("The batch")))
    assert named
    assert set(named[1].split(", ")) == batch._THREE_POSITIONS


def test_rules_of_the_allocator(pages: dict[str, Any]) -> None:
    shown = [int(row[1].replace(",", "")) for row in pages["docs/allocator.md"].table("The rules")]
    assert shown == [
        reserve.MIN_BLOCK,
        reserve.SMALL_REQUEST,
        reserve.SMALL_SEGMENT,
        reserve.LARGE_SEGMENT,
        reserve.LARGE_ROUNDING,
        reserve.MIN_BLOCK,
        reserve.SMALL_REQUEST,
    ]
    assert segment_bytes(reserve.MIN_LARGE_REQUEST - 1) == reserve.LARGE_SEGMENT
    assert f"below `{reserve.MIN_LARGE_REQUEST >> 20} MiB`" in pages["docs/allocator.md"].section("The rules")


def test_settings_of_the_allocator(pages: dict[str, Any]) -> None:
    shown = [row[0].strip("`").replace("_mb", "_bytes") for row in pages["docs/allocator.md"].table("Settings")]
    assert shown == list(AllocatorSettings.__dataclass_fields__)


def test_numbers_of_the_recorded_runs(root: Any, pages: dict[str, Any]) -> None:
    text = pages["docs/allocator.md"].section("How far it was checked")
    files = list((root / "tests" / "measured" / "allocator-traces").glob("*.gz"))
    actions = [event[0] for file in files for event in json.loads(gzip.decompress(file.read_bytes()))["events"]]
    assert number(text, r"They have ([\d,]+) requests") == actions.count("a")
    assert number(text, r"([\d,]+) new segments") == actions.count("S")
    assert number(text, r"([\d,]+) released ones") == actions.count("s")
    assert len(files) == 3


def test_numbers_of_a_prediction(pages: dict[str, Any]) -> None:
    from oomph.core.predict import _bound

    assert number(pages["docs/plan-json.md"].section("`Prediction`"), r"up to (\d+) of those in use") == LARGEST
    section = pages["docs/prediction.md"].section("Error bound")
    assert number(section, r"upwards: (\d+) %") == round(100 * _bound(Events(), [], 1))


@pytest.mark.parametrize("page", ["README.md", "docs/prediction.md", "docs/tracing.md", "docs/allocator.md"])
def test_names_of_our_own_are_importable(page: str, pages: dict[str, Any]) -> None:
    import importlib

    for name in set(re.findall(r"`(oomph(?:\.\w+)+)`", pages[page].text)):
        parent, _, own = name.rpartition(".")
        if not hasattr(importlib.import_module(parent), own):
            importlib.import_module(name)
