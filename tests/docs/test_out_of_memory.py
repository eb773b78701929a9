"""docs/why-out-of-memory.md: every message on it is explained as it says, and its figures are those of the reports."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = "docs/why-out-of-memory.md"


@pytest.fixture(scope="module")
def reports(root: Path) -> dict[str, Any]:
    """The reports by their short names, as ``owner/repository#number``."""
    rows = json.loads((root / "tests" / "oom" / "reports.json").read_text(encoding="utf-8"))
    return {row["source"].removeprefix("https://github.com/").replace("/issues/", "#"): row for row in rows}


def test_the_screens_are_those_of_the_program(pages: dict[str, Any], reader: Any, follow: Callable[[Any, Any], None]) -> None:
    assert len(pages[PAGE].commands()) >= 5
    follow(reader, pages[PAGE])


def test_the_messages_have_the_figures_of_the_reports_that_they_name(pages: dict[str, Any], reports: dict[str, Any]) -> None:
    text = pages[PAGE].text
    named = [source for source in re.findall(r"\(([\w./-]+#\d+)\)", text) if source in reports]
    assert len(named) >= 4
    for source in named:
        for figure in [value for value in reports[source]["numbers"].values() if isinstance(value, str)]:
            assert figure in text, f"{source}: {figure}"
