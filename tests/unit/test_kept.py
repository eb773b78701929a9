"""Rows that are kept: whole lines or nothing, from several at once, never into a file that is something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oomph.core.kept import Kept, Row, parse_row, read_rows, rows_of
from oomph.errors import UserError
from oomph.recipe import Recipe
from oomph.records import Choice, Footprint, MeasuredRung, MeasuredStage, Measurement, PhasePeak


def recipe(model: Any = "llama-3.1-8b") -> Recipe:
    stage = {"name": "tune", "train": {"language": 1e-4, "head": "frozen"}, "effective_batch": 4}
    return Recipe.model_validate(
        {"name": "tiny", "model": model, "data": {"max_tokens": 64}, "hardware": {"gpu": "T4"}, "stages": [stage]}
    )


def measurement(*micro_batches: int, name: str = "tune") -> Measurement:
    def footprint(nbytes: int) -> Footprint:
        return Footprint(nbytes, 2 * nbytes, (PhasePeak("forward", nbytes, 2 * nbytes),))

    rungs = tuple(MeasuredRung(Choice(n, 1, n), footprint(100 * n), n, footprint(100 * n)) for n in micro_batches)
    stage = MeasuredStage(name, 64, 0, rungs, "")
    return Measurement("tiny", "cuda", "T4", "580.1", "13.0", (stage,), (), {"torch": "2.13.0"}, "2026-01-02T03:04:05")


def test_each_rung_is_a_row_that_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    Kept(recipe(), file).keep(measurement(1, 2))
    Kept(recipe(), file).keep(measurement(4))
    rows = read_rows(file)
    assert [row.measurement for row in rows] == [measurement(1), measurement(2), measurement(4)]
    assert len(file.read_bytes().splitlines()) == 3
    assert {row.recipe_digest for row in rows} == {rows[0].recipe_digest}
    assert Recipe.model_validate(rows[0].recipe) == recipe()
    first = json.loads(file.read_bytes().splitlines()[0])
    assert (first["schema"], first["kind"]) == (1, "measured row")


def test_a_folder_of_the_user_s_travels_as_its_configuration(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2}
    for name in ("one/mine", "two/mine", "three/other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    names = ("one/mine", "two/mine", "three/other")
    one, two, other = (rows_of(recipe(str(tmp_path / name)), measurement(1))[0] for name in names)
    assert one.recipe["model"] == "mine"
    assert one.configurations == {"mine": config}
    assert str(tmp_path) not in json.dumps(one.to_json())
    assert one.recipe_digest == two.recipe_digest != other.recipe_digest
    parts = {"vision": str(tmp_path / "one/mine"), "projector": "linear", "language": "phi-2"}
    row = rows_of(recipe(parts), measurement(1))[0]
    assert (row.recipe["model"]["vision"], row.recipe["model"]["language"]) == ("mine", "phi-2")
    assert list(row.configurations) == ["mine"]


def test_an_empty_file_is_a_new_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.touch()
    Kept(recipe(), file).keep(measurement(1))
    assert len(read_rows(file)) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"name: tiny\n", "holds no measured rows: line 1"),
        (b'{"stages": []}\n', "line 1: it is no measured row"),
        (b"[1]\n", "line 1: it is no measured row"),
        (b"\n", "line 1"),
        (b"\x00\xff\n", "line 1"),
        (b'{"schema": 2, "kind": "measured row"}\n', "its schema is 2, and this version reads 1"),
        (b'{"schema": 1, "kind": "measured row"}\n', "it lacks configurations, measurement, recipe, recipe_digest"),
        (b"[" * 100_000 + b"\n", "line 1"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        Kept(recipe(), file)
    assert problem in error.value.problems[0]
    assert file.read_bytes() == content


def test_a_line_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    Kept(recipe(), file).keep(measurement(1, 2))
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(UserError, match="line 2"):
        Kept(recipe(), file)
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="has no end"):
        Kept(recipe(), file)


@pytest.mark.parametrize("damage", [{"device": "tpu"}, {"stages": [{}]}, {"schema": 9}])
def test_a_row_with_a_damaged_measurement_is_refused(damage: dict[str, Any]) -> None:
    (row,) = rows_of(recipe(), measurement(1))
    data = row.to_json()
    data["measurement"] = {**data["measurement"], **damage}
    with pytest.raises(ValueError, match="Measurement"):
        parse_row(json.dumps(data))


def test_where_rows_cannot_go_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder", "missing/rows.jsonl", "x" * 300):
        with pytest.raises(UserError, match="cannot be written"):
            Kept(recipe(), tmp_path / name)
    for name in (os.devnull, "/dev/full"):
        with pytest.raises(UserError, match="not a file that rows can be appended to"):
            Kept(recipe(), Path(name))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="cannot be written"):
        Kept(recipe(), pipe)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to every file")
def test_a_file_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.touch(0o444)
    with pytest.raises(UserError, match="cannot be written"):
        Kept(recipe(), file)


def test_a_full_disk_is_said_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr("oomph.core.kept.os.fstatvfs", lambda _: Disk)
    with pytest.raises(UserError, match="its disk is full"):
        Kept(recipe(), tmp_path / "rows.jsonl")


@pytest.mark.parametrize("fails", ["short write", "error", "fsync"])
def test_a_row_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    file, told = tmp_path / "rows.jsonl", list[str]()
    kept = Kept(recipe(), file, told.append)
    kept.keep(measurement(1))
    before, write = file.read_bytes(), os.write

    def fail(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if fails == "fsync":
            patch.setattr("oomph.core.kept.os.fsync", fail)
        else:
            patch.setattr("oomph.core.kept.os.write", fail if fails == "error" else lambda fd, data: write(fd, data[:100]))
        kept.keep(measurement(2))
    assert file.read_bytes() == before
    assert kept.lost
    assert told == [f"a row is not kept: {str(file)!r} cannot be written: No space left on device"]
    kept.keep(measurement(3))
    assert [row.measurement.stages[0].rungs[0].choice.micro_batch for row in read_rows(file)] == [1, 3]


WRITER = """
import sys
from pathlib import Path
from oomph.core.kept import Kept, read_rows
from oomph.recipe import Recipe

(row,) = read_rows(Path(sys.argv[1]))
kept = Kept(Recipe.model_validate(row.recipe), Path(sys.argv[2]))
for _ in range(20):
    kept.keep(row.measurement)
"""


def test_two_at_once_do_not_mix_their_lines(tmp_path: Path) -> None:
    file, names = tmp_path / "rows.jsonl", [name * 2000 for name in "ab"]
    writers = []
    for name in names:
        own = tmp_path / name[0]
        Kept(recipe(), own).keep(measurement(1, name=name))
        writers.append(subprocess.Popen([sys.executable, "-c", WRITER, str(own), str(file)]))
    assert [writer.wait() for writer in writers] == [0, 0]
    stages = [row.measurement.stages[0].name for row in read_rows(file)]
    assert sorted(stages) == sorted(names * 20)


def test_a_row_is_its_own_json() -> None:
    (row,) = rows_of(recipe(), replace(measurement(2), notes=("a note",)))
    assert isinstance(row, Row)
    assert parse_row(json.dumps(row.to_json())) == row
