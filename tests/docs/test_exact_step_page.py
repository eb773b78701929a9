"""The page on the exact step says what the code does."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from oomph.core.rungs import _LIVE
from oomph.live.engine import TooLarge
from oomph.live.exactness import exactness_of
from oomph.records import Recovery

PAGE = "docs/exact-step.md"


def flat(text: str) -> str:
    """Running text on one line."""
    return " ".join(text.split())


def test_everything_that_is_not_exact_is_listed_as_it_is_said(pages: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=16, attention_dropout=0.1, **sizes)).train().to(torch.bfloat16)
    model.extra = nn.BatchNorm1d(2).to(torch.bfloat16)
    model.extra.expert_capacity = 8
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.001
    said = [sentence.partition(": ") for sentence in exactness_of(model)]
    listed = pages[PAGE].table("What is not exact")
    assert [row[1] for row in listed] == [why for _, _, why in said]
    assert all(what.startswith(row[0]) for row, (what, _, _) in zip(listed, said, strict=True))


def test_knobs_and_policies_are_named(pages: dict[str, Any]) -> None:
    rows = pages[PAGE].table("What is exact")
    assert all(any(f"`{knob}`" in row[0] for row in rows) for knob in _LIVE)
    section = pages[PAGE].section("Samples that fit nowhere")
    assert all(f"- `{policy}`: " in section for policy in get_args(TooLarge))


def test_what_is_written_down(pages: dict[str, Any]) -> None:
    sentence = flat(pages[PAGE].section("When memory runs out")).partition("What is written down.")[2].partition(". **")[0]
    words = {"step": "step", "micro_batch": "micro-batch", "phase": "phase", "module": "module", "predicted_bytes": "predicted"}
    words |= {"limit_bytes": "limit", "measured_bytes": "measured", "from_split": "cut", "from_choice": "rung"}
    fields = {field.name for field in dataclasses.fields(Recovery)}
    assert fields - {"kind", "message", "to_split", "to_choice"} == set(words)
    assert all(word in sentence for word in words.values())
