"""A model of transformers in which experts took the place of feed-forward networks (FFNs), where it has no class for that.

A folder with such a model holds a copy of this file and of the one for LLaVA's projectors, which need torch and transformers
alone:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Its configuration is that of the dense model, with ``dense_model_type`` for its kind and ``upcycled`` for its experts: the
``layers`` that have some, the ``count`` in each, ``top_k`` of them for each token, the ``path`` of a layer's FFN, whether the
dense FFN stays beside them (``residual``), and whether routers have a ``choice_bias``. Experts are held stacked. This file
is for inference: it computes one expert after the other.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from oomph.live.modeling_oomph_llava import projector

PARTS = ("gate_proj", "up_proj", "down_proj")


class UpcycledRouter(nn.Module):
    """The experts of each token: the `top_k` of the highest probability, with weights that sum to 1.

    A bias, where there is one, is added to their logits for the choice alone.
    """

    choice_bias: Tensor | None

    def __init__(self, hidden: int, count: int, top_k: int, biased: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(count, hidden))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.register_buffer("choice_bias", torch.zeros(count, dtype=torch.float32) if biased else None)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] to weights (float32) and numbers of experts, both [tokens, top_k]."""
        logits = nn.functional.linear(tokens.to(self.weight.dtype), self.weight)
        likely = logits.softmax(dim=-1, dtype=torch.float32)
        chosen = (likely if self.choice_bias is None else logits + self.choice_bias).topk(self.top_k, dim=-1).indices
        weights = likely.gather(-1, chosen)
        return weights / weights.sum(dim=-1, keepdim=True), chosen


class StackedExperts(nn.Module):
    """Copies of a dense FFN: for each of its `PARTS`, weights [count, out, in], and biases [count, out] where it has some."""

    def __init__(self, dense: nn.Module, count: int) -> None:
        super().__init__()
        named = dict(dense.named_children())
        linears = {name: module for name, module in named.items() if isinstance(module, nn.Linear)}
        [self.activation] = [module for name, module in named.items() if name not in linears]
        self.count, self.gated = count, len(linears) == len(PARTS)
        names = PARTS if self.gated else list(linears)
        for part, name in zip(PARTS if self.gated else PARTS[1:], names, strict=True):
            for suffix, tensor in (("", linears[name].weight), ("_bias", linears[name].bias)):
                copies = None if tensor is None else nn.Parameter(tensor.detach().expand(count, *tensor.shape).clone())
                self.register_parameter(f"{part}{suffix}", copies)

    def forward(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """[tokens, hidden] to the weighted sums of the chosen experts' outputs, of the same shape."""
        out = torch.zeros_like(tokens)
        for expert in range(self.count):
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            if len(rows):
                given = tokens[rows]
                inner = self.activation(self._linear("gate_proj" if self.gated else "up_proj", expert, given))
                inner = inner * self._linear("up_proj", expert, given) if self.gated else inner
                made = self._linear("down_proj", expert, inner) * weights[rows, places, None].to(tokens.dtype)
                out.index_add_(0, rows, made)
        return out

    def _linear(self, part: str, expert: int, rows: Tensor) -> Tensor:
        bias = getattr(self, f"{part}_bias")
        return nn.functional.linear(rows, getattr(self, part)[expert], None if bias is None else bias[expert])


class UpcycledMixture(nn.Module):
    """Takes the place of a dense FFN."""

    def __init__(self, dense: nn.Module, count: int, top_k: int, biased: bool) -> None:
        super().__init__()
        self.experts = StackedExperts(dense, count)
        hidden = self.experts.get_parameter("up_proj").shape[2]
        self.router = UpcycledRouter(hidden, count, top_k, biased)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to the same shape."""
        tokens = hidden.flatten(0, -2)
        out: Tensor = self.experts(tokens, *self.router(tokens))
        return out.view(hidden.shape)


class ResidualMixture(nn.Module):
    """A dense FFN beside a mixture, each with its share of every token."""

    def __init__(self, dense: nn.Module, mixture: nn.Module, hidden: int) -> None:
        super().__init__()
        self.dense, self.mixture, self.coefficient = dense, mixture, nn.Linear(hidden, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to the same shape."""
        shares = self.coefficient(hidden).float().softmax(dim=-1).to(hidden.dtype)
        combined: Tensor = self.mixture(hidden) * shares[..., :1] + self.dense(hidden) * shares[..., 1:]
        return combined


def add_experts(model: nn.Module, upcycled: dict[str, Any]) -> None:
    """Replaces FFNs by mixtures of copies of them, in place, as the configuration's `upcycled` says."""
    numbers, count = upcycled["layers"], upcycled["count"]
    for number, experts in zip(numbers, [count] * len(numbers) if isinstance(count, int) else count, strict=True):
        parent, _, leaf = upcycled["path"].format(number).rpartition(".")
        dense = model.get_submodule(f"{parent}.{leaf}")
        mixture = UpcycledMixture(dense, experts, upcycled["top_k"], upcycled.get("choice_bias", False))
        hidden = mixture.router.weight.shape[1]
        replacement = ResidualMixture(dense, mixture, hidden) if upcycled.get("residual") else mixture
        setattr(model.get_submodule(parent), leaf, replacement)


class _WithExperts:
    """What is added to the class of the dense model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        kind = getattr(config, "projector", None)
        if kind is not None:
            sizes = config.vision_config.hidden_size, config.text_config.hidden_size
            model.model.multi_modal_projector = projector(kind, *sizes)
        add_experts(model, config.upcycled)


class OomphMoeConfig(PretrainedConfig):
    """Reads the configuration of a model with experts: an instance of the dense model's class."""

    model_type = "oomph_moe"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration, of a class that derives from that of the dense model."""
        content = {name: value for name, value in config_dict.items() if name != "model_type"}
        return _config_class(content["dense_model_type"]).from_dict(content, **kwargs)


class OomphMoe:
    """Makes models with experts: instances of the dense model's class."""

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """The model in a folder."""
        if config is None:
            config = OomphMoeConfig.from_pretrained(folder)
        return _model_class(config.dense_model_type).from_pretrained(folder, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A new model, whose experts are equal."""
        return _model_class(config.dense_model_type)._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing; transformers calls it of every class that comes with a folder."""


@functools.cache
def _config_class(dense: str) -> Any:
    contents = {"model_type": OomphMoeConfig.model_type, "__module__": __name__}
    made = type("OomphMoeConfig", (CONFIG_MAPPING[dense],), contents)
    made._auto_class = "AutoConfig"  # type: ignore[attr-defined]
    return made


@functools.cache
def _model_class(dense: str) -> Any:
    kind = CONFIG_MAPPING[dense]
    mappings: Any = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    base = next(mapping[kind] for mapping in mappings if kind in mapping)
    contents = {"config_class": _config_class(dense), "__module__": __name__}
    return type("OomphMoe", (_WithExperts, base), contents)
