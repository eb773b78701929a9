"""Starting costs nothing: torch is loaded when a model is traced, not before."""

from __future__ import annotations

import subprocess
import sys

import pytest

STARTS = {
    "import oomph": ["-c", "import oomph"],
    "public names": ["-c", "import oomph; [getattr(oomph, name) for name in oomph.__all__]"],
    "import oomph.cli": ["-c", "import oomph.cli"],
    "oomph --help": ["-m", "oomph", "--help"],
    "oomph plan --help": ["-m", "oomph", "plan", "--help"],
}
HEAVY = {"torch", "transformers"}


def loaded(arguments: list[str]) -> set[str]:
    """The modules that a fresh interpreter imports, as its own list of import times names them."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("arguments", STARTS.values(), ids=STARTS)
def test_starting_leaves_torch_alone(arguments: list[str]) -> None:
    found = loaded(arguments) & HEAVY
    assert not found, f"{found} are loaded at the start: import them inside the function that needs them"


def test_the_list_of_loaded_modules_is_complete() -> None:
    assert {"json", "json.decoder"} <= loaded(["-c", "def f():\n    import json\nf()"])
