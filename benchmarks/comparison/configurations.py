"""The training steps that all programs are asked about, and what Oomph predicts for them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from oomph.core.forms import CachedForms, FormKey, Traced
from oomph.core.plan import make_plan
from oomph.recipe import load, override
from oomph.records import StagePlan

HERE = Path(__file__).parent
MEASURED, PREDICTIONS = HERE.parents[1] / "tests" / "measured", HERE.parent / "accuracy.json"
PUBLISHED = "moe-llava/phi2-clip336-as-published"
MIB = 1024**2


class Configuration(NamedTuple):
    """A stage of a recipe with settings over the recipe's. `reported` is what is known of a real run of it."""

    name: str
    recipe: str
    stage: str
    settings: tuple[str, ...] = ()
    reported: str = ""


CONFIGURATIONS = (
    Configuration("align, as published", PUBLISHED, "align", reported="ran"),
    Configuration("finetune, as published", PUBLISHED, "finetune", reported="failed: 6.56 GiB asked for with 33.67 GiB in use"),
    Configuration("moe, as published", PUBLISHED, "moe"),
    Configuration("align, micro_batch=4", PUBLISHED, "align", ("micro_batch=4",)),
    Configuration("finetune, micro_batch=4", PUBLISHED, "finetune", ("micro_batch=4",), "ran"),
    Configuration("moe, micro_batch=4", PUBLISHED, "moe", ("micro_batch=4",)),
    Configuration("llama-3.1-8b", str(HERE / "llama-3.1-8b.yaml"), "finetune"),
    Configuration("qwen3-30b-a3b", str(HERE / "qwen3-30b-a3b.yaml"), "finetune"),
)
"""The published recipe's runs are those of PKU-YuanGroup/MoE-LLaVA#72, the sizes at second hand."""


class Row(NamedTuple):
    """A line of a table, as results.json keeps it, and the question to the other programs, which it does not keep."""

    record: dict[str, Any]
    question: dict[str, Any]


class Recorded:
    """A source of closed forms that remembers the keys it was asked for."""

    def __init__(self) -> None:
        self._forms = CachedForms(_make_forms)
        self.keys: list[FormKey] = []

    def prepare(self, keys: Sequence[FormKey]) -> None:
        """Makes several forms side by side."""
        self._forms.prepare(keys)

    def traced(self, key: FormKey) -> Traced:
        """The form of a key."""
        self.keys.append(key)
        return self._forms.traced(key)


def _make_forms(keys: Sequence[FormKey], done: Callable[[FormKey, Traced], None]) -> None:
    from oomph.live.workers import make_forms

    make_forms(keys, done)


def versions() -> dict[str, str]:
    """Oomph's version and those of the libraries whose code it runs."""
    return {name: metadata.version(name) for name in ("oomph", "torch", "transformers", "peft")}


def planned(configurations: Sequence[Configuration] = CONFIGURATIONS) -> list[Row]:
    """What `oomph plan` predicts for each configuration, and the question for the other programs."""
    source = Recorded()
    return [_planned(configuration, source) for configuration in configurations]


def _planned(configuration: Configuration, source: Recorded) -> Row:
    source.keys.clear()
    recipe = override(load(configuration.recipe), list(configuration.settings))
    plan = make_plan(recipe, source, [configuration.stage], ladder=False)
    stage = plan.stages[0]
    choice = stage.choice
    given = {
        "model": recipe.model if isinstance(recipe.model, str) else f"{recipe.model.language} with {recipe.model.vision}",
        "gpu": plan.gpu,
        "gpus": choice.gpus,
        "nodes": recipe.hardware.nodes,
        "sharding": choice.sharding,
        "precision": choice.precision,
        "micro_batch": choice.micro_batch,
        "tokens": stage.samples_tokens,
        "trainable_parameters": stage.trainable_parameters,
        "total_parameters": stage.total_parameters,
    }
    record = {"name": configuration.name, "given": given, "reported": configuration.reported, "oomph": _answer(stage)}
    return Row(record, {**given, "key": source.keys[0].to_json()})


def _answer(stage: StagePlan) -> dict[str, Any]:
    prediction = stage.prediction
    failing = prediction.failing_request
    return {
        "allocated": prediction.allocated_peak_bytes,
        "reserved": prediction.reserved_peak_bytes,
        "usable": prediction.usable_bytes,
        "fits": prediction.fits,
        "failing": None if failing is None else failing.to_json(),
    }


def lora_steps() -> list[Row]:
    """Oomph's prediction for each measured LoRA step without quantisation, and the question for the other programs.

    The predictions are those of docs/accuracy.md, which tests make anew.
    """
    steps, predicted = _measured_rows(), json.loads(PREDICTIONS.read_text(encoding="utf-8"))["none"]
    return [_lora_step(steps, name, row, predicted[name]) for name, row in steps.UNQUANTISED.items()]


def _lora_step(steps: ModuleType, name: str, row: dict[str, Any], predicted: dict[str, int]) -> Row:
    run, measured = row["run"], row["measured"]
    given = {
        "precision": "float16",
        "micro_batch": run["batch_size"],
        "tokens": run["seq_len"],
        "gpus": 1,
        "nodes": 1,
        "sharding": "none",
        "rank": run["lora_rank"],
        "targets": run["lora_targets"],
    }
    record = {
        "name": name,
        "given": given,
        "measured": {part: round(measured[f"peak_{part}_mib"] * MIB) for part in ("allocated", "reserved")},
        "oomph": {part: predicted[part] for part in ("allocated", "reserved")},
    }
    config = steps.config_of(row)
    return Row(record, {**given, "config": json.loads(config.to_json_string()), "attention": run["attn_impl"]})


def _measured_rows() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measured_rows", MEASURED / "rows.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
