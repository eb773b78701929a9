"""The pages of records: well-formed, self-contained, escaped, every chart with its alternative, every number the record's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from oomph.records import Plan
from oomph.report.html.colours import COLOURS
from oomph.report.html.drawing import chart, spread
from oomph.report.html.experts import expert_chart
from oomph.report.html.page import page
from oomph.report.html.run_charts import steps_of
from oomph.report.html.tables import table, tree
from oomph.run_records import ExpertLoad
from oomph.units import size

KINDS = ("plan", "run", "measurement", "diagnosis")
CHARTS = {"plan": 4, "run": 6, "measurement": 1, "diagnosis": 1}
SVG, XHTML = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xhtml}"
LARGEST = 3 * 10**6


def parsed(text: str) -> ElementTree.Element:
    """The page read as XML, which knows no mending: all that is opened is closed, and nothing is left unescaped."""
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.partition("\n")[2])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_whole_and_needs_nothing_else(pages: dict[str, str], kind: str) -> None:
    text = pages[kind]
    found = parsed(text)
    assert len(text.encode()) < LARGEST
    tags = {item.tag.rpartition("}")[2] for item in found.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "metadata"}
    for item in found.iter():
        for name, value in item.attrib.items():
            assert not name.startswith("on")
            assert name.rpartition("}")[2] not in ("src", "href") or value.startswith("#"), value
    assert not re.search(r"url\((?!#)|@import|//[a-z]+\.[a-z]", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    ids = [item.attrib["id"] for item in found.iter() if "id" in item.attrib]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert used <= set(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_chart_is_drawn_twice_and_has_its_alternative(pages: dict[str, str], kind: str) -> None:
    figures = list(parsed(pages[kind]).iter(f"{XHTML}figure"))
    assert len(figures) == CHARTS[kind]
    for figure in figures:
        (chart,) = (item for item in figure.iter() if item.get("role") == "img")
        assert len(chart.attrib["aria-label"]) > 40
        drawings = list(chart.iter(f"{SVG}svg"))
        assert [drawing.get("aria-hidden") for drawing in drawings] == ["true", "true"]
        for drawing in drawings:
            assert len(list(drawing.iter(f"{SVG}path"))) >= 3
            assert any(item.text for item in drawing.iter(f"{SVG}text")), "words are words, not outlines"
        (numbers,) = (item for item in figure.iter(f"{XHTML}details"))
        rows = list(numbers.iter(f"{XHTML}tr"))
        assert len(rows) >= 2
        assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_colour_has_a_value_for_light_and_for_dark(pages: dict[str, str], kind: str) -> None:
    text = pages[kind]
    assert "#0a0b" not in text
    assert "@@" not in text
    used = set(re.findall(r"var\(--([a-z]+)\)", text))
    assert used <= set(COLOURS)
    for name in used:
        assert len(re.findall(rf"--{name}: #", text)) == 2
    drawn = [item for item in parsed(text).iter() if item.tag.startswith(SVG)]
    styles = " ".join(item.get("style", "") + " " + item.get("fill", "") for item in drawn)
    assert not re.findall(r"#[0-9a-f]{6}", styles), "a colour of its own is wrong on one of the two"


def luminance(colour: str) -> float:
    """Of a colour by WCAG 2.2."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_stand_out_from_the_ground(dark: bool) -> None:
    ground = luminance(COLOURS["ground"][dark])
    for name in ("ink", "muted", "accent", "good", "bad", "second", "third"):
        lighter, darker = sorted((ground, luminance(COLOURS[name][dark])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_stays_a_name(hostile_pages: dict[str, str], kind: str) -> None:
    text = hostile_pages[kind]
    text.encode("utf-8")
    found = parsed(text)
    tags = {item.tag.rpartition("}")[2] for item in found.iter()}
    assert not tags & {"script", "img"}
    assert not any(name.startswith("on") for item in found.iter() for name in item.attrib)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text)
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in text
    assert "$x_1$" in "".join(found.itertext()), "no formula is made of a name"


def test_the_numbers_of_a_plan_are_the_record_s(plain: Any, pages: dict[str, str], numbers: Callable[[str], list[str]]) -> None:
    shown = numbers(pages["plan"])
    for stage in plain.plan.stages:
        found = stage.prediction
        wanted = [found.allocated_peak_bytes, found.reserved_peak_bytes, found.usable_bytes, *found.by_role.values()]
        wanted += [peak.reserved_peak_bytes for peak in found.phases] + [item.bytes for item in found.largest_requests]
        wanted += [item.saves_bytes for item in stage.suggestions] + [item.reserved_peak_bytes for item in stage.fit.cards]
        wanted += [rung.prediction.reserved_peak_bytes for rung in stage.ladder]
        wanted += [nbytes for line in stage.timeline.by_role for nbytes in line.bytes]
        assert {size(nbytes) for nbytes in wanted} <= set(shown)
        assert "".join(parsed(pages["plan"]).itertext()).count(stage.name) >= 2


def test_the_numbers_of_a_run_a_measurement_and_a_diagnosis_are_the_records(
    plain: Any, pages: dict[str, str], numbers: Callable[[str], list[str]]
) -> None:
    shown = numbers(pages["run"])
    for stage in plain.run.stages:
        failed = stage.recoveries[0]
        wanted = (
            failed.predicted_bytes,
            failed.limit_bytes,
            failed.measured_bytes,
            failed.predicted_bytes - failed.measured_bytes,
        )
        assert {size(nbytes) for nbytes in wanted} <= set(shown)
        assert "next rung: attention eager → sdpa; cut 2 × 8 → 8 + 2 × 4" in shown
        assert {f"{found.loss:.4f}" for found in stage.evaluations} <= set(shown)
    shown = numbers(pages["measurement"])
    for rung in plain.measurement.stages[0].rungs:
        if rung.measured:
            pair = rung.predicted.allocated_peak_bytes, rung.measured.allocated_peak_bytes
            assert {f"{pair[0]:,}", f"{pair[1]:,}", f"{pair[0] - pair[1]:+,}"} <= set(shown)
    assert sum(text == "✗ outside" for text in shown) == 2  # the allocated peak of 8, and that of its backward phase
    found, shown = plain.diagnosis, numbers(pages["diagnosis"])
    message, cure = found.message, found.cures[0]
    wanted = (message.requested_bytes, message.free_bytes, message.allocated_bytes, message.unallocated_bytes)
    wanted += (cure.saves_bytes, cure.allocated_peak_bytes, cure.reserved_peak_bytes, *found.alive.values())
    assert {size(nbytes) for nbytes in wanted} <= set(shown)


def test_what_a_record_lacks_leaves_no_hole(plain: Any) -> None:
    bare = replace(plain.plan.stages[0], timeline=None, ladder=(), unpinned=None, speed=None, fit=None, suggestions=())
    assert not list(parsed(page(replace(plain.plan, stages=(bare,)))).iter(f"{XHTML}figure"))
    assert "All stages" not in page(replace(plain.plan, stages=(bare,)))
    changed = replace(bare, timeline=replace(plain.plan.stages[0].timeline, peak=99))
    assert not list(parsed(page(replace(plain.plan, stages=(changed,)))).iter(f"{XHTML}figure"))
    assert parsed(page(Plan("nothing", "T4", 1, (), {}))) is not None
    unlogged = page(plain.run)
    assert "The run's log is not at hand" in unlogged
    assert len(list(parsed(unlogged).iter(f"{XHTML}figure"))) == 1  # the load of the experts is in the summary
    calm = tuple(replace(stage, recoveries=(), experts=(), evaluations=()) for stage in plain.run.stages)
    assert "Memory never ran out." in page(replace(plain.run, stages=calm))
    unmeasured = replace(plain.measurement.stages[0], rungs=plain.measurement.stages[0].rungs[-1:])
    assert "micro-batch 16 failed: phi" in page(replace(plain.measurement, stages=(unmeasured,)))
    assert parsed(page(replace(plain.measurement, stages=(replace(unmeasured, rungs=()),)))) is not None
    told = replace(plain.diagnosis, explained=1, candidates=(), causes=(), cures=(), event=None, alive={}, recipe=None)
    assert not list(parsed(page(told)).iter(f"{XHTML}figure")), "parts that are more than the card are not drawn as its parts"
    assert "The message does not tell which tensor it was." in page(told)


def test_a_long_log_is_drawn_in_little_room(plain: Any) -> None:
    first = next(line for line in plain.log if hasattr(line, "grad_norm"))
    log = [
        replace(first, step=number, steps=4_000, loss=1 / number, learning_rates={"all": 1e-4}) for number in range(1, 4_001)
    ]
    text = page(plain.run, log)
    assert len(text.encode()) < LARGEST
    assert "log.jsonl has all 4,000" in text


def test_dead_and_overloaded_experts_are_named(pages: dict[str, str]) -> None:
    rows = [["".join(cell.itertext()) for cell in row] for row in parsed(pages["run"]).iter(f"{XHTML}tr")]
    assert ["tunephi", "1", "1", "dead", "0.00×"] in rows
    assert not [row for row in rows if row[:2] == ["tunephi", "3"] and "dead" in row]


def test_many_experts_are_drawn_in_few_columns(plain: Any) -> None:
    layers = tuple(ExpertLoad(layer, tuple(range(160)), (0,) * 160) for layer in range(60))
    found = expert_chart(replace(plain.run.stages[1], experts=layers))
    assert found is not None
    assert "160 experts, from the least loaded" in found.wide
    assert len(found.wide) + len(found.narrow) < LARGEST / 10
    assert "480 experts dead" in found.label


def test_words_of_a_drawing_keep_all_their_digits() -> None:
    def fill(sheet: Any) -> None:
        axes = sheet.figure.subplots()
        axes.plot([0, 1.23456789], [0, 1])
        axes.set_title("5.123456789 < 6.987654321")

    found = chart("a line", "from here to there", fill, table("none", (), ()))
    assert "5.123456789 &lt; 6.987654321" in found.wide
    assert not re.search(r"\d\.\d{3}", re.sub(r">[^<]*<", "><", found.wide)), "places are rounded to keep the page small"


def test_modules_add_up_to_a_tree() -> None:
    found = tree({"a.b.c": 4, "a.b.d": 2, "a.b": 1, "x": 1, "by a library, v1.2": 2})
    assert [(node.name, node.bytes, node.share) for node in found] == [
        ("a.b", "7 B", "70 %"),
        ("by a library, v1.2", "2 B", "20 %"),
        ("x", "1 B", "10 %"),
    ]
    assert [(node.name, node.bytes) for node in found[0].children] == [("c", "4 B"), ("d", "2 B"), ("by itself", "1 B")]
    assert tree({}) == ()


def test_labels_keep_their_order_and_their_distance() -> None:
    assert spread([1.0, 1.1, 5.0], 1.0, 0.0, 10.0) == [1.0, 2.0, 5.0]
    assert spread([9.9, 9.8], 1.0, 0.0, 10.0) == [10.0, 9.0]
    crowded = spread([5.0] * 30, 1.0, 0.0, 10.0)
    assert crowded == sorted(crowded)
    assert crowded[0] >= 0
    assert crowded[-1] <= 10 + 1e-9


def test_dry_runs_are_no_steps(plain: Any) -> None:
    first = plain.log[0]
    found = steps_of([replace(first, step=0), *plain.log])
    assert len(found.lines) == 60
    assert found.before == {"alignphi": 0, "tunephi": 30}
