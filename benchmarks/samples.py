"""Samples of random tokens, all equally long, for steps whose cost is to be seen and not what they learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES, TOKENS = 8, 128


@dataclass(frozen=True)
class Cost:
    """What a sample costs."""

    tokens: int = TOKENS
    images: int = 0
    label_tokens: int = TOKENS - 1


@dataclass(frozen=True)
class Sample:
    """A sample of random tokens."""

    name: str
    ids: Tensor
    cost: Cost


def collate(samples: Sequence[Sample], tokens: int = TOKENS) -> dict[str, Tensor]:
    """A micro-batch; all samples are equally long."""
    ids = torch.stack([sample.ids for sample in samples])
    return {"input_ids": ids, "labels": ids.clone()}
