"""The command line: parse, call, print, exit code. What takes time is imported when it is needed."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from oomph.errors import RunError, UserError

if TYPE_CHECKING:
    from oomph.core.forms import FormKey, Traced
    from oomph.diagnosis_records import Diagnosis
    from oomph.live.generate import Conversation
    from oomph.recipe import Recipe
    from oomph.records import Measurement, Plan
    from oomph.run_records import EvaluationRecord, RunSummary, StepRecord

WIDEST = 100
_RENDERERS = {"Plan": "text", "Measurement": "measurement", "RunSummary": "run", "Diagnosis": "diagnosis"}

# Typer keeps a copy of click of its own in some versions and imports click in others; this is UsageError in all of them.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]

_Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the recipe's, as micro_batch=4.")
]

app = typer.Typer(name="oomph", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


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
    except RunError as error:
        return _refuse(error, 1)
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
    settings: _Settings = None,
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


@app.command("measure", cls=_Command, short_help="Run a recipe's step and compare it with its prediction.")
def _measure(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of a shipped one.")],
    settings: _Settings = None,
    stages: Annotated[
        list[str] | None, typer.Option("--stage", metavar="NAME", help="Measure this stage and not the first; or several.")
    ] = None,
    keep: Annotated[str | None, typer.Option("--keep", metavar="FILE", help="Append what is measured to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Run growing micro-batches of a stage, on the GPU or else on the CPU, and compare their memory with the prediction.

    Exit codes: 0 all are within the error bound, 1 one is not or failed, 2 wrong usage or input, 3 a mistake of ours.
    """
    from oomph.core.forms import CachedForms
    from oomph.core.kept import Kept
    from oomph.core.measuring import measure
    from oomph.recipe import load, override

    asked = override(load(recipe), settings or [])
    names = _known(asked, stages or [])
    kept = Kept(asked, Path(keep), _notify) if keep is not None else None
    with contextlib.redirect_stdout(sys.stderr):  # what a model's own code prints is no result
        from oomph.live.hardware import machine
        from oomph.live.measure import measure_apart

        source = CachedForms(_make_forms, _notify)
        done = kept.keep if kept else lambda measurement: None
        measured = measure(asked, source, machine(), measure_apart, names, done, _notify)
    _answer(measured, as_json)
    return 0 if measured.within and not (kept and kept.lost) else 1


@app.command("train", cls=_Command, short_help="Train a recipe's stages.")
def _train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of a shipped one.")],
    settings: _Settings = None,
    output: Annotated[str | None, typer.Option("--output", metavar="DIR", help="The run's folder, else runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    memory_limit: Annotated[
        str | None, typer.Option("--memory-limit", metavar="SIZE", help="Take no more memory than this, as 2GiB.")
    ] = None,
    check_data: Annotated[bool, typer.Option("--check-data", help="Check all data and say what it amounts to.")] = False,
    stages: Annotated[
        list[str] | None, typer.Option("--stage", metavar="NAME", help="With --check-data: check this stage; or several.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Train the stages of a recipe, each from the last one's weights, on the GPU or else on the CPU.

    Exit codes: 0 all is trained, 1 the run could not go on, 2 wrong usage or input, 3 a mistake of ours, 130 interrupted.
    """
    from oomph.recipe import load, override

    asked = override(load(recipe), settings or [])
    if check_data:
        if output is not None or resume or memory_limit is not None or as_json:
            raise UserError("--check-data trains nothing and goes with --stage alone", "leave the other flags out")
        return _check_data(asked, _known(asked, stages or []))
    if stages:
        raise UserError("--stage goes with --check-data alone: a run has all stages", "leave it out")
    limit = _limit(memory_limit)
    again = ["oomph", "train", recipe, *(settings or []), *(["--output", output] if output is not None else [])]
    again += ["--memory-limit", memory_limit] if memory_limit is not None else []
    return _run(asked, Path(output) if output is not None else None, resume, limit, shlex.join([*again, "--resume"]), as_json)


def _check_data(recipe: Recipe, names: list[str] | None) -> int:
    """Checks the data of a recipe's stages: every sample, every image, and what becomes of them."""
    with contextlib.redirect_stdout(sys.stderr):  # what a model's own code prints is no result
        from oomph.live.data.checking import check_data, describe

        summaries = check_data(recipe, names, _notify)
    _print(describe(summaries))
    return 0


def _run(recipe: Recipe, output: Path | None, resume: bool, limit: int | None, again: str, as_json: bool) -> int:
    """Trains a recipe and prints the summary; says how to go on after an interruption."""
    from oomph.core.forms import CachedForms
    from oomph.report.progress import Screen

    screen = Screen()
    with contextlib.redirect_stdout(sys.stderr):  # what a model's own code prints is no result
        from oomph.live.trainer import Interrupted, Options, train

        options = Options(output, resume, limit)
        try:
            summary = train(recipe, CachedForms(_make_forms, _notify), options, screen, _draw)
        except Interrupted:
            _notify(f"what was trained is saved; to go on: {again}")
            return 130
    _answer(summary, as_json)
    return 0


def _draw(lines: Sequence[StepRecord | EvaluationRecord], name: str, folder: Path) -> None:
    """Draws the curves of a run. Without room for them it is as good a run."""
    from oomph.report.curves import draw

    try:
        draw(lines, name, folder)
    except OSError as error:
        _notify(f"the pictures of the run are not drawn: {error.strerror or error}")


def _limit(text: str | None) -> int | None:
    """A size in bytes.

    Raises:
        UserError: it is none, or nothing.
    """
    from oomph.units import parse_size

    try:
        limit = None if text is None else parse_size(text)
    except ValueError as error:
        raise UserError(f"--memory-limit {error}") from None
    if limit == 0:
        raise UserError("--memory-limit 0 leaves no memory to train in", "write a size, for example 2GiB")
    return limit


@app.command("chat", cls=_Command, short_help="Talk to a trained model.")
def _chat(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The model's folder.")],
    images: Annotated[list[str] | None, typer.Option("--image", metavar="FILE", help="Show it a picture; or several.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Ask this alone, and leave.")] = None,
) -> int:
    """Talk to a trained model: each line that is typed is answered, until the end of input or Ctrl-C.

    Exit codes: 0 it has answered, 2 wrong usage or input, 3 a mistake of ours.
    """
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty", "give it a question, or leave it out to talk")
    with contextlib.redirect_stdout(sys.stderr):  # what a model's own code prints is no answer
        from oomph.live.generate import Conversation, open_answerer

        pictures = [Path(name).expanduser() for name in images or []]
        conversation = Conversation(open_answerer(folder, max(1, len(pictures)), _notify), pictures)
    if prompt is not None:
        _ask(conversation, prompt, False)
        return 0
    asks = sys.stdin is not None and sys.stdin.isatty()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            question = input("> " if asks else "")
            if question.strip():
                _ask(conversation, question, asks)
    if asks:
        _stream("\n")
    return 0


def _ask(conversation: Conversation, question: str, may_ask_again: bool) -> None:
    """Prints an answer as it comes. A question that cannot be asked is no end where another can be typed."""
    try:
        conversation.ask(question, _stream)
        _stream("\n")
    except UserError as error:
        if not may_ask_again:
            raise
        _refuse(error)


@app.command("eval", cls=_Command, short_help="Count the right answers of a trained model.")
def _eval(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The model's folder.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file of conversations: LLaVA's JSON or JSONL.")],
    images: Annotated[str | None, typer.Option("--images", metavar="DIR", help="The folder of their pictures.")] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Ask this many questions at a time.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document with all answers.")] = False,
) -> int:
    """Ask a trained model every question of a data file, and compare its answers with those in the file.

    Exit codes: 0 all are answered, right or wrong, 2 wrong usage or input, 3 a mistake of ours.
    """
    with contextlib.redirect_stdout(sys.stderr):  # what a model's own code prints is no result
        from oomph.live.questions import describe, evaluate

        evaluation = evaluate(folder, data, images, batch, _notify, _progress)
    _print(json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False) + "\n" if as_json else describe(evaluation))
    return 0


@app.command("explain", cls=_Command, short_help="Say why memory ran out, from the error message.")
def _explain(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What the program printed; `-` reads standard input.")],
    settings: _Settings = None,
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="The recipe that was run.")] = None,
    script: Annotated[str | None, typer.Option("--script", metavar="FILE", help="Or its launch script, finetune.sh.")] = None,
    stages: Annotated[list[str] | None, typer.Option("--stage", metavar="NAME", help="This stage failed; or several.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="The card that it ran on.")] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", metavar="N", help="How many of them in all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Say which tensor an out-of-memory error was about, why it did not fit, and what helps.

    Exit codes: 0 it is explained, 2 wrong usage or input, or a text without such an error, 3 a mistake of ours.
    """
    from oomph.core.oom.explain import explain, read_text

    diagnosis = explain(*read_text(file))
    if any((recipe, script, settings, stages, gpu, gpus)):
        from oomph.core.explaining import Run, explain_run
        from oomph.core.forms import CachedForms

        run = Run(recipe, script, tuple(settings or ()), tuple(stages or ()), gpu, gpus)
        with contextlib.redirect_stdout(sys.stderr):  # what a model's own code prints is no result
            diagnosis = explain_run(diagnosis, run, CachedForms(_make_forms, _notify))
    _answer(diagnosis, as_json)
    return 0


@app.command("report", cls=_Command, short_help="Show a saved record again, as text or as a page.")
def _report(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="What --json wrote, or a run's folder; `-` reads standard input.")
    ],
    html: Annotated[str | None, typer.Option("--html", metavar="OUT", help="Write it as one HTML page to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON document again.")] = False,
) -> int:
    """Show a plan, a measurement, a run or a diagnosis that was saved, as the command that made it did or as an HTML page.

    Exit codes: 0 it is shown, whatever it says, 2 wrong usage or input, 3 a mistake of ours.
    """
    from oomph.report.reading import read

    if html is not None and as_json:
        raise UserError("--html and --json are two forms of one record", "give one of them")
    if force and html is None:
        raise UserError("--force is for the page that --html writes", "name it: --html report.html")
    found = read(file)
    if html is None:
        _answer(found.record, as_json)
        return 0
    from oomph.report.html.page import page, place, save

    out = place(html, force)
    save(page(found.record, found.log), out)
    _print(f"{out}\n")
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


def _answer(record: Plan | Measurement | RunSummary | Diagnosis, as_json: bool) -> None:
    """Prints a record as JSON or as text."""
    if as_json:
        _print(json.dumps(record.to_json(), indent=2) + "\n")
    else:
        _show(record)


def _show(record: Plan | Measurement | RunSummary | Diagnosis) -> None:
    """Prints a record as text, in colour where the terminal has it and the user has not said no."""
    from rich.console import Console

    console = Console()
    color = console.color_system is not None and not console.no_color
    width = min(shutil.get_terminal_size().columns, WIDEST) if sys.stdout is not None and sys.stdout.isatty() else 80
    renderer = importlib.import_module(f"oomph.report.{_RENDERERS[type(record).__name__]}")
    _print(renderer.render(record, width, color), color)


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


def _stream(text: str) -> None:
    """Writes a piece of an answer at once, without what would steer a terminal."""
    _print("".join(letter for letter in text if letter.isprintable() or letter in "\n\t"))
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()


def _progress(done: int, of: int) -> None:
    """Shows how many questions are answered, where somebody looks on."""
    if sys.stderr is not None and sys.stderr.isatty():
        typer.echo(f"\r{done:,} of {of:,} questions" + "\n" * (done == of), nl=False, err=True)


def _refuse(error: UserError, code: int = 2) -> int:
    typer.echo(error.render(), err=True)
    return code


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
