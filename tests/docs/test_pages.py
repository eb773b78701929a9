"""Every page: links lead somewhere, commands are commands, and what they are said to print is what they print."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import typer.main

from oomph import cli
from oomph.core.catalogue import MODELS, find_model
from oomph.core.choices import resolve
from oomph.core.devices import find_gpu
from oomph.recipe import Parts, Recipe, load, stage_of
from oomph.records import Choice, Footprint, MeasuredRung, MeasuredStage, Measurement, Plan

ERRORS = "docs/errors-and-exit-codes.md"
APART = {"chat", "eval", "explain", "train"}
"""Verbs that need files which are on no page: tests of their own run what pages show of them."""


def anchor(heading: str) -> str:
    """A heading as links name it: GitHub's rule."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_link_leads_somewhere(root: Any, pages: dict[str, Any]) -> None:
    broken = []
    for page in pages.values():
        for link in page.links():
            path, _, fragment = link.partition("#")
            target = (root / page.path).parent / path if path else root / page.path
            known = pages.get(str(target.resolve().relative_to(root)))
            if not target.exists() or (fragment and fragment not in map(anchor, known.headings() if known else [])):
                broken.append(f"{page.path}: {link}")
    assert not broken, broken


def test_every_page_is_reached_from_the_first(pages: dict[str, Any], root: Any) -> None:
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = pages[waiting.pop()]
        reached.add(str(page.path))
        targets = {(page.path.parent / link.partition("#")[0]) for link in page.links()}
        names = {str((root / target).resolve().relative_to(root)) for target in targets}
        waiting += [name for name in names if name in pages and name not in reached]
    assert reached >= {name for name in pages if name.startswith("docs/")}


def commands(page: Any) -> Iterator[str]:
    """Every command of ours on a page, in blocks and within sentences; ``RECIPE`` stands for any recipe."""
    shown = [shown.command for shown in page.commands()]
    text = re.sub(r"^```.*?^```$", "", page.text, flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    for command in [*shown, *inline]:
        words = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command)
        if re.match(r"oomph [a-z-]", words):
            yield words.replace("RECIPE", "moe-llava/phi2-clip336").partition(" || ")[0]


def plan_nothing(recipe: Recipe, source: object, stages: Sequence[str] | None = None, **_: object) -> Plan:
    """All of planning that needs no trace."""
    gpu = find_gpu(recipe.hardware.gpu)
    for stage in [stage_of(recipe, name) for name in stages] if stages else recipe.stages:
        resolve(stage, recipe, gpu)
    names = (recipe.model.vision, recipe.model.language) if isinstance(recipe.model, Parts) else (recipe.model,)
    for name in names:
        if not name.startswith("./"):
            find_model(name)
    return Plan(recipe.name, gpu.name, recipe.hardware.gpus, (), {})


def measure_nothing(recipe: Recipe, _: object, machine: object, __: object, stages: Sequence[str] | None, *___: object) -> Any:
    """All of measuring that neither traces nor runs anything."""
    plan_nothing(recipe, None, stages)
    rung = MeasuredRung(Choice(1, 1, 1), Footprint(1, 1, ()), 1, Footprint(1, 1, ()))
    return Measurement(recipe.name, "cpu", "", "", "", (MeasuredStage("a", 1, 0, (rung,), ""),), (), {}, "")


def test_every_command_is_one(pages: dict[str, Any], reader: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("oomph.core.plan.make_plan", plan_nothing)
    monkeypatch.setattr("oomph.core.measuring.measure", measure_nothing)
    monkeypatch.chdir(reader.folder)
    ran = 0
    assert typer.main.get_command(cli.app).commands.keys() >= APART  # type: ignore[attr-defined]
    for page in pages.values():
        for recipe in reader.save(page):
            plan_nothing(load(recipe), None)
        failing = {shown.command for shown in page.commands() if "error: " in shown.output}
        for command in commands(page):
            typed, _, target = command.partition(" > ")
            verb, *rest = shlex.split(typed)[1:]
            if verb not in APART and command not in failing and (rest or verb not in {"plan", "report"}):
                capsys.readouterr()
                assert cli.run([verb, *rest]) == 0, f"{page.path}: `{command}` fails with {capsys.readouterr().err}"
                if target:
                    (reader.folder / target).write_text(capsys.readouterr().out, encoding="utf-8")
                ran += 1
    assert ran > 8


def test_a_wrong_command_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oomph.core.plan.make_plan", plan_nothing)
    for wrong in (["--gpu", "H1000"], ["micro_batch=3"], ["model.language=phi-9"], ["--stages", "moe"], ["--stage", "mo"]):
        assert cli.run(["plan", "moe-llava/phi2-clip336-as-published", *wrong]) == 2
    assert find_model("microsoft/phi-2") == find_model("phi-2")
    assert MODELS


def test_errors_are_what_the_program_says(pages: dict[str, Any], reader: Any, follow: Callable[[Any, Any], None]) -> None:
    assert sum("error: " in shown.output for shown in pages[ERRORS].commands()) >= 5
    follow(reader, pages[ERRORS])


def test_exit_codes_are_the_same_on_both_pages(pages: dict[str, Any]) -> None:
    first, second = pages[ERRORS].table("Errors and exit codes"), pages["README.md"].table("For scripts")
    assert [row[0] for row in first] == [row[0] for row in second]
