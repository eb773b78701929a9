"""What a user has to install is a decision, not an accident."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

RUN_TIME = {
    "jinja2",
    "matplotlib",
    "numpy",
    "pillow",
    "pydantic",
    "pyyaml",
    "rich",
    "safetensors",
    "torch",
    "transformers",
    "typer",
}


def test_the_run_time_dependencies_are_these(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower() for requirement in project["dependencies"]}
    assert declared == RUN_TIME, (
        "the list of run-time dependencies changed; if a new one earns its place in every installation, "
        "change RUN_TIME with it, and say in the commit message what it does that the others do not"
    )
