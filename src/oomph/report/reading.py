"""Reads what the verbs wrote as JSON, and a run's folder with its log, and says what is wrong with anything else."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from oomph.diagnosis_records import Diagnosis
from oomph.errors import UserError
from oomph.records import SCHEMA, Measurement, Plan
from oomph.report.lines import clean, cut
from oomph.run_records import EvaluationRecord, RunSummary, StepRecord

_WAY_OUT = "`oomph plan RECIPE --json > plan.json` writes a plan that can be read"
_MEASURE = "`oomph measure RECIPE --json > measured.json` writes a measurement that can be read"
_TRAIN = "`oomph train RECIPE --json > run.json` writes a run that can be read, and so does run.json in its folder"
_EXPLAIN = "`oomph explain FILE --json > diagnosis.json` writes a diagnosis that can be read"
_LARGEST = 2**63
_MESSAGE = 300
_Read = TypeVar("_Read", Plan, Measurement, RunSummary, Diagnosis)
_RUN, _LOG = "run.json", "log.jsonl"
_GOES_ON = "it is written when the run is done: `oomph train RECIPE --resume` goes on with one that is not"


class Reading(NamedTuple):
    """A record, and the log that lies beside it if it is a run's."""

    record: Plan | Measurement | RunSummary | Diagnosis
    log: tuple[StepRecord | EvaluationRecord, ...] = ()


def read(name: str) -> Reading:
    """What a file or a run's folder holds.

    Args:
        name: a path, or ``-`` for standard input.

    Raises:
        UserError: there is no such file, it cannot be read, or holds none of this version.
    """
    if name == "-":
        return Reading(read_record(name))
    file = Path(name)
    if os.path.isdir(file):  # Path.is_dir raises where a name is too long
        file = file / _RUN
        if not file.exists():
            raise UserError(f"there is no {_RUN} in the folder {name!r}", f"{_GOES_ON}; {_WAY_OUT}")
    record = read_record(str(file))
    return Reading(record, read_log(file.with_name(_LOG)) if isinstance(record, RunSummary) else ())


def read_log(file: Path) -> tuple[StepRecord | EvaluationRecord, ...]:
    """A run's log, but for lines that are not whole or come from another version; empty where there is none.

    Numbers that are none, as the loss of a run that diverged, are None.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return ()
    found: list[StepRecord | EvaluationRecord] = []
    for line in lines:
        with contextlib.suppress(ValueError, OverflowError, RecursionError):
            row = json.loads(line, parse_int=_integer, parse_float=_finite, parse_constant=lambda _: None)
            kind = row.get("kind") if isinstance(row, dict) else None
            found += [StepRecord.from_json(row)] if kind == "step" else []
            found += [EvaluationRecord.from_json(row)] if kind == "evaluation" else []
    return tuple(found)


def read_record(file: str) -> Plan | Measurement | RunSummary | Diagnosis:
    """The plan, the measurement, the run or the diagnosis that a file holds.

    Args:
        file: a path, or ``-`` for standard input.

    Raises:
        UserError: there is no such file, it cannot be read, or holds none of this version.
    """
    if file == "-":
        return parse_record(sys.stdin.buffer.read(), "standard input")
    try:
        return parse_record(Path(file).read_bytes(), file)
    except FileNotFoundError:
        raise UserError(f"there is no file {file!r}", _WAY_OUT) from None
    except IsADirectoryError:
        raise UserError(f"{file!r} is a folder", _WAY_OUT) from None
    except OSError as error:
        raise UserError(f"{file!r} cannot be read: {error.strerror}", _WAY_OUT) from None


def parse_record(content: bytes, name: str) -> Plan | Measurement | RunSummary | Diagnosis:
    """The plan, the measurement, the run or the diagnosis in a file's content.

    Args:
        content: JSON in UTF-8, UTF-16 or UTF-32.
        name: what messages call it.

    Raises:
        UserError: it is empty, no JSON, cut off, something else, damaged, or comes from another version.
    """
    if not content.strip(b"\0 \t\r\n"):
        raise UserError(f"{name} is empty", f"{_WAY_OUT}; if it was to be one, stderr says what went wrong")
    data = _json(content, name)
    if isinstance(data, dict) and data.get("kind") == "measurement":
        return _record(Measurement, data, name, "measurement", _MEASURE)
    if isinstance(data, dict) and data.get("kind") == "run":
        return _record(RunSummary, data, name, "run", _TRAIN)
    if isinstance(data, dict) and data.get("kind") == "diagnosis":
        return _record(Diagnosis, data, name, "diagnosis", _EXPLAIN)
    if not isinstance(data, dict) or "stages" not in data:
        raise UserError(f"{name} is JSON, but no plan and no measurement", f"{_WAY_OUT}; {_MEASURE}")
    return _record(Plan, data, name, "plan", _WAY_OUT)


def _record(kind: type[_Read], data: dict[str, Any], name: str, what: str, way_out: str) -> _Read:
    if data.get("schema") != SCHEMA:
        version = f"schema {clean(repr(data['schema']))[:20]}" if "schema" in data else "no schema number"
        anew = {"plan": "plan anew", "measurement": "measure anew", "run": "train anew", "diagnosis": "explain anew"}[what]
        raise UserError(f"{name} has {version}, and this version of oomph reads schema {SCHEMA}", f"{anew}: {way_out}")
    try:
        return kind.from_json(data)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name} is a damaged {what}: {cut(clean(str(error)), _MESSAGE)}", way_out) from None


def _json(content: bytes, name: str) -> Any:
    try:
        return json.loads(content, parse_int=_integer, parse_float=_finite, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        if _is_cut_off(error):
            raise UserError(f"{name} is cut off: its JSON ends before it is complete", _WAY_OUT) from None
        what = f"{error.msg[:1].lower()}{error.msg[1:]} in line {error.lineno}"
        hint = f"neither a screen nor a recipe can be read back; {_WAY_OUT}"
        raise UserError(f"{name} is not JSON: {what}", hint) from None
    except RecursionError:
        raise UserError(f"{name} is not a plan: it is nested too deeply", _WAY_OUT) from None
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {cut(clean(str(error)), _MESSAGE)}", _WAY_OUT) from None


def _is_cut_off(error: json.JSONDecodeError) -> bool:
    """Whether an object begins and its end is missing."""
    text = error.doc.strip("\ufeff \t\r\n")
    ended = error.doc[error.pos :].strip() and text.endswith("}")
    return text.startswith("{") and not ended and error.msg != "Extra data"


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) >= _LARGEST:
        raise ValueError(f"{text[:20]}... is too large a number")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
