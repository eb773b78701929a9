"""Builds the model that the recipe names, without weights, and says which part each parameter belongs to."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from oomph.errors import UserError
from oomph.live.attention import hf_attention
from oomph.live.capacity import CapacityExperts
from oomph.live.experts import Experts
from oomph.live.modeling_oomph_llava import POOL, OomphLlavaConfig
from oomph.live.modeling_oomph_moe import OomphMoeConfig
from oomph.live.quantization import HeldWeight
from oomph.live.residual import ResidualExperts

LLAVA_PROJECTOR = "mlp2x_gelu"
"""The projector that ``LlavaForConditionalGeneration`` has."""
WITHOUT_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model")
"""Towers of which every token is a patch."""
_VISION = {"vision_tower", "visual", "vision_model", "vision_encoder"}
_PROJECTOR = {"multi_modal_projector", "mm_projector", "projector", "connector", "aligner", "mlp_AR", "merger"} | {
    "deepstack_merger_list"
}


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a transformers model folder.

    Raises:
        UserError: transformers does not know the model's type or cannot read the file.
    """
    try:
        config = _own(folder) or AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each configuration class checks in its own way
        raise UserError(f"transformers cannot read {folder / 'config.json'}: {_first_line(error)}") from None
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "quantization_config", None):
            raise UserError(
                f"{folder / 'config.json'} asks for quantized weights, which are not planned yet",
                "to plan 16-bit weights, use a copy of the folder without quantization_config",
            )
    return config


def _own(folder: Path) -> PretrainedConfig | None:
    """The configuration of a model that was saved with a class of ours, as the dense model's own class has it; else none.

    A LLaVA's says its projector's name, as `compose_llava` makes it; one with experts has `upcycled`.
    """
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = content.get("model_type")
    if kind == OomphLlavaConfig.model_type:
        dense = LlavaConfig.model_type
    elif kind == OomphMoeConfig.model_type:
        dense = content["dense_model_type"]
    else:
        return None
    left_out = ("auto_map", "model_type", "architectures", "dense_model_type")
    config: PretrainedConfig = CONFIG_MAPPING[dense].from_dict(
        {name: value for name, value in content.items() if name not in left_out}
    )
    return config


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def compose_llava(
    vision: PretrainedConfig,
    language: PretrainedConfig,
    feature_layer: int,
    feature_select: str,
    projector: str = LLAVA_PROJECTOR,
) -> LlavaConfig:
    """LLaVA's configuration from its parts: a vision tower, a projector and a causal language model.

    Where the projector is not LLaVA's own, the configuration has an attribute `projector` that names it. `feature_select`
    is as in a recipe: LLaVA's strategy ``default`` leaves out the first token, whatever it is.

    Raises:
        UserError: the language part is none, or the projector cannot be between them.
    """
    if type(language) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{language.model_type} is no causal language model, and cannot be the language part")
    if getattr(vision, "vision_config", None) is not None:
        vision = vision.vision_config
    side = vision.image_size // vision.patch_size
    if projector == "identity" and vision.hidden_size != language.hidden_size:
        raise UserError(
            f"projector identity: the tower's width {vision.hidden_size} is not the language model's {language.hidden_size}",
            "linear and mlpNx_gelu turn one into the other",
        )
    classed = vision.model_type not in WITHOUT_CLASS_TOKEN
    drops = feature_select == "drop-first" or (feature_select == "patch" and classed)
    if projector.startswith("pool_"):
        if drops != classed:
            reason = "the class token has no place in the grid" if classed else "patches without the first are not a square"
            raise UserError(f"projector {projector}: {reason}", "vision_feature_select: patch")
        side //= POOL
    named: dict[str, Any] = {} if projector == LLAVA_PROJECTOR else {"projector": projector}
    return LlavaConfig(
        **named,
        vision_config=vision,
        text_config=language,
        image_token_index=language.vocab_size - 1,
        image_seq_length=side**2,
        projector_hidden_act="gelu",
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if drops else "full",
        tie_word_embeddings=bool(getattr(language, "tie_word_embeddings", False)),
    )


def build(config: PretrainedConfig, dtype: torch.dtype, attention: str, device: str = "meta") -> PreTrainedModel:
    """The model on the ``meta`` device, in training mode, its weights' shapes and nothing else.

    On another device it has the values that transformers gives to new models, and LLaVA's own projector in any case.

    Raises:
        UserError: the configuration is of a model that generates no text, so that there is no training step for it, or
            one that its own classes refuse.
    """
    config = copy.deepcopy(config)
    kind = type(config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto: Any = AutoModelForImageTextToText
    elif kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = AutoModelForCausalLM
    else:
        raise UserError(
            f"{config.model_type} is not a language model or a vision-language model",
            "name it as the vision part of a model that is made of parts",
        )
    try:
        with torch.device(device):
            model: PreTrainedModel = auto.from_config(config, dtype=dtype, attn_implementation=hf_attention(attention))
        model.tie_weights()
    except Exception as error:  # the model's own classes check their configuration as they are built
        raise UserError(f"transformers cannot build {config.model_type}: {_first_line(error)}") from error
    for sub in (config, *(getattr(config, name, None) for name in ("text_config", "vision_config"))):
        if sub is not None:
            sub.use_cache = False
    model.train()
    return model


def without_adapters(name: str) -> str:
    """The name of a parameter or module in the model before PEFT put adapters around it; an adapter keeps its own."""
    return name if ".lora_" in name else name.replace(".base_layer", "")


def part_finder(model: PreTrainedModel) -> Callable[[str], str]:
    """A function from a parameter's name to its part: vision, projector, language, experts, router, head or lora.

    Of residual experts, the dense block is language, and what weighs it against the experts is router.
    """
    experts = {without_adapters(path) for path, module in model.named_modules() if _holds_experts(module)}
    routed = {path.rpartition(".")[0] for path in experts}
    shares = {f"{path}.coefficient" for path, module in model.named_modules() if isinstance(module, ResidualExperts)}
    head = model.get_output_embeddings()
    heads = {path for path, module in model.named_modules() if module is head}

    def part(name: str) -> str:
        module = without_adapters(name).rpartition(".")[0]
        steps = set(name.split("."))
        if any(step.startswith("lora_") for step in steps):
            return "lora"
        if steps & _PROJECTOR:
            return "projector"
        if steps & _VISION:
            return "vision"
        if module in heads:
            return "head"
        if any(module == path or module.startswith(f"{path}.") for path in experts):
            return "experts"
        parent, _, leaf = module.rpartition(".")
        if module in shares or (parent in routed and leaf in ("gate", "router")):
            return "router"
        return "language"

    return part


def _holds_experts(module: nn.Module) -> bool:
    return hasattr(module, "_is_expert_parallel") or isinstance(module, Experts | CapacityExperts)


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Turns every parameter and buffer from ``meta`` into a fake tensor on the CPU, in place; tied weights stay tied."""
    fakes: dict[int, Tensor] = {}
    keep: list[Tensor] = []

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            keep.append(tensor)
            new: Tensor = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
            trained = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if trained else new
            if isinstance(tensor, HeldWeight):
                tensor.carry(fakes[id(tensor)], fake)
        return fakes[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
