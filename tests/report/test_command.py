"""`oomph report`: files, folders and standard input; as text, as JSON, as a page that replaces nothing unasked."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from oomph import cli
from oomph.report.reading import read, read_log


@pytest.fixture
def folder(plain: Any, tmp_path: Path) -> Path:
    """A run's folder with its log, and a measurement."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(plain.run.to_json()), encoding="utf-8")
    (run / "log.jsonl").write_text("".join(json.dumps(line.to_json()) + "\n" for line in plain.log), encoding="utf-8")
    (run / "measured.json").write_text(json.dumps(plain.measurement.to_json()), encoding="utf-8")
    return run


def test_a_page_is_written_and_its_place_is_all_that_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert cli.run(["report", str(folder), "--html", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert said.err == ""
    assert "Memory, predicted and measured" in out.read_text(encoding="utf-8")
    assert read(str(folder / "run.json")) == read(str(folder)), "the log beside run.json is read"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


def test_nothing_is_replaced_unasked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    out.write_text("mine", encoding="utf-8")
    assert cli.run(["report", str(folder / "measured.json"), "--html", str(out)]) == 2
    assert "there is a file" in (said := capsys.readouterr().err)
    assert "--force replaces it" in said
    assert out.read_text(encoding="utf-8") == "mine"
    assert cli.run(["report", str(folder / "measured.json"), "--html", str(out), "--force"]) == 0
    assert "Predicted against measured" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--html", "{out}", "--json"], "two forms of one record"),
        (["--force"], "--force is for the page"),
        (["--html", "{folder}"], "is a folder"),
        (["--html", "{folder}/none/page.html"], "there is no folder"),
    ],
)
def test_what_cannot_be_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], problem: str
) -> None:
    words = [word.format(out=tmp_path / "page.html", folder=folder) for word in more]
    assert cli.run(["report", str(folder / "measured.json"), *words]) == 2
    said = capsys.readouterr()
    assert problem in said.err
    assert "hint: " in said.err
    assert said.out == ""
    assert not (tmp_path / "page.html").exists()


def test_a_folder_is_a_run_s_or_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("phi trained on phi (CPU)")
    assert cli.run(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "there is no run.json in the folder" in capsys.readouterr().err


def test_standard_input_is_read(plain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    piped = io.TextIOWrapper(io.BytesIO(json.dumps(plain.diagnosis.to_json()).encode()))
    monkeypatch.setattr(sys, "stdin", piped)
    assert cli.run(["report", "-", "--html", str(tmp_path / "page.html")]) == 0
    assert "Why memory ran out: phi" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_log_is_read_as_far_as_it_goes(plain: Any, folder: Path) -> None:
    assert read(str(folder)).log == plain.log
    log = folder / "log.jsonl"
    whole = log.read_text(encoding="utf-8").splitlines()
    broken = [whole[0].replace('"loss": 3.0', '"loss": NaN'), "", "{", "[1]", '{"kind": "step"}', '{"kind": "news"}']
    log.write_text("\n".join([*broken, whole[1], whole[2][:50]]), encoding="utf-8")
    found = read_log(log)
    assert [line.step for line in found] == [1, 2]
    assert found[0].loss is None
    log.write_bytes(b"\xff\xfe\x00")
    assert read_log(log) == ()
    assert read_log(folder / "none") == ()
