"""A record as one page: the parts that a record has, in the template of its kind."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2

from oomph.diagnosis_records import Diagnosis
from oomph.errors import UserError
from oomph.records import Measurement, Plan
from oomph.report.html import diagnosis, measurement, plan, run
from oomph.report.html.colours import variables
from oomph.report.html.drawing import NUMBER
from oomph.run_records import EvaluationRecord, RunSummary, StepRecord

_TEMPLATES = Path(__file__).parent / "templates"


def page(record: Plan | Measurement | RunSummary | Diagnosis, log: Sequence[StepRecord | EvaluationRecord] = ()) -> str:
    """The page of a record.

    Args:
        record: what to show.
        log: of a run, for its curves.
    """
    if isinstance(record, Plan):
        found = plan.context(record)
    elif isinstance(record, Measurement):
        found = measurement.context(record)
    elif isinstance(record, Diagnosis):
        found = diagnosis.context(record)
    else:
        found = run.context(record, log)
    template = _environment().get_template(f"{found['kind']}.html.j2")
    return template.render(found, light=variables(False), dark=variables(True), numbered=_numbering())


def place(name: str, force: bool) -> Path:
    """Where a page goes.

    Args:
        name: the file's.
        force: whether it may replace a file that is there.

    Raises:
        UserError: there is such a file, or a folder of that name, or no folder to put it in.
    """
    file = Path(name).expanduser()
    if file.is_dir():
        raise UserError(f"{name!r} is a folder", "name a file, for example report.html")
    if not file.parent.is_dir():
        raise UserError(f"there is no folder {str(file.parent)!r}", "make it, or name a file in another one")
    if file.exists() and not force:
        raise UserError(f"there is a file {name!r} already", "--force replaces it, or name another one")
    return file


def save(text: str, file: Path) -> None:
    """Saves a page, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    temporary = file.with_name(f".unfinished-{file.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        problem = f"{str(file)!r} cannot be written: {error.strerror}"
        raise UserError(problem, "name a file in a folder where you may write") from None


@functools.cache
def _environment() -> jinja2.Environment:
    """Everything is escaped but drawings, which are made here."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _numbering() -> Callable[[str], str]:
    """A function that gives every drawing of a page names of its own."""
    numbers = itertools.count(1)
    return lambda svg: svg.replace(NUMBER, f"d{next(numbers)}-")
