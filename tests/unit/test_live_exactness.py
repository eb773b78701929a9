"""What is named as not exact before a run begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from oomph.live.exactness import exactness_of

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**settings: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, vocab_size=64, **SIZES, **settings)).train()


def test_a_plain_model_is_exact() -> None:
    assert exactness_of(llama()) == []


def test_dropout_is_named_where_it_draws() -> None:
    model = llama(attention_dropout=0.1)
    (sentence,) = exactness_of(model)
    assert sentence.startswith("dropout in model.layers.0.self_attn and 1 more: another cut draws other masks")
    assert exactness_of(model.eval()) == []
    model = llama()
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp, nn.Dropout(0.0), nn.Dropout(0.5))
    assert [sentence.partition(":")[0] for sentence in exactness_of(model)] == ["dropout in model.layers.1.mlp.2"]


def test_statistics_over_a_batch_are_named() -> None:
    model = llama()
    model.model.norm = nn.Sequential(model.model.norm, nn.BatchNorm1d(16))
    assert exactness_of(model) == ["batch norm in model.norm.1: means and variances are those of a micro-batch"]
    model.model.norm.eval()
    assert exactness_of(model) == []


def test_limits_of_experts_are_named() -> None:
    model = llama()
    model.model.layers[0].mlp.expert_capacity = 64
    (sentence,) = exactness_of(model)
    assert sentence == "expert capacity in model.layers.0.mlp: which tokens an expert drops depends on the micro-batch"


def test_balance_losses_are_named_where_they_count() -> None:
    settings: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}
    for counts in (False, True):
        config = Qwen3MoeConfig(num_key_value_heads=1, output_router_logits=counts, **SIZES, **settings)
        named = exactness_of(Qwen3MoeForCausalLM(config).train())
        assert [sentence[:58] for sentence in named] == ["the routers' balance loss (router_aux_loss_coef 0.001): it"] * counts


def test_rounding_is_named_where_gradients_have_16_bits() -> None:
    model = llama().to(torch.bfloat16)
    assert exactness_of(model) == ["gradients add up in bfloat16: each micro-batch's are rounded to it, and so are their sums"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert exactness_of(model) == []
