"""docs/plan-json.md names every field of the records, with its type."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

import pytest

import oomph.records as records
from oomph.records import (
    Card,
    Choice,
    FailingRequest,
    Fit,
    Limit,
    PhasePeak,
    Plan,
    Prediction,
    Request,
    RoleBytes,
    Rung,
    Search,
    Speed,
    StagePlan,
    Suggestion,
    Timeline,
    TimelinePart,
)

PAGE = "docs/plan-json.md"
RECORDS = (
    *(Plan, StagePlan, Choice, Prediction, PhasePeak, Request, FailingRequest),
    *(Speed, Rung, Suggestion, Search, Fit, Card, Limit, Timeline, TimelinePart, RoleBytes),
)
NAMES = {int: "integer", str: "string", bool: "boolean", float: "number", type(None): "null"}


def json_type(kind: Any) -> str:
    """A field's type as the page writes it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in NAMES:
        return NAMES[kind]
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(json_type(option) for option in inner)
    if origin is tuple:
        return f"list of {json_type(inner[0])}{'' if dataclasses.is_dataclass(inner[0]) else 's'}"
    if origin is dict:
        return f"object of {json_type(inner[1])}s"
    assert isinstance(kind, type)
    return f"`{kind.__name__}`"


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_field_is_on_the_page(record: Any, pages: dict[str, Any]) -> None:
    hints = typing.get_type_hints(record)
    bases = [base for base in record.__bases__ if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    wanted = [(f"`{f.name}`", json_type(hints[f.name])) for f in dataclasses.fields(record) if f.name not in inherited]
    assert [(name, kind) for name, kind, _ in pages[PAGE].table(f"`{record.__name__}`")] == wanted


def test_every_record_of_a_plan_is_on_the_page() -> None:
    by_name = {f"`{name}`": record for name, record in vars(records).items() if dataclasses.is_dataclass(record)}
    reached: set[str] = set()
    waiting = ["`Plan`"]
    while waiting:
        reached.add(name := waiting.pop())
        kinds = " ".join(json_type(hint) for hint in typing.get_type_hints(by_name[name]).values())
        waiting += [other for other in by_name if other in kinds and other not in reached]
    assert reached == {f"`{record.__name__}`" for record in RECORDS}


def test_the_schema_s_number_is_on_the_page(pages: dict[str, Any]) -> None:
    assert ["`schema`", "integer", str(records.SCHEMA)] in pages[PAGE].table("`Plan`")
