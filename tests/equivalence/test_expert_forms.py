"""Experts in closed forms and on the CPU: with each balance, and with the planned dispatch under a capacity."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, PhiConfig, PreTrainedModel, Qwen3MoeConfig

from oomph.core.closed_form import ClosedForm
from oomph.core.forms import FormKey
from oomph.core.layout import Shape
from oomph.live.balance import apply_balance
from oomph.live.model import compose_llava
from oomph.live.moe import upcycle
from oomph.live.simulate import Setup
from oomph.live.source import make_form
from oomph.recipe import Experts
from oomph.recipe.schema import Balance

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 503,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
}
EXPERTS: dict[str, Any] = {"count": 4, "top_k": 2, "layers": "all"}
CAPACITY = {**EXPERTS, "dispatch": "capacity", "capacity_factor": 0.7}
EVENS: dict[str, dict[str, Any]] = {
    "sequence": {"kind": "sequence", "z_loss": 0.001},
    "group": {"kind": "group", "group": 2},
    "bias": {"kind": "bias"},
    "micro-batch": {"kind": "micro-batch"},
}
BOUND = 0.01
SHAPES = ((2, 307, 0), (7, 129, 0))
"""Both have numbers of tokens that four experts cannot divide evenly."""


@pytest.fixture
def key_of(plain_key: FormKey, tmp_path: Path) -> Callable[..., FormKey]:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")

    def make(experts: dict[str, Any], balance: dict[str, Any] | None, **changes: Any) -> FormKey:
        rules: dict[str, Any] = {"trained": ("experts", "router"), "frozen": ("language", "head")}
        sections: dict[str, Any] = {"experts": json.dumps(experts), "balance": "" if balance is None else json.dumps(balance)}
        return replace(plain_key, model=str(tmp_path), **rules, **sections, **changes)

    return make


def rows(form: ClosedForm, shape: tuple[int, int, int]) -> list[tuple[Any, ...]]:
    sizes = form.sizes(shape).tolist()
    return [(sizes[f], form.kinds[k], layer) for f, k, layer in zip(form.formula, form.kind, form.layer, strict=True)]


def assert_whole(key: FormKey) -> ClosedForm:
    """The form of a key's family is the trace of all layers at other shapes, and loses nothing on disk."""
    made = make_form(key)
    assert made.form is not None, made.how
    for shape in SHAPES:
        whole = make_form(replace(key, shape=shape)).form
        assert whole is not None
        assert rows(made.form, shape) == rows(whole, shape)
        assert made.form.timeline == whole.timeline
    assert ClosedForm.from_json(json.loads(json.dumps(made.form.to_json()))) == made.form
    return made.form


def test_a_dispatch_under_a_capacity_is_exact_at_any_number_of_tokens(key_of: Callable[..., FormKey]) -> None:
    form = assert_whole(key_of(CAPACITY, {"kind": "micro-batch"}, checkpointing="blocks"))
    assert not form.unclassified
    shape, dense = (7, 129, 0), 7 * 129 * 4 * -(-7 * 129 * 14 // 40)
    largest = max(size for size, kind, _ in rows(form, shape) if kind.role == "dispatch")
    assert largest == 4 * dense
    assert {kind.module for kind in form.kinds if kind.role == "dispatch"} == {"model.layers.{}.mlp"}
    one = 2 * dense * LLAMA["hidden_size"]
    products = sum(row.times for row, flops in zip(form.work.rows, form.work.evaluate(shape)[0], strict=True) if flops == one)
    assert products >= 2 * LLAMA["num_hidden_layers"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVENS)
def test_experts_with_a_balance_are_exact_at_any_number_of_tokens(kind: str, key_of: Callable[..., FormKey]) -> None:
    balanced = assert_whole(key_of(EXPERTS, EVENS[kind]))
    assert not balanced.unclassified
    assert {kind.module for kind in balanced.kinds} >= {"model.layers.{}.mlp.experts", "model.layers.{}.mlp.router"}


@pytest.mark.slow
def test_layers_with_other_numbers_of_experts_under_a_capacity_are_traced_whole(key_of: Callable[..., FormKey]) -> None:
    key = key_of({**CAPACITY, "count": [4, 8, 4, 4, 4, 4]}, None)
    assert make_form(key).form is None
    whole = make_form(replace(key, shape=(1, 64, 0))).form
    assert whole is not None
    assert {p.shape[0] for p in whole.parameters if p.part == "router"} == {4, 8}


@dataclass(frozen=True)
class Balanced:
    """What `conftest.Case` has, with experts and what keeps their load even."""

    case: Any
    experts: Experts | None
    balance: Balance | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.case, name)

    def model(self) -> PreTrainedModel:
        """The case's model, upcycled, everything trained."""
        model: PreTrainedModel = self.case.model()
        if self.experts is not None:
            upcycle(model, self.experts)
        apply_balance(model, self.balance)
        return model


SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MEASURED = {
    "upcycled LLaVA, no balance": (True, None, "none"),
    "upcycled LLaVA, sequence": (True, EVENS["sequence"], "blocks"),
    "upcycled LLaVA, bias": (True, EVENS["bias"], "none"),
    "Qwen3-MoE, micro-batch": (False, EVENS["micro-batch"], "none"),
    "Qwen3-MoE, group": (False, EVENS["group"], "blocks"),
}
QUICK = {"upcycled LLaVA, sequence"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in MEASURED])
def test_a_balanced_step_takes_on_the_cpu_what_is_traced(name: str, make_case: Any, run_twice: Any) -> None:
    """Peaks of all phases to within what CPU kernels take as scratch, as docs/fidelity.md has them."""
    sees, balance, checkpointing = MEASURED[name]
    text: dict[str, Any] = {"vocab_size": 503, "max_position_embeddings": 512, **SMALL}
    if sees:
        tower = CLIPVisionConfig(image_size=56, patch_size=14, **SMALL)
        config: Any = compose_llava(tower, PhiConfig(num_key_value_heads=4, **text), -2, "patch")
    else:
        config = Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, num_key_value_heads=2, **text)
    setup = Setup("sdpa", "full", "adamw-foreach", checkpointing, "none", None, precision="float32" if sees else "bfloat16")
    case = make_case(config, (), setup, Shape(2, 64, 2 if sees else 0))
    experts = Experts(count=4, top_k=2) if sees else None
    traced, measured = run_twice(Balanced(case, experts, None if balance is None else Balance.model_validate(balance)))
    assert traced.before == measured.before
    for phase, peak in measured.peaks().items():
        assert traced.peaks()[phase] == pytest.approx(peak, rel=BOUND), phase
