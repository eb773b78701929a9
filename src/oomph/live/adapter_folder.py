"""Adapters and quantized weights turned into what others read: merged weights, and a folder as PEFT saves it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from oomph.live.model import without_adapters
from oomph.live.quantization import quantized_layers

_ADAPTER = "default"
_PREFIX = "base_model.model."


def merged(model: nn.Module, held: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Functions that compute the weights which are not what the model without adapters would hold, by its names.

    A weight with an adapter is their sum, added in float32 and rounded once; a quantized one is what it stands for.

    Args:
        model: with adapters, quantized layers, both or neither.
        held: the dtype of quantized weights once they are not any more.
    """
    quantized = {id(layer) for layer in quantized_layers(model)}
    found: dict[str, Callable[[], Tensor]] = {}
    for path, module in model.named_modules():
        layer: Any = module
        if hasattr(module, "get_delta_weight"):
            leaf = getattr(module, "parameter_name", "weight")
            found[without_adapters(f"{path}.{leaf}")] = _Sum(layer.get_base_layer(), leaf, layer, held)
        elif id(module) in quantized:
            found.setdefault(without_adapters(f"{path}.weight"), _Sum(layer, "weight", None, held))
    return found


class _Sum:
    """A weight of a layer, with that of its adapter, if it has one."""

    def __init__(self, layer: Any, leaf: str, adapter: Any, held: torch.dtype) -> None:
        self._layer, self._leaf, self._adapter, self._held = layer, leaf, adapter, held

    def __call__(self) -> Tensor:
        weight: Tensor = getattr(self._layer, self._leaf).detach()
        if not weight.is_floating_point():
            peft: Any = importlib.import_module("peft.utils.integrations")
            weight = peft.dequantize_bnb_weight(self._layer.weight, state=getattr(self._layer, "state", None)).to(self._held)
        if self._adapter is not None:
            with torch.no_grad():
                weight = (weight.float() + self._adapter.get_delta_weight(_ADAPTER).float()).to(weight.dtype)
        return weight.detach().to("cpu", copy=True)


def save_adapters(model: PreTrainedModel, folder: Path, base: Path | None) -> str:
    """Saves a model's adapters as PEFT does, with the modules that train beside them where PEFT has a form for that.

    Args:
        model: nothing is saved of one without adapters.
        folder: made for them.
        base: the folder that the stage started from.

    Returns:
        A sentence about the folder, for those who look into it; empty without adapters.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if _ADAPTER not in configs:
        return ""
    tensors = {
        _PREFIX + name.replace(f".{_ADAPTER}", ""): tensor.detach().to("cpu").contiguous()
        for name, tensor in model.named_parameters()
        if any(step.startswith("lora_") for step in name.split("."))
    }
    owners = _others(model)
    for owner in owners or ():
        for leaf, tensor in model.get_submodule(owner).state_dict().items():
            tensors[f"{_PREFIX}{owner}.{leaf}"] = tensor.detach().to("cpu", copy=True)
    config = copy.copy(configs[_ADAPTER])
    config.inference_mode, config.modules_to_save = True, owners or None
    config.base_model_name_or_path = None if base is None else str(base)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    start = "that this stage started from" if base is None else f"in {base}"
    whole = "" if owners is not None else " More trained than PEFT has a form for: the merged model is more than both."
    return f"`adapter` holds the adapters alone, as PEFT reads them, for the model {start}.{whole}"


def _others(model: PreTrainedModel) -> list[str] | None:
    """The modules beside the adapters that train; None where PEFT cannot save them so.

    It replaces whole modules, which must not hold adapters or be tied to others, and are known by transformers' names.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    trained = {name for name, item in named.items() if item.requires_grad and ".lora_" not in name}
    owners = sorted({name.rpartition(".")[0] for name in trained})
    for owner in owners:
        module = model.get_submodule(owner)
        inside = [f"{owner}.{leaf}" for leaf, _ in module.named_parameters()]
        tied = any(item is named[leaf] for leaf in inside for name, item in named.items() if name != leaf)
        if "base_layer" in owner or tied or any(True for _ in module.children()) or owner.split(".")[-1].isdigit():
            return None
    return owners
