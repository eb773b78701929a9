"""Writes docs/comparison.md: page.md with the figures of results.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from oomph.units import count, gib

TEMPLATE = Path(__file__).with_suffix(".md")
NONE = "-"

GIVEN = ("configuration", "model", "trains", "cards", "sharding", "samples × tokens")
RECIPES = (
    *("configuration", "accelerate: total size", "accelerate: training", "DeepSpeed", "torch-kitsune"),
    *("torch-kitsune, wrapped", "Oomph: allocated", "Oomph: reserved", "usable", "Oomph: fits", "the real run"),
)
LORA = (
    *("step", "measured: allocated", "accelerate: total size", "accelerate: training", "torch-kitsune"),
    *("torch-kitsune, wrapped", "Oomph: allocated", "measured: reserved", "Oomph: reserved"),
)
OTHERS = {"accelerate": "accelerate", "deepspeed": "deepspeed", "kitsune": "kitsune", "wrapped": "kitsune_wrapped"}


def page(results: dict[str, Any]) -> str:
    """The page, from the content of results.json."""
    recipes, lora = results["recipes"], results["lora"]
    ours, others = results["versions"]["oomph"], results["versions"]["others"]
    failures = dict.fromkeys(text for row in [*recipes, *lora] for text in row["others"]["kitsune"]["failed"])
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        oomph=ours["oomph"],
        our_torch=ours["torch"],
        our_transformers=ours["transformers"],
        accelerate=others["accelerate"],
        deepspeed=others["deepspeed"],
        kitsune=others["torch-kitsune"],
        other_torch=others["torch"],
        other_transformers=others["transformers"],
        failures="\n".join(f"- `{text}`" for text in failures),
        given=_table(GIVEN, map(_given, recipes)),
        recipes=_table(RECIPES, map(_recipe, recipes), numbers=8),
        lora=_table(LORA, map(_lora, lora), numbers=8),
        **_findings({row["name"]: row for row in recipes}),
    )


def _given(row: dict[str, Any]) -> list[str]:
    given = row["given"]
    trains = f"{count(given['trainable_parameters'])} of {count(given['total_parameters'])}"
    cards = f"{given['gpus']} × {given['gpu']}"
    return [row["name"], given["model"], trains, cards, given["sharding"], f"{given['micro_batch']} × {given['tokens']}"]


def _recipe(row: dict[str, Any]) -> list[str]:
    others, oomph = row["others"], row["oomph"]
    return [
        row["name"],
        gib(others["accelerate"]["total"]),
        gib(others["accelerate"]["training"]),
        gib(others["deepspeed"]["total"]) if others["deepspeed"] else NONE,
        gib(others["kitsune"]["total"]),
        gib(others["kitsune_wrapped"]["total"]) if _went_through(others) else NONE,
        gib(oomph["allocated"]),
        gib(oomph["reserved"]),
        gib(oomph["usable"]),
        "yes" if oomph["fits"] else "no",
        row["reported"] or NONE,
    ]


def _went_through(others: dict[str, Any]) -> bool:
    """Whether torch-kitsune could run the wrapped model on the meta device."""
    return not any(text.startswith("[meta]") for text in others["kitsune_wrapped"]["failed"])


def _lora(row: dict[str, Any]) -> list[str]:
    others, oomph = row["others"], row["oomph"]
    allocated, reserved = row["measured"]["allocated"], row["measured"]["reserved"]
    return [
        row["name"],
        gib(allocated),
        _beside(others["accelerate"]["total"], allocated),
        _beside(others["accelerate"]["training"], allocated),
        _beside(others["kitsune"]["total"], allocated),
        _beside(others["kitsune_wrapped"]["total"], allocated) if _went_through(others) else NONE,
        _beside(oomph["allocated"], allocated),
        gib(reserved),
        _beside(oomph["reserved"], reserved),
    ]


def _beside(figure: int, measured: int) -> str:
    """A figure with its difference from what was measured, in per cent."""
    return f"{gib(figure)} ({'equal' if figure == measured else _percent(figure, measured)})"


def _percent(figure: int, other: int) -> str:
    return f"{100 * (figure - other) / other:+.1f} %"


def _findings(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the micro-batch changes in the finetune stage, which request fails with the larger one, and where figures agree."""
    large, small = rows["finetune, as published"], rows["finetune, micro_batch=4"]
    changes = {f"by_{name}": large["others"][key]["total"] - small["others"][key]["total"] for name, key in OTHERS.items()}
    changes["by_oomph"] = large["oomph"]["allocated"] - small["oomph"]["allocated"]
    failing = large["oomph"]["failing"]
    tensor = f"{failing['dtype']} [{', '.join(map(str, failing['shape']))}]"
    said = (
        f"{gib(failing['bytes'])} GiB is asked for with {gib(failing['in_use_bytes'])} GiB in use, for\n"
        f"  {tensor}, in the {failing['phase']} phase of `{failing['module']}`"
    )
    sharded = rows["qwen3-30b-a3b"]
    states = _percent(sharded["others"]["deepspeed"]["total"], sharded["oomph"]["allocated"])
    return {**{name: gib(nbytes) for name, nbytes in changes.items()}, "failing": said, "states": states}


def _table(head: Sequence[str], rows: Iterable[list[str]], numbers: int = 0) -> str:
    """A Markdown table; `numbers` columns after the first are aligned to the right."""
    rules = ["---:" if 1 <= column <= numbers else "---" for column in range(len(head))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rules, *rows])
