"""The page of the comparison is what its script writes, and its figures are those of the programs and the measurements."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "comparison"
PAGE = "docs/comparison.md"
QUICK = "finetune, micro_batch=4"
MIB = 1024**2


def script(name: str) -> ModuleType:
    """A module that lies beside the script."""
    spec = importlib.util.spec_from_file_location(f"comparison_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page, configurations = script("page"), script("configurations")
RESULTS: dict[str, Any] = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
RECIPES = {row["name"]: row for row in RESULTS["recipes"]}
LORA = {row["name"]: row for row in RESULTS["lora"]}


def test_the_page_is_what_the_script_writes(pages: dict[str, Any]) -> None:
    assert pages[PAGE].text == page.page(RESULTS), "run benchmarks/comparison/run.py --as-recorded --write"


def test_another_figure_makes_another_page(pages: dict[str, Any]) -> None:
    changed = copy.deepcopy(RESULTS)
    changed["recipes"][0]["others"]["accelerate"]["total"] += 1 << 30
    assert pages[PAGE].text != page.page(changed)


@pytest.mark.parametrize(
    "configuration",
    [
        pytest.param(one, id=one.name, marks=() if one.name == QUICK else pytest.mark.slow)
        for one in configurations.CONFIGURATIONS
    ],
)
def test_oomph_predicts_today_what_the_page_shows(configuration: Any) -> None:
    (row,) = configurations.planned([configuration])
    shown = {part: RECIPES[configuration.name][part] for part in row.record}
    assert row.record == shown, "run benchmarks/comparison/run.py --oomph-only --write"


def test_every_configuration_is_shown() -> None:
    assert list(RECIPES) == [one.name for one in configurations.CONFIGURATIONS]


def test_oomph_has_the_same_figures_on_both_pages(pages: dict[str, Any]) -> None:
    rows = pages["docs/accuracy.md"].table("16-bit weights")
    shown = {name: (*figures[:1], figures[-2], figures[1], figures[-1]) for name, *figures in rows}
    ours = {}
    for name, row in LORA.items():
        pairs = [(row["oomph"][part], row["oomph"][part] - row["measured"][part]) for part in ("allocated", "reserved")]
        ours[name] = tuple(text for figure, difference in pairs for text in (f"{figure:,}", f"{difference:+,}"))
    assert ours == shown


def test_measured_peaks_are_those_that_were_published(root: Path) -> None:
    rows = json.loads((root / "tests" / "measured" / "t4_lora_sweep.json").read_text(encoding="utf-8"))["rows"]
    published = {}
    for row in rows:
        run = row["run"]
        if run["quantization"] == "none":
            name = f"{row['model'].split('/')[1]}-{run['attn_impl']}-{run['batch_size']}x{run['seq_len']}"
            peaks = {part: row["measured"][f"peak_{part}_mib"] * MIB for part in ("allocated", "reserved")}
            published[name] = (run["lora_rank"], peaks)
    assert {name: (row["given"]["rank"], row["measured"]) for name, row in LORA.items()} == published
    assert {rank for rank, _ in published.values()} == {32}


def test_deepspeeds_figures_are_its_formulas() -> None:
    asked = 0
    for row in [*RECIPES.values(), *LORA.values()]:
        given, said = row["given"], row["others"]["deepspeed"]
        assert (said is None) == (given["sharding"] == "none")
        if said is not None:
            parameters, asked = given["total_parameters"], asked + 1
            kept = {"zero2": 2 * parameters, "zero3": 4 * said["largest_layer_parameters"]}[given["sharding"]]
            assert said["total"] == kept + int(18 * parameters / given["gpus"])
    assert asked


def test_accelerates_figures_are_its_formulas() -> None:
    for row in [*RECIPES.values(), *LORA.values()]:
        said = row["others"]["accelerate"]
        assert said["training"] == 4 * said["total"]
    for row in RECIPES.values():
        weights = 2 * row["given"]["total_parameters"]
        assert weights <= row["others"]["accelerate"]["total"] < 1.001 * weights


def test_torch_kitsunes_runs_failed_where_the_page_says_so() -> None:
    for name, row in {**RECIPES, **LORA}.items():
        alone, wrapped = row["others"]["kitsune"], row["others"]["kitsune_wrapped"]
        assert [text.partition(" ")[0] for text in alone["failed"]] == ["[fx]", "[meta]"]
        refused = [text for text in wrapped["failed"] if text.startswith("[meta]")]
        assert ["autocast" in text for text in refused] == ([True] if name.startswith("moe") else [])
        assert alone["total"] == wrapped["total"] if refused else alone["total"] < wrapped["total"]


def test_the_recorded_versions_are_those_that_are_installed_for_it() -> None:
    lines = (FOLDER / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    recorded = {name: version.partition("+")[0] for name, version in RESULTS["versions"]["others"].items()}
    assert pinned == recorded
