"""Reads what ``oomph plan --json`` wrote, and says what is wrong with anything else."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

from oomph.errors import UserError
from oomph.records import SCHEMA, Plan
from oomph.report.lines import clean, cut

_WAY_OUT = "`oomph plan RECIPE --json > plan.json` writes a plan that can be read"
_LARGEST = 2**63
_MESSAGE = 300


def read_plan(file: str) -> Plan:
    """The plan that a file holds.

    Args:
        file: a path, or ``-`` for standard input.

    Raises:
        UserError: there is no such file, it cannot be read, or holds no plan of this version.
    """
    if file == "-":
        return parse_plan(sys.stdin.buffer.read(), "standard input")
    try:
        return parse_plan(Path(file).read_bytes(), file)
    except FileNotFoundError:
        raise UserError(f"there is no file {file!r}", _WAY_OUT) from None
    except IsADirectoryError:
        raise UserError(f"{file!r} is a folder", _WAY_OUT) from None
    except OSError as error:
        raise UserError(f"{file!r} cannot be read: {error.strerror}", _WAY_OUT) from None


def parse_plan(content: bytes, name: str) -> Plan:
    """The plan in a file's content.

    Args:
        content: JSON in UTF-8, UTF-16 or UTF-32.
        name: what messages call it.

    Raises:
        UserError: it is empty, no JSON, cut off, something else, damaged, or comes from another version.
    """
    if not content.strip(b"\0 \t\r\n"):
        raise UserError(f"{name} is empty", f"{_WAY_OUT}; if it was to be one, stderr says what went wrong")
    data = _json(content, name)
    if not isinstance(data, dict) or "stages" not in data:
        raise UserError(f"{name} is JSON, but no plan", _WAY_OUT)
    if data.get("schema") != SCHEMA:
        version = f"schema {clean(repr(data['schema']))[:20]}" if "schema" in data else "no schema number"
        raise UserError(f"{name} has {version}, and this version of oomph reads schema {SCHEMA}", f"plan anew: {_WAY_OUT}")
    try:
        return Plan.from_json(data)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name} is a damaged plan: {cut(clean(str(error)), _MESSAGE)}", _WAY_OUT) from None


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
