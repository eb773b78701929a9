"""The command line: parse, call, print, exit code. What takes time is imported when it is needed."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from oomph.errors import UserError

if TYPE_CHECKING:
    from oomph.core.forms import FormKey, Traced
    from oomph.recipe import Recipe
    from oomph.records import Plan

WIDEST = 100

# Typer keeps a copy of click of its own in some versions and imports click in others; this is UsageError in all of them.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="oomph",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class _Command(TyperCommand):
    """A command whose usage line shows the positional arguments as they are written."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after the command's name."""
        arguments = [str(item.metavar) for item in self.params if item.param_type_name == "argument"]
        return [self.options_metavar or "", *arguments]


def main() -> None:
    """Runs the command line of this process and exits."""
    gc.set_threshold(200_000)  # a search makes many tuples and no cycles; looking for them took a tenth of its time
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs a command line and returns its exit code.

    0: every stage fits. 1: one does not. 2: wrong usage or input. 3: a mistake of ours. 130: interrupted.
    """
    try:
        code: int | None = app(args=list(arguments), prog_name="oomph", standalone_mode=False)
    except UserError as error:
        return _refuse(error)
    except _UsageError as error:
        return _refuse(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        return _fail(error)
    if code == 130:
        typer.echo("interrupted", err=True)
    return code or 0


@app.callback(invoke_without_command=True)
def _oomph(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Predicts the peak CUDA memory of fine-tuning vision-language and mixture-of-experts models, without a GPU."""
    if version:
        _print(f"oomph {_version()}\n")
    elif context.invoked_subcommand is None:
        raise UserError("no command was given", "oomph plan RECIPE predicts a recipe's memory; oomph --help lists all commands")


@app.command("plan", cls=_Command, short_help="Predict a recipe's peak memory.")
def _plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of a shipped one.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the recipe's, as micro_batch=4.")
    ] = None,
    stages: Annotated[list[str] | None, typer.Option("--stage", metavar="NAME", help="Plan this stage; or several.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="Plan for this card.")] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", metavar="N", help="Plan for this many GPUs in all.")] = None,
    no_ladder: Annotated[bool, typer.Option("--no-ladder", help="Predict the recipe's own settings and no others.")] = False,
    fit: Annotated[bool, typer.Option("--fit", help="Say what it would take: cards, numbers of GPUs, limits.")] = False,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="KNOB", help="Never change this setting; or several.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Predict the peak memory of every stage of a recipe, say whether it fits, and what else fits.

    Exit codes: 0 every stage fits, 1 one does not, 2 wrong usage or input, 3 a mistake of ours.
    """
    from oomph.core.forms import CachedForms
    from oomph.core.plan import make_plan
    from oomph.recipe import load, override

    flags = [] if gpu is None else [f"hardware.gpu={json.dumps(gpu)}"]
    flags += [] if gpus is None else [f"hardware.gpus={gpus}"]
    asked = override(load(recipe), [*(settings or []), *flags])
    names = _known(asked, stages or [])
    if keep and no_ladder:
        raise UserError("--keep is for the search that --no-ladder leaves out", "give one of them")
    with contextlib.redirect_stdout(sys.stderr):  # what a model's own code prints is no result
        plan = make_plan(asked, CachedForms(_make_forms, _notify), names, ladder=not no_ladder, fit=fit, keep=keep or [])
    _answer(plan, as_json)
    return 0 if plan.fits else 1


@app.command("report", cls=_Command, short_help="Print a plan again.")
def _report(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What `oomph plan --json` wrote; `-` reads standard input.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON document again.")] = False,
) -> int:
    """Print a plan that was saved as JSON, as `oomph plan` would.

    Exit codes: 0 it is printed, whatever it says, 2 wrong usage or input, 3 a mistake of ours.
    """
    from oomph.report.reading import read_plan

    _answer(read_plan(file), as_json)
    return 0


def _make_forms(keys: Sequence[FormKey], done: Callable[[FormKey, Traced], None]) -> None:
    """Makes what the cache lacks; only this runs torch."""
    _notify(f"tracing {len(keys)} training step{'s' if len(keys) > 1 else ''} on fake tensors, once for this configuration ...")
    from oomph.live.workers import make_forms

    make_forms(keys, done)


def _known(recipe: Recipe, names: Sequence[str]) -> list[str] | None:
    """The named stages, each once; None where none is named.

    Raises:
        UserError: the recipe lacks some of them.
    """
    from oomph.recipe import stage_of

    problems: list[str] = []
    hint = ""
    for name in names:
        try:
            stage_of(recipe, name)
        except UserError as error:
            problems, hint = problems + error.problems, error.hint
    if problems:
        raise UserError(problems, hint)
    return list(dict.fromkeys(names)) or None


def _notify(sentence: str) -> None:
    typer.echo(sentence, err=True)


def _answer(plan: Plan, as_json: bool) -> None:
    """Prints a plan as JSON or as text."""
    if as_json:
        _print(json.dumps(plan.to_json(), indent=2) + "\n")
    else:
        _show(plan)


def _show(plan: Plan) -> None:
    """Prints a plan as text, in colour where the terminal has it and the user has not said no."""
    from rich.console import Console

    from oomph.report.text import render

    console = Console()
    color = console.color_system is not None and not console.no_color
    width = min(shutil.get_terminal_size().columns, WIDEST) if sys.stdout is not None and sys.stdout.isatty() else 80
    _print(render(plan, width, color), color)


def _print(text: str, color: bool = False) -> None:
    """Writes a result to stdout. A reader that has seen enough and left, as ``head`` does, is no error."""
    from oomph.report.lines import ascii_only

    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = ascii_only(text)
    try:
        typer.echo(text, nl=False, color=color)
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its exit, and must find somebody who listens.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(error: UserError) -> int:
    typer.echo(error.render(), err=True)
    return 2


def _usage(error: Any) -> UserError:
    """Typer's own complaint in our form."""
    from oomph.recipe import KNOBS

    message = " ".join(error.format_message().split()).rstrip(".")
    option = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
    command = error.ctx.command_path if error.ctx else "oomph"
    hint = f"`{command} --help` shows what there is"
    if option in KNOBS or "." in option:
        hint = f"settings of the recipe are written without dashes: {option}=VALUE"
    return UserError(message[:1].lower() + message[1:], hint)


def _fail(error: Exception) -> int:
    """Says what to report where we are wrong; ``OOMPH_DEBUG=1`` adds the traceback."""
    if os.environ.get("OOMPH_DEBUG") == "1":
        traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(__file__).parent)]
    frame = (ours or frames)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    typer.echo(
        f"error: this is a bug of oomph {_version()}: {what}, in {Path(frame.filename).name}, line {frame.lineno}\n\n"
        "hint: report that line with the recipe and the command; OOMPH_DEBUG=1 adds the whole traceback",
        err=True,
    )
    return 3


def _version() -> str:
    try:
        return metadata.version("oomph")
    except metadata.PackageNotFoundError:
        return "(not installed)"
