"""`oomph measure`: exit codes, what is kept and when, and a whole run on the CPU that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from oomph import cli
from oomph.core.kept import read_rows
from oomph.core.measuring import Machine
from oomph.errors import UserError
from oomph.records import Choice, Footprint, MeasuredRung, MeasuredStage, Measurement
from oomph.report.measurement import render

RECIPE = "moe-llava/phi2-clip336"
CPU = Machine("cpu", "EPYC", "", "", 1, 1, (), 1, {}, "")


def measurement(within: bool = True) -> Measurement:
    right, wrong = Footprint(100, 100, ()), Footprint(200, 200, ())
    stage = MeasuredStage("align", 64, 0, (MeasuredRung(Choice(1, 1, 1), right, 1, right if within else wrong),), "here")
    return Measurement("tiny", "cpu", "EPYC", "", "", (stage,), (), {}, "2026-01-02")


@pytest.fixture
def measurer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Puts a measurement, or an error after it, in the place of a real one."""

    def install(answer: Measurement, error: BaseException | None = None) -> list[Any]:
        calls: list[Any] = []

        def measure(recipe: Any, source: Any, machine: Any, run: Any, stages: Any, done: Any, notify: Any) -> Measurement:
            calls.append((recipe, machine, stages))
            print("a model's own words")
            done(answer)
            if error is not None:
                raise error
            return answer

        monkeypatch.setattr("oomph.core.measuring.measure", measure)
        monkeypatch.setattr("oomph.live.hardware.machine", lambda: CPU)
        return calls

    return install


@pytest.mark.parametrize(("within", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_predictions_hold(measurer: Any, capsys: Any, within: bool, code: int) -> None:
    calls = measurer(measurement(within))
    assert cli.run(["measure", RECIPE, "micro_batch=4", "--stage", "moe"]) == code
    out, err = capsys.readouterr()
    assert out == render(measurement(within))
    assert err == "a model's own words\n"
    ((recipe, machine, stages),) = calls
    assert (recipe.memory.micro_batch, machine, stages) == (4, CPU, ["moe"])


def test_json_is_the_measurement(measurer: Any, capsys: Any) -> None:
    measurer(measurement())
    assert cli.run(["measure", RECIPE, "--json"]) == 0
    assert Measurement.from_json(json.loads(capsys.readouterr().out)) == measurement()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), UserError("no")])
def test_what_was_measured_is_kept_whatever_comes_after(measurer: Any, tmp_path: Path, error: BaseException | None) -> None:
    measurer(measurement(), error)
    file = tmp_path / "rows.jsonl"
    code = cli.run(["measure", RECIPE, "--keep", str(file)])
    assert code == {type(None): 0, KeyboardInterrupt: 130, UserError: 2}[type(error)]
    assert [row.measurement for row in read_rows(file)] == [measurement()]


def test_a_row_that_cannot_be_kept_is_said_after_all_is_printed(
    measurer: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    measurer(measurement())
    monkeypatch.setattr("oomph.core.kept.os.write", full)
    assert cli.run(["measure", RECIPE, "--keep", str(tmp_path / "rows.jsonl")]) == 1
    out, err = capsys.readouterr()
    assert out == render(measurement())
    assert "a row is not kept" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["measure"], "error: missing argument 'RECIPE'"),
        (["measure", "moe-llava/phi2"], "error: there is no recipe 'moe-llava/phi2'"),
        (["measure", RECIPE, "--stage", "x"], "error: there is no stage 'x'"),
        (["measure", RECIPE, "--keep", "/dev/full"], "error: '/dev/full' is not a file that rows can be appended to"),
        (["measure", RECIPE, "--keep", "."], "error: '.' cannot be written: Is a directory"),
        (["measure", RECIPE, "--gpu", "T4"], "--gpu"),
    ],
)
def test_mistakes_are_told_before_anything_runs(measurer: Any, capsys: Any, arguments: Sequence[str], expected: str) -> None:
    calls = measurer(measurement())
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err
    assert not out
    assert not calls


@pytest.mark.slow
def test_an_interrupted_run_keeps_the_rungs_that_have_run(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    (tmp_path / "recipe.yaml").write_text(
        f"{{name: tiny, model: {tmp_path}, data: {{max_tokens: 256}}, hardware: {{gpu: T4}}, stages: [{{name: tune, "
        "train: {language: 1.0e-4, head: 1.0e-4}, effective_batch: 4096}], memory: {micro_batch: 4096, precision: float32, "
        "checkpointing: none, loss: full, eval_batch: none}}"
    )
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "oomph", "measure", str(tmp_path / "recipe.yaml"), "--keep", str(rows)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        while process.poll() is None and not (rows.exists() and rows.stat().st_size):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    # Where the interrupt comes in the middle of code that is run from a string, CPython ends with the signal, whatever we say.
    assert process.returncode in (130, -signal.SIGINT), err
    assert not out
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    found = read_rows(rows)
    assert found
    assert all(row.measurement.within for row in found)
    assert all(row.configurations[tmp_path.name]["model_type"] == "llama" for row in found)
