"""docs/recipes.md has every key of a recipe with the words of its docstring, and recipes on any page are recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from oomph.core.choices import resolve
from oomph.core.devices import find_gpu
from oomph.recipe import KNOBS, PARTS, Recipe, load, memory_of, override
from oomph.recipe.schema import SECTIONS

PAGE = "docs/recipes.md"
HEADINGS = {
    "The recipe": Recipe,
    **{f"`{name}`": section for name, section in SECTIONS.items() if name not in ("", "stages")},
    "A stage": SECTIONS["stages"],
}
SHIPPED = ("moe-llava/phi2-clip336", "moe-llava/phi2-clip336-as-published")


def rows(section: Any) -> Iterator[list[str]]:
    """The table of a section: key, values, default, meaning, as the page has to show them."""
    schema = section.model_json_schema()
    for key, entry in schema["properties"].items():
        default = "required" if key in schema.get("required", []) else _default(entry.get("default"))
        yield [f"`{key}`", _values(entry), default, " ".join(section.model_fields[key].description.split())]


def _default(value: Any) -> str:
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(entry: dict[str, Any]) -> str:
    """What may stand there, in words."""
    if "$ref" in entry:
        return "a mapping"
    if options := entry.get("anyOf") or entry.get("oneOf"):
        return " or ".join(dict.fromkeys(_values(option) for option in options if option.get("type") != "null"))
    if "enum" in entry:
        return ", ".join(f"`{word}`" for word in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if entry["type"] == "array":
        several = entry.get("prefixItems")
        return f"[{', '.join(map(_values, several))}]" if several else f"a list of: {_values(entry['items'])}"
    if entry["type"] == "object":
        return f"a mapping to: {_values(entry['additionalProperties'])}"
    least = f" from {entry['minimum']}" if "minimum" in entry else ""
    above = f" above {entry['exclusiveMinimum']:g}" if "exclusiveMinimum" in entry else ""
    words = {"integer": "a whole number", "number": "a number", "boolean": "`true`, `false`", "string": "text"}
    return f"{words[entry['type']]}{least}{above}"


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_key_is_explained_in_its_own_words(heading: str, pages: dict[str, Any]) -> None:
    wanted = list(rows(HEADINGS[heading]))
    shown = "\n".join("| " + " | ".join(row) + " |" for row in wanted)
    assert pages[PAGE].table(heading) == wanted, f"below {heading!r}, {PAGE} has to show\n{shown}"


def test_every_value_is_told_apart() -> None:
    assert _values({"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 3}]}) == "a whole number from 3"
    assert _values({"type": "array", "items": {"enum": ["a", "b"]}}) == "a list of: `a`, `b`"


def test_parts_are_the_ones_that_patterns_know(pages: dict[str, Any]) -> None:
    assert [part for part, _ in pages[PAGE].table("Parts and patterns")] == [f"`{part}`" for part in PARTS]


def test_auto_means_what_the_page_says(pages: dict[str, Any]) -> None:
    recipe = load(SHIPPED[0])
    documented = {knob.strip("`"): value for knob, value, _ in pages[PAGE].table("What `auto` means")}
    assert set(documented) == set(KNOBS)
    for gpu, gpus, sharding in (("A100-SXM4-40GB", 8, "ddp"), ("T4", 1, "none")):
        asked = override(recipe, [f"hardware.gpu={gpu}", f"hardware.gpus={gpus}", "master_weights=auto"])
        stage = asked.stages[0]
        assert all(getattr(memory_of(asked, stage), knob) == "auto" for knob in KNOBS)
        choice, reasons = resolve(stage, asked, find_gpu(gpu))
        assert f"`{choice.precision}`" in documented["precision"]
        assert f"`{choice.sharding}`" in documented["sharding"]
        assert choice.sharding == sharding
        assert reasons["eval_batch"].startswith("as the micro-batch")
        for knob in ("checkpointing", "attention", "loss", "optimizer"):
            assert documented[knob] == f"`{getattr(choice, knob)}`"
        for knob in ("optimizer_offload", "expandable_segments"):
            assert documented[knob] == f"`{str(getattr(choice, knob)).lower()}`"
        assert documented["vision_checkpointing"].startswith(f"`{choice.vision_checkpointing}`")
        assert documented["master_weights"].startswith(f"`{str(choice.master_weights).lower()}`")


def test_yaml_on_the_pages_is_what_a_recipe_can_say(pages: dict[str, Any], tmp_path: Any) -> None:
    blocks = [(page, block) for page in pages.values() for block in page.blocks("yaml")]
    assert any("# my-recipe.yaml" in block.text for _, block in blocks)
    base = load(SHIPPED[1]).model_dump(exclude_unset=True)
    for number, (page, block) in enumerate(blocks):
        file = tmp_path / f"{number}.yaml"
        part = yaml.safe_load(block.text)
        whole = part if "stages" in part and "name" in part else {**base, **part}
        file.write_text(_dumped(whole), encoding="utf-8")
        assert load(file).stages, f"{page.path}, line {block.line}"


def _dumped(data: Any) -> str:
    """As YAML, tuples as lists, and floats so that YAML 1.2 reads them as such."""
    plain = _plain(data)
    return re.sub(r"(?<=\s)(\d+)e", r"\1.0e", yaml.safe_dump(plain, sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_read(name: str) -> None:
    assert load(name).stages
