"""The command line: exit codes, what goes to stdout and what to stderr, and what is never imported."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from oomph import cli
from oomph.core.forms import Traced
from oomph.errors import UserError
from oomph.recipe import Recipe
from oomph.records import Choice, Plan, Prediction, StagePlan
from oomph.report.reading import parse_record
from oomph.report.text import render
from oomph.units import GIB

RECIPE = "moe-llava/phi2-clip336"
ESCAPE = "\x1b["


class Key(NamedTuple):
    """All of a form's key that the cache looks at."""

    name: str

    def digest(self) -> str:
        return self.name


KEY = Key("a-form")


def plan_of(fits: bool) -> Plan:
    prediction = Prediction(fits, 8 * GIB, 9 * GIB, GIB, 12 * GIB, (), {"weight": 8 * GIB}, {}, None, (), 0.01, ("nothing",))
    stage = StagePlan("align", Choice(1, 1, 1), {}, prediction, 1, 2, 3, 0, "by hand")
    return Plan("tiny", "T4", 1, (stage,), {"torch": "2.13.0"})


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Puts a planner in the place of the real one: answers with a plan, raises an error, or calls a function."""

    def install(answer: Any) -> list[Any]:
        calls: list[Any] = []

        def make_plan(recipe: Recipe, source: Any, stages: Sequence[str] | None = None, **options: Any) -> Plan:
            calls.append((recipe, source, stages, options))
            if isinstance(answer, BaseException):
                raise answer
            plan: Plan = answer(recipe, source, stages) if callable(answer) else answer
            return plan

        monkeypatch.setattr("oomph.core.plan.make_plan", make_plan)
        return calls

    return install


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_every_stage_fits(planner: Any, capsys: Any, fits: bool, code: int) -> None:
    planner(plan_of(fits))
    assert cli.run(["plan", RECIPE]) == code
    out, err = capsys.readouterr()
    assert out == render(plan_of(fits))
    assert not err


def test_json_is_the_plan(planner: Any, capsys: Any) -> None:
    planner(plan_of(False))
    assert cli.run(["plan", RECIPE, "--json"]) == 1
    out, err = capsys.readouterr()
    assert Plan.from_json(json.loads(out)) == plan_of(False)
    assert json.loads(out)["schema"] == 1
    assert out.startswith('{\n  "recipe": "tiny"')
    assert not err


def test_settings_and_flags_reach_the_recipe(planner: Any) -> None:
    calls = planner(plan_of(True))
    flags = ["--gpu", "4090", "--gpus", "2", "--stage", "moe", "--stage", "align", "--stage", "moe"]
    assert cli.run(["plan", RECIPE, "micro_batch=4", *flags, "data.max_tokens=1024"]) == 0
    ((recipe, _, stages, _),) = calls
    assert (recipe.hardware.gpu, recipe.hardware.gpus) == ("4090", 2)
    assert (recipe.memory.micro_batch, recipe.data.max_tokens) == (4, 1024)
    assert stages == ["moe", "align"]


def test_without_stages_all_are_planned(planner: Any) -> None:
    calls = planner(plan_of(True))
    cli.run(["plan", RECIPE])
    assert calls[0][2] is None


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {"ladder": True, "fit": False, "keep": []}),
        (["--no-ladder", "--fit"], {"ladder": False, "fit": True, "keep": []}),
        (["--keep", "loss", "--keep", "micro_batch"], {"ladder": True, "fit": False, "keep": ["loss", "micro_batch"]}),
    ],
)
def test_flags_say_what_to_look_for(planner: Any, flags: list[str], options: dict[str, Any]) -> None:
    calls = planner(plan_of(True))
    assert cli.run(["plan", RECIPE, *flags]) == 0
    assert calls[0][3] == options


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "error: no command was given\n\nhint: oomph plan RECIPE"),
        (["plan"], "error: missing argument 'RECIPE'\n\nhint: `oomph plan --help`"),
        (["paln", RECIPE], "error: no such command 'paln'"),
        (["plan", RECIPE, "--jsn"], "--json"),
        (["plan", RECIPE, "--stage"], "error: option '--stage' requires an argument\n\nhint: "),
        (["plan", RECIPE, "--micro-batch=4"], "hint: settings of the recipe are written without dashes: micro_batch=VALUE"),
        (["plan", RECIPE, "--data.max_tokens", "4"], "written without dashes: data.max_tokens=VALUE"),
        (["plan", RECIPE, "--gpus", "two"], "error: `hardware.gpus` must be a whole number, not 'two'\n\nhint: "),
        (["plan", RECIPE, "--gpus", "0"], "error: `hardware.gpus` must be at least 1, not 0"),
        (["plan", RECIPE, "micro_batch"], "error: 'micro_batch' is not a setting\n\nhint: settings are written key=value"),
        (["plan", RECIPE, "micro_bach=4"], "error: `micro_bach` is no key of a recipe; did you mean"),
        (["plan", RECIPE, "--no-ladder", "--keep", "loss"], "error: --keep is for the search that --no-ladder leaves out"),
        (["report"], "error: missing argument 'FILE'\n\nhint: `oomph report --help`"),
        (["plan", "moe-llava/phi2-clip"], "error: there is no recipe 'moe-llava/phi2-clip'; did you mean"),
        (
            ["plan", RECIPE, "--stage", "finetun", "--stage", "alin"],
            "error: there is no stage 'finetun'; did you mean `finetune`?\n"
            "error: there is no stage 'alin'; did you mean `align`?\n\nhint: stages are align, finetune, moe\n",
        ),
    ],
)
def test_a_mistake_is_an_error_with_a_way_out(planner: Any, capsys: Any, arguments: list[str], expected: str) -> None:
    calls = planner(plan_of(True))
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err
    assert err.startswith("error: ")
    assert err.count("\n\nhint: ") == 1
    assert not out
    assert not calls


def test_a_setting_to_keep_that_is_none_is_refused_before_anything_is_traced(capsys: Any) -> None:
    assert cli.run(["plan", RECIPE, "--keep", "attentoin"]) == 2
    out, err = capsys.readouterr()
    assert not out
    first, _, hint = err.splitlines()
    assert first.startswith("error: ")
    assert "attentoin" in first
    assert all(knob in hint for knob in ("micro_batch", "attention", "loss", "sharding"))


def test_what_the_planner_refuses_is_the_user_s_to_mend(planner: Any, capsys: Any) -> None:
    planner(UserError(["one", "two"], "three"))
    assert cli.run(["plan", RECIPE]) == 2
    assert capsys.readouterr() == ("", "error: one\nerror: two\n\nhint: three\n")


def test_our_bug_is_one_line_to_report(planner: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OOMPH_DEBUG", raising=False)
    planner(KeyError("layers"))
    assert cli.run(["plan", RECIPE]) == 3
    out, err = capsys.readouterr()
    first, blank, hint = err.splitlines()
    assert first.startswith("error: this is a bug of oomph ")
    assert "KeyError: 'layers', in cli.py, line " in first
    assert (blank, out) == ("", "")
    assert "OOMPH_DEBUG=1" in hint


def test_a_traceback_is_there_for_those_who_ask(planner: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OOMPH_DEBUG", "1")
    planner(KeyError("layers"))
    assert cli.run(["plan", RECIPE]) == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert "\nerror: this is a bug" in err


def test_an_interruption_is_130(planner: Any, capsys: Any) -> None:
    planner(KeyboardInterrupt())
    assert cli.run(["plan", RECIPE]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_what_a_model_prints_is_no_result(planner: Any, capsys: Any) -> None:
    def chatty(*_: Any) -> Plan:
        print("loading my favourite model")
        return plan_of(True)

    planner(chatty)
    assert cli.run(["plan", RECIPE, "--json"]) == 0
    out, err = capsys.readouterr()
    assert Plan.from_json(json.loads(out)) == plan_of(True)
    assert err == "loading my favourite model\n"


def test_the_version_is_a_line(capsys: Any) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("oomph ")


def test_only_a_trace_that_the_cache_lacks_is_made_and_announced(
    planner: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Any] = []

    def make_forms(keys: Any, done: Any) -> None:
        for key in keys:
            made.append(key)
            done(key, Traced(None, 576, "by hand"))

    def plan(_: Recipe, source: Any, __: Any) -> Plan:
        assert source.traced(KEY) == Traced(None, 576, "by hand")
        return plan_of(True)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "oomph.live.workers", types.SimpleNamespace(make_forms=make_forms))
    planner(plan)
    assert cli.run(["plan", RECIPE]) == 0
    assert capsys.readouterr().err.startswith("tracing 1 training step ")
    assert cli.run(["plan", RECIPE]) == 0
    assert not capsys.readouterr().err
    assert made == [KEY]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A plan that does not fit, as `oomph plan --json` writes it."""
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_of(False).to_json(), indent=2) + "\n", encoding="utf-8")
    return file


def test_a_report_is_the_screen_of_the_plan(saved: Path, capsys: Any) -> None:
    assert cli.run(["report", str(saved)]) == 0
    assert capsys.readouterr() == (render(plan_of(False)), "")


def test_a_report_as_json_is_the_file(saved: Path, capsys: Any) -> None:
    assert cli.run(["report", str(saved), "--json"]) == 0
    assert capsys.readouterr() == (saved.read_text(encoding="utf-8"), "")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_report_reads_standard_input_in_the_encodings_of_shells(
    saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    content = saved.read_text(encoding="utf-8").encode(encoding)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
    assert cli.run(["report", "-"]) == 0
    assert capsys.readouterr() == (render(plan_of(False)), "")


WHOLE = plan_of(True).to_json()
TEXT = json.dumps(WHOLE).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (render(plan_of(True)).encode(), "is not JSON: expecting value in line 1"),
        (b"name: tiny\nmodel: phi-2\n", "is not JSON: expecting value in line 1"),
        (b"\x1f\x8b\x08\xff\xfe", "is not JSON: "),
        (TEXT[:-1], "is cut off"),
        (TEXT[: TEXT.index(b'"align"') + 4], "is cut off"),
        (TEXT[: TEXT.index(b"true") + 2], "is cut off"),
        (TEXT + TEXT, "is not JSON: extra data in line 1"),
        (b"[" * 10**5, "is not a plan: it is nested too deeply"),
        (b"[1, 2]", "is JSON, but no plan"),
        (b"{}", "is JSON, but no plan"),
        (b'{"allocated_peak_bytes": 3}', "is JSON, but no plan"),
        (json.dumps(WHOLE | {"schema": 2}).encode(), "has schema 2, and this version of oomph reads schema 1"),
        (json.dumps(WHOLE | {"schema": "\x1b[2J"}).encode(), "has schema '\\x1b[2J', and this version"),
        (b'{"stages": []}', "has no schema number, and this version of oomph reads schema 1"),
        (json.dumps(WHOLE | {"stages": 3}).encode(), "is a damaged plan: Plan.stages: 3 is not of type tuple"),
        (json.dumps(WHOLE | {"stages": [{}]}).encode(), "is a damaged plan: Plan.stages[0]: StagePlan lacks choice, "),
        (json.dumps(WHOLE | {"gpus": "\x1b[2J"}).encode(), "is a damaged plan: Plan.gpus: '\\x1b[2J' is not of type int"),
        (json.dumps(WHOLE | {"\x1b[2J": 1}).encode(), "is a damaged plan: Plan: Plan has no field ?[2J"),
        (TEXT.replace(b"0.01", b"NaN"), "is not JSON: NaN is no number"),
        (TEXT.replace(b"0.01", b"1e999"), "is not JSON: 1e999 is too large a number"),
        (TEXT.replace(b'"gpus": 1', b'"gpus": ' + b"9" * 400), "is not JSON: 99999999999999999999... is too large a number"),
    ],
)
def test_anything_but_a_plan_is_refused(tmp_path: Path, capsys: Any, content: bytes, message: str) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    assert cli.run(["report", str(file)]) == 2
    out, err = capsys.readouterr()
    assert not out
    problem, blank, hint = err.splitlines()
    assert problem.startswith(f"error: {file} {message}")
    assert (blank, hint.startswith("hint: "), "oomph plan RECIPE --json > plan.json" in hint) == ("", True, True)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, capsys: Any) -> None:
    no_run = f"there is no run.json in the folder '{tmp_path}'"
    for file, message in ((tmp_path / "none.json", "there is no file "), (tmp_path, no_run)):
        assert cli.run(["report", str(file)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert cli.run(["report", str(tmp_path / ("x" * 300))]) == 2
    assert "cannot be read: File name too long\n\nhint: " in capsys.readouterr().err


def test_whatever_is_cut_from_a_plan_is_called_cut_off() -> None:
    for end in range(1, len(TEXT)):
        with pytest.raises(UserError, match=r"^plan is cut off"):
            parse_record(TEXT[:end], "plan")


# What only shows from outside: a process of its own, whose planner is the one above.
DRIVER = f"""
import sys
sys.path[:0] = {sys.path!r}
import oomph.core.plan
from oomph import cli
from oomph.records import Plan
plan = Plan.from_json({plan_of(True).to_json()!r})
oomph.core.plan.make_plan = lambda *_, **__: plan
code = cli.run(sys.argv[1:])
assert not {{"torch", "transformers"}} & sys.modules.keys()
sys.exit(code)
"""


def start(arguments: list[str], stdout: int, **environment: str) -> subprocess.Popen[bytes]:
    plain = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR", "COLUMNS"}}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *(arguments if arguments[:1] == ["report"] else ["plan", RECIPE, *arguments])],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**plain, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment},
    )


def on_a_terminal(**environment: str) -> str:
    """What the command prints on a terminal of its own."""
    ours, theirs = pty.openpty()
    with start([], theirs, **environment) as process:
        os.close(theirs)
        printed = b""
        with contextlib.suppress(OSError):  # what Linux answers when the other end is closed
            while data := os.read(ours, 65536):
                printed += data
        os.close(ours)
        assert process.communicate()[1] == b""
        assert process.returncode == 0
    return printed.decode().replace("\r\n", "\n")


def test_a_plan_from_the_cache_needs_no_torch_and_a_pipe_gets_no_colour() -> None:
    with start([], subprocess.PIPE) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.decode() == render(plan_of(True))
    assert ESCAPE not in out.decode()


def test_a_report_needs_no_torch(saved: Path) -> None:
    with start(["report", str(saved)], subprocess.PIPE) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.decode() == render(plan_of(False))


def test_a_terminal_gets_colour_and_its_own_width() -> None:
    assert on_a_terminal(COLUMNS="80") == render(plan_of(True), color=True)
    assert on_a_terminal(COLUMNS="90") == render(plan_of(True), width=90, color=True)
    assert on_a_terminal(COLUMNS="200") == render(plan_of(True), width=cli.WIDEST, color=True)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_no_colour_gets_none(environment: dict[str, str]) -> None:
    assert on_a_terminal(COLUMNS="80", **environment) == render(plan_of(True))


def test_a_terminal_that_knows_ascii_alone_gets_it() -> None:
    with start([], subprocess.PIPE, PYTHONIOENCODING="ascii") as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.isascii()
    assert b"====================  weights" in out


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_reader_that_has_left_is_no_error(arguments: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with start(arguments, theirs) as process:
        os.close(theirs)
        assert process.communicate()[1] == b""
    assert process.returncode == 0
