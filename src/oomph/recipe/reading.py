"""Recipes from YAML files, and ``key=value`` settings over them. All that is wrong is said at once, key by key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from oomph.errors import UserError
from oomph.recipe import routing
from oomph.recipe.schema import KNOBS, Recipe, Stage
from oomph.recipe.sentences import dotted, sentence, shown
from oomph.recipe.suggest import did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = (_PACKAGE / "recipes", _PACKAGE.parents[1] / "recipes")
_SUFFIXES = (".yaml", ".yml")
_FLOAT = "tag:yaml.org,2002:float"
_START = "start from a shipped recipe, recipes/moe-llava/phi2-clip336.yaml for instance"
_EXAMPLE = "recipes/moe-llava/phi2-clip336.yaml is a recipe that has every section"
_DROPPED = {_FLOAT, "tag:yaml.org,2002:merge", "tag:yaml.org,2002:timestamp"}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the floats of YAML 1.2 (``1e-3`` is a number), without merge keys and dates."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; one that its tag does not allow is an error of the file."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):
            kind = str(node.tag).rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"this is no valid {kind}", node.start_mark) from None


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DROPPED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def load(path_or_name: str | Path) -> Recipe:
    """The recipe in a YAML file, or a shipped one by its name, ``moe-llava/phi2-clip336`` for instance.

    Raises:
        UserError: there is no such file, it is no YAML mapping in UTF-8, or it says what a recipe cannot say.
    """
    try:
        path = _locate(path_or_name)
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path_or_name} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path_or_name} is not UTF-8 text: byte {error.start} is no character of it") from None
    try:
        data, problems = _parse(text)
    except ValueError as error:
        raise UserError(f"{path.name} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {shown(data)}"
        raise UserError(f"{path.name} {what}, where a recipe is a mapping of keys to values", _START)
    return _validate(data, problems, f"{path.name}: ")


def from_values(values: dict[str, Any], where: str = "") -> Recipe:
    """The recipe in plain values, as a file would hold them. `where` stands before each problem.

    Raises:
        UserError: they say what a recipe cannot say.
    """
    return _validate(values, [], where)


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with ``key=value`` settings applied, in their order.

    A key is a dotted path, with a stage by its name (``data.max_tokens``, ``stages.finetune.effective_batch``,
    ``stages.moe.train.language:*.mlp.fc*``), or a memory knob alone (``micro_batch``), which sets it for every stage.
    A value is read as YAML.

    Raises:
        UserError: a setting is not ``key=value``, names a key that does not exist, or has a value that a recipe
            cannot have.
    """
    data = recipe.model_dump(exclude_unset=True)
    data["stages"] = list(data["stages"])
    problems: list[str] = []
    for setting in settings:
        try:
            _set(data, setting)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise UserError(problems, "settings are written key=value, for example micro_batch=4 or data.max_tokens=1024")
    return _validate(data, [], "")


def stage_of(recipe: Recipe, name: str) -> Stage:
    """The stage of that name.

    Raises:
        UserError: the recipe has no such stage.
    """
    for stage in recipe.stages:
        if stage.name == name:
            return stage
    names = [stage.name for stage in recipe.stages]
    raise UserError(f"there is no stage {shown(name)}{did_you_mean(name, names)}", f"stages are {', '.join(names)}")


def _validate(data: dict[Any, Any], problems: list[str], where: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(data)
        found = [(stage.name, text) for stage in recipe.stages for text in routing.problems(stage)]
        problems = problems + [f"`stages.{name}`: {text}" for name, text in [*found, *routing.forgotten(recipe.stages)]]
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        problems = problems + [sentence(item["type"], item["loc"], item, data) for item in wrong]
    if problems:
        raise UserError([where + problem for problem in problems], _EXAMPLE)
    return recipe


def _parse(text: str) -> tuple[Any, list[str]]:
    """The document's value and a sentence for every key that it gives twice.

    Raises:
        ValueError: the text is not one YAML document.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, []
        value = loader.construct_document(node)
        return value, list(_duplicates(node, (), value, set()))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise ValueError(f"{reason}, line {mark.line + 1}" if mark else str(reason)) from None


def _duplicates(node: yaml.Node, path: tuple[str | int, ...], root: Any, seen: set[int]) -> Iterator[str]:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, (*path, index), root, seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                yield f"`{dotted((*path, name), root)}` is given twice, on lines {lines[name]} and {line}"
            lines[name] = line
            yield from _duplicates(value, (*path, name), root, seen)


def _locate(path_or_name: str | Path) -> Path:
    path = Path(os.path.expanduser(path_or_name))
    if path.is_dir():
        inside = sorted(str(file) for file in path.glob("*") if file.suffix in _SUFFIXES)
        hint = f"recipes in it: {', '.join(inside[:5])}" if inside else _START
        raise UserError(f"{path_or_name} is a folder, where a recipe is a file", hint)
    if path.exists():
        return path
    for folder in _SHIPPED:
        for name in (str(path_or_name), f"{path_or_name}.yaml"):
            if (folder / name).is_file():
                return folder / name
    shipped = sorted({str(file.relative_to(folder).with_suffix("")) for folder in _SHIPPED for file in folder.rglob("*.yaml")})
    beside = [str(path.with_name(file.name)) for file in sorted(path.parent.glob("*")) if file.suffix in _SUFFIXES]
    guess = did_you_mean(str(path_or_name), [*beside, *shipped])
    raise UserError(f"there is no recipe {shown(str(path_or_name))}{guess}", f"shipped recipes: {', '.join(shipped)}")


def _set(data: dict[str, Any], setting: str) -> None:
    """Write one setting into a recipe's plain values. Whether the key exists is for the validation to say.

    Raises:
        ValueError: the setting is not ``key=value``, or the path leads through something that has no keys.
    """
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"{shown(setting)} is not a setting")
    try:
        value, repeated = _parse(text)
    except ValueError as error:
        raise ValueError(f"the value of `{key}` is not valid YAML: {error}") from None
    if repeated:
        raise ValueError(f"in the value of `{key}`, {repeated[0]}")
    target, path = data, key.split(".")
    if key in KNOBS:
        path = ["memory", key]
        for own in (stage.get("memory") for stage in data["stages"]):
            if isinstance(own, dict):
                own.pop(key, None)
    elif path[0] == "stages":
        target, path = _stage_path(data["stages"], path)
    for step, name in enumerate(path[:-1]):
        inner = target.get(name)
        if inner is None:
            inner = target[name] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"`{key}` cannot be set: `{'.'.join(path[: step + 1])}` is {shown(inner)} and has no keys")
        target = inner
    target[path[-1]] = value


def _stage_path(stages: list[dict[str, Any]], path: list[str]) -> tuple[dict[str, Any], list[str]]:
    names = [str(stage["name"]) for stage in stages]
    if len(path) < 3:
        example = ", ".join(f"stages.{name}.effective_batch" for name in names[:1])
        raise ValueError(f"`{'.'.join(path)}` is not one value; name a stage and its key, for example {example}")
    if path[1] not in names:
        guess = did_you_mean(path[1], names) or f"; stages are {', '.join(names)}"
        raise ValueError(f"there is no stage {shown(path[1])}{guess}")
    rest = path[2:]
    if rest[0] == "train" and len(rest) > 1:
        rest = ["train", ".".join(rest[1:])]
    return stages[names.index(path[1])], rest

