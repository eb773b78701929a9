"""`oomph explain` and `oomph report` on its answer: screens, JSON, exit codes, and what is not imported for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from oomph import cli
from oomph.core.catalogue import MODELS
from oomph.core.oom.explain import explain
from oomph.core.oom.families import families
from oomph.diagnosis_records import Diagnosis
from oomph.report.diagnosis import render

SEED = "Tried to allocate 6.56 GiB ... 33.67 GiB already allocated; 3.18 GiB free"
HEAVY = {"torch", "transformers", "numpy", "yaml", "matplotlib"}


@pytest.fixture
def seed(tmp_path: Path) -> str:
    file = tmp_path / "error.txt"
    file.write_text(f"{SEED}\n", encoding="utf-8")
    return str(file)


def test_the_seed_story_is_told_from_its_message_alone(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["explain", seed]) == 0
    screen = capsys.readouterr().out
    assert "attention scores [8, 32, 2623, 2623] in fp32" in screen.replace("\n", " ").replace("  ", " ")
    assert cli.run(["explain", seed, "--json"]) == 0
    diagnosis = Diagnosis.from_json(json.loads(capsys.readouterr().out))
    first = diagnosis.candidates[0]
    assert (first.what, first.shape, first.dtype, first.rank) == ("attention scores", (8, 32, 2623, 2623), "float32", 1)
    assert first.bytes == 4 * 8 * 32 * 2623 * 2623
    assert diagnosis.causes[0].name == "real need"
    assert any("sdpa" in cure.change for cure in diagnosis.cures)
    halves = [cure for cure in diagnosis.cures if "halve" in cure.change]
    assert halves[0].saves_bytes == first.bytes // 2


def test_the_answer_can_be_reported_again(seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["explain", seed])
    screen = capsys.readouterr().out
    cli.run(["explain", seed, "--json"])
    saved = tmp_path / "diagnosis.json"
    saved.write_text(capsys.readouterr().out, encoding="utf-8")
    assert cli.run(["report", str(saved)]) == 0
    assert capsys.readouterr().out == screen
    damaged = json.loads(saved.read_text(encoding="utf-8"))
    saved.write_text(json.dumps({**damaged, "causes": 7}), encoding="utf-8")
    assert cli.run(["report", str(saved)]) == 2
    assert "damaged diagnosis" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b"", "is empty"),
        ("binary.bin", b"\x00\x01\x02\x03" * 100, "is a binary file"),
        ("fine.log", b"step 1: loss 3.2\n", "holds no report of memory that ran out"),
        ("missing.txt", None, "there is no file"),
        ("", None, "is a folder"),
    ],
)
def test_what_cannot_be_explained_says_so(
    name: str, content: bytes | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    assert cli.run(["explain", str(file)]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("error: ")
    assert complaint in printed.err
    assert "hint: " in printed.err


def test_no_line_is_too_long(reports: list[dict[str, Any]], written: Callable[[dict[str, Any]], str]) -> None:
    for report in reports[::3]:
        diagnosis = explain(written(report), "a-file-with-a-very-long-name" * 4)
        for width in (70, 80, 100):
            screen = render(diagnosis, width)
            assert max(map(cell_len, screen.splitlines())) <= width, screen
            assert "\x1b" not in screen


def test_hostile_text_cannot_steer_the_terminal() -> None:
    frame = '  File "/x/\x07\x1b]0;title\x07modeling_phi.py", line 3, in forward\n    y = x\x08\x08\n'
    text = f"Traceback (most recent call last):\n{frame}RuntimeError: CUDA out of memory. Tried to allocate 1.00 GiB\x9b31m"
    screen = render(explain(text, "lo\x1b[31mg"))
    assert all(letter.isprintable() or letter == "\n" for letter in screen)


def test_it_starts_without_what_takes_long(seed: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "oomph", "explain", seed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & HEAVY
    assert "oomph.core.oom.explain" in loaded


def test_families_agree_with_the_catalogue() -> None:
    found = {family.name: family for family in families() if not family.vision}
    language = {name for name in MODELS if "clip" not in name or name == "phi2-clip336-llava"}
    language = {name for name in language if "siglip" not in name}
    assert language <= set(found)
    assert {name: found[name].parameters for name in language} == {name: MODELS[name].parameters for name in language}
    assert len({family.name for family in families()}) == len(families())
    for family in families():
        assert family.hidden % 8 == 0
        assert family.heads > 0
        assert family.weight > 0
        assert 2018 < family.released < 2027


def test_dimensions_and_parameters_of_a_family_agree() -> None:
    """Embeddings, attention and MLP alone give at least half and not many times the parameters that are written down."""
    for family in families():
        if not family.parameters or family.vision or family.experts:
            continue
        width, matrices = family.hidden, 3 if family.gated else 2
        layers = family.layers * (matrices * width * family.intermediate + 2 * width * width)
        low, high = layers + family.vocabulary * width, 2.6 * layers + 2 * family.vocabulary * width
        assert 0.75 * low <= family.parameters <= 1.35 * high, family
