"""`oomph train`: flags, what goes where, exit codes; and a run that is interrupted and goes on, in processes of their own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oomph import cli
from oomph.errors import RunError, UserError
from oomph.live.run_folder import read_log
from oomph.live.trainer import Interrupted, Options
from oomph.recipe import Recipe
from oomph.recipe.writing import to_yaml
from oomph.report.run import render
from oomph.run_records import RunSummary

RECIPE = "moe-llava/phi2-clip336"
SUMMARY = RunSummary("demo", "runs/demo", "cpu", "EPYC", (), "runs/demo/final", (), {}, "2026")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Puts an answer, or an error, in the place of training."""

    def install(answer: RunSummary | BaseException) -> list[Any]:
        calls: list[Any] = []

        def train(recipe: Recipe, source: Any, options: Options, observer: Any, draw: Any) -> RunSummary:
            calls.append((recipe, options))
            print("a model's own words")
            observer.note("a note")
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr("oomph.live.trainer.train", train)
        return calls

    return install


def test_what_is_asked_for_reaches_the_trainer(trainer: Any, capsys: Any) -> None:
    calls = trainer(SUMMARY)
    assert cli.run(["train", RECIPE, "micro_batch=4", "--output", "here", "--resume", "--memory-limit", "1.5GiB"]) == 0
    out, err = capsys.readouterr()
    assert out == render(SUMMARY)
    assert err == "a model's own words\na note\n"
    ((recipe, options),) = calls
    assert recipe.memory.micro_batch == 4
    assert options == Options(Path("here"), True, 3 << 29)
    assert Options().folder(recipe) == Path("runs") / recipe.name.replace("/", "-")


def test_json_is_the_summary(trainer: Any, capsys: Any) -> None:
    trainer(SUMMARY)
    assert cli.run(["train", RECIPE, "--json"]) == 0
    assert RunSummary.from_json(json.loads(capsys.readouterr().out)) == SUMMARY


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no data"), 2, "error: no data"),
        (RunError("no memory", "less"), 1, "error: no memory\n\nhint: less"),
        (Interrupted(Path("x")), 130, "to go on: oomph train moe-llava/phi2-clip336 'data.max_tokens=64 ' --memory-limit 2GiB"),
    ],
)
def test_exit_codes(trainer: Any, capsys: Any, error: BaseException, code: int, said: str) -> None:
    trainer(error)
    assert cli.run(["train", RECIPE, "data.max_tokens=64 ", "--memory-limit", "2GiB"]) == code
    out, err = capsys.readouterr()
    assert not out
    assert said in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--memory-limit", "much"], "error: --memory-limit 'much' is not a size"),
        (["--memory-limit", "0"], "error: --memory-limit 0 leaves no memory"),
        (["--stage", "align"], "error: --stage goes with --check-data alone"),
        (["--check-data", "--json"], "error: --check-data trains nothing"),
        (["--check-data", "--output", "x"], "error: --check-data trains nothing"),
        (["run.save_every=0"], "`run.save_every` must be at least 1"),
        (["--outptu", "x"], "--outptu"),
    ],
)
def test_mistakes_are_told_before_anything_runs(trainer: Any, capsys: Any, arguments: list[str], expected: str) -> None:
    calls = trainer(SUMMARY)
    assert cli.run(["train", RECIPE, *arguments]) == 2
    out, err = capsys.readouterr()
    assert expected in err
    assert not out
    assert not calls


def test_a_capacity_is_planned_and_not_trained(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", f"{RECIPE}-as-published"]) == 2
    assert "error: stages.moe.experts.dispatch capacity is planned and not trained" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupt_saves_and_says_how_to_go_on(text_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = text_recipe(name="long", stage={"epochs": 400, "schedule": "constant"}, run={"save_every": 10**6})
    (tmp_path / "long.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(arguments: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "oomph", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, cwd=tmp_path, env=environment, start_new_session=True, **pipes)

    folder = tmp_path / "runs" / "long"
    with start(["train", "long.yaml"]) as process:
        while process.poll() is None and len(read_log(folder)) < 4:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert not out
    assert "Traceback" not in err
    assert err.endswith("what was trained is saved; to go on: oomph train long.yaml --resume\ninterrupted\n")
    done = len(read_log(folder)) - 1
    assert [path.name for path in (folder / "tune" / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    again = shlex.split(err.rpartition("to go on: oomph ")[2].partition("\n")[0])
    with start(again) as process:
        while process.poll() is None and len(read_log(folder)) < done + 4:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert [line.step for line in read_log(folder)] == list(range(len(read_log(folder))))
