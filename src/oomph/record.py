"""What all records have in common: frozen dataclasses that are written to JSON and read back without loss."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, Literal, Self

SCHEMA = 1
"""Of the documents that this version writes and reads."""


class Record:
    """Mixin for frozen dataclasses: ``to_json`` and ``from_json`` are inverse to each other."""

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return _fields(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The record that ``to_json`` wrote.

        Raises:
            ValueError: a key is missing or unknown, or a value has another type than the field; the message names the place.
        """
        record: Self = _parse_record(cls, data, cls.__name__)
        return record


class Document(Record):
    """A record that stands by itself in a file, and says in `schema` which version's it is."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The document that ``to_json`` wrote.

        Raises:
            ValueError: as for every record, or the schema number is not the one that this version reads.
        """
        if isinstance(data, dict) and data.get("schema", SCHEMA) != SCHEMA:
            raise ValueError(f"{cls.__name__}.schema: {data['schema']!r} comes from another version; this one reads {SCHEMA}")
        return super().from_json(data)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _fields(record: Any) -> dict[str, Any]:
    return {f.name: _plain(getattr(record, f.name)) for f in dataclasses.fields(record)}


def _parse(kind: Any, data: Any, path: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _parse_record(kind, data, path)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        return None if data is None else _parse(inner, data, path)
    if origin is tuple and isinstance(data, list | tuple):
        return tuple(_parse(args[0], item, f"{path}[{index}]") for index, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: _parse(args[1], item, f"{path}[{key!r}]") for key, item in data.items()}
    if origin is Literal:
        if data in args:
            return data
        raise ValueError(f"{path}: {data!r} is none of {', '.join(map(repr, args))}")
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is kind:
        return data
    raise ValueError(f"{path}: {data!r} is not of type {getattr(origin or kind, '__name__', kind)}")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _parse_record(kind: Any, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{path}: {kind.__name__} is read from an object, not from {type(data).__name__}")
    known = dataclasses.fields(kind)
    unknown = set(data) - {f.name for f in known}
    if unknown:
        raise ValueError(f"{path}: {kind.__name__} has no field {', '.join(sorted(map(str, unknown)))}")
    required = {f.name for f in known if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    missing = required - set(data)
    if missing:
        raise ValueError(f"{path}: {kind.__name__} lacks {', '.join(sorted(missing))}")
    hints = _hints(kind)
    return kind(**{name: _parse(hints[name], item, f"{path}.{name}") for name, item in data.items()})
