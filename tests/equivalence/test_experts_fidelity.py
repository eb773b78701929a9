"""What a balance of experts takes: one step on fake tensors and for real on the CPU, storage by storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, PhiConfig, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig

from oomph.core.layout import Shape
from oomph.live.balance import apply_balance
from oomph.live.model import compose_llava
from oomph.live.moe import upcycle
from oomph.live.simulate import Setup
from oomph.recipe import Experts
from oomph.recipe.schema import Balance

NUMBER = 16
"""Bytes up to which a storage is a number that a kernel or Python makes on the way."""
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 512, "max_position_embeddings": 256}
FOUR = Experts(count=4, top_k=2, layers="all")
ALL: dict[str, Any] = {"z_loss": 0.01, "coefficient": 0.1}


def llava(text: PretrainedConfig) -> PretrainedConfig:
    return compose_llava(CLIPVisionConfig(image_size=56, patch_size=14, **SIZES), text, -2, "patch")


def qwen() -> PretrainedConfig:
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    return Qwen3MoeConfig(num_experts=8, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, **sizes)


@dataclass(frozen=True)
class Stage:
    """A model, what it is upcycled to, its balance, what is recomputed and the precision."""

    config: Callable[[], PretrainedConfig]
    experts: Experts | None
    balance: Balance | None
    checkpointing: Any = "none"
    precision: Any = "float32"
    images: int = 2


CASES = {
    "sequence": Stage(lambda: llava(LlamaConfig(**TEXT)), FOUR, Balance(kind="sequence", **ALL)),
    "group, checkpointing": Stage(lambda: llava(PhiConfig(**TEXT)), FOUR, Balance(kind="group", group=2, **ALL), "blocks"),
    "bias": Stage(lambda: LlamaConfig(**TEXT), FOUR, Balance(kind="bias", z_loss=0.01), images=0),
    "micro-batch, mixed": Stage(
        lambda: llava(LlamaConfig(**TEXT)), FOUR, Balance(kind="micro-batch", **ALL), "blocks", "bfloat16-mixed"
    ),
    "none": Stage(lambda: LlamaConfig(**TEXT), FOUR, None, images=0),
    "Qwen3-MoE": Stage(qwen, None, Balance(kind="sequence", **ALL), "blocks", "bfloat16", images=0),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("sequence", "bias"))) for n in CASES])
def test_what_a_balance_takes_is_predicted_to_the_byte(name: str, make_case: Any, run_twice: Any) -> None:
    stage = CASES[name]

    class Balanced(make_case):  # type: ignore[misc]
        def model(self) -> PreTrainedModel:
            model: PreTrainedModel = super().model()
            if stage.experts is not None:
                upcycle(model, stage.experts)
            apply_balance(model, stage.balance)
            return model

    vision = "blocks" if stage.checkpointing == "blocks" and stage.images else "none"
    setup = Setup("sdpa", "full", "adamw-foreach", stage.checkpointing, vision, None, precision=stage.precision)
    frozen = ("vision",) if stage.images else ()
    traced, measured = run_twice(Balanced(stage.config(), frozen, setup, Shape(2, 48, stage.images)))
    assert traced.before == measured.before
    assert traced.peaks().keys() == measured.peaks().keys()
    for phase, events in traced.phases.items():
        ours, theirs = _sizes(events, measured=False), _sizes(measured.phases[phase], measured=True)
        assert not theirs - ours, (phase, theirs - ours, ours - theirs)
        assert sorted(ours - theirs) in ([], _projector_bias(stage, phase)), phase
        kept = sum(event.nbytes for event in measured.phases[phase] if _is_generator(event) and event.nbytes > 0)
        assert abs(traced.peaks()[phase] - measured.peaks()[phase]) <= 2 * kept + 8 * NUMBER, phase


def _projector_bias(stage: Stage, phase: str) -> list[tuple[str, int]]:
    """What a trace has too much of: CPU adds the bias of the projector's second layer where the product is."""
    size = 16 * stage.images * SIZES["hidden_size"] * (2 if stage.precision == "bfloat16-mixed" else 4)
    return [("", -size), ("aten::add", size)] if phase.startswith("forward") else []


def _sizes(events: list[Any], measured: bool) -> Counter[tuple[str, int]]:
    """Births of storages by operator and size, deaths by size."""
    kept = [e for e in events if abs(e.nbytes) > NUMBER and not e.inside and not (measured and _is_generator(e))]
    names = {"aten::new_zeros": "aten::zeros"}
    return Counter((names.get(event.op, event.op) if event.nbytes > 0 else "", event.nbytes) for event in kept)


def _is_generator(event: Any) -> bool:
    """Whether the storage is the state of the random generator, which a block that is recomputed keeps on the host."""
    return not event.op and abs(event.nbytes) == torch.get_rng_state().nbytes
