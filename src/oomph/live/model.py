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
from oomph.live.modeling_oomph_llava import POOL, OomphLlavaConfig
from oomph.live.moe import Experts
from oomph.live.quantization import HeldWeight

LLAVA_PROJECTOR = "mlp2x_gelu"
"""The projector that ``LlavaForConditionalGeneration`` has."""
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
        config = _own_llava(folder) or AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each configuration class checks in its own way
        raise UserError(f"transformers cannot read {folder / 'config.json'}: {_first_line(error)}") from None
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "quantization_config", None):
            raise UserError(
                f"{folder / 'config.json'} asks for quantized weights, which are not planned yet",
                "to plan 16-bit weights, use a copy of the folder without quantization_config",
            )
    return config


def _own_llava(folder: Path) -> LlavaConfig | None:
    """The configuration of a LLaVA that was saved with its projector's name, as `compose_llava` makes it; else none."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if content.get("model_type") != OomphLlavaConfig.model_type:
        return None
    left_out = ("auto_map", "model_type", "architectures")
    return LlavaConfig.from_dict({name: value for name, value in content.items() if name not in left_out})


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

    Where the projector is not LLaVA's own, the configuration has an attribute `projector` that names it.

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
    if projector.startswith("pool_"):
        if feature_select == "full":
            raise UserError(f"projector {projector}: the class token has no place in the grid", "vision_feature_select: patch")
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
        vision_feature_select_strategy="default" if feature_select == "patch" else "full",
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
    """A function from a parameter's name to its part: vision, projector, language, experts, router, head or lora."""
    experts = {without_adapters(path) for path, module in model.named_modules() if _holds_experts(module)}
    routed = {path.rpartition(".")[0] for path in experts}
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
        if parent in routed and leaf in ("gate", "router"):
            return "router"
        return "language"

    return part


def _holds_experts(module: nn.Module) -> bool:
    return hasattr(module, "_is_expert_parallel") or isinstance(module, Experts)


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
