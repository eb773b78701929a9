"""LLaVA with a projector that ``LlavaForConditionalGeneration`` has no form for: deeper, or with fewer tokens than patches.

A folder with such a model holds a copy of this file, which needs torch and transformers alone:

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

POOL = 2
"""Patches of a side of the square that becomes one token."""


class AveragePool(nn.Module):
    """Averages squares of `POOL` × `POOL` patches; a last odd row and column are left out."""

    def forward(self, patches: Tensor) -> Tensor:
        """[images, side · side, hidden] to [images, (side // POOL) ** 2, hidden]."""
        images, number, hidden = patches.shape
        side = math.isqrt(number)
        if side * side != number:
            raise ValueError(f"{number} patches are no square; leave the class token out with vision_feature_select patch")
        grid = patches.view(images, side, side, hidden).permute(0, 3, 1, 2)
        pooled: Tensor = nn.functional.avg_pool2d(grid, POOL)
        return pooled.permute(0, 2, 3, 1).reshape(images, -1, hidden)


def projector(kind: str, inputs: int, outputs: int) -> nn.Module:
    """The layers between vision tower and language model.

    Args:
        kind: ``identity``, ``linear``, or ``mlp{N}x_gelu`` with N linear layers; ``pool_`` before the last averages first.
        inputs: the tower's hidden size.
        outputs: the language model's.
    """
    if kind == "identity":
        return nn.Identity()
    layers: list[nn.Module] = [AveragePool()] if kind.startswith("pool_") else []
    inner = kind.removeprefix("pool_")
    depth = 1 if inner == "linear" else int(inner.removeprefix("mlp").removesuffix("x_gelu"))
    layers.append(nn.Linear(inputs, outputs))
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(outputs, outputs)]
    return nn.Sequential(*layers)


class OomphLlavaConfig(LlavaConfig):
    """LLaVA's configuration, with the `projector` by the name that the function of that name has for it."""

    model_type = "oomph_llava"
    projector: str = "mlp2x_gelu"


class OomphLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with the projector that its configuration names."""

    config_class = OomphLlavaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        sizes = config.vision_config.hidden_size, config.text_config.hidden_size
        self.model.multi_modal_projector = projector(config.projector, *sizes)
