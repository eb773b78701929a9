"""What the GPUs divide of experts, whose weights are stacked: all of it under ZeRO, whole experts under FSDP2."""

from __future__ import annotations

import pytest

from oomph.core.sharding import Parameter, static_bytes
from oomph.records import Choice, Sharding

COUNT, HIDDEN, INNER = 4, 64, 256
STACKED = ((COUNT, INNER, HIDDEN), (COUNT, HIDDEN, INNER))
EXPERTS = [
    Parameter(f"model.layers.{layer}.mlp.experts.{name}_proj", shape, "bfloat16", True, "experts")
    for layer in range(2)
    for name, shape in zip(("up", "down"), STACKED, strict=True)
]
WHOLE = sum(parameter.nbytes for parameter in EXPERTS)
EMBEDDING = Parameter("model.embed_tokens.weight", (512, HIDDEN), "bfloat16", True)


def kept(sharding: Sharding, gpus: int, *others: Parameter) -> dict[str, int]:
    return static_bytes([*others, *EXPERTS], Choice(1, 1, gpus, gpus, sharding=sharding, optimizer="adamw-fused"))


@pytest.mark.parametrize(("sharding", "weights"), [("zero1", 1), ("zero2", 1), ("zero3", 8)])
def test_zero_divides_what_it_keeps_of_experts_evenly(sharding: Sharding, weights: int) -> None:
    """Master weights and moments are 12 bytes for the two of a weight, beside AdamW's step counter."""
    found, whole = kept(sharding, 8, EMBEDDING), WHOLE + EMBEDDING.nbytes
    assert found["weight"] == whole // weights
    assert found["optimizer"] == whole // 2 * 12 // 8 + 4


@pytest.mark.parametrize(("gpus", "experts"), [(2, 2), (4, 1), (8, 1), (3, 2)])
def test_fsdp2_divides_experts_by_their_number(gpus: int, experts: int) -> None:
    """`fully_shard` cuts the first dimension: a GPU has whole experts, and with more GPUs than experts some have none."""
    assert kept("fsdp2", gpus)["weight"] == WHOLE * experts // COUNT
