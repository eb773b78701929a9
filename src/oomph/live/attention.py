"""Attention as the Choice names it, told to transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

EAGER_FP32 = "oomph_eager_fp32"


def eager_fp32(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that materialises its scores and computes them in fp32 from fp32 queries and keys.

    This is what the Phi-2 code of transformers 4.37 and of MoE-LLaVA does: queries and keys are cast up, scores are
    divided by the root of the head size after the product, the probabilities are cast back. Autocast is off meanwhile.

    Args:
        module: the attention module; gives the number of query heads per key head.
        query: [samples, heads, tokens, head size].
        key: [samples, key heads, tokens, head size].
        value: [samples, key heads, tokens, head size].
        attention_mask: added to the scores, [samples or 1, 1, tokens, tokens], or none.
        scaling: the factor of the scores.
        dropout: the probability of dropping a probability, in training.

    Returns:
        The output, [samples, tokens, heads, head size], and the probabilities, [samples, heads, tokens, tokens].
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query.float(), key.float().transpose(2, 3)) / (1 / scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


def hf_attention(attention: str) -> str:
    """The name under which transformers knows the Choice's attention; the SDPA backend is picked around the step."""
    if attention == "eager-fp32":
        AttentionInterface.register(EAGER_FP32, eager_fp32)
        AttentionMaskInterface.register(EAGER_FP32, eager_mask)
        return EAGER_FP32
    return "eager" if attention == "eager" else "sdpa"
