"""Where in the model code runs: module paths, stacks of equal layers, and how many of the layers a trace needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from oomph.core.trace import NOWHERE, Stack, place

MAX_UNIT = 8


class Owner(NamedTuple):
    """A module: its path with ``{}`` for the layer's number, and the layer's place (`NOWHERE` outside the stacks)."""

    template: str
    place: int


def find_stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost lists of layers in the model, in the order of the model's modules."""
    stacks: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(path.startswith(f"{s}.") for s, _ in stacks):
            stacks.append((path, module))
    return stacks


def shorten(model: nn.Module, units: int) -> list[Stack]:
    """Drops the last repetitions of equal layers from every stack, in place, and says what was dropped.

    Layers are equal when their modules' classes, parameter shapes and scalar settings are; whether a layer is recomputed in
    the backward is one of its settings, and a pattern of such layers is a unit. Only layers at the end of the repetition go,
    so that a forward that looks a layer up by its number finds the same kind of layer there.
    """
    (stacks,) = arrange(model, units)
    drop_layers(model, stacks)
    return stacks


def arrange(model: nn.Module, *units: int) -> list[list[Stack]]:
    """The stacks of a whole model as `shorten` would leave them with each of these numbers of units. Nothing is dropped."""
    found: list[list[Stack]] = [[] for _ in units]
    for path, layers in find_stacks(model):
        known: dict[Any, int] = {}
        kinds = [known.setdefault(_signature(layer), len(known)) for layer in layers]
        numbered = _numbered(model, path)
        for stacks, number in zip(found, units, strict=True):
            stacks.append(_repetition(path, kinds, numbered, number))
    return found


def drop_layers(model: nn.Module, stacks: list[Stack]) -> None:
    """Drops layers, in place, from a model that has at least those that the stacks hold."""
    for stack in stacks:
        layers: Any = model.get_submodule(stack.path)
        before = len(layers)
        for index in reversed(range(stack.prefix + stack.unit * stack.units, before - stack.suffix)):
            del layers[index]
        _tell_config(model, stack.path, before, stack.layers)


def _tell_config(model: nn.Module, path: str, before: int, after: int) -> None:
    """Corrects the number of layers in the configuration beside the stack: transformers resolves negative numbers by it."""
    for _, module in _ancestors(model, path):
        config = getattr(module, "config", None)
        for name in ("num_hidden_layers", "depth"):
            if getattr(config, name, None) == before:
                setattr(config, name, after)
                return


def owners(model: nn.Module, stacks: list[Stack]) -> dict[str, Owner]:
    """Every module path of the model (the empty one too) with its owner."""
    return {path: _owner(path, stacks) for path, _ in model.named_modules(remove_duplicate=False)}


def _owner(path: str, stacks: list[Stack]) -> Owner:
    for number, stack in enumerate(stacks):
        if path.startswith(f"{stack.path}."):
            index, _, rest = path[len(stack.path) + 1 :].partition(".")
            return Owner(f"{stack.path}.{{}}{'.' if rest else ''}{rest}", place(number, int(index)))
    return Owner(path, NOWHERE)


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    modules = tuple((path, type(module).__name__, _settings(module)) for path, module in layer.named_modules())
    parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return modules, parameters


def _settings(module: nn.Module) -> tuple[Any, ...]:
    skip = {"layer_idx", "layer_id", "layer_number", "_is_hf_initialized"}
    values = vars(module).items()
    return tuple((name, value) for name, value in values if isinstance(value, bool | int | float | str) and name not in skip)


def _numbered(model: nn.Module, path: str) -> set[int]:
    """Layers that the code around the stack singles out by number, read from the configuration's lists of layer numbers.

    transformers keeps them in `deepstack_visual_indexes` (Qwen3-VL: those vision layers' outputs are kept, and added to
    the first text layers) and `fullatt_block_indexes` (Qwen2.5-VL).
    """
    for stem, module in _ancestors(model, path):
        config = getattr(module, "config", None)
        for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
            numbers = getattr(config, name, None)
            if numbers:
                return set(numbers)
        vision = getattr(getattr(model, "config", None), "vision_config", None)
        deep = getattr(vision, "deepstack_visual_indexes", None)
        if "language_model" in stem and deep:
            return set(range(len(deep)))
    return set()


def _ancestors(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    parts = path.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        stem = ".".join(parts[:depth])
        yield stem, model.get_submodule(stem)


def _repetition(path: str, kinds: list[int], numbered: set[int], units: int) -> Stack:
    """The cheapest way to see the list of layers as a prefix and equal units, the last of which may break off."""
    marked = [(kind, index in numbered) for index, kind in enumerate(kinds)]
    total, best = len(marked), Stack(path, len(marked), 1, 0, 0, 0)
    for unit in range(1, MAX_UNIT + 1):
        for prefix in range(0, min(total, 8)):
            repeats = 1
            while marked[prefix : prefix + unit] == marked[prefix + repeats * unit : prefix + (repeats + 1) * unit] and (
                prefix + (repeats + 1) * unit <= total
            ):
                repeats += 1
            suffix = total - prefix - unit * repeats
            goes_on = suffix < unit and marked[total - suffix :] == marked[prefix : prefix + suffix]
            if goes_on and repeats > units and prefix + unit * units + suffix < best.layers:
                best = Stack(path, prefix, unit, units, repeats, suffix)
    return best
