"""Builds the model that the recipe names, without weights, and says which part each parameter belongs to."""

from __future__ import annotations

import copy
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
from oomph.live.moe import Experts

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
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each configuration class checks in its own way
        raise UserError(f"transformers cannot read {folder / 'config.json'}: {_first_line(error)}") from None
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "quantization_config", None):
            raise UserError(
                f"{folder / 'config.json'} asks for quantized weights, which are not planned yet",
                "to plan 16-bit weights, use a copy of the folder without quantization_config",
            )
    return config


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def compose_llava(vision: PretrainedConfig, language: PretrainedConfig, feature_layer: int, feature_select: str) -> LlavaConfig:
    """LLaVA's configuration from its parts: a vision tower, a projector and a causal language model.

    Raises:
        UserError: the language part is none.
    """
    if type(language) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{language.model_type} is no causal language model, and cannot be the language part")
    if getattr(vision, "vision_config", None) is not None:
        vision = vision.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=language.vocab_size - 1,
        image_seq_length=patches,
        projector_hidden_act="gelu",
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if feature_select == "patch" else "full",
        tie_word_embeddings=bool(getattr(language, "tie_word_embeddings", False)),
    )


def build(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model on the ``meta`` device, in training mode, its weights' shapes and nothing else.

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
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, dtype=dtype, attn_implementation=hf_attention(attention))
        model.tie_weights()
    except Exception as error:  # the model's own classes check their configuration as they are built
        raise UserError(f"transformers cannot build {config.model_type}: {_first_line(error)}") from error
    for sub in (config, *(getattr(config, name, None) for name in ("text_config", "vision_config"))):
        if sub is not None:
            sub.use_cache = False
    model.train()
    return model


def projector(kind: str, inputs: int, outputs: int) -> nn.Module:
    """LLaVA's projectors: ``identity``, ``linear``, or ``mlp{N}x_gelu`` with N linear layers."""
    if kind == "identity":
        return nn.Identity()
    depth = 1 if kind == "linear" else int(kind.removeprefix("mlp").removesuffix("x_gelu"))
    layers: list[nn.Module] = [nn.Linear(inputs, outputs)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(outputs, outputs)]
    return nn.Sequential(*layers)


def part_finder(model: PreTrainedModel) -> Callable[[str], str]:
    """A function from a parameter's name to its part: vision, projector, language, experts, router or head."""
    experts = {path for path, module in model.named_modules() if _holds_experts(module)}
    routed = {path.rpartition(".")[0] for path in experts}
    head = model.get_output_embeddings()
    heads = {path for path, module in model.named_modules() if module is head}

    def part(name: str) -> str:
        module = name.rpartition(".")[0]
        steps = set(name.split("."))
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
        return fakes[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
