"""Adapters in closed forms: five units and two shapes are all layers at any shape, as for models without them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from oomph.core.closed_form import ClosedForm
from oomph.core.forms import FormKey
from oomph.live.source import make_form

LAYERS = 6
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
}
LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 503, "num_key_value_heads": 2, **SIZES}
TOWER: dict[str, Any] = {"model_type": "clip_vision_model", "image_size": 140, "patch_size": 14, **SIZES}
QWEN: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
}
FROZEN = ("language", "head")


@dataclass(frozen=True)
class Case:
    """A model's configurations, its `lora` section, what else differs, a shape to trace whole, and its adapters' tensors."""

    configs: dict[str, dict[str, Any]]
    lora: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, int, int] = (3, 307, 0)
    adapters: int = 2 * 7 * LAYERS


LLAVA = {"vision": TOWER, "language": LLAMA}
CASES: dict[str, Case] = {
    "checkpointing, dropout, autocast": Case(
        {"model": LLAMA},
        {"rank": 4, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
        {"checkpointing": "blocks", "precision": "bfloat16-mixed"},
        adapters=2 * 2 * LAYERS,
    ),
}
SLOW: dict[str, Case] = {
    "LLaVA, the projector trained in 16 bits": Case(
        LLAVA,
        {"rank": 4},
        {
            "projector": "mlp2x_gelu",
            "images": 2,
            "trained": ("lora", "projector"),
            "frozen": (*FROZEN, "vision"),
            "checkpointing": "blocks",
        },
        (3, 307, 6),
    ),
    "experts in one tensor": Case(
        {"model": QWEN},
        {"rank": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"frozen": (*FROZEN, "experts", "router"), "checkpointing": "blocks"},
        adapters=2 * 3 * LAYERS,
    ),
    "upcycled": Case(
        {"model": LLAMA},
        {"rank": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.up_proj", "experts.down_proj"]},
        {"frozen": (*FROZEN, "experts", "router"), "experts": '{"count": 4, "top_k": 2, "layers": "all"}'},
        adapters=2 * 3 * LAYERS,
    ),
}
ALL = {**CASES, **SLOW}


@pytest.fixture
def key_of(plain_key: FormKey, tmp_path: Path) -> Callable[[Case], FormKey]:
    """The key of a case's family."""

    def make(case: Case) -> FormKey:
        folders = {}
        for name, config in case.configs.items():
            folder = tmp_path / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            folders[name] = str(folder)
        towers = {"vision_feature_layer": -2, "vision_feature_select": "patch"} if "vision" in folders else {}
        rules = {"trained": ("lora",), "frozen": FROZEN}
        return replace(plain_key, **{**folders, **towers, **rules, **case.changes}, lora=json.dumps(case.lora))

    return make


def storages(form: ClosedForm, shape: tuple[int, int, int]) -> list[tuple[Any, ...]]:
    sizes = form.sizes(shape).tolist()
    columns = zip(form.formula, form.kind, form.layer, form.parameter, strict=True)
    return [(sizes[formula], form.kinds[kind], layer, parameter) for formula, kind, layer, parameter in columns]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ALL])
def test_a_form_with_adapters_is_the_whole_model_at_another_shape(name: str, key_of: Callable[[Case], FormKey]) -> None:
    case = ALL[name]
    key = key_of(case)
    made = make_form(key)
    assert made.form is not None, made.how
    whole = make_form(replace(key, shape=case.shape)).form
    assert whole is not None
    assert storages(made.form, case.shape) == storages(whole, case.shape)
    assert made.form.timeline == whole.timeline
    assert made.form.parameters == whole.parameters
    assert Counter(parameter.part for parameter in whole.parameters)["lora"] == case.adapters
    assert {p.dtype for p in whole.parameters if p.part == "lora"} == {"float32"}
