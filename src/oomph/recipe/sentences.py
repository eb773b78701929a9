"""What is wrong with a recipe, in sentences that name the dotted key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oomph.recipe.schema import SECTIONS
from oomph.recipe.suggest import nearest

Location = tuple[str | int, ...]

_LONGEST = 60
_DERIVED = {
    "accumulation": "is derived from effective_batch, gpus and micro_batch, and not given",
    "gradient_accumulation_steps": "is derived from effective_batch, gpus and micro_batch, and not given",
}
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "expected": "{expected}",
}
_PATTERNS = {
    "projector": "linear, identity or mlpNx_gelu with a number N, as in mlp2x_gelu, or one of them after pool_",
    "name": "letters, digits, - and _, and start with a letter or digit",
}


def sentence(kind: str, location: Location, error: Mapping[str, Any], data: Any) -> str:
    """One of pydantic's errors in a sentence.

    Args:
        kind: pydantic's error type.
        location: where the error is.
        error: pydantic's error, with ``input``, ``msg`` and, for some types, ``ctx``.
        data: what was validated, for the names of stages.
    """
    if location[:1] == ("model",):
        location = (*location[:1], *location[2:])  # pydantic names the member of the union there
    if location[-1:] == ("[key]",):
        location, kind = location[:-1], "invalid_key" if kind == "string_type" else kind
    key = dotted(location, data)
    context = error.get("ctx", {})
    given = f"a list with {shown(context['item'])}" if "item" in context else shown(error["input"])
    if kind == "missing":
        return f"`{key}` is missing"
    if kind == "extra_forbidden":
        return _unknown(location, data)
    if kind == "invalid_key":
        return f"`{key}` is no key: keys are text"
    if kind == "value_error":
        return f"`{key}`: {context['error']}" if key else str(context["error"])
    if kind == "literal_error":
        allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        guess = nearest(error["input"], allowed) if isinstance(error["input"], str) else None
        return f"`{key}` must be {_either(allowed)}, not {given}" + (f"; did you mean {guess}?" if guess else "")
    if kind == "string_pattern_mismatch":
        return f"`{key}` must be {_PATTERNS[str(location[-1])]}, not {given}"
    if kind in _EXPECTED:
        return f"`{key}` must be {_EXPECTED[kind].format(**context)}, not {given}"
    return f"`{key}`: {error['msg']}, not {given}"


def dotted(location: Location, data: Any) -> str:
    """A location as a recipe's reader writes it: ``stages.finetune.data.max_tokens``, ``stages[0].name``."""
    text = ""
    for depth, step in enumerate(location):
        if isinstance(step, int):
            name = _stage_name(data, step) if location[:depth] == ("stages",) else None
            text += f".{name}" if name else f"[{step}]"
        else:
            text += ("." if text else "") + (step if step.isprintable() else repr(step))
    return text


def shown(value: Any) -> str:
    """A value as a sentence quotes it: short, on one line, and never a whole list or mapping."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + "..." + text[-1]


def _stage_name(data: Any, index: int) -> str | None:
    stages = data.get("stages") if isinstance(data, dict) else None
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages] if isinstance(stages, list) else []
    name = names[index] if index < len(names) else None
    return name if isinstance(name, str) and name.isprintable() and names.count(name) == 1 else None


def _unknown(location: Location, data: Any) -> str:
    key, name = dotted(location, data), str(location[-1])
    if name in _DERIVED:
        return f"`{key}` {_DERIVED[name]}"
    parents = [step for step in location[:-1] if isinstance(step, str) and step in SECTIONS]
    section = parents[-1] if parents else ""
    known = list(SECTIONS[section].model_fields)
    prefix = dotted(location[:-1], data)
    candidates = {word: f"{prefix}.{word}" if prefix else word for word in known}
    found = nearest(name, known)
    if not found:
        others = {word: f"{top}.{word}" for top in ("data", "hardware", "memory") for word in SECTIONS[top].model_fields}
        candidates, found = others, nearest(name, others)
    if found:
        return f"`{key}` is no key of a recipe; did you mean `{candidates[found]}`?"
    return f"`{key}` is no key of a recipe; {f'`{prefix}`' if prefix else 'a recipe'} has {_either(known, 'and')}"


def _either(words: Sequence[str], last: str = "or") -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else words[0]
