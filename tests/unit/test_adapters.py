"""Adapters as PEFT puts them in: where, in which dtype, in which part, and what a recipe can get wrong."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig

from oomph.core.forms import FormKey
from oomph.errors import UserError
from oomph.live.adapters import add_adapters
from oomph.live.model import build, compose_llava, part_finder, without_adapters
from oomph.live.moe import upcycle
from oomph.live.source import build_model, read_model_config
from oomph.recipe.schema import Experts, Lora

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA = LlamaConfig(vocab_size=96, num_key_value_heads=2, **SIZES)
MIXTURE = Qwen3MoeConfig(
    vocab_size=96, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **SIZES
)
LLAVA = compose_llava(CLIPVisionConfig(**SIZES, image_size=28, patch_size=14), LLAMA, -2, "patch")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(config: PretrainedConfig, **section: Any) -> PreTrainedModel:
    model = build(config, torch.bfloat16, "sdpa")
    add_adapters(model, Lora(**{"rank": 4, **section}))
    return model


def owners(model: PreTrainedModel) -> set[str]:
    """The modules that have adapters, by their names without them."""
    part = part_finder(model)
    return {name.partition(".lora_")[0] for name, _ in model.named_parameters() if part(name) == "lora"}


def endings(paths: set[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def test_all_linear_is_every_linear_layer_of_the_language_model_but_its_head() -> None:
    model = adapted(LLAVA)
    assert len(owners(model)) == 2 * 7
    assert all("language_model" in path for path in owners(model))
    assert endings(owners(model)) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_name_means_every_module_that_ends_in_it() -> None:
    found = owners(adapted(LLAVA, target_modules=["q_proj", "linear_2", "lm_head"]))
    assert Counter(path.rpartition(".")[2] for path in found) == {"q_proj": 4, "linear_2": 1, "lm_head": 1}
    assert owners(adapted(LLAMA, target_modules=["layers.1.mlp.up_proj"])) == {"model.layers.1.mlp.up_proj"}


def test_adapters_are_float32_beside_16_bit_weights_and_have_the_rank() -> None:
    shapes = {}
    for name, parameter in adapted(LLAMA, target_modules=["k_proj"]).named_parameters():
        assert parameter.device.type == "meta"
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
        if ".lora_" in name:
            shapes[name.partition(".lora_")[2][0]] = tuple(parameter.shape)
    assert shapes == {"A": (4, 32), "B": (16, 4)}


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (6.0, 1.5)])
def test_outputs_are_scaled_by_alpha_over_rank(alpha: float | None, scale: float) -> None:
    layer = adapted(LLAMA, alpha=alpha, target_modules=["q_proj"]).get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.scaling == {"default": scale}


def test_experts_in_one_tensor_get_one_adapter_for_all() -> None:
    model = adapted(MIXTURE, target_modules=["q_proj"], target_parameters=EXPERTS)
    names = {without_adapters(name): parameter for name, parameter in model.named_parameters()}
    ranks = [tuple(p.shape) for name, p in names.items() if "experts" in name and ".lora_A" in name]
    assert ranks == [(4 * 4, 16), (4 * 4, 32)] * 2 or ranks == [(4 * 4, 32), (4 * 4, 16)] * 2
    part = part_finder(model)
    parts = Counter(part(name) for name, _ in model.named_parameters())
    assert parts["lora"] == 2 * (2 + 2 * 2)
    assert parts["experts"] == 2 * 2
    assert parts["router"] == 2


def test_upcycled_experts_get_adapters_too() -> None:
    model = build(LLAMA, torch.bfloat16, "sdpa")
    upcycle(model, Experts(count=4, top_k=2, layers="all"))
    add_adapters(model, Lora(rank=4, target_parameters=["experts.up_proj"]))
    part = part_finder(model)
    parts = {part(name) for name, _ in model.named_parameters() if "experts" in name}
    assert parts == {"experts", "lora"}
    assert endings(owners(model)) == {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}


@pytest.mark.parametrize(
    ("config", "section", "words"),
    [
        (LLAMA, {"target_modules": ["q_prj"]}, ["no module's name ends in `q_prj`", "k_proj, lm_head, o_proj"]),
        (LLAMA, {"target_modules": ["mlp"]}, ["`mlp` is model.layers.0.mlp, of class LlamaMLP"]),
        (MIXTURE, {"target_modules": ["gate_proj"]}, ["no module's name ends in `gate_proj`"]),
        (MIXTURE, {"target_parameters": ["experts.w1"]}, ["ends in `experts.w1`", "experts.down_proj, experts.gate_up_proj"]),
        (MIXTURE, {"target_parameters": EXPERTS, "dropout": 0.1}, ["adapters of target_parameters have no dropout"]),
        (LLAMA, {"target_parameters": ["norm.weight"]}, ["model.norm.weight has 1 dimensions"]),
        (LLAMA, {"target_modules": ["a", "b"]}, ["ends in `a`", "ends in `b`"]),
        (LLAMA, {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]}, ["PEFT refuses the adapters"]),
    ],
)
def test_names_that_cannot_be_adapted_are_refused(config: PretrainedConfig, section: Any, words: Sequence[str]) -> None:
    with pytest.raises(UserError) as refused:
        adapted(config, **section)
    text = refused.value.render()
    assert all(word in text for word in words), text


def test_without_peft_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="PEFT") as refused:
        adapted(LLAMA)
    assert "oomph[lora]" in refused.value.hint


def key_of(plain: FormKey, folder: Path, **changes: Any) -> FormKey:
    (folder / "config.json").write_text(LLAMA.to_json_string())
    return replace(plain, model=str(folder), **changes)


def built(key: FormKey) -> PreTrainedModel:
    return build_model(key, read_model_config(key))


LORA = json.dumps({"rank": 4})


def test_rules_mean_names_without_adapters(plain_key: FormKey, tmp_path: Path) -> None:
    rules = {"trained": ("lora", "language:*.mlp.up_proj.weight"), "frozen": ("language:!*.mlp.up_proj.weight", "head")}
    model = built(key_of(plain_key, tmp_path, lora=LORA, **rules))
    trained = {without_adapters(name) for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert trained == {f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)}
    assert all(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"trained": ("lora",), "frozen": ("language", "head")}, "the rule `lora` is about adapters"),
        ({"trained": ("language",), "frozen": ("head",), "lora": LORA}, "of part `lora`"),
    ],
)
def test_a_section_without_a_rule_and_a_rule_without_a_section_are_refused(
    plain_key: FormKey, tmp_path: Path, changes: Any, word: str
) -> None:
    with pytest.raises(UserError) as refused:
        built(key_of(plain_key, tmp_path, **changes))
    assert word in refused.value.render()
