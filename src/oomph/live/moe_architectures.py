"""Which mixture-of-experts architecture of transformers an upcycled model is, and what configurations say of experts.

Llama and Mistral with experts in all layers are Mixtral's, and Qwen3 with experts in any layers is Qwen3Moe's: everything but
the feed-forward networks is the same there (transformers 5.23, models/mixtral and models/qwen3_moe), and their routers do as
ours. Qwen2Moe is none for Qwen2: it has a shared expert beside the routed ones. All else that is upcycled says so in its
configuration as ``upcycled``, which `modeling_oomph_moe` describes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, MixtralConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from oomph.errors import UserError
from oomph.live.model import without_adapters
from oomph.live.moe import Converted, expert_counts, expert_layers
from oomph.recipe import Experts

_COMMON = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings attention_dropout rope_parameters dtype"
).split()


def matching_config(config: PretrainedConfig, layers: list[Converted]) -> PretrainedConfig | None:
    """The configuration of transformers' architecture that computes what an upcycled model does; None where there is none.

    Args:
        config: of the dense model, a LLaVA's too.
        layers: of the upcycled one.
    """
    if config.model_type == "llava":
        text = matching_config(config.text_config, layers)
        if text is None:
            return None
        whole = copy.deepcopy(config)
        whole.text_config = text
        return whole
    counts = {layer.experts.count for layer in layers}
    plain = len(counts) == 1 and not any(layer.residual or _more_than_weights(layer) for layer in layers)
    if not plain:
        return None
    common = {name: getattr(config, name) for name in _COMMON if hasattr(config, name)}
    count, top_k = counts.pop(), layers[0].top_k
    if type(config) in (LlamaConfig, MistralConfig) and len(layers) == config.num_hidden_layers:
        if getattr(config, "attention_bias", False):
            return None
        window = getattr(config, "sliding_window", None)
        return MixtralConfig(**common, sliding_window=window, num_local_experts=count, num_experts_per_tok=top_k)
    if type(config) is Qwen3Config and set(config.layer_types or ()) == {"full_attention"}:
        numbers = {layer.number for layer in layers}
        return Qwen3MoeConfig(
            **common,
            attention_bias=config.attention_bias,
            moe_intermediate_size=config.intermediate_size,
            num_experts=count,
            num_experts_per_tok=top_k,
            norm_topk_prob=True,
            mlp_only_layers=[number for number in range(config.num_hidden_layers) if number not in numbers],
        )
    return None


def _more_than_weights(layer: Converted) -> bool:
    """Whether a layer has biases, in its experts or in its router, which the matching architectures have no place for."""
    names = [*dict(layer.mixture.named_parameters()), *dict(layer.mixture.named_buffers())]
    return any(name.endswith("bias") for name in map(without_adapters, names) if ".lora_" not in name)


def to_matching(tensors: dict[str, Tensor], layers: list[Converted]) -> dict[str, Tensor]:
    """The tensors of an upcycled model by the names and in the shapes of its matching architecture; `tensors` is emptied."""
    for layer in layers:
        path = layer.mixture_path
        gate, up = (tensors.pop(f"{path}.experts.{part}") for part in ("gate_proj", "up_proj"))
        tensors[f"{path}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[f"{path}.gate.weight"] = tensors.pop(f"{path}.router.weight")
    return tensors


def from_matching(tensors: dict[str, Tensor], layers: list[Converted]) -> dict[str, Tensor]:
    """The tensors of a matching architecture by the names of the upcycled model, in place, without copies."""
    for layer in layers:
        path = layer.mixture_path
        fused = tensors.pop(f"{path}.experts.gate_up_proj", None)
        if fused is not None:
            tensors[f"{path}.experts.gate_proj"], tensors[f"{path}.experts.up_proj"] = fused.chunk(2, dim=1)
            tensors[f"{path}.router.weight"] = tensors.pop(f"{path}.gate.weight")
    return tensors


def described(layers: list[Converted]) -> dict[str, Any]:
    """What the configuration of an upcycled model says of its experts, as ``upcycled``."""
    counts = [layer.experts.count for layer in layers]
    first = layers[0]
    prefix, _, rest = first.path.rpartition(f".{first.number}.")
    return {
        "path": f"{prefix}.{{}}.{rest}",
        "layers": [layer.number for layer in layers],
        "count": counts[0] if len(set(counts)) == 1 else counts,
        "top_k": first.top_k,
        "residual": first.residual,
        "choice_bias": any(name.endswith("router.choice_bias") for name, _ in first.mixture.named_buffers()),
    }


def section_in(config: PretrainedConfig) -> Experts | None:
    """The experts that a configuration says its model has, as a recipe's section; None for a dense model and other experts."""
    upcycled = _upcycled(config)
    if upcycled is not None:
        return Experts(**{name: upcycled[name] for name in ("count", "top_k", "layers", "residual")})
    text = config.get_text_config()
    if type(text) is MixtralConfig:
        return Experts(count=text.num_local_experts, top_k=text.num_experts_per_tok, layers="all")
    if type(text) is Qwen3MoeConfig and text.norm_topk_prob and text.decoder_sparse_step == 1:
        layers = [number for number in range(text.num_hidden_layers) if number not in (text.mlp_only_layers or ())]
        return Experts(count=text.num_experts, top_k=text.num_experts_per_tok, layers=layers)
    return None


def has_choice_bias(config: PretrainedConfig) -> bool:
    """Whether a configuration says that its model's routers choose with a bias."""
    return bool((_upcycled(config) or {}).get("choice_bias"))


def _upcycled(config: PretrainedConfig) -> dict[str, Any] | None:
    parts = (config, config.get_text_config())
    return next((found for part in parts if (found := getattr(part, "upcycled", None)) is not None), None)


def has_own_class(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a model whose experts a class of transformers computes."""
    return _upcycled(config) is None and section_in(config) is not None


def check_same(asked: Experts, found: Experts, config: PretrainedConfig, where: str, top_k: bool = False) -> None:
    """Whether a stage that makes experts can go on with those that a model has already.

    Args:
        asked: the stage's section.
        found: the model's.
        config: of the model.
        where: what holds it, for messages.
        top_k: whether the number of experts for each token has to be the same too.

    Raises:
        UserError: the experts are others than asked for.
    """
    total = int(config.get_text_config().num_hidden_layers)
    numbers, layers = expert_layers(total, asked.layers), expert_layers(total, found.layers)
    wanted, counts = expert_counts(numbers, asked), expert_counts(layers, found)
    problems = []
    if numbers != layers:
        problems.append(f"{where} has experts in the layers {_listed(layers)}, and the stage asks for {_listed(numbers)}")
    elif wanted != counts:
        problems.append(f"{where} has {_listed(counts)} experts, and the stage asks for {_listed(wanted)}")
    if asked.residual != found.residual:
        has = "keeps its dense blocks beside the experts" if found.residual else "has no dense blocks beside its experts"
        problems.append(f"{where} {has}, and the stage asks for residual: {str(asked.residual).lower()}")
    if top_k and asked.top_k != found.top_k:
        problems.append(f"{where} sends a token to {found.top_k} experts, and the stage asks for {asked.top_k}")
    if problems:
        raise UserError(problems, "leave the section `experts` out to go on with the experts that there are")


def _listed(numbers: list[int]) -> str:
    same = len(set(numbers)) == 1
    return str(numbers[0]) if same else ", ".join(map(str, numbers))
